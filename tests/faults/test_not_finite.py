"""NaN in weights, losses and gradients: one bad step is skipped, a second in a row ends the run, and none is saved."""

import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dpo
import train_sft
from base.bad_steps import BadSteps
from base.trainer import VLDPOTrainer, VLSFTTrainer
from common.errors import InputError
from common.files import make_valid_json
from common.tensors import first_not_finite


def nan_at(monkeypatch, trainer: type, steps: set[int], of: str = "loss") -> None:
    """Let the loss (or the gradient alone) of these steps, counted from 1, be NaN."""
    compute_loss = trainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if self.model.training and self.state.global_step + 1 in steps:
            if of == "loss":
                return loss * float("nan")
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(trainer, "compute_loss", broken)


def finite(out: Path) -> bool:
    return first_not_finite((n, t) for f in out.rglob("*.safetensors") for n, t in load_file(f).items()) is None


LORA = "--use_lora True --lora_r 4 --save_strategy steps --save_steps 1 --max_steps 6"


@pytest.mark.parametrize("of", ["loss", "gradient"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_one_bad_step_is_skipped(command, monkeypatch, tmp_path, capsys, optim: str, of: str):
    """The weights after the bad step are those before it, momentum included."""
    nan_at(monkeypatch, VLDPOTrainer, {3}, of)
    out = tmp_path / "out"
    train_dpo.main(command("dpo", f"{LORA} --optim {optim}", out=out))
    before, after, end = (
        load_file(out / folder / "adapter_model.safetensors") for folder in ("checkpoint-2", "checkpoint-3", "")
    )
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert finite(out) and any(not torch.equal(after[n], end[n]) for n in end)
    message = capsys.readouterr().err
    assert "A step is skipped (step 3)" in message and "pairs.json" in message
    history = json.loads((out / "trainer_state.json").read_text(), parse_constant=lambda c: pytest.fail(c))[
        "log_history"
    ]
    assert [entry["loss"] is None for entry in history[:6]] == [n == 2 for n in range(6)]
    assert history[2]["skipped_steps"] == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_second_bad_step_in_a_row_stops(command, monkeypatch, tmp_path, accumulation: int):
    nan_at(monkeypatch, VLSFTTrainer, {3, 4})
    out = tmp_path / "out"
    flags = f"{LORA} --save_total_limit 2 --per_device_train_batch_size 2 --gradient_accumulation_steps {accumulation}"
    with pytest.raises(
        InputError, match=r"2 steps in a row, the last of them step 4.*conversations\.json.*checkpoint-3, is whole"
    ):
        train_sft.main(command("sft", flags, out=out))
    assert finite(out) and (out / "checkpoint-3").is_dir() and not (out / "checkpoint-4").exists()
    assert not (out / "adapter_model.safetensors").exists()


def test_bad_steps_that_alternate_go_on(command, monkeypatch, tmp_path):
    nan_at(monkeypatch, VLSFTTrainer, {2, 4, 6})
    train_sft.main(command("sft", LORA, out=tmp_path / "out"))
    assert finite(tmp_path / "out")


def test_last_step_is_read_before_the_end(command, monkeypatch, tmp_path):
    nan_at(monkeypatch, VLSFTTrainer, {5, 6})
    with pytest.raises(InputError, match="the last of them step 6"):
        train_sft.main(command("sft", LORA.replace("steps --save_steps 1", "no"), out=tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("script", ["sft", "dpo", "rm", "ppo"])
def test_nan_weight_is_refused_when_loaded(command, llava, tmp_path, rewards, script: str):
    model = tmp_path / "model"
    shutil.copytree(llava, model)
    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if "down_proj" in n)
    weights[name].view(-1)[7] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    extra = f"--reward_fn {rewards}" if script == "ppo" else ""
    with pytest.raises(InputError, match=r"down_proj.* holds values that are not finite"):
        importlib.import_module(f"train_{script}").main(command(script, f"{LORA} {extra}", model=model))


def test_weights_that_are_not_finite_are_never_saved(command, monkeypatch, tmp_path):
    """Whatever made them so: here they are broken behind the trainer's back."""
    step_end = train_sft.VLSFTTrainer._maybe_log_save_evaluate

    def broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            next(p for p in self.model.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")
        step_end(self, *args, **kwargs)

    monkeypatch.setattr(train_sft.VLSFTTrainer, "_maybe_log_save_evaluate", broken)
    with pytest.raises(InputError, match=r"weights after step 3 are not finite \(.*lora_.*checkpoint-2, is whole"):
        train_sft.main(command("sft", LORA, out=tmp_path / "out"))
    assert finite(tmp_path / "out")


def test_ppo_skips_a_bad_optimizer_step_and_stops_at_two(command, monkeypatch, tmp_path, rewards, capsys):
    from base.ppo_trainer import VLPPOTrainer

    backward, calls, bad = VLPPOTrainer.backward, [], {2}

    def broken(self, loss):
        calls.append(loss)
        backward(self, loss * float("nan") if len(calls) in bad else loss)

    monkeypatch.setattr(VLPPOTrainer, "backward", broken)
    flags = f"--use_lora True --lora_r 4 --reward_fn {rewards} --response_length 4 --num_ppo_epochs 3 --max_steps 2"
    importlib.import_module("train_ppo").main(command("ppo", flags, out=tmp_path / "one"))
    assert finite(tmp_path / "one") and "A step is skipped (step 1)" in capsys.readouterr().err
    calls.clear()
    bad |= {3}
    with pytest.raises(InputError, match=r"2 steps in a row, the last of them step 1.*pairs\.json"):
        importlib.import_module("train_ppo").main(command("ppo", flags, out=tmp_path / "two"))


def test_streak_by_hand():
    """bad, good, bad, bad: the report comes one step later, and the second in a row raises."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    steps = BadSteps(2, True, lambda flag: flag)
    for step, norm in enumerate([math.nan, 1.0, math.inf, math.nan], 1):
        weight.grad = torch.ones(2)
        steps.decide(torch.tensor(norm), step, optimizer, torch.nn.ParameterList([weight]))
        optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]  # one good step
    with pytest.raises(InputError, match="2 steps in a row, the last of them step 4"):
        steps.report()
    assert steps.skipped_since_last_call() == 3 and steps.skipped_since_last_call() == 0
    losses = [steps.see_loss(torch.tensor(loss)).item() for loss in (math.nan, 1.0)]  # two micro batches of one step
    weight.grad = torch.ones(2)
    steps.decide(torch.tensor(1.0), 5, optimizer, torch.nn.ParameterList([weight]))
    optimizer.step()
    assert losses == [0, 1] and weight.tolist() == [-1.0, -1.0] and steps.skipped_since_last_call() == 1


def test_json_is_valid(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": NaN, "b": [1, -Infinity], "c": "NaN stays"}')
    make_valid_json(path)
    assert json.loads(path.read_text(), parse_constant=lambda c: 1 / 0) == {"a": None, "b": [1, None], "c": "NaN stays"}
