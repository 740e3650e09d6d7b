"""Qwen3.5: three layers of linear attention to one of full attention. https://qwen.ai/blog?id=qwen3.5"""

from transformers import Qwen3_5ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.qwen2_vl import MRopeMixin


class Qwen3_5ForRL(MRopeMixin, VLModelMixin, Qwen3_5ForConditionalGeneration):
    """Qwen3.5 with the project's model methods."""

    projector_in_tower = ["merger"]

    packs = False  # linear attention reads a row from left to right, whatever the mask says
    default_lora_target = [
        *["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        *["in_proj_qkv", "in_proj_z", "out_proj"],
    ]


class Qwen3_5Processor(VLProcessor):
    """ChatML; an answer follows an empty thinking block."""


core_mapper = ModelCoreMapper(model=Qwen3_5ForRL, processor=Qwen3_5Processor)
