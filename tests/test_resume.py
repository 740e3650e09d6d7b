"""Training that is killed, stopped or out of disk: checkpoints are complete, and the resumed curve is bit for bit equal."""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from args import SFTConfig
from base.checkpoints import ASIDE, EXIT_INTERRUPTED, EXIT_PREEMPTED, Preemption
from base.resume import CHECKSUMS, checkpoint_to_resume, newest_whole_checkpoint, what_is_wrong_with
from base.run_folder import LOCK
from common.errors import InputError, run
from tests.processes import ON_POLICY, RL, Run, history

STEPS = 6


@pytest.fixture
def argv(command, rewards):
    """argv(script, mode, out): six steps over one and a half epochs, a checkpoint after each."""

    def build(script: str, mode: str, out: Path, extra: str = "") -> list[str]:
        # Dropout is on, so the random state must be restored too.
        flags = "--use_lora True --lora_r 4" if mode == "lora" else ""
        if script in ON_POLICY:
            flags += f" --reward_fn {rewards.replace(':length', ':odd')} --response_length 5 {ON_POLICY[script]}"
        flags += f" --max_steps {STEPS} --per_device_train_batch_size 2 --save_strategy steps --save_steps 1 --save_total_limit 2"
        return command(script, f"{flags} {extra}", out=out)

    return build


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(out)}/{k}": v
        for file in sorted(out.glob("*.safetensors"))
        for k, v in load_file(file).items()
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    assert len(history(one)) >= STEPS
    mine, theirs = weights(one), weights(other)
    assert mine and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def uninterrupted_run(argv, script: str, mode: str, out: Path, log: Path) -> float:
    """Run to the end; return the seconds of a step with its save, on this machine."""
    run = Run(script, argv(script, mode, out), log)
    run.until(lambda: run.steps >= 1)
    start = time.monotonic()
    assert run.wait() == 0, run.output[-2000:]
    return (time.monotonic() - start) / (STEPS - 1)


def killed_run(
    argv, script: str, mode: str, out: Path, log: Path, draw: random.Random, during_save: bool, step_seconds: float
) -> None:
    """Start a run and kill it at a random moment of a random step, or while it writes a random checkpoint."""
    for _ in range(10):
        step = draw.randint(1, STEPS - 1)
        run = Run(script, argv(script, mode, out, "--resume_from_checkpoint True"), log)
        if during_save:
            name = f"checkpoint-{step}"
            run.until(lambda name=name: (out / ASIDE / name).exists() or (out / name).exists())
        else:
            run.until(lambda run=run, step=step: run.steps >= step)
        time.sleep(draw.uniform(0, step_seconds / 2 if during_save else step_seconds))
        killed = run.signal(signal.SIGKILL) and run.wait() == -signal.SIGKILL
        if killed and not (out / "trainer_state.json").exists():
            break
        # The run ended first: the machine was faster than when it was measured. Any other status is a failure.
        assert killed or run.wait() == 0, run.output[-2000:]
        shutil.rmtree(out)
        log.unlink()
    else:
        raise AssertionError("ten runs ended before they were killed: nothing was tested")
    for folder in out.glob("checkpoint-*"):
        assert what_is_wrong_with(folder) is None


def check_kills(argv, tmp_path: Path, script: str, mode: str, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    whole = tmp_path / "whole"
    step_seconds = uninterrupted_run(argv, script, mode, whole, tmp_path / "whole.log")
    for n in range(kills):
        out, log = tmp_path / f"killed{n}", tmp_path / f"killed{n}.log"
        killed_run(argv, script, mode, out, log, draw, bool((n + seed) % 2), step_seconds)
        again = Run(script, argv(script, mode, out, "--resume_from_checkpoint True"), log)
        assert again.wait() == 0, again.output[-2000:]
        assert_equal_runs(whole, out)
        assert not (out / ASIDE).exists()


@pytest.mark.parametrize(
    "seed, script, mode",
    [
        (0, "sft", "full"),
        (1, "dpo", "lora"),
        (2, "rm", "lora"),
        (3, "ppo", "lora"),
        (4, "dynamic_sampling", "lora"),
        *(pytest.param(6, "online_dpo", mode, marks=pytest.mark.slow) for mode in ("lora", "full")),
        *(
            pytest.param(5, name, "lora", marks=pytest.mark.slow)
            for name in RL
            if name not in ("ppo", "dynamic_sampling")
        ),
    ],
)
def test_killed_and_resumed_is_uninterrupted(argv, tmp_path, script: str, mode: str, seed: int):
    check_kills(argv, tmp_path, script, mode, kills=1, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("script", ["sft", "dpo", "rm", "ppo"])
def test_twenty_random_kills(argv, tmp_path, script: str, mode: str):
    """4 scripts x all weights and LoRA, 2 or 3 kills each."""
    check_kills(
        argv, tmp_path, script, mode, kills=3 if mode == "lora" else 2, seed=random.SystemRandom().randint(0, 1 << 20)
    )


@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_killed_after_the_last_checkpoint(argv, tmp_path, script: str):
    """All steps are done but the final model is not written: the resumed run takes no further step."""
    main, whole, out = importlib.import_module(f"train_{script}").main, tmp_path / "whole", tmp_path / "out"
    main(argv(script, "lora", whole))
    (out / ASIDE).mkdir(parents=True)
    (whole / f"checkpoint-{STEPS}").rename(out / f"checkpoint-{STEPS}")
    main(argv(script, "lora", out, "--resume_from_checkpoint True"))
    assert_equal_runs(whole, out)


def test_old_checkpoints_are_moved_before_they_are_deleted(argv, tmp_path, monkeypatch):
    """A kill while a checkpoint is deleted leaves no half-deleted folder under its name."""
    out, removed = tmp_path / "out", []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kwargs: (removed.append(Path(path)), rmtree(path, **kwargs)))
    train_sft.main(argv("sft", "lora", out))
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    assert removed and not any(path.name.startswith("checkpoint-") for path in removed)


@pytest.mark.parametrize(
    "number, status, name", [(signal.SIGTERM, EXIT_PREEMPTED, "SIGTERM"), (signal.SIGINT, EXIT_INTERRUPTED, "Ctrl-C")]
)
def test_signal_saves_and_exits_with_its_own_status(argv, tmp_path, number: signal.Signals, status: int, name: str):
    whole, out, extra = tmp_path / "whole", tmp_path / "stopped", "--save_strategy no"
    assert Run("dpo", argv("dpo", "lora", whole, extra), tmp_path / "whole.log").wait() == 0
    run = Run("dpo", argv("dpo", "lora", out, extra), tmp_path / "log", pause=0.3)
    assert run.until(lambda: run.steps >= 2), run.output[-2000:]
    assert run.signal(number)
    assert run.wait() == status and (EXIT_PREEMPTED, EXIT_INTERRUPTED) == (75, 130)
    assert f"Stopped by {name} after step" in run.output and "Traceback" not in run.output
    checkpoint = newest_whole_checkpoint(str(out))
    assert checkpoint is not None and f"after step {checkpoint.rsplit('-', 1)[1]};" in run.output
    assert not (out / "adapter_model.safetensors").exists(), "the run has not ended"
    again = Run("dpo", argv("dpo", "lora", out, f"{extra} --resume_from_checkpoint True"), tmp_path / "log2")
    assert again.wait() == 0, again.output[-2000:]
    assert_equal_runs(whole, out)


@pytest.mark.parametrize("asked", [False, True], ids=["while loading", "a second time"])
def test_ctrl_c_that_ends_at_once(argv, tmp_path, asked: bool):
    """Before training, or a second time within a step: one sentence, no traceback, no checkpoint."""
    out = tmp_path / "out"
    run = Run("dpo", argv("dpo", "lora", out, "--save_strategy no"), tmp_path / "log", pause=1)
    if asked:
        assert run.until(lambda: run.steps >= 1), run.output[-2000:]
        assert run.signal(signal.SIGINT)
        time.sleep(0.3)
    else:
        assert run.until(lambda: (out / LOCK).exists()), run.output[-2000:]
    assert run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert run.output.strip().endswith("train_dpo.py: Stopped by Ctrl-C.") and "Traceback" not in run.output
    assert newest_whole_checkpoint(str(out)) is None and not [*out.rglob("*.safetensors")]


def test_ctrl_c_that_python_drops_comes_again():
    """While a destructor runs, no exception leaves it: any command, also one that does not train, ends all the same."""

    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)

    def main() -> None:
        dying = Dying()
        del dying
        time.sleep(10)
        pytest.fail("goes on")

    before = sys.unraisablehook
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == EXIT_INTERRUPTED and sys.unraisablehook is before


def test_data_workers_outlive_the_sigterm_of_their_group(argv, tmp_path, monkeypatch):
    """Clusters signal every process of a job: the last step still needs its batch."""
    signalled = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            signalled.append(worker)

    monkeypatch.setattr(Preemption, "on_step_begin", on_step_begin)
    train_sft.main(argv("sft", "full", tmp_path / "out", "--dataloader_num_workers 1 --save_strategy no --max_steps 3"))
    assert len(signalled) >= 2 and len(history(tmp_path / "out")) == 3


def test_full_disk_is_one_sentence_and_costs_no_checkpoint(argv, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "full"
    assert Run("sft", argv("sft", "full", whole), tmp_path / "whole.log").wait() == 0
    first = Run("sft", argv("sft", "full", out), tmp_path / "log", pause=0.3)
    assert first.until(lambda: (out / "checkpoint-2").exists()), first.output[-2000:]
    assert first.signal(signal.SIGKILL)
    first.wait()
    last = newest_whole_checkpoint(str(out))
    run = Run("sft", argv("sft", "full", out, "--resume_from_checkpoint True"), tmp_path / "log2", file_size=50_000)
    assert run.wait() == 2, run.output[-2000:]
    line = run.output.strip().splitlines()[-1]
    assert "could not be written" in line and f"{last} is whole" in line
    assert "Traceback" not in run.output
    assert newest_whole_checkpoint(str(out)) == last and not (out / ASIDE).exists()
    again = Run("sft", argv("sft", "full", out, "--resume_from_checkpoint True"), tmp_path / "log3")
    assert again.wait() == 0
    assert_equal_runs(whole, out)


def test_halves_are_passed_over(argv, tmp_path, capsys):
    """Every way in which a copy or another program leaves a checkpoint unfinished."""
    out = tmp_path / "out"
    train_sft.main(argv("sft", "full", out, "--max_steps 2"))
    older, newest = out / "checkpoint-1", out / "checkpoint-2"
    assert newest_whole_checkpoint(str(out)) == str(newest)
    keep = tmp_path / "keep"
    shutil.copytree(newest, keep)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    for damage, message in [
        (lambda: (newest / "trainer_state.json").unlink(), "no trainer_state.json"),
        (lambda: _cut(newest / "trainer_state.json"), "cut short"),
        (lambda: _cut(newest / "model.safetensors"), "model.safetensors is damaged"),
        (lambda: (newest / "model.safetensors").unlink(), "no weights"),
        (lambda: _cut(newest / "optimizer.pt"), "optimizer.pt is cut short"),
        (lambda: (newest / "optimizer.pt").unlink(), "no optimizer state"),
        (lambda: (newest / "model.safetensors.index.json").write_text(json.dumps(index)), "model-00001-of-00002"),
    ]:
        damage()
        assert newest_whole_checkpoint(str(out)) == str(older)
        (newest / CHECKSUMS).unlink()  # as another program, or an older version, has written it
        capsys.readouterr()
        assert newest_whole_checkpoint(str(out)) == str(older)
        assert message in capsys.readouterr().err
        with pytest.raises(InputError, match="cannot be used"):
            checkpoint_to_resume(SFTConfig(output_dir=str(out), resume_from_checkpoint=str(newest)))
        shutil.rmtree(newest)
        shutil.copytree(keep, newest)
    shutil.rmtree(older)
    shutil.rmtree(newest)
    assert newest_whole_checkpoint(str(out)) is None and newest_whole_checkpoint(str(tmp_path / "none")) is None


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_best_checkpoint_is_named_and_loaded(argv, tmp_path):
    """--load_best_model_at_end: the folder is the final one, and its weights are the result."""
    out = tmp_path / "out"
    best = (
        "--eval_ratio 0.25 --eval_strategy steps --eval_steps 1 --load_best_model_at_end True --greater_is_better True "
        "--metric_for_best_model loss --learning_rate 0.3 --save_total_limit 9"
    )
    train_sft.main(argv("sft", "full", out, best))
    state = json.loads((out / "trainer_state.json").read_text())
    folder = Path(state["best_model_checkpoint"])
    assert folder.parent == out and folder.name == f"checkpoint-{state['best_global_step']}" and folder.is_dir()
    assert state["best_global_step"] < STEPS, "the last is the best: nothing was tested"
    mine, theirs = weights(out), weights(folder)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_unwritable_folder_is_one_sentence(argv, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output_dir .*file/out cannot be written"):
        train_sft.main(argv("sft", "full", tmp_path / "file" / "out"))
