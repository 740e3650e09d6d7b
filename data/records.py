"""JSON and tables as records: {"text" (one as JSON), "line" (from 1), "unreadable" (why it is none), "table"} of each row."""

import csv
import json
import re
from collections.abc import Iterator
from typing import TextIO

from common.errors import InputError
from data.rows import repeated_key, shorten

# One record. More is a file without line ends or without brackets, and would be held in memory.
MAX_RECORD_BYTES = 16 << 20
_CHUNK_CHARS = 1 << 20
_DECODER = json.JSONDecoder()
_AFTER_VALUE = (",", "]", " ", "\n", "\r", "\t")
_NO_SPACE = re.compile(r"[ \t\r\n]*")
# Columns by which one object is one row, not a collection of rows.
_ROW_NAMES = {
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "question",
    "query",
    "instruction",
    "image",
    "images",
    "video",
    "videos",
}
_ROW_NAMES |= {"chosen", "rejected", "responses"}
# Names under which files keep their rows beside a version, a licence, ...
_ROWS_WITHIN = {
    "data",
    "rows",
    "samples",
    "examples",
    "items",
    "annotations",
    "train",
    "records",
    "questions",
    "instances",
}
_ROWS_WITHIN |= {"dataset", "entries", "results"}
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
_COLUMNS_NOT_ROWS = (
    "holds columns instead of rows: write one object per row (pandas: to_json(path, orient='records', lines=True))."
)


def separator_of(line: str) -> str | None:
    """What separates the names in a table's first line: a tab, comma or semicolon."""
    found = [s for s in "\t,;" if s in line]
    names = next(csv.reader([line], delimiter=found[0])) if found else []
    wanted = (
        len(names) > 1 and all(name.strip() and len(name) < 200 for name in names) and len(set(names)) == len(names)
    )
    return found[0] if wanted and not line.startswith(("{", "[", "<")) else None


def table(path: str) -> Iterator[dict[str, object]]:
    """Rows of a CSV or TSV file, whose first line names the columns. Cells are texts; empty ones are missing."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            line = file.readline()
            while not line.strip():
                line = file.readline()
            separator = separator_of(line) or ","
            names = [name.strip() for name in next(csv.reader([line], delimiter=separator))]
            start = 1  # line of the last row's end
            reader = csv.reader(file, delimiter=separator, strict=True)
            for cells in reader:
                first, start = start + 1, reader.line_num + 1
                if not any(cells):
                    continue
                if len(cells) == len(names):
                    record = {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
                    yield {"text": json.dumps(record), "line": first, "table": True}
                else:
                    why = f"has {len(cells)} cells where the first line names {len(names)} columns"
                    yield {"text": None, "line": first, "unreadable": why}
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8.") from None
    except csv.Error as error:
        raise InputError(
            f"{path} does not parse as a table after line {start} ({error}): quote cells that hold {separator!r}, quotes or "
            'line breaks, and write " as "".'
        ) from None


class _Repeated(dict):
    """An object with a key twice."""

    problem: str


def checked_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For json's `object_pairs_hook`: see `problem_of`."""
    if not (problem := repeated_key(pairs)):
        return dict(pairs)
    found = _Repeated(pairs)
    found.problem = problem
    return found


def problem_of(value: object) -> str | None:
    """What is wrong with the keys of a JSON value, at any depth."""
    left = [value]
    while left:
        match left.pop():
            case _Repeated() as found:
                return found.problem
            case dict() as found:
                left += found.values()
            case list() as found:
                left += found
    return None


_OBJECT_DECODER = json.JSONDecoder(object_pairs_hook=checked_object)


def json_object(path: str) -> Iterator[dict[str, object]]:
    """Rows of a file that holds one JSON object, or several one after the other: {"data": [...]}, {id: row} or a row itself.

    Raises:
        InputError: with line and column, where it stops being JSON.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8.") from None
    start, size = 0, len(text.rstrip())
    while start < size:
        start = _NO_SPACE.match(text, start).end()  # type: ignore[union-attr]
        try:
            value, start = _OBJECT_DECODER.raw_decode(text, start)
        except RecursionError:
            raise InputError(f"{path} is nested too deeply to be rows of data.") from None
        except ValueError as error:
            place = getattr(error, "pos", start)
            line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
            raise InputError(
                f"{path} does not parse as JSON at line {line}, column {column} "
                f"({getattr(error, 'msg', error)}): correct that place."
            ) from None
        if not isinstance(value, dict):
            raise InputError(f"{path} holds {shorten(repr(value))} after an object: rows are objects.")
        try:
            for record in rows_of_object(value):
                # The row's own text is gone: what was wrong with it goes along.
                problem = problem_of(record)
                if isinstance(value, _Repeated) and record is not value:
                    raise ValueError(value.problem)
                yield {"text": None if problem else json.dumps(record), "line": None, "unreadable": problem}
        except ValueError as error:
            raise InputError(f"{path} {error}") from None


def rows_of_object(value: dict) -> Iterator[dict]:
    """The rows that an object stands for: those of its one list, its values under their names, or itself.

    Raises:
        ValueError: it holds columns instead of rows.
    """
    lists = {name: v for name, v in value.items() if isinstance(v, list) and v}
    of_rows = [name for name, v in lists.items() if all(isinstance(row, dict) for row in v)]
    tables = [v for v in value.values() if isinstance(v, dict) and v and all(k.isdigit() for k in v)]
    if value and (len(tables) == len(value) or (len(lists) == len(value) > 1 and not of_rows)):
        raise ValueError(_COLUMNS_NOT_ROWS)
    if _ROW_NAMES & value.keys():
        yield value
    elif "train" in of_rows and {*SPLITS} >= value.keys():
        yield from value["train"]
    elif len(value) == 1 and _ROWS_WITHIN & value.keys() and isinstance(inner := next(iter(value.values())), dict):
        yield from rows_of_object(inner)
    elif len(of_rows) == 1 and (
        of_rows[0] in _ROWS_WITHIN or (len(value) == 1 and not _are_messages(lists[of_rows[0]]))
    ):
        yield from value[of_rows[0]]
    elif value and all(isinstance(v, dict) for v in value.values()):
        for name, row in value.items():
            yield row if "id" in row or isinstance(row, _Repeated) else {"id": name, **row}
    else:
        yield value


def _are_messages(rows: list[dict]) -> bool:
    return all({"role", "from", "human"} & row.keys() for row in rows)


def json_lines(path: str) -> Iterator[dict[str, object]]:
    """Records of a JSON lines file: {"text", "line" (from 1), "unreadable"}. Blank lines are not rows."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES):
            number += 1
            text, unreadable = None, None
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_RECORD_BYTES)
                unreadable = f"is longer than {MAX_RECORD_BYTES >> 20} MiB: this is not a line of data"
            else:
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    unreadable = (
                        f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}): convert the file"
                    )
            if text != "":
                yield {"text": text, "line": number, "unreadable": unreadable}


def json_list(path: str) -> Iterator[dict[str, object]]:
    """Records of a JSON file that holds one list, read piece by piece: the file is never held in memory.

    Raises:
        InputError: with line and column, where the file stops being a list of JSON values.
    """
    with open(path, encoding="utf-8-sig") as file:
        yield from _ListReader(path, file).records()


class _ListReader:
    """A buffer that moves over the file. `line` and `column` (from 1) are the place of `buffer[counted]`."""

    def __init__(self, path: str, file: TextIO) -> None:
        self.path, self.file = path, file
        self.buffer, self.start, self.ended = "", 0, False
        self.counted, self.line, self.column, self.row = 0, 1, 1, 0

    def records(self) -> Iterator[dict[str, object]]:
        if self.next_character() != "[":
            raise self.error(self.start, "a list [...] is expected")
        self.start += 1
        separator = "," if self.next_character() != "]" else "]"
        if separator == "]":
            self.start += 1
        while separator == ",":
            self.next_character()
            end = self.end_of_value()
            self.count_to(self.start)
            yield {"text": self.buffer[self.start : end], "line": self.line, "unreadable": None}
            self.row, self.start = self.row + 1, end
            separator = self.next_character()
            if separator not in (",", "]"):
                raise self.error(self.start, "a comma or ] is expected" if separator else "the file ends too early")
            self.start += 1
        if self.next_character():
            raise self.error(self.start, "text follows the end of the list")

    def end_of_value(self) -> int:
        while True:
            try:
                end = _DECODER.raw_decode(self.buffer, self.start)[1]
                # The next piece may go on with a number's digits, "e" or "."; three characters later it cannot.
                if self.ended or end + 3 <= len(self.buffer) or self.buffer[end : end + 1] in _AFTER_VALUE:
                    return end
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16
                if self.ended or not cut:
                    raise self.error(error.pos, error.msg) from None
            except RecursionError:
                raise self.error(self.start, "nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise self.error(self.start, str(error)) from None
            if len(self.buffer) - self.start > MAX_RECORD_BYTES:
                raise self.error(self.start, f"a row is longer than {MAX_RECORD_BYTES >> 20} MiB")
            self.read_on()

    def next_character(self) -> str:
        while True:
            self.start = _NO_SPACE.match(self.buffer, self.start).end()  # type: ignore[union-attr]
            if self.start < len(self.buffer) or self.ended:
                return self.buffer[self.start : self.start + 1]
            self.read_on()

    def read_on(self) -> None:
        self.count_to(self.start)
        rest = self.buffer[self.start :]
        try:
            chunk = self.file.read(
                max(_CHUNK_CHARS, len(rest))
            )  # doubling, so that a long row is not scanned too often
        except UnicodeDecodeError as error:
            raise self.error(self.start, f"what follows is not UTF-8, {error.reason}") from None
        self.buffer, self.start, self.counted, self.ended = rest + chunk, 0, 0, not chunk

    def count_to(self, position: int) -> None:
        passed = self.buffer[self.counted : position]
        newlines = passed.count("\n")
        self.line += newlines
        self.column = len(passed) - passed.rfind("\n") if newlines else self.column + len(passed)
        self.counted = position

    def error(self, position: int, reason: str) -> InputError:
        self.count_to(position)
        return InputError(
            f"{self.path} does not parse as JSON at line {self.line}, column {self.column}, in row {self.row} "
            f"(rows count from 0; {reason}): correct that place."
        )
