"""Flags of train_rm.py alone."""

from dataclasses import dataclass, field
from typing import ClassVar

from args.training import REFUSED, REFUSED_IN_COMPARISONS, VLConfig

REFUSED_IN_RM: dict[str, str] = {"num_sample_generations": "does nothing here: a reward model writes no answers"}


@dataclass
class RMConfig(VLConfig):
    """Reward model: a scalar head trained to rank responses (Bradley-Terry)."""

    title: ClassVar[str] = "Reward model"
    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_COMPARISONS | REFUSED_IN_RM
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate; with LoRA 10 times this is usual."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Pull the rewards of a pair towards mean 0 (2312.09244 eq. 2); 0.01 is usual. PPO likes it."},
    )
