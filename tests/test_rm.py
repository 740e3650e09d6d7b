"""Reward models: where the reward is read, the loss of K ranked responses, what is saved, and one sentence for wrong input."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import args
import eval.reward
import train_rm
from base.calibration import draw_calibration
from base.heads import REWARD_HEAD
from base.layout import checkpoint_fingerprint
from base.packing import last_token_positions, pack_rows
from base.reward import VLRewardModel, score_rows
from common.errors import InputError
from data import DataSplits
from models import core_mapper_for
from tests import zoo

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "instructblip", "mllama"]
RESPONSES = ["A red square on the table.", "no", "two blue circles", "A green star and a yellow triangle."]


def k_rows(image_dir: Path, count: int = 3) -> list[dict]:
    """Rows with 2, 3, 4 responses of which one is a single word, ties and a margin."""
    return [
        {
            "images": [str(image_dir / f"{i}.png")],
            "prompt": [{"role": "user", "content": "What is this?" + " photo" * i}],
            "responses": RESPONSES[: 2 + i % 3],
            "ranks": [0.0, 1.0, 1.0, 3.0][: 2 + i % 3],
            "margin": 0.1 * (i + 1),
            "source": ["human", "model"][i % 2],
        }
        for i in range(count)
    ]


def rm_trainer(checkpoint: str, rows: list[dict], out: Path, flags: str = "", eval_rows: list[dict] | None = None):
    """The trainer that train_rm.py builds, for rows in memory."""
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        args.RMConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {out} --max_steps 3 --per_device_train_batch_size 2 --seed 0 "
        f"--learning_rate 1e-3 --lr_scheduler_type constant --save_strategy no --disable_tqdm True {flags}".split(),
    )
    evaluation = Dataset.from_list(eval_rows) if eval_rows else None
    return train_rm.build(*parsed, data=DataSplits(Dataset.from_list(rows), evaluation, {}))[0]


def test_the_last_real_token_is_found_in_every_layout():
    prompts, responses = [[1, 2, 3], [4]], [[[5, 6], [7]], [[8, 9, 10]]]
    packed = pack_rows(prompts, responses, pad_token_id=0)
    found = last_token_positions(packed["segment_ids"])
    assert packed["input_ids"].flatten()[found].tolist() == [6, 7, 10]
    plain = pack_rows([prompts[0], prompts[0], prompts[1]], [[r] for row in responses for r in row], pad_token_id=0)
    found = last_token_positions(plain["segment_ids"])
    assert plain["input_ids"].flatten()[found].tolist() == [6, 7, 10]
    # Responses with a common beginning, which is part of segment 0
    shared = pack_rows([[1, 2]], [[[5, 6, 7], [5, 6, 8, 9]]], pad_token_id=0, shared=[2])
    found = last_token_positions(shared["segment_ids"])
    assert shared["input_ids"].flatten()[found].tolist() == [7, 9]


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_each_answer_alone(family: str, image_dir: Path):
    """Packed, plain and one unpadded conversation at a time, the last through transformers' own output_hidden_states."""
    path = zoo.checkpoint(family)
    adapter = core_mapper_for(path)
    processor = adapter.processor(path)
    torch.manual_seed(0)
    model = adapter.reward_model(adapter.model.from_pretrained(path, dtype=torch.float32)).eval()
    rows = k_rows(image_dir)
    packed = score_rows(model, processor, rows)
    plain = score_rows(model, processor, rows, share_prefix=False)
    assert [len(r) for r in packed] == [2, 3, 4]
    alone = []
    for row in rows:
        alone.append([])
        for response in row["responses"]:
            conv = [*row["prompt"], {"role": "assistant", "content": response}]
            batch = processor(convs=[conv], images=[row["images"]])
            batch.pop("labels")
            with torch.no_grad():
                last = torch.tensor([batch["input_ids"].shape[1] - 1])
                hidden = model.backbone(**batch, completion_index=last).hidden
                alone[-1].append((hidden @ model.head.weight.T).item())
    for a, b, c in zip(packed, plain, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and a == pytest.approx(c, abs=1e-4)
    swapped = [row | {"images": [str(image_dir / "7.png")]} for row in rows]
    moved = score_rows(model, processor, swapped)
    assert all(abs(x - y) > 1e-6 for a, b in zip(packed, moved, strict=True) for x, y in zip(a, b, strict=True))


def test_loss_is_the_mean_over_rows_of_the_mean_over_ordered_pairs(llava, image_dir, tmp_path):
    rows = k_rows(image_dir)
    trainer = rm_trainer(llava, rows, tmp_path, "--center_rewards_coefficient 0.01 --per_device_train_batch_size 3")
    trainer.model.eval()
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch).item()
    expected = []
    for row, rewards in zip(rows, score_rows(trainer.model, trainer.processing_class, rows), strict=True):
        pairs = []
        for i, better in enumerate(row["ranks"]):
            for j, worse in enumerate(row["ranks"]):
                if better < worse:
                    difference = rewards[i] - rewards[j] - row["margin"]
                    pairs.append(math.log1p(math.exp(-difference)) + 0.01 * (rewards[i] + rewards[j]) ** 2)
        expected.append(sum(pairs) / len(pairs))
    assert len(expected) == 3
    assert loss == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_a_row_of_equals_has_no_loss(llava, image_dir, tmp_path):
    rows = [row | {"ranks": [0.0] * len(row["responses"])} for row in k_rows(image_dir)]
    trainer = rm_trainer(llava, rows, tmp_path)
    assert trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item() == 0
    batch = trainer.data_collator([*k_rows(image_dir)[:1], *rows[1:]])
    assert len(rows) > 1 and trainer.count_items(batch).tolist() == [1]  # the others have no part in the mean


def test_accumulation_equals_one_batch(llava, image_dir, tmp_path):
    histories = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = rm_trainer(
            llava,
            k_rows(image_dir, 8),
            tmp_path / str(size),
            f"--use_lora True --per_device_train_batch_size {size} --gradient_accumulation_steps {steps}",
        )
        trainer.train()
        histories.append([e["grad_norm"] for e in trainer.state.log_history if "loss" in e])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


@pytest.mark.parametrize("flags", ["", "--use_lora True --gradient_checkpointing True"])
def test_learns_reports_and_reloads(llava, image_dir, tmp_path, flags: str):
    rows = k_rows(image_dir, 6)
    trainer = rm_trainer(llava, rows, tmp_path, f"--max_steps 12 --learning_rate 1e-2 {flags}", eval_rows=rows)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if "vision_tower" in n}
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.9 and metrics["eval_rewards/chosen"] > metrics["eval_rewards/rejected"]
    assert {"eval_accuracy/human", "eval_accuracy/model"} <= set(metrics)
    assert metrics["eval_margin"] == pytest.approx(
        metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"], abs=1e-4
    )
    assert (tmp_path / "calibration.png").stat().st_size > 1000
    assert sum(b["pairs"] for b in json.loads((tmp_path / "calibration.json").read_text())) == 16
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)

    stale = tmp_path / "model-00002-of-00002.safetensors"  # of an earlier run: it would be loaded, too
    stale.write_bytes(b"old")
    trainer.save_model()
    assert not stale.exists()
    scores = score_rows(trainer.model, trainer.processing_class, rows)
    again = VLRewardModel.from_pretrained(str(tmp_path))
    processor = core_mapper_for(str(tmp_path)).processor(str(tmp_path))
    # Equal weights; outputs may differ by an ulp, because the two copies are aligned differently in memory.
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in again.named_parameters()) and "head.weight" in trained
    for found, expected in zip(score_rows(again, processor, rows), scores, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    # The folder is an ordinary checkpoint: every weight is there under the name that transformers and peft expect.
    if flags:
        plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(llava), str(tmp_path))
    else:
        plain, info = AutoModelForImageTextToText.from_pretrained(str(tmp_path), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    AutoProcessor.from_pretrained(str(tmp_path))
    mine = dict(trainer.model.backbone.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, mine[name]), name


def test_resume_continues_bit_for_bit(command, tmp_path):
    flags = "--use_lora True --max_steps 4 --save_strategy steps --save_steps 2"
    train_rm.main(command("rm", flags, out=tmp_path / "whole"))
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    train_rm.main(command("rm", flags + " --resume_from_checkpoint True", out=tmp_path / "half"))
    for name in ("adapter_model.safetensors", REWARD_HEAD):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "half" / name).read_bytes()


def test_any_data_set_is_scored_to_a_file(command, tmp_path, monkeypatch, capsys, pairs_json, image_dir):
    train_rm.main(command("rm", "--use_lora True"))
    argv = f"eval.reward --model_name_or_path {tmp_path}/rm --dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --batch_size 3"
    monkeypatch.setattr("sys.argv", argv.split())
    eval.reward.main()
    lines = [json.loads(line) for line in (tmp_path / "rm" / "scores.jsonl").read_text().splitlines()]
    model = VLRewardModel.from_pretrained(str(tmp_path / "rm"))
    processor = core_mapper_for(str(tmp_path / "rm")).processor(str(tmp_path / "rm"))
    rows = json.loads(pairs_json.read_text())
    assert len(lines) == len(rows) == 8 and all("pairs.json, row" in line["where"] for line in lines)
    for line in lines:
        row = rows[int(line["where"].rsplit("row ", 1)[1].split()[0])]
        assert line["responses"] == [row["chosen"], row["rejected"]]
        prompt = [{"role": "user", "content": row["prompt"]}]
        as_row = {"images": [str(image_dir / row["image"])], "prompt": prompt, "responses": line["responses"]}
        assert score_rows(model, processor, [as_row])[0] == pytest.approx(line["rewards"], abs=1e-4)
    accuracy = sum(line["rewards"][0] > line["rewards"][1] for line in lines) / 8
    assert f"accuracy {accuracy:.4f} over 8 pairs of 8 rows" in capsys.readouterr().out
    monkeypatch.setattr("eval.score.score_rows", lambda model, processor, rows, size: [[1.0, 1.0]] * len(rows))
    eval.reward.main()
    assert "accuracy 0.0000 over 8 pairs" in capsys.readouterr().out  # a tie is wrong


def test_calibration_table_by_hand(tmp_path):
    table = draw_calibration([0.1, -0.1, 2.0, 2.0], str(tmp_path), num_bins=2)
    assert [b["accuracy"] for b in table] == [0.5, 1.0] and [b["margin"] for b in table] == [0.1, 2.0]
    assert table[1]["expected"] == pytest.approx(1 / (1 + math.exp(-2)))
    ties, sure = draw_calibration([1.0, 0.0, 3.0, 0.0], str(tmp_path), num_bins=2)
    assert ties["accuracy"] == 0 and sure["accuracy"] == 1  # a tie is wrong
    assert sure["expected"] == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(-3))) / 2)


def test_wrong_folders_get_one_sentence(command, llava, tmp_path):
    with pytest.raises(InputError, match=r"has no reward_head\.safetensors"):
        VLRewardModel.from_pretrained(llava)
    train_rm.main(command("rm", "--use_lora True"))
    config = tmp_path / "rm" / "adapter_config.json"
    other = zoo.checkpoint("llava", seed=1)
    assert checkpoint_fingerprint(other) != checkpoint_fingerprint(llava)
    config.write_text(config.read_text().replace(llava, other))
    with pytest.raises(InputError, match="trained on other weights"):
        VLRewardModel.from_pretrained(str(tmp_path / "rm"))
