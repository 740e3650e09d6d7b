"""Files of rows, whoever wrote them: JSON, JSON lines, csv and tsv tables, parquet, xlsx. What a file is, its content says, not its name."""

import csv
import io
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell holds a whole base64 image

REFERENCE_LENGTH = 64  # VLMEvalKit's convention: a shorter image cell is the index of the row that holds the image
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive",
            b"\x28\xb5\x2f\xfd": "a zstd archive", b"7z\xbc\xaf": "a 7z archive"}  # fmt: skip


def read_text(path: str | Path) -> str:
    """Return a UTF-8 text file as it is, byte order mark aside. Raises InputError for a missing file, a folder, or bytes."""
    if existing(path).is_dir():
        raise InputError(f"{path} is a folder; pass the file in it")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a UTF-8 text file; is this a parquet file or an archive?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); look at its permissions") from None


def read_any(path: str | Path) -> object:
    """Return what a file holds: the value of a JSON file, else a list of rows (JSON lines, tsv, csv, parquet, xlsx).

    Raises InputError for an empty file, an archive, or a text that is none of these, with the line where it breaks off.
    """
    if existing(path).is_dir():
        return read_parquet(path)
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"PAR1"):
        return read_parquet(path)
    if start.startswith(b"PK\x03\x04") and _is_workbook(path):
        return read_xlsx(path)
    for magic, name in ARCHIVES.items():
        if start.startswith(magic):
            raise InputError(f"{path} is {name}; unpack it")
    text = read_text(path)
    first = text.lstrip()[:1]
    if not first:
        raise InputError(f"{path} holds no rows")
    if first in "[{" or _is_json(text):
        return _parse_json(text, path)
    return _parse_table(text, path)


def read_records(path: str | Path) -> list[dict]:
    """Return the rows of a file of any kind; JSON must be a list of objects, or lines of them (or one object: one row)."""
    data = read_any(path)
    if isinstance(data, dict):
        data = [data]
    if not isinstance(data, list):
        raise InputError(f"{path} holds one JSON {_kind(data)}; a list of objects, or one object per line, is expected")
    wrong = next((n for n, row in enumerate(data) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise InputError(f"{path}: row {wrong} is a JSON {_kind(data[wrong])}, an object is expected")
    return data


def read_parquet(path: str | Path, pattern: str = "*.parquet") -> list[dict]:
    """Return the rows of one parquet file, or of all files of a folder that match `pattern`, in path order."""
    import pyarrow
    import pyarrow.parquet

    source = existing(path)
    files = sorted(source.rglob(pattern)) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{path} holds no {pattern} file")
    try:
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    except pyarrow.ArrowInvalid as e:
        raise InputError(f"{path} is not a parquet file ({str(e).split('.')[0]}); download it again") from None


def read_xlsx(path: str | Path) -> list[dict]:
    """Return the rows of the first sheet of an Excel workbook; cells are texts, empty ones ''."""
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise InputError(f"{path} is an Excel workbook: pip install openpyxl, or save it as .tsv") from None
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    lines = book.worksheets[0].iter_rows(values_only=True)
    names = [str(name) if name is not None else "" for name in next(lines, ())]
    rows = [dict(zip(names, ("" if cell is None else str(cell) for cell in line), strict=False)) for line in lines]
    return [row for row in rows if any(row.values())]


def need(rows: Iterable[dict], columns: str, path: str | Path) -> None:
    """Raise InputError at the first row that lacks one of the space-separated columns."""
    empty = True
    for number, row in enumerate(rows):
        empty = False
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is a JSON {_kind(row)}; is this the right benchmark's file?")
        missing = [c for c in columns.split() if row.get(c) is None]
        if missing:
            raise InputError(f"{path}: row {number} has no '{missing[0]}'; is this the right benchmark's file?")
    if empty:
        raise InputError(f"{path} holds no rows")


def existing(path: str | Path) -> Path:
    """Return a path that exists. Raises InputError."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist; docs/evaluation.md says where to get it")
    return Path(path)


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), "null")


def _is_workbook(path: str | Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "xl/workbook.xml" in archive.namelist()
    except zipfile.BadZipFile:
        return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _parse_json(text: str, path: str | Path) -> object:
    """One JSON value, or one object per line (blank lines are skipped)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        whole = error
    rows = []
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for count, (number, line) in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if count == 0:  # not lines, then, but one value that breaks off somewhere
                raise InputError(
                    f"{path}: line {whole.lineno} is not JSON ({whole.msg}); download or write the file again"
                ) from None
            raise InputError(f"{path}: line {number} is not JSON ({error.msg}); write the file again") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object; one object per line is expected")
        rows.append(row)
    return rows


def _parse_table(text: str, path: str | Path) -> list[dict[str, str]]:
    """The rows of a table with a header, separated by tabs or commas; `image` references become the image's text."""
    header = text.lstrip("\r\n").split("\n", 1)[0]
    separator = "\t" if "\t" in header else ","
    if separator not in header:
        raise InputError(f"{path} is not JSON, and it holds no tab-separated rows with a header; is it the right file?")
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    if not rows:
        raise InputError(f"{path} holds no rows")
    by_index = {row.get("index"): row.get("image") or "" for row in rows}
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number} has more or fewer cells than the header; download it again")
        image = row.get("image", "")
        if "index" in row and 0 < len(image) <= REFERENCE_LENGTH and (image in by_index or image.isdigit()):
            row["image"] = by_index.get(image, "")
            if len(row["image"]) <= REFERENCE_LENGTH:
                raise InputError(f"{path}: row {number} refers to the image of row '{image}', which holds none")
    return rows
