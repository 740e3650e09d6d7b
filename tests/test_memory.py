"""benchmarks/memory.py against real steps of the four scripts: tensors counted by torch's allocator on the CPU."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Trainer

import train_dpo
import train_ppo
import train_rm
import train_sft
from base.loading import load_model
from base.ppo_trainer import VLPPOTrainer
from benchmarks import memory
from benchmarks.memory import Setup
from benchmarks.steps import peak_of
from tests import zoo

SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm, "ppo": train_ppo}
SHAPE = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2)


def no_reward(responses: list[str], **_) -> list[float]:
    return [0.0 for _ in responses]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA whose decoder is large compared with everything else."""
    folder = tmp_path_factory.mktemp("wide")
    config = transformers.AutoConfig.from_pretrained(zoo.checkpoint("llava"))
    for name, value in (SHAPE | {"head_dim": 32}).items():
        setattr(config.text_config, name, value)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(zoo.checkpoint("llava")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    zoo.image(0).save(folder / "0.png")
    prompt, chosen, rejected = "photo " * 250, "red " * 20, "two " * 20
    pair = {"image": "0.png", "prompt": prompt, "chosen": chosen, "rejected": rejected}
    turns = [{"from": "user", "value": "<image>\n" + prompt}, {"from": "assistant", "value": chosen}]
    (folder / "pairs.json").write_text(json.dumps([pair] * 8))
    (folder / "turns.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}] * 8))
    return folder


def measured(script: str, checkpoint: str, data: Path, out: Path, flags: str, monkeypatch) -> dict:
    """Two micro steps and an optimizer step of a script: bytes of its tensors, and the peak that the second micro step adds."""
    seen = {}
    owner, name = (VLPPOTrainer, "_micro_step") if script == "ppo" else (Trainer, "training_step")
    step = getattr(owner, name)

    def watched(trainer, model, batch, *rest, **kwargs):
        seen.setdefault("batch", getattr(batch, "batch", batch))
        seen["trainer"] = trainer
        result = []
        seen["peak"] = peak_of(lambda: result.append(step(trainer, model, batch, *rest, **kwargs)))
        seen["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        return result[0]

    monkeypatch.setattr(owner, name, watched)
    rows = (
        "--dataset_name vlquery_json --data_path {}/turns.json"
        if script == "sft"
        else "--dataset_name plain_dpo --data_path {}/pairs.json"
    )
    reward = f"--reward_fn {__file__}:no_reward --response_length 20 --num_ppo_epochs 1 --num_sample_generations 0" * (
        script == "ppo"
    )
    SCRIPTS[script].main(
        f"--model_name_or_path {checkpoint} {rows.format(data)} --image_root {data} --output_dir {out} --max_steps 1 --save_strategy no "
        f"--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --disable_tqdm True {reward} {flags}".split()
    )
    trainer = seen["trainer"]
    seen["weights"] = sum(p.nbytes for p in trainer.model.parameters())
    states = trainer.optimizer.state.values()
    seen["optimizer"] = sum(s.nbytes for state in states for s in state.values() if s.ndim)
    reference = getattr(trainer, "ref_model", None)
    seen["reference"] = sum(p.nbytes for p in reference.parameters()) if reference is not None else 0
    return seen


def lengths(batch: dict) -> tuple[int, int]:
    """Tokens of the prompt and of each response."""
    if "segment_ids" not in batch:
        n = len(batch["completion_index"])
        return batch["input_ids"].shape[1] - n, n
    segments = batch["segment_ids"]
    return int((segments == 0).sum()), int((segments == 1).sum())


CASES = [
    *(
        (script, method, checkpointing, False)
        for script in ("sft", "dpo")
        for method in ("full", "lora")
        for checkpointing in (False, True)
    ),
    pytest.param("sft", "lora", True, True, marks=pytest.mark.slow),
    pytest.param("dpo", "full", True, True, marks=pytest.mark.slow),
    pytest.param("dpo", "lora", True, True, marks=pytest.mark.slow),
    ("dpo", "lora", False, True),
    ("rm", "lora", True, True),
    pytest.param("ppo", "full", True, False, marks=pytest.mark.slow),
    pytest.param("ppo", "lora", True, True, marks=pytest.mark.slow),
    ("ppo", "lora", False, True),
]


@pytest.mark.parametrize("script, method, checkpointing, bf16", CASES)
def test_computed_is_measured(script, method, checkpointing, bf16, checkpoint, data, tmp_path, monkeypatch):
    """Weights, gradients and optimizer to the byte. Activations to 1 %; with checkpointing up to 15 % less: the kernels'
    scratch memory inside the one layer that is then computed (0.6 MB here, at any depth)."""
    flags = f"--gradient_checkpointing {checkpointing} --bf16 {bf16}" + " --use_lora True" * (method == "lora")
    found = measured(script, checkpoint, data, tmp_path, flags, monkeypatch)
    prompt, target = lengths(found["batch"])
    setup = Setup(
        script,
        method,
        max_prompt_length=prompt,
        max_target_length=target,
        gradient_checkpointing=checkpointing,
        bf16=bf16,
    )
    activations = memory.step_bytes(checkpoint, setup)
    assert activations / found["peak"] == pytest.approx(
        0.935 if checkpointing else 1, abs=0.085 if checkpointing else 0.01
    )
    weights, gradients, trained, reference = memory.count(checkpoint, setup)
    if script == "ppo" and method == "lora":
        weights -= (
            gradients - 4 * SHAPE["hidden_size"]
        ) // 2  # the reward adapter is as large as the policy's, without the value head; here the reward is a function
    assert (weights, gradients, 8 * trained) == (found["weights"], found["gradients"], found["optimizer"])
    assert (reference if script in ("dpo", "ppo") else 0) == found["reference"]


VISION = [
    ("sft", "lora", {"use_dora": True}),
    ("sft", "lora", {"lora_vision": True, "train_projector": True}),
    pytest.param("dpo", "lora", {"lora_vision": True, "train_vision_layers": 1}, marks=pytest.mark.slow),
    pytest.param("dpo", "full", {"train_vision_layers": 1}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("script, method, kind", VISION)
def test_kinds_of_training(script, method, kind: dict, checkpoint, data, tmp_path, monkeypatch):
    """Weights, gradients and optimizer to the byte; the pictures' way through tower and projector is in the step."""
    flags = " ".join(f"--{name} {value}" for name, value in kind.items())
    if "train_vision_layers" in kind and method == "full":
        flags += " --freeze_vision_tower True"
    flags += " --gradient_checkpointing False" + " --use_lora True" * (method == "lora")
    found = measured(script, checkpoint, data, tmp_path, flags, monkeypatch)
    prompt, target = lengths(found["batch"])
    sizes = {"max_prompt_length": prompt, "max_target_length": target}
    setup = Setup(script, method, gradient_checkpointing=False, bf16=False, **sizes, **kind)
    weights, gradients, trained, _ = memory.count(checkpoint, setup)
    assert (weights, gradients, 8 * trained) == (found["weights"], found["gradients"], found["optimizer"])
    assert memory.step_bytes(checkpoint, setup) / found["peak"] == pytest.approx(1, abs=0.015)


def test_towers_that_read_numbers_of_the_picture_are_not_counted(capsys):
    memory.main(
        ["--model", zoo.checkpoint("qwen2_5_vl"), "--script", "sft", "--method", "lora", "--lora_vision", "True"]
    )
    assert "vision tower's activations are not among them" in capsys.readouterr().out
    assert [name for name in memory.PUBLISHED if memory.picture_inputs(name) is not None] == [
        "llava-hf/llava-1.5-7b-hf",
        "OpenGVLab/InternVL3-8B-hf",
        "llava-hf/llava-1.5-13b-hf",
    ]


def test_quantised_weights_are_those_of_bitsandbytes(checkpoint):
    model = load_model(checkpoint, dtype=torch.bfloat16, bits=4)
    of_layers = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    held = 0
    for weight in of_layers:
        state = weight.quant_state
        parts = (weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        held += sum(part.nbytes for part in parts)
    setup = Setup("sft", "qlora")
    _, core = memory.trained_model(checkpoint, setup)
    assert held == sum(memory.nf4_bytes(weight) for weight in memory.quantised(core))
    assert len(of_layers) == 7 * SHAPE["num_hidden_layers"]


def test_what_is_shared_out(monkeypatch):
    """By hand, for 8e9 bf16 parameters that all train."""
    monkeypatch.setattr(memory, "count", lambda model, setup: (16e9, 16e9, 8e9, 16e9))
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: 1e9)

    def parts(zero: str, script: str = "sft", gpus: int = 8) -> dict[str, float]:
        return memory.memory("", Setup(script, "full", zero, gpus))

    zero2, zero3, offload = parts("2"), parts("3"), parts("3_offload")
    assert (zero2["weights"], zero2["gradients"], zero2["optimizer"]) == (16e9, 2e9, 12e9)
    assert zero2["step"] == max(1e9 + 2e9, 4e9)  # the update's float32 gradients are more than activations and buckets
    assert (zero3["weights"], zero3["gradients"], zero3["optimizer"], zero3["step"]) == (2e9, 2e9, 12e9, 4e9)
    assert offload["weights"] == offload["optimizer"] == 0 and offload["step"] == 3e9
    assert offload["host"] == 8 * (2e9 + 2e9 + 12e9 + 4e9)
    assert parts("2_offload", gpus=16)["host"] == 8 * (1e9 + 6e9 + 2e9)  # of one of two nodes
    assert parts("2", "dpo")["other models"] == 16e9 and parts("3", "dpo")["other models"] == 2e9
    assert parts("2", "dpo_cached")["other models"] == 0


def test_published_sizes():
    """Parameters of the model cards."""
    billions = {
        "llava-hf/llava-1.5-7b-hf": 7.06,
        "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
        "OpenGVLab/InternVL3-8B-hf": 7.94,
    }
    for name, size in billions.items():
        assert memory.count(name, Setup("sft", "full"))[0] / 4e9 == pytest.approx(size, abs=0.005)


def test_the_command_prints_a_table(capsys):
    checkpoint = zoo.checkpoint("llava")
    memory.main(["--model", checkpoint, "--gpus", "2", "--method", "lora", "--zero", "0"])
    overview = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(overview) == 3 and len({line.count("|") for line in overview}) == 1
    memory.main(["--model", checkpoint, "--script", "dpo", "--method", "full", "qlora", "--gpus", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 5 + 1  # no ZeRO-3 for QLoRA


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "smolvlm", "gemma3"])
def test_other_families(family):
    """Every kind of position and mask runs on tensors without content."""
    for script in ("sft", "dpo"):
        assert memory.step_bytes(zoo.checkpoint(family), Setup(script, max_prompt_length=32, max_target_length=8)) > 0


def test_the_longest_prompt_that_fits(monkeypatch, capsys):
    """10 GiB and one for every 100 tokens: 1400 tokens fit 24 GiB, in steps of 64 that is 1344."""
    monkeypatch.setattr(memory, "memory", lambda _, s: {"total": (10 + s.max_prompt_length / 100) * memory.GIB})
    setup = Setup("dpo", "lora")
    assert memory.longest_prompt("m", setup, 24) == 1344
    assert memory.longest_prompt("m", setup, 24, step=100) == 1400  # exactly 24 GiB fit
    assert memory.longest_prompt("m", setup, 10.3) == 0 and memory.longest_prompt("m", setup, 1e6) == 32768
    memory.main(["--model", "m", "--script", "dpo", "--method", "qlora", "--fits", "24"])
    said = capsys.readouterr().out
    assert "longest prompt in 24 GiB, in tokens" in said and "| qlora | one GPU | 1344 |" in said


def test_the_longest_prompt_of_a_model(llava: str):
    setup = Setup("sft", "lora")
    budget = memory.memory(llava, dataclasses.replace(setup, max_prompt_length=256))["total"] / memory.GIB + 1e-9
    assert memory.longest_prompt(llava, setup, budget, most=512) == 256
