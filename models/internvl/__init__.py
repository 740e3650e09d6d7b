"""InternVL3 and 3.5 in the transformers layout (checkpoints named -hf). https://arxiv.org/abs/2504.10479"""

from transformers import InternVLForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class InternVLForRL(VLModelMixin, InternVLForConditionalGeneration):
    """InternVL with the project's model methods."""


class InternVLProcessor(VLProcessor):
    """ChatML; an image is `<IMG_CONTEXT>` in the text, 256 tokens per tile between <img> and </img> for the model."""

    video_sampling = {"num_frames": 8}  # of the examples in its card and in transformers' docs


core_mapper = ModelCoreMapper(model=InternVLForRL, processor=InternVLProcessor)
