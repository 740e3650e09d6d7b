"""`vlquery_json`: `image` (name, list or absent) and `conversations` [{"from": user | assistant, "value": text}].

"human" and "gpt" stand for user and assistant, as in LLaVA-Instruct's files; a first message from "system" is the
system prompt.
"""

from datasets import Dataset

from args import DataArguments
from data.rows import Kind, Row, image_column, messages_of, require
from data.source import load_source


def convert(record: dict, kind: Kind) -> Row:
    """One conversation."""
    require(record, "conversations")
    return {"images": image_column(record), "messages": messages_of(record["conversations"], "conversations")}


def load(data_args: DataArguments) -> Dataset:
    """Rows of a file of conversations."""
    return load_source(data_args, convert, "conversation")
