"""Command A Vision: SigLIP tiles, Cohere 2 decoder. https://huggingface.co/CohereLabs/command-a-vision-07-2025"""

from transformers import Cohere2VisionForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Cohere2VisionForRL(VLModelMixin, Cohere2VisionForConditionalGeneration):
    """Command A Vision with the project's model methods."""


class Cohere2VisionProcessor(VLProcessor):
    """Cohere's turns; an answer ends in `<|END_RESPONSE|>`."""


core_mapper = ModelCoreMapper(model=Cohere2VisionForRL, processor=Cohere2VisionProcessor)
