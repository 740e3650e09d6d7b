"""`vlfeedback_paired`: VLFeedback (MMInstruction/VLFeedback, arXiv 2312.10665), four rated responses a row.

A response's score is the mean of its aspects' ratings. A response with a rating that is not a number ("N/A") is left out;
responses with equal scores make no pair. Which pairs are used: `--pairs` and `--score_margin` (data/pairs.py).
"""

import math
from collections.abc import Mapping

from datasets import Dataset

from args import DataArguments
from data.conversational import dense_ranks, ranked
from data.rows import BadRow, Kind, Row, SkippedRow, image_column, question, require, shorten
from data.source import load_source

HUB_ID = "MMInstruction/VLFeedback"


def convert(record: dict, kind: Kind) -> Row:
    """One record of VLFeedback."""
    require(record, "prompt", "completions")
    if _is_scored(record["completions"]):
        row: Row = ranked(record, "completions", question(record["prompt"]))
        return row | {"images": image_column(record)}
    responses, scores = [], []
    for response, annotations in _completions(record["completions"]):
        score = _score(annotations)
        if score is not None:
            responses.append(response)
            scores.append(score)
    if len(responses) < 2:
        raise SkippedRow(f"holds no pair: {len(responses)} of its responses have ratings that are numbers")
    row = {"prompt": question(record["prompt"]), "responses": responses}
    row |= {"ranks": dense_ranks(scores), "scores": scores}
    # The hub's files name the image beside the picture itself.
    images = image_column(record, "image", "images") or image_column(record, "img_path")
    return row | {"images": images}


def load(data_args: DataArguments) -> Dataset:
    """Rows of VLFeedback."""
    return load_source(data_args, convert, "preference", HUB_ID)


def _is_scored(completions: object) -> bool:
    """BPO's layout: a `score` in the place of annotations."""
    first = completions[0] if isinstance(completions, list) and completions else completions
    return isinstance(first, Mapping) and first.get("annotations") is None and first.get("score") is not None


def _completions(value: object) -> list[tuple[object, object]]:
    """(response, annotations) of each response, from an object of lists (`datasets`) or a list of objects (JSON)."""
    if isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
        value = {key: [v.get(key) for v in value] for key in ("response", "annotations")}
    if not isinstance(value, Mapping):
        raise BadRow(
            f"has `completions` {shorten(repr(value))}: it must be an object with `response` and `annotations`"
        )
    require({f"completions.{key}": v for key, v in value.items()}, "completions.response", "completions.annotations")
    responses, annotations = value["response"], value["annotations"]
    if not isinstance(responses, list) or not isinstance(annotations, list) or len(responses) != len(annotations):
        raise BadRow("has `completions` whose `response` and `annotations` are not lists of one length")
    return list(zip(responses, annotations, strict=True))


def _score(annotations: object) -> float | None:
    """Mean rating over the aspects; None if there is none, or if one is not a number."""
    if annotations is not None and not isinstance(annotations, Mapping):
        raise BadRow(f"has annotations {shorten(repr(annotations))}: they must be an object of aspects")
    ratings = []
    for aspect in (annotations or {}).values():
        if aspect is None:  # parquet fills the aspects that other rows have
            continue
        if not isinstance(aspect, Mapping):
            raise BadRow(f"has an aspect {shorten(repr(aspect))}: it must be an object with a `Rating`")
        try:
            ratings.append(float(aspect.get("Rating")))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
    if not ratings or not all(map(math.isfinite, ratings)):
        return None
    return sum(ratings) / len(ratings)
