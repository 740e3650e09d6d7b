"""Files of rows, whoever wrote them: JSON, JSON lines, tab-separated tables, parquet. Wrong ones end in one sentence."""

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a TSV cell holds a whole base64 image

REFERENCE_LENGTH = 64  # VLMEvalKit's convention: a shorter image cell is the index of the row that holds the image


def read_text(path: str | Path) -> str:
    """Return a UTF-8 text file as it is, byte order mark aside. Raises InputError for a missing file, a folder, or bytes."""
    if _existing(path).is_dir():
        raise InputError(f"{path} is a folder; pass the file in it")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a UTF-8 text file; is this a parquet file or an archive?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); look at its permissions") from None


def read_json(path: str | Path) -> object:
    """Return the parsed JSON file. Raises InputError with the line when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: line {e.lineno} is not JSON ({e.msg}); download the file again") from None


def read_jsonl(path: str | Path) -> list[dict]:
    """Return the objects of a JSON-lines file (blank lines are skipped)."""
    rows = []
    try:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is not a JSON object; one object per line is expected")
            rows.append(row)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: line {number} is not JSON ({e.msg}); delete or repair that line") from None
    return rows


def read_tsv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file with a header, `image` references resolved to the base64 text."""
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    if not rows or "\t".join(rows[0]).count("\t") == 0:
        raise InputError(f"{path} holds no tab-separated rows with a header; pass the benchmark's .tsv file")
    by_index = {row.get("index"): row.get("image") or "" for row in rows}
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number} has more or fewer cells than the header; download it again")
        image = row.get("image", "")
        if 0 < len(image) <= REFERENCE_LENGTH:
            row["image"] = by_index.get(image, "")
            if len(row["image"]) <= REFERENCE_LENGTH:
                raise InputError(f"{path}: row {number} refers to the image of row '{image}', which holds none")
    return rows


def read_parquet(path: str | Path, pattern: str = "*.parquet") -> list[dict]:
    """Return the rows of one parquet file, or of all files of a folder that match `pattern`, in path order."""
    import pyarrow
    import pyarrow.parquet

    source = _existing(path)
    files = sorted(source.rglob(pattern)) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{path} holds no {pattern} file")
    try:
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    except pyarrow.ArrowInvalid as e:
        raise InputError(f"{path} is not a parquet file ({str(e).split('.')[0]}); download it again") from None


def read_records(path: str | Path) -> list[dict]:
    """Return the rows of a .json list, .jsonl, .tsv or .parquet file, by its ending."""
    suffix = Path(path).suffix.lower()
    if suffix == ".tsv":
        return read_tsv(path)
    if suffix == ".parquet" or Path(path).is_dir():
        return read_parquet(path)
    if suffix == ".jsonl":
        return read_jsonl(path)
    data = read_json(path)
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise InputError(f"{path} is not a JSON list of objects; use the file that the benchmark publishes")
    return data


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise InputError(f"{path} does not exist; docs/evaluation.md says where to get it")
    return Path(path)


def need(rows: Iterable[dict], columns: str, path: str | Path) -> None:
    """Raise InputError at the first row that lacks one of the space-separated columns."""
    empty = True
    for number, row in enumerate(rows):
        empty = False
        missing = [c for c in columns.split() if row.get(c) is None]
        if missing:
            raise InputError(f"{path}: row {number} has no '{missing[0]}'; is this the right benchmark's file?")
    if empty:
        raise InputError(f"{path} holds no rows")
