"""What a model's processor would refuse in the middle of training, found with the rows: pictures, numbers of pictures, turns, tokens.

Nothing is decoded: the sizes of the pictures are known from their headers, and each arrangement of turns and pictures, and
each odd size, is tried once on blank pictures.
"""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from PIL import Image

from base.processor import VLProcessor
from base.videos import Medium, Video
from data.rows import IMAGE_MARK, VIDEO_MARK, Kind

# Sizes that some image processor may refuse; others are not tried.
_SMALL, _NARROW = 64, 20
_FRAMES = 2  # of the videos that stand for a row's
# Beyond this a picture whose short side is scaled up fills the memory.
_TOO_NARROW = 1000
_MAX_TRIED = 500
_FOUND = Features({"token": Value("string"), "shape": Value("string")})


class ProcessorCheck:
    """`data.RowCheck`: why a row cannot be made into a batch of this processor, or None."""

    def __init__(self, processor: VLProcessor) -> None:
        self.processor = processor
        self._known: dict[object, str | None] = {}  # of `of_row`: arrangements and sizes, each tried once

    def __call__(
        self, rows: Dataset, kind: Kind, sizes: pa.ChunkedArray, num_proc: int | None = None
    ) -> list[str | None]:
        """Why the model's processor refuses each row, or None."""
        column = "messages" if kind == "conversation" else "prompt"
        columns = [name for name in (column, "responses") if name in rows.column_names]
        found = rows.select_columns(columns).map(
            _look_at_batch,
            batched=True,
            num_proc=num_proc if len(rows) > 1000 else None,
            remove_columns=columns,
            features=_FOUND,
            desc="Checking texts",
            fn_kwargs={"column": column, "pattern": self.tokens().pattern},
        )
        reasons: list[str | None] = [None] * len(rows)
        narrow = self.refused_sizes(sizes)
        for i in _rows_with(sizes, narrow):
            flat = sizes[i].as_py()
            reasons[i] = next(narrow[size] for size in zip(flat[::2], flat[1::2], strict=True) if size in narrow)
        shapes = found.data.column("shape")
        for shape in pc.unique(shapes).to_pylist()[:_MAX_TRIED]:
            if reason := self.refused_shape(json.loads(shape), kind):
                for i in np.flatnonzero(pc.equal(shapes, shape)):
                    reasons[i] = reason
        tokens = found.data.column("token")
        for i in np.flatnonzero(pc.is_valid(tokens)):
            reasons[i] = self._has_token(tokens[i].as_py())
        return reasons

    def of_row(self, row: Mapping[str, object], kind: Kind, sizes: Sequence[int] | None) -> str | None:
        """Why the model's processor refuses one row, or None.

        Args:
            sizes: width and height of each picture, one after the other; None: no file was looked at.
        """
        column = "messages" if kind == "conversation" else "prompt"
        batch = {name: [row[name]] for name in (column, "responses") if row.get(name) is not None}
        (token,), (shape,) = _look_at_batch(batch, column, self.tokens().pattern).values()
        if token is not None:
            return self._has_token(token)
        if (kind, shape) not in self._known and len(self._known) < _MAX_TRIED:
            self._known[kind, shape] = self.refused_shape(json.loads(shape), kind)
        if reason := self._known.get((kind, shape)):
            return reason
        for size in zip(sizes[::2], sizes[1::2], strict=True) if sizes else ():
            if size not in self._known and len(self._known) < 2 * _MAX_TRIED:
                self._known[size] = self.refused_sizes(pa.chunked_array([[list(size)]], pa.list_(pa.int32()))).get(size)
            if reason := self._known.get(size):
                return reason
        return None

    @functools.cache  # noqa: B019  one check per run
    def tokens(self) -> re.Pattern[str]:
        """The tokens of this tokenizer that stand for pictures, video or sound, but for the mark `<image>`; and those that the model lacks."""
        tokenizer = self.processor.tokenizer
        names = {self.processor.image_token, *tokenizer.get_added_vocab()}
        odd = [n for n in names if re.search(r"\W", n) and re.search("image|img|vision|video|audio", n, re.IGNORECASE)]
        odd += self.processor.tokens_without_embedding
        return re.compile(
            "|".join(re.escape(n) for n in sorted(odd, key=len, reverse=True) if n != IMAGE_MARK) or "(?!)"
        )

    def _has_token(self, token: str) -> str:
        if token in self.processor.tokens_without_embedding:
            return (
                f"has {token} in its texts, for which the model has no embedding: take the tokenizer that the checkpoint came "
                "with, or call resize_token_embeddings on the model once and save it"
            )
        return f"has {token} in its texts, which stands for a picture: take it out"

    def refused_shape(self, shape: Sequence[tuple[str, int, int]], kind: Kind) -> str | None:
        """Whether turns of these roles, with these numbers of pictures and videos, can be encoded."""
        messages = [
            {"role": role, "content": IMAGE_MARK * images + VIDEO_MARK * videos + "a"} for role, images, videos in shape
        ]
        blank = Image.new("RGB", (_SMALL, _SMALL))
        pictures = [blank] * sum(images for _, images, _ in shape)
        return self._refused(messages, [*pictures, *[Video((blank,) * _FRAMES)] * sum(n for *_, n in shape)], kind)

    def refused_sizes(self, sizes: pa.ChunkedArray) -> dict[tuple[int, int], str]:
        """Of all pictures' sizes, those that the processor refuses, with the reason."""
        flat = pc.list_flatten(sizes).to_numpy().reshape(-1, 2)
        if not len(flat):
            return {}
        found = np.unique(flat, axis=0)
        narrow = found.max(1) / found.min(1)
        odd = (narrow > _NARROW) | (found.min(1) < _SMALL)
        order = np.argsort(-narrow[odd], kind="stable")
        refused = {}
        for n, (width, height) in enumerate(found[odd][order].tolist()):
            name = f"has a picture of {width} x {height} pixels"
            if max(width, height) / min(width, height) > _TOO_NARROW:
                refused[width, height] = f"{name}, too narrow for any model: crop it or take the row out"
            elif n < _MAX_TRIED:
                blank = Image.new("RGB", (width, height))
                reason = self._refused([{"role": "user", "content": f"{IMAGE_MARK}a"}], [blank], "prompt")
                if reason is not None:
                    refused[width, height] = f"{name}, which the model's processor refuses ({reason})"
        return refused

    def _refused(self, messages: list[dict[str, str]], pictures: list[Medium], kind: Kind) -> str | None:
        processor = self.processor
        try:
            if kind == "conversation":
                processor.encode_talks([messages], [pictures])
            else:
                processor.encode_conversations([messages], [pictures])
        except ValueError as error:  # InputErrors are ValueErrors
            return str(error).rstrip(".")
        return None


def _rows_with(sizes: pa.ChunkedArray, some: Collection[tuple[int, int]]) -> list[int]:
    """Rows with a picture of one of these sizes."""
    if not some:
        return []
    flat = pc.list_flatten(sizes).to_numpy().reshape(-1, 2).astype(np.int64)
    wanted = np.isin(flat[:, 0] << 32 | flat[:, 1], [width << 32 | height for width, height in some])
    row_of = pc.list_parent_indices(sizes).to_numpy()[::2]
    return np.unique(row_of[wanted]).tolist()


def _videos_in(message: Mapping[str, str]) -> int:
    return message["content"].count(VIDEO_MARK) if message["role"] == "user" else 0


def _look_at_batch(batch: Mapping[str, list], column: str, pattern: str) -> dict[str, list]:
    tokens = re.compile(pattern)
    out: dict[str, list] = {"token": [], "shape": []}
    for i, messages in enumerate(batch[column]):
        texts = [m["content"].replace(VIDEO_MARK, "") if m["role"] == "user" else m["content"] for m in messages]
        texts += batch["responses"][i] if "responses" in batch else []
        out["token"].append(next((m.group() for m in map(tokens.search, texts) if m), None))
        shape = [[m["role"], m["content"].count(IMAGE_MARK), _videos_in(m)] for m in messages]
        out["shape"].append(json.dumps(shape))
    return out
