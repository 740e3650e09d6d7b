"""Qwen2-VL: native resolution, positions in three axes (M-RoPE). https://arxiv.org/abs/2409.12191"""

from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from base import packing
from base.model import VLModelMixin
from base.processor import VLProcessor
from common.tensors import to_device
from models.core_mapper import ModelCoreMapper


class MRopeMixin:
    """For families whose positions are (time, height, width) triples."""

    def packed_position_ids(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> torch.Tensor:
        """Positions (3, B, L): those of the model for the prompt; every response continues from the prompt's
        largest one."""
        prompt = segment_ids == 0
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        of_media = {name: img_inputs[name].cpu() for name in names if img_inputs.get(name) is not None}
        # The class reads token after token and image after image: on a device it would wait for each of them.
        of_token = torch.stack([input_ids, img_inputs["mm_token_type_ids"].long(), prompt.long()])  # (3, B, L)
        ids, kinds, in_prompt = of_token.cpu()
        positions, _ = self.model.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            attention_mask=in_prompt,
            **of_media,
        )
        positions = to_device(positions, input_ids.device)
        after_prompt = positions.amax(dim=(0, 2))[:, None] + 1  # (B, 1): an image spans fewer positions than tokens
        return torch.where(prompt, positions, after_prompt + packing.offset_in_segment(segment_ids))


class Qwen2VLForRL(MRopeMixin, VLModelMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with the project's model methods."""

    projector_in_tower = ["merger"]

    adapter_renames = {"visual.": "model.visual.", "model.": "model.language_model."}


class Qwen2VLProcessor(VLProcessor):
    """ChatML with a default system message; an image is `<|vision_start|><|image_pad|><|vision_end|>`."""

    video_sampling = {"fps": 2}  # FPS of qwen-vl-utils; the 4 to 768 frames are of transformers' class


core_mapper = ModelCoreMapper(model=Qwen2VLForRL, processor=Qwen2VLProcessor)
