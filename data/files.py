"""Reading files as records through `datasets`, which streams them to its Arrow cache and maps that into memory.

JSON is split into records here and parsed later, in parallel and with the row's number at hand, since `datasets`' own
reader infers one type per column (an `image` that is a name here and a list there is an error) and does not say which
row is wrong.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import datasets
from datasets import Dataset, Features, Value

from common.errors import InputError

# One record. More is a file without line ends or without brackets, and would be held in memory.
MAX_RECORD_BYTES = 16 << 20
_CHUNK_CHARS = 1 << 20
_DECODER = json.JSONDecoder()
_AFTER_VALUE = (",", "]", " ", "\n", "\r", "\t")
_NO_SPACE = re.compile(r"[ \t\r\n]*")
_RECORD = Features(
    {
        "text": Value("large_string"),
        "unreadable": Value("string"),
        "file": Value("string"),
        "row": Value("int64"),
        "line": Value("int64"),
    }
)


def code_state() -> str:
    """Digest of this package's sources: a cached row is only as good as the code that made it.

    Left out is what makes no cached row: the page of data.check, and the drawn set, which is keyed by its content.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in ("check.py", "shapes.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_file(path: str, what: str) -> tuple[Dataset, bool]:
    """Records of a JSON, JSON lines or parquet file, or of a folder of them; `what` is the flag that named it.

    Returns:
        The data set, and whether its rows are JSON texts (columns text, unreadable, file, row, line) instead of columns.

    Raises:
        InputError: missing file, unknown kind of file, or a file that is damaged as a whole.
    """
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "state.json")):
            return _guarded(path, lambda: datasets.load_from_disk(path)), False
        files = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True))
        # A hub-style folder names the split in the file name; without any split everything is training data.
        files = [f for f in files if os.path.basename(f).startswith("train")] or files
        if not files:
            files = sorted(glob.glob(os.path.join(glob.escape(path), "*.json*")))
        if not files:
            raise InputError(f"{what} {path} is a folder without parquet or JSON files: name the file.")
    elif os.path.isfile(path):
        files = [path]
    else:
        raise InputError(f"{what} {path} does not exist: give the path of a file or folder.")
    if all(f.endswith(".parquet") for f in files):
        return _guarded(path, lambda: datasets.load_dataset("parquet", data_files=files, split="train")), False
    if all(f.endswith((".json", ".jsonl")) for f in files):
        stamps = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
        return _guarded(path, lambda: _json(stamps)), True
    raise InputError(f"{what} {path} is no .json, .jsonl or .parquet: convert it to one of them.")


def read_hub(name: str) -> Dataset:
    """The training split of a data set on the hub."""
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # offline, no such set, no such split, several configurations: `datasets` says which
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"Data set {name} is neither a known name, nor a local path, nor could it be loaded from the hub "
            f"({type(error).__name__}: {reason}): check --dataset_name, or give a local copy with --data_path."
        ) from error


def _json(stamps: list[tuple[str, int, int]]) -> Dataset:
    # Size and time of change are part of what `datasets` keys its cache by.
    kwargs = {"stamps": stamps, "code": code_state()}
    return Dataset.from_generator(_records_of_files, features=_RECORD, gen_kwargs=kwargs)


def _guarded(path: str, load: Callable[[], Dataset]) -> Dataset:
    try:
        return load()
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"{path} cannot be read ({type(cause).__name__}: {cause}): is the file whole?") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}): is the file whole?") from error


def _records_of_files(stamps: list[tuple[str, int, int]], code: str) -> Iterator[dict[str, object]]:
    empty = True
    for path, *_ in stamps:
        records = json_list if path.endswith(".json") and _first_character(path) == "[" else json_lines
        for row, record in enumerate(records(path)):
            empty = False
            yield record | {"file": path, "row": row}
    if empty:
        raise InputError(f"{', '.join(path for path, *_ in stamps)} holds no rows: is it the right file?")


def _first_character(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1].decode("latin-1")


def json_lines(path: str) -> Iterator[dict[str, object]]:
    """Records of a JSON lines file: {"text", "line" (from 1), "unreadable"}. Blank lines are no rows."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES):
            number += 1
            text, unreadable = None, None
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_RECORD_BYTES)
                unreadable = f"is longer than {MAX_RECORD_BYTES >> 20} MiB: this is no line of data"
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
            f"(rows count from 0; {reason}): mend that place."
        )
