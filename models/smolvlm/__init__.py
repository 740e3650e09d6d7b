"""SmolVLM and SmolVLM2: Idefics3's design at 256 M to 2.2 B parameters. https://arxiv.org/abs/2504.05299"""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from base.videos import Clip
from common.errors import InputError
from models.core_mapper import ModelCoreMapper


class SmolVLMForRL(VLModelMixin, SmolVLMForConditionalGeneration):
    """SmolVLM with the project's model methods."""


class SmolVLMProcessor(VLProcessor):
    """As Idefics3's, behind `<|im_start|>`."""

    video_sampling = {"num_frames": 64, "fps": 1}  # of SmolVLM2: a frame a second, 64 at most

    def call_native(
        self, texts: list[str], images: list[list[Image.Image]], clips: Sequence[Clip] = ()
    ) -> dict[str, Any]:
        """Refuse pictures beside a video: the native processor would keep the pixels of one of them."""
        if clips and any(images):
            raise InputError(
                "SmolVLM's processor takes either pictures or videos in a conversation: leave one of them out."
            )
        return super().call_native(texts, images, *([clips] if clips else []))


core_mapper = ModelCoreMapper(model=SmolVLMForRL, processor=SmolVLMProcessor)
