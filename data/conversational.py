"""Any other `--dataset_name`: a hub id, or a local file or folder, whose columns tell what its rows are.

| kind | columns beside `image` or `images`, and `system` |
|---|---|
| preference | a question, `chosen`, `rejected` (texts or messages; without a question, the turns that both begin with), or |
|  | `responses` or `completions` with `ranks` or `scores`, or a conversation with `rejected_response` or |
|  | `rejected_messages` |
| unpaired | a conversation with `label` or `kto_tag`, which says whether its last answer is good: true or false |
| conversation | `messages`, `conversations` or `conversation`; or a question and `completion`, `response` or `output` |
| prompt | a question, optionally `reference`; or `messages` that end with the user |

A question is `prompt` (text or messages), `question`, `query` or `instruction` (with `input`), after the pairs of `history`; or a
conversation. These are the layouts of TRL, LLaMA-Factory, ms-swift, Qwen2-VL, MMPR, BPO and SPA-VL, among others.
"""

import os
from collections.abc import Mapping

from datasets import Dataset

from args import DataArguments
from common.errors import InputError
from data.columns import column_map
from data.files import RecordStream
from data.rows import (
    BadRow,
    Kind,
    Message,
    Row,
    features_of,
    image_column,
    label_of,
    messages_of,
    number_of,
    numbers_of,
    preference,
    question,
    require,
    shorten,
    text_of,
)
from data.source import columns_of, first_record, records_of, to_rows

TALKS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "query", "instruction")
ANSWERS = ("completion", "response", "output")
LABEL_COLUMNS = ("label", "kto_tag")
_REJECTED = {"rejected_response", "rejected_messages"}


def convert(record: dict, kind: Kind) -> Row:
    """One record in any conversational layout."""
    readers = {"conversation": _conversation, "preference": _preference, "unpaired": _unpaired, "prompt": _prompt}
    row = readers[kind](record)
    return row | {"images": image_column(record, "image", "images")}


def kinds_of(record: Mapping[str, object]) -> list[Kind]:
    """The kinds that rows with the columns of this one can be read as, the most telling first."""
    names = {*record}
    talks, asked, answered = names & {*TALKS}, names & {*QUESTIONS}, names & {*ANSWERS}
    found: list[Kind] = []
    beside = (talks or (asked and answered)) and names & _REJECTED
    if {"chosen", "rejected"} <= names or beside or ((talks or asked) and names & {"responses", "completions"}):
        found.append("preference")
    if talks or (asked and answered):
        if any(label_of(record.get(name)) is not None for name in LABEL_COLUMNS):
            found.append("unpaired")
        found.append("conversation")
    if asked - {"question"}:
        found.append("prompt")
    if found[:1] not in (["preference"], ["unpaired"]) and _ends_with_user(record):
        found = ["prompt"]
    return found


def _ends_with_user(record: Mapping[str, object]) -> bool:
    for name in TALKS:
        messages = record.get(name)
        if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
            return (messages[-1].get("from") or messages[-1].get("role")) in ("user", "human")
    return False


def load(data_args: DataArguments) -> Dataset:
    """Rows of the most telling kind that the columns hold."""
    path = data_args.data_path or data_args.dataset_name
    looks_local = data_args.data_path or os.path.exists(path) or path.startswith((".", "/", "~"))
    if looks_local:
        what = "--data_path" if data_args.data_path else "--dataset_name"
        dataset, is_text = records_of(data_args, os.path.expanduser(path), what)
    else:
        dataset, is_text = records_of(data_args, path, None)
    return convert_dataset(dataset, data_args, path, is_text)


def convert_dataset(
    dataset: Dataset | RecordStream,
    data_args: DataArguments,
    label: str,
    is_text: bool = False,
    want: Kind | None = None,
) -> Dataset:
    """Rows of `want` if the columns serve it, else of the most telling kind.

    Raises:
        InputError: the columns serve no kind.
    """
    kinds = kinds_of(first_record(dataset, is_text, column_map(data_args.columns)))
    if not kinds:
        columns = ", ".join(sorted(map(str, columns_of(dataset, is_text)))) or "(none)"
        raise InputError(
            f"{label} has the columns {shorten(columns, 300)}: rows need prompt, chosen and rejected; messages; prompt "
            "and completion, with a label for KTO; or prompt. "
            "Name yours with --columns prompt=...,chosen=..., or choose the --dataset_name of the format (docs/data.md)."
        )
    if (
        want is not None and want in kinds and isinstance(dataset, Dataset) and not is_text
    ):  # rows of several kinds at once: those of the others are not read
        others = {name for kind in kinds for name in features_of(kind, False)} - features_of(want, False).keys()
        dataset = dataset.remove_columns([name for name in dataset.column_names if name in others])
    return to_rows(dataset, data_args, convert, want if want in kinds else kinds[0], label, is_text)


def _conversation(record: dict) -> Row:
    for name in TALKS:
        if record.get(name) is not None:
            return {"messages": messages_of(record[name], name)}
    answer = next((name for name in ANSWERS if record.get(name) is not None), None)
    if answer is None:
        answer = "completion" if _asked_in(record) else "messages"
        require(record, answer)
    content = Message(role="assistant", content=_answer(record[answer], answer))
    return {"messages": [*asked(record), content]}


def _preference(record: dict) -> Row:
    for name in ("responses", "completions"):
        if record.get(name) is not None:
            return ranked(record, name, asked(record))
    for name in ("rejected_messages", "rejected_response"):
        if record.get(name) is not None:
            return _with_rejected(record, name)
    require(record, "chosen", "rejected")
    chosen, rejected = record["chosen"], record["rejected"]
    own = _asked_in(record)
    if own is None or (isinstance(chosen, list) and len(chosen) > 1):
        prompt, chosen, rejected = _split_off_prompt(chosen, rejected)
        if own and question(record[own])[-1]["content"] != prompt[-1]["content"]:
            raise BadRow(f"has a `{own}` that is not the question before its `chosen` answer: keep one of them")
    else:
        prompt = asked(record)
    return preference(record, prompt, [_answer(chosen, "chosen"), _answer(rejected, "rejected")], ranks=[0, 1])


def _with_rejected(record: dict, name: str) -> Row:
    """ms-swift: a conversation, whose last answer is the chosen one, and the rejected one beside it."""
    if record.get("rejected_images") is not None:
        raise BadRow(
            "has `rejected_images`, pictures of the rejected answer alone: all answers are to the same images; leave them out "
            "with --columns =rejected_images, or call them image_rejected for the losses that compare images"
        )
    messages = _conversation(record)["messages"]
    rejected = record[name]
    if name == "rejected_messages":
        prompt, chosen, rejected = _split_off_prompt(messages, rejected, "messages", name)
    elif messages[-1]["role"] != "assistant":  # type: ignore[index]
        raise BadRow(f"has `{name}` beside messages that do not end with an answer: end them with the chosen one")
    else:
        prompt, chosen = messages[:-1], messages[-1:]  # type: ignore[index]
    return preference(record, prompt, [_answer(chosen, "messages"), _answer(rejected, name)], ranks=[0, 1])


def _unpaired(record: dict) -> Row:
    messages = _conversation(record)["messages"]
    name, *others = [name for name in LABEL_COLUMNS if record.get(name) is not None] or ["label"]
    if others:
        raise BadRow(f"has both `{name}` and `{others[0]}`: keep one of them")
    require(record, name)
    label = label_of(record[name])
    if label is None:
        raise BadRow(
            f"has the `{name}` {shorten(repr(record[name]))}: write true for a good answer, false for a bad one"
        )
    if messages[-1]["role"] != "assistant":  # type: ignore[index]
        raise BadRow(f"has a `{name}` and no answer that it labels: end the messages with one of the assistant")
    return {"prompt": messages[:-1], "responses": [messages[-1]["content"]], "label": label}  # type: ignore[index]


def _prompt(record: dict) -> Row:
    for name in ("chosen", "rejected", "responses", "completions"):
        record.get(name)  # answers are not needed: they do not become columns
    row: Row = {"prompt": asked(record)}
    if record.get("reference") is not None:
        row["reference"] = text_of(record["reference"], "`reference`")
    return row


def asked(record: dict) -> list[Message]:
    """The question of a row, with what was said before it."""
    name = _asked_in(record) or "prompt"
    require(record, name)
    value = record[name]
    if name == "instruction" and isinstance(value, str) and record.get("input"):
        value = f"{value}\n{text_of(record['input'], '`input`')}".strip("\n")
    messages = question(value, name)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("has a `history` that is not a list of pairs of a question and an answer")
    earlier = [
        Message(role=role, content=text_of(text, f"history[{i}]"))
        for i, pair in enumerate(history)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*earlier, *messages]


def _asked_in(record: dict) -> str | None:
    return next((name for name in (*QUESTIONS, *TALKS) if record.get(name) is not None), None)


def ranked(record: dict, name: str, prompt: list[Message]) -> Row:
    """A preference row from the column `name`: texts with `ranks`, `rankings` or `scores` beside them, or objects with both.

    An object has its text as `response`, `text`, `content` or `answer`, and a `rank` (smaller is better) or `score`.
    """
    responses, ranks = record[name], record.get("ranks")
    if ranks is None:
        ranks = record.get("rankings")
    scores = record.get("scores")
    if isinstance(responses, Mapping) and all(isinstance(values, list) for values in responses.values()):
        size = max(map(len, responses.values()), default=0)  # an object of lists, as parquet files hold it
        columns = responses.items()
        responses = [{key: v[i] if i < len(v) else None for key, v in columns} for i in range(size)]
    if not isinstance(responses, list):
        raise BadRow(f"has `{name}` that are not a list")
    if responses and all(isinstance(r, Mapping) for r in responses):
        if any(r.get("annotations") is not None for r in responses):
            raise BadRow(f"has `{name}` with annotations: choose --dataset_name vlfeedback_paired")
        ranks, scores = (_field(responses, name, of) for of in ("rank", "score"))
        texts = ("response", "text", "content", "answer")
        responses = [next((r[key] for key in texts if r.get(key) is not None), None) for r in responses]
    if ranks is None and scores is None:
        raise BadRow(f"has `{name}` without `ranks` or `scores`, so that none is better than another: add them")
    if scores is not None:
        scores = numbers_of(scores, "`scores`", len(responses))
    ranks = dense_ranks(scores) if ranks is None else numbers_of(ranks, "`ranks`", len(responses))  # type: ignore[arg-type]
    row = preference(record, prompt, responses, ranks)
    return row | {"scores": scores} if scores is not None else row


def _field(responses: list[Mapping[str, object]], name: str, of: str) -> list[float] | None:
    if all(r.get(of) is None for r in responses):
        return None
    return [number_of(r.get(of), f"{name}[{i}].{of}") for i, r in enumerate(responses)]


def dense_ranks(scores: list[float]) -> list[float]:
    """0 for the best score, 1 for the next lower one; equal scores share a rank."""
    order = sorted(set(scores), reverse=True)
    return [float(order.index(score)) for score in scores]


def _answer(value: object, name: str) -> object:
    if not isinstance(value, list | Mapping):
        return value  # a text, checked with the row
    messages = messages_of(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRow(
            f"has {len(messages)} messages in its `{name}`: it must be one of the assistant, after the `prompt`"
        )
    return messages[0]["content"]


def _split_off_prompt(
    chosen: object, rejected: object, better_name: str = "chosen", worse_name: str = "rejected"
) -> tuple[list[Message], list[Message], list[Message]]:
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise BadRow(
            f"has no `prompt`, and its `{better_name}` and `{worse_name}` are not messages from which to read it: add `prompt`"
        )
    better, worse = messages_of(chosen, better_name), messages_of(rejected, worse_name)
    if better[:-1] != worse[:-1] or not better[:-1]:
        raise BadRow(
            f"has no `prompt`, and its `{better_name}` and `{worse_name}` do not differ in the last message alone"
        )
    return better[:-1], better[-1:], worse[-1:]
