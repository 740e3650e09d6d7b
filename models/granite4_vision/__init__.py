"""Granite 4 Vision: a window Q-Former between tower and decoder, features enter several decoder layers (deepstack).
https://huggingface.co/ibm-granite
"""

from typing import Any

import torch
from transformers import Granite4VisionForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Granite4VisionForRL(VLModelMixin, Granite4VisionForConditionalGeneration):
    """Granite 4 Vision with the project's model methods."""

    def vision_layers(self) -> list[torch.nn.Module]:
        """All: each projector reads a layer of its own, whatever `vision_feature_layer` says."""
        return [*self.get_vision_tower().encoder.layers]

    def last_hidden_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in the base class, divided by what the class divides its logits by."""
        return super().last_hidden_state(*args, **kwargs) / self.config.text_config.logits_scaling


class Granite4VisionProcessor(VLProcessor):
    """`<|start_of_role|>user<|end_of_role|><image>question<|end_of_text|>`."""


core_mapper = ModelCoreMapper(model=Granite4VisionForRL, processor=Granite4VisionProcessor)
