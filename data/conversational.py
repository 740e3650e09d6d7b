"""Any other `--dataset_name`: a hub id, or a local file or folder, in TRL's conversational format or in this project's own.

| kind | columns beside `image` or `images` |
|---|---|
| preference | `prompt`, `chosen`, `rejected` (texts or messages; without `prompt`, the turns that both begin with), or |
|  | `prompt`, `responses` and `ranks` or `scores` |
| conversation | `messages` or `conversations`, or `prompt` and `completion` |
| prompt | `prompt`, optionally `reference` |
"""

import os

from datasets import Dataset

from args import DataArguments
from common.errors import InputError
from data.files import read_file, read_hub
from data.rows import (
    BadRow,
    Kind,
    Message,
    Row,
    image_column,
    messages_of,
    numbers_of,
    preference,
    question,
    refuse_video,
    require,
    text_of,
)
from data.source import columns_of, to_rows


def convert(record: dict, kind: Kind) -> Row:
    refuse_video(record)
    row = {"conversation": _conversation, "preference": _preference, "prompt": _prompt}[kind](record)
    return row | {"images": image_column(record, "image", "images")}


def kinds_of(columns: set[str]) -> list[Kind]:
    """The kinds that rows with these columns can be read as, the most telling first."""
    found: list[Kind] = []
    if {"chosen", "rejected"} <= columns or {"prompt", "responses"} <= columns:
        found.append("preference")
    if columns & {"messages", "conversations"} or {"prompt", "completion"} <= columns:
        found.append("conversation")
    if "prompt" in columns:
        found.append("prompt")
    return found


def load(data_args: DataArguments) -> Dataset:
    """Rows of the most telling kind that the columns hold."""
    path = data_args.data_path or data_args.dataset_name
    looks_local = data_args.data_path or os.path.exists(path) or path.startswith((".", "/", "~"))
    if looks_local:
        dataset, is_text = read_file(
            os.path.expanduser(path), "--data_path" if data_args.data_path else "--dataset_name"
        )
    else:
        dataset, is_text = read_hub(path), False
    return convert_dataset(dataset, data_args, path, is_text)


def convert_dataset(
    dataset: Dataset, data_args: DataArguments, label: str, is_text: bool = False, want: Kind | None = None
) -> Dataset:
    """Rows of `want` if the columns serve it, else of the most telling kind.

    Raises:
        InputError: the columns serve no kind.
    """
    columns = columns_of(dataset, is_text)
    kinds = kinds_of(columns)
    if not kinds:
        raise InputError(
            f"{label} has the columns {', '.join(sorted(columns)) or '(none)'}: rows need prompt, chosen and rejected, or "
            "messages, or prompt. Rename them, or choose the --dataset_name of the format (docs/data.md)."
        )
    return to_rows(dataset, data_args, convert, want if want in kinds else kinds[0], label, is_text)


def _conversation(record: dict) -> Row:
    for name in ("messages", "conversations"):
        if record.get(name) is not None:
            return {"messages": messages_of(record[name], name)}
    if record.get("prompt") is None and record.get("completion") is None:
        require(record, "messages")
    require(record, "prompt", "completion")
    completion = {"role": "assistant", "content": _answer(record["completion"], "completion")}
    return {"messages": [*question(record["prompt"]), completion]}


def _preference(record: dict) -> Row:
    if record.get("responses") is not None:
        require(record, "prompt")
        responses = record["responses"]
        if not isinstance(responses, list):
            raise BadRow("has `responses` that are no list of texts")
        if record.get("ranks") is None:
            require(record, "scores")
            ranks = dense_ranks(numbers_of(record["scores"], "`scores`", len(responses)))
        else:
            ranks = numbers_of(record["ranks"], "`ranks`", len(responses))
        return preference(record, record["prompt"], responses, ranks)
    require(record, "chosen", "rejected")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if prompt is None:
        prompt, chosen, rejected = _split_off_prompt(chosen, rejected)
    return preference(record, prompt, [_answer(chosen, "chosen"), _answer(rejected, "rejected")], ranks=[0, 1])


def _prompt(record: dict) -> Row:
    require(record, "prompt")
    row: Row = {"prompt": question(record["prompt"])}
    if record.get("reference") is not None:
        row["reference"] = text_of(record["reference"], "`reference`")
    return row


def dense_ranks(scores: list[float]) -> list[float]:
    """0 for the best score, 1 for the next lower one; equal scores share a rank."""
    order = sorted(set(scores), reverse=True)
    return [float(order.index(score)) for score in scores]


def _answer(value: object, name: str) -> object:
    if not isinstance(value, list):
        return value  # a text, checked with the row
    messages = messages_of(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRow(
            f"has {len(messages)} messages in its `{name}`: it must be one of the assistant, after the `prompt`"
        )
    return messages[0]["content"]


def _split_off_prompt(chosen: object, rejected: object) -> tuple[list[Message], object, object]:
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise BadRow(
            "has no `prompt`, and its `chosen` and `rejected` are no messages from which to read it: add `prompt`"
        )
    better, worse = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    if better[:-1] != worse[:-1] or not better[:-1]:
        raise BadRow("has no `prompt`, and its `chosen` and `rejected` do not differ in the last message alone")
    return better[:-1], better[-1:], worse[-1:]
