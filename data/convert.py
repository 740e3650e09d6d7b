"""One record of a file -> one row: what is common to all formats around a format's own `convert`."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.columns import Record, own_columns, renamed, system_of, unread_keys
from data.rows import (
    BadRow,
    Kind,
    Message,
    Row,
    SkippedRow,
    check_row,
    features_of,
    normal_path,
    repeated_key,
    text_of,
    type_name,
)
from data.videos import video_column, videos_of

# Columns of a table whose cells may hold JSON or numbers; all other cells are texts.
_STRUCTURED = {
    "image",
    "images",
    "video",
    "videos",
    "messages",
    "conversations",
    "responses",
    "completions",
    "ranks",
    "scores",
    "history",
}
_NUMBERS = {"margin"}


@dataclass(frozen=True)
class Reader:
    """How the records of one data set become rows.

    Attributes:
        convert: of the format, one record to a row.
        is_text: records are JSON texts with their file and place (`files._RECORD`).
        image_bytes: whether rows may hold pictures, not only their paths.
        source, label: the name and the place of the set, for messages.
        names: `--columns`.
    """

    convert: Callable[[dict, Kind], Row]
    kind: Kind
    is_text: bool
    image_bytes: bool
    image_root: str
    allow_outside: bool
    source: str
    label: str
    names: Mapping[str, str]

    def row(self, raw: Mapping[str, Any], index: int) -> tuple[Row, dict[str, object]]:
        """One record as a row, with `problem`, `skipped` and `columns`, and the columns of the user's own beside it.

        What cannot be converted becomes an empty row with its `problem`.
        """
        row: Row = {}
        kept: dict[str, object] = {}
        problem, skipped, root = None, False, self.image_root
        where = f"{self.label}, row {index}"
        try:
            if self.is_text:
                line = f" (line {raw['line']})" if raw["line"] else ""
                where = f"{raw['file']}, row {raw['row']}{line}"
                root = raw["root"] or self.image_root
                record = Record(renamed(_parse(raw), self.names))
                if raw["table"]:
                    record.update(_cells(record))
            else:
                record = Record(renamed(raw, self.names))
            row = self.convert(record, self.kind)
            videos = video_column(record)
            _use_system(record, row, self.kind)
            _use_images_of_parts(row, self.kind)
            videos = _or_those_of_parts(videos, row, self.kind)
            kept, left_out = own_columns(record, row, self.kind)
            left_out |= dict.fromkeys(sorted(unread_keys(record)), "a key that no format reads")
            row["images"] = _with_paths(row["images"], root, self.image_root, self.allow_outside, self.image_bytes)  # type: ignore[arg-type]
            if row.get("image_rejected") is not None:
                (row["image_rejected"],) = _with_paths(
                    [row["image_rejected"]], root, self.image_root, self.allow_outside, self.image_bytes
                )
            films = [_with_paths(v, root, self.image_root, self.allow_outside, False, "video") for v in videos]
            row["videos"] = films or None
            row = check_row(self.kind, row)
            used = sorted(record.read & record.present().keys())
            row["columns"] = json.dumps({"used": used} | ({"left_out": left_out} if left_out else {}))
        except BadRow as error:
            row, kept, problem, skipped = {}, {}, str(error), isinstance(error, SkippedRow)
        except Exception as error:  # a loader's mistake, not the file's: keep its traceback, and say where it happened
            error.add_note(f"The record was {where}.")
            raise
        return row | {"source": self.source, "where": where, "problem": problem, "skipped": skipped}, kept


def convert_batch(batch: Mapping[str, list], indices: list[int], *, reader: Reader, code: str) -> dict[str, list]:
    """Records to rows, for `datasets.map`.

    `code` is the state of this package's sources: it makes a row that an older version converted no match in the cache.
    """
    batch = {name: batch[name].to_pylist() for name in batch.column_names}  # type: ignore[attr-defined]
    columns = [*features_of(reader.kind, reader.image_bytes), "problem", "skipped", "columns", "kept"]
    out: dict[str, list] = {column: [] for column in columns}
    for i, index in enumerate(indices):
        row, kept = reader.row({name: values[i] for name, values in batch.items()}, index)
        row["kept"] = json.dumps(kept) if kept else None
        for column in columns:
            out[column].append(row.get(column))
    return out


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if problem := repeated_key(pairs):
        raise BadRow(problem)
    return dict(pairs)


def _parse(record: Mapping[str, object]) -> dict:
    if record["unreadable"]:
        raise BadRow(str(record["unreadable"]))
    try:
        value = json.loads(record["text"], object_pairs_hook=_object)  # type: ignore[arg-type]
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        line, column = int(record["line"]) + error.lineno - 1, error.colno  # type: ignore[call-overload]
        raise BadRow(
            f"does not parse as JSON at line {line}, column {column} ({error.msg}): correct that place"
        ) from None
    except RecursionError:
        raise BadRow("is nested too deeply to be a row of data") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadRow(f"does not parse as JSON at line {record['line']} ({error})") from None
    if not isinstance(value, dict):
        raise BadRow(f"is {type_name(value)}, not an object with columns")
    return value


def _cells(record: Record) -> dict[str, object]:
    """The cells of a table that are not texts: JSON lists and objects in columns that hold such, and numbers."""
    found: dict[str, object] = {}
    for name, cell in record.present().items():
        if isinstance(cell, str) and (name in _NUMBERS or (name in _STRUCTURED and cell.lstrip()[:1] in ("[", "{"))):
            try:
                found[name] = json.loads(cell)
            except (ValueError, RecursionError):
                raise BadRow(f"has a `{name}` that does not parse as JSON: {cell[:80]!r}") from None
    return found


def _use_system(record: Record, row: Row, kind: Kind) -> None:
    """A column with the system prompt that the format has not read is the first message."""
    while name := system_of(record):
        text = text_of(record[name], f"`{name}`", may_be_empty=True)
        messages: list = row["messages" if kind == "conversation" else "prompt"]  # type: ignore[assignment]
        if messages and messages[0]["role"] == "system":
            if text.strip() and messages[0]["content"].strip() != text.strip():
                raise BadRow(f"has a `{name}` and another system message: keep one of them")
        elif text.strip():
            messages.insert(0, Message(role="system", content=text))


def _use_images_of_parts(row: Row, kind: Kind) -> None:
    """Pictures that image parts name are the row's images."""
    messages: list = row["messages" if kind == "conversation" else "prompt"]  # type: ignore[assignment]
    images = list(row.get("images") or [])  # type: ignore[call-overload]
    named = [image for message in messages for image in message.pop("images", [])]
    if named and images and named != images:
        raise BadRow("names pictures in `images` and others in the image parts of its messages: keep one of the two")
    row["images"] = images or named


def _or_those_of_parts(videos: list[list[str]], row: Row, kind: Kind) -> list[list[str]]:
    """The videos of the row's column, or those that parts of its messages name."""
    messages: list = row["messages" if kind == "conversation" else "prompt"]  # type: ignore[assignment]
    named = [video for message in messages for film in message.pop("videos", []) for video in videos_of(film)]
    if named and videos and named != videos:
        raise BadRow("names videos in `videos` and others in the parts of its messages: keep one of the two")
    return videos or named


def _with_paths(
    images: Sequence[object],
    folder: str,
    image_root: str,
    allow_outside: bool,
    image_bytes: bool,
    what: str = "image",
) -> list[object]:
    """File names as absolute paths: relative ones lie in `folder`, which is `image_root` but for meta files."""
    found = []
    for image in images:
        data, name = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, image)
        # Beside bytes the path is only a label.
        path = name
        if data is None:
            name = str(name)
            inside = name if folder == image_root or "://" in name[:12] else os.path.join(folder, name)
            path = normal_path(inside, image_root, allow_outside, what)
        if data is not None and not image_bytes:
            raise BadRow("holds an image as bytes where other rows name files")
        found.append({"bytes": data, "path": path} if image_bytes else path)
    return found
