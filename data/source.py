"""From `--dataset_name` and `--data_path` to rows: what the loaders of all formats share."""

import json
import os
from collections.abc import Callable, Mapping

from datasets import Audio, Dataset, Features, Image, Value, Video

from args import DataArguments
from common.errors import InputError
from data.columns import column_map, with_own_columns
from data.convert import Reader, convert_batch
from data.files import RecordStream, code_state, read_file, read_hub, stream_file, stream_hub
from data.rows import Kind, Row, features_of
from data.stream import RowStream


def load_source(
    data_args: DataArguments, convert: Callable[[dict, Kind], Row], kind: Kind, hub_id: str | None = None
) -> Dataset:
    """Rows of `kind` from `--data_path`, or from the hub if there is none and the format has a home there.

    Raises:
        InputError: no such file, or a file that is damaged as a whole. A row that cannot be used has its `problem` set.
    """
    if data_args.data_path:
        dataset, is_text = records_of(data_args, data_args.data_path, "--data_path")
        label = data_args.data_path
    elif hub_id:
        dataset, is_text = records_of(data_args, hub_id, None)
        label = hub_id
    else:
        raise InputError(f"--dataset_name {data_args.dataset_name} needs --data_path, the file to read.")
    return to_rows(dataset, data_args, convert, kind, label, is_text)


def records_of(data_args: DataArguments, path: str, what: str | None) -> tuple[Dataset | RecordStream, bool]:
    """Records of a file that the flag `what` names, or of the hub (None), and whether they are JSON texts."""
    if data_args.streaming:
        stream = stream_file(path, what) if what else stream_hub(path)
        return stream, stream.is_text
    return read_file(path, what) if what else (read_hub(path), False)


def to_rows(
    dataset: Dataset | RecordStream,
    data_args: DataArguments,
    convert: Callable[[dict, Kind], Row],
    kind: Kind,
    label: str,
    is_text: bool = False,
) -> Dataset:
    """Convert records to rows in parallel; cached by `datasets`. Of a `RecordStream` a `RowStream`, which converts them as they are read."""
    names = column_map(data_args.columns)
    there = columns_of(dataset, is_text)
    if there and (gone := [theirs for theirs in names if theirs not in there]):
        raise InputError(
            f"--columns names {', '.join(gone)}, which {label} does not have (it has {', '.join(sorted(there))})."
        )
    holds_bytes = isinstance(dataset, RecordStream) or any(map(_holds_bytes, dataset.features.values()))
    reader = Reader(
        convert=convert,
        kind=kind,
        is_text=is_text,
        image_bytes=not is_text and holds_bytes,
        image_root=image_root_of(data_args),
        allow_outside=data_args.allow_outside_image_root,
        source=str(data_args.dataset_name),
        label=label,
        names=names,
    )
    if isinstance(dataset, RecordStream):
        return RowStream(dataset, data_args, reader)  # type: ignore[return-value]  # loaders hand it on
    image_bytes = reader.image_bytes
    features = features_of(kind, image_bytes) | {"problem": Value("string"), "skipped": Value("bool")}
    features |= {"columns": Value("string"), "kept": Value("string")}
    num_proc = _processes(data_args, len(dataset))
    small = 100 if image_bytes else 1000  # rows held at a time: images are some hundred kB each
    try:
        # As Arrow tables no image is decoded: that is the collators' work.
        rows = dataset.with_format("arrow").map(
            convert_batch,
            with_indices=True,
            batched=True,
            batch_size=small,
            writer_batch_size=small,
            num_proc=num_proc,
            remove_columns=dataset.column_names,
            features=Features(features),
            desc=f"Reading {data_args.dataset_name}",
            fn_kwargs={"reader": reader, "code": code_state()},
        )
        return with_own_columns(rows.with_format(None), num_proc)
    except UnicodeDecodeError as error:  # parquet's texts are decoded row by row, by `datasets`
        row = next(i for i in range(len(dataset)) if not _decodes(dataset, i))
        raise InputError(f"{label}, row {row}: a text is not UTF-8 ({error.reason}): is the file whole?") from error


def image_root_of(data_args: DataArguments) -> str:
    """`--image_root`; without it the folder of the data file."""
    if data_args.image_root:
        if not os.path.isdir(data_args.image_root):
            raise InputError(f"--image_root {data_args.image_root} is not a folder: give the folder of the images.")
        return os.path.abspath(data_args.image_root)
    path = data_args.data_path or data_args.dataset_name
    if os.path.isfile(path):
        return os.path.dirname(os.path.abspath(path))
    return os.path.abspath(path) if os.path.isdir(path) else os.getcwd()


def first_record(dataset: Dataset | RecordStream, is_text: bool, names: Mapping[str, str]) -> dict[str, object]:
    """The first record that parses (of the first hundred), without nulls, under the names of `--columns`."""
    if not is_text:
        record = next(iter(_head(dataset, 1)), None) or dict.fromkeys(columns_of(dataset, is_text))
        return {names.get(name, name): value for name, value in record.items() if names.get(name, name)}
    for raw in _head(dataset, 100):
        try:
            record = json.loads(raw["text"] or "null")
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            record = {names.get(name, name): value for name, value in record.items() if value is not None}
            return {name: value for name, value in record.items() if name}
    return {}


def columns_of(dataset: Dataset | RecordStream, is_text: bool) -> set[str]:
    """Column names; of JSON records, all keys of the first hundred that parse."""
    if not is_text:
        return set(dataset.column_names if isinstance(dataset, Dataset) else next(iter(dataset), {}))
    found: set[str] = set()
    for raw in _head(dataset, 100):
        try:
            record = json.loads(raw["text"] or "null")
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.update(record)
    return found


def _head(dataset: Dataset | RecordStream, number: int) -> list[dict]:
    """The first records; of tables no image is decoded."""
    if isinstance(dataset, RecordStream):
        return dataset.head(number)
    return dataset.with_format("arrow")[:number].to_pylist() if len(dataset) else []


def _holds_bytes(feature: object) -> bool:
    """Whether a column, or anything within it, is bytes."""
    if isinstance(feature, Mapping):
        return any(map(_holds_bytes, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_holds_bytes, feature))
    if hasattr(feature, "feature"):
        return _holds_bytes(feature.feature)
    return isinstance(feature, Image | Audio | Video) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _decodes(dataset: Dataset, row: int) -> bool:
    try:
        return bool(dataset[row])
    except UnicodeDecodeError:
        return False


def _processes(data_args: DataArguments, rows: int) -> int | None:
    # A process takes longer to start than a thousand rows take to convert.
    return data_args.dataset_num_proc if rows > 1000 else None
