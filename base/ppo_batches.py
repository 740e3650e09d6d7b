"""How many prompts and answers an update of PPO has, and in which order they come."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from args import PPOConfig
from common.errors import InputError
from common.seeds import stable_seed


@dataclass(frozen=True)
class BatchSizes:
    """The batch vocabulary of one run, divided exactly. base/ppo_trainer.py says what the names mean."""

    micro_prompts: int  # prompts of a micro batch, on one device
    micro_batches: int  # of an update, on one device
    mini_batches: int  # of an update
    update_prompts: int  # of an update, on all devices
    update_rollouts: int

    @classmethod
    def of(cls, args: PPOConfig) -> "BatchSizes":
        """The sizes that the flags name.

        Raises:
            InputError: the answers to a prompt do not fit into one micro batch.
        """
        micro, K = args.per_device_train_batch_size, args.rollouts_per_prompt
        if micro % K:
            raise InputError(
                f"--per_device_train_batch_size {micro} counts rollouts and must be a multiple of "
                f"--rollouts_per_prompt {K}."
            )
        micro_batches = args.gradient_accumulation_steps * args.num_mini_batches
        rollouts = micro * micro_batches * args.world_size
        return cls(micro // K, micro_batches, args.num_mini_batches, rollouts // K, rollouts)


class PromptBatches:
    """Which prompts each micro batch of one device holds, epoch by epoch: a function of seed, epoch and update only.

    Each epoch is a new permutation of the data (or takes it in order); its last update is filled up from its beginning.
    """

    def __init__(self, num_prompts: int, sizes: BatchSizes, rank: int, seed: int, in_order: bool = False) -> None:
        self.num_prompts, self.sizes, self.rank, self.seed, self.in_order = num_prompts, sizes, rank, seed, in_order
        self.epoch = self.first_update = 0

    @property
    def updates(self) -> int:
        """Updates per epoch."""
        return math.ceil(self.num_prompts / self.sizes.update_prompts)

    def __len__(self) -> int:
        return self.updates * self.sizes.micro_batches

    def _order(self) -> Sequence[int]:
        if self.in_order:
            return range(self.num_prompts)
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "prompts", self.epoch))
        return torch.randperm(self.num_prompts, generator=generator).tolist()

    def by_place(self, step: int) -> Callable[[int], int]:
        """Place -> index of a prompt in update `step` of the whole run.

        After the update's own places come prompts that it does not take, in an order of their own, again and again; all
        of them if it takes all.
        """
        self.epoch, update = divmod(step, self.updates)
        order, size = self._order(), self.sizes.update_prompts
        own = [order[i % self.num_prompts] for i in range(update * size, (update + 1) * size)]
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "other prompts", step))
        mixed = torch.randperm(self.num_prompts, generator=generator).tolist()
        taken = set(own)
        others = [i for i in mixed if i not in taken] or mixed
        return lambda place: own[place] if place < size else others[(place - size) % len(others)]

    def __iter__(self) -> Iterator[list[int]]:
        order, sizes = self._order(), self.sizes
        local = sizes.micro_prompts * sizes.micro_batches
        for update in range(self.first_update, self.updates):
            start = update * sizes.update_prompts + self.rank * local
            for m in range(start, start + local, sizes.micro_prompts):
                yield [order[i % self.num_prompts] for i in range(m, m + sizes.micro_prompts)]


def mini_batches(sizes: BatchSizes, rank: int, seed: int, update: int, ppo_epoch: int) -> list[list[int]]:
    """Which micro batches of this device make up each mini batch: one of each block of num_mini_batches, at random."""
    M = sizes.mini_batches
    blocks = sizes.micro_batches // M
    parts: list[list[int]] = [[] for _ in range(M)]
    for block in range(blocks):
        generator = torch.Generator().manual_seed(stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block))
        for part, place in enumerate(torch.randperm(M, generator=generator).tolist()):
            parts[part].append(block * M + place)
    return parts
