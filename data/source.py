"""From `--dataset_name` and `--data_path` to rows: what the loaders of all formats share."""

import json
import os
from collections.abc import Callable

from datasets import Dataset, Features, Image, List, Value

from args import DataArguments
from common.errors import InputError
from data.files import code_state, read_file, read_hub
from data.rows import Kind, Row, convert_batch, features_of

_IMAGE_COLUMNS = ("images", "image", "image_rejected", "img_path")


def load_source(
    data_args: DataArguments, convert: Callable[[dict, Kind], Row], kind: Kind, hub_id: str | None = None
) -> Dataset:
    """Rows of `kind` from `--data_path`, or from the hub if there is none and the format has a home there.

    Raises:
        InputError: no such file, or a file that is damaged as a whole. A row that cannot be used has its `problem` set.
    """
    if data_args.data_path:
        dataset, is_text = read_file(data_args.data_path, "--data_path")
        label = data_args.data_path
    elif hub_id:
        dataset, is_text, label = read_hub(hub_id), False, hub_id
    else:
        raise InputError(f"--dataset_name {data_args.dataset_name} needs --data_path, the file to read.")
    return to_rows(dataset, data_args, convert, kind, label, is_text)


def to_rows(
    dataset: Dataset,
    data_args: DataArguments,
    convert: Callable[[dict, Kind], Row],
    kind: Kind,
    label: str,
    is_text: bool = False,
) -> Dataset:
    """Convert records to rows in parallel; cached by `datasets`."""
    dataset = _undecoded(dataset)
    image_bytes = not is_text and any(_holds_bytes(dataset, name) for name in _IMAGE_COLUMNS)
    features = features_of(kind, image_bytes) | {"problem": Value("string"), "skipped": Value("bool")}
    small = 100 if image_bytes else 1000  # rows held at a time: images are some hundred kB each
    try:
        return dataset.map(
            convert_batch,
            with_indices=True,
            batched=True,
            batch_size=small,
            writer_batch_size=small,
            num_proc=_processes(data_args, len(dataset)),
            remove_columns=dataset.column_names,
            features=Features(features),
            desc=f"Reading {data_args.dataset_name}",
            fn_kwargs={
                "convert": convert,
                "kind": kind,
                "is_text": is_text,
                "image_bytes": image_bytes,
                "image_root": image_root_of(data_args),
                "allow_outside": data_args.allow_outside_image_root,
                "source": data_args.dataset_name,
                "label": label,
                "code": code_state(),
            },
        )
    except UnicodeDecodeError as error:  # parquet's texts are decoded row by row, by `datasets`
        row = next(i for i in range(len(dataset)) if not _decodes(dataset, i))
        raise InputError(f"{label}, row {row}: a text is not UTF-8 ({error.reason}): is the file whole?") from error


def image_root_of(data_args: DataArguments) -> str:
    """`--image_root`; without it the folder of the data file."""
    if data_args.image_root:
        if not os.path.isdir(data_args.image_root):
            raise InputError(f"--image_root {data_args.image_root} is no folder: give the folder of the images.")
        return os.path.abspath(data_args.image_root)
    path = data_args.data_path or data_args.dataset_name
    if os.path.isfile(path):
        return os.path.dirname(os.path.abspath(path))
    return os.path.abspath(path) if os.path.isdir(path) else os.getcwd()


def columns_of(dataset: Dataset, is_text: bool) -> set[str]:
    """Column names; of JSON records, the keys of the first one that parses (of the first hundred)."""
    if not is_text:
        return set(dataset.column_names)
    for i in range(min(len(dataset), 100)):
        try:
            record = json.loads(dataset[i]["text"] or "null")
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            return {name for name, value in record.items() if value is not None}
    return set()


def _undecoded(dataset: Dataset) -> Dataset:
    """The data set with its images as {"bytes", "path"}: nothing is decoded before the collator."""
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def _holds_bytes(dataset: Dataset, name: str) -> bool:
    feature = dataset.features.get(name)
    feature = getattr(feature, "feature", feature)
    return feature is not None and not isinstance(feature, Value)


def _decodes(dataset: Dataset, row: int) -> bool:
    try:
        return bool(dataset[row])
    except UnicodeDecodeError:
        return False


def _processes(data_args: DataArguments, rows: int) -> int | None:
    # A process takes longer to start than a thousand rows take to convert.
    return data_args.dataset_num_proc if rows > 1000 else None
