"""bf16, float16, 4 and 8 bits, ZeRO-2 and ZeRO-3: what must be exact there is, and what is float32 by contract has its fraction."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset

import train_dpo
import train_sft
from base.heads import ScalarHead
from common.errors import InputError
from losses import get_loss
from tests.processes import history
from tests.test_distributed import launch
from tests.test_dpo import dpo_trainer
from tests.test_equivalence import ragged_rows, trainer_of
from tests.test_ppo import ppo_trainer, prompt_rows, rolled_out
from tests.test_rm import rm_trainer

LORA = "--use_lora True --lora_dropout 0 --lora_r 4"
BF16 = "--bf16 True"
PRECISIONS = {
    "full": BF16,
    "lora": f"{BF16} {LORA}",
    "lora-float32": f"{BF16} {LORA} --torch_dtype float32",
    "4-bit": f"{BF16} {LORA} --q_lora True",
    "8-bit": f"{BF16} {LORA} --q_lora True --bits 8",
}
SLOW = pytest.mark.slow


def no_reward(responses: list[str], **_) -> list[float]:
    return [float(len(r)) for r in responses]


@pytest.fixture(autouse=True)
def fresh_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def on_bf16_grid(values: torch.Tensor) -> bool:
    return bool((values == values.bfloat16().float()).all())


def first_step(trainer) -> dict:
    trainer.train()
    return trainer.state.log_history[0]


def assert_reference_is_policy(step: dict) -> None:
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert step["rewards/chosen"] == step["rewards/rejected"] == step["rewards/margins"] == 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "precision",
    ["full", "lora", "4-bit", pytest.param("lora-float32", marks=SLOW), pytest.param("8-bit", marks=SLOW)],
)
def test_the_reference_is_the_policy_to_the_bit(llava, image_dir, tmp_path, precision: str, cached: bool):
    flags = f"{PRECISIONS[precision]} --max_steps 1 --per_device_train_batch_size 4"
    if cached:
        flags += (
            f" --precompute_ref_log_probs True --ref_log_probs_dir {tmp_path / 'cache'} --precompute_ref_batch_size 4"
        )
    rows = ragged_rows(image_dir)[:4]
    trainer = dpo_trainer(llava, Dataset.from_list(rows), tmp_path, f"{flags} --train_sampling_strategy sequential")
    assert_reference_is_policy(first_step(trainer))


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("precision", ["lora", pytest.param("4-bit", marks=SLOW)])
def test_a_continued_adapter_is_its_own_reference(command, llava, image_dir, tmp_path, precision: str, cached: bool):
    train_sft.main(command("sft", f"{PRECISIONS[precision]} --learning_rate 0.03"))
    AcceleratorState._reset_state(True)
    flags = (
        f"{PRECISIONS[precision]} --max_steps 1 --per_device_train_batch_size 4 --train_sampling_strategy sequential"
    )
    if cached:
        flags += f" --precompute_ref_log_probs True --ref_log_probs_dir {tmp_path / 'cache'}"
    rows = ragged_rows(image_dir)[:4]
    assert_reference_is_policy(
        first_step(dpo_trainer(str(tmp_path / "sft"), Dataset.from_list(rows), tmp_path / "dpo", flags))
    )


@pytest.mark.parametrize("loss", ["chip", "povid", "tpo_token"])
@pytest.mark.parametrize("precision", ["lora", pytest.param("full", marks=SLOW), pytest.param("4-bit", marks=SLOW)])
def test_losses_that_read_logits_train(llava, preference_rows, tmp_path, precision: str, loss: str):
    """float32 hidden states meet a bf16 lm_head. At first no loss has a preference: policy and reference are equal."""
    flags = f"{PRECISIONS[precision]} --max_steps 2 --loss_type {loss}"
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, flags)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == 2 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loss", ["mdpo", "ddpo", "vdpo", "mpo", "mmdpo", "sft", "ipo", "simpo", "cpo", "orpo"])
def test_every_special_loss_starts_without_preference(llava, image_dir, tmp_path, precision: str, loss: str):
    rows = [row | {"margin": 1.0} for row in ragged_rows(image_dir) if row["images"]][:4]
    flags = f"{PRECISIONS[precision]} --max_steps 1 --per_device_train_batch_size 4 --loss_type {loss}"
    step = first_step(dpo_trainer(llava, Dataset.from_list(rows), tmp_path, flags))
    assert math.isfinite(step["loss"]) and step["grad_norm"] > 0
    if not get_loss(loss).reference_free:
        assert step["rewards/chosen"] == step["rewards/margins"] == 0


@pytest.mark.parametrize("precision", ["lora", pytest.param("full", marks=SLOW), pytest.param("4-bit", marks=SLOW)])
def test_rewards_have_their_fraction(llava, image_dir, tmp_path, precision: str):
    rows = ragged_rows(image_dir)
    trainer = rm_trainer(llava, rows, tmp_path, f"{PRECISIONS[precision]} --max_steps 1")
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        rewards = trainer.response_rewards(trainer.model_wrapped, batch)
    assert rewards.dtype == torch.float32 and not on_bf16_grid(rewards)


@pytest.mark.parametrize("precision", ["lora", pytest.param("full", marks=SLOW), pytest.param("4-bit", marks=SLOW)])
def test_packed_against_plain_is_below_the_noise_of_bf16(llava, image_dir, tmp_path, precision: str):
    """Per token, the median: packing must not be farther from plain rows than bf16 is from float32."""
    rows = [row for row in ragged_rows(image_dir) if row["images"]]
    found = {}
    for name, flags in {
        "packed": PRECISIONS[precision],
        "plain": f"{PRECISIONS[precision]} --share_prefix False",
        "float32": PRECISIONS[precision].replace(BF16, "--torch_dtype float32"),
    }.items():
        AcceleratorState._reset_state(True)
        trainer = dpo_trainer(llava, Dataset.from_list(rows), tmp_path, flags)
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        with torch.no_grad(), trainer.accelerator.autocast():
            images = trainer.image_inputs(trainer.model, batch)
            found[name] = trainer.completion_logps(trainer.model, batch, images)[batch["completion_mask"]].float()
    noise = (found["plain"] - found["float32"]).abs().mean()
    assert (found["packed"] - found["plain"]).abs().mean() <= noise
    assert 0 < noise < 0.1 and not on_bf16_grid(found["packed"])


@pytest.mark.parametrize("fault", [False, True])
def test_values_have_their_fraction(llava, image_dir, tmp_path, monkeypatch, fault: bool):
    """Those of a head that computes in the type of its inputs have none."""
    if fault:
        monkeypatch.setattr(
            ScalarHead, "forward", lambda head, x: torch.nn.functional.linear(x, head.weight.to(x.dtype))
        )
    rows = prompt_rows(image_dir, 4)
    trainer = ppo_trainer(llava, rows, tmp_path, f"{PRECISIONS['lora']} --reward_fn {__file__}:no_reward")
    for r in rolled_out(trainer, rows):
        assert on_bf16_grid(r.values[r.mask].float()) == fault
        assert fault or (r.values.dtype == torch.float32 and not on_bf16_grid(r.returns[r.mask]))


@pytest.mark.parametrize("script", ["sft", "dpo", "rm"])
def test_float16(llava, image_dir, tmp_path, script: str):
    """accelerate refuses fp16 on a CPU: autocast by hand around forward and loss. PPO's rollouts: tests/test_rollout_cache.py."""
    rows = [row for row in ragged_rows(image_dir) if row["images"]][:4]
    trainer = trainer_of(script, llava, rows, tmp_path, f"{LORA} --torch_dtype float32")
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.model.train()
    with torch.autocast("cpu", torch.float16):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.dtype == torch.float32 and not on_bf16_grid(loss)
    if script == "dpo":
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


def test_dropout_of_a_tower_that_trains_is_off(llava, image_dir, tmp_path):
    """CLIP's attention keeps its rate as a float of its own name."""
    config = json.loads((Path(llava) / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    folder = tmp_path / "dropout"
    folder.mkdir()
    for file in Path(llava).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    rows = ragged_rows(image_dir)[:2]
    flags = "--freeze_vision_tower False --max_steps 1"
    trainer = dpo_trainer(str(folder), Dataset.from_list(rows), tmp_path / "dpo", flags)
    assert_reference_is_policy(first_step(trainer))


def zero_jobs(command, stage: int, start: Path, tmp_path: Path) -> list[dict]:
    """DPO whose first steps are known, RM and SFT, all in bf16 under DeepSpeed."""
    common = (
        f"--deepspeed ds_configs/zero{stage}.json {BF16} --per_device_train_batch_size 1 --max_steps 2 "
        "--learning_rate 1e-12 --ddp_timeout 300"
    )
    # One row at a time in both passes: other neighbours move a row within the noise of bf16.
    cache = f"--precompute_ref_log_probs True --precompute_ref_batch_size 1 --ref_log_probs_dir {tmp_path / 'cache'}"
    cells = {
        "dpo-full-cached": ("dpo", cache, None),
        "dpo-lora-cached": ("dpo", f"{LORA} {cache}", None),
        "dpo-continued-cached": ("dpo", f"{LORA} {cache}", str(start)),
        "dpo-full": ("dpo", "", None),
        "dpo-chip": ("dpo", f"{LORA} --loss_type chip", None),
        "dpo-povid": ("dpo", f"{LORA} --loss_type povid", None),
        "dpo-tpo_token": ("dpo", f"{LORA} --loss_type tpo_token", None),
        "rm": ("rm", LORA, None),
        "sft": ("sft", "", None),
    }
    if stage == 2:  # ZeRO-3 does not partition quantised weights
        cells["dpo-4-bit"] = ("dpo", f"{LORA} --q_lora True", None)
        cells["dpo-4-bit-cached"] = ("dpo", f"{LORA} --q_lora True {cache}", None)
    jobs = []
    for name, (script, flags, model) in cells.items():
        out = tmp_path / f"zero{stage}" / name
        chosen = {"model": model} if model else {}
        jobs.append(
            {
                "name": name,
                "script": script,
                "argv": command(script, f"{common} {flags}", out=out, **chosen),
                "out": str(out),
            }
        )
    return jobs


@pytest.mark.parametrize("stage", [pytest.param(2), pytest.param(3, marks=SLOW)])
def test_deepspeed_in_bf16(command, tmp_path: Path, stage: int):
    """The cached reference keeps its fraction, and is computed as the policy will be."""
    start = tmp_path / "start"
    train_dpo.main(command("dpo", f"{LORA} --learning_rate 0.03", out=start))
    jobs = zero_jobs(command, stage, start, tmp_path)
    launch("deepspeed", jobs, tmp_path)
    for job in jobs:
        steps = [entry for entry in history(Path(job["out"])) if "grad_norm" in entry]
        assert len(steps) == 2 and all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in steps), job["name"]
        if job["script"] == "dpo":
            for step in steps:
                assert_reference_is_policy(step)
        else:
            assert not on_bf16_grid(torch.tensor([step["loss"] for step in steps])), job["name"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--torch_dtype bfloat16", "16-bit weights"),
        ("--torch_dtype float16 --bf16 True", "16-bit weights"),
        (f"{LORA} --torch_dtype bfloat16 --modules_to_save lm_head", "--modules_to_save trains float32"),
        (f"{LORA} --torch_dtype bfloat16 --lora_bias all", "--lora_bias trains float32"),
    ],
)
def test_weights_do_not_train_in_16_bits(llava, preference_rows, tmp_path, flags: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, flags)


@pytest.mark.parametrize("loss", ["sigmoid", "chip"])
def test_what_trains_on_a_bf16_base_is_float32(llava, preference_rows, tmp_path, loss: str):
    flags = f"{PRECISIONS['lora']} --modules_to_save lm_head --loss_type {loss} --max_steps 2"
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, flags)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32, torch.bfloat16}
    assert first_step(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_finished_run_that_goes_on_has_the_rate_of_the_longer_schedule(command, tmp_path):
    """Linear decay by hand: of four steps the third has half of the first one's rate."""
    flags = f"{LORA} --save_strategy steps --save_steps 2 --learning_rate 0.001"
    train_sft.main(command("sft", flags))
    train_sft.main(command("sft", f"{flags} --max_steps 4 --resume_from_checkpoint True"))
    rates = [entry["learning_rate"] for entry in history(tmp_path / "sft") if "learning_rate" in entry]
    assert rates == pytest.approx([0.001, 0.0005, 0.0005, 0.00025])
