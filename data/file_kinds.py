"""What a file is, by its content."""

import json

from common.errors import InputError
from data.records import MAX_RECORD_BYTES, rows_of_object, separator_of

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
    if separator_of(first.decode("utf-8", "replace")) and len(lines) > 1:
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
        return list(rows_of_object(value)) != [value]
    except ValueError:
        return True
