"""Llama 3.2 Vision: images enter through cross-attention layers, a prompt holds one token per image.
https://arxiv.org/abs/2407.21783, section 7
"""

from typing import Any

import torch
from PIL import Image
from transformers import MllamaConfig, MllamaForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper

TOWER_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class MllamaForRL(VLModelMixin, MllamaForConditionalGeneration):
    """Llama 3.2 Vision with the project's model methods."""

    end_to_end = False  # a row reads the states of its images
    static_rollout_cache = False  # it has no room for the image's keys

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config)
        # Two corrections to transformers' forward, which mixes images up when rows hold different numbers of them.
        self.model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, self.encode_images(kwargs)), with_kwargs=True
        )
        self.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, self.hide_absent_images(kwargs)), with_kwargs=True
        )

    def vision_layers(self) -> list[torch.nn.Module]:
        """The tower has two stacks; the first one's hidden states are read, too."""
        tower = self.get_vision_tower()
        return [*tower.transformer.layers, *tower.global_transformer.layers]

    def encode_images(self, img_inputs: dict[str, Any]) -> dict[str, Any]:
        """Pixels -> `cross_attention_states`, zero for rows without images.

        A row whose mask hides every tile attends to all tiles. Zero states have the effect of no image: in a batch
        without images such a row skips the cross-attention layers.
        """
        if img_inputs.get("pixel_values") is None:
            return dict(img_inputs)
        states = self.model.vision_model(**{name: img_inputs[name] for name in TOWER_INPUTS}).last_hidden_state
        states = self.model.multi_modal_projector(states)  # (B, images, tiles, tokens, D)
        text_only = ~img_inputs["cross_attention_mask"].flatten(1).any(dim=1)  # (B,)
        states = states.masked_fill(text_only.view(-1, 1, 1, 1, 1), 0)
        rest = {name: value for name, value in img_inputs.items() if name not in TOWER_INPUTS}
        return {**rest, "cross_attention_states": states.flatten(1, 3)}

    def hide_absent_images(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Limit tokens before the first image, which attend to all tiles, to the tiles of their row's images."""
        mask, sees_image = kwargs.get("cross_attention_mask"), kwargs.get("full_text_row_masked_out_mask")
        if mask is None:
            return kwargs
        tokens = self.config.vision_config.max_num_tiles * self.model.vision_model.num_patches  # of one image
        visible = (mask == 0) & (sees_image == 1)  # (B, 1, L, images * tokens)
        own = visible.unflatten(-1, (-1, tokens)).any(-1).any(2, keepdim=True).repeat_interleave(tokens, dim=-1)
        absent = (sees_image == 0) & ~own & own.any(-1, keepdim=True)
        return kwargs | {"cross_attention_mask": mask.masked_fill(absent, torch.finfo(mask.dtype).min)}

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, use_cache: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The states are in the cache after the first step; given again, they would be appended to it."""
        inputs = super().prepare_inputs_for_generation(
            *args, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if use_cache and not is_first_iteration:
            inputs.pop("cross_attention_states", None)
        return inputs


class MllamaProcessor(VLProcessor):
    """Llama 3 headers; `<|image|>` stays one token. A system message beside an image is refused by the template."""

    per_token_keys = {"cross_attention_mask": None}  # (images, tiles) of each token

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Rows with images first: the native processor needs one at the start and drops text-only rows at the end."""
        order = sorted(range(len(texts)), key=lambda row: not images[row])
        encoded = super().call_native([texts[row] for row in order], [images[row] for row in order])
        for name, of_no_image in (("aspect_ratio_ids", 0), ("aspect_ratio_mask", 1)):
            if name in encoded:
                dropped = len(texts) - len(encoded[name])
                encoded[name] = torch.nn.functional.pad(
                    encoded[name], (0, 0) * (encoded[name].ndim - 1) + (0, dropped), value=of_no_image
                )
        back = torch.tensor(order).argsort()
        return {name: value[back] for name, value in encoded.items()}


core_mapper = ModelCoreMapper(model=MllamaForRL, processor=MllamaProcessor)
