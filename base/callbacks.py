"""Small callbacks of the trainers."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from base.collator import VLDPODataCollatorWithPadding
from losses import update_running_mean


class RunningDelta(TrainerCallback, ExportableState):
    """The running mean reward of MPO, saved in trainer_state.json so that a resumed run continues with it."""

    def __init__(self, mean: float = 0.0, count: int = 0) -> None:
        self.mean, self.count = torch.tensor(float(mean)), torch.tensor(count)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": {"mean": self.mean.item(), "count": int(self.count)}, "attributes": {}}

    def with_rewards(self, rewards: Tensor, accelerator: Accelerator, keep: bool) -> Tensor:
        """The mean () over all training batches so far, with the rewards (N,) of this one, of all ranks.

        Args:
            keep: whether they count from now on, as those of evaluation do not.
        """
        sums = accelerator.reduce(torch.stack([rewards.sum(), rewards.new_tensor(rewards.numel())]), reduction="sum")
        mean, count = update_running_mean(self.mean, self.count, (sums[0] / sums[1]).expand(int(sums[1])).cpu())
        if keep:
            self.mean, self.count = mean, count
        return mean.to(rewards.device)


class SetEpoch(TrainerCallback):
    """Tells the collator the epoch, before the loader's workers start."""

    def __init__(self, collator: VLDPODataCollatorWithPadding) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the epoch on."""
        self.collator.epoch = int(state.epoch or 0)
