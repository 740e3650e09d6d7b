"""Rows put together into bins of at most so many tokens, for `--packing`."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows by bin: the longest first, each into the fullest bin that has room for it (best fit decreasing).

    Args:
        lengths: tokens of every row, none above `capacity`.

    Returns:
        The row numbers of each bin in rising order, bins in the order of their first rows. Equal lengths give equal bins.

    Raises:
        ValueError: a row is longer than `capacity`.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"a row of {max(lengths)} tokens does not fit a bin of {capacity}")
    bins: list[list[int]] = []
    rooms: list[int] = []  # what is left in any bin, each number once, rising
    with_room: dict[int, list[int]] = defaultdict(list)  # bins by what is left in them
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[row])
        if at < len(rooms):
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(row)
        left = room - lengths[row]
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(chosen)
    return sorted(map(sorted, bins))


class Bins(torch.utils.data.Dataset):
    """Rows by bin: a data loader counts, shuffles and shares out bins, and its collator gets the rows of those that are drawn."""

    def __init__(self, rows: Dataset, bins: list[list[int]]) -> None:
        self.rows, self.bins = rows, bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """The rows of one bin."""
        return [self.rows[i] for i in self.bins[index]]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The rows of these bins, one after the other; what PyTorch's loader asks for."""
        return [row for index in indices for row in self[index]]
