"""Mistral Small 3.1 and 3.2: Pixtral tower with patches merged two by two. https://mistral.ai/news/mistral-small-3-1"""

from typing import Any

from PIL import Image
from transformers import Mistral3ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Mistral3ForRL(VLModelMixin, Mistral3ForConditionalGeneration):
    """Mistral Small 3 with the project's model methods."""


class Mistral3Processor(VLProcessor):
    """`[INST]question[IMG][/INST]answer</s>`; an image stays at its place in the message."""

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Enlarge pictures of one merged patch to two by two: transformers squeezes away the axis of a lone feature."""
        patch = self.processor.patch_size * self.processor.spatial_merge_size
        images = [[i if max(i.size) > patch else i.resize((2 * patch, 2 * patch)) for i in row] for row in images]
        return super().call_native(texts, images)


core_mapper = ModelCoreMapper(model=Mistral3ForRL, processor=Mistral3Processor)
