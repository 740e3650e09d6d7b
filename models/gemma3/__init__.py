"""Gemma 3: every image is 256 tokens that see each other both ways; most layers see a sliding window only.
https://arxiv.org/abs/2503.19786
"""

from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration

from base import packing
from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Gemma3ForRL(VLModelMixin, Gemma3ForConditionalGeneration):
    """Gemma 3 with the project's model methods."""

    def packed_attention_mask(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The masks of both kinds of layers; the tokens of an image see each other."""
        same_image = packing.same_span(input_ids == self.config.image_token_id)
        masks = super().packed_attention_mask(input_ids, segment_ids, img_inputs)
        return {kind: mask | same_image for kind, mask in masks.items()}


class Gemma3Processor(VLProcessor):
    """`<start_of_turn>user\\n<start_of_image>question<end_of_turn>\\n<start_of_turn>model\\n`."""


core_mapper = ModelCoreMapper(model=Gemma3ForRL, processor=Gemma3Processor)
