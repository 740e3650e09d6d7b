"""SmolVLM and SmolVLM2: Idefics3's design at 256 M to 2.2 B parameters. https://arxiv.org/abs/2504.05299"""

from transformers import SmolVLMForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class SmolVLMForRL(VLModelMixin, SmolVLMForConditionalGeneration):
    """SmolVLM with the project's model methods."""


class SmolVLMProcessor(VLProcessor):
    """As Idefics3's, behind `<|im_start|>`."""


core_mapper = ModelCoreMapper(model=SmolVLMForRL, processor=SmolVLMProcessor)
