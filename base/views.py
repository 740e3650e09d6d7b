"""Further rows that losses ask for (losses.NEEDS): responses on other images, without images, or a second time.

These are functions from rows to rows. The collator encodes a view's rows behind the rows of the batch,
for the same forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from base.corruption import Corruption, corrupt_pictures
from base.images import load_image
from common.errors import InputError
from data.rows import VIDEO_MARK

Row = dict[str, Any]
Pairs = Sequence[tuple[int, int]]  # (better, worse) response indices of a row


@dataclass(frozen=True)
class View:
    """One further row for each row of the batch, with some of its responses: `repeated` has their indices 0..K-1."""

    rows: Sequence[Row] = ()
    repeated: Sequence[Sequence[int]] = ()

    @classmethod
    def of(cls, rows: Sequence[Row], images: Sequence[Sequence[Any]], repeated: Sequence[Sequence[int]]) -> "View":
        """The rows with other images and the responses `repeated` only."""
        further = [
            row | {"images": list(others), "responses": [row["responses"][k] for k in responses]}
            for row, others, responses in zip(rows, images, repeated, strict=True)
        ]
        return cls(further, repeated)

    def __len__(self) -> int:
        """Responses of all rows of the view."""
        return sum(map(len, self.repeated))


def better_responses(pairs: Pairs) -> list[int]:
    """The responses of a row that are chosen in a pair; the first one for a row without pairs, for its view."""
    return sorted({better for better, _ in pairs} or {0})


def paired_responses(pairs: Pairs) -> list[int]:
    """The responses of a row that are in a pair; the first one for a row without pairs."""
    return sorted({k for pair in pairs for k in pair} or {0})


def corrupted_view(
    rows: Sequence[Row], repeated: Sequence[Sequence[int]], corruption: Corruption | None, seeds: Sequence[int]
) -> View:
    """The rows with corrupted images: v' in place of v.

    Raises:
        InputError: an image cannot be read, there is no other row to swap images with, or a row has a video.
    """
    if film := next((row for row in rows if row.get("videos")), None):
        raise InputError(
            f"{film.get('where') or 'A row'} has a video, and the loss compares with corrupted pictures, which are not made of "
            "videos: leave such rows out, or choose another --loss_type."
        )
    pictures = [[load_image(image) for image in row["images"]] for row in rows]
    return View.of(rows, corrupt_pictures(pictures, corruption, seeds), repeated)


def image_rejected_view(rows: Sequence[Row], repeated: Sequence[Sequence[int]]) -> View:
    """The rows with their column `image_rejected` in place of the first image."""
    return View.of(rows, [[row["image_rejected"], *row["images"][1:]] for row in rows], repeated)


def without_images(row: Row, remove_image_placeholder: Callable[[str], str]) -> Row:
    """The row as a text-only one."""
    prompt = []
    for message in row["prompt"]:
        content = message["content"]
        if isinstance(content, str):
            content = remove_image_placeholder(content)
            content = (content.replace(VIDEO_MARK, "") if row.get("videos") else content).strip("\n")
        else:
            content = [part for part in content if part["type"] not in ("image", "video")]
        prompt.append({"role": message["role"], "content": content})
    return row | {"images": [], "prompt": prompt} | ({"videos": []} if row.get("videos") else {})


def with_copies(row: Row, responses: Sequence[int]) -> Row:
    """The row with some of its responses a second time, at its end."""
    return row | {"responses": [*row["responses"], *(row["responses"][k] for k in responses)]}


def with_mismatched(rows: Sequence[Row]) -> list[Row]:
    """Unpaired rows with a second response, the answer of the row before; the first row gets the last one's, as in TRL.

    A row's column `mismatched` takes precedence (`fixed_mismatches`). A row alone has no other to take an answer from, and neither
    gives nor takes one a row that fills up the last batch of an evaluation.
    """
    counted = [row for row in rows if not row.get("repeated")]
    before = iter([*counted[-1:], *counted[:-1]])
    out = []
    for row in rows:
        given = None if row.get("repeated") or len(counted) < 2 else next(before)["responses"][0]
        answer = row.get("mismatched") or given
        out.append(row if answer is None else row | {"responses": [row["responses"][0], answer]})
    return out


def fixed_mismatches(answers: Sequence[str], size: int) -> list[str]:
    """The same pairing once and for all, within every `size` rows in order: for each of n answers the one from before it.

    A row that is left alone at the end takes the answer of the row before it.
    """
    before = [i - 1 for i in range(len(answers))]
    for start in range(0, len(answers), size):
        last = min(start + size, len(answers)) - 1
        before[start] = last if last > start else start - 1
    return [answers[i] for i in before]


class Places:
    """Where responses stand among all R of a batch: those of the rows come first, row after row."""

    def __init__(self, rows: Sequence[Row], num_responses: int) -> None:
        self.num_responses = num_responses
        counts = [len(row["responses"]) for row in rows]
        self.starts = [0, *accumulate(counts)]  # of each row's first response; the last one is of what follows the rows

    @property
    def end(self) -> int:
        """Place of the first response behind those of the rows."""
        return self.starts[-1]

    def of(self, responses: Sequence[Sequence[int]]) -> torch.Tensor:
        """Places (n,) long of n responses, given as indices 0..K-1 for each row."""
        places = [start + k for start, row in zip(self.starts, responses, strict=False) for k in row]
        return torch.tensor(places, dtype=torch.long)

    def repeats(self, responses: Sequence[Sequence[int]], copies: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """For each response of the batch the place of its copy, -1 where it has none: (R,) long."""
        index = torch.full((self.num_responses,), -1)
        index[self.of(responses)] = torch.as_tensor(copies)
        return index
