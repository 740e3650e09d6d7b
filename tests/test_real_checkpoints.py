"""Published checkpoints x checks, from their small files (tests/real.py): configuration, index, template, processor settings.

The models have the published depth and names and small widths; the tokenizers are those of the tiny checkpoints, as neither
image tokens nor rendered texts depend on the vocabulary.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

import base.loading
from args import LoraArguments
from base.loading import load_model
from base.processor import IGNORE_INDEX, VLProcessor
from common.compat import write_hub_names
from common.errors import InputError
from models import core_mapper_for
from models.assemble import add_lora
from tests import zoo
from tests.real import FAMILY_OF, FOLDER, needs_files, template_of

pytestmark = needs_files


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint from its card and files, counted by hand.

    Attributes:
        layers: of the language model; LoRA `auto` adapts seven modules in each.
        tensors: in its index; without one, of its parts: the layers' weights and biases, embeddings, norms, projector.
        head: whether it can write text.
        tied: whether the head is the embeddings, and not stored.
        levels: beginnings of its tensors' names, where no index is at hand.
    """

    layers: int
    tensors: int
    head: bool = True
    tied: bool = False
    levels: tuple[str, ...] = ()


FACTS = {
    "llava-1.5-7b-hf": Facts(32, 686),
    "olmOCR-7B-Qwen2-VL": Facts(28, 730),
    "AIN-7B-Qwen2-VL": Facts(28, 730),
    "Qwen2.5-VL-7B-Instruct": Facts(28, 729),
    "Cosmos-Reason2-Qwen3-VL": Facts(36, 750),
    "Qwen3-VL-Embedding": Facts(36, 749, head=False),
    "medgemma-27b-it": Facts(62, 1247, tied=True),
    # SigLIP: 27 x 16 + 5, projector: 2, Gemma: 18 x 9 + 2
    "paligemma-3b": Facts(
        18,
        603,
        tied=True,
        levels=("language_model.model.", "multi_modal_projector.linear.", "vision_tower.vision_model."),
    ),
}
EXPECTED = [*(name for name in FACTS if name != "paligemma-3b"), "llava-v1.6-mistral-7b-hf"]  # with an expected.json
WIDTHS = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "vocab_size": 1024,
    "num_position_embeddings": 64,
    "mrope_section": [2, 1, 1],
}
# Where a configuration leaves the class's default, which is the width of the published model
DEFAULTS = {
    "llava": {"text_config": ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]},
    "qwen2_vl": {"vision_config": ["embed_dim", "hidden_size", "num_heads"]},
}


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """A published configuration with small widths."""
    small = {}
    for key, value in config.items():
        if isinstance(value, dict):
            small[key] = narrow(value)
        elif key == "head_dim":
            small[key] = 8
        else:
            small[key] = WIDTHS.get(key, value)
    for part, names in DEFAULTS.get(config.get("model_type", ""), {}).items():
        if part in small:
            small[part] |= {name: WIDTHS[name] for name in names}
    return small


def folder_of(name: str, folder: Path) -> Path:
    """Its configuration, narrow, its template and processor settings, with the tokenizer of the tiny checkpoint."""
    folder.mkdir()
    for file in (FOLDER / name).iterdir():
        if file.name in (
            "preprocessor_config.json",
            "video_preprocessor_config.json",
            "processor_config.json",
            "generation_config.json",
        ):
            shutil.copy(file, folder)
    if (FOLDER / name / "config.json").is_file():
        config = narrow(json.loads((FOLDER / name / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config))
    tiny = Path(zoo.checkpoint(FAMILY_OF[name]))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder)
    if not (folder / "config.json").is_file():
        shutil.copy(tiny / "config.json", folder)
    if (template := template_of(name)) is not None:
        (folder / "chat_template.jinja").write_text(template)
    elif (tiny / "chat_template.jinja").is_file():  # Llama's is not among the files
        shutil.copy(tiny / "chat_template.jinja", folder)
    return folder


def check_names(name: str, names: set[str]) -> None:
    """Names of tensors are those of the published index; without one, as many, with the hub's beginnings."""
    facts, index = FACTS[name], FOLDER / name / "model.safetensors.index.json"
    if index.is_file():
        assert names == set(json.loads(index.read_text())["weight_map"])
    else:
        assert {level for level in facts.levels for n in names if n.startswith(level)} == set(facts.levels)
        assert all(n.startswith(facts.levels) for n in names)
    assert len(names) == facts.tensors


@pytest.fixture(scope="module", params=FACTS)
def it(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Name and folder of a checkpoint, with random weights under the names of the published index."""
    name = request.param
    folder = folder_of(name, tmp_path_factory.mktemp("real") / name)
    config = AutoConfig.from_pretrained(folder)
    native = next(
        c for c in core_mapper_for(str(folder)).model.__mro__ if c.__module__.startswith("transformers.models")
    )
    torch.manual_seed(0)
    model = native(config)
    write_hub_names(model)
    model.save_pretrained(folder / "weights")
    weights = load_file(folder / "weights" / "model.safetensors")
    if not FACTS[name].head:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder / "weights")
    yield name, folder
    shutil.rmtree(folder)


def test_names_are_those_of_the_index_and_stay_so(it: tuple[str, Path], tmp_path: Path):
    name, folder = it
    weights = load_file(folder / "model.safetensors")
    check_names(name, set(weights))
    if not FACTS[name].head:
        with pytest.raises(InputError, match=r"has no lm_head\.weight.*embedding models"):
            load_model(str(folder))
        return
    model = load_model(str(folder))
    model.save_pretrained(tmp_path)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == FACTS[name].tied
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], weights[n].to(again[n].dtype)) for n in weights)  # in the published dtype
    for a, b in zip(load_model(str(tmp_path)).parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lora_tower_and_quantisation(it: tuple[str, Path], tmp_path: Path):
    """LoRA is in the language model only, the tower freezes whole, and 4 bits touch the language model's layers only."""
    name, folder = it
    facts = FACTS[name]
    if not facts.head:
        pytest.skip("refused, see above")
    model = load_model(str(folder))
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    linear = {n: id(m) in inside for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    model.freeze_vision_tower()
    tower = {id(p) for p in model.get_vision_tower().parameters()}
    assert tower and all(p.requires_grad != (id(p) in tower) for p in model.parameters())
    settings = base.loading._quantisation(type(model), str(folder), 4, torch.float32)
    assert set(settings.llm_int8_skip_modules) == {n for n, in_decoder in linear.items() if not in_decoder}
    adapted = add_lora(model, LoraArguments(use_lora=True, lora_r=2))
    names = [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")]
    assert len(names) == 7 * facts.layers and all(linear[n] for n in names)
    adapted.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    saved = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, saved[n]) for n, p in again.named_parameters() if "lora_" in n)


# -- processors ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXPECTED)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, VLProcessor]:
    """What plain transformers made of a checkpoint's files, and our processor."""
    folder = folder_of(request.param, tmp_path_factory.mktemp("processor") / request.param)
    expected = json.loads((FOLDER / request.param / "expected.json").read_text())
    return expected, core_mapper_for(str(folder)).processor(str(folder))


def test_lengths(seen: tuple[dict, VLProcessor]):
    """Image tokens of a picture by its size, counted and encoded."""
    expected, processor = seen
    token = processor.tokenizer.convert_tokens_to_ids(expected["image_token"])
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    for size, count in expected["image tokens of one picture, by width x height"].items():
        picture = Image.new("RGB", tuple(map(int, size.split("x"))))
        ids = processor.encode_conversations([messages], [[picture]])[0][0]
        assert ids.count(token) == count, size
        with processor.lengths_only():
            assert len(processor.encode_conversations([messages], [[picture]])[0][0]) == len(ids), size


def test_prompts(seen: tuple[dict, VLProcessor]):
    expected, processor = seen
    for kind, case in expected["rendered"].items():
        messages = case["messages"]
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = case["prompt"]
        if processor.answer_end == "</s>" and "</s>" not in case["whole"]:  # LLaVA-1.5 prints no end of an answer
            for message in asked:
                if message["role"] == "assistant":
                    answer = message["content"][0]["text"]
                    text = text.replace(f"{answer} ", f"{answer}</s>")
        assert processor.render(asked, add_generation_prompt=True) == text, kind


def test_labels(seen: tuple[dict, VLProcessor]):
    """Every answer and its end are trained, and nothing else."""
    expected, processor = seen
    picture = Image.new("RGB", (50, 40))
    for kind, case in expected["rendered"].items():
        messages = case["messages"]
        answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
        if messages[-1]["role"] != "assistant":
            continue
        images = sum(part["type"] == "image" for m in messages for part in m["content"])
        encoded = processor.process_batch_conv([messages], [[picture] * images])
        trained = [label for label in encoded["labels"][0] if label != IGNORE_INDEX]
        texts = [text.strip() for text in processor.tokenizer.decode(trained).split(processor.answer_end)]
        assert texts == [*(answer.strip() for answer in answers), ""], kind
        assert trained[-len(processor.template.answer_end_ids) :] == processor.template.answer_end_ids


def test_saved_processors_load_again(seen: tuple[dict, VLProcessor], tmp_path: Path):
    _, processor = seen
    processor.save_pretrained(tmp_path)
    again = type(processor)(str(tmp_path))
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    picture = [[zoo.image(0, 300, 200)]]
    (ours, pixels), (theirs, same) = (p.encode_conversations([messages], picture) for p in (processor, again))
    assert ours == theirs and torch.equal(pixels["pixel_values"], same["pixel_values"])


def test_paligemmas_prompt_is_plain_transformers(tmp_path: Path):
    """1,024 image tokens of a picture of any size, the beginning of the text, the question and a line break."""
    folder = folder_of("paligemma-3b", tmp_path / "it")
    native, processor = AutoProcessor.from_pretrained(folder), core_mapper_for(str(folder)).processor(str(folder))
    for size in ((448, 448), (37, 900)):
        picture = Image.new("RGB", size, "red")
        messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
        (ids,), pixels = processor.encode_conversations([messages], [[picture]])
        expected = native(text="<image>What is this?", images=picture, return_tensors="pt")
        assert ids == expected["input_ids"][0].tolist()
        assert ids[:1025] == [native.image_token_id] * 1024 + [native.tokenizer.bos_token_id]
        assert torch.equal(pixels["pixel_values"], expected["pixel_values"])


def test_tiles_of_llama(tmp_path: Path):
    """One token stands for a picture; up to four tiles of 560 are the smallest canvas that need not shrink it."""
    folder = folder_of("Llama-3.2-11B-Vision-Instruct", tmp_path / "it")
    processor = core_mapper_for(str(folder)).processor(str(folder))
    for size, tiles in {(560, 560): 1, (400, 300): 1, (1120, 560): 2, (500, 1000): 2, (1000, 1000): 4}.items():
        messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
        (ids,), inputs = processor.encode_conversations([messages], [[Image.new("RGB", size)]])
        assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|image|>")) == 1
        assert inputs["aspect_ratio_mask"].sum() == tiles, size
        assert inputs["pixel_values"].shape == (1, 1, 4, 3, 560, 560)


# -- adapters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, base_name",
    [("llava-1.5-adapter-t5", "llava-1.5-7b-hf"), ("pdfme-Qwen3-VL-adapter", "Cosmos-Reason2-Qwen3-VL")],
)
def test_adapters(name: str, base_name: str, tmp_path: Path):
    """Settings of published adapters, whose bare target names hit the tower, too: every weight is found again."""
    base = folder_of(base_name, tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    core_mapper_for(str(base)).model(config).save_pretrained(base)
    settings = PeftConfig.from_pretrained(FOLDER / name)
    settings.base_model_name_or_path = str(base)
    model = get_peft_model(load_model(str(base)), settings)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        (FOLDER / name / "adapter_config.json").read_text().replace(settings_base(name), str(base))
    )
    shutil.copy(FOLDER / name / "processor_config.json", tmp_path / "adapter")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template_of(name))
    again = load_model(str(tmp_path / "adapter"))
    weights = dict(model.named_parameters())
    found = {n: p for n, p in again.named_parameters() if "lora_B" in n}
    assert found and all(torch.equal(p, weights[n]) for n, p in found.items())
    processor = core_mapper_for(str(tmp_path / "adapter")).processor(str(tmp_path / "adapter"))
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    tokens = json.loads((FOLDER / base_name / "expected.json").read_text())[
        "image tokens of one picture, by width x height"
    ]
    ids = processor.encode_conversations([messages], [[Image.new("RGB", (640, 480))]])[0][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(processor.image_token)) == tokens["640x480"]


def settings_base(name: str) -> str:
    """The base that a published adapter names."""
    return json.loads((FOLDER / name / "adapter_config.json").read_text())["base_model_name_or_path"]
