"""Groups of answers taken out of their micro batches and put into others: what DAPO's dynamic sampling needs (2503.14476 §3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import losses
from base.rollout import Answers, Prompts, Row, Sampled, Scored, prompt_by_prompt


@dataclass(frozen=True)
class Group:
    """A prompt with its K answers and what they are worth.

    Attributes:
        place: of the prompt among those of the update, see Prompts.
        answers: token ids of each.
        parts, scores: (K,), see Scored.
        uniform: whether all scores are the same.
    """

    row: Row
    place: int
    answers: list[list[int]]
    parts: dict[str, Tensor]
    scores: Tensor
    uniform: bool


def groups_of(r: Scored) -> list[Group]:
    """The groups of a micro batch, in the order of its prompts."""
    tokens = r.batch["completion_ids"].tolist()
    ids = [row[:n] for row, n in zip(tokens, r.mask.sum(1).tolist(), strict=True)]
    uniform = r.by_prompt(losses.uniform_groups(r.scores, r.groups).tolist())
    found = []
    for b, numbers in enumerate(r.by_prompt(range(len(r.texts)))):
        of_prompt = {name: values[numbers] for name, values in r.parts.items()}
        answers = [ids[i] for i in numbers]
        found.append(Group(r.rows[b], r.places[b], answers, of_prompt, r.scores[numbers], uniform[b][0]))
    return found


def micro_batch_of(
    groups: Sequence[Group],
    encode: Callable[[list[Row], list[int]], Prompts],
    lay_out: Callable[[Prompts, Answers], Sampled],
) -> Scored:
    """Groups as a micro batch.

    Args:
        encode: rows and places -> prompts, their images encoded.
        lay_out: prompts and answers -> `Sampled.of`.
    """
    prompts = encode([g.row for g in groups], [g.place for g in groups])
    sampled = lay_out(prompts, [g.answers for g in groups])
    where = {place: i for i, place in enumerate(prompt_by_prompt(len(groups), len(groups[0].answers)))}
    order = torch.tensor([where[place] for place in sampled.order])
    parts = {name: torch.cat([g.parts[name] for g in groups])[order] for name in groups[0].parts}
    return Scored(**vars(sampled), parts=parts, scores=torch.cat([g.scores for g in groups])[order])
