"""Small callbacks of the trainers."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from base.collator import VLDPODataCollatorWithPadding


class RunningDelta(TrainerCallback, ExportableState):
    """The running mean reward of MPO, saved in trainer_state.json so that a resumed run continues with it."""

    def __init__(self, mean: float = 0.0, count: int = 0) -> None:
        self.mean, self.count = torch.tensor(float(mean)), torch.tensor(count)

    def state(self) -> dict[str, Any]:
        return {"args": {"mean": self.mean.item(), "count": int(self.count)}, "attributes": {}}


class SetEpoch(TrainerCallback):
    """Tells the collator the epoch, before the loader's workers start."""

    def __init__(self, collator: VLDPODataCollatorWithPadding) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.epoch = int(state.epoch or 0)
