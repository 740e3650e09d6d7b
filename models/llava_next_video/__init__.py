"""LLaVA-NeXT-Video: LLaVA-NeXT trained on videos as well. https://llava-vl.github.io/blog/2024-04-30-llava-next-video/"""

from transformers import LlavaNextVideoForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.frames import VideosOfAnyLength


class LlavaNextVideoForRL(VideosOfAnyLength, VLModelMixin, LlavaNextVideoForConditionalGeneration):
    """LLaVA-NeXT-Video with the project's model methods."""


class LlavaNextVideoProcessor(VLProcessor):
    """`USER: <image>\\nquestion ASSISTANT: answer</s>`."""

    video_sampling = {"num_frames": 8}  # of the card's example; the 32 of its training take more than its 4,096 tokens


core_mapper = ModelCoreMapper(model=LlavaNextVideoForRL, processor=LlavaNextVideoProcessor)
