"""Idefics2: native resolution, a perceiver that gives 64 tokens per image (or per tile), Mistral decoder.
https://arxiv.org/abs/2405.02246
"""

from transformers import Idefics2ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Idefics2ForRL(VLModelMixin, Idefics2ForConditionalGeneration):
    """Idefics2 with the project's model methods."""


class Idefics2Processor(VLProcessor):
    """`User:<image>question<end_of_utterance>\\nAssistant: answer<end_of_utterance>`."""


core_mapper = ModelCoreMapper(model=Idefics2ForRL, processor=Idefics2Processor)
