"""Small callbacks of the trainers."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from base.collator import VLDPODataCollatorWithPadding
from losses import update_running_mean


class RunningDelta(TrainerCallback, ExportableState):
    """The running mean reward of MPO, saved in trainer_state.json so that a resumed run continues with it."""

    def __init__(self, mean: float = 0.0, count: int = 0) -> None:
        self.mean, self.count = torch.tensor(float(mean)), torch.tensor(count)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": {"mean": self.mean.item(), "count": int(self.count)}, "attributes": {}}

    def with_rewards(self, rewards: Tensor, accelerator: Accelerator) -> Tensor:
        """The mean () over all training batches so far, with the rewards (N,) of this one, of all ranks. They count from now on."""
        sums = accelerator.reduce(torch.stack([rewards.sum(), rewards.new_tensor(rewards.numel())]), reduction="sum")
        count = int(sums[1])
        mean_here = sums[0] / max(count, 1)
        self.mean, self.count = update_running_mean(self.mean, self.count, mean_here.expand(count).cpu())
        return self.mean.to(rewards.device)


class SetEpoch(TrainerCallback):
    """Tells the collator the epoch, before the loader's workers start."""

    def __init__(self, collator: VLDPODataCollatorWithPadding) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the epoch on."""
        self.collator.epoch = int(state.epoch or 0)


class EvaluateAtEnd(TrainerCallback):
    """Evaluates after the last step, whatever --eval_strategy says of the steps before: rows that were held out are looked at."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for it. At the end of an epoch the strategy does."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True
