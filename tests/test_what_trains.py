"""Which parts train and at which learning rate: projector, vision tower, its last layers, adapters in it; LoRA+; early stopping."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

import args
import merge_lora
import train_dpo
import train_sft
from base.checkpoints import SafeCheckpoints
from base.heads import freeze_lm_head
from base.learning_rates import split_by_rate
from base.loading import load_model
from common.errors import InputError
from models.assemble import add_lora, choose_what_trains
from tests import zoo
from tests.processes import history
from tests.test_dpo import dpo_trainer

VISION_LORA = "--use_lora True --lora_r 4 --lora_dropout 0 --lora_vision True --train_projector True"


def moved(before: str, after: Path) -> set[str]:
    """Names of the weights of a checkpoint that a run has changed."""
    old, new = load_file(Path(before) / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name, weight in old.items() if not torch.equal(weight, new[name])}


PARTS = {
    # flags -> (beginnings of the names that move, of names that do not)
    "--freeze_language_model True": (["multi_modal_projector"], ["vision_tower", "language_model", "lm_head"]),
    "--train_projector False": (["language_model"], ["multi_modal_projector", "vision_tower"]),
    # The features are those of the layer before the last one of two
    "--freeze_language_model True --train_projector False --train_vision_layers 1": (
        ["vision_tower.vision_model.encoder.layers.0"],
        [
            "multi_modal_projector",
            "language_model",
            "vision_tower.vision_model.encoder.layers.1",
            "vision_tower.vision_model.emb",
        ],
    ),
}


@pytest.mark.parametrize("flags", PARTS)
def test_what_is_named_trains_and_nothing_else(command, llava, tmp_path, flags: str):
    train_sft.main(command("sft", f"{flags} --max_steps 1"))
    names = {name.removeprefix("model.") for name in moved(llava, tmp_path / "sft")}
    move, stay = PARTS[flags]
    assert names
    for part in move:
        assert any(name.startswith(part) for name in names), (part, names)
    assert not [name for name in names if name.startswith(tuple(stay))]


def test_projector_alone_where_it_lies_in_the_tower(command, tmp_path):
    base = zoo.checkpoint("qwen2_5_vl")
    train_sft.main(command("sft", "--freeze_language_model True --train_projector True --max_steps 1", model=base))
    names = moved(base, tmp_path / "sft")
    assert names and all("visual.merger." in name for name in names)


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_adapters_in_the_tower_and_the_projector_in_dpo(command, tmp_path, family: str):
    """The first loss is ln 2; resumed, the run is the same; merged, the model is."""
    base = zoo.checkpoint(family)
    flags = f"{VISION_LORA} --max_steps 3 --save_strategy steps --save_steps 2 --gradient_checkpointing True"
    run, again = tmp_path / "run", tmp_path / "again"
    train_dpo.main(command("dpo", flags, model=base, out=run))
    whole = history(run)
    assert whole[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    trained = load_file(run / "adapter_model.safetensors")
    tower = [name for name in trained if ".lora_B." in name and ("vision_tower" in name or "visual" in name)]
    projector = [name for name in trained if ".lora_" not in name]
    assert tower and all(trained[name].any() for name in tower)
    assert projector and all("projector" in name or "merger" in name for name in projector)

    again.mkdir()
    (run / "checkpoint-2").rename(again / "checkpoint-2")
    (again / "run.json").write_text((run / "run.json").read_text())
    train_dpo.main(command("dpo", f"{flags} --resume_from_checkpoint True", model=base, out=again))
    resumed = load_file(again / "adapter_model.safetensors")
    assert resumed.keys() == trained.keys() and all(torch.equal(resumed[key], trained[key]) for key in trained)

    merge_lora.main([base, str(run), str(tmp_path / "merged")])
    names = moved(base, tmp_path / "merged")
    assert any(".blocks." in name or "encoder.layers.0" in name for name in names)
    assert any("projector" in name or "merger" in name for name in names)


def test_the_last_layers_alone_get_adapters():
    model = add_lora(
        load_model(zoo.checkpoint("qwen3_vl")),
        args.LoraArguments(use_lora=True, lora_r=2, lora_vision=True),
        vision_layers=1,
    )
    tower = {
        name
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "visual" in name
    }
    assert {name.rpartition(".")[2] for name in tower} == {"qkv", "proj", "linear_fc1", "linear_fc2"}
    assert all(name.startswith("model.visual.blocks.2.") for name in tower)
    with pytest.raises(InputError, match="4 is more than the 3 layers"):
        add_lora(
            load_model(zoo.checkpoint("qwen3_vl")), args.LoraArguments(use_lora=True, lora_vision=True), vision_layers=4
        )


def test_an_adapter_with_a_vision_part_continues(command, preference_data, tmp_path):
    """DPO on such an adapter: the reference is it as it was, tower and projector included."""
    train_sft.main(command("sft", VISION_LORA))
    trainer = dpo_trainer(str(tmp_path / "sft"), preference_data, tmp_path / "dpo", f"--use_lora True {VISION_LORA}")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and losses[-1] != pytest.approx(losses[0], abs=1e-4)
    core = trainer.base_model(trainer.model)
    assert all(any(p.requires_grad for p in part.parameters()) for part in core.projector())


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates
# ---------------------------------------------------------------------------------------------------------------------


def groups_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """name -> (learning rate, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_is_that_of_peft(llava, preference_data, tmp_path, use_dora: bool):
    flags = f"--use_lora True --lora_r 4 --use_dora {use_dora} --loraplus_lr_ratio 8 --weight_decay 0.1"
    trainer = dpo_trainer(llava, preference_data, tmp_path, flags)
    ours = groups_of(trainer.model, trainer.create_optimizer())
    theirs = create_loraplus_optimizer(
        trainer.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    expected = groups_of(trainer.model, theirs)
    assert {rate for rate, _ in expected.values()} == {1e-3, 8e-3}
    assert {name: rate for name, (rate, _) in ours.items()} == pytest.approx(
        {n: rate for n, (rate, _) in expected.items()}
    )
    assert {n: decay for n, (_, decay) in ours.items() if ".lora_A." in n or ".lora_B." in n} == {
        n: decay for n, (_, decay) in expected.items() if ".lora_A." in n or ".lora_B." in n
    }


def test_rates_of_tower_and_projector(llava, preference_data, tmp_path):
    flags = f"{VISION_LORA} --vision_lr 1e-5 --projector_lr 2e-4 --loraplus_lr_ratio 4"
    trainer = dpo_trainer(llava, preference_data, tmp_path, flags)
    found = groups_of(trainer.model, trainer.create_optimizer())
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3, "the rate that is logged"
    for name, (rate, _) in found.items():
        part = 1e-5 if "vision_tower" in name else 2e-4 if "projector" in name else 1e-3
        assert rate == pytest.approx(part * (4 if ".lora_B." in name else 1)), name
    trainer.train()  # the schedule keeps the ratios
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 4e-3, 1e-5, 4e-5, 2e-4}


def test_a_rate_moves_its_part_alone(command, llava, tmp_path):
    """One step of SGD moves a weight by rate times gradient."""
    deltas = []
    for rate in ("1e-3", "1e-2"):
        flags = f"--max_steps 1 --optim sgd --max_grad_norm 0 --lr_scheduler_type constant --projector_lr {rate}"
        train_sft.main(command("sft", flags, out=tmp_path / rate))
        old, new = load_file(Path(llava) / "model.safetensors"), load_file(tmp_path / rate / "model.safetensors")
        deltas.append({name: new[name] - weight for name, weight in old.items()})
    for name, slow in deltas[0].items():
        factor = 10 if "multi_modal_projector" in name else 1
        torch.testing.assert_close(deltas[1][name], slow * factor, rtol=1e-2, atol=1e-6, msg=name)
    assert any(slow.any() for name, slow in deltas[0].items() if "multi_modal_projector" in name)


def test_a_rate_of_what_does_not_train_is_refused(llava, preference_data, tmp_path):
    with pytest.raises(InputError, match="--vision_lr is the rate of a part in which nothing trains"):
        dpo_trainer(llava, preference_data, tmp_path, "--use_lora True --vision_lr 1e-5")


def test_a_resumed_run_has_the_rates_of_its_flags(command, tmp_path, capsys, monkeypatch):
    """A rate that has changed is said, and counts, at the place of the schedule where the run goes on."""
    flags = "--use_lora True --lr_scheduler_type linear --save_strategy steps --save_steps 1"
    run = tmp_path / "run"
    train_sft.main(command("sft", f"{flags} --max_steps 1", out=run))
    decays, load = [], SafeCheckpoints._load_optimizer_and_scheduler

    def look(trainer: SafeCheckpoints, checkpoint: str) -> None:
        load(trainer, checkpoint)
        decays.extend(group["weight_decay"] for group in trainer.optimizer.param_groups)

    monkeypatch.setattr(SafeCheckpoints, "_load_optimizer_and_scheduler", look)
    changed = f"{flags} --max_steps 2 --learning_rate 3e-3 --weight_decay 0.2 --resume_from_checkpoint True"
    train_sft.main(command("sft", changed, out=run))
    assert "--learning_rate 0.003 (was 0.001)" in capsys.readouterr().err
    rates = [entry["learning_rate"] for entry in history(run) if "learning_rate" in entry]
    assert rates == [1e-3, pytest.approx(3e-3 / 2)]  # the second of two steps
    assert 0.2 in decays


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping
# ---------------------------------------------------------------------------------------------------------------------

EVALUATED = "--eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --load_best_model_at_end True"


def test_early_stopping_waits_as_long_as_it_says(command, tmp_path):
    """The held-out loss falls, and the highest counts as the best: two evaluations after it, then the end."""
    best_is_highest = "--metric_for_best_model loss --greater_is_better True"
    flags = (
        f"--use_lora True --eval_ratio 0.25 {EVALUATED} {best_is_highest} --early_stopping_patience 2 --max_steps 12"
    )
    train_sft.main(command("sft", f"{flags} --learning_rate 1e-2 --lr_scheduler_type constant"))
    losses = [entry["eval_loss"] for entry in history(tmp_path / "sft") if "eval_loss" in entry]
    state = json.loads((tmp_path / "sft" / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert losses[best - 1] == max(losses) and state["global_step"] == best + 2 < 12


def test_groups_of_rates_by_hand():
    """Each weight keeps the decay of its group; the rate of the flag everybody has comes first."""
    one, two, three = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.AdamW(
        [{"params": [one, two], "weight_decay": 0.1}, {"params": [three], "weight_decay": 0.0}], lr=1.0
    )
    rates = {id(one): ("vision_lr", 1e-4), id(two): ("learning_rate", 1e-3), id(three): ("vision_lr", 1e-4)}
    split_by_rate(optimizer, rates)
    found = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [([two], 1e-3, 0.1), ([one], 1e-4, 0.1), ([three], 1e-4, 0.0)]


def test_a_head_that_is_tied_to_the_embeddings_trains_with_them():
    """An lm_head that no loss reaches is frozen, but not the embeddings with it."""
    for tied in (True, False):
        embeddings, head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False)
        head.weight = embeddings.weight if tied else head.weight
        freeze_lm_head(
            SimpleNamespace(get_output_embeddings=lambda h=head: h, get_input_embeddings=lambda e=embeddings: e)
        )
        assert embeddings.weight.requires_grad and head.weight.requires_grad is tied


def test_the_last_layers_of_a_frozen_tower_train():
    layers = [torch.nn.Linear(1, 1) for _ in range(3)]
    core = SimpleNamespace(
        freeze_vision_tower=lambda: [layer.requires_grad_(False) for layer in layers], vision_layers=lambda: layers
    )
    plan = SimpleNamespace(
        freeze_vision_tower=True, train_vision_layers=1, train_projector=None, freeze_language_model=False
    )
    choose_what_trains(core, plan)
    assert [layer.weight.requires_grad for layer in layers] == [False, False, True]
