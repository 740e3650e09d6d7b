"""`rlaifv`: RLAIF-V-Dataset (openbmb/RLAIF-V-Dataset, arXiv 2405.17220): `image`, `question`, `chosen`, `rejected`."""

from datasets import Dataset

from args import DataArguments
from data.rows import Kind, Row, image_column, preference, require
from data.source import load_source

HUB_ID = "openbmb/RLAIF-V-Dataset"


def convert(record: dict, kind: Kind) -> Row:
    """One record of RLAIF-V."""
    require(record, "question", "chosen", "rejected")
    row = preference(record, record["question"], [record["chosen"], record["rejected"]], ranks=[0, 1])
    return row | {"images": image_column(record)}


def load(data_args: DataArguments) -> Dataset:
    """Rows of RLAIF-V."""
    return load_source(data_args, convert, "preference", HUB_ID)
