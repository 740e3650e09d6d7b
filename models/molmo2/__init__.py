"""Molmo2, on images: crops pooled by attention, added to the embeddings of their tokens. https://arxiv.org/abs/2601.10611"""

from typing import Any

import torch
from transformers import Molmo2ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Molmo2ForRL(VLModelMixin, Molmo2ForConditionalGeneration):
    """Molmo2 with the project's model methods."""

    def packed_attention_mask(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> torch.Tensor:
        """All image tokens of a row see each other."""
        of_image = img_inputs["mm_token_type_ids"] == 1  # (B, L)
        mask = super().packed_attention_mask(input_ids, segment_ids, img_inputs)
        return mask | (of_image[:, None] & of_image[:, :, None])[:, None]


class Molmo2Processor(VLProcessor):
    """ChatML behind the images; they stand in front of the whole conversation, numbered if there are several."""


core_mapper = ModelCoreMapper(model=Molmo2ForRL, processor=Molmo2Processor)
