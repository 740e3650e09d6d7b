"""The columns of a record: renamed by `--columns`, read by the format, kept for losses and reward functions, or refused by name.

A format's `convert` reads what it knows from a `Record`, which remembers the names. What is left over is dealt with here,
for every format alike: pictures, sound, film and answers that would be lost make the row a bad one; texts, numbers,
booleans and lists of those stay in the row as columns of the user's own; nothing else is dropped without being listed.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets

from common.errors import InputError
from data.rows import BadRow, shorten

# Columns of rows, and what trainers put beside them: a column of the user's own cannot have these names.
RESERVED = {
    "images", "messages", "prompt", "responses", "ranks", "scores", "severity", "margin", "image_rejected", "reference",
    "source", "where", "problem", "skipped", "columns", "kept", "length", "lengths", "reference_logps", "rewards",
    "input_ids", "attention_mask", "labels",
}  # fmt: skip
_MAX_KEPT = 100  # more names than that are data, not columns

_PICTURE_FILE = re.compile(r"\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|ppm|jp2|avif|ico|heic|heif)(\?.*)?$", re.IGNORECASE)
_FILM_FILE = re.compile(r"\.(mp4|avi|mov|mkv|webm|m4v|mpe?g)(\?.*)?$", re.IGNORECASE)
_SOUND_FILE = re.compile(r"\.(wav|mp3|flac|ogg|opus|m4a|aac)(\?.*)?$", re.IGNORECASE)
_PICTURE_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_PICTURE_BASE64 = ("data:image", "iVBORw0KGgo", "/9j/", "R0lGOD")
_PICTURE_WORDS = {"image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "pixels"}
_PICTURE_WORDS |= {"pixel", "screenshot", "screenshots", "frame", "frames"}
# `image_id`, `image_caption`: about a picture, not its name.
_ABOUT_WORDS = {
    "id", "ids", "size", "width", "height", "wh", "ratio", "aspect", "source", "type", "caption", "captions", "text",
    "description", "question", "answer", "count", "num", "number", "n", "has", "is", "with", "format", "mode", "license",
    "hash", "sha", "md5", "category", "class", "label", "labels", "split", "dataset", "set", "token", "tokens", "grid",
    "quality", "score", "index", "idx", "credit", "author", "title", "date", "tag", "tags", "start", "end", "rate", "fps",
}  # fmt: skip
# Answers and labels that a conversation would be trained without, or against.
_ANSWERS = re.compile(
    r"(rejected|reject|chosen|worse|better|bad|good|losing|winning|negative|positive)"
    r"(_(response|answer|text|output|message|completion|conversation|image)s?)?|responses|completions|scores|ranks"
)


class Record(dict):
    """One record of a file. `read` holds the names that a format's `convert` asked for; copying or listing it reads all."""

    def __init__(self, values: Mapping[str, object]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> object:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> Any:  # noqa: ANN401  what a dict gives
        """A column that counts as read from now on."""
        self.read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self.read.update(dict.keys(self))
        return super().__iter__()

    def items(self) -> Any:  # noqa: ANN401  the class of dict.items has no public name
        """All columns; they count as read from now on."""
        self.read.update(dict.keys(self))
        return super().items()

    def present(self) -> dict[str, object]:
        """Names and values that are not null, without counting as read."""
        return {name: value for name, value in dict.items(self) if value is not None}

    def unread(self) -> dict[str, object]:
        """Names and values that nothing has read."""
        return {name: value for name, value in self.present().items() if name not in self.read}


# ----------------------------------------------------------------------------------------------------------------------
# --columns


def column_map(value: str | None) -> dict[str, str]:
    """`prompt=question,image=file,=mask` -> {"question": "prompt", "file": "image", "mask": ""}: name in the file -> our name.

    Raises:
        InputError: an entry is not of this form, or a name stands on one side twice.
    """
    found: dict[str, str] = {}
    for entry in (value or "").split(","):
        if not entry.strip():
            continue
        ours, equals, theirs = (part.strip() for part in entry.partition("="))
        if not equals or not theirs:
            raise InputError(
                f"--columns {value} holds {entry.strip()!r}: write name=column for each (prompt=question,image=file), and "
                "=column for one that is to be left out."
            )
        if theirs in found or (ours and ours in found.values()):
            raise InputError(f"--columns {value} names {theirs if theirs in found else ours} twice: name it once.")
        found[theirs] = ours
    return found


def renamed(record: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """The record under the names that `--columns` gives. Raises BadRow where a new name is taken."""
    if not names:
        return dict(record)
    new = {names.get(name, name): value for name, value in record.items() if names.get(name, name)}
    for theirs, ours in names.items():
        if ours and theirs in record and record.get(ours) is not None and ours not in names:
            raise BadRow(
                f"has a `{ours}` beside `{theirs}`, which --columns makes its `{ours}`: add ={ours} to --columns to leave "
                "the former out"
            )
        if ours and theirs in record:
            new[ours] = record[theirs]
    return new


# ----------------------------------------------------------------------------------------------------------------------
# What a format has not read


def own_columns(record: Record, row: Mapping[str, object], kind: str) -> tuple[dict[str, object], dict[str, str]]:
    """Of the columns that the format has not read: those to keep, and those not kept, with the reason.

    Args:
        row: what the format made of the record, images as names or {"bytes", "path"}.

    Raises:
        BadRow: a column holds what the row would lose: a picture, sound, film, or answers.
    """
    images = list(row.get("images") or [])  # type: ignore[call-overload]
    if row.get("image_rejected") is not None:
        images.append(row["image_rejected"])
    labels = {_stem(image.get("path") if isinstance(image, Mapping) else image) for image in images}
    kept: dict[str, object] = {}
    left_out: dict[str, str] = {}
    for name, value in record.unread().items():
        _refuse_media(name, value, images, labels)
        _refuse_answers(name, value, kind)
        if name == "objects" and re.search(r"<bbox>|<ref-object>", json.dumps(row, default=str)):
            raise BadRow("has `objects` for the marks <bbox> and <ref-object>, which are not filled in: write them out")
        if name in RESERVED:
            left_out[name] = "a name that the project uses"
        elif type_of(value) is None or not _is_name(name):
            left_out[name] = "neither a text, a number, a boolean nor a list of those"
        elif len(kept) == _MAX_KEPT:
            left_out[name] = f"beyond {_MAX_KEPT} columns"
        else:
            kept[name] = value
    return kept, left_out


def _refuse_media(name: str, value: object, images: list, labels: set[str]) -> None:
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))
    named = isinstance(value, str | list | Mapping | bytes) and bool(value) and not words & _ABOUT_WORDS
    for medium, files in (("video", _FILM_FILE), ("audio", _SOUND_FILE)):
        if (named and words & {medium, medium + "s"}) or _find(value, functools.partial(_is_file, files=files)):
            article = "an" if medium == "audio" else "a"
            shown = shorten(repr(value[0] if isinstance(value, list) and value else value), 80)
            raise BadRow(f"is {article} {medium} row ({shown}): {medium}s are not supported, take it out")
    picture = _find(value, _is_picture)
    if picture is None and named and words & _PICTURE_WORDS and not images:
        first = value[0] if isinstance(value, list) else value
        if not isinstance(first, str) or len(first.split()) <= 3:
            picture = first
    if picture is None:
        return
    # Beside an image that is read: its own name, where it came from, or the name of what is there as bytes.
    if (
        images
        and isinstance(picture, str)
        and (_stem(picture) in labels or re.match(r"https?://", picture) or "" in labels)
    ):
        return
    shown = shorten(picture, 80) if isinstance(picture, str) else "as bytes"
    beside = " beside the image of the row" if images else ""
    raise BadRow(
        f"has a picture in `{name}`{beside} ({shown}), which is not read: make it the image with --columns image={name}, or "
        f"leave it out with --columns ={name}"
    )


def _refuse_answers(name: str, value: object, kind: str) -> None:
    if name == "tools" and value not in ("", "[]") and value:
        raise BadRow("has `tools`: calls of tools are not supported, take the row out")
    if name == "kto_tag" or (name == "label" and kind == "conversation" and value in (0, 1)):
        raise BadRow(
            f"has a `{name}` ({value}), which says whether one answer is good (KTO): that is not supported; give pairs, or "
            f"leave it out with --columns ={name}"
        )
    if kind == "conversation" and value not in ("", []) and _ANSWERS.fullmatch(name):
        raise BadRow(
            f"has `{name}` beside the conversation, which would not be read: leave it out with --columns ={name}, or choose "
            "the --dataset_name of this format"
        )


def _find(value: object, test: Callable[[str | bytes], bool], depth: int = 5) -> Any:  # noqa: ANN401  whatever it finds
    """The first text or bytes within a value that passes the test."""
    if isinstance(value, str | bytes):
        return value if test(value) else None
    if depth and isinstance(value, list | Mapping):
        for inner in list(value.values() if isinstance(value, Mapping) else value)[:50]:
            if (found := _find(inner, test, depth - 1)) is not None:
                return found
    return None


def _is_picture(leaf: str | bytes) -> bool:
    if isinstance(leaf, bytes):
        return leaf.startswith(_PICTURE_BYTES) or (leaf[:4] == b"RIFF" and leaf[8:12] == b"WEBP")
    return _is_file(leaf, _PICTURE_FILE) or (len(leaf) > 60 and leaf.startswith(_PICTURE_BASE64))


def _is_file(leaf: str | bytes, files: re.Pattern[str]) -> bool:
    """A file's name, not a sentence that ends with one."""
    return isinstance(leaf, str) and len(leaf) < 1000 and bool(files.search(leaf)) and len(leaf.split()) <= 3


def _stem(name: object) -> str:
    return os.path.splitext(os.path.basename(str(name or "")))[0]


def _is_name(name: object) -> bool:
    try:
        return isinstance(name, str) and 0 < len(name.encode()) <= 200
    except UnicodeEncodeError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Kept columns: one JSON text per row at first, columns of one type each in the end


def type_of(value: object) -> str | None:
    """bool, int, float, text, or a list of one of them (list, where it is empty); None for anything else."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else None
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None
        return "text"
    if isinstance(value, list):
        merged = ""
        for inner in value:
            if inner is not None:
                kind = type_of(inner)
                if kind is None or kind.startswith("list"):
                    return None
                merged = _merged(merged, kind)
        return f"list {merged}".strip()
    return None


def _merged(a: str, b: str) -> str:
    """The type that holds both: numbers of both kinds are floats, anything else that differs becomes text."""
    if a == b or not a or not b:
        return a or b
    if a.startswith("list") and b.startswith("list"):
        return f"list {_merged(a[5:], b[5:])}".strip()
    return "float" if {a, b} == {"int", "float"} else "text"


def with_own_columns(rows: Dataset, num_proc: int | None) -> Dataset:
    """The rows with what their column `kept` (JSON) holds as columns of its own. Cached by `datasets`, as the rows are."""
    kept = rows.data.column("kept")
    if kept.null_count == len(kept):
        return rows.remove_columns("kept")
    texts = rows.select_columns("kept")
    partial = texts.map(
        _types_of_batch, batched=True, num_proc=num_proc, remove_columns="kept", desc="Reading columns of your own"
    )
    types: dict[str, str] = {}
    for found in map(json.loads, partial["types"]):
        for name, kind in found.items():
            types[name] = _merged(types.get(name, ""), kind)
    types = dict(list(types.items())[:_MAX_KEPT])
    features = Features({name: _feature(kind) for name, kind in types.items()})
    own = texts.map(
        _columns_of_batch,
        batched=True,
        num_proc=num_proc,
        remove_columns="kept",
        features=features,
        fn_kwargs={"types": types},
        desc="Keeping columns of your own",
    )
    return concatenate_datasets([rows.remove_columns("kept"), own], axis=1)


def _types_of_batch(batch: Mapping[str, list]) -> dict[str, list]:
    types: dict[str, str] = {}
    for text in batch["kept"]:
        for name, value in json.loads(text).items() if text else ():
            types[name] = _merged(types.get(name, ""), type_of(value) or "text")
    return {"types": [json.dumps(types)]}


def _columns_of_batch(batch: Mapping[str, list], types: Mapping[str, str]) -> dict[str, list]:
    records = [json.loads(text) if text else {} for text in batch["kept"]]
    return {name: [_as_type(record.get(name), kind) for record in records] for name, kind in types.items()}


def _as_type(value: object, kind: str) -> object:
    if value is None:
        return None
    if kind == "text":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if kind.startswith("list"):
        return [_as_type(inner, kind[5:] or "text") for inner in value]  # type: ignore[attr-defined]
    return float(value) if kind == "float" else value  # type: ignore[arg-type]


def _feature(kind: str) -> Any:  # noqa: ANN401  datasets writes features as values, lists and dicts
    if kind.startswith("list"):
        return [_feature(kind[5:] or "text")]
    return Value({"bool": "bool", "int": "int64", "float": "float64", "text": "string"}[kind])


def used_and_left_out(rows: Dataset) -> tuple[list[str], dict[str, str]]:
    """Of a data set: the columns that its format reads in any row, and those that are not kept, with the reason."""
    used: set[str] = set()
    left_out: dict[str, str] = {}
    if "columns" in rows.column_names:
        for text in pc.unique(rows.data.column("columns")).to_pylist():
            found = json.loads(text) if text else {}
            used.update(found.get("used", ()))
            left_out |= found.get("left_out", {})
    return sorted(used), left_out
