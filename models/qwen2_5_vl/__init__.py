"""Qwen2.5-VL: Qwen2-VL with window attention in the tower. https://arxiv.org/abs/2502.13923"""

from transformers import Qwen2_5_VLForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.qwen2_vl import MRopeMixin, Qwen2VLForRL


class Qwen2_5_VLForRL(MRopeMixin, VLModelMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with the project's model methods."""

    projector_in_tower = ["merger"]

    adapter_renames = Qwen2VLForRL.adapter_renames


class Qwen2_5_VLProcessor(VLProcessor):
    """ChatML with a default system message, as Qwen2-VL."""

    video_sampling = {"fps": 2}  # FPS of qwen-vl-utils; the 4 to 768 frames are of transformers' class


core_mapper = ModelCoreMapper(model=Qwen2_5_VLForRL, processor=Qwen2_5_VLProcessor)
