"""LLaVA-OneVision: SigLIP tower, Qwen2 decoder; one image gets tiles, several in one prompt get a base view each.
https://arxiv.org/abs/2408.03326
"""

from transformers import LlavaOnevisionForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.frames import VideosOfAnyLength


class LlavaOnevisionForRL(VideosOfAnyLength, VLModelMixin, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with the project's model methods."""


class LlavaOnevisionProcessor(VLProcessor):
    """ChatML: `<|im_start|>user <image>\\nquestion<|im_end|><|im_start|>assistant\\n`."""

    video_sampling = {"num_frames": 32}  # as the model was trained: frames_upbound of LLaVA-NeXT's scripts


core_mapper = ModelCoreMapper(model=LlavaOnevisionForRL, processor=LlavaOnevisionProcessor)
