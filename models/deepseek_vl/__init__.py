"""DeepSeek-VL: SigLIP tower, Llama-shaped decoder. https://arxiv.org/abs/2403.05525"""

from transformers import DeepseekVLForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class DeepseekVLForRL(VLModelMixin, DeepseekVLForConditionalGeneration):
    """DeepSeek-VL with the project's model methods."""


class DeepseekVLProcessor(VLProcessor):
    """`User: <image_placeholder>question\\n\\nAssistant: answer` behind a system sentence."""


core_mapper = ModelCoreMapper(model=DeepseekVLForRL, processor=DeepseekVLProcessor)
