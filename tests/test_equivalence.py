"""Rows that differ, spread over micro batches, ranks and evaluation batches in any way: one loss, one gradient, the same metrics."""

import json
import math
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from datasets import Dataset

import args
import train_dpo
import train_rm
import train_sft
from base.model import VLModelMixin
from base.segments import Layout
from base.trainer import VLDPOTrainer, VLTrainer
from data import DataSplits
from tests import zoo
from tests.processes import history
from tests.test_distributed import launch

LORA = "--use_lora True --lora_dropout 0 --lora_r 4"
SCRIPTS = {"sft": (train_sft, args.SFTConfig), "dpo": (train_dpo, args.DPOConfig), "rm": (train_rm, args.RMConfig)}
WORDS = "a red square lies on the blue table beside two green stars".split()


def ragged_rows(image_dir: Path, count: int = 8) -> list[dict]:
    """2 to 4 responses of 1 to 12 words, ties, a row of ties alone, rows without an image."""
    rows = []
    for i in range(count):
        K = 2 + i % 3
        image = i % 4 != 3
        rows.append(
            {
                "images": [str(image_dir / f"{i % 8}.png")] if image else [],
                "prompt": [{"role": "user", "content": "What is this?" + " photo" * (i % 4)}],
                "responses": [" ".join(WORDS[k : k + 1 + (5 * i + 7 * k) % 9]) + " x" * (k == 3) for k in range(K)],
                "ranks": [0.0] * K if i == 2 else [0.0, 1.0, 1.0, 2.0][:K],
                "margin": 0.3 * i,
                "source": ["human", "model"][i % 2],
            }
        )
    return rows


def as_conversations(rows: list[dict]) -> list[dict]:
    """The same as conversations: the first response is the answer."""
    return [
        {
            "images": row["images"],
            "messages": [*row["prompt"], {"role": "assistant", "content": row["responses"][0]}],
        }
        for row in rows
    ]


def trainer_of(
    script: str, checkpoint: str, rows: list[dict], out: Path, flags: str, eval_rows: list[dict] | None = None
):
    """The trainer that a script builds, for rows in memory; one step of plain SGD shows the gradient."""
    module, config = SCRIPTS[script]
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        config,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {out} --max_steps 1 --seed 0 --optim sgd "
        f"--learning_rate 0.01 --lr_scheduler_type constant --max_grad_norm 0 --save_strategy no --disable_tqdm True "
        f"--train_sampling_strategy sequential {flags}".split(),
    )
    given = as_conversations if script == "sft" else list
    evaluation = Dataset.from_list(given(eval_rows)) if eval_rows else None
    return module.build(*parsed, data=DataSplits(Dataset.from_list(given(rows)), evaluation, {}))[0]


def metrics_of(entry: dict) -> dict:
    return {k: v for k, v in entry.items() if not any(word in k for word in ("runtime", "per_second", "epoch", "time"))}


def one_step(script: str, checkpoint: str, rows: list[dict], out: Path, flags: str) -> tuple[dict, torch.Tensor]:
    """What one step logs, and how it moves the weights."""
    trainer = trainer_of(script, checkpoint, rows, out, flags)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    trainer.train()
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    return metrics_of(trainer.state.log_history[0]), moved


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("sft", ""),
        ("rm", ""),
        ("dpo", ""),
        ("dpo", "--loss_type sigmoid sft --loss_weights 1 0.5"),
        ("dpo", "--loss_type mpo"),
        ("dpo", "--loss_type mmdpo --pairs best_worst"),
        ("dpo", "--loss_type orpo sft --loss_weights 1 0.5"),
        pytest.param("dpo", "--loss_type simpo cpo", marks=pytest.mark.slow),
        pytest.param("dpo", "--loss_type ipo", marks=pytest.mark.slow),
        pytest.param("dpo", "--loss_type mdpo", marks=pytest.mark.slow),
        pytest.param("dpo", "--loss_type ddpo", marks=pytest.mark.slow),
        pytest.param("dpo", "--loss_type bco_pair", marks=pytest.mark.slow),
        pytest.param("rm", "--center_rewards_coefficient 0.1", marks=pytest.mark.slow),
    ],
)
def test_accumulated_micro_batches_are_one_large_batch(llava, image_dir, tmp_path, script: str, flags: str):
    rows = ragged_rows(image_dir)
    flags += " --freeze_vision_tower True"
    whole, moved = one_step(
        script, llava, rows, tmp_path, f"{flags} --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
    )
    for size in (1, 2):
        parts, moved_in_parts = one_step(
            script,
            llava,
            rows,
            tmp_path,
            f"{flags} --per_device_train_batch_size {size} --gradient_accumulation_steps {8 // size}",
        )
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert (moved_in_parts - moved).norm() <= 1e-4 * moved.norm(), script


def test_accumulation_for_a_class_that_would_have_the_loss_divided_again(image_dir, tmp_path):
    """Qwen2.5-VL says `accepts_loss_kwargs = False`, at which Trainer divides by the number of micro batches."""
    flags, rows = f"{LORA} --freeze_vision_tower True", ragged_rows(image_dir, 4)
    (whole, moved), (parts, moved_in_parts) = (
        one_step(
            "sft",
            zoo.checkpoint("qwen2_5_vl"),
            rows,
            tmp_path,
            f"{flags} --per_device_train_batch_size {size} --gradient_accumulation_steps {4 // size}",
        )
        for size in (4, 1)
    )
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert (moved_in_parts - moved).norm() <= 1e-4 * moved.norm() > 0


@pytest.mark.parametrize(
    ("script", "family", "flags"),
    [
        ("sft", "llava", ""),
        ("rm", "llava", LORA),
        ("dpo", "llava", LORA),
        ("dpo", "llava", f"{LORA} --gradient_checkpointing True --share_prefix False"),
        ("dpo", "llava", f"{LORA} --loss_type mdpo"),
        ("sft", "qwen2_5_vl", f"{LORA} --gradient_checkpointing True"),
        ("dpo", "qwen2_5_vl", f"{LORA} --gradient_checkpointing True"),
        ("dpo", "gemma3", LORA),  # windows, images that see themselves both ways
    ],
)
def test_rows_end_to_end_are_padded_rows(image_dir, tmp_path, monkeypatch, script: str, family: str, flags: str):
    """Loss, metrics and gradient of a step on rows whose padding is left out."""
    rows, checkpoint = ragged_rows(image_dir), zoo.checkpoint(family)
    flags += " --freeze_vision_tower True --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    found = []
    for end_to_end in (True, False):
        monkeypatch.setattr(VLModelMixin, "end_to_end", end_to_end)
        found.append(one_step(script, checkpoint, rows, tmp_path, flags))
    (metrics, moved), (padded_metrics, padded_moved) = found
    assert metrics.keys() == padded_metrics.keys()
    for name, value in padded_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert (moved - padded_moved).norm() <= 1e-5 * padded_moved.norm() > 0


def test_a_batch_is_looked_at_once(image_dir, tmp_path, monkeypatch):
    """Image positions are computed once for all passes of a step, and layouts by the collator, not from what is on the device."""
    for family in ("qwen2_5_vl", "qwen3_5"):
        trainer = trainer_of(
            "dpo", zoo.checkpoint(family), ragged_rows(image_dir, 3), tmp_path, f"{LORA} --freeze_vision_tower True"
        )
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
        core = trainer.base_model(trainer.model).model
        calls = mock.Mock(side_effect=core.get_rope_index)
        monkeypatch.setattr(core, "get_rope_index", calls)
        with monkeypatch.context() as context:
            context.setattr(Layout, "__init__", lambda *_: pytest.fail("made anew"))
            trainer.compute_loss(trainer.model, batch).backward()
        assert calls.call_count == 1, family


def test_the_loss_of_ragged_rows_by_hand(llava, image_dir, tmp_path):
    """At first every DPO pair costs ln 2 and every chosen token its own cross-entropy, whatever they share a micro batch with."""
    rows = ragged_rows(image_dir)
    flags = "--per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    assert one_step("dpo", llava, rows, tmp_path, flags)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer = trainer_of("dpo", llava, rows, tmp_path, f"{flags} --loss_type sft")
    total = tokens = 0.0
    for row in rows:  # each alone, from the log-probs of its responses
        batch = trainer._prepare_inputs(trainer.data_collator([row]))
        with torch.no_grad():
            logps = trainer.completion_logps(trainer.model, batch, batch["img_input_dict"])
        total -= logps.sum(1)[batch["chosen"]].sum().item()
        tokens += batch["completion_mask"].sum(1)[batch["chosen"]].sum().item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_means_of_micro_batches_are_seen(llava, image_dir, tmp_path, monkeypatch):
    """Without the count over all of them, the one of eight rows that has no pair takes an eighth off the first loss."""
    monkeypatch.setattr(VLTrainer, "_get_num_items_in_batch", lambda *_: None)
    flags = "--per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    step, _ = one_step("dpo", llava, ragged_rows(image_dir), tmp_path, flags)
    assert step["loss"] == pytest.approx(7 / 8 * math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("script", "flags"),
    [("sft", ""), ("rm", ""), ("dpo", "--loss_type sigmoid sft"), ("dpo", "--loss_type mpo")],
)
def test_evaluation_does_not_depend_on_its_batches(llava, image_dir, tmp_path, script: str, flags: str):
    rows = ragged_rows(image_dir, 7)
    trainer = trainer_of(script, llava, rows, tmp_path, flags, rows)
    with torch.no_grad():  # so that policy and reference differ
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    found = {}
    for size, drop_last in ((7, False), (1, False), (3, False), (3, True)):
        trainer.args.per_device_eval_batch_size, trainer.args.dataloader_drop_last = size, drop_last
        found[size, drop_last] = metrics_of(trainer.evaluate())
    assert len(found[7, False]) > 1 or script == "sft"
    for other in found.values():
        assert other.keys() == found[7, False].keys()
        for name, value in other.items():
            assert value == pytest.approx(found[7, False][name], rel=1e-4, abs=1e-5), name


def test_two_ranks_are_one_process(llava, image_dir, tmp_path):
    """Ragged rows of which one rank has more: loss, norm of the gradient, metrics, evaluation, calibration."""
    rows = ragged_rows(image_dir, 8)
    files = {}
    for name, part in (("train", rows), ("eval", ragged_rows(image_dir, 5))):
        for kind, given in (("pairs", part), ("sft", as_conversations(part))):
            files[kind, name] = tmp_path / f"{kind}-{name}.jsonl"
            files[kind, name].write_text("".join(json.dumps(row) + "\n" for row in given))

    def jobs(folder: str, batch: int, more: str) -> list[dict]:
        built = []
        for name, script, flags in (
            ("sft", "sft", ""),
            ("rm", "rm", ""),
            ("dpo", "dpo", "--loss_type sigmoid sft"),
            ("mmdpo", "dpo", "--loss_type mmdpo"),
        ):
            kind = "sft" if script == "sft" else "pairs"
            out = tmp_path / folder / name
            argv = (
                f"--model_name_or_path {llava} --dataset_name {files[kind, 'train']} --data_path {files[kind, 'train']} "
                f"--image_root {image_dir} --eval_data_path {files[kind, 'eval']} --eval_strategy steps --eval_steps 1 --output_dir {out} "
                f"--per_device_train_batch_size {batch} --per_device_eval_batch_size {batch} --max_steps 2 "
                f"--gradient_accumulation_steps 2 --learning_rate 1e-3 --save_strategy no --disable_tqdm True --seed 0 "
                f"--ddp_timeout 300 {LORA} {flags} {more}"
            ).split()
            built.append({"name": name, "script": script, "argv": argv, "out": str(out)})
        return built

    alone, two = jobs("one", 4, ""), jobs("two", 2, "--use_cpu True --ddp_backend gloo")
    for job in alone:
        SCRIPTS[job["script"]][0].main(job["argv"])
    launch("torchrun", two, tmp_path)
    for one, other in zip(alone, two, strict=True):
        mine, theirs = history(Path(one["out"])), history(Path(other["out"]))
        assert len(mine) == len(theirs) >= 4
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (one["name"], name, a["step"])
    tables = [json.loads((Path(jobs_[1]["out"]) / "calibration.json").read_text()) for jobs_ in (alone, two)]
    assert [b["pairs"] for b in tables[0]] == [b["pairs"] for b in tables[1]]


def test_sensitivity_to_images_by_hand():
    """Of a row: how far its score moves with the image of the next one in its batch. Those of 3, 7 and 6: 4, 1 and none."""
    rows = [{"images": images, "bias": 5.0 * i} for i, images in enumerate(([3], [7], [6], [], [2]))]

    def scores(_model, batch: list[dict]) -> torch.Tensor:
        return torch.tensor([row["bias"] + sum(row["images"]) for row in batch])

    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1), model_wrapped=None, args=SimpleNamespace(per_device_eval_batch_size=4),
        compute_loss_context_manager=nullcontext, data_collator=list, _prepare_inputs=list, response_scores=scores,
    )  # fmt: skip
    assert VLTrainer.image_sensitivity(trainer, rows) == pytest.approx((4 + 1) / 2)
    assert VLTrainer.image_sensitivity(trainer, rows, num_rows=2) == pytest.approx(4)  # each has the other's
    assert math.isnan(VLTrainer.image_sensitivity(trainer, rows[3:]))


def test_evaluated_losses_by_hand():
    """Two pairs with four chosen tokens: what a loss says of pairs is divided by 2, what it says of tokens by 4."""
    of_pairs, of_tokens = torch.tensor([1.0, 2.0]), torch.tensor([6.0, 0.5])

    def loss(_policy: object, _reference: object, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sft = of_tokens / batch["chosen_tokens_per_pair"]
        return of_pairs + sft, {"sigmoid": of_pairs, "sft": sft}

    kept = {"eval": defaultdict(list)}
    trainer = SimpleNamespace(preference_loss=loss, count_items=lambda batch: torch.tensor([2, 4]), _metrics=kept)
    VLDPOTrainer._store_evaluated_losses(trainer, SimpleNamespace(logps=torch.zeros(1)), None, {})
    assert {name: sums.tolist() for name, (sums,) in kept["eval"].items()} == {
        "loss": [[3, 2], [6.5, 4]], "loss/sigmoid": [[3, 2], [0, 4]], "loss/sft": [[0, 2], [6.5, 4]],
    }  # fmt: skip
