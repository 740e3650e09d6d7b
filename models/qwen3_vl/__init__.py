"""Qwen3-VL: tower features also enter the first decoder layers (deepstack). https://arxiv.org/abs/2511.21631"""

from transformers import Qwen3VLForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.qwen2_vl import MRopeMixin


class Qwen3VLForRL(MRopeMixin, VLModelMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with the project's model methods."""

    projector_in_tower = ["merger", "deepstack_merger_list"]


class Qwen3VLProcessor(VLProcessor):
    """ChatML without a default system message."""

    video_sampling = {"fps": 2}  # of transformers' class, between 4 and 768 frames


core_mapper = ModelCoreMapper(model=Qwen3VLForRL, processor=Qwen3VLProcessor)
