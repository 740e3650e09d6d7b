"""Writing files so that nobody ever reads half of one."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` at the end: a killed run never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole, UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[object]) -> None:
    """Write a file with one JSON value a line as a whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_valid_json(path: str | Path) -> None:
    """Write a JSON file anew with null for NaN and infinity, which Python writes and JSON does not have."""
    text = Path(path).read_text(encoding="utf-8")
    if "NaN" in text or "Infinity" in text:
        write_json(path, json.loads(text, parse_constant=lambda _: None))


def check_writable(folder: str, what: str = "--output_dir") -> None:
    """Raise InputError if no file can be created in a folder, or in its nearest existing parent.

    Args:
        what: names the folder in the message.
    """
    if not folder:
        raise InputError(f"{what} is empty: give a folder.")
    there = Path(folder).absolute()
    try:
        if there.is_symlink() and not there.exists():
            raise InputError(
                f"{what} {folder} is a link to {os.readlink(there)}, which is not there: make that folder, or remove the link."
            )
        while not there.exists():
            there = there.parent
        probe = there / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{what} {folder} cannot be written ({error.strerror}): give another folder.") from error


def flush(folder: Path) -> None:
    """Wait until everything in a folder is on disk, so that a rename never reaches it before the data."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
