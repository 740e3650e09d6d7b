"""Qwen-VL and InternLM-XComposer2 against the original code (tests/goldens/legacy), and their converters.

What every family must do is in test_models.py. These tests cover what only these two have: an original layout to
convert from and to, extrapolation beyond the training length, partial LoRA.
"""

import functools
import importlib
import itertools
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import regex
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import train_sft
from base import packing
from base.loading import load_model
from common.errors import InputError
from models import core_mapper_for
from models.checkpoint_io import Rule, TensorReader
from models.internlm_xcomposer2.configuration import InternLMXComposer2Config
from models.internlm_xcomposer2.processing import build_tokenizer
from models.qwen_vl.processing import read_ranks
from tests import zoo

GOLDENS = Path(__file__).parent / "goldens" / "legacy"
FAMILIES = ["qwen_vl", "internlm_xcomposer2"]
LOGITS = dict(atol=5e-5, rtol=0)


def convert_of(family: str) -> ModuleType:
    return importlib.import_module(f"models.{family}.convert")


def run_cli(family: str, *arguments: str | Path) -> None:
    """The converter's command line, in this process."""
    module = convert_of(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"convert_{family}", *map(str, arguments)])
        module.main(module.__doc__, module.__name__, module.convert, module.revert, [])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's golden checkpoint in the native layout. Read only."""
    folders: dict[str, Path] = {}

    def convert(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("native") / family
            run_cli(family, GOLDENS / family, folders[family])
        return folders[family]

    return convert


@pytest.fixture(scope="module", params=FAMILIES)
def it(request: pytest.FixtureRequest, converted: Callable[[str], Path]) -> SimpleNamespace:
    """A family's goldens (`case(...)` gives tensors), its converted checkpoint and the model in float32."""
    family = request.param
    arrays = np.load(GOLDENS / family / "golden.npz")

    def tensor(name: str) -> torch.Tensor:
        array = torch.from_numpy(arrays[name])
        return array.long() if array.dtype in (torch.int8, torch.int32) else array

    def inputs(case: str) -> dict[str, torch.Tensor]:
        images = arrays[f"{case}.images"].tolist()
        pixels = {"pixel_values": tensor("pixel_values")[images]} if images else {}
        return {"input_ids": tensor(f"{case}.input_ids"), "attention_mask": tensor(f"{case}.attention_mask"), **pixels}

    path = converted(family)
    names = sorted({name.split(".")[0] for name in arrays.files if name.endswith((".loss", ".tokens"))})
    return SimpleNamespace(
        family=family,
        source=GOLDENS / family,
        path=path,
        convert=convert_of(family),
        texts=json.loads((GOLDENS / family / "golden.json").read_text()),
        tensor=tensor,
        inputs=inputs,
        gradients=[name.removeprefix("grad.") for name in arrays.files if name.startswith("grad.")],
        forward_cases=[name for name in names if not name.startswith("gen_")],
        generation_cases=[name for name in names if name.startswith("gen_")],
        model=AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval(),
        processor=core_mapper_for(str(path)).processor(str(path)),
    )


def in_original_names(tensors: dict[str, torch.Tensor], rules: list[Rule]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for rule in rules
        if all(new in tensors for new in rule.new)
        for name, tensor in zip(rule.old, rule.revert(*(tensors[new] for new in rule.new)), strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of the original code


def test_image_features(it: SimpleNamespace):
    features = torch.stack(it.model.get_image_features(pixel_values=it.tensor("pixel_values")).pooler_output)
    expected = it.tensor("image_features")
    if it.family == "qwen_vl":
        features = features[:, it.tensor("image_features_rows")]
    torch.testing.assert_close(features[: len(expected)], expected, atol=2e-5, rtol=0)


def test_forward(it: SimpleNamespace):
    """Logits, log-probs of the labels and of every text token, loss: single, padded left and right, text only, mixed,
    several images and, for Qwen-VL, beyond the training length in eval and train mode."""
    assert {"single", "left", "right", "text", "mixed"} < set(it.forward_cases)
    for case in it.forward_cases:
        labels, positions = it.tensor(f"{case}.labels"), it.tensor(f"{case}.logits_pos")
        it.model.train(case == "long_train")
        with torch.no_grad():
            output = it.model(**it.inputs(case), labels=labels)
        it.model.eval()
        logits = output.logits[positions[:, 0], positions[:, 1]]
        torch.testing.assert_close(logits, it.tensor(f"{case}.logits"), **LOGITS, msg=lambda m, c=case: f"{c}: {m}")
        assert float(output.loss) == pytest.approx(float(it.tensor(f"{case}.loss")), abs=1e-5), case
        logps = output.logits[:, :-1].log_softmax(-1)
        for name, targets in {"label": labels, "next": it.tensor(f"{case}.input_ids")}.items():
            expected = it.tensor(f"{case}.{name}_logps")
            found = logps.gather(-1, targets[:, 1:, None].clamp(0, logps.shape[-1] - 1))[..., 0]
            torch.testing.assert_close(found * (expected != 0), expected, **LOGITS)


def test_greedy_generation(it: SimpleNamespace):
    """With a cache; Qwen-VL also from beyond the training length, and across it while decoding."""
    for case in it.generation_cases:
        inputs = it.inputs(case)
        output = it.model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            top_k=None,
            top_p=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(tokens, it.tensor(f"{case}.tokens")), case
        best = torch.stack([step.amax(-1) for step in output.logits], dim=1)
        torch.testing.assert_close(best, it.tensor(f"{case}.step_max"), **LOGITS)
        torch.testing.assert_close(output.logits[-1], it.tensor(f"{case}.last_logits"), **LOGITS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(it: SimpleNamespace, checkpointing: bool):
    """Two gradients and the norm of every other."""
    if checkpointing:
        it.model.gradient_checkpointing_enable()
        it.model.train()  # gradient checkpointing needs it; the numbers must not depend on it
        for module in it.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    it.model.zero_grad()
    it.model(**it.inputs("single"), labels=it.tensor("single.labels")).loss.backward()
    it.model.gradient_checkpointing_disable()
    it.model.eval()
    native = {name: p.grad for name, p in it.model.named_parameters() if p.grad is not None}
    found = in_original_names(native, it.convert.rules(it.model.config))
    for name in it.gradients:
        torch.testing.assert_close(found[name], it.tensor(f"grad.{name}"), atol=1e-5, rtol=0)
    expected = {name: norm for name, norm in it.texts["grad_norms"].items() if norm is not None}
    assert set(found) == set(expected)
    for name, norm in expected.items():
        assert float(found[name].norm()) == pytest.approx(norm, rel=2e-5, abs=1e-7), name


# ---------------------------------------------------------------------------------------------------------------------
# Text and pixels


def test_pixels(it: SimpleNamespace):
    """RGB, RGBA and grey."""
    images = [Image.open(it.source / name) for name in it.texts["images"]]
    pixels = it.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, it.tensor("pixel_values"))


def test_tokenizer(it: SimpleNamespace):
    """Ids and texts of awkward strings."""
    tokenizer = it.processor.tokenizer
    for case in it.texts["tokenizer"]:
        assert tokenizer(case["text"], add_special_tokens=False).input_ids == case["ids"]
        plain, skipped = tokenizer.decode(case["ids"]), tokenizer.decode(case["ids"], skip_special_tokens=True)
        if it.family == "qwen_vl":
            assert (plain, skipped) == (case["decoded"], case["decoded_skip_special"])
        else:
            # The original keeps its turn marks when special tokens are skipped and puts spaces around special tokens.
            without_marks = re.sub(r"\[UNUSED_TOKEN_14[56]\]", "", case["pieces_decoded"])
            assert skipped == without_marks
    for case in it.texts.get("decode_only", []):
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    ids = tokenizer.convert_tokens_to_ids(list(it.texts["special_ids"]))
    assert ids == list(it.texts["special_ids"].values())


def byte_pair_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm, slowly: NFC, split, and in every part merge the pair of lowest rank until none is left."""
    ids = []
    for part in regex.findall(PRETOKENIZE_REGEX, unicodedata.normalize("NFC", text)):
        pieces = [bytes([byte]) for byte in part.encode()]
        while len(pieces) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(pieces)]
            if (best := min(pairs)) == len(ranks):
                break
            at = pairs.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids += [ranks[piece] for piece in pieces]
    return ids


def test_tokenizer_on_random_texts(it: SimpleNamespace):
    """Against sentencepiece itself and against the merges by rank."""
    random = np.random.default_rng(0)
    alphabet = [*"aeinorst AB019.,'\n\t  ", *"éïñ́ç", *"图片猫浦语", *"🐈🏽", "the ", "image ", "\r\n", "  ", "▁"]
    if it.family == "qwen_vl":
        reference = functools.partial(byte_pair_ids, ranks=read_ranks(it.source / "qwen.tiktoken"))
    else:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(it.source / "tokenizer.model")).encode
        alphabet.append("[UNUSED_TOKEN_145]")
    for _ in range(300):
        text = "".join(random.choice(alphabet, random.integers(1, 40)))
        assert it.processor.tokenizer(text, add_special_tokens=False).input_ids == reference(text), repr(text)


def test_another_tokenizer_model_is_refused(tmp_path: Path):
    proto = SentencePieceExtractor(str(GOLDENS / "internlm_xcomposer2" / "tokenizer.model")).proto
    for section, field in (("normalizer_spec", "add_dummy_prefix"), ("normalizer_spec", "remove_extra_whitespaces")):
        changed = type(proto)()
        changed.CopyFrom(proto)
        setattr(getattr(changed, section), field, True)
        (tmp_path / field).write_bytes(changed.SerializeToString())
        with pytest.raises(ValueError, match=r"not InternLM2's tokenizer"):
            build_tokenizer(tmp_path / field)


def test_conversations(it: SimpleNamespace):
    """Text, ids and labels of the chat format. The line break after the last end token, which is neither predicted nor
    read, is not written."""
    image_token = it.processor.tokenizer.convert_tokens_to_ids(it.processor.image_token)
    repeat = it.processor.processor.num_image_tokens if it.family == "internlm_xcomposer2" else 1
    for case in it.texts["chat"]:
        turns = [{"role": t["from"], "content": t["value"]} for t in case["conversation"]]
        if case["name"] == "two_images_placeholders" and it.family == "qwen_vl":
            # Bare pictures inside a sentence; our template numbers them, as the hub's `from_list_format` does.
            text = re.sub(r"<img>.*?</img>", "<img><imgpad></img>", case["text"])
            rows, _ = it.processor.encode_prompts([text], [[str(it.source / name) for name in case["images"]]])
            assert rows == [case["ids"]]
            continue
        for turn in turns:
            turn["content"] = re.sub(r"Picture \d: <img>.*?</img>\n|<ImageHere>", "<image>", turn["content"])
        ids, labels = [], []
        for token, label in zip(case["ids"], case["labels"], strict=True):  # the golden's placeholders are not expanded
            ids += [token] * (repeat if token == image_token else 1)
            labels += [label] * (repeat if token == image_token else 1)
        images = [[str(it.source / name) for name in case["images"]]]
        if turns[-1]["content"] == "":
            text = it.processor.render(turns[:-1], add_generation_prompt=True)
            it.processor.infer()
            assert it.processor(convs=[turns[:-1]], images=images)["input_ids"].tolist() == [ids]
            it.processor.train()
        else:
            text = it.processor.render(turns) + "\n"  # behind the last end nothing is trained
            batch = it.processor(convs=[turns], images=images)
            assert batch["input_ids"].tolist() == [ids[:-1]] and batch["labels"].tolist() == [labels[:-1]]
            assert labels[-1] == -100
        placeholder = re.sub(r"<img>.*?</img>", "<img><imgpad></img>", case["text"])
        assert text.removeprefix("<s>") == placeholder


def test_generation_stops_at_the_end_of_a_turn(it: SimpleNamespace):
    special, ends = it.texts["special_ids"], it.model.generation_config.eos_token_id
    end = special["<|im_end|>"] if it.family == "qwen_vl" else special["[UNUSED_TOKEN_145]"]
    assert end in ends and it.processor.encode_response("A cat.")[-1] == end


def test_numbered_pictures():
    processor = core_mapper_for(zoo.checkpoint("qwen_vl")).processor(zoo.checkpoint("qwen_vl"))
    prompt = processor.format_multimodal_prompt("Compare.", ["a.png", "b.png"])
    assert prompt == "Picture 1: <img><imgpad></img>\nPicture 2: <img><imgpad></img>\nCompare."
    assert processor.remove_image_placeholder(prompt) == "Compare."
    conversation = [{"role": "user", "content": prompt}]
    assert prompt in processor.render(conversation, images=2)
    messages = [{"role": "user", "content": "<image>Compare."}, {"role": "user", "content": "And <image>?"}]
    assert re.findall(r"Picture \d", processor.render(messages)) == ["Picture 1", "Picture 2"]


# ---------------------------------------------------------------------------------------------------------------------
# Converting


def test_there_and_back_is_bit_exact_in_small_shards(it: SimpleNamespace, tmp_path: Path):
    """Weights, config.json and tokenizer files come back as they were, through many shards both ways."""
    native, original = tmp_path / "native", tmp_path / "original"
    run_cli(it.family, it.source, native, "--max_shard_gb", 1e-4)
    assert len(list(native.glob("model-*.safetensors"))) >= 4
    assert all(
        f.stat().st_size < 1e-4 * 2**30 + 80_000 for f in native.glob("*.safetensors")
    )  # one tensor more at most
    run_cli(it.family, native, original, "--max_shard_gb", 1e-4, "--reverse")
    before, after = TensorReader(it.source), TensorReader(original)
    assert before.names() == after.names()
    for name in before.names():
        assert torch.equal(before.read(name), after.read(name)) and before.read(name).dtype == after.read(name).dtype
    configs = [json.loads((folder / "config.json").read_text()) for folder in (it.source, original)]
    for config in configs:
        config.pop("transformers_version", None)
        config.pop("use_flash_attn", None)
        config.get("visual", {}).pop("mlp_ratio", None)
    assert configs[0] == configs[1]
    vocabulary = "qwen.tiktoken" if it.family == "qwen_vl" else "tokenizer.model"
    assert (it.source / vocabulary).read_bytes() == (original / vocabulary).read_bytes()


def test_max_length_of_xcomposer2_survives_the_way_there_and_back(tmp_path: Path):
    original = json.loads((GOLDENS / "internlm_xcomposer2" / "config.json").read_text()) | {"max_length": 8192}
    convert = convert_of("internlm_xcomposer2")
    convert.to_native_config(original).save_pretrained(tmp_path)
    assert convert.to_original_config(InternLMXComposer2Config.from_pretrained(tmp_path))["max_length"] == 8192


def test_saved_models_convert_back(it: SimpleNamespace, tmp_path: Path):
    """A checkpoint that training wrote (here: by the adapter's class) keeps the native layout, and goes back."""
    model = load_model(str(it.path))
    model.save_pretrained(tmp_path / "native")
    it.processor.save_pretrained(tmp_path / "native")
    assert (
        load_file(tmp_path / "native" / "model.safetensors").keys() == load_file(it.path / "model.safetensors").keys()
    )
    if it.family == "internlm_xcomposer2":
        with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.model"):
            it.convert.revert(tmp_path / "native", tmp_path)
        shutil.copy(it.path / "tokenizer.model", tmp_path / "native")
    run_cli(it.family, tmp_path / "native", tmp_path / "original", "--reverse")
    before, after = TensorReader(it.source), TensorReader(tmp_path / "original")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    assert tokenizer.get_vocab() == it.processor.tokenizer.get_vocab()


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint with its tensors edited in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.update({"surprise.weight": torch.zeros(1)}), r"holds surprise\.weight, which"),
        (lambda t: t.pop(sorted(t)[0]), "lacks "),
        (lambda t: t.update({k: t[k][:, :-1].clone() for k in t if k.endswith(("wte.weight", "tok_embeddings.weight"))}),
         "embed_tokens.weight comes out as"),
    ],
    ids=["unknown", "missing", "shape"],
)  # fmt: skip
def test_a_wrong_tensor_is_named_and_nothing_stays(
    it: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, edit: Callable, message: str
):
    source = edited(it.source, tmp_path / "source", edit)
    with pytest.raises(SystemExit) as stop:
        run_cli(it.family, source, tmp_path / "out")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, printed) and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_computed_buffers_are_dropped(it: SimpleNamespace, tmp_path: Path):
    names = {
        "qwen_vl": "transformer.rotary_emb.inv_freq",
        "internlm_xcomposer2": "vit.vision_tower.vision_model.embeddings.position_ids",
    }
    source = edited(it.source, tmp_path / "source", lambda t: t.update({names[it.family]: torch.zeros(3)}))
    run_cli(it.family, source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(it.path / "model.safetensors").keys()


def test_weights_in_torch_archives(it: SimpleNamespace, tmp_path: Path):
    """The public weights come as `pytorch_model-0000n-of-0000m.bin`: read without unpickling, transposed views included."""
    source = tmp_path / "source"
    shutil.copytree(it.source, source, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(it.source / "model.safetensors")
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]].t().contiguous().t()
    tensors[names[1]] = torch.nn.Parameter(tensors[names[1]])
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for number, half in enumerate(halves, start=1):
        torch.save({name: tensors[name] for name in half}, source / f"pytorch_model-{number:05d}-of-00002.bin")
    weight_map = {
        name: f"pytorch_model-{n:05d}-of-00002.bin" for n, half in enumerate(halves, start=1) for name in half
    }
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run_cli(it.family, source, tmp_path / "out")
    expected, found = load_file(it.path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"names pytorch_model-00002-of-00002\.bin"):
        TensorReader(source)


class Bomb:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_an_archive_that_calls_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save({"a": torch.zeros(2), "b": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"wants to call .*print"):
        TensorReader(tmp_path)
    torch.save({"a": [1]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not read"):
        TensorReader(tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_that_exists_is_not_touched(family: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit):
        run_cli(family, GOLDENS / family, tmp_path)
    assert "exists" in capsys.readouterr().err and [f.name for f in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("qwen_vl", {"rotary_pct": 0.5}, "rotary_pct"),
        ("internlm_xcomposer2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ("internlm_xcomposer2", {"bias": True}, "bias"),
    ],
)
def test_settings_that_the_port_lacks_are_refused(family: str, change: dict, message: str):
    original = json.loads((GOLDENS / family / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        convert_of(family).to_native_config(original | change)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_original_checkpoint_names_the_command(family: str):
    """Whether the scripts load it or transformers alone."""
    command = rf"python -m models\.{family}\.convert"
    with pytest.raises(InputError, match=command):
        core_mapper_for(str(GOLDENS / family))
    with pytest.raises(ValueError, match=command):
        AutoConfig.from_pretrained(GOLDENS / family)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of the public models


@pytest.mark.parametrize(
    "family, total, part, of_part",
    [
        ("qwen_vl", 9_656_935_168, "model.vision_tower", 1_935_610_624),
        ("internlm_xcomposer2", 8_666_840_064, "model.vision_tower", 304_172_032),
    ],
)
def test_public_sizes(family: str, total: int, part: str, of_part: int):
    """A configuration with the public numbers gives the public number of parameters (LEGACY counts)."""
    module = importlib.import_module(f"models.{family}.modeling")
    model_class = next(v for k, v in vars(module).items() if k.endswith("Generation") and hasattr(v, "config_class"))
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    tensors = {name: t.numel() for name, t in model.state_dict().items()}
    assert sum(tensors.values()) == total
    assert sum(n for name, n in tensors.items() if name.startswith(part)) == of_part
    if family == "internlm_xcomposer2":
        assert sum(n for name, n in tensors.items() if "plora" in name) == 603_979_776


PUBLIC_SHAPES = {
    "qwen_vl": {
        "transformer.wte.weight": (151936, 4096),
        "transformer.h.31.attn.c_attn.weight": (12288, 4096),
        "transformer.h.31.attn.c_attn.bias": (12288,),
        "transformer.h.31.mlp.w1.weight": (11008, 4096),
        "transformer.h.31.mlp.c_proj.weight": (4096, 11008),
        "transformer.visual.conv1.weight": (1664, 3, 14, 14),
        "transformer.visual.positional_embedding": (256, 1664),
        "transformer.visual.transformer.resblocks.47.attn.in_proj.weight": (4992, 1664),
        "transformer.visual.transformer.resblocks.47.mlp.c_fc.weight": (8192, 1664),
        "transformer.visual.attn_pool.query": (256, 4096),
        "transformer.visual.attn_pool.kv_proj.weight": (4096, 1664),
        "transformer.visual.attn_pool.attn.in_proj_weight": (12288, 4096),
        "transformer.visual.proj": (4096, 4096),
    },
    "internlm_xcomposer2": {
        "model.tok_embeddings.weight": (92544, 4096),
        "model.layers.31.attention.wqkv.weight": (6144, 4096),
        "model.layers.31.attention.wqkv.Plora_A.weight": (256, 4096),
        "model.layers.31.attention.wqkv.Plora_B.weight": (6144, 256),
        "model.layers.31.feed_forward.w2.Plora_A.weight": (256, 14336),
        "model.layers.31.feed_forward.w3.weight": (14336, 4096),
        "vit.vision_tower.vision_model.embeddings.position_embedding.weight": (1226, 1024),
        "vit.vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
        "vision_proj.0.weight": (4096, 1024),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_public_names_and_shapes(family: str):
    """The converter's rules at the public sizes: every native tensor once, and the published shapes on the other side."""
    module = convert_of(family)
    original = json.loads((GOLDENS / family / "config.json").read_text())
    config_class = type(module.to_native_config(original))
    rules, native = module.rules(config_class()), module.native_shapes(config_class())
    assert sorted(name for rule in rules for name in rule.new) == sorted(native)
    published = in_original_names({name: torch.empty(shape, device="meta") for name, shape in native.items()}, rules)
    assert {name: tuple(published[name].shape) for name in PUBLIC_SHAPES[family]} == PUBLIC_SHAPES[family]


# ---------------------------------------------------------------------------------------------------------------------
# Qwen-VL beyond its training length (200 tokens in the tiny checkpoint)


@pytest.fixture(scope="module")
def long_qwen() -> SimpleNamespace:
    path = zoo.checkpoint("qwen_vl")
    model = load_model(path).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.text_config.vocab_size, (2, 330), generator=generator)
    ids[ids == model.config.image_token_id] = 10
    return SimpleNamespace(model=model, ids=ids, train_length=model.config.text_config.train_length)


def test_padding_does_not_move_long_rows(long_qwen: SimpleNamespace):
    """A short row beside a long one keeps its own rotary base, on either side of the padding."""
    model, ids = long_qwen.model, long_qwen.ids
    short = ids[1:, :90]
    mask = torch.ones(2, 330, dtype=torch.long)
    pad = torch.zeros(1, 240, dtype=torch.long)
    with torch.no_grad():
        alone = [model(input_ids=ids[:1]).logits[0], model(input_ids=short).logits[0]]
        for side in ("right", "left"):
            row = torch.cat([short, pad] if side == "right" else [pad, short], dim=1)
            mask[1] = (row[0] != 0).long()
            both = model(input_ids=torch.cat([ids[:1], row]), attention_mask=mask).logits
            torch.testing.assert_close(both[0], alone[0], **LOGITS)
            torch.testing.assert_close(both[1][mask[1].bool()], alone[1], **LOGITS)


def test_decoding_keeps_the_base_of_the_prompt(long_qwen: SimpleNamespace):
    """Token by token through the cache equals one pass with the prompt's base, before and beyond the training length."""
    model, ids = long_qwen.model, long_qwen.ids[:1]
    text = model.model.language_model
    for prompt in (190, 210):
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
            alpha = cache.ntk_alpha
            assert float(alpha) == (1 if prompt <= long_qwen.train_length else 3)
            steps = [
                model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
                for t in range(prompt, 240)
            ]
            assert cache.ntk_alpha is alpha
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("models.qwen_vl.modeling.ntk_alpha", lambda *_, alpha=alpha: alpha)
                whole = text(input_ids=ids[:, :240]).last_hidden_state
        torch.testing.assert_close(torch.cat(steps, 1), model.lm_head(whole[:, prompt:]), **LOGITS)


def test_scores_are_those_of_training(long_qwen: SimpleNamespace):
    """Beyond the training length a model scores the same in train mode (policy) and eval mode (reference), packed or plain;
    a plain forward in eval mode extrapolates, as released."""
    model, ids = long_qwen.model, long_qwen.ids
    prompt, answers = ids[0, :210].tolist(), [ids[0, 210:240].tolist(), ids[1, :25].tolist()]
    packed = packing.pack_rows([prompt], [answers], 0)
    at = dict(completion_index=packed["completion_index"], completion_ids=packed["completion_ids"])
    mask = packed["completion_mask"]
    at = {key: value[mask] for key, value in at.items()}
    scores = []
    for train in (False, True):
        model.train(train)
        with torch.no_grad():
            inputs = model.packed_inputs(packed["input_ids"], packed["segment_ids"], {})
            scores.append(model(**inputs, **at).logps)
            plain = torch.cat([ids[:1, :210], torch.tensor([answers[0]])], dim=1)
            index = torch.arange(209, 239)
            logps = model(input_ids=plain, completion_index=index, completion_ids=plain[0, 210:]).logps
            torch.testing.assert_close(scores[-1][:30], logps, atol=1e-5, rtol=0)
    model.eval()
    torch.testing.assert_close(scores[0], scores[1], atol=0, rtol=0)
    with torch.no_grad():
        released = model(input_ids=plain).logits[0, 209:239].log_softmax(-1).gather(-1, plain[0, 210:, None])[:, 0]
    assert (released - logps).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Partial LoRA


@pytest.fixture(scope="module")
def xcomposer() -> SimpleNamespace:
    path = zoo.checkpoint("internlm_xcomposer2")
    processor = core_mapper_for(path).processor(path)
    processor.infer()
    batch = processor(
        convs=[[{"role": "user", "content": "<image>What is this?"}], [{"role": "user", "content": "What?"}]],
        images=[[zoo.image()], []],
    )
    return SimpleNamespace(path=path, batch=batch)


def test_partial_lora_touches_image_tokens_only(xcomposer: SimpleNamespace):
    """Without it the text-only row and the text before the image keep their logits bit for bit; image tokens change."""
    model = load_model(xcomposer.path).eval()
    batch = xcomposer.batch
    image = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state
        for name, parameter in model.named_parameters():
            if name.endswith("_plora.b"):
                parameter.zero_()
        without = model.model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert torch.equal(hidden[1][real[1]], without[1][real[1]])
    before = real[0] & (torch.arange(hidden.shape[1]) < image[0])
    assert before.any() and torch.equal(hidden[0][before], without[0][before])
    assert (hidden[0][image] - without[0][image]).abs().amax(-1).min() > 1e-3


def test_generated_tokens_take_no_partial_lora(xcomposer: SimpleNamespace):
    """Decoding through the cache gives the logits of one pass over prompt and answer."""
    model = load_model(xcomposer.path).eval()
    output = model.generate(
        **xcomposer.batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )  # fmt: skip
    mask = torch.cat([xcomposer.batch["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        pixels = xcomposer.batch["pixel_values"]
        whole = model(input_ids=output.sequences, attention_mask=mask, pixel_values=pixels).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), whole[:, -6:-1], atol=1e-4, rtol=0)


def test_rows_beyond_the_known_positions_are_refused(xcomposer: SimpleNamespace):
    model = load_model(xcomposer.path).eval()
    model.config.text_config.max_position_embeddings = 30
    ids = torch.full((1, 31), 7)
    with pytest.raises(ValueError, match="has 31 tokens"):
        model(input_ids=ids)
    model(input_ids=ids, position_ids=torch.arange(31)[None] // 2)  # a packed row is longer than its positions


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_only_batch_trains_every_module(family: str):
    """Ranks of DDP and ZeRO-3 must run the same modules: vision and partial LoRA get gradients, all of them zero."""
    model = load_model(zoo.checkpoint(family)).train()
    model(input_ids=torch.full((1, 5), 7), labels=torch.full((1, 5), 7)).loss.backward()
    text = {id(p) for p in model.get_decoder().parameters()} | {id(model.lm_head.weight)}
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name and family == "internlm_xcomposer2":
            continue  # not part of the features that this family reads
        assert parameter.grad is not None, name
        if id(parameter) not in text or "plora" in name:
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_and_features_must_agree(family: str):
    model = load_model(zoo.checkpoint(family)).eval()
    ids = torch.full((1, 5), model.config.image_token_id)
    with pytest.raises(ValueError, match="5 image placeholders in the rows but"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_lora_training(family: str, command: Callable[..., list[str]], tmp_path: Path):
    """The decoder's linear layers are in 4 bits, vision and partial LoRA are not, and the adapter learns."""
    path = zoo.checkpoint(family)
    quantised = load_model(path, bits=4)
    small = {name for name, p in quantised.named_parameters() if type(p).__name__ == "Params4bit"}
    assert small and all(re.fullmatch(r"model\.language_model\.layers\..*_proj\.weight", name) for name in small)
    train_sft.main(command("sft", "--use_lora True --q_lora True --bits 4", model=path))
    trained = load_model(str(tmp_path / "sft"))
    assert all(weight.any() for name, weight in trained.named_parameters() if "lora_B" in name)
