"""Reading files as records through `datasets`, which streams them to its Arrow cache and maps that into memory.

JSON is split into records here and parsed later, in parallel and with the row's number at hand, since `datasets`' own
reader infers one type per column (an `image` that is a name here and a list there is an error) and does not say which
row is wrong.
"""

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
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Value

from common.errors import InputError, disk_trouble
from data.file_kinds import kind_of_file
from data.meta_files import Part, parts_of, repeat_rows
from data.records import SPLITS, json_lines, json_list, json_object, table

logger = logging.getLogger(__name__)

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
_TAR_ENDINGS = {"json", "txt", "text", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}


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
            parts = [part for f in files for part in _guarded(path, functools.partial(parts_of, f))]
            return _guarded(path, lambda: repeat_rows(_json(_stamps(parts)), parts)), True


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


def _stamps(parts: Iterable[Part]) -> list[tuple[str, str | None, int, int, int]]:
    return [(p.file, p.root, *_stamp(p.file)) for p in parts]


class RecordStream:
    """Records that are read from the beginning at each iteration; nothing is copied into a cache (`--streaming`).

    Attributes:
        is_text: they are JSON texts (the columns of `_RECORD`).
        state: of each file what `_glance` sees, by which another set is known.
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
    state: list[object] = [_glance(f) for f in files]
    if kind == "tar":
        raise InputError(f"--streaming does not read tar files ({path}): unpack it, or leave --streaming out.")
    if kind in ("parquet", "arrow"):
        load = functools.partial(datasets.load_dataset, kind, data_files=files, split="train", streaming=True)
        return RecordStream(functools.partial(_records_of_tables, load, path), False, state)
    parts = [part for f in files for part in _guarded(path, functools.partial(parts_of, f))]
    if shares := [part.file for part in parts if part.repeat < 1]:
        raise InputError(
            f"--streaming cannot take a share of {shares[0]} (repeat_time below 1): its rows are not counted."
        )
    repeated = [part for part in parts for _ in range(int(part.repeat))]
    return RecordStream(functools.partial(_records_of_files, _stamps(repeated), ""), True, state)


def _glance(file: str) -> list[object]:
    """Name, size, and a digest of the first and last 64 KiB: all of it would have to be read otherwise."""
    size, part = os.path.getsize(file), 1 << 16
    with open(file, "rb") as opened:
        digest = hashlib.blake2b(opened.read(part), digest_size=16)
        opened.seek(max(0, size - part))
        digest.update(opened.read(part))
    return [os.path.basename(file), size, digest.hexdigest()]


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
        if not train and len(set(splits.values()) & {*SPLITS}) > 1:
            raise InputError(
                f"{path} holds the splits {', '.join(sorted(set(splits.values()) & {*SPLITS}))}, none of them train: name "
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
        try:
            for row, record in enumerate(readers[kind_of_file(path)](path)):
                empty = False
                yield {"unreadable": None, "table": False} | record | {"file": path, "row": row, "root": root}
        except OSError as error:  # a streamed file is opened again at each pass
            raise InputError(f"{path} cannot be read ({error.strerror}): is it still there?") from error
    if empty:
        raise InputError(f"{', '.join(path for path, *_ in stamps)} holds no rows: is it the right file?")
