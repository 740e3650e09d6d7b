"""LFM2-VL: short convolutions between few attention layers. https://arxiv.org/abs/2511.23404"""

from typing import Any

from PIL import Image
from transformers import Lfm2VlForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from common.errors import InputError
from models.core_mapper import ModelCoreMapper


class Lfm2VlForRL(VLModelMixin, Lfm2VlForConditionalGeneration):
    """LFM2-VL with the project's model methods."""

    packs = False  # convolutions read a row from left to right, whatever the mask says
    default_lora_target = ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]


class Lfm2VlProcessor(VLProcessor):
    """BOS, then ChatML."""

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Refuse very narrow pictures: the native processor gives them a mask for fewer patches than they have."""
        encoded = super().call_native(texts, images)
        if (
            "spatial_shapes" in encoded
            and encoded["spatial_shapes"].prod(1).max() > encoded["pixel_attention_mask"].shape[1]
        ):
            narrow = max((i.size for row in images for i in row), key=lambda size: max(size) / min(size))
            raise InputError(f"An image of {narrow[0]} x {narrow[1]} pixels is too narrow: crop it or drop the row.")
        return encoded


core_mapper = ModelCoreMapper(model=Lfm2VlForRL, processor=Lfm2VlProcessor)
