"""Rollouts under autocast: one 16-bit type for keys and values, whatever the weights, and as many bytes as docs/memory.md counts."""

from pathlib import Path

import pytest
import torch

from benchmarks.memory import Setup, cache_bytes
from tests import zoo
from tests.test_ppo import LORA, ppo_trainer, prompt_rows, rolled_out

WEIGHTS = {
    "full": "",
    "lora": f"{LORA} --torch_dtype float32",
    "lora16": LORA,
    "qlora": f"{LORA} --q_lora True",
    "qlora8": f"{LORA} --q_lora True --bits 8",
}
REWARD = f"--reward_fn {__file__}:no_reward"


def no_reward(responses: list[str], **_) -> list[float]:
    return [float(len(r)) for r in responses]


def caches_of(core: torch.nn.Module, monkeypatch) -> list:
    """The caches that rollouts fill."""
    seen = []
    generate = type(core).generate

    def watched(model: torch.nn.Module, *args, **kwargs):
        seen.append(kwargs["past_key_values"])
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(core), "generate", watched)
    return seen


@pytest.mark.parametrize(
    "family, weights",
    [
        *(("llava", weights) for weights in WEIGHTS),
        *((family, "full") for family in ("qwen2_5_vl", "gemma3", "instructblip", "mllama", "qwen_vl")),
        ("qwen2_5_vl", "qlora"),
    ],
)
def test_cache_is_16_bit_under_autocast(family: str, weights: str, image_dir: Path, tmp_path: Path, monkeypatch):
    """And the first optimizer step starts from the log-probs of the scoring pass."""
    rows = prompt_rows(image_dir, 4)
    flags = f"--bf16 True {REWARD} {WEIGHTS[weights]}"
    trainer = ppo_trainer(zoo.checkpoint(family), rows, tmp_path, flags)
    caches = caches_of(trainer.base_model(trainer.model), monkeypatch)
    trainer.train()
    step = next(entry for entry in trainer.state.log_history if "objective/kl" in entry)
    assert step["first/ratio_deviation"] == 0 and step["first/approxkl"] == 0
    held = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert held and {tensor.dtype for tensor in held} == {torch.bfloat16}


def test_float16(image_dir: Path, tmp_path: Path, monkeypatch):
    """accelerate refuses fp16 on a CPU: autocast by hand around the rollout."""
    rows = prompt_rows(image_dir, 4)
    trainer = ppo_trainer(zoo.checkpoint("llava"), rows, tmp_path, f"{REWARD} {WEIGHTS['lora']}")
    caches = caches_of(trainer.base_model(trainer.model), monkeypatch)
    with torch.autocast("cpu", torch.float16):
        rolled_out(trainer, rows)
    assert {t.dtype for cache in caches for layer in cache.layers for t in (layer.keys, layer.values)} == {
        torch.float16
    }


@pytest.mark.parametrize(
    "family, weights, K",
    [
        *((family, weights, 2) for family in ("llava", "qwen2_5_vl") for weights in ("lora16", "qlora", "float32")),
        ("llava", "lora16", 1),  # a static cache, as long as the longest answer may become
        ("gemma3", "lora16", 2),  # has windows, so that every answer is a row
        ("paligemma", "lora16", 2),
    ],
)
def test_bytes_are_those_of_the_table(family: str, weights: str, K: int, image_dir: Path, tmp_path: Path, monkeypatch):
    rows = prompt_rows(image_dir, 4)
    bf16 = weights != "float32"
    flags = f"--bf16 {bf16} {REWARD} {WEIGHTS.get(weights, LORA)} --rollouts_per_prompt {K}"
    trainer = ppo_trainer(zoo.checkpoint(family), rows, tmp_path, flags)
    core = trainer.base_model(trainer.model)
    caches = caches_of(core, monkeypatch)
    batch = trainer.data_collator(rows)
    (sampled,) = trainer.rollout([batch], seed=0, places=[[0, 1, 2, 3]])
    assert core.decodes_packed == (family in ("llava", "qwen2_5_vl"))
    setup = Setup(
        "ppo",
        max_prompt_length=max(map(len, batch["prompts"])),
        max_target_length=trainer.args.response_length,
        local_rollout_forward_batch_size=4 * K,
        rollouts_per_prompt=K,
        bf16=bf16,
    )
    (cache,) = caches
    assert sampled.batch["completion_mask"].shape[1] == trainer.args.response_length  # none stopped before
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values, *getattr(layer, "rooms", [])))
    assert held == cache_bytes(zoo.checkpoint(family), setup)
