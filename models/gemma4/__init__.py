"""Gemma 4: images of any shape and 70 to 1,120 tokens; layers with a sliding window see an image both ways.
https://ai.google.dev/gemma"""

from typing import Any

import torch
from transformers import Gemma4ForConditionalGeneration

from base import packing
from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Gemma4ForRL(VLModelMixin, Gemma4ForConditionalGeneration):
    """Gemma 4 with the project's model methods."""

    def packed_attention_mask(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The masks of both kinds of layers; in the larger models the tokens of an image see each other in a window."""
        masks = super().packed_attention_mask(input_ids, segment_ids, img_inputs)
        text = self.config.get_text_config()
        if text.use_bidirectional_attention == "vision":
            position = packing.packed_positions(segment_ids)
            near = (position[:, :, None] - position[:, None, :] < text.sliding_window)[:, None]
            # A new tensor, not |=: in rows shorter than the window both kinds of layers have one and the same mask
            same_image = packing.same_span(input_ids == self.config.image_token_id) & near
            masks["sliding_attention"] = masks["sliding_attention"] | same_image
        return masks


class Gemma4Processor(VLProcessor):
    """`<|turn>user\\n<|image|>question<turn|>\\n<|turn>model\\n`, and an empty thinking block."""


core_mapper = ModelCoreMapper(model=Gemma4ForRL, processor=Gemma4Processor)
