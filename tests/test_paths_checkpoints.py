"""Checkpoints: the newest by number, the best kept, and everything on disk before it gets its name."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dpo
import train_rm
import train_sft
from args import SFTConfig
from base.checkpoints import SafeCheckpoints
from base.resume import checkpoint_to_resume, newest_whole_checkpoint
from common.errors import InputError
from models.merging import bits_of

STEPS = 6


def whole_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": {}}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 100}')
    return folder


@pytest.mark.parametrize("steps", [(9, 10), (2, 10, 9), (100, 20, 3)])
def test_the_newest_checkpoint_is_the_one_with_the_largest_number(tmp_path, steps: tuple[int, ...]):
    for step in steps:
        whole_checkpoint(tmp_path / f"checkpoint-{step}")
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{max(steps)}")


def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path):
    folder = whole_checkpoint(tmp_path / "checkpoint-3")
    (folder / "optimizer.pt").unlink()
    flags = SFTConfig(output_dir=str(tmp_path), resume_from_checkpoint=str(folder))
    with pytest.raises(InputError, match=r"checkpoint-3 cannot be used: it has no optimizer state"):
        checkpoint_to_resume(flags)


def test_the_bits_of_a_run_are_found_above_its_checkpoints(tmp_path):
    flags = {"q_lora": True, "bits": 8}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"ModelArguments": flags}}))
    (tmp_path / "checkpoint-2").mkdir()
    assert bits_of(str(tmp_path / "checkpoint-2")) == bits_of(str(tmp_path)) == 8
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"ModelArguments": flags | {"q_lora": False}}}))
    assert bits_of(str(tmp_path / "checkpoint-2")) is None
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    assert bits_of(str(tmp_path / "elsewhere" / "deeper")) is None


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_outlives_the_limit(command, tmp_path, monkeypatch, limit: int):
    """--save_total_limit leaves the best and, while it trains, the newest; and the best one's weights are the result."""
    left, move = {}, SafeCheckpoints._move_old_checkpoints

    def recorded(trainer, folder: Path) -> None:
        move(trainer, folder)
        left[trainer.state.global_step] = {f.name for f in (tmp_path / "sft").glob("checkpoint-*")}

    monkeypatch.setattr(SafeCheckpoints, "_move_old_checkpoints", recorded)
    flags = (
        f"--max_steps {STEPS} --per_device_train_batch_size 2 --save_strategy steps --save_steps 1 --eval_ratio 0.25 "
        "--eval_strategy steps --eval_steps 1 --load_best_model_at_end True --metric_for_best_model loss --greater_is_better True "
        f"--learning_rate 0.3 --save_total_limit {limit}"
    )
    train_sft.main(command("sft", flags))
    out = tmp_path / "sft"
    state = json.loads((out / "trainer_state.json").read_text())
    best = out / f"checkpoint-{state['best_global_step']}"
    assert state["best_global_step"] < STEPS, "the last is the best: nothing was tested"
    assert [*left] == [*range(1, STEPS + 1)]
    for step, names in left.items():
        assert f"checkpoint-{step}" in names and len(names) <= 2, (step, names)
    kept = {f.name for f in out.glob("checkpoint-*")}
    assert kept == (
        {best.name} if limit == 1 else {best.name, f"checkpoint-{STEPS}"}
    )  # Trainer ends with the best alone
    final, best_weights = load_file(out / "model.safetensors"), load_file(best / "model.safetensors")
    assert all(torch.equal(final[name], weight) for name, weight in best_weights.items())


@pytest.mark.parametrize(
    "limit, best, left",
    [(2, None, {8, 10}), (2, 2, {2, 10}), (3, None, {2, 8, 10}), (1, 12, {10, 12}), (None, None, None)],
)
def test_which_checkpoints_are_left_by_hand(tmp_path, limit: int | None, best: int | None, left: set | None):
    """After step 10 of a run that went on from step 8: checkpoint-12 was passed over, and is none of the newest."""
    steps = {2, 8, 10, 12}
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    (aside := tmp_path / ".incomplete").mkdir()
    state = SimpleNamespace(
        global_step=10, best_model_checkpoint=None if best is None else str(tmp_path / f"checkpoint-{best}")
    )
    flags = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=limit)
    SafeCheckpoints._move_old_checkpoints(SimpleNamespace(state=state, args=flags), aside)
    assert {int(f.name.partition("-")[2]) for f in tmp_path.glob("checkpoint-*")} == (left or steps)


def test_every_file_is_on_disk_before_it_gets_its_name(command, tmp_path, monkeypatch):
    """A file is the same inode when it is synchronised and when it lies under its name: moved, not copied or written in place."""
    synchronised, events, fsync = {}, [], os.fsync

    def record_fsync(descriptor: int) -> None:
        synchronised[os.fstat(descriptor).st_ino] = len(events)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    for name in ("rename", "replace"):
        move = getattr(os, name)

        def record_move(source, target, move=move, **kwargs) -> None:
            events.append((os.stat(source).st_ino, str(target)))
            move(source, target, **kwargs)

        monkeypatch.setattr(os, name, record_move)
    train_sft.main(command("sft", "--save_strategy steps --save_steps 2"))
    out = tmp_path / "sft"
    folder = out / "checkpoint-2"
    renamed = next(n for n, (_, target) in enumerate(events) if target == str(folder))
    for file in folder.iterdir():
        assert synchronised.get(file.stat().st_ino, len(events)) <= renamed, file.name
    moved = {inode: n for n, (inode, _) in enumerate(events)}
    weights = [file for file in out.iterdir() if file.is_file() and file.suffix in (".safetensors", ".jinja")]
    assert (out / "model.safetensors") in weights
    for file in [*weights, out / "config.json"]:
        inode = file.stat().st_ino
        assert inode in moved and inode in synchronised and synchronised[inode] <= moved[inode], file.name


@pytest.mark.parametrize(
    ("script", "metric"), [("dpo", "rewards/accuracies"), ("sft", "eval_loss"), ("rm", "eval_accuracy")]
)
def test_a_best_metric_that_is_not_logged_is_refused_before_the_first_step(command, tmp_path, script: str, metric: str):
    flags = (
        "--use_lora True --eval_ratio 0.3 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 "
    )
    flags += "--load_best_model_at_end True --metric_for_best_model"
    main = {"dpo": train_dpo, "sft": train_sft, "rm": train_rm}[script].main
    with pytest.raises(InputError, match="--metric_for_best_model bleu is not what evaluation logs: choose") as error:
        main(command(script, f"{flags} bleu"))
    assert metric.removeprefix("eval_") in str(error.value).split("choose from")[1]
    assert not [*(tmp_path / script).glob("checkpoint-*")]
    main(command(script, f"{flags} {metric} --max_steps 1 --overwrite_output_dir True"))
    best = json.loads((tmp_path / script / "trainer_state.json").read_text())
    name = f"eval_{metric.removeprefix('eval_')}"
    assert best["best_metric"] == next(e[name] for e in best["log_history"] if name in e)
