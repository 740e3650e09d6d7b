"""InternVL's meta files: several sets, the folder of their images, how often their rows come."""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from common.errors import InputError
from data.file_kinds import kind_of_file
from data.records import MAX_RECORD_BYTES, checked_object, problem_of


class Part(NamedTuple):
    """A file of rows, the folder of its images if a meta file names one, and how often its rows come (below 1: that share of them)."""

    file: str
    root: str | None = None
    repeat: float = 1


def parts_of(path: str) -> list[Part]:
    """The files of rows behind a file: those that it names, or itself."""
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
            meta = json.load(file, object_pairs_hook=checked_object)
    except (ValueError, RecursionError):
        return []
    if not isinstance(meta, dict) or not meta:
        return []
    if not all(isinstance(entry, dict) and entry.get("annotation") for entry in meta.values()):
        return []
    if problem := problem_of(meta):
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


def repeat_rows(rows: Dataset, parts: list[Part]) -> Dataset:
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
