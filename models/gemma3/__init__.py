"""Gemma 3: every image is 256 tokens that see each other both ways; most layers see a sliding window only.
https://arxiv.org/abs/2503.19786
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
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
        """One mask per kind of layer. The window is measured in positions: in a packed row they differ from the
        columns."""
        image = input_ids == self.config.image_token_id  # (B, L)
        first = image & ~torch.nn.functional.pad(image, (1, -1))
        number = first.cumsum(dim=1) * image  # (B, L): which image a token belongs to, 0 for text
        same_image = (image[:, :, None] & (number[:, :, None] == number[:, None, :]))[:, None]  # (B, 1, L, L)
        position = packing.packed_positions(segment_ids)
        distance = (position[:, :, None] - position[:, None, :])[:, None]
        causal = packing.packed_mask(segment_ids)
        window = distance < self.config.text_config.sliding_window
        return {"full_attention": causal | same_image, "sliding_attention": (causal & window) | same_image}

    def packed_inputs(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any], packed: bool = True
    ) -> dict[str, Any]:
        inputs = super().packed_inputs(input_ids, segment_ids, img_inputs, packed)
        if packed:
            inputs.pop("token_type_ids", None)  # the masks say it
        return inputs


class Gemma3Processor(VLProcessor):
    """`<start_of_turn>user\\n<start_of_image>question<end_of_turn>\\n<start_of_turn>model\\n`."""


core_mapper = ModelCoreMapper(model=Gemma3ForRL, processor=Gemma3Processor)
