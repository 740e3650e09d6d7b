"""docs/CustomizedModel.md, followed to the letter: twelve classes, a collator that makes the pixels, one map line."""

import json
import sys
import types

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

import losses
import models
import train_dpo
import train_rm
import train_sft
from base.batch import DPOBatch, PPOBatch, ResponseBatch, RMBatch, SFTBatch
from base.collator import (
    VLDPODataCollatorWithPadding,
    VLPPODataCollator,
    VLRMDataCollatorWithPadding,
    VLSFTDataCollatorWithPadding,
)
from base.model import VLModelMixin
from base.ppo_trainer import VLPPOTrainer
from base.processor import VLProcessor
from base.reward import VLRewardModel
from base.trainer import VLDPOTrainer, VLRMTrainer, VLSFTTrainer
from base.value import VLModelWithValueHead
from models import ModelCoreMapper


def own_pixels(collator, padded_batch):
    """As in the contract: open the images of img_path and process them by hand."""
    imgs = [Image.open(img_path).convert("RGB") for img_path in padded_batch["img_path"]]
    padded_batch["img_input_dict"] = dict(
        pixel_values=collator.processor.image_processor(images=imgs, return_tensors="pt")["pixel_values"]
    )
    return padded_batch


class LlavaForRL(VLModelMixin, LlavaForConditionalGeneration): ...


class LlavaProcessor(VLProcessor): ...


class LlavaSFTDataCollatorWithPadding(VLSFTDataCollatorWithPadding):
    def __call__(self, features):
        return own_pixels(self, super().__call__(features))


class LlavaDPODataCollatorWithPadding(VLDPODataCollatorWithPadding):
    def __call__(self, features):
        return own_pixels(self, super().__call__(features))


class LlavaRMDataCollatorWithPadding(VLRMDataCollatorWithPadding):
    def __call__(self, features):
        return own_pixels(self, super().__call__(features))


class LlavaPPODataCollator(VLPPODataCollator): ...


class LlavaSFTTrainer(VLSFTTrainer): ...


class LlavaDPOTrainer(VLDPOTrainer): ...


class LlavaRMTrainer(VLRMTrainer): ...


class LlavaPPOTrainer(VLPPOTrainer): ...


class LlavaRewardModel(VLRewardModel): ...


class LlavaWithValueHead(VLModelWithValueHead): ...


core_mapper = ModelCoreMapper(
    model=LlavaForRL,
    processor=LlavaProcessor,
    dpo_collator=LlavaDPODataCollatorWithPadding,
    dpo_trainer=LlavaDPOTrainer,
    reward_model=LlavaRewardModel,
    value_model=LlavaWithValueHead,
    reward_collator=LlavaRMDataCollatorWithPadding,
    reward_trainer=LlavaRMTrainer,
    sft_collator=LlavaSFTDataCollatorWithPadding,
    sft_trainer=LlavaSFTTrainer,
    ppo_collator=LlavaPPODataCollator,
    ppo_trainer=LlavaPPOTrainer,
)

MAIN = {"sft": train_sft.main, "dpo": train_dpo.main, "rm": train_rm.main}


@pytest.mark.parametrize("algorithm", MAIN)
@pytest.mark.parametrize("mapper", ["twelve", "two"])
def test_a_users_folder_trains_like_the_projects_own(command, tmp_path, monkeypatch, algorithm: str, mapper: str):
    def curve(out) -> list[float]:
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    MAIN[algorithm](command(algorithm, "--use_lora True --lora_dropout 0", out=tmp_path / "theirs"))
    module = types.ModuleType("models.my_own_folder")
    module.core_mapper = (
        core_mapper if mapper == "twelve" else ModelCoreMapper(model=LlavaForRL, processor=LlavaProcessor)
    )
    monkeypatch.setitem(sys.modules, "models.my_own_folder", module)
    monkeypatch.setitem(models.MODEL_NICKNAME_MAP, "LlavaForConditionalGeneration", "my_own_folder")
    MAIN[algorithm](command(algorithm, "--use_lora True --lora_dropout 0", out=tmp_path / "mine"))
    assert curve(tmp_path / "mine") == curve(tmp_path / "theirs")


def test_every_field_has_a_class(llava):
    for mapper in (core_mapper, models.core_mapper_for(llava)):
        assert all(isinstance(getattr(mapper, name), type) for name in mapper.__dataclass_fields__)
        assert len(mapper.__dataclass_fields__) == 12
        assert isinstance(mapper.model.default_lora_target, list)
        assert mapper.model.prepare_default_generation_kwargs()["do_sample"] is False
        assert mapper.model.__name__ == "LlavaForConditionalGeneration"


def test_every_field_of_a_batch_is_in_base_batch(llava, rows_with_columns):
    """base.batch names all keys that the collators set, and none that they never set."""
    mapper = models.core_mapper_for(llava)
    processor = mapper.processor(llava)
    rows = [row | {"responses": [f"Yes, {answer}" for answer in row["responses"]]} for row in rows_with_columns]
    needs = set(losses.NEEDS)
    dpo = mapper.dpo_collator(processor, needs=needs - {"policy_negative"}, corruption="black")(rows)
    dpo |= mapper.dpo_collator(processor, needs=needs, corruption="black")(rows)
    one = mapper.dpo_collator(processor)(rows)
    cached = [
        row | {"reference_logps": [0.0] * int(one["completion_mask"][one["rows"] == b].sum())}
        for b, row in enumerate(rows)
    ]
    dpo |= mapper.dpo_collator(processor)(cached)
    assert dpo.keys() == DPOBatch.__annotations__.keys()
    rm = mapper.reward_collator(processor)(rows)
    assert rm.keys() <= RMBatch.__annotations__.keys() == dpo.keys() | {"source", "counted"}
    assert mapper.ppo_collator(processor)(rows).keys() == PPOBatch.__annotations__.keys()
    talks = [row | {"messages": [*row["prompt"], {"role": "assistant", "content": "A star."}]} for row in rows]
    assert mapper.sft_collator(processor)(talks).keys() == SFTBatch.__annotations__.keys()
    for batch in (dpo["text_only"], dpo["probe"], one):
        assert batch.keys() & ResponseBatch.__annotations__.keys() >= {"rows", "packed", "img_path", "img_input_dict"}


@pytest.fixture
def rows_with_columns(preference_rows, image_dir) -> list[dict]:
    return [
        row | {"severity": [0.0, 1.0], "scores": [2.0, 1.0], "margin": 0.5, "image_rejected": str(image_dir / "3.png")}
        for row in preference_rows[:2]
    ]
