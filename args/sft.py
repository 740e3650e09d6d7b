"""Flags of train_sft.py alone."""

from dataclasses import dataclass, field
from typing import ClassVar

from args.training import REFUSED, VLConfig
from common.errors import InputError


@dataclass
class SFTConfig(VLConfig):
    """Supervised fine-tuning on conversations: token-mean cross-entropy of the assistant's turns."""

    title: ClassVar[str] = "Supervised fine-tuning"
    refused: ClassVar[dict[str, str]] = REFUSED
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put conversations together up to --max_length tokens; --per_device_train_batch_size then counts such bins. For "
            "conversations much shorter than what a GPU takes, or of very different lengths: steps become fewer and equally large."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing and self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise InputError(
                f"--packing fills all batches alike: leave --train_sampling_strategy {self.train_sampling_strategy} out."
            )
