"""The columns of a record: renamed by `--columns`, read by the format, kept for losses and reward functions, or refused by name.

A format's `convert` reads what it knows from a `Record`, which remembers the names. What is left over is dealt with here,
for every format alike: pictures, sound, film and answers that would be lost make the row a bad one; texts, numbers,
booleans and lists of those stay in the row as columns of the user's own; nothing else is dropped without being listed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets

from common.errors import InputError
from data.media import medium_of, stem, words_of
from data.rows import BadRow, label_of, shorten

# Columns of rows, and what trainers put beside them: a column of the user's own cannot have these names.
RESERVED = {
    "images", "videos", "messages", "prompt", "responses", "ranks", "scores", "severity", "margin", "image_rejected", "reference",
    "source", "where", "problem", "skipped", "columns", "kept", "length", "lengths", "reference_logps", "mismatched", "rewards",
    "input_ids", "attention_mask", "labels",
}  # fmt: skip
_MAX_KEPT = 100  # more names than that are data, not columns

# Answers that a conversation would be trained without: columns of these names, and those whose name says that an answer is
# better or worse than another.
_ANSWERS = re.compile(
    r"(worse|better|bad|good|positive)(_(response|answer|text|output|message|completion|conversation|image)s?)?"
    r"|responses|completions|scores|ranks"
)
_ANSWER_WORDS = {
    "rejected",
    "reject",
    "rejects",
    "chosen",
    "preferred",
    "dispreferred",
    "unpreferred",
    "losing",
    "loser",
}
_ANSWER_WORDS |= {"winning", "winner", "negative", "negatives", "neg", "worst", "best"}
# Labels of one answer, as KTO has them: names that have no other words, and values.
_LABEL_WORDS = {
    "label",
    "desirable",
    "undesirable",
    "preferred",
    "chosen",
    "rejected",
    "accepted",
    "liked",
    "good",
    "bad",
}
_LABEL_WORDS |= {"is", "was", "kto", "tag"}
# A column whose name has no words but these, and one of the first two, is the system prompt.
_SYSTEM_WORDS = {"system", "sys", "prompt", "message", "msg", "instruction", "instructions", "text"}
# What tells messages and ranked answers from other objects.
_KEYS_OF_ITEMS = {"role", "from", "human", "response", "score", "rank"}
# Keys of messages, their parts and ranked answers that some format reads; others are listed.
_KEYS_READ = {
    "role", "from", "content", "value", "human", "assistant", "loss", "weight", "loss_weight", "train", "trainable", "type", "text", "image",
    "image_url", "video", "video_url", "path", "url", "bytes", "response", "answer", "rank", "score", "annotations",
}  # fmt: skip


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
    labels = {stem(image.get("path") if isinstance(image, Mapping) else image) for image in images}
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
    found = medium_of(name, value, beside_images=bool(images))
    if found is None:
        return
    medium, named = found
    if medium == "audio":
        raise BadRow(
            f"is an audio row (its `{name}` is {shorten(repr(named), 80)}): audios are not supported, take it out"
        )
    if medium == "video":
        raise BadRow(
            f"has a video in `{name}` ({shorten(repr(named), 80)}), which is not read: make it the video with --columns videos={name}, "
            f"or leave it out with --columns ={name}"
        )
    # Beside an image that is read: its own name, where it came from, or the name of what is there as bytes.
    if images and isinstance(named, str) and (stem(named) in labels or re.match(r"https?://", named) or "" in labels):
        return
    shown = shorten(named, 80) if isinstance(named, str) else "as bytes"
    beside = " beside the image of the row" if images else ""
    raise BadRow(
        f"has a picture in `{name}`{beside} ({shown}), which is not read: make it the image with --columns image={name}, or "
        f"leave it out with --columns ={name}"
    )


def _refuse_answers(name: str, value: object, kind: str) -> None:
    if name == "tools" and value not in ("", "[]") and value:
        raise BadRow("has `tools`: calls of tools are not supported, take the row out")
    words = words_of(name)
    is_label = label_of(value) is not None and words and words <= _LABEL_WORDS
    if name == "kto_tag" or (kind in ("conversation", "unpaired") and is_label):
        raise BadRow(
            f"has a `{name}` ({value}), which says whether one answer is good: call it label for train_dpo.py --loss_type kto "
            f"(--columns label={name}), or leave it out with --columns ={name}"
        )
    is_answer = _ANSWERS.fullmatch(name) or (words & _ANSWER_WORDS and isinstance(value, str | list | Mapping))
    if kind in ("conversation", "unpaired") and value not in ("", [], {}) and is_answer:
        raise BadRow(
            f"has `{name}` beside the conversation, which would not be read: leave it out with --columns ={name}, or choose "
            "the --dataset_name of this format"
        )


def system_of(record: Record) -> str | None:
    """The name of an unread column that holds the system prompt: `system`, `system_prompt`, `systemMessage`, `sys`, ..."""
    for name, value in record.unread().items():
        words = words_of(str(name))
        if isinstance(value, str) and words & {"system", "sys"} and words <= _SYSTEM_WORDS:
            return name
    return None


def unread_keys(record: Record) -> set[str]:
    """`messages[].id` for every key of messages, parts and ranked answers in columns that were read, which no format knows."""
    found: set[str] = set()
    for name in record.read & record.present().keys():
        value = dict.__getitem__(record, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping) and item.keys() & _KEYS_OF_ITEMS:
                found |= {f"{name}[].{key}" for key in _unknown(item)}
                parts = item.get("content")
                for part in parts if isinstance(parts, list) else ():
                    if isinstance(part, Mapping):
                        found |= {f"{name}[].content[].{key}" for key in _unknown(part)}
    return found


def _unknown(item: Mapping) -> list[str]:
    return [key for key, value in item.items() if key not in _KEYS_READ and value is not None and _is_name(key)]


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
