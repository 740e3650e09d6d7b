"""The parts of a PPO rollout that are no trainer: batch sizes, the order of prompts, sampling, and what one micro batch carries."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper, TrainingArguments

from common.errors import InputError
from common.seeds import stable_seed

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Batch sizes and order
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSizes:
    """The batch vocabulary of one run, divided exactly. See the head of this file."""

    micro_prompts: int  # prompts of a micro batch, on one device
    micro_batches: int  # of an update, on one device
    mini_batches: int  # of an update
    update_prompts: int  # of an update, on all devices
    update_rollouts: int

    @classmethod
    def of(cls, args: TrainingArguments) -> "BatchSizes":
        micro, K = args.per_device_train_batch_size, args.rollouts_per_prompt
        if micro % K:
            raise InputError(
                f"--per_device_train_batch_size {micro} counts rollouts and must be a multiple of --rollouts_per_prompt {K}."
            )
        micro_batches = args.gradient_accumulation_steps * args.num_mini_batches
        rollouts = micro * micro_batches * args.world_size
        return cls(micro // K, micro_batches, args.num_mini_batches, rollouts // K, rollouts)


class PromptBatches:
    """Which prompts each micro batch of one device holds, epoch by epoch: a function of seed, epoch and update only.

    Each epoch is a new permutation of the data; its last update is filled up from its beginning.
    """

    def __init__(self, num_prompts: int, sizes: BatchSizes, rank: int, seed: int) -> None:
        self.num_prompts, self.sizes, self.rank, self.seed = num_prompts, sizes, rank, seed
        self.epoch = self.first_update = 0

    @property
    def updates(self) -> int:
        """Updates per epoch."""
        return math.ceil(self.num_prompts / self.sizes.update_prompts)

    def __len__(self) -> int:
        return self.updates * self.sizes.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "prompts", self.epoch))
        order = torch.randperm(self.num_prompts, generator=generator).tolist()
        sizes = self.sizes
        local = sizes.micro_prompts * sizes.micro_batches
        for update in range(self.first_update, self.updates):
            start = update * sizes.update_prompts + self.rank * local
            for m in range(start, start + local, sizes.micro_prompts):
                yield [order[i % self.num_prompts] for i in range(m, m + sizes.micro_prompts)]


def mini_batches(sizes: BatchSizes, rank: int, seed: int, update: int, ppo_epoch: int) -> list[list[int]]:
    """Which micro batches of this device make up each mini batch: one out of each block of num_mini_batches, at random."""
    M = sizes.mini_batches
    blocks = sizes.micro_batches // M
    parts: list[list[int]] = [[] for _ in range(M)]
    for block in range(blocks):
        generator = torch.Generator().manual_seed(stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block))
        for part, place in enumerate(torch.randperm(M, generator=generator).tolist()):
            parts[part].append(block * M + place)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """One micro batch through an update: B prompts, R = B * K answers of at most T tokens.

    Order of the R answers: those of `batch` (prompt by prompt, or with --share_prefix False round by round); `prompt_of` says whose they are.
    """

    rows: list[Row]  # (B,) of the dataset
    prompts: list[list[int]]  # (B,) token ids
    img_inputs: dict[str, Any]
    images: dict[str, dict[str, Any]]  # what stands for the images, by hat; "" for all hats without own vision
    places: list[int]  # (B,) place of each prompt in the update, over all devices
    prompt_of: list[int] = field(default_factory=list)  # (R,)
    texts: list[str] = field(default_factory=list)  # (R,)
    ended: Tensor | None = None  # (R,) bool, whether the answer has an end token
    batch: dict[str, Any] = field(default_factory=dict)  # packed, on the device
    scores: Tensor | None = None  # (R,)
    parts: dict[str, Tensor] = field(default_factory=dict)  # (R,) of each reward
    logps: Tensor | None = None  # (R, T), at sampling time
    ref_logps: Tensor | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(R, T) bool, True on answer tokens up to and with the end token."""
        return self.batch["completion_mask"]

    def where(self, r: int) -> str:
        """How a message names answer r."""
        row = self.rows[self.prompt_of[r]]
        return f"{row.get('where') or 'a row'} (answer {self.texts[r][:80]!r})"


class SeededSampling(LogitsProcessor):
    """Sample by inverting the cumulative distribution at given uniform numbers; greedy decoding then takes the sampled token.

    One number per row and step, so that neither batch size, device count nor global random state changes what is sampled.
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> None:
        """
        Args:
            uniforms: (B, T) in [0, 1), for T steps.
        """
        self.uniforms, self.temperature = uniforms, temperature
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.first_length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.first_length is None:
            self.first_length = input_ids.shape[1]
        scores = scores.float() / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        cumulative = scores.softmax(-1).double().cumsum(-1)  # (B, V)
        target = self.uniforms[:, input_ids.shape[1] - self.first_length, None] * cumulative[:, -1:]
        token = (cumulative <= target).sum(-1, keepdim=True)  # a token of probability 0 is never hit
        return torch.full_like(scores, -math.inf).scatter(-1, token, 0.0)


def cut_after_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for n, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: n + 1])
    return list(ids)
