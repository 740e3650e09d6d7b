"""`mmrlhf`: MM-RLHF's JSON lines (arXiv 2502.10391): `image` or `video`, `question` or `prompt`, and ranked responses.

Responses are `chosen` and `rejected` (dpo_pairs.jsonl), or `responses`: texts with `ranks` (or `rankings`) or `scores`
beside them, or objects with `response` and `rank` or `score`. A rank of 1 is the best.
"""

from datasets import Dataset

from args import DataArguments
from data.conversational import ranked
from data.rows import Kind, Row, image_column, preference, question, require
from data.source import load_source


def convert(record: dict, kind: Kind) -> Row:
    """One record of MM-RLHF."""
    if record.get("prompt") is None:
        require(record, "question")
    prompt = question(record["question"] if record.get("question") is not None else record["prompt"])
    images = image_column(record)
    if record.get("responses") is not None:
        return ranked(record, "responses", prompt) | {"images": images}
    require(record, "chosen", "rejected")
    row = preference(record, prompt, [record["chosen"], record["rejected"]], ranks=[0, 1])
    return row | {"images": images}


def load(data_args: DataArguments) -> Dataset:
    """Rows of MM-RLHF."""
    return load_source(data_args, convert, "preference")
