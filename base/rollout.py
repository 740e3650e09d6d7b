"""What is known of a micro batch in each phase of an update: every phase takes one of these types and makes the next.

    Prompts --sample--> Sampled --score--> Scored --passes--> Evaluated --advantages--> Advantages

Shapes: B prompts; K answers to each, R = B * K in all, of at most T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from base.adapters import Role
from base.batch import ImageInputs, ResponseBatch
from base.collator import VLPPODataCollator
from base.features import join_image_inputs
from common.tensors import to_device

Row = dict[str, Any]
Answers = list[list[list[int]]]  # [prompt][answer] -> token ids, up to and with the end token
AnswerLogps = list[list[list[float]]]  # [prompt][answer] -> the log-prob of each token
Images = dict[Role, ImageInputs]  # image inputs by role; a role that is not there reads the policy's
Value = TypeVar("Value")

# ---------------------------------------------------------------------------------------------------------------------
# The order of answers
# ---------------------------------------------------------------------------------------------------------------------


def prompt_by_prompt(prompts: int, answers: int) -> list[tuple[int, int]]:
    """(prompt, answer) of every row: all answers to the first prompt, then all to the second.

    The order where the answers to a prompt share its row.
    """
    return [(b, k) for b in range(prompts) for k in range(answers)]


def round_by_round(prompts: int, answers: int) -> list[tuple[int, int]]:
    """(prompt, answer) of every row: the first answer to each prompt, then the second to each.

    The order where every answer has a row of its own (--share_prefix False): the image inputs of a batch can be
    repeated as a whole, but not taken apart by prompt, which only their family could do.
    `VLPPODataCollator.pack` lays out rows in the same order.
    """
    return [(b, k) for k in range(answers) for b in range(prompts)]


# ---------------------------------------------------------------------------------------------------------------------
# The types
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """B prompts, their images encoded.

    Attributes:
        rows: (B,) of the dataset.
        tokens: (B,) token ids.
        img_inputs: of the collator, not encoded.
        images: features, or pixels while the vision side trains; for the policy and for every role with a vision side
            of its own.
        places: (B,) place of each prompt among those of the update, over all devices.
    """

    rows: list[Row]
    tokens: list[list[int]]
    img_inputs: ImageInputs
    images: Images
    places: list[int]


@dataclass(frozen=True)
class Sampled:
    """Prompts with R answers, laid out once for all passes.

    Attributes:
        rows, places: (B,), see Prompts.
        images: see Prompts; repeated K times where every answer has a row of its own.
        order: (R,) prompt and number of each answer, see above.
        texts: (R,).
        ended: (R,) bool, whether the answer has an end token.
        batch: of `VLPPODataCollator.pack`, on the device.
        sampler_logps: (R, T) log-probs under the inference server that sampled; None if the policy itself did, or the server gives none.
    """

    rows: list[Row]
    places: list[int]
    images: Images
    order: list[tuple[int, int]]
    texts: list[str]
    ended: Tensor
    batch: ResponseBatch
    sampler_logps: Tensor | None

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        answers: Answers,
        collator: VLPPODataCollator,
        end_ids: Sequence[int],
        device: torch.device,
        sampler_logps: AnswerLogps | None = None,
    ) -> Self:
        """Lay out prompts and answers."""
        B, K = len(answers), len(answers[0])
        images = prompts.images
        if collator.share_prefix:
            order = prompt_by_prompt(B, K)
        else:
            order = round_by_round(B, K)
            images = {role: join_image_inputs([inputs] * K) for role, inputs in images.items()}
        in_order = [answers[b][k] for b, k in order]
        batch = to_device(collator.pack(prompts.tokens, answers, collator.per_token(prompts.img_inputs)), device)
        logps = None
        if sampler_logps is not None:
            flat = [logp for b, k in order for logp in sampler_logps[b][k]]
            logps = torch.zeros(batch["completion_mask"].shape, device=device)
            logps[batch["completion_mask"]] = torch.tensor(flat, device=device)
        return cls(
            rows=prompts.rows,
            places=prompts.places,
            images=images,
            order=order,
            texts=[collator.processor.decode_response(ids) for ids in in_order],
            ended=torch.tensor([ids[-1] in end_ids for ids in in_order], device=device),
            batch=batch,
            sampler_logps=logps,
        )

    @property
    def mask(self) -> Tensor:
        """(R, T) bool, True on answer tokens up to and with the end token."""
        return self.batch["completion_mask"]

    @property
    def prompt_of(self) -> list[int]:
        """(R,) the prompt of each answer. `places` of it names the answers to one prompt over all devices."""
        return [b for b, _ in self.order]

    @property
    def groups(self) -> Tensor:
        """(R,) long, equal for answers to one prompt and for no others, over all devices."""
        return torch.tensor([self.places[b] for b in self.prompt_of], device=self.mask.device)

    def by_prompt(self, values: Sequence[Value]) -> list[list[Value]]:
        """(R,) -> [prompt][answer]."""
        found = dict(zip(self.order, values, strict=True))
        return [[found[b, k] for k in range(len(self.order) // len(self.rows))] for b in range(len(self.rows))]

    def where(self, r: int) -> str:
        """How a message names answer r."""
        row = self.rows[self.order[r][0]]
        return f"{row.get('where') or 'a row'} (answer {self.texts[r][:80]!r})"


@dataclass(frozen=True)
class Scored(Sampled):
    """Answers with what they are worth.

    Attributes:
        parts: (R,) of each reward, by its name.
        scores: (R,) their weighted sum, after penalty and clip.
    """

    parts: dict[str, Tensor]
    scores: Tensor


@dataclass(frozen=True)
class Evaluated(Scored):
    """Answers with what policy, reference and value function said of every token at sampling time, (R, T) each; None where nothing reads it.

    Attributes:
        logps, ref_logps: log-probs at the sampling temperature.
        values: value of the state before each token.
        entropy: of the policy's next-token distributions.
    """

    logps: Tensor | None
    ref_logps: Tensor | None
    values: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True)
class Advantages(Evaluated):
    """Answers that the optimiser can learn from.

    Attributes:
        advantages, returns: (R, T); returns are what a value function learns.
        loss_mask: (R, T) bool, tokens that enter the policy's loss.
        counted: (R,) bool, answers that enter its mean.
    """

    advantages: Tensor
    returns: Tensor | None
    loss_mask: Tensor
    counted: Tensor
