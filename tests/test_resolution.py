"""--max_pixels and --min_pixels: tokens of a picture by hand in every family that has them, saved with the processor."""

import math
from pathlib import Path

import pytest
from PIL import Image

import train_sft
from base.model import VLModelMixin
from common.errors import InputError
from models import core_mapper_for
from tests import zoo

PICTURE = Image.new("RGB", (56, 56), "teal")  # of the tiny models' 7-pixel patches, 8 x 8


def tokens(family: str, folder: str | None = None, picture: Image.Image = PICTURE, **pixels: int) -> int:
    """Image tokens of one picture; marks around and between tiles do not count."""
    path = folder or zoo.checkpoint(family)
    processor = core_mapper_for(path).processor(path, **pixels)
    processor.infer()
    (ids,) = processor(convs=[[{"role": "user", "content": "What?"}]], images=[[picture]])["input_ids"].tolist()
    (empty,) = processor(convs=[[{"role": "user", "content": "What?"}]])["input_ids"].tolist()
    return len(ids) - len(empty)


# 14 x 14 pixels are a token of the tiny Qwen and GLM: 196
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v"])
def test_families_that_resize(family: str):
    around = tokens(family, max_pixels=196) - 1  # marks before and behind
    for pixels in (196 * 4, 196 * 9, 196 * 16):
        assert tokens(family, max_pixels=pixels) - around == pixels // 196
    # A picture of 2 tokens a side is enlarged to 3 a side at least
    small = PICTURE.resize((28, 28))
    assert tokens(family, picture=small, min_pixels=196 * 9, max_pixels=196 * 99) - around == 9


# A tile of the tiny models has 28 x 28 pixels; a picture of 2 x 2 tiles
@pytest.mark.parametrize("family", ["internvl", "aya_vision", "cohere2_vision", "ovis2"])
def test_families_with_tiles(family: str):
    one, four = tokens(family, max_pixels=784), tokens(family, max_pixels=4 * 784 + 5)
    path = zoo.checkpoint(family)
    image_processor = core_mapper_for(path).processor(path, max_pixels=4 * 784 + 5).processor.image_processor
    assert image_processor.max_patches == 4 and four > 3 * one


@pytest.mark.parametrize("family", ["idefics2", "idefics3", "smolvlm", "mistral3"])
def test_families_with_a_longest_side(family: str):
    assert tokens(family, max_pixels=28 * 28 + 3) <= tokens(family, max_pixels=56 * 56)
    path = zoo.checkpoint(family)
    image_processor = core_mapper_for(path).processor(path, max_pixels=60 * 60).processor.image_processor
    side = image_processor.size.longest_edge
    assert side == (56 if family in ("idefics3", "smolvlm") else 60) and side <= math.isqrt(60 * 60)


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "paligemma", "mllama"])
def test_families_without_it(family: str):
    with pytest.raises(InputError, match=r"--max_pixels has no part in \w+ImageProcessor"):
        tokens(family, max_pixels=1000)


@pytest.mark.parametrize(
    ("family", "pixels", "sentence"),
    [
        ("qwen2_vl", {"max_pixels": 100}, "--max_pixels 100 is less than a token of this model, which has 196"),
        ("qwen2_vl", {"min_pixels": 900, "max_pixels": 800}, "--min_pixels 900 is above --max_pixels 800"),
        ("internvl", {"max_pixels": 783}, "less than a tile of this model, which has 784"),
        ("internvl", {"min_pixels": 784}, "--min_pixels has no part in"),
        ("mistral3", {"max_pixels": 100}, "less than a picture of this model"),
    ],
)
def test_numbers_that_cannot_be(family: str, pixels: dict, sentence: str):
    with pytest.raises(InputError, match=sentence):
        tokens(family, **pixels)


def test_the_resolution_of_training_is_that_of_everything_after(command, tmp_path: Path, monkeypatch):
    """It is saved: evaluation, other libraries and a resumed run read it there."""
    model = zoo.checkpoint("qwen2_5_vl")
    assert tokens("qwen2_5_vl", max_pixels=784) < tokens("qwen2_5_vl")
    seen = []
    encode = VLModelMixin.encode_images
    monkeypatch.setattr(VLModelMixin, "encode_images", lambda self, images: seen.append(images) or encode(self, images))
    train_sft.main(command("sft", "--use_lora True --lora_r 4 --max_pixels 784", model=model))
    assert tokens("qwen2_5_vl", str(tmp_path / "sft")) == tokens("qwen2_5_vl", max_pixels=784)
    grids = [
        grid
        for images in seen
        if images.get("image_grid_thw") is not None
        for grid in images["image_grid_thw"].tolist()
    ]
    assert grids and all(t * h * w * 49 <= 784 for t, h, w in grids)


def test_a_family_whose_init_takes_the_path_alone():
    path = zoo.checkpoint("qwen2_vl")
    family = core_mapper_for(path).processor

    class Own(family):  # type: ignore[valid-type, misc]
        def __init__(self, model_name_or_path: str) -> None:
            super().__init__(model_name_or_path)

    assert Own(path, min_pixels=None, max_pixels=784).processor.image_processor.size.longest_edge == 784
