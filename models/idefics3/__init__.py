"""Idefics3: SigLIP tower, pixel shuffle, Llama 3 decoder. https://arxiv.org/abs/2408.12637"""

from transformers import Idefics3ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Idefics3ForRL(VLModelMixin, Idefics3ForConditionalGeneration):
    """Idefics3 with the project's model methods."""


class Idefics3Processor(VLProcessor):
    """`User:<image>question<end_of_utterance>\\nAssistant: answer<end_of_utterance>`."""


core_mapper = ModelCoreMapper(model=Idefics3ForRL, processor=Idefics3Processor)
