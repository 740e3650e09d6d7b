"""What a run leaves for whoever looks into its folder: evaluation at the end, a model card, adapters that load from anywhere."""

import importlib
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml

from base.layout import base_model_path
from base.loading import load_model
from base.model_card import model_card
from tests.processes import history

SCRIPT = {name: importlib.import_module(f"train_{name}") for name in ("sft", "dpo", "rm", "ppo")}


@pytest.fixture
def flags(rewards: str):
    more = {
        "dpo": " --loss_type sigmoid sft --beta 0.2",
        "ppo": f" --reward_fn {rewards} --response_length 4 --num_sample_generations 0",
    }
    return lambda name, extra="": f"--use_lora True --lora_r 4 {extra}" + more.get(name, "")


@pytest.mark.parametrize("name", SCRIPT)
def test_a_run_with_held_out_rows(command, flags, name: str, tmp_path: Path, llava: str):
    """--eval_ratio alone evaluates at the end, once; the card says what run.json knows."""
    SCRIPT[name].main(command(name, flags(name, "--eval_ratio 0.25 --save_strategy steps --save_steps 1")))
    out = tmp_path / name
    evaluated = [e for e in history(out) if any(key.startswith("eval_") for key in e)]
    assert [e["step"] for e in evaluated] == [2] and all("learning_rate" not in e for e in evaluated)
    last = {k: v for e in history(out) for k, v in e.items()}
    in_checkpoint = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any(key.startswith("eval_") for e in in_checkpoint for key in e)

    for folder in (out, out / "checkpoint-1", out / "checkpoint-2"):
        card = (folder / "README.md").read_text()
        assert "More Information Needed" not in card and f"`{llava}`" in card
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft" and head["tags"] == ["vl-rlhf", name, "lora"] and "base_model" not in head
    assert "| LoRA | r 4, alpha 16, dropout 0.05 |" in card and "| rows | 6 |" in card
    metric = "eval_objective/scores" if name == "ppo" else "eval_loss"
    assert f" {last[metric]:.4g} |" in card
    if name == "dpo":
        assert "| hyper-parameters of sigmoid | beta 0.2, " in card and "| loss_type | sigmoid sft |" in card
    else:
        assert "hyper-parameters" not in card
    assert not [p for p in out.rglob("README.md") if "More Information" in p.read_text()]


@pytest.mark.parametrize("strategy", ["steps --eval_steps 2", "steps --eval_steps 3", "epoch"])
def test_no_step_is_evaluated_twice(command, strategy: str, tmp_path: Path):
    SCRIPT["sft"].main(command("sft", f"--use_lora True --eval_ratio 0.25 --eval_strategy {strategy} --max_steps 4"))
    steps = [e["step"] for e in history(tmp_path / "sft") if "eval_loss" in e]
    assert steps == {"steps --eval_steps 2": [2, 4], "steps --eval_steps 3": [3, 4], "epoch": [2, 4]}[strategy]


def test_a_card_for_all_weights_of_a_hub_model_without_its_token():
    run = {
        "argv": ["train_sft.py", "--data_path", "my pairs.json", "--hub_token", "hf_secret", "--hub-token=hf_secret"],
        "arguments": {
            "ModelArguments": {"model_name_or_path": "org/model", "q_lora": False},
            "SFTConfig": {"output_dir": "runs/first", "learning_rate": 2e-5, "max_steps": -1},
        },
    }
    card = model_card(run, [], is_adapter=False)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/model" and head["library_name"] == "transformers"
    assert (
        "# first\n" in card
        and "hf_secret" not in card
        and "| learning_rate | 2e-05 |" in card
        and "max_steps" not in card
    )


def test_an_adapter_on_a_relative_base_loads_from_any_folder(command, tmp_path: Path, llava: str, monkeypatch):
    """Trained with a relative path; then from another working folder, and after base and adapter have moved together."""
    shutil.copytree(llava, tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    SCRIPT["dpo"].main(command("dpo", "--use_lora True --lora_r 4", model="runs/base", out=tmp_path / "runs" / "dpo"))
    adapter = tmp_path / "runs" / "dpo"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "runs" / "base")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = {name: w.clone() for name, w in load_model(str(adapter)).named_parameters()}
    assert peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path == named

    moved = elsewhere / "runs"
    shutil.move(tmp_path / "runs", moved)
    assert base_model_path(str(moved / "dpo")) == str(moved / "base")
    model = load_model(str(moved / "dpo"))
    assert all(torch.equal(before[name], w) for name, w in model.named_parameters())
    # what is trained on from there names the new place
    model.save_pretrained(elsewhere / "again")
    assert base_model_path(str(elsewhere / "again")) == str(moved / "base")


def test_a_hub_id_is_not_taken_for_a_folder_beside_the_adapter(tmp_path: Path):
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    assert base_model_path(str(tmp_path / "adapter")) == "org/model"
    (tmp_path / "org").mkdir()
    (tmp_path / "model").rename(tmp_path / "org" / "model")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", other)
    assert base_model_path(str(other)) == str(tmp_path / "org" / "model")
