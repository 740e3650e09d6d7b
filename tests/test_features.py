"""base/features.py: what stands for images is joined image after image."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from base.features import join_image_inputs


@dataclass
class Features(ModelOutput):
    pooler_output: list | None = None
    deepstack_features: list | None = None


def test_features_of_layers_are_joined_image_after_image():
    """Two batches of two images and of one, two layers: a layer holds one tensor per image, as Qwen3-VL's do."""

    def batch(*names: int) -> dict:
        images = [torch.full((name + 1, 2), float(name)) for name in names]
        layers = [[image + 10 * layer for image in images] for layer in (1, 2)]
        return {"mm_encoder_outputs": {"image": Features(pooler_output=images, deepstack_features=layers)}}

    joined = join_image_inputs([batch(0, 1), batch(2)])["mm_encoder_outputs"]["image"]
    assert [image[0, 0].item() for image in joined["pooler_output"]] == [0, 1, 2]
    assert [[image[0, 0].item() for image in layer] for layer in joined["deepstack_features"]] == [
        [10, 11, 12],
        [20, 21, 22],
    ]
