"""Reward models: any family's backbone with a scalar head.

rewards = VLRewardModel.from_pretrained("runs/rm")(**inputs, completion_index=batch["last_tokens"])  # (R,)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from base.collator import VLRMDataCollatorWithPadding
from base.features import has_images
from base.heads import REWARD_HEAD, HeadModel, freeze_lm_head
from base.loading import core_mapper_for
from base.processor import VLProcessor
from common.errors import InputError
from common.tensors import to_device

Row = dict[str, Any]


class VLRewardModel(HeadModel):
    """Any backbone with a linear head on the hidden state of each response's last real token."""

    head_name = REWARD_HEAD

    def __init__(self, backbone: nn.Module, head: nn.Linear | None = None) -> None:
        super().__init__(backbone, head)
        freeze_lm_head(self.core)

    def forward(self, completion_index: Tensor, **inputs: Any) -> Tensor:
        """Rewards (N,) float32 at flat positions b * L + t.

        Args:
            completion_index: (N,), `last_tokens` of the batch.
            inputs: what `packed_inputs` of the backbone returns.
        """
        return self.apply_head(self.head, self.backbone(**inputs, completion_index=completion_index).hidden)


@torch.no_grad()
def score_rows(
    model: VLRewardModel,
    processor: VLProcessor,
    rows: Sequence[Row],
    batch_size: int = 8,
    share_prefix: bool = True,
    dummy_images: dict[str, Any] | None = None,
) -> list[list[float]]:
    """Reward of every response of preference rows.

    Args:
        model, processor: of one checkpoint.
        rows: columns `images`, `prompt`, `responses`, and for sampled answers `responses_ended`: for each of them
            whether an end token was sampled. None is put behind the others, which would count as finished.
        dummy_images: of VLProcessor, under ZeRO-3: what the vision tower runs on where a batch has no image.

    Returns:
        For each row one number per response, in order.
    """
    try:
        collator_class = core_mapper_for(model.core.config.name_or_path).reward_collator
    except InputError:
        collator_class = VLRMDataCollatorWithPadding
    collator = collator_class(processor, share_prefix=share_prefix)
    model.eval()
    scores: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = collator.responses_only(chunk)
        image_inputs = model.core.encode_images(to_device(batch["img_input_dict"], model.device))
        if dummy_images is not None and not has_images(batch["img_input_dict"]):
            model.core.encode_images(to_device(dummy_images, model.device))
        ids, segments, last = (to_device(batch[k], model.device) for k in ("input_ids", "segment_ids", "last_tokens"))
        inputs = model.core.packed_inputs(ids, segments, image_inputs, batch["packed"], batch["layout"])
        rewards = iter(model(**inputs, completion_index=last).tolist())
        scores += [[next(rewards) for _ in row["responses"]] for row in chunk]
    return scores
