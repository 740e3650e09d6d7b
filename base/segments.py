"""Where the segments of packed rows lie, as numbers of Python: whoever reads them does not wait for the device."""

from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.tensors import to_device


class Sequences(NamedTuple):
    """Segments as the sequences of a variable-length attention kernel, each with the keys that it may see.

    Attributes:
        starts, key_starts: (S + 1,) int32, where each sequence of queries, and of keys, begins; the last one is their number.
        keys: (number of keys,) long, places in the end-to-end row of the keys of all sequences.
        longest, longest_keys: tokens, and keys, of the longest sequence.
    """

    starts: Tensor
    key_starts: Tensor
    keys: Tensor
    longest: int
    longest_keys: int


def causal_first(row: list[int]) -> list[int]:
    """Lengths of a row's sequences: what is shared and the first response, one causal sequence, and every other response."""
    return [sum(row[:2]), *row[2:]]


class Layout:
    """The segments of B packed rows (base/packing.py), and what every pass over them needs and would make anew.

    The collator makes it, on the CPU; it travels with its batch, to the device and through all passes.

    Attributes:
        shape: (B, L) of the padded rows.
        rows: of each row the lengths of its segments: what is shared, then every response.
    """

    def __init__(self, segment_ids: Tensor) -> None:
        """
        Args:
            segment_ids: (B, L), see base.batch.PackedBatch; padded on the right.
        """
        segment_ids = segment_ids.cpu()
        self.shape = tuple(segment_ids.shape)
        self.rows = [torch.unique_consecutive(row[row >= 0], return_counts=True)[1].tolist() for row in segment_ids]
        real = (segment_ids >= 0).flatten()
        self._index, self._places = real.nonzero()[:, 0], (real.long().cumsum(0) - 1).clamp(min=0)
        self._kept: dict[object, Any] = {}

    @property
    def tokens(self) -> int:
        """N, the tokens of all rows without padding."""
        return sum(map(sum, self.rows))

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than L."""
        return self.tokens < self.shape[0] * self.shape[1]

    @property
    def several(self) -> bool:
        """Whether any row holds several responses."""
        return any(len(row) > 2 for row in self.rows)

    def keep(self, name: object, make: Callable[[], Any]) -> Any:
        """What has this name, made when it is first asked for. It must not depend on who asks."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    # -- rows end to end -----------------------------------------------------------------------------------------------

    def end_to_end(self, of_tokens: Tensor, dim: int = 0) -> Tensor:
        """Leave the padding out: (..., B, L, ...) with B at `dim` -> (..., 1, N, ...)."""
        device = of_tokens.device
        index = self.keep(("index", device), lambda: to_device(self._index, device))  # (N,)
        return of_tokens.flatten(dim, dim + 1).index_select(dim, index).unsqueeze(dim)

    def places(self, index: Tensor) -> Tensor:
        """Flat positions b * L + t of real tokens -> places in the end-to-end row, (n,) -> (n,)."""
        return self.keep(("places", index.device), lambda: to_device(self._places, index.device))[index]

    # -- what attention by segments reads -------------------------------------------------------------------------------

    def response_mask(self, shared: int, own: int, device: torch.device) -> Tensor:
        """What `own` tokens of a response see of what is shared and of themselves: (own, shared + own) bool."""

        def make() -> Tensor:
            return torch.ones((own, shared + own), dtype=torch.bool, device=device).tril(diagonal=shared)

        return self.keep(("response mask", shared, own, device), make)

    def sequences(self, device: torch.device) -> Sequences:
        """The sequences of the end-to-end row, as `causal_first` joins its segments."""

        def make() -> Sequences:
            sizes, keys, start = [], [], 0
            for row in self.rows:
                first, *others = causal_first(row)
                sizes += [first, *others]
                shared = range(start, start + row[0])
                keys.append([*range(start, start + first)])
                start += first
                for n in others:
                    keys.append([*shared, *range(start, start + n)])
                    start += n
            of_keys = [len(places) for places in keys]
            starts, key_starts = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (sizes, of_keys))
            places = torch.tensor([*chain(*keys)])
            return Sequences(*to_device((starts, key_starts, places), device), max(sizes), max(of_keys))

        return self.keep(("sequences", device), make)
