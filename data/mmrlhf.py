"""`mmrlhf`: MM-RLHF's JSON lines (arXiv 2502.10391): `image`, `question` or `prompt`, and ranked responses.

Responses are `chosen` and `rejected` (dpo_pairs.jsonl), or `responses`: texts with `ranks` (or `rankings`) or `scores`
beside them, or objects with `response` and `rank` or `score`. A rank of 1 is the best. Video rows are refused by name.
"""

from collections.abc import Mapping

from datasets import Dataset

from args import DataArguments
from data.conversational import dense_ranks
from data.rows import BadRow, Kind, Row, image_column, number_of, numbers_of, preference, refuse_video, require
from data.source import load_source


def convert(record: dict, kind: Kind) -> Row:
    refuse_video(record)
    if record.get("prompt") is None:
        require(record, "question")
    prompt = record["question"] if record.get("question") is not None else record["prompt"]
    images = image_column(record)
    if record.get("responses") is None:
        require(record, "chosen", "rejected")
        row = preference(record, prompt, [record["chosen"], record["rejected"]], ranks=[0, 1])
        return row | {"images": images}
    responses = record["responses"]
    if not isinstance(responses, list):
        raise BadRow("has `responses` that are no list")
    record = {**record, "ranks": record.get("ranks", record.get("rankings"))}
    if responses and all(isinstance(r, Mapping) for r in responses):
        record |= {name + "s": _field(responses, name) for name in ("rank", "score")}
        responses = [r.get("response") for r in responses]
    if record.get("ranks") is None:
        require(record, "scores")
        ranks = dense_ranks(numbers_of(record["scores"], "`scores`", len(responses)))
    else:
        ranks = numbers_of(record["ranks"], "`ranks`", len(responses))
    return preference(record, prompt, responses, ranks) | {"images": images}


def load(data_args: DataArguments) -> Dataset:
    return load_source(data_args, convert, "preference")


def _field(responses: list[Mapping[str, object]], name: str) -> list[float] | None:
    if all(r.get(name) is None for r in responses):
        return None
    return [number_of(r.get(name), f"responses[{i}].{name}") for i, r in enumerate(responses)]
