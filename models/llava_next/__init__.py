"""LLaVA-NeXT (1.6): a base view and up to four high-resolution tiles per image.
https://llava-vl.github.io/blog/2024-01-30-llava-next/"""

from transformers import LlavaNextForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class LlavaNextForRL(VLModelMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with the project's model methods."""


class LlavaNextProcessor(VLProcessor):
    """The checkpoint's template: `[INST] <image>\\nquestion [/INST]` for Mistral decoders, other formats for other
    decoders."""


core_mapper = ModelCoreMapper(model=LlavaNextForRL, processor=LlavaNextProcessor)
