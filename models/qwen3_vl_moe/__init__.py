"""Qwen3-VL's mixtures of experts. https://arxiv.org/abs/2511.21631"""

from transformers import Qwen3VLMoeForConditionalGeneration

from base.model import VLModelMixin
from models.core_mapper import ModelCoreMapper
from models.qwen2_vl import MRopeMixin
from models.qwen3_vl import Qwen3VLProcessor


class Qwen3VLMoeForRL(MRopeMixin, VLModelMixin, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL-MoE with the project's model methods."""

    projector_in_tower = ["merger", "deepstack_merger_list"]

    # The experts are single tensors, not linear layers: LoRA goes into the attention.
    default_lora_target = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Qwen3VLMoeProcessor(Qwen3VLProcessor):
    """As Qwen3-VL's."""


core_mapper = ModelCoreMapper(model=Qwen3VLMoeForRL, processor=Qwen3VLMoeProcessor)
