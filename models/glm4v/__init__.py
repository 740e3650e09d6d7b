"""GLM-4.1V: a reasoning model with Qwen2-VL's positions. https://arxiv.org/abs/2507.01006"""

from transformers import Glm4vForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.qwen2_vl import MRopeMixin


class Glm4vForRL(MRopeMixin, VLModelMixin, Glm4vForConditionalGeneration):
    """GLM-4.1V with the project's model methods."""

    projector_in_tower = ["merger"]

    # gate and up projection are one layer
    default_lora_target = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


class Glm4vProcessor(VLProcessor):
    """`[gMASK]<sop><|user|>\\n...<|assistant|>\\n`; an answer ends where the next turn begins, in `<|user|>`."""


core_mapper = ModelCoreMapper(model=Glm4vForRL, processor=Glm4vProcessor)
