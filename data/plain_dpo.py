"""`plain_dpo`: a JSON list or JSON lines with `image` (name, list or absent), `prompt`, `chosen` and `rejected`.

`prompt` is a text, or messages where there is a system prompt or earlier turns. Optional: `scores` and `severity`
(two numbers, chosen first), `margin`, `image_rejected` (a second image).
"""

from datasets import Dataset

from args import DataArguments
from data.rows import Kind, Row, image_column, preference, require
from data.source import load_source


def convert(record: dict, kind: Kind) -> Row:
    """One pair."""
    require(record, "prompt", "chosen", "rejected")
    row = preference(record, record["prompt"], [record["chosen"], record["rejected"]], ranks=[0, 1])
    return row | {"images": image_column(record)}


def load(data_args: DataArguments) -> Dataset:
    """Rows of a file of pairs."""
    return load_source(data_args, convert, "preference")
