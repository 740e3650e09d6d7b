"""Reading files as records through `datasets`, which streams them to its Arrow cache and maps that into memory.

JSON is split into records here and parsed later, in parallel and with the row's number at hand, since `datasets`' own
reader infers one type per column (an `image` that is a name here and a list there is an error) and does not say which
row is wrong.
"""

import csv
import fnmatch
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value

from common.errors import InputError, disk_trouble
from data.rows import repeated_key, shorten

logger = logging.getLogger(__name__)

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
        "table": Value("bool"),  # its values are cells
        "root": Value("string"),  # the folder of its images, where a meta file names one
    }
)
# Files that users take for data files.
_OTHER_FILES = [
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"BZh", "compressed (bzip2)"),
    (b"\xfd7zXZ", "compressed (xz)"),
    (b"(\xb5/\xfd", "compressed (zstandard)"),
    (b"PK\x03\x04", "a zip archive or an Excel file"),
    (b"\x80\x04", "a pickle, which is not opened as it can run programs"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
    (b"SQLite", "a database"),
]
_TAR_ENDINGS = {"json", "txt", "text", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
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
_SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
_COLUMNS_NOT_ROWS = (
    "holds columns instead of rows: write one object per row (pandas: to_json(path, orient='records', lines=True))."
)


def code_state() -> str:
    """Digest of this package's sources: a cached row is only as good as the code that made it.

    Left out is what makes no cached row: the page of data.check, and the drawn set, which is keyed by its content.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in ("check.py", "scenes.py", "shapes.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_file(path: str, what: str) -> tuple[Dataset, bool]:
    """Records of a file or folder, whatever its name: its content says what it is. `what` is the flag that named it.

    JSON (a list, lines, an object that holds rows, InternVL's meta file), CSV and TSV, parquet, Arrow, webdataset's tar;
    a folder of those, or of `save_to_disk`.

    Returns:
        The data set, and whether its rows are JSON texts (the columns of `_RECORD`) instead of columns.

    Raises:
        InputError: missing file, unknown kind of file, or a file that is damaged as a whole.
    """
    files, kind = _files_and_kind(path, what)
    match kind:
        case "parquet":
            return _guarded(path, lambda: datasets.load_dataset("parquet", data_files=files, split="train")), False
        case "arrow":
            return _guarded(path, lambda: datasets.load_dataset("arrow", data_files=files, split="train")), False
        case "tar":
            return _guarded(path, lambda: _webdataset(files)), False
        case _:
            parts = [part for f in files for part in _guarded(path, functools.partial(_parts, f))]
            return _guarded(path, lambda: _repeated(_json(_stamps(parts)), parts)), True


def _files_and_kind(path: str, what: str) -> tuple[list[str], str]:
    """The files that a path stands for, and what they are."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "dataset_dict.json")):
            path = _guarded(path, lambda: _one_split(path))
        files = _guarded(path, lambda: _files_of_folder(path))
        if not files:
            raise InputError(f"{what} {path} is a folder without parquet, JSON, CSV, TSV or tar files: name the file.")
    elif os.path.isfile(path):
        files = [path]
    else:
        raise InputError(f"{what} {path} does not exist: give the path of a file or folder.")
    kinds = {_guarded(path, functools.partial(kind_of_file, f)) for f in files}
    if len(kinds) > 1:
        raise InputError(f"{what} {path} holds files of several kinds ({', '.join(sorted(kinds))}): name one file.")
    return files, kinds.pop()


def _stamp(path: str) -> tuple[int, int, int]:
    """By which a replaced file is known: its size, and both times, as `cp -p` and `rsync` bring one of their own along."""
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _stamps(parts: Iterable["Part"]) -> list[tuple[str, str | None, int, int, int]]:
    return [(p.file, p.root, *_stamp(p.file)) for p in parts]


class RecordStream:
    """Records that are read from the beginning at each iteration; nothing is copied into a cache (`--streaming`).

    Attributes:
        is_text: they are JSON texts (the columns of `_RECORD`).
        state: names and sizes of the files, by which another set is known.
    """

    def __init__(self, read: Callable[[], Iterator[dict[str, Any]]], is_text: bool, state: list[object]) -> None:
        self.read, self.is_text, self.state = read, is_text, state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read()

    def head(self, number: int = 100) -> list[dict[str, Any]]:
        """The first records."""
        return list(itertools.islice(self.read(), number))


def stream_file(path: str, what: str) -> RecordStream:
    """As `read_file`, but read record by record, anew at each iteration.

    Raises:
        InputError: as `read_file`; or a kind of file that cannot be streamed.
    """
    files, kind = _files_and_kind(path, what)
    state: list[object] = [(os.path.basename(f), os.path.getsize(f)) for f in files]
    if kind == "tar":
        raise InputError(f"--streaming does not read tar files ({path}): unpack it, or leave --streaming out.")
    if kind in ("parquet", "arrow"):
        load = functools.partial(datasets.load_dataset, kind, data_files=files, split="train", streaming=True)
        return RecordStream(functools.partial(_records_of_tables, load, path), False, state)
    parts = [part for f in files for part in _guarded(path, functools.partial(_parts, f))]
    if shares := [part.file for part in parts if part.repeat < 1]:
        raise InputError(
            f"--streaming cannot take a share of {shares[0]} (repeat_time below 1): its rows are not counted."
        )
    repeated = [part for part in parts for _ in range(int(part.repeat))]
    return RecordStream(functools.partial(_records_of_files, _stamps(repeated), ""), True, state)


def stream_hub(name: str) -> RecordStream:
    """The training split of a data set on the hub, as it arrives."""
    load = functools.partial(datasets.load_dataset, name, split="train", streaming=True)
    return RecordStream(functools.partial(_records_of_tables, load, name), False, [name])


def _records_of_tables(load: Callable[[], datasets.IterableDataset], name: str) -> Iterator[dict[str, Any]]:
    """Rows as Arrow holds them, so that no image is decoded."""
    try:
        for table in load().with_format("arrow").iter(batch_size=100):
            yield from table.to_pylist()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{name} cannot be read ({type(error).__name__}: {error}): is it whole, and there?") from error


def _files_of_folder(path: str) -> list[str]:
    if os.path.exists(os.path.join(path, "state.json")):  # save_to_disk; what is cached beside the data is not data
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            return [os.path.join(path, part["filename"]) for part in json.load(file)["_data_files"]]
    everything = _files_below(path)
    for names in ("*.parquet", "*.json*", "*.csv", "*.tsv", "*.tar"):
        files = sorted(f for f in everything if fnmatch.fnmatch(os.path.basename(f), names))
        if not names.startswith(("*.parquet", "*.tar")):
            files = [f for f in files if os.path.dirname(f) == path.rstrip("/")]
        files = [f for f in files if os.path.basename(f) not in ("dataset_info.json",)]
        # A hub-style folder names the split in the file name; without any split everything is training data.
        splits = {f: re.split(r"[-_.]", os.path.basename(f))[0] for f in files}
        train = [f for f in files if splits[f].startswith("train")]
        if not train and len(set(splits.values()) & {*_SPLITS}) > 1:
            raise InputError(
                f"{path} holds the splits {', '.join(sorted(set(splits.values()) & {*_SPLITS}))}, none of them train: name "
                f"the file of one ({files[0]})."
            )
        if files:
            return train or files
    return []


def _files_below(path: str, above: tuple[str, ...] = ()) -> list[str]:
    """Every file of a folder and of those below it, hidden ones left out. A link to a folder above is not followed: it has no end."""
    real = os.path.realpath(path)
    if real in above:
        logger.warning("%s is a link to a folder that holds it, and is passed over.", path)
        return []
    found = []
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _files_below(entry.path, (*above, real))
        elif entry.is_file():
            found.append(entry.path)
    return found


def _one_split(path: str) -> str:
    """The folder of a saved DatasetDict's `train`, or of its only split."""
    with open(os.path.join(path, "dataset_dict.json"), encoding="utf-8") as file:
        splits = json.load(file)["splits"]
    if "train" not in splits and len(splits) > 1:
        raise InputError(
            f"{path} holds the splits {', '.join(splits)}, none of them train: name the folder of one ({path}/...)."
        )
    return os.path.join(path, "train" if "train" in splits else splits[0])


def _webdataset(files: list[str]) -> Dataset:
    for path in files:
        with tarfile.open(path) as tar:
            for member in tar:
                ending = member.name.rpartition(".")[2].lower()
                if member.isfile() and ending not in _TAR_ENDINGS and not os.path.basename(member.name).startswith("."):
                    raise InputError(
                        f"{path} holds {member.name}: of a tar file, pictures, .json and .txt are read, nothing else."
                    )
    # The columns of a sample's .json stand beside its picture, which is the image whatever its ending.
    found = datasets.load_dataset("webdataset", data_files=files, split="train").remove_columns("__url__")
    pictures = [name for name, feature in found.features.items() if isinstance(feature, datasets.Image)]
    if len(pictures) > 1:
        raise InputError(f"{files[0]} has samples with {', '.join(pictures)}: one picture each is read.")
    found = found.rename_columns(dict.fromkeys(pictures, "image")).flatten()
    return found.rename_columns({n: n.removeprefix("json.") for n in found.column_names if n.startswith("json.")})


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


def _json(stamps: list[tuple[str, str | None, int, int, int]]) -> Dataset:
    # Size and times of change are part of what `datasets` keys its cache by.
    kwargs: dict[str, object] = {"stamps": stamps, "code": code_state()}
    try:
        return Dataset.from_generator(_records_of_files, features=_RECORD, gen_kwargs=kwargs)
    except (pa.ArrowInvalid, OSError) as error:
        # The file itself is read by our own code, whose errors come wrapped: what failed here is the copy of an earlier run.
        if disk_trouble(error):
            raise
        logger.warning("The cached copy of %s is damaged (%s): reading the file again.", stamps[0][0], error)
        kwargs["code"] = f"{kwargs['code']} again {uuid.uuid4().hex}"
        return Dataset.from_generator(_records_of_files, features=_RECORD, gen_kwargs=kwargs)


def _guarded(path: str, load: Callable[[], Dataset]) -> Dataset:
    try:
        return load()
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"{path} cannot be read ({type(cause).__name__}: {cause}): is the file whole?") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}): is the file whole?") from error


def _records_of_files(stamps: list[tuple[str, str | None, int, int, int]], code: str) -> Iterator[dict[str, object]]:
    empty = True
    readers = {"list": json_list, "lines": json_lines, "object": json_object, "table": table}
    for path, root, *_ in stamps:
        for row, record in enumerate(readers[kind_of_file(path)](path)):
            empty = False
            yield {"unreadable": None, "table": False} | record | {"file": path, "row": row, "root": root}
    if empty:
        raise InputError(f"{', '.join(path for path, *_ in stamps)} holds no rows: is it the right file?")


# ----------------------------------------------------------------------------------------------------------------------
# What a file is


def kind_of_file(path: str) -> str:  # noqa: C901  one rule after the other
    """parquet, arrow, tar; or list, lines, object (of JSON) or table: by content, whatever the name says.

    Raises:
        InputError: none of them, with a guess at what it is.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    for magic, name in _OTHER_FILES:
        if head.startswith(magic):
            raise InputError(f"{path} is {name}: unpack or convert it to JSON lines, CSV or parquet.")
    if b"\0" in head[:64]:
        raise InputError(
            f"{path} is a binary file of a kind that is not known: convert it to JSON lines, CSV or parquet."
        )
    lines = _first_lines(path)
    if not lines:
        return "lines"  # and none of them
    first = lines[0].removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"["):
        # A line that is a list of its own is a bad row of JSON lines, or all that a JSON file of one line holds.
        return "lines" if len(lines) > 1 and _parses(first) else "list"
    if first.startswith(b"{"):
        if _parses(first):
            return "lines" if len(lines) > 1 or not _holds_rows(first) else "object"
        broken = len(lines) > 1 and not first.endswith((b"{", b"[", b":", b","))
        return "lines" if broken and any(_parses(line) for line in lines[1:]) else "object"
    if len(lines) > 1 and lines[1].strip().startswith(b"{"):
        return "lines"  # the first one is broken
    if _separator(first.decode("utf-8", "replace")) and len(lines) > 1:
        return "table"
    if first[:1] in b'"-0123456789' or first in (b"null", b"true", b"false"):
        raise InputError(f"{path} holds one JSON value that is not a row ({first[:40].decode('utf-8', 'replace')}).")
    raise InputError(
        f"{path} is neither JSON (a list, lines or an object), nor CSV or TSV with a line of column names, nor parquet: "
        "convert it to one of them."
    )


def _first_lines(path: str, number: int = 4) -> list[bytes]:
    """The first lines that are not blank."""
    found: list[bytes] = []
    with open(path, "rb") as file:
        while len(found) < number and (line := file.readline(MAX_RECORD_BYTES)):
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                found.append(line)
    return found


def _parses(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _holds_rows(line: bytes) -> bool:
    """Whether the one object of a file stands for rows, instead of being one."""
    value = json.loads(line)
    try:
        return list(_rows_of_object(value)) != [value]
    except ValueError:
        return True


def _separator(line: str) -> str | None:
    """What separates the names in a table's first line: a tab, comma or semicolon."""
    found = [s for s in "\t,;" if s in line]
    names = next(csv.reader([line], delimiter=found[0])) if found else []
    wanted = (
        len(names) > 1 and all(name.strip() and len(name) < 200 for name in names) and len(set(names)) == len(names)
    )
    return found[0] if wanted and not line.startswith(("{", "[", "<")) else None


# ----------------------------------------------------------------------------------------------------------------------
# InternVL's meta files


class Part(NamedTuple):
    """A file of rows, the folder of its images if a meta file names one, and how often its rows come (below 1: that share of them)."""

    file: str
    root: str | None = None
    repeat: float = 1


def _parts(path: str) -> list[Part]:
    return parts_of_meta(path) or [Part(path)]


def parts_of_meta(path: str) -> list[Part]:
    """The files of a meta file {name: {"root", "annotation", "repeat_time", ...}} (InternVL, MMPR); else [].

    Raises:
        InputError: a file or folder that it names is not found, or a `repeat_time` that is no such number.
    """
    if os.path.getsize(path) > MAX_RECORD_BYTES or _text_kind(path) not in ("object", "lines"):
        return []
    try:
        with open(path, encoding="utf-8-sig") as file:
            meta = json.load(file, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return []
    if not isinstance(meta, dict) or not meta:
        return []
    if not all(isinstance(entry, dict) and entry.get("annotation") for entry in meta.values()):
        return []
    if problem := _problem_of(meta):
        raise InputError(f"{path} {problem}")
    parts = []
    for name, entry in meta.items():
        files = entry["annotation"] if isinstance(entry["annotation"], list) else [entry["annotation"]]
        root = _beside(path, str(entry.get("root") or "."), os.path.isdir)
        if root is None:
            raise InputError(
                f"{path} is a meta file whose set {name} has its images in {entry['root']}, which is not a folder here or above "
                f"it: pass its annotation file as --data_path and the folder as --image_root."
            )
        for annotation in files:
            found = _beside(path, str(annotation), os.path.isfile)
            if found is None:
                raise InputError(
                    f"{path} is a meta file whose set {name} names {annotation}, which does not exist here or above it: pass "
                    "that annotation file as --data_path and its root as --image_root."
                )
            parts.append(Part(found, root, _repeat_of(entry.get("repeat_time", 1), path, name)))
    return parts


def _repeat_of(value: object, path: str, name: str) -> float:
    """InternVL's rule: a whole number repeats the rows, a share takes the first of them."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value <= 0
        or (value > 1 and value != int(value))
    ):
        raise InputError(
            f"{path} gives its set {name} the repeat_time {value}: it is a whole number, or a share between 0 and 1."
        )
    return value


def _repeated(rows: Dataset, parts: list[Part]) -> Dataset:
    """The rows of each part as often as its `repeat` says."""
    if all(part.repeat == 1 for part in parts):
        return rows
    starts = [*np.flatnonzero(np.array(rows.with_format("arrow")[:]["row"]) == 0), len(rows)]
    order: list[np.ndarray] = []
    filled = [part for part in parts if os.path.getsize(part.file)]
    for part, start, end in zip(filled, starts[:-1], starts[1:], strict=True):
        once = np.arange(start, end if part.repeat >= 1 else start + int((end - start) * part.repeat))
        order += [once] * max(1, int(part.repeat))
    return rows.select(np.concatenate(order))


def _text_kind(path: str) -> str:
    try:
        return kind_of_file(path)
    except InputError:
        return ""


def _beside(path: str, name: str, exists: Callable[[str], bool]) -> str | None:
    """A name of a meta file: relative to where the program runs, to the file's folder, or to one of those above it."""
    folder = os.path.dirname(os.path.abspath(path))
    for _ in range(4):
        if exists(found := os.path.normpath(os.path.join(folder, name))):
            return found
        folder = os.path.dirname(folder)
    return os.path.abspath(name) if exists(name) else None


# ----------------------------------------------------------------------------------------------------------------------
# Readers: {"text" (one record as JSON), "line" (from 1), "unreadable" (why it is none), "table"} of each row


def table(path: str) -> Iterator[dict[str, object]]:
    """Rows of a CSV or TSV file, whose first line names the columns. Cells are texts; empty ones are missing."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            line = file.readline()
            while not line.strip():
                line = file.readline()
            separator = _separator(line) or ","
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


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if not (problem := repeated_key(pairs)):
        return dict(pairs)
    found = _Repeated(pairs)
    found.problem = problem
    return found


def _problem_of(value: object) -> str | None:
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


_OBJECT_DECODER = json.JSONDecoder(object_pairs_hook=_object)


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
            for record in _rows_of_object(value):
                # The row's own text is gone: what was wrong with it goes along.
                problem = _problem_of(record)
                if isinstance(value, _Repeated) and record is not value:
                    raise ValueError(value.problem)
                yield {"text": None if problem else json.dumps(record), "line": None, "unreadable": problem}
        except ValueError as error:
            raise InputError(f"{path} {error}") from None


def _rows_of_object(value: dict) -> Iterator[dict]:
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
    elif "train" in of_rows and {*_SPLITS} >= value.keys():
        yield from value["train"]
    elif len(value) == 1 and _ROWS_WITHIN & value.keys() and isinstance(inner := next(iter(value.values())), dict):
        yield from _rows_of_object(inner)
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
