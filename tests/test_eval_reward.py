"""eval.reward with models: a reward model's scalars and DPO's implicit reward, resumable, through the command line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from args import LoraArguments
from base.loading import load_model
from base.reward import VLRewardModel
from common.errors import InputError
from eval import reward
from eval.benchmark_files import read_task
from eval.files import read_records
from models import core_mapper_for
from models.assemble import add_lora
from tests import zoo


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MM-RLHF-RewardBench's format, three pairs, two of them of one id."""
    folder = tmp_path_factory.mktemp("mmrlhf")
    zoo.image(0).save(folder / "short_0.png")
    rows = [
        {
            "id": "a",
            "image": "short_0.png",
            "prompt": "What is in this image?",
            "chosen": "A red square.",
            "rejected": "no",
        },
        {
            "id": "a",
            "image": "short_0.png",
            "prompt": "Is there a dog?",
            "chosen": "two blue circles",
            "rejected": "yes, one",
        },
        {"id": "b", "image": "short_0.png", "prompt": "describe", "chosen": "table", "rejected": "A green star."},
    ]
    file = folder / "mm_reward_bench.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.reward", *map(str, argv)])
    reward.main()


@pytest.fixture(scope="module")
def reward_model(llava: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What train_rm.py leaves: backbone, head, processor."""
    folder = str(tmp_path_factory.mktemp("rm"))
    torch.manual_seed(0)
    VLRewardModel(load_model(llava)).save_pretrained(folder)
    core_mapper_for(llava).processor(llava).save_pretrained(folder)
    return folder


def test_reward_model_scores_pairs(
    pairs: Path, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    argv = (
        "--task",
        "mmrlhf",
        "--data_path",
        pairs,
        "--model_name_or_path",
        reward_model,
        "--output",
        tmp_path,
        "--batch_size",
        2,
    )
    command(monkeypatch, *argv)
    scores = {r["id"]: r["scores"] for r in read_records(tmp_path / "scores_mmrlhf.jsonl")}
    assert list(scores) == ["0", "1", "2"]
    assert "overall/accuracy" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["mmrlhf"]
    assert results["scores"]["overall/accuracy"] == pytest.approx(sum(a > b for a, b in scores.values()) / 3)
    assert results["generation"]["reward"] == "reward model" and results["checkpoint"] == reward_model

    rows = read_task("mmrlhf", pairs)
    processor = core_mapper_for(reward_model).processor(reward_model)
    model = VLRewardModel.from_pretrained(reward_model)
    for row in rows:
        for response, score in zip(row["responses"], scores[row["id"]], strict=True):
            conv = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": response}]
            inputs = processor(convs=[conv], images=[row["images"]])
            inputs.pop("labels")
            last = torch.tensor([inputs["input_ids"].shape[1] - 1])
            with torch.no_grad():
                assert model(**inputs, completion_index=last).item() == pytest.approx(score, abs=1e-4)


def test_implicit_reward_is_beta_times_the_log_ratio(
    pairs: Path, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    policy = add_lora(load_model(llava), LoraArguments(use_lora=True, lora_r=4))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapter = tmp_path / "checkpoint-20"
    policy.save_pretrained(adapter)
    merged = tmp_path / "merged"
    policy.merge_and_unload().save_pretrained(merged)
    core_mapper_for(llava).processor(llava).save_pretrained(merged)

    argv = ("--task", "mmrlhf", "--data", pairs, "--implicit", "--beta", 0.5)
    command(monkeypatch, *argv, "--model", llava, "--adapter", adapter, "--output", tmp_path / "lora")
    command(monkeypatch, *argv, "--model", adapter, "--output", tmp_path / "folder")
    command(monkeypatch, *argv, "--model", merged, "--ref", llava, "--output", tmp_path / "full")
    found = [
        [r["scores"] for r in read_records(tmp_path / n / "scores_mmrlhf.jsonl")] for n in ("lora", "folder", "full")
    ]
    assert found[0] == found[1] == [pytest.approx(s, abs=2e-4) for s in found[2]]
    meta = json.loads((tmp_path / "folder" / "results.json").read_text())["mmrlhf"]
    assert (meta["checkpoint"], meta["adapter"], meta["step"]) == (llava, str(adapter), 20)

    row, models = read_task("mmrlhf", pairs)[0], [load_model(str(merged)), load_model(llava)]
    processor = core_mapper_for(llava).processor(llava)
    for response, score in zip(row["responses"], found[0][0], strict=True):
        conv = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": response}]
        inputs = processor(convs=[conv], images=[row["images"]])
        tokens = (inputs["labels"] != -100).sum()
        with torch.no_grad():
            logp, ref = (-m(**inputs).loss * tokens for m in models)
        assert score == pytest.approx(0.5 * (logp - ref).item(), abs=1e-3) and abs(score) > 1e-2


def test_what_does_not_fit_together_is_one_sentence(
    pairs: Path, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--task", "mmrlhf", "--data_path", pairs, "--output", tmp_path)
    with pytest.raises(InputError, match="needs --ref, the checkpoint that training started from"):
        command(monkeypatch, *argv, "--implicit", "--model_name_or_path", llava)
    with pytest.raises(InputError, match=r"has no reward_head\.safetensors"):
        command(monkeypatch, *argv, "--model_name_or_path", llava)
    with pytest.raises(InputError, match="exactly one of --model_name_or_path, --scores and --replies"):
        command(monkeypatch, *argv)
    video = tmp_path / "video.jsonl"
    text = pairs.read_text()
    video.write_text(
        text.replace('"image": "short_0.png", "prompt": "describe"', '"video": "v.mp4", "prompt": "describe"')
    )
    argv = (
        "--task",
        "mmrlhf",
        "--data_path",
        video,
        "--image_root",
        pairs.parent,
        "--output",
        tmp_path,
        "--model_name_or_path",
        llava,
    )
    with pytest.raises(InputError, match="row '2' shows a video"):
        command(monkeypatch, *argv, "--implicit")
