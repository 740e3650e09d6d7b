"""`llava_instruct`: LLaVA-Instruct's JSON (arXiv 2304.08485, and the mixes of LLaVA-1.5): `id`, `image`, `conversations`.

The same columns as `vlquery_json`; `<image>` stands inside the human's text. Rows without `image` are text only.
"""

from datasets import Dataset

from args import DataArguments
from data.source import load_source
from data.vlquery_json import convert


def load(data_args: DataArguments) -> Dataset:
    """Rows of LLaVA's instruction files."""
    return load_source(data_args, convert, "conversation")
