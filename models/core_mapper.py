"""The twelve classes of a model family."""

from dataclasses import dataclass

from base.collator import (
    VLDPODataCollatorWithPadding,
    VLPPODataCollator,
    VLRMDataCollatorWithPadding,
    VLSFTDataCollatorWithPadding,
)
from base.model import VLModelMixin
from base.ppo_trainer import VLPPOTrainer
from base.processor import VLProcessor
from base.reward import VLRewardModel
from base.trainer import VLDPOTrainer, VLRMTrainer, VLSFTTrainer
from base.value import VLModelWithValueHead


@dataclass(frozen=True, kw_only=True)
class ModelCoreMapper:
    """What a family's folder exports. `model` and `processor` are required; the rest defaults to the base classes."""

    model: type[VLModelMixin]
    processor: type[VLProcessor]
    dpo_collator: type = VLDPODataCollatorWithPadding
    dpo_trainer: type = VLDPOTrainer
    reward_model: type[VLRewardModel] = VLRewardModel
    value_model: type[VLModelWithValueHead] = VLModelWithValueHead
    reward_collator: type = VLRMDataCollatorWithPadding
    reward_trainer: type = VLRMTrainer
    sft_collator: type = VLSFTDataCollatorWithPadding
    sft_trainer: type = VLSFTTrainer
    ppo_collator: type = VLPPODataCollator
    ppo_trainer: type = VLPPOTrainer
