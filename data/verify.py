"""The second pass over converted rows: image and video files, pairs, and the content keys that keep evaluation apart from training."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from common.threads import map_in_threads
from data.files import code_state
from data.images import check_image, forget_images, size_and_time
from data.pairs import ordered_pairs
from data.rows import IMAGE_MARK, REQUIRED, VIDEO_MARK, BadRow, Kind, Message, Row, SkippedRow, first_user_text
from data.videos import check_video, forget_videos

SAMPLE = 1000  # rows whose images `--check_images sample` looks at
_VERDICT = Features(
    {
        "problem": Value("string"),
        "skipped": Value("bool"),
        "group": Value("int64"),
        "content": Value("int64"),
        "sizes": [Value("int32")],
    }
)


class Verdicts(NamedTuple):
    """One entry per row.

    problem: why the row cannot be used, or None. skipped: it holds no preference, which is not a mistake.
    group: int64 key of the images, the videos and the first user's text. content: int64 key of the whole row.
    sizes: lists of int32: width and height of each image, one after the other, in pixels; null where no file was looked at.
    """

    problem: list[str | None]
    skipped: np.ndarray
    group: np.ndarray
    content: np.ndarray
    sizes: pa.ChunkedArray


def verify(
    rows: Dataset,
    kind: Kind,
    image_root: str,
    allow_outside: bool,
    pairs: str | None = None,
    score_margin: float | None = None,
    num_proc: int | None = None,
    decode: bool = False,
    check_images: Literal["all", "sample", "none"] = "all",
) -> Verdicts:
    """Look at the image and video files of every row, in parallel. Cached by `datasets`; an image that failed is looked at again.

    Args:
        pairs: with `score_margin`, the pairs that a loss will use: rows without any are skipped. None: no pairs are needed.
        decode: decode every image in full, and trust no cache.
        check_images: which rows' files are looked at. Unless it is all, equal images are known by their names, not by bytes.
    """
    forget_images()
    forget_videos()
    image_bytes = not isinstance(rows.features["images"].feature, Value)
    batch_size = 100 if image_bytes else 1000
    kwargs: dict[str, Any] = {
        "kind": kind,
        "image_root": image_root,
        "allow_outside": allow_outside,
        "pairs": pairs,
        "score_margin": score_margin,
        "decode": decode,
        "every": {"all": 1, "sample": max(len(rows) // SAMPLE, 1), "none": 0}[check_images],
        "by_name": check_images != "all",
        "code": code_state(),
        "files": "" if image_bytes or check_images == "none" else _state_of_files(rows, check_images),
    }
    needed = (
        *REQUIRED[kind],
        "images",
        "videos",
        "image_rejected",
        "ranks",
        "scores",
        "responses",
        "reference",
        *(["label"] if kind == "unpaired" else []),
        "problem",
        "skipped",
    )
    rows = rows.select_columns([name for name in dict.fromkeys(needed) if name in rows.column_names])

    def run(fresh: bool) -> Dataset:
        return rows.map(
            verify_batch,
            with_indices=True,
            batched=True,
            batch_size=batch_size,
            num_proc=num_proc if len(rows) > 1000 else None,
            remove_columns=rows.column_names,
            features=_VERDICT,
            load_from_cache_file=not fresh,
            desc="Checking images",
            fn_kwargs=kwargs,
        )

    verdict = run(fresh=decode)
    if not decode:
        # The cache knows the rows, not the files: a picture that was missing may have been put there since.
        failed = [i for i, problem in enumerate(_column(verdict, "problem")) if problem is not None]
        failed = [i for i, own in zip(failed, _column(rows.select(failed), "problem"), strict=True) if own is None]
        for start in range(0, len(failed), batch_size):
            some = failed[start : start + batch_size]
            if verify_batch(rows[some], some, **kwargs)["problem"] != verdict[some]["problem"]:
                verdict = run(fresh=True)
                break
    skipped, group, content = (np.array(_column(verdict, name)) for name in ("skipped", "group", "content"))
    sizes = verdict.with_format("arrow")[:]["sizes"] if len(verdict) else pa.chunked_array([[]], pa.list_(pa.int32()))
    return Verdicts(
        _column(verdict, "problem"), skipped.astype(bool), group.astype(np.int64), content.astype(np.int64), sizes
    )


def verify_batch(
    batch: Mapping[str, list],
    indices: Sequence[int],
    *,
    kind: Kind,
    image_root: str,
    allow_outside: bool,
    pairs: str | None,
    score_margin: float | None,
    decode: bool,
    every: int,
    by_name: bool,
    code: str,
    files: str,
) -> dict[str, list]:
    """Verdicts of some rows, for `datasets.map`: the images of each row whose number `every` divides. `code` and `files` are part of the
    cache's key."""
    out: dict[str, list] = {name: [] for name in _VERDICT}
    for i, index in enumerate(indices):
        row: Row = {name: values[i] for name, values in batch.items()}
        look = bool(every) and index % every == 0
        verdict = verify_row(row, kind, image_root, allow_outside, pairs, score_margin, decode, look, by_name)
        for name, value in zip(_VERDICT, verdict, strict=True):
            out[name].append(value)
    return out


class Verdict(NamedTuple):
    """One entry of `Verdicts`."""

    problem: str | None
    skipped: bool
    group: int
    content: int
    sizes: list[int] | None


def verify_row(
    row: Row,
    kind: Kind,
    image_root: str,
    allow_outside: bool,
    pairs: str | None,
    score_margin: float | None,
    decode: bool = False,
    look: bool = True,
    by_name: bool = False,
) -> Verdict:
    """The verdict on one row, at whose image files it looks with `look`; `by_name`: equal images are known by their names."""
    if row["problem"] is not None:
        return Verdict(str(row["problem"]), bool(row["skipped"]), 0, 0, None)
    sizes = None
    try:
        images, videos = list(row["images"]), list(row.get("videos") or ())  # type: ignore[call-overload]
        shown = len(images) + len(videos)
        rejected = [row["image_rejected"]] if row.get("image_rejected") is not None else []
        names = [*map(_name_of, images), *(_name_of("\n".join(files)) for files in videos), *map(_name_of, rejected)]
        signatures = names
        if look:
            checked = [check_image(image, image_root, allow_outside, decode) for image in images]
            sizes = [side for found in checked for side in found.size]
            films = [check_video(files, image_root, allow_outside, decode) for files in videos]
            others = [check_image(image, image_root, allow_outside, decode).signature for image in rejected]  # type: ignore[arg-type]
            signatures = names if by_name else [*(found.signature for found in checked), *films, *others]
        _check_pairs(row, pairs, score_margin)
        return Verdict(None, False, *_keys(row, kind, signatures, shown), sizes)
    except BadRow as error:
        return Verdict(str(error), isinstance(error, SkippedRow), 0, 0, sizes)


def _state_of_files(rows: Dataset, check_images: str) -> str:
    """Digest of size and time of change of the files that are looked at: a verdict is as old as its file."""
    every = max(len(rows) // SAMPLE, 1) if check_images == "sample" else 1
    found: set[str] = set()
    some = rows.select(range(0, len(rows), every)).with_format("arrow")[:] if len(rows) else {}
    for column in {"images", "videos", "image_rejected"} & set(rows.column_names) if len(rows) else ():
        values = some[column]
        while pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        found.update(name for name in pc.unique(values).to_pylist() if name)  # not a string for every row
    names = sorted(found)
    digest = hashlib.blake2b(digest_size=16)
    for name, state in zip(names, map_in_threads(size_and_time, names), strict=True):
        digest.update(f"{name} {state}\n".encode())
    return digest.hexdigest()


def _name_of(image: object) -> bytes:
    """What tells an image that nobody opens from others: its path, or its bytes."""
    data, path = (image.get("bytes"), image["path"]) if isinstance(image, Mapping) else (None, image)
    return hashlib.blake2b(data if data is not None else str(path).encode(), digest_size=16).digest()


def _check_pairs(row: Row, pairs: str | None, score_margin: float | None) -> None:
    if pairs is None:
        return
    if score_margin is not None and score_margin >= 0 and row.get("scores") is None:
        raise BadRow("has ranks and no scores, which --score_margin needs: leave the flag out or add `scores`")
    if not ordered_pairs(row["ranks"], row.get("scores"), pairs, score_margin):  # type: ignore[arg-type]
        why = "its responses are ranked equal" if score_margin is None else "no two scores are far enough apart"
        raise SkippedRow(f"holds no pair: {why}")


def _keys(row: Row, kind: Kind, signatures: list[bytes], shown: int) -> tuple[int, int]:
    messages: list[Message] = row["messages" if kind == "conversation" else "prompt"]  # type: ignore[assignment]
    # Neither spaces nor the place of the image makes another question.
    asked = " ".join(first_user_text(messages).replace(IMAGE_MARK, " ").replace(VIDEO_MARK, " ").split())
    texts = [messages, row.get("responses"), row.get("ranks"), row.get("reference")]
    if kind == "unpaired":
        texts.append(row["label"])
    return _key(b"".join(signatures[:shown]), asked), _key(b"".join(signatures), json.dumps(texts))


def _key(data: bytes, text: str) -> int:
    digest = hashlib.blake2b(data + b"\0" + text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _column(dataset: Dataset, name: str) -> list:
    return dataset.with_format("arrow")[:][name].to_pylist() if len(dataset) else []
