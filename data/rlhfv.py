"""`rlhfv`: RLHF-V-Dataset (HaoyeZhang/RLHF-V-Dataset, arXiv 2312.00849): `image`, and `text`, a JSON object in a column
with `question`, `chosen` and `rejected`."""

import json

from datasets import Dataset

from args import DataArguments
from data.rows import BadRow, Kind, Row, image_column, preference, require
from data.source import load_source

HUB_ID = "HaoyeZhang/RLHF-V-Dataset"


def convert(record: dict, kind: Kind) -> Row:
    """One record of RLHF-V."""
    require(record, "text")
    text = record["text"]
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno} of the column"
            raise BadRow(f"has a `text` that does not parse as JSON at {place} ({error.msg})") from None
        except (ValueError, RecursionError):
            raise BadRow("has a `text` that does not parse as JSON") from None
    if not isinstance(text, dict):
        raise BadRow("has a `text` that is not an object with question, chosen and rejected")
    require({f"text.{key}": v for key, v in text.items()}, "text.question", "text.chosen", "text.rejected")
    row = preference(record, text["question"], [text["chosen"], text["rejected"]], ranks=[0, 1])
    return row | {"images": image_column(record)}


def load(data_args: DataArguments) -> Dataset:
    """Rows of RLHF-V."""
    return load_source(data_args, convert, "preference", HUB_ID)
