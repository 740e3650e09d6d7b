"""Groups of answers taken out of their micro batches and put into others: what DAPO's dynamic sampling needs (2503.14476 §3.2)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import losses
from base.rollout import AnswerLogps, Answers, Prompts, Sampled, Scored, prompt_by_prompt


@dataclass(frozen=True)
class Group:
    """A prompt with its K answers and what they are worth: plain data, which devices can exchange.

    Attributes:
        place: of the prompt among those of the update, see Prompts.
        answers: token ids of each.
        sampler_logps: log-probs of each, see Sampled; None if there are none.
        parts, scores: K numbers, see Scored.
        uniform: whether all scores are the same.
    """

    place: int
    answers: list[list[int]]
    sampler_logps: list[list[float]] | None
    parts: dict[str, list[float]]
    scores: list[float]
    uniform: bool


def groups_of(r: Scored) -> list[Group]:
    """The groups of a micro batch, in the order of its prompts."""
    tokens = r.batch["completion_ids"].tolist()
    lengths = r.mask.sum(1).tolist()
    ids = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    logps = None
    if r.sampler_logps is not None:
        logps = [row[:n] for row, n in zip(r.sampler_logps.tolist(), lengths, strict=True)]
    uniform = losses.uniform_groups(r.scores, r.groups).tolist()
    parts, scores = {name: values.tolist() for name, values in r.parts.items()}, r.scores.tolist()
    found = []
    for place, numbers in zip(r.places, r.by_prompt(range(len(r.texts))), strict=True):

        def of_prompt(values: Sequence[Any], numbers: list[int] = numbers) -> list[Any]:
            return [values[i] for i in numbers]

        of_parts = {name: of_prompt(values) for name, values in parts.items()}
        of_logps = None if logps is None else of_prompt(logps)
        found.append(Group(place, of_prompt(ids), of_logps, of_parts, of_prompt(scores), uniform[numbers[0]]))
    return found


def choose(groups: Sequence[Group], wanted: int) -> list[Group]:
    """The first groups whose scores differ, by place; if there are not enough, then uniform ones."""
    return sorted(groups, key=lambda g: (g.uniform, g.place))[:wanted]


def micro_batch_of(
    groups: Sequence[Group],
    encode: Callable[[list[int]], Prompts],
    lay_out: Callable[[Prompts, Answers, AnswerLogps | None], Sampled],
) -> Scored:
    """Groups as a micro batch.

    Args:
        encode: places -> prompts, their images encoded.
        lay_out: prompts, answers and the server's log-probs of them -> `Sampled.of`.
    """
    prompts = encode([g.place for g in groups])
    logps = [g.sampler_logps for g in groups if g.sampler_logps is not None]
    sampled = lay_out(prompts, [g.answers for g in groups], logps if len(logps) == len(groups) else None)
    where = {place: i for i, place in enumerate(prompt_by_prompt(len(groups), len(groups[0].answers)))}
    order = [where[place] for place in sampled.order]

    def in_order(values: Iterable[list[float]]) -> Tensor:
        flat = [value for of_group in values for value in of_group]
        return torch.tensor([flat[i] for i in order], device=sampled.mask.device)

    parts = {name: in_order(g.parts[name] for g in groups) for name in groups[0].parts}
    return Scored(**vars(sampled), parts=parts, scores=in_order(g.scores for g in groups))
