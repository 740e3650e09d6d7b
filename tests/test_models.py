"""The contract, on every family: a class in MODEL_NICKNAME_MAP is tested here.

A family needs a tiny checkpoint in tests/zoo.py and an entry in FAMILIES below (its published prompt format, and what
it cannot do, with the reason); without them its tests fail. The reference everywhere is the plain transformers class on
one unpadded row.
"""

import dataclasses
import importlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from PIL import ExifTags, Image
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationMixin

import base.processor
from args import DataArguments, DPOConfig, LoraArguments, ModelArguments, parse
from base.collator import VLDPODataCollatorWithPadding, VLSFTDataCollatorWithPadding
from base.loading import architecture_of, load_model
from base.model import VLModelMixin
from base.packing import last_token_positions
from base.processor import IGNORE_INDEX
from base.rollout_cache import rollout_cache
from base.self_check import check_log_probs
from base.trainer import disable_dropout
from common.errors import InputError
from common.tensors import to_device
from models import FLASH_ATTN_MODELS, MODEL_NICKNAME_MAP, core_mapper_for
from models.assemble import LoadPlan, add_lora
from models.internlm_xcomposer2.processing import SYSTEM
from tests import zoo


@dataclass(frozen=True)
class Family:
    """What the tests must know of a family beyond its checkpoint.

    Attributes:
        prompt: the published format of one image and the question "What is this?", up to where the answer begins.
        source: where the format is published.
        images: images that one prompt may hold.
        turns: questions that one conversation may hold.
        native_text: rendered prompt -> what the native processor wants for the same prompt.
        trains_on: part of the vision tower that `freeze_vision_tower` leaves trainable.
    """

    prompt: str
    source: str
    images: tuple[int, ...] = (0, 1, 2)
    turns: int = 2
    native_text: Callable[[str], str] = field(default=lambda text: text)
    trains_on: str | None = None


CHATML = "<|im_start|>user\n{image}What is this?<|im_end|>\n<|im_start|>assistant\n"
QWEN = CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>")
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN
FAMILIES = {
    "llava": Family("USER: <image>\nWhat is this? ASSISTANT:", "model card of llava-hf/llava-1.5-7b-hf"),
    "pixtral": Family("<s>[INST][IMG]What is this?[/INST]", "chat_template.json of mistral-community/pixtral-12b"),
    "llava_next": Family("[INST] <image>\nWhat is this? [/INST]", "model card of llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava_onevision": Family(
        "<|im_start|>user <image>\nWhat is this?<|im_end|><|im_start|>assistant\n",
        "chat_template.json of llava-hf/llava-onevision-qwen2-7b-ov-hf",
    ),
    "instructblip": Family(
        "<image>What is this?",
        "model card of Salesforce/instructblip-vicuna-7b: the bare instruction; <image> is our mark",
        images=(1,),  # a Q-Former call takes one image and its instruction
        native_text=lambda text: text.replace("<image>", ""),
    ),
    "qwen2_vl": Family(QWEN_SYSTEM, "chat_template.json of Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2_5_vl": Family(QWEN_SYSTEM, "chat_template.json of Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3_vl": Family(QWEN, "chat_template.json of Qwen/Qwen3-VL-8B-Instruct"),
    "internvl": Family(CHATML.format(image="<IMG_CONTEXT>\n"), "chat_template.jinja of OpenGVLab/InternVL3-8B-hf"),
    "idefics3": Family(
        "<|begin_of_text|>User:<image>What is this?<end_of_utterance>\nAssistant:",
        "chat_template.json of HuggingFaceM4/Idefics3-8B-Llama3",
    ),
    "smolvlm": Family(
        "<|im_start|>User:<image>What is this?<end_of_utterance>\nAssistant:",
        "chat_template.json of HuggingFaceTB/SmolVLM-Instruct",
    ),
    "paligemma": Family(
        "<image><bos>What is this?\n",
        "arXiv:2407.07726, section 3.1 (image tokens, BOS, prefix, newline)",
        turns=1,  # trained on single questions; no format for more is published
        native_text=lambda text: text.replace("<bos>", "").removesuffix("\n"),
    ),
    "gemma3": Family(
        "<bos><start_of_turn>user\n<start_of_image>What is this?<end_of_turn>\n<start_of_turn>model\n",
        "chat_template.json of google/gemma-3-4b-it",
    ),
    "mistral3": Family(
        "<s>[INST][IMG]What is this?[/INST]", "chat_template.json of mistralai/Mistral-Small-3.1-24B-Instruct-2503"
    ),
    "mllama": Family(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "chat_template.json of meta-llama/Llama-3.2-11B-Vision-Instruct",
    ),
    "qwen_vl": Family(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        + CHATML.format(image="Picture 1: <img><imgpad></img>\n"),
        "qwen_generation_utils.py and README of Qwen/Qwen-VL-Chat; <imgpad> for the path between the tags",
        trains_on="attn_pool",  # as in the released finetune.py
    ),
    "internlm_xcomposer2": Family(
        f"<s>[UNUSED_TOKEN_146]system\n{SYSTEM}[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]user\n<ImageHere>What is this?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
        "modeling_internlm_xcomposer2.py of internlm/internlm-xcomposer2-vl-7b",
    ),
    "vipllava": Family("###Human: <image>\nWhat is this?###Assistant:", "model card of llava-hf/vip-llava-7b-hf"),
    "idefics2": Family(
        "User:<image>What is this?<end_of_utterance>\nAssistant:", "tokenizer_config.json of HuggingFaceM4/idefics2-8b"
    ),
    "aya_vision": Family(
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>What is this?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "chat_template.jinja of CohereLabs/aya-vision-8b",
    ),
    "ovis2": Family(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML.format(image="<image>\n"),
        "chat_template.json of thisisiron/Ovis2-2B-hf",
    ),
    "glm4v": Family(
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What is this?<|assistant|>\n",
        "chat_template.jinja of zai-org/GLM-4.1V-9B-Thinking",
    ),
    "qwen3_vl_moe": Family(QWEN, "chat_template.json of Qwen/Qwen3-VL-30B-A3B-Instruct"),
    "qwen3_5": Family(QWEN + "<think>\n\n</think>\n\n", "chat_template.jinja of Qwen/Qwen3.5-9B, thinking off"),
    "lfm2_vl": Family(
        "<|startoftext|>" + CHATML.format(image="<image>"), "chat_template.jinja of LiquidAI/LFM2-VL-1.6B"
    ),
    "deepseek_vl": Family(
        zoo.DEEPSEEK_SYSTEM + "\n\nUser: <image_placeholder>What is this?\n\nAssistant:",
        "chat_template.jinja of deepseek-community/deepseek-vl-7b-chat",
    ),
    "gemma4": Family(
        "<bos><|turn>user\n<|image|>What is this?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        "chat_template.jinja of google/gemma-4-31B-it, thinking off",
    ),
    "blip_2": Family(
        "<image>Question: What is this? Answer:",
        "arXiv:2301.12597 and transformers' documentation of BLIP-2; <image> is our mark",
        images=(1,),
        native_text=lambda text: text.replace("<image>", ""),
    ),
    "llava_next_video": Family(
        "USER: <image>\nWhat is this? ASSISTANT:", "model card of llava-hf/LLaVA-NeXT-Video-7B-hf, for images"
    ),
    "molmo2": Family(
        "<|image|><|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
        "chat_template.jinja of allenai/Molmo2-4B",
    ),
    "cohere2_vision": Family(
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|><|IMG_PATCH|>What is this?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "turns of Cohere 2's template in the package trl, which is of text; not checked against CohereLabs/command-a-vision-07-2025",
    ),
    "glm46v": Family(
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What is this?<|assistant|>\n",
        "GLM-4.1V's, not checked against a checkpoint of GLM-4.6V",
    ),
    "granite4_vision": Family(
        "<|start_of_role|>user<|end_of_role|><image>What is this?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "prompt engineering guide of Granite 4.0, not checked against a vision checkpoint",
    ),
}
# One checkpoint per registered family, and further ones that a family supports.
NAMES = [*MODEL_NICKNAME_MAP.values(), "pixtral"]
QUESTIONS = {0: "What is a triangle?", 1: "What is this?", 2: "Describe the two photo, red or blue?"}
ANSWERS = ["A red square and a blue circle.", "A red star", "There are two green triangles.", "no, a star"]


def picture(seed: int) -> Image.Image:
    """Pictures of different shapes, which give different numbers of tokens in some families."""
    return zoo.image(seed, *[(40, 30), (20, 60), (90, 30)][seed % 3])


def row(images: int, responses: int = 2, seed: int = 0) -> dict:
    """A preference row with that many images and responses."""
    return {
        "images": [picture(seed + i) for i in range(images)],
        "prompt": [{"role": "user", "content": QUESTIONS[images]}],
        "responses": ANSWERS[:responses],
        "ranks": [float(k) for k in range(responses)],
    }


def native_class(model_class: type) -> type:
    """The transformers class from which an adapter's model inherits."""
    return next(c for c in model_class.__mro__ if issubclass(c, GenerationMixin) and not issubclass(c, VLModelMixin))


@pytest.fixture(scope="class", params=NAMES)
def it(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A family: its traits, path, adapter, the adapter's model, the same checkpoint as a plain transformers model, and its processor."""
    path = zoo.checkpoint(request.param)
    adapter = core_mapper_for(path)
    return SimpleNamespace(
        name=request.param,
        family=FAMILIES[request.param],
        path=path,
        adapter=adapter,
        model=load_model(path).eval(),
        native=native_class(adapter.model).from_pretrained(path).eval(),
        processor=adapter.processor(path),
    )


def rows(it: SimpleNamespace, responses: int = 2) -> list[dict]:
    """One row per number of images that the family takes in a prompt (one image twice if that is all)."""
    images = it.family.images if len(it.family.images) > 1 else it.family.images * 2
    return [row(n, responses, seed=3 * n + k) for k, n in enumerate(images)]


def native_logps(it: SimpleNamespace, row: dict, response: str) -> torch.Tensor:
    """Log-probs (T,) of a response by the plain model: one row, no padding, no packing, pixels instead of features."""
    text = it.processor.render(row["prompt"], add_generation_prompt=True, images=len(row["images"]))
    prompts, images = it.processor.encode_prompts([text], [row["images"]])
    answer = it.processor.encode_response(response)
    inputs = {k: torch.as_tensor(v) if k in it.processor.per_token_keys else v for k, v in images.items()}
    for key in it.processor.per_token_keys:
        if key in inputs:
            after = inputs[key][:, -1:] if key == "cross_attention_mask" else inputs[key].new_zeros(1, 1)
            if it.name == "paligemma":
                after = after + 1  # the suffix
            inputs[key] = torch.cat([inputs[key], after.expand(-1, len(answer), *inputs[key].shape[2:])], dim=1)
    ids = torch.tensor([prompts[0] + answer])
    logits = it.native(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0].float()
    return logits.log_softmax(-1)[len(prompts[0]) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


def response_logps(model: torch.nn.Module, batch: dict, images: dict) -> torch.Tensor:
    """Log-probs (N,) of all responses of a batch, one after the other."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask = batch["completion_mask"]
    return model(
        **core.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"]),
        completion_index=batch["completion_index"][mask],
        completion_ids=batch["completion_ids"][mask],
    ).logps


def collate(it: SimpleNamespace, rows: list[dict], share_prefix: bool | None = None) -> dict:
    """A batch of preference rows; by default their responses share rows where the family can."""
    share_prefix = it.model.packs if share_prefix is None else share_prefix
    return VLDPODataCollatorWithPadding(it.processor, share_prefix=share_prefix)(rows)


class TowerCalls:
    """Counts the calls of a vision tower."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.get_vision_tower().register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.count += 1


def written_before(it: SimpleNamespace) -> str:
    """What a template puts before an answer, without white space: the end of an empty thinking block."""
    empty = it.processor.tokenizer.decode(it.processor.encode_response(""))
    return empty.removesuffix(it.processor.answer_end).strip()


LORA = LoraArguments(use_lora=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)


def lora_model(it: SimpleNamespace) -> torch.nn.Module:
    """The family with an adapter whose weights are all different from zero."""
    torch.manual_seed(0)
    model = add_lora(load_model(it.path), LORA)
    disable_dropout(model.get_base_model())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


class TestFamily:
    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def test_round_trip_keeps_weights_names_and_architecture(self, it: SimpleNamespace, tmp_path: Path):
        it.model.save_pretrained(tmp_path)
        it.processor.save_pretrained(tmp_path)
        ours, original = load_file(tmp_path / "model.safetensors"), load_file(Path(it.path) / "model.safetensors")
        assert ours.keys() == original.keys()
        assert all(torch.equal(ours[name], original[name]) for name in ours)
        assert architecture_of(str(tmp_path)) == architecture_of(it.path) == native_class(it.adapter.model).__name__
        config = json.loads((tmp_path / "config.json").read_text())
        assert "auto_map" not in config  # no custom code in what we save
        again = load_model(str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(it.native.parameters(), again.parameters(), strict=True))
        prompt = it.adapter.processor(str(tmp_path)).render(row(1)["prompt"], add_generation_prompt=True, images=1)
        assert prompt == it.family.prompt

    def test_lora_saved_reloaded_and_merged_gives_the_same_log_probs(self, it: SimpleNamespace, tmp_path: Path):
        batch = collate(it, rows(it))
        model = lora_model(it).eval()
        with torch.no_grad():
            images = it.model.encode_images(batch["img_input_dict"])
            base = response_logps(it.model, batch, images)
            expected = response_logps(model, batch, images)
            assert (expected - base).abs().max() > 1e-3
            model.save_pretrained(tmp_path / "adapter")
            reloaded = load_model(str(tmp_path / "adapter")).eval()
            saved, ours = get_peft_model_state_dict(reloaded), get_peft_model_state_dict(model)
            assert saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name]) for name in ours)
            assert torch.allclose(response_logps(reloaded, batch, images), expected, atol=1e-5)
            reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
            merged = load_model(str(tmp_path / "merged")).eval()
            torch.testing.assert_close(response_logps(merged, batch, images), expected, atol=1e-5, rtol=0)

    # -- the contract's methods ----------------------------------------------------------------------------------------

    def test_vision_tower_and_freezing(self, it: SimpleNamespace):
        model = load_model(it.path)
        tower = {id(p) for p in model.get_vision_tower().parameters()}
        assert tower and not tower & {id(p) for p in model.get_decoder().parameters()}
        unused = {id(p) for name, p in model.named_parameters() if "audio" in name}
        assert bool(unused) == (it.name == "gemma4") and not tower & unused
        model.freeze_vision_tower()
        if it.family.trains_on:
            part = {id(p) for p in model.get_vision_tower().get_submodule(it.family.trains_on).parameters()}
            assert part and part < tower
            tower -= part
        assert all(p.requires_grad != (id(p) in tower | unused) for p in model.parameters())

    def test_lora_targets_are_in_the_language_model_only(self, it: SimpleNamespace):
        model = add_lora(load_model(it.path), LORA)
        core = model.get_base_model()
        adapted = {name for name, module in core.named_modules() if hasattr(module, "lora_A")}
        decoder = next(name for name, module in core.named_modules() if module is core.get_decoder())
        assert adapted and all(name.startswith(decoder + ".") for name in adapted)
        assert {name.rsplit(".", 1)[-1] for name in adapted} == set(core.default_lora_target)
        assert not any(p.requires_grad for p in core.get_vision_tower().parameters())
        assert not core.vision_trains()
        with pytest.raises(ValueError, match="no_such_proj"):
            core.lora_target_regex(["no_such_proj"])

    def test_adapters_in_the_tower_and_a_projector_that_trains(self, it: SimpleNamespace):
        """--lora_vision, --train_projector: every adapter gets a gradient, and so does each part of the projector."""
        batch = collate(it, rows(it))
        torch.manual_seed(0)
        model = add_lora(load_model(it.path), dataclasses.replace(LORA, lora_vision=True), with_projector=True).eval()
        core = model.get_base_model()
        with torch.no_grad(), model.disable_adapter():
            expected = response_logps(it.model, batch, batch["img_input_dict"])
            torch.testing.assert_close(
                response_logps(model, batch, batch["img_input_dict"]), expected, atol=1e-5, rtol=0
            )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        response_logps(model, batch, batch["img_input_dict"]).sum().backward()
        names = {id(p): name for name, p in core.named_parameters()}
        names_of = {module: name for name, module in core.named_modules()}
        trained = {p for p in core.parameters() if p.requires_grad}
        tower = {p for block in core.vision_layers() for p in block.parameters() if p.requires_grad}
        assert tower and all(".lora_" in names[id(p)] for p in tower)
        projector = {names_of[part]: [p for p in part.parameters() if p.requires_grad] for part in core.projector()}
        without = [n for n, part in projector.items() if not any(p.grad is not None and p.grad.any() for p in part)]
        if it.name == "granite4_vision":  # the tiny configuration reads one of the four
            without = [n for n in without if n[:-1] != "model.spatial_projectors."]
        assert projector and not without, without
        adapters = [p for p in trained if ".lora_" in names[id(p)]]
        still = sorted(names[id(p)] for p in adapters if p.grad is None or not p.grad.any())
        assert not still, still
        of_projector = {p for part in projector.values() for p in part}
        assert tower < {*adapters} and trained == {*adapters} | of_projector

    def test_processor_methods(self, it: SimpleNamespace):
        processor = it.processor
        assert processor.tokenizer is processor.processor.tokenizer
        assert processor.image_processor.to_dict() == processor.processor.image_processor.to_dict()
        assert isinstance(processor.chat_template, str)
        prompt = processor.format_multimodal_prompt("What is this?", [picture(0)] * max(it.family.images))
        assert processor.is_multimodal_prompt_valid(prompt)
        assert not processor.is_multimodal_prompt_valid("What is this?")
        assert processor.remove_image_placeholder(prompt).strip() == "What is this?"
        assert processor.count_placeholders(prompt) == max(it.family.images)
        processor.infer()
        assert processor.tokenizer.padding_side == "left"
        processor.train()
        assert processor.tokenizer.padding_side == "right"
        with pytest.raises(InputError):
            processor(convs=[[{"role": "user", "content": "<image>\nWhat is this?"}]], images=[[]])

    # -- text ----------------------------------------------------------------------------------------------------------

    def test_prompt_is_the_published_format(self, it: SimpleNamespace):
        assert it.processor.render(row(1)["prompt"], add_generation_prompt=True, images=1) == it.family.prompt, (
            it.family.source
        )

    def test_prompt_tokens_are_the_native_processors(self, it: SimpleNamespace):
        for n in {*it.family.images} - {0}:
            example = row(n)
            text = it.processor.render(example["prompt"], add_generation_prompt=True, images=n)
            ours, inputs = it.processor.encode_prompts([text], [example["images"]])
            bos = it.processor.tokenizer.bos_token
            native = AutoProcessor.from_pretrained(it.path)(
                text=[it.family.native_text(text)],
                images=[example["images"]],
                add_special_tokens=not (bos and text.startswith(bos)),
                return_tensors="pt",
            )
            assert ours[0] == native.pop("input_ids")[0].tolist()
            assert {*inputs} == {*native} - {"attention_mask", "labels"}
            for name, value in inputs.items():
                assert torch.equal(torch.as_tensor(value), native[name]), name

    def test_labels_are_the_assistants_text_and_its_end(self, it: SimpleNamespace):
        answers = ["A red square.", "two blue circles"][: it.family.turns]
        conversation = [*row(1)["prompt"], {"role": "assistant", "content": answers[0]}]
        for answer in answers[1:]:
            conversation += [{"role": "user", "content": "And this?"}, {"role": "assistant", "content": answer}]
        encoded = it.processor.process_batch_conv([conversation], [[picture(0)]])
        ids, labels = encoded["input_ids"][0], encoded["labels"][0]
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        trained = [label for label in labels if label != IGNORE_INDEX]
        text = it.processor.tokenizer.decode(trained)
        end = it.processor.answer_end
        lead = written_before(it)
        assert [piece.strip().removeprefix(lead).strip() for piece in text.split(end)] == [*answers, ""]
        stops = it.native.generation_config.eos_token_id
        assert trained[-1] in (stops if isinstance(stops, list) else [stops]), "generation would not stop there"

    def test_a_conversation_is_its_prompt_and_the_response(self, it: SimpleNamespace):
        """What SFT trains on is what DPO scores and what generation continues."""
        prompt, image = row(1)["prompt"], picture(0)
        answer = [*prompt, {"role": "assistant", "content": "A red square."}]
        conversation = it.processor.process_batch_conv([answer], [[image]])
        start = it.processor.encode_prompts([it.processor.render(prompt, True, images=1)], [[image]])
        assert conversation["input_ids"][0] == start[0][0] + it.processor.encode_response("A red square.")
        # the decoded answer is the text that was encoded
        decoded = it.processor.decode_response(it.processor.encode_response("A red square."))
        assert decoded.removeprefix(written_before(it)).strip() == "A red square."

    def test_every_answer_follows_its_prompt(self, it: SimpleNamespace):
        """A conversation up to its k-th answer is the prompt of that answer and the answer, for every k."""
        talk = [*row(1)["prompt"], {"role": "assistant", "content": "A red square."}]
        for question, answer in [("And this?", "two blue circles"), ("Why?", "I see them.")][: it.family.turns]:
            talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for k in range(2, 2 * it.family.turns + 1, 2):
            whole = it.processor.process_batch_conv([talk[:k]], [[picture(0)]])
            prompt, images = it.processor.encode_conversations([talk[: k - 1]], [[picture(0)]])
            answer = it.processor.encode_response(talk[k - 1]["content"])
            assert whole["input_ids"][0] == prompt[0] + answer
            assert whole["labels"][0][len(prompt[0]) :] == answer
            assert {*images} == {*whole["img_input_dict"]}
            text = it.processor.render(talk[:k], images=1)
            assert text.startswith(it.processor.render(talk[: k - 1], add_generation_prompt=True, images=1))

    # -- images --------------------------------------------------------------------------------------------------------

    def test_image_counts(self, it: SimpleNamespace):
        """No image, one, two, and a mixed batch: log-probs of the plain model; unsupported numbers are refused."""
        for n in (0, 1, 2):
            if n not in it.family.images:
                with pytest.raises(InputError, match="one image"):
                    collate(it, [row(n)])
                continue
            with torch.no_grad():
                batch = collate(it, [row(n)])
                ours = response_logps(it.model, batch, batch["img_input_dict"])
                expected = torch.cat([native_logps(it, row(n), text) for text in ANSWERS[:2]])
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

    def test_sft_batch_with_padding(self, it: SimpleNamespace):
        """The SFT collator and forward on a mixed batch: the same log-probs as the plain model on single rows."""
        examples = rows(it, responses=1)
        messages = [[*r["prompt"], {"role": "assistant", "content": ANSWERS[0]}] for r in examples]
        features = [{"images": r["images"], "messages": m} for r, m in zip(examples, messages, strict=True)]
        batch = VLSFTDataCollatorWithPadding(it.processor)(features)
        with torch.no_grad():
            logps = it.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                **it.model.encode_images(batch["img_input_dict"]),
                completion_index=batch["completion_index"],
                completion_ids=batch["completion_ids"],
            ).logps
            expected = torch.cat([native_logps(it, r, ANSWERS[0]) for r in examples])
            torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)
        assert logps.isfinite().all()

    @pytest.mark.parametrize("kind", ["1x1", "1x2000", "2000x1", "RGBA", "LA", "P", "1", "I;16", "CMYK", "rotated"])
    def test_odd_images(self, it: SimpleNamespace, kind: str):
        """Any picture that Pillow reads gives a finite log-prob, or is refused in one sentence with its size."""
        file = io.BytesIO()
        if "x" in kind:
            width, height = map(int, kind.split("x"))
            zoo.image(0, width, height).save(file, "PNG")
        elif kind == "I;16":
            Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(file, "PNG")
        elif kind == "CMYK":
            zoo.image(0).convert(kind).save(file, "JPEG")
        elif kind == "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # "Orientation": turn by 90 degrees
            zoo.image(0).save(file, "JPEG", exif=exif)
        else:
            zoo.image(0).convert(kind).save(file, "PNG")
        example = row(1) | {"images": [{"bytes": file.getvalue(), "path": None}]}
        try:
            batch = collate(it, [example])
        except InputError as error:
            assert kind in ("1x2000", "2000x1") and kind in str(error).replace(" ", "")
            return
        with torch.no_grad():
            assert response_logps(it.model, batch, batch["img_input_dict"]).isfinite().all()

    def test_the_image_matters(self, it: SimpleNamespace):
        logps = []
        for seed in (0, 3):  # same size
            batch = collate(it, [row(1, seed=seed)])
            with torch.no_grad():
                logps.append(response_logps(it.model, batch, it.model.encode_images(batch["img_input_dict"])))
        assert (logps[0] - logps[1]).abs().max() > 1e-3

    # -- packed rows ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("responses", [2, 4])
    def test_packed_rows_equal_single_rows(self, it: SimpleNamespace, responses: int):
        """A padded batch of rows with K responses each, with pixels and with features, against the plain model."""
        examples = rows(it, responses)
        with torch.no_grad():
            expected = torch.cat([native_logps(it, r, text) for r in examples for text in r["responses"]])
            packed = collate(it, examples)
            plain = collate(it, examples, share_prefix=False)
            assert packed["packed"] == it.model.packs and not plain["packed"]
            assert (packed["segment_ids"] == -1).any() or len(it.family.images) == 1, "no padding in the batch"
            for batch in (packed, plain):
                for images in (batch["img_input_dict"], it.model.encode_images(batch["img_input_dict"])):
                    torch.testing.assert_close(response_logps(it.model, batch, images), expected, atol=1e-5, rtol=0)

    def test_packing_matters(self, it: SimpleNamespace):
        """Control: with an ordinary causal mask the second response sees the first, and the test above would fail."""
        batch = collate(it, [row(1)], share_prefix=True)
        assert it.model.packs == (it.name not in zoo.ONE_ROW_PER_RESPONSE)
        if not it.model.packs:
            with pytest.raises(InputError, match="--share_prefix False"):
                response_logps(it.model, batch, batch["img_input_dict"])
            return
        with torch.no_grad():
            packed = response_logps(it.model, batch, batch["img_input_dict"])
            causal = response_logps(it.model, batch | {"packed": False}, batch["img_input_dict"])
        assert (packed - causal).abs().max() > 1e-3

    def test_tower_runs_once_per_step(self, it: SimpleNamespace, tmp_path: Path):
        """A DPO step of a LoRA policy: reference and policy share the features of one call."""
        model = lora_model(it)
        collator = it.adapter.dpo_collator(it.processor, share_prefix=it.model.packs)
        arguments = DPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, report_to="none")
        trainer = it.adapter.dpo_trainer(model=model, args=arguments, processor=it.processor, data_collator=collator)
        calls = TowerCalls(model.get_base_model())
        loss = trainer.compute_loss(model, collator(rows(it)))
        loss.backward()
        assert calls.count == 1 and loss.isfinite()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_passes_the_check_before_the_first_step(self, it: SimpleNamespace, dtype: torch.dtype):
        model = load_model(it.path, dtype=dtype)
        images = []
        model.register_forward_pre_hook(lambda _, args, kwargs: images.append({*kwargs}), with_kwargs=True)

        def prepare(batch: dict) -> dict:
            return batch | {"img_input_dict": to_device(batch["img_input_dict"], torch.device("cpu"), dtype)}

        with torch.no_grad():
            check_log_probs(model, it.processor, model.packs, prepare)
        assert model.training == load_model(it.path).training
        assert len(images) == 2 and "completion_index" in images[1] - images[0]

    # -- generation ----------------------------------------------------------------------------------------------------

    def test_default_generation_kwargs(self, it: SimpleNamespace):
        kwargs = it.adapter.model.prepare_default_generation_kwargs() | {"max_new_tokens": 3}
        it.processor.infer()
        inputs = it.processor(convs=[row(1)["prompt"]], images=[[picture(0)]])
        it.processor.train()
        output = it.model.generate(**inputs, **kwargs)
        assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 3

    def test_left_padded_batch_generates_what_single_rows_do(self, it: SimpleNamespace):
        """With pixels and with features, whose tower runs once; the reference is the plain model on one row."""
        examples = rows(it)
        never = {"suppress_tokens": it.model.image_placeholder_ids} if it.model.image_placeholder_ids else {}
        end = {"pad_token_id": it.processor.tokenizer.pad_token_id, "do_sample": False}
        length = {"max_new_tokens": 8, "min_new_tokens": 8}

        def generated(model: torch.nn.Module, inputs: dict, **more) -> list[list[int]]:
            return model.generate(**inputs, **length, **end, **more)[:, inputs["input_ids"].shape[1] :].tolist()

        it.processor.infer()
        batch = it.processor(convs=[r["prompt"] for r in examples], images=[r["images"] for r in examples])
        single = [it.processor(convs=[r["prompt"]], images=[r["images"]]) for r in examples]
        it.processor.train()
        assert (batch["attention_mask"][:, 0] == 0).any() or len(it.family.images) == 1
        expected = [generated(it.native, x | never)[0] for x in single]
        assert generated(it.model, batch) == expected
        model = load_model(it.path).eval()
        calls = TowerCalls(model)
        text = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            features = model.encode_images(batch)
        assert generated(model, text | features) == expected
        assert calls.count == 1
        cache = rollout_cache(model, text["input_ids"].shape[1], length["max_new_tokens"])
        assert generated(model, text | features, past_key_values=cache, disable_compile=True) == expected

    def test_placeholders_are_never_generated(self, it: SimpleNamespace):
        """Even if the model gives nothing else any probability."""
        model = load_model(it.path).eval()
        head = model.get_output_embeddings()
        if it.name == "gemma4":
            assert model.config.audio_token_id in model.image_placeholder_ids
        if not model.image_placeholder_ids:  # InternLM-XComposer2's has no logit
            assert model.config.image_token_id >= head.out_features
            return
        bias = torch.zeros(head.out_features)
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        placeholders = {getattr(model.config, name, None) for name in names} - {None}
        bias[[i for i in placeholders if 0 <= i < head.out_features]] = 1e4
        head.register_forward_hook(lambda *call: call[2] + bias)
        it.processor.infer()
        inputs = it.processor(convs=[row(1)["prompt"]], images=[[picture(0)]])
        it.processor.train()
        output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert not {*new} & placeholders

    # -- lengths -----------------------------------------------------------------------------------------------------------

    def test_lengths_come_from_image_headers(self, it: SimpleNamespace, tmp_path: Path, monkeypatch):
        """Tokens of a row, counted without decoding its images, are those of the encoded row; a turned photograph's too."""
        draw = random.Random(it.name)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        examples, talks = [], []
        for n, images in enumerate(it.family.images * 4):
            files = [str(tmp_path / f"{n}.{i}.jpg") for i in range(images)]
            for i, file in enumerate(files):
                size = (draw.randint(28, 150), draw.randint(28, 150))
                zoo.image(n + i, *size).save(file, exif=exif if (n + i) % 2 else b"")
            words = " ".join(draw.choices(["red", " square", "the\n", "photo?", "1."], k=draw.randint(1, 9)))
            question = QUESTIONS[images].replace("?", f" {words}?")
            examples.append(
                row(images, responses=3) | {"images": files, "prompt": [{"role": "user", "content": question}]}
            )
            turns = [*examples[-1]["prompt"], {"role": "assistant", "content": words + " end"}]
            talks.append({"images": files, "messages": turns})
        collators = [
            (it.adapter.dpo_collator(it.processor, share_prefix=it.model.packs), examples),
            (it.adapter.ppo_collator(it.processor), examples),
            (it.adapter.sft_collator(it.processor), talks),
        ]
        expected = [[collator.length(example) for example in of] for collator, of in collators]

        def only_blanks(image: Image.Image) -> Image.Image:
            assert isinstance(image, Image.Image), f"{image} was decoded"
            return image

        monkeypatch.setattr(base.processor, "load_image", only_blanks)
        for (collator, of), lengths in zip(collators, expected, strict=True):
            assert collator.with_lengths(Dataset.from_list(of), "length")["length"][:] == lengths

    # -- flash attention -----------------------------------------------------------------------------------------------

    def test_flash_attention_list_agrees_with_transformers(self, it: SimpleNamespace):
        listed = architecture_of(it.path) in FLASH_ATTN_MODELS
        assert listed == it.native._supports_flash_attn
        with pytest.raises(InputError, match="FlashAttention-2 is not available" if listed else "does not support"):
            load_model(it.path, use_flash_attention_2=True)


@pytest.mark.parametrize("it", [name for name in NAMES if name not in zoo.ONE_ROW_PER_RESPONSE], indirect=True)
class TestPackedRows:
    def test_packed_rewards_equal_single_rows(self, it: SimpleNamespace):
        """A scalar head reads the last token of every response, wherever it stands."""
        torch.manual_seed(0)
        reward_model = it.adapter.reward_model(load_model(it.path)).eval()
        rewards = []
        for share_prefix in (True, False):
            batch = it.adapter.reward_collator(it.processor, share_prefix=share_prefix)(rows(it, 4))
            inputs = it.model.packed_inputs(
                batch["input_ids"], batch["segment_ids"], batch["img_input_dict"], batch["packed"]
            )
            with torch.no_grad():
                rewards.append(reward_model(**inputs, completion_index=last_token_positions(batch["segment_ids"])))
        assert rewards[0].std() > 1e-3
        torch.testing.assert_close(*rewards, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
    @pytest.mark.parametrize("responses", [2, 4])
    def test_packed_rows_give_the_gradients_of_single_rows(
        self, it: SimpleNamespace, responses: int, checkpointing: bool
    ):
        model = lora_model(it).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        gradients = []
        for share_prefix in (True, False):
            batch = collate(it, rows(it, responses), share_prefix)
            with torch.no_grad():
                images = model.get_base_model().encode_images(batch["img_input_dict"])
            logps = response_logps(model, batch, images)
            weights = torch.linspace(-1, 1, len(logps))  # every token has its own weight, as in a loss
            model.zero_grad()
            (logps * weights).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        packed, plain = gradients
        assert plain.norm() > 0
        assert (packed - plain).norm() / plain.norm() < 1e-4


def test_gemma3_beyond_its_window():
    """The rows of the packing test are longer than the sliding window of the tiny model, and the window matters."""
    path = zoo.checkpoint("gemma3")
    processor = core_mapper_for(path).processor(path)
    model = load_model(path).eval()
    batch = VLDPODataCollatorWithPadding(processor)([row(2, 4)])
    assert (batch["segment_ids"] == 0).sum() > model.config.text_config.sliding_window
    with torch.no_grad():
        logps = response_logps(model, batch, batch["img_input_dict"])
        model.config.text_config.sliding_window = 4096
        assert (response_logps(model, batch, batch["img_input_dict"]) - logps).abs().max() > 1e-3


def test_packed_rows_are_switched_off_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Linear attention does not take any mask."""
    argv = (
        f"--model_name_or_path {zoo.checkpoint('qwen3_5')} --dataset_name shapes --output_dir {tmp_path} --use_cpu True"
    )
    parsed = parse(ModelArguments, DataArguments, LoraArguments, DPOConfig, argv=argv.split())
    plan = LoadPlan.of(parsed[0], parsed[2], parsed[3])
    assert "switched off" in caplog.text and not plan.share_prefix
    flags = replace(parsed[0], use_flash_attention_2=True, model_name_or_path=zoo.checkpoint("llava"))
    plan = LoadPlan.of(flags, parsed[2], parsed[3])
    assert (plan.attention, plan.share_prefix) == ("flash_attention_2", True)


def test_the_guide_taken_literally(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """docs/CustomizedModel.md: a folder of any name, all twelve classes given, a collator that makes the image inputs."""
    from base import collator, ppo_trainer, reward, trainer, value
    from models import ModelCoreMapper

    llava = core_mapper_for(zoo.checkpoint("llava"))

    class LlavaDPODataCollatorWithPadding(collator.VLDPODataCollatorWithPadding):
        def __call__(self, features: list[dict]) -> dict:
            padded_batch = super().__call__(features)
            imgs = [Image.open(img_path).convert("RGB") for img_path in padded_batch["img_path"]]
            padded_batch["img_input_dict"] = dict(
                pixel_values=self.processor.image_processor(images=imgs, return_tensors="pt")["pixel_values"]
            )
            return padded_batch

    def empty(base: type) -> type:
        return type("Llava" + base.__name__, (base,), {})

    folder = SimpleNamespace(
        core_mapper=ModelCoreMapper(
            model=llava.model,
            processor=llava.processor,
            dpo_collator=LlavaDPODataCollatorWithPadding,
            dpo_trainer=empty(trainer.VLDPOTrainer),
            reward_model=empty(reward.VLRewardModel),
            value_model=empty(value.VLModelWithValueHead),
            reward_collator=empty(collator.VLRMDataCollatorWithPadding),
            reward_trainer=empty(trainer.VLRMTrainer),
            sft_collator=empty(collator.VLSFTDataCollatorWithPadding),
            sft_trainer=empty(trainer.VLSFTTrainer),
            ppo_collator=empty(collator.VLPPODataCollator),
            ppo_trainer=empty(ppo_trainer.VLPPOTrainer),
        )
    )
    monkeypatch.setitem(sys.modules, "models.Any Name", folder)
    monkeypatch.setitem(MODEL_NICKNAME_MAP, "LlavaForConditionalGeneration", "Any Name")
    mapper = core_mapper_for(zoo.checkpoint("llava"))
    assert mapper is folder.core_mapper
    picture(0).save(tmp_path / "0.png")
    rows = [row(1) | {"images": [str(tmp_path / "0.png")]}]
    processor = mapper.processor(zoo.checkpoint("llava"))
    ours, inherited = mapper.dpo_collator(processor)(rows), llava.dpo_collator(processor)(rows)
    assert ours.keys() == inherited.keys()
    assert torch.equal(ours["img_input_dict"]["pixel_values"], inherited["img_input_dict"]["pixel_values"])


LOAD_WITHOUT_PROJECT = """
import os, sys, torch
if torch.version.cuda is None:  # see common/compat.py
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"): library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert hasattr(AutoProcessor.from_pretrained(folder), "image_processor"), folder
    print(type(model).__name__)
assert not any(name in sys.modules for name in ("base", "models")), "the project was imported"
"""


def test_saved_checkpoints_load_without_this_project(tmp_path: Path):
    names = [
        n for n in NAMES if native_class(core_mapper_for(zoo.checkpoint(n)).model).__module__[:13] == "transformers."
    ]
    for name in names:
        path = zoo.checkpoint(name)
        load_model(path).save_pretrained(tmp_path / name)
        core_mapper_for(path).processor(path).save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PROJECT, *(str(tmp_path / name) for name in names)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [architecture_of(zoo.checkpoint(name)) for name in names]


# -- the scripts ---------------------------------------------------------------------------------------------------------

SCRIPTS = sorted(path.stem for path in Path(__file__).parents[1].glob("train_*.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of three shapes, conversations.json and pairs.json: one image and one question per row."""
    folder = tmp_path_factory.mktemp("files")
    conversations, pairs = [], []
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
        prompt, chosen, rejected = QUESTIONS[1] + " photo" * i, ANSWERS[i], ANSWERS[(i + 1) % 4]
        turns = [{"from": "user", "value": "<image>\n" + prompt}, {"from": "assistant", "value": chosen}]
        conversations.append({"image": f"{i}.png", "conversations": turns})
        pairs.append({"image": f"{i}.png", "prompt": prompt, "chosen": chosen, "rejected": rejected})
    (folder / "conversations.json").write_text(json.dumps(conversations))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "reward.py").write_text(
        "def letters(images, prompts, responses):\n    return [float(sum(c.isalpha() for c in r)) for r in responses]\n"
    )
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_two_steps(script: str, mode: str, name: str, files: Path, tmp_path: Path):
    """Loss finite, the vision tower bit-equal, what trains moved, the saved model still looks at the image."""
    path = zoo.checkpoint(name)
    data = "vlquery_json conversations" if script == "train_sft" else "plain_dpo pairs"
    dataset, file = data.split()
    command = (
        f"--model_name_or_path {path} --dataset_name {dataset} --data_path {files}/{file}.json --image_root {files} "
        f"--output_dir {tmp_path} --max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-3 --save_strategy no "
        f"--disable_tqdm True --use_cpu True --seed 0"
    ).split()
    if mode == "lora":
        command += ["--use_lora", "True", "--lora_r", "4"]
    if script == "train_ppo":
        command += ["--reward_fn", f"{files}/reward.py:letters", "--response_length", "6"]
        command += ["--rollouts_per_prompt", "2", "--per_device_train_batch_size", "4"]  # two prompts with two answers
    importlib.import_module(script).main(command)

    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
    before, after = load_model(path).eval(), load_model(str(tmp_path)).eval()
    if mode == "lora":
        assert any(weight.any() for key, weight in after.named_parameters() if "lora_B" in key)
        after = after.merge_and_unload()
    tower = {id(p) for p in before.get_vision_tower().parameters()}
    if part := FAMILIES[name].trains_on:
        tower -= {id(p) for p in before.get_vision_tower().get_submodule(part).parameters()}
    same = {
        key: torch.equal(old, new)
        for (key, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
    }
    assert all(same[key] for key, weight in before.named_parameters() if id(weight) in tower)
    assert not all(same.values())
    processor = core_mapper_for(path).processor(str(tmp_path))
    collator = VLDPODataCollatorWithPadding(processor, share_prefix=False)
    batches = [collator([row(1, seed=seed)]) for seed in (0, 3)]
    with torch.no_grad():
        logps = [response_logps(after, batch, batch["img_input_dict"]) for batch in batches]
    assert (logps[0] - logps[1]).abs().max() > 1e-3
