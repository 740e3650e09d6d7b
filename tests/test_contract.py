"""docs/CustomizedModel.md, followed to the letter: twelve classes, a collator that makes the pixels, one map line."""

import copy
import datetime
import io
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import losses
import models
import train_dpo
import train_ppo
import train_rm
import train_sft
from args import DataArguments, DPOConfig, LoraArguments, ModelArguments, parse
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
from base.segments import Layout
from base.trainer import VLDPOTrainer, VLRMTrainer, VLSFTTrainer
from base.value import VLModelWithValueHead
from common.errors import InputError
from eval.generate import Answerer, EncodedBatches
from models import ModelCoreMapper
from tests import zoo


class LlavaForRL(VLModelMixin, LlavaForConditionalGeneration): ...


class LlavaProcessor(VLProcessor): ...


# Word for word as in the contract
class LlavaDPODataCollatorWithPadding(VLDPODataCollatorWithPadding):
    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        # first, pad everything to the same length
        padded_batch = super().__call__(features)
        imgs = [Image.open(img_path).convert("RGB") for img_path in padded_batch["img_path"]]
        padded_batch["img_input_dict"] = dict(
            pixel_values=self.processor.image_processor(images=imgs, return_tensors="pt")["pixel_values"]
        )
        return padded_batch


def as_in_the_contract(base: type) -> type:
    """The same collator for another algorithm."""

    class Collator(base):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            padded_batch = super().__call__(features)
            imgs = [Image.open(img_path).convert("RGB") for img_path in padded_batch["img_path"]]
            padded_batch["img_input_dict"] = dict(
                pixel_values=self.processor.image_processor(images=imgs, return_tensors="pt")["pixel_values"]
            )
            return padded_batch

    return Collator


LlavaSFTDataCollatorWithPadding = as_in_the_contract(VLSFTDataCollatorWithPadding)
LlavaRMDataCollatorWithPadding = as_in_the_contract(VLRMDataCollatorWithPadding)
LlavaPPODataCollator = as_in_the_contract(VLPPODataCollator)


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

MAIN = {"sft": train_sft.main, "dpo": train_dpo.main, "rm": train_rm.main, "ppo": train_ppo.main}


@pytest.fixture
def as_folder(monkeypatch) -> Callable[[ModelCoreMapper], None]:
    """Let LLaVA checkpoints find these classes."""

    def register(mapper: ModelCoreMapper) -> None:
        module = types.ModuleType("models.my_own_folder")
        module.core_mapper = mapper
        monkeypatch.setitem(sys.modules, "models.my_own_folder", module)
        monkeypatch.setitem(models.MODEL_NICKNAME_MAP, "LlavaForConditionalGeneration", "my_own_folder")

    return register


@pytest.mark.parametrize("algorithm", MAIN)
@pytest.mark.parametrize("mapper", ["twelve", "two"])
def test_a_users_folder_trains_like_the_projects_own(
    command, tmp_path, as_folder, rewards, algorithm: str, mapper: str
):
    def curve(out) -> list[float]:
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    flags = "--use_lora True --lora_dropout 0"
    if algorithm == "ppo":
        flags += f" --reward_fn {rewards} --response_length 4 --rollouts_per_prompt 2"
    MAIN[algorithm](command(algorithm, flags, out=tmp_path / "theirs"))
    as_folder(core_mapper if mapper == "twelve" else ModelCoreMapper(model=LlavaForRL, processor=LlavaProcessor))
    MAIN[algorithm](command(algorithm, flags, out=tmp_path / "mine"))
    assert curve(tmp_path / "mine") == curve(tmp_path / "theirs") != []


def same(ours: Any, theirs: Any) -> bool:
    """Whether two batches are equal, files by their pictures."""
    if isinstance(ours, Layout):
        return (ours.shape, ours.rows) == (theirs.shape, theirs.rows)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, torch.Tensor):
        return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), 0, 0, equal_nan=True)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours.getvalue() == theirs.getvalue() if isinstance(ours, io.BytesIO) else ours == theirs


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("corruption", ["crop", "diffusion", "black", "patch", "swap"])
def test_the_contracts_collator_makes_the_batches_of_every_loss(
    llava, rows_with_columns, corruption: str, share_prefix: bool
):
    """All that any loss needs, with every corruption: the pixels are the user's own, and the noise is on them."""
    processor = models.core_mapper_for(llava).processor(llava)
    settings = dict(needs=set(losses.NEEDS), corruption=corruption, share_prefix=share_prefix)
    ours, theirs = (
        collator(processor, **settings)(rows_with_columns)
        for collator in (LlavaDPODataCollatorWithPadding, VLDPODataCollatorWithPadding)
    )
    assert same(ours, theirs)
    assert not torch.equal(  # the clean and the corrupted rows
        ours["img_input_dict"]["pixel_values"][:2], ours["probe"]["img_input_dict"]["pixel_values"][:2]
    )


def test_the_contracts_collators_take_rows_without_images(llava, preference_rows):
    """Transformers' image processors fail on an empty list."""
    processor = models.core_mapper_for(llava).processor(llava)
    rows = [{**row, "images": []} for row in preference_rows[:2]]
    talks = [row | {"messages": [*row["prompt"], {"role": "assistant", "content": "A star."}]} for row in rows]
    for collator in (LlavaSFTDataCollatorWithPadding, LlavaDPODataCollatorWithPadding, LlavaPPODataCollator):
        batch = collator(processor)(talks)
        assert batch["img_input_dict"] == {"pixel_values": None} and batch["img_path"] == []


class OwnTemplate(VLProcessor):
    @property
    def chat_template(self) -> str:
        return "HELLO " + super().chat_template


class OwnFormat(VLProcessor):
    def format_multimodal_prompt(self, prompt, images=1):
        return "HELLO " + super().format_multimodal_prompt(prompt, images)


class OwnConversations(VLProcessor):
    def process_batch_conv(self, convs, images=None, train_on="all"):
        changed = [[{**conv[0], "content": "HELLO " + conv[0]["content"]}, *conv[1:]] for conv in convs]
        return super().process_batch_conv(changed, images, train_on)


class OwnCheck(VLProcessor):
    """Takes HELLO for a placeholder, which nothing else does."""

    def is_multimodal_prompt_valid(self, prompt):
        return "HELLO" in prompt

    def format_multimodal_prompt(self, prompt, images=1):
        return "HELLO " + super().format_multimodal_prompt(prompt, images)


class OwnImages(VLProcessor):
    @property
    def image_processor(self):
        native = copy.deepcopy(self.processor.image_processor)
        native.image_mean, native.do_normalize = [9.0, 9.0, 9.0], True
        return native


class OwnFunction(VLProcessor):
    """A function makes the pixels; sizes and patches are the native processor's."""

    @property
    def image_processor(self):
        return lambda images, return_tensors="pt", **kwargs: {
            "pixel_values": torch.full((len(images), 3, 28, 28), -9.0)
        }


class OwnCall(VLProcessor):
    def __call__(self, *args, **kwargs):
        batch = super().__call__(*args, **kwargs)
        if batch.get("pixel_values") is not None:
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], -9.0)
        return batch


@pytest.mark.parametrize("own", [OwnTemplate, OwnFormat, OwnConversations, OwnCheck, OwnImages, OwnFunction, OwnCall])
def test_an_overridden_method_counts_in_training_and_evaluation(llava, preference_rows, as_folder, own: type):
    """Texts begin with HELLO, or pixels are far below what the native processor gives: in every batch and in evaluation."""
    as_folder(ModelCoreMapper(model=LlavaForRL, processor=own))
    mapper = models.core_mapper_for(llava)
    processor = mapper.processor(llava)
    rows = preference_rows[:2]
    talks = [row | {"messages": [*row["prompt"], {"role": "assistant", "content": "A star."}]} for row in rows]
    answerer = Answerer(llava, None, torch.device("cpu"), bf16=False)
    question = {"id": "0", "images": rows[0]["images"], "prompt": rows[0]["prompt"][0]["content"]}
    evaluated = EncodedBatches([[question]], answerer.prompt_collator)[0][1][0]
    dpo = mapper.dpo_collator(processor)(rows)
    batches = {
        "sft": mapper.sft_collator(processor)(talks),
        "dpo": dpo,
        "rm": mapper.reward_collator(processor)(rows),
        "likelihood": answerer.response_collator.responses_only(rows),
    }
    seen = {name: (batch["input_ids"][0].tolist(), batch["img_input_dict"]) for name, batch in batches.items()}
    ppo = mapper.ppo_collator(processor)(rows)
    seen |= {"ppo": (ppo["prompts"][0], ppo["img_input_dict"]), "eval": (evaluated["ids"], evaluated["inputs"])}
    seen["dummy"] = (None, processor.dummy_images())
    for name, (ids, images) in seen.items():
        if own in (OwnImages, OwnFunction, OwnCall):
            assert images["pixel_values"].max() < -4, name
        elif ids is not None:
            assert "HELLO" in processor.tokenizer.decode(ids), name
            assert images["pixel_values"].shape[1:] == (3, 28, 28)
    answer = dpo["completion_ids"][0][dpo["completion_mask"][0]].tolist()
    assert answer == processor.encode_response(rows[0]["responses"][0])


@pytest.mark.parametrize("own", [OwnFormat, OwnCheck])
def test_an_own_format_counts_for_the_rows_of_a_file(command, as_folder, own: type):
    """Reading a file puts `<image>` in front of questions without one, which says as much as no mark; by hand it stays."""
    as_folder(ModelCoreMapper(model=LlavaForRL, processor=own))
    trainer, _ = train_dpo.build(*parse(ModelArguments, DataArguments, LoraArguments, DPOConfig, argv=command("dpo")))
    row, processor = trainer.train_dataset[0], trainer.processing_class
    assert row["prompt"][0]["content"].startswith("<image>What")
    ids = trainer.data_collator([row])["input_ids"][0]
    assert "HELLO" in processor.tokenizer.decode(ids)
    for text in ("<image>\nWhat?", "What <image>?"):
        assert "HELLO" not in processor.render([{"role": "user", "content": text}], images=1)
    marked = [{"role": "user", "content": "<image><image>Which?"}]
    assert processor.render(marked, images=2).count("HELLO") == 1


def test_an_own_init_takes_the_path_alone(llava):
    """As the guide says; what the scripts tell every processor goes to the base class."""

    class OwnInit(VLProcessor):
        def __init__(self, model_name_or_path):
            super().__init__(model_name_or_path)
            self.processor.chat_template = "{{ strftime_now('%Y') }}" + self.processor.chat_template

    class Dated(OwnInit):
        def __init__(self, path):
            super().__init__(path)

        @property
        def chat_template(self):
            return "{{ strftime_now('%Y') }}" + super().chat_template

    day = datetime.date(1999, 2, 3)
    assert OwnInit(llava, enable_thinking=False, date=day).template.facts == {}
    processor = Dated(llava, enable_thinking=False, date=day)
    assert processor.template.facts == {"date": "1999-02-03"}
    assert processor.render([{"role": "user", "content": "Hi"}]).startswith("1999")
    with pytest.raises(InputError, match="enable_thinking does nothing here"):
        OwnInit(llava, enable_thinking=True)
    assert Dated(llava).template.facts == {"date": datetime.datetime.now().date().isoformat()}


@pytest.mark.parametrize(
    "method, lacking",
    [("__call__", "attention_mask"), ("__call__", "labels"), ("process_batch_conv", "img_input_dict")],
)
def test_what_a_method_must_return(llava, preference_rows, method: str, lacking: str):
    def without(self, *args, **kwargs):
        returned = getattr(VLProcessor, method)(self, *args, **kwargs)
        return {name: value for name, value in returned.items() if name != lacking}

    own = type("Lacking", (VLProcessor,), {method: without})
    talk = preference_rows[0] | {
        "messages": [*preference_rows[0]["prompt"], {"role": "assistant", "content": "A star."}]
    }
    with pytest.raises(InputError, match=f"{method} of Lacking returns no {lacking}: docs/CustomizedModel"):
        VLSFTDataCollatorWithPadding(own(llava))([talk])


def test_an_own_template_is_saved(llava, tmp_path):
    OwnTemplate(llava).save_pretrained(tmp_path)
    assert LlavaProcessor(str(tmp_path)).chat_template == "HELLO " + LlavaProcessor(llava).chat_template


def test_prompts_in_any_spelling():
    """The native token, the mark, both removed again; a bare string and a processor without its __init__ get a sentence."""
    path = zoo.checkpoint("qwen2_vl")
    processor = models.core_mapper_for(path).processor(path)
    processor.infer()
    picture = [zoo.image(0)]
    ids = [
        processor(texts=[text + "hi"], images=[picture])["input_ids"].tolist()
        for text in ("", "<image>", processor.image_placeholder)
    ]
    assert ids[0] == ids[1] == ids[2]
    bare = [{"role": "user", "content": "<|image_pad|>hi"}]
    marked = [{"role": "user", "content": "<image>hi"}]
    assert processor.render(bare, images=1) == processor.render(marked, images=1)
    assert processor.is_multimodal_prompt_valid("<|image_pad|>hi") and not processor.is_multimodal_prompt_valid(None)
    assert processor.format_multimodal_prompt("hi", None) == processor.remove_image_placeholder("<|image_pad|>hi")
    for n in range(3):
        assert processor.remove_image_placeholder(processor.format_multimodal_prompt(" hi\n", n)) == " hi\n"
    assert processor.process_batch_conv([], []) == {"input_ids": [], "labels": [], "img_input_dict": {}}
    with pytest.raises(InputError, match="takes a list"):
        processor(texts="abc")

    class Forgetful(VLProcessor):
        def __init__(self, path: str) -> None:
            self.processor = None

    with pytest.raises(AttributeError, match=r"Forgetful has no attribute 'image_placeholder': its __init__ must call"):
        Forgetful(path).format_multimodal_prompt("hi")


# -- the check before the first step -------------------------------------------------------------------------------------


class Scaling(LlavaForRL):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if kwargs.get("completion_index") is None:
            output.logits = output.logits / 8
        return output


class AddsToLogits(LlavaForRL):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if kwargs.get("completion_index") is None:
            output.logits = output.logits + torch.arange(output.logits.shape[-1]) / 200
        return output


class ReturnsTuple(Scaling):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return output.to_tuple() if kwargs.get("completion_index") is None else output


class ReadsFurtherInput(LlavaForRL):
    """Its own forward reads `shade`, which the collator below makes; nothing else does."""

    def forward(self, *args, shade=None, **kwargs):
        if kwargs.get("completion_index") is None and shade is not None:
            kwargs["pixel_values"] = kwargs["pixel_values"] * shade[:, None, None, None]
        return super().forward(*args, **kwargs)


class MakesShade(VLDPODataCollatorWithPadding):
    def __call__(self, features):
        batch = super().__call__(features)
        batch["img_input_dict"]["shade"] = torch.full((len(batch["img_path"]),), 5.0)
        return batch


class BlindAfterwards(LlavaForRL):
    def encode_images(self, img_inputs):
        features = super().encode_images(img_inputs)
        image = features["mm_encoder_outputs"]["image"]
        image.pooler_output = [tensor * 0 for tensor in image.pooler_output]
        return features


class SeesNoPrompt(LlavaForRL):
    def packed_attention_mask(self, input_ids, segment_ids, img_inputs):
        mask = super().packed_attention_mask(input_ids, segment_ids, img_inputs)
        answer = segment_ids > 0
        return mask & ~(answer[:, None, :, None] & ~answer[:, None, None, :])


@pytest.mark.parametrize(
    "model, hook, flags",
    [
        (Scaling, "last_hidden_state", ""),
        (Scaling, "last_hidden_state", "--q_lora True"),
        (AddsToLogits, r"last_hidden_state \(or get_output_embeddings\)", ""),
        (ReturnsTuple, "last_hidden_state", ""),
        (ReadsFurtherInput, "last_hidden_state", ""),
        (BlindAfterwards, "encode_images", ""),
        (SeesNoPrompt, "packed_attention_mask or packed_position_ids", ""),
    ],
)
def test_training_stops_when_log_probs_are_not_those_of_the_class(
    command, as_folder, model: type, hook: str, flags: str
):
    collator = MakesShade if model is ReadsFurtherInput else VLDPODataCollatorWithPadding
    as_folder(ModelCoreMapper(model=model, processor=LlavaProcessor, dpo_collator=collator))
    with pytest.raises(InputError, match=f"LlavaForConditionalGeneration by .* nats a token.* override {hook}"):
        train_dpo.main(command("dpo", f"--use_lora True {flags}"))


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
    own = [row | {"mine": 1.0, "theirs": [0.5] * len(row["responses"])} for row in rows]
    dpo |= mapper.dpo_collator(processor, columns={"mine", "theirs"})(own)
    single = [
        {k: row[k] for k in ("images", "prompt")} | {"responses": row["responses"][:1], "label": True} for row in rows
    ]
    dpo |= mapper.dpo_collator(processor, needs={"mismatched"})(single)
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
