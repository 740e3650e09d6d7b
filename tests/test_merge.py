"""merge_lora.py: the plain checkpoint computes what base and adapter compute together, for every family."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import merge_lora
import train_dpo
import train_rm
import train_sft
from args import LoraArguments
from base.loading import load_model
from base.reward import VLRewardModel, score_rows
from common.errors import InputError
from models import MODEL_NICKNAME_MAP, core_mapper_for
from models.assemble import add_lora
from models.merging import bits_of
from tests import zoo

NAMES = [*MODEL_NICKNAME_MAP.values(), "pixtral"]


def keys(folder: str | Path) -> list[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return sorted(file.keys())


def inputs_of(path: str) -> dict:
    """A prompt with an image, ready for the model."""
    adapter = core_mapper_for(path)
    processor = adapter.processor(path)
    collator = adapter.sft_collator(processor)
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A red square"}]
    batch = collator([{"images": [zoo.image(1)], "messages": messages}])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **batch["img_input_dict"]}


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    return model.eval()(**inputs).logits.float()


def random_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A saved adapter that changes the model, which LoRA's initial weights do not."""
    model = add_lora(model, LoraArguments(use_lora=True, lora_r=4, lora_alpha=8))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


MERGES = [(family, None) for family in NAMES] + [
    pytest.param(family, bits, marks=[] if family == "llava" else pytest.mark.slow)
    for family in NAMES
    for bits in (4, 8)
]


@pytest.mark.parametrize("family, bits", MERGES)
def test_merged_logits_equal_the_adapters(tmp_path: Path, family: str, bits: int | None):
    base = zoo.checkpoint(family)
    model = load_model(base, dtype=torch.float32, bits=bits)
    inputs = inputs_of(base)
    before = logits(load_model(base, dtype=torch.float32), inputs)
    model = random_adapter(model, tmp_path / "adapter")
    expected = logits(model, inputs)
    merge_lora.main([base, str(tmp_path / "adapter"), str(tmp_path / "out"), *(["--bits", str(bits)] if bits else [])])
    merged = load_model(str(tmp_path / "out"), dtype=torch.float32)
    scale = expected.norm()
    # int8 activations are rounded in the matrix product itself, which a dequantised layer does not do
    tolerance = 3e-2 if bits == 8 else 1e-5
    assert (logits(merged, inputs) - expected).norm() < tolerance * scale
    assert (expected - before).norm() > 0.2 * scale, "the adapter changes nothing: nothing was tested"
    assert keys(tmp_path / "out") == keys(base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == json.loads((Path(base) / "config.json").read_text())["architectures"]
    assert "quantization_config" not in config
    core_mapper_for(base).processor(str(tmp_path / "out"))


def test_merged_checkpoint_loads_in_plain_transformers(tmp_path: Path, llava: str):
    random_adapter(load_model(llava, dtype=torch.float32), tmp_path / "adapter")
    merge_lora.main([llava, str(tmp_path / "adapter"), str(tmp_path / "out")])
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    ours = load_model(str(tmp_path / "out"))
    inputs = inputs_of(llava)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert torch.allclose(logits(plain, inputs), logits(ours, inputs), atol=1e-5)


def test_qlora_run_tells_its_bits(command, tmp_path: Path, llava: str):
    """From the command line of training to the merged checkpoint: --bits need not be repeated."""
    train_sft.main(command("sft", "--use_lora True --q_lora True --bits 4 --learning_rate 0.1"))
    run = tmp_path / "sft"
    assert bits_of(str(run)) == 4
    merge_lora.main([llava, str(run), str(tmp_path / "out")])
    inputs = inputs_of(llava)
    expected = logits(load_model(str(run), dtype=torch.float32, bits=4), inputs)
    merged = logits(load_model(str(tmp_path / "out")), inputs)
    assert (merged - expected).abs().max() < 1e-4
    unquantised = logits(load_model(str(run), dtype=torch.float32), inputs)
    assert (unquantised - expected).abs().max() > 1e-2


def test_reward_head_comes_along(command, tmp_path: Path, llava: str, preference_rows: list[dict]):
    train_rm.main(command("rm", "--use_lora True"))
    merge_lora.main([llava, str(tmp_path / "rm"), str(tmp_path / "out")])
    processor = core_mapper_for(llava).processor(llava)
    scores = [
        score_rows(VLRewardModel.from_pretrained(str(tmp_path / name)), processor, preference_rows[:3])
        for name in ("rm", "out")
    ]
    assert torch.allclose(torch.tensor(scores[0]), torch.tensor(scores[1]), atol=1e-5)


def test_wrong_input_is_one_sentence(tmp_path: Path, llava: str):
    adapter = tmp_path / "adapter"
    random_adapter(load_model(llava), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    first, *rest = sorted(weights)
    damaged = {
        "other": weights,
        "missing": {name: weights[name] for name in rest},
        "shape": weights | {first: weights[first][:, :-1].contiguous()},
    }
    for name, tensors in damaged.items():
        shutil.copytree(adapter, tmp_path / name)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    for argv, message in [
        ([llava, llava, str(tmp_path / "out")], "adapter_config.json"),
        ([zoo.checkpoint("llava", 1), str(adapter), str(tmp_path / "out")], "other weights"),
        ([llava, str(tmp_path / "missing"), str(tmp_path / "out")], "does not fit.*lora_A"),
        ([llava, str(tmp_path / "shape"), str(tmp_path / "out")], "does not fit"),
        ([llava, str(adapter), str(tmp_path)], "exists already"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            merge_lora.main(argv)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_merge_first_starts_dpo_from_the_merged_model(command, tmp_path: Path, mode: str):
    """The reference is the merged model: loss ln 2 at the first step; and the new adapter names a base that exists."""
    train_sft.main(command("sft", "--use_lora True --learning_rate 0.01"))
    flags = "--merge_first True" + " --use_lora True" * (mode == "lora")
    train_dpo.main(command("dpo", flags, model=str(tmp_path / "sft")))
    history = json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    merged = tmp_path / "dpo" / "merged_base"
    inputs = inputs_of(str(merged))
    expected = logits(load_model(str(tmp_path / "sft"), dtype=torch.float32), inputs)
    assert (logits(load_model(str(merged)), inputs) - expected).abs().max() < 1e-4
    result = load_model(str(tmp_path / "dpo"), dtype=torch.float32)
    if mode == "lora":
        assert result.peft_config["default"].base_model_name_or_path == str(merged)
        with result.disable_adapter():
            assert torch.allclose(logits(result, inputs), logits(load_model(str(merged)), inputs), atol=1e-5)
    assert (logits(result, inputs) - expected).abs().max() > 1e-6


def test_merge_first_needs_an_adapter(command, llava: str):
    with pytest.raises(InputError, match="--merge_first"):
        train_dpo.main(command("dpo", "--merge_first True"))
