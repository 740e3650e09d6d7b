"""QLoRA: what is quantised, that it learns after an evaluation too, and that every script runs on it."""

import itertools
import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import train_dpo
import train_ppo
import train_rm
import train_sft
from args import LoraArguments
from base.loading import load_model
from models import MODEL_NICKNAME_MAP
from models.assemble import add_lora
from tests import zoo
from tests.processes import RL, ZERO_OR_ONE

SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm} | dict.fromkeys(RL, train_ppo)
QUANTISED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


@pytest.mark.parametrize("family, bits", [*[(name, 4) for name in MODEL_NICKNAME_MAP.values()], ("llava", 8)])
def test_the_language_model_alone_is_quantised(family: str, bits: int):
    model = load_model(zoo.checkpoint(family), dtype=torch.float32, bits=bits)
    decoder = model.get_decoder()
    inside = [m for m in decoder.modules() if isinstance(m, nn.Linear)]
    assert inside and all(isinstance(m, QUANTISED) for m in inside)
    ids = {id(m) for m in decoder.modules()}
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in ids]
    assert outside and not any(isinstance(m, QUANTISED) for m in outside)
    assert {p.dtype for m in outside for p in m.parameters()} == {torch.float32}
    assert model.get_output_embeddings() in outside
    assert any(m in outside for m in model.get_vision_tower().modules())
    if bits == 4:
        state = inside[0].weight.quant_state
        assert state.quant_type == "nf4" and state.nested, "NF4 with double quantisation"
        assert {m.compute_dtype for m in inside} == {torch.float32}


def test_compute_dtype_follows_the_weights():
    model = load_model(zoo.checkpoint("llava"), dtype=torch.bfloat16, bits=4)
    assert {m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} == {torch.bfloat16}
    model = add_lora(model, LoraArguments(use_lora=True))
    kept = {p.dtype for n, p in model.named_parameters() if "vision_tower" in n or "lm_head" in n}
    assert kept == {torch.float32}, "what is not quantised stays in full precision"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])  # qwen's layers have biases
def test_gradients_survive_an_evaluation(family: str, bits: int, monkeypatch):
    """bitsandbytes repacks 4-bit layers at the first forward in eval mode, and their gradient is zero from then on.

    It does so only on CPUs with AVX512-BF16. Here every CPU is treated as one: any repacking fails the test.
    """

    def repack(weight: torch.Tensor, state: object) -> None:
        raise AssertionError("repacked for inference: no gradient passes from here on")

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", repack)
    assert bits == 8 or bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    torch.manual_seed(0)
    model = load_model(zoo.checkpoint(family), dtype=torch.float32, bits=bits)
    model = add_lora(model, LoraArguments(use_lora=True, lora_dropout=0.0))
    ids = torch.randint(10, 60, (2, 12))

    def gradient() -> float:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=2)
    assert before > 0
    assert gradient() == pytest.approx(before, rel=1e-5)
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))


@pytest.mark.parametrize(
    "script, bits",
    [
        pytest.param(name, bits, marks=[pytest.mark.slow] if bits == 8 or name in [*RL][2:] else [])
        for name, bits in itertools.product(SCRIPTS, (4, 8))
    ],
)
def test_every_script_trains_evaluates_and_trains_again(command, rewards, tmp_path: Path, script: str, bits: int):
    flags = f"--use_lora True --q_lora True --bits {bits} --max_steps 3 --eval_ratio 0.25 --eval_strategy steps --eval_steps 1"
    if script in RL:
        reward = rewards.replace(":length", ":odd") if script in ZERO_OR_ONE else rewards
        flags += f" --reward_fn {reward} --response_length 6 {RL[script]}"
    SCRIPTS[script].main(command(script, flags))
    history = json.loads((tmp_path / script / "trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    assert len(norms) == 3 and min(norms) > 1e-3
    assert sum(any(name.startswith("eval_") for name in entry) for entry in history) >= 2
    assert (tmp_path / script / "adapter_model.safetensors").is_file()


def test_an_adapter_continues_on_a_quantised_base(command, tmp_path: Path):
    """SFT, then DPO, both QLoRA: the reference is the adapter as it was."""
    train_sft.main(command("sft", "--use_lora True --q_lora True"))
    train_dpo.main(command("dpo", "--use_lora True --q_lora True", model=str(tmp_path / "sft")))
    history = json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert all(entry["grad_norm"] > 0 for entry in history if "grad_norm" in entry)
