"""What the scripts hand on: every flag reaches the place that it is for, and what is loaded trains."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import args
import train_sft
from base import self_check
from common.errors import InputError
from data import DataSplits
from data.lengths import LengthLimits
from tests.test_paths_dpo import sft_adapter
from tests.test_rm import rm_trainer

CONFIG = {"sft": args.SFTConfig, "rm": args.RMConfig, "dpo": args.DPOConfig, "ppo": args.PPOConfig}
LIMITS = "--max_length 90 --max_prompt_length 80 --max_target_length 3 --overlong error"


@pytest.fixture
def ranked_json(tmp_path, image_dir) -> Path:
    """Rows with three answers and their scores."""
    path = tmp_path / "ranked.json"
    answers = ["one two three four", "five six seven eight", "nine ten eleven twelve"]
    rows = [
        {"image": f"{i}.png", "question": "What is this?", "responses": answers, "scores": [3, 2.5, 1]}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(algorithm: str, argv: list[str], data: DataSplits | None = None):
    parsed = args.parse(args.ModelArguments, args.DataArguments, args.LoraArguments, CONFIG[algorithm], argv=argv)
    return importlib.import_module(f"train_{algorithm}").build(*parsed, data=data)[0]


def of_ranked(llava, ranked_json, image_dir, out: Path, extra: str) -> list[str]:
    return (
        f"--model_name_or_path {llava} --dataset_name mmrlhf --data_path {ranked_json} --image_root {image_dir} "
        f"--output_dir {out} --disable_tqdm True {extra}"
    ).split()


@pytest.mark.parametrize("algorithm", ["sft", "rm", "dpo", "ppo"])
def test_length_limits_reach_the_batch(command, rewards, algorithm: str):
    extra = f"--reward_fn {rewards} --use_lora True --rollouts_per_prompt 2" if algorithm == "ppo" else ""
    trainer = build(algorithm, command(algorithm, f"{LIMITS} {extra}"))
    assert trainer.data_collator.limits == LengthLimits(90, 80, 3, "error")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    if algorithm == "sft":
        last = [row[row != -100] for row in batch["labels"]]
        assert all(len(row) >= 3 for row in last)
    elif algorithm != "ppo":
        assert batch["completion_mask"].sum(1).max() == 3


@pytest.mark.parametrize("algorithm", CONFIG)
def test_prompts_that_are_too_long_are_left_out_of_both_splits(command, rewards, image_dir, algorithm: str):
    rows = []
    for text in ("What is this?", "What is this? " * 40):
        asked = {"role": "user", "content": f"<image>\n{text}"}
        row = {"prompt": [asked], "messages": [asked, {"role": "assistant", "content": "one"}], "where": text}
        rows.append(row | {"images": [str(image_dir / "0.png")], "responses": ["one", "two"], "ranks": [0.0, 1.0]})
    data = Dataset.from_list(rows)
    extra = f"--reward_fn {rewards} --use_lora True --rollouts_per_prompt 2" if algorithm == "ppo" else ""
    trainer = build(algorithm, command(algorithm, f"--max_prompt_length 80 {extra}"), DataSplits(data, data, {}))
    assert trainer.train_dataset["where"] == trainer.eval_dataset["where"] == ["What is this?"]


@pytest.mark.parametrize("algorithm", ["rm", "dpo"])
@pytest.mark.parametrize(
    "flags, pairs",
    [
        ("", [(0, 1), (0, 2), (1, 2)]),
        ("--pairs best_worst", [(0, 2)]),
        ("--pairs adjacent", [(0, 1), (1, 2)]),
        ("--pairs score_margin --score_margin 1", [(0, 2), (1, 2)]),
    ],
)
def test_pairs_are_those_of_the_flags(llava, ranked_json, image_dir, tmp_path, algorithm: str, flags: str, pairs: list):
    trainer = build(algorithm, of_ranked(llava, ranked_json, image_dir, tmp_path / "out", flags))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert sorted(zip(batch["chosen"].tolist(), batch["rejected"].tolist(), strict=True)) == pairs


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("algorithm", ["rm", "dpo", "ppo"])
def test_share_prefix_reaches_the_collator(command, rewards, algorithm: str, share: bool):
    extra = f"--reward_fn {rewards} --use_lora True --rollouts_per_prompt 2" if algorithm == "ppo" else ""
    trainer = build(algorithm, command(algorithm, f"--share_prefix {share} {extra}"))
    assert trainer.data_collator.share_prefix is share


def test_what_losses_need_reaches_the_collator(command):
    trainer = build("dpo", command("dpo", "--loss_type mdpo --corruption diffusion --diffusion_step 321 --seed 7"))
    collator = trainer.data_collator
    assert (collator.corruption, collator.diffusion_step, collator.seed) == ("diffusion", 321, 7)
    assert collator.needs == frozenset(trainer.needs)


@pytest.mark.parametrize("train_on, answers", [("all", ["one", "two"]), ("last", ["two"])])
def test_train_on_reaches_the_labels(llava, image_dir, tmp_path, train_on: str, answers: list[str]):
    turns = [("human", "<image>\nWhat?"), ("gpt", "one"), ("human", "And?"), ("gpt", "two")]
    row = {"image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "d.json").write_text(json.dumps([row]))
    argv = (
        f"--model_name_or_path {llava} --dataset_name vlquery_json --data_path {tmp_path}/d.json --image_root {image_dir} "
        f"--output_dir {tmp_path}/out --train_on {train_on}"
    )
    trainer = build("sft", argv.split())
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"][0]
    said = trainer.processing_class.tokenizer.decode(labels[labels != -100], skip_special_tokens=True).split()
    assert said == answers


@pytest.mark.parametrize("algorithm", CONFIG)
def test_every_script_checks_log_probs_before_its_first_step(command, rewards, monkeypatch, algorithm: str):
    """In the layout that it trains with."""
    layouts = []

    def check(model, processor, share_prefix, prepare) -> None:
        layouts.append(share_prefix)
        raise InputError("checked")

    monkeypatch.setattr(self_check, "check_log_probs", check)
    extra = f"--reward_fn {rewards} --use_lora True --rollouts_per_prompt 2" if algorithm == "ppo" else ""
    trainer = build(algorithm, command(algorithm, extra))
    with pytest.raises(InputError, match="checked"):
        trainer.train()
    assert layouts == [algorithm != "sft"] and trainer.state.global_step == 0


# -- what is loaded trains


@pytest.mark.parametrize("algorithm", ["sft", "rm", "dpo"])
def test_a_loaded_adapter_goes_on_training(command, llava, tmp_path, algorithm: str):
    adapter = sft_adapter(llava, tmp_path / "adapter", seed=0)
    importlib.import_module(f"train_{algorithm}").main(command(algorithm, "--use_lora True", model=adapter))
    before, after = (load_file(Path(f) / "adapter_model.safetensors") for f in (adapter, tmp_path / algorithm))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert not torch.equal(weight, after[name]), name
    if algorithm == "dpo":  # whose reference is the adapter as it was loaded
        first = json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())["log_history"][0]
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5) == first["rewards/rejected"]


# -- SFT's loss


def sft_trainer(llava: str, rows: list[dict], out: Path, flags: str):
    argv = (
        f"--model_name_or_path {llava} --dataset_name x --output_dir {out} --save_strategy no --disable_tqdm True "
        f"--lr_scheduler_type constant --train_sampling_strategy sequential --learning_rate 1e-3 {flags}"
    )
    parsed = args.parse(args.ModelArguments, args.DataArguments, args.LoraArguments, args.SFTConfig, argv=argv.split())
    return train_sft.build(*parsed, data=DataSplits(Dataset.from_list(rows), None, {}))[0]


def test_sfts_loss_is_a_mean_over_the_tokens_of_all_accumulated_batches(llava, image_dir, tmp_path):
    """Answers of one and of many words: a mean over micro batches would be another number."""
    answers = ["no", "A red square on the table beside two blue circles.", "a", "A green star and a yellow triangle."]
    rows = [
        {
            "images": [str(image_dir / f"{i}.png")],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}],
        }
        for i, answer in enumerate(answers)
    ]
    found = []
    for n, size in enumerate((4, 1)):
        flags = f"--max_steps 2 --per_device_train_batch_size {size} --gradient_accumulation_steps {4 // size}"
        trainer = sft_trainer(llava, rows, tmp_path / str(n), flags)
        if size == 4:
            batch = trainer.data_collator(rows)
            with torch.no_grad():
                outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)[1]
            by_hand = -outputs.logps.sum().item() / int((batch["labels"] != -100).sum())
            assert (
                trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(by_hand, abs=1e-4) and by_hand > 1
            )
        trainer.train()
        found.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    assert found[0][0][0] == pytest.approx(by_hand, abs=1e-4)
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


# -- the reward model's metrics


def test_equal_rewards_are_not_right(llava, image_dir, tmp_path, preference_rows):
    trainer = rm_trainer(llava, preference_rows[:2], tmp_path)
    batch = trainer.data_collator(preference_rows[:2])
    trainer.model.train()
    trainer.log_metrics(torch.tensor([1.0, 1.0, 3.0, 0.5]), batch)
    trainer.log({})
    found = trainer.state.log_history[-1]
    assert found["accuracy"] == 0.5 and found["margin"] == pytest.approx(1.25)
    assert found["rewards/chosen"] == 2 and found["rewards/rejected"] == 0.75
    assert found["mean_reward"] == pytest.approx(5.5 / 4)


def test_metrics_of_sources_and_rows_that_only_fill_up_a_batch(llava, image_dir, tmp_path, preference_rows):
    rows = [row | {"source": source} for row, source in zip(preference_rows, "abb", strict=False)]
    trainer = rm_trainer(llava, rows, tmp_path)
    batch = trainer.data_collator([*rows[:2], rows[2] | {"repeated": True}])
    trainer.model.train()
    trainer.log_metrics(torch.tensor([1.0, 2.0, 3.0, 0.5, 9.0, 8.0]), batch)
    trainer.log({})
    found = trainer.state.log_history[-1]
    assert (found["accuracy/a"], found["accuracy/b"], found["accuracy"]) == (0, 1, 0.5)
    assert found["mean_reward"] == pytest.approx(6.5 / 4) and found["margin"] == pytest.approx(1.5 / 2)
