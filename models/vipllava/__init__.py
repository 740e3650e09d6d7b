"""ViP-LLaVA: LLaVA that reads several layers of its tower. https://arxiv.org/abs/2312.00784"""

from transformers import VipLlavaForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class VipLlavaForRL(VLModelMixin, VipLlavaForConditionalGeneration):
    """ViP-LLaVA with the project's model methods."""


class VipLlavaProcessor(VLProcessor):
    """`###Human: <image>\\nquestion###Assistant: answer`."""


core_mapper = ModelCoreMapper(model=VipLlavaForRL, processor=VipLlavaProcessor)
