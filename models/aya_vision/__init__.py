"""Aya Vision: SigLIP tiles, Cohere 2 decoder. https://arxiv.org/abs/2505.08751"""

from transformers import AyaVisionForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class AyaVisionForRL(VLModelMixin, AyaVisionForConditionalGeneration):
    """Aya Vision with the project's model methods."""


class AyaVisionProcessor(VLProcessor):
    """Cohere's turns; an answer ends in `<|END_RESPONSE|>`."""


core_mapper = ModelCoreMapper(model=AyaVisionForRL, processor=AyaVisionProcessor)
