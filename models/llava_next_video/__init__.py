"""LLaVA-NeXT-Video, on images: LLaVA-NeXT trained on videos as well. https://llava-vl.github.io/blog/2024-04-30-llava-next-video/"""

from transformers import LlavaNextVideoForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class LlavaNextVideoForRL(VLModelMixin, LlavaNextVideoForConditionalGeneration):
    """LLaVA-NeXT-Video with the project's model methods."""


class LlavaNextVideoProcessor(VLProcessor):
    """`USER: <image>\\nquestion ASSISTANT: answer</s>`."""


core_mapper = ModelCoreMapper(model=LlavaNextVideoForRL, processor=LlavaNextVideoProcessor)
