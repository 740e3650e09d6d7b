"""The benchmarks run, and their sides do the same work. No timings are asserted: machines are shared."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf

from benchmarks import (
    data_scale,
    data_wait,
    dpo_vs_trl,
    estimators,
    floor,
    grpo_vs_trl,
    padding,
    ppo_reuse,
    rm_vs_plain,
    scaling,
)
from benchmarks.models import FAMILIES
from benchmarks.rivals import __main__ as rivals
from benchmarks.rivals.__main__ import compared
from benchmarks.rivals.__main__ import table as rivals_table
from benchmarks.rivals.watch import Job, known_as, pairs_of, same_start


@pytest.mark.parametrize("case", ["llava-50", "llava-50-four", "llava-150-edited", "llava-50-full"])
def test_losses_of_both_sides_agree(case: str, tmp_path):
    (found,) = dpo_vs_trl.main(f"--size tiny --steps 2 --case {case} --out {tmp_path}".split())
    assert found["largest_loss_difference"] < 1e-4
    assert found["timings"]["trl"]["losses"][0] != found["timings"]["trl"]["losses"][1]  # it trains
    assert all(t["peak_mib"] > t["held_mib"] > 0 and len(t["compute"]) == 2 for t in found["timings"].values())
    assert found["floor"]["cached"] < found["floor"]["online"]
    written = json.loads((tmp_path / "dpo_vs_trl_tiny.json").read_text())
    assert written["cases"][0]["ratio"] == found["ratio"] and case in (tmp_path / "dpo_vs_trl_tiny.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llava"}))
def test_losses_agree_on_the_other_families(family: str):
    (found,) = dpo_vs_trl.main(f"--size tiny --steps 2 --case {family}-50".split())
    assert found["largest_loss_difference"] < 1e-4


def test_the_floor_by_hand():
    config = tf.LlamaConfig(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )
    decoder = floor.decoder_of(config, lora_r=3)
    layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q k v o, and the three of the MLP
    assert decoder == floor.Decoder(
        linear=2 * layer, attention=2 * 2 * 4, head=40, first=4 * 8, lora=2 * 3 * (8 + 6 + 6 + 8 + 3 * 12)
    )
    row = floor.Row(shared=6, own=(2, 3))
    assert row.tokens == 11 and row.seen == 18 + (12 + 2) + (18 + 4.5)
    macs = floor.step_macs(decoder, [row], scored=5, tower=7, online=False, lora=False, checkpointing=False)
    base, head = decoder.linear * 11, 40 * 5
    attention = decoder.attention * row.seen
    assert macs == 7 + (base + attention + head) + (base - decoder.first * 11 + 2 * attention + head) + base + head


def test_reward_models_agree_and_share_the_tower():
    for case in rm_vs_plain.main("--size tiny --steps 1".split()):
        assert case["largest_loss_difference"] < 1e-5
        images = case["tower_images_per_step"]
        assert images["plain"] == 4 and images["shared"] == (1 if "4 answers" in case["case"] else 2)


def test_ppo_updates_agree_with_and_without_reuse():
    found = ppo_reuse.main("--size tiny --rounds 1 --tokens 8".split())
    plain, pixels, shared = (found["images_per_update"][name] for name in ("plain", "pixels", "shared"))
    assert plain > pixels > shared == 2  # two prompts per update, each encoded once
    for name in ("plain", "pixels"):
        assert found["kl"][name] == pytest.approx(found["kl"]["shared"], abs=1e-5)


def test_waiting_for_data_is_measured_from_the_real_trainer():
    inside, workers = data_wait.main("--size tiny --steps 3 --workers 0 1".split())
    assert 0 < inside["waiting"] < inside["step"] and 0 < inside["share"] < 1
    assert workers["workers"] == 1 and workers["waiting"] < workers["step"]


@pytest.mark.slow
def test_grpo_of_both_sides_runs(tmp_path):
    (found,) = grpo_vs_trl.main(f"--size tiny --case llava-50 --updates 1 --out {tmp_path}".split())
    assert set(found["ratio"]) == {"update", "rollout", "training pass"} and found["memory"] > 0
    assert found["bound"] == pytest.approx(8 * (found["prompt"] + 50) / (found["prompt"] + 400))
    assert "llava-50" in (tmp_path / "grpo_vs_trl_tiny.md").read_text()


def test_the_large_set_is_read_whole_and_streamed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data_scale.make(tmp_path, 60, 7)
    assert len([*(tmp_path / "images").rglob("*.jpg")]) == 7
    for part in ("load", "stream"):
        args = argparse.Namespace(
            rows=60, folder=tmp_path, dataset_num_proc=None, check_images="all", part=part, pictures=7
        )
        data_scale.measure(args)
    said = capsys.readouterr().out
    assert "60 rows, bad 0" in said and "first row: " in said and "of the main process: " in said
    datasets.enable_progress_bars()


def test_padded_rows_and_rows_end_to_end_agree():
    for case in padding.main("--size tiny --steps 1".split()):
        assert case["largest_loss_difference"] < 1e-5 and 0 < case["real share"] < 1


def test_finished_estimators_are_read_and_averaged(tmp_path, monkeypatch):
    """Nothing is trained again; mean and half the range over seeds, by hand."""
    for seed, found in enumerate(({"sft": 0.1, "grpo": 0.0}, {"sft": 0.2, "grpo": 0.06})):
        for name, chair in found.items():
            folder = tmp_path / f"seed-{seed}" / name
            folder.mkdir(parents=True)
            result = {"chair_i": chair, "exact_captions": 0.5, "yesno_accuracy": 0.75, "counting_accuracy": 1.0}
            (folder / "result.json").write_text(json.dumps(result | {"seconds": 10 + 4 * seed}))
            log = [{"loss": 1.0}, *({"objective/scores": 0.1 * n + seed} for n in range(3))]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    monkeypatch.setattr(estimators, "_quietly", None)
    estimators.main(f"--output_dir {tmp_path} --seeds 0 1 --estimators grpo".split())
    lines = (tmp_path / "estimators.md").read_text().splitlines()
    assert lines[-2].startswith("| sft | 0.150 ± 0.050 | 0.500 ± 0.000 |")
    assert lines[-1] == "| grpo | 0.030 ± 0.030 | 0.500 ± 0.000 | 0.750 ± 0.000 | 1.000 ± 0.000 | 12 ± 2 |"
    assert (tmp_path / "estimators.png").stat().st_size > 10_000
    assert estimators.rewards_of(tmp_path / "seed-1" / "grpo") == pytest.approx([1.0, 1.1, 1.2])


def _job(tmp_path, rows: list[dict], answers: int) -> Job:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job("dpo", "llava", "base", str(tmp_path / "rows.jsonl"), "adapter", str(tmp_path), 2, answers, steps=3)


def test_rivals_get_the_pairs_of_a_row_and_the_same_weights(tmp_path):
    row = {"images": ["a.png"], "prompt": [{"role": "user", "content": "Q"}], "responses": ["x", "y", "z"]}
    job = _job(tmp_path, [row, row], 3)
    assert [(p["chosen"], p["rejected"]) for p in pairs_of(job)] == [("x", "y"), ("x", "z"), ("y", "z")] * 2
    assert job.pairs == 6 and job.max_steps == 5  # one before, three measured, one for memory
    names = {
        "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight": "layers.0.mlp.up_proj.lora_A",
        "pretrained_model.base_model.model.model.layers.11.self_attn.q_proj.lora_B.default.weight": "layers.11.self_attn.q_proj.lora_B",
        "v_head.summary.weight": "head",
        "v_head.summary.bias": "head.bias",
        "base_model.model.score.modules_to_save.default.weight": "head",
        "head.weight": "head",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
    }
    assert {name: known_as(name) for name in names} == names


def test_the_first_side_gives_its_weights_and_others_must_train_the_same(tmp_path):
    first, other = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 1, bias=False)}), torch.nn.ModuleDict()
    other["v_head"] = torch.nn.ModuleDict({"summary": torch.nn.Linear(3, 1), "dropout": torch.nn.Dropout(0.1)})
    for model in (first, other):
        same_start(model, tmp_path / "adapter.safetensors")
    assert torch.equal(other["v_head"]["summary"].weight, first["head"].weight)
    assert other["v_head"]["summary"].bias.item() == 0 and other["v_head"]["dropout"].p == 0
    with pytest.raises(ValueError, match=r"other weights train here: .*'more.weight'"):
        same_start(
            torch.nn.ModuleDict({**first, "more": torch.nn.Linear(1, 1, bias=False)}), tmp_path / "adapter.safetensors"
        )


def test_the_table_of_rivals_by_hand(monkeypatch):
    """Twice the time at half the memory; one that failed has a dash."""
    monkeypatch.setattr(rivals, "CLOCK", "step_cpu")
    ours = {"step_cpu": 2.0, "peak_mib": 50.0, "losses": [0.7, 0.6]}
    found = {
        "ours": ours,
        "cached": ours | {"step_cpu": 1.0},
        "trl": {"step_cpu": 4.0, "peak_mib": 100.0, "losses": [0.7, 0.5]},
        "swift": {"error": "no"},
    }
    result = compared(found)
    assert result["ratio"] == {"trl": [2.0, 4.0]} and result["memory"] == {"trl": [0.5, 0.5]}
    assert result["loss_difference"]["trl"] == pytest.approx(0.1)
    line = rivals_table([{"case": "a", "sides": found, "load": 1.0, **result}], ["trl", "swift"]).splitlines()[-1]
    assert line == "| a | 2.00 / 1.00 | 2.00 / 4.00 | 0.50 / 0.50 | – | – | 1.0e-01 | 1.0 |"


@pytest.mark.slow
def test_ours_and_trls_losses_agree_in_processes_of_their_own(tmp_path):
    cases = ["dpo, equal rows", "dpo, Qwen2.5-VL, ragged rows", "dpo, four answers", "sft, packed"]
    flags = [word for case in cases for word in ("--case", case)]
    found = rivals.main(["--size", "tiny", "--steps", "1", "--out", str(tmp_path), *flags])
    assert [case["case"] for case in found] == cases
    for case in found:
        assert case["loss_difference"]["trl"] < 1e-5 and len(case["sides"]["ours"]["losses"]) == 3
        assert case["sides"]["ours"]["losses"][0] != case["sides"]["ours"]["losses"][2]  # it trains
    assert "sft, packed" in (tmp_path / "rivals_tiny.md").read_text()


@pytest.mark.slow
def test_the_script_for_a_gpu_reaches_its_end_without_one(tmp_path):
    script = Path(rivals.ROOT, "benchmarks", "gpu_rivals.sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [script, "--out", tmp_path, "--case", "dpo, four*", "--steps", "1"]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert re.fullmatch(rf"dpo, four answers: exit 0, \d+ s, {tmp_path}/1\n", done.stdout), done.stderr
    assert "| dpo, four answers |" in (tmp_path / "1" / "rivals_tiny.md").read_text()


def test_traffic_between_gpus_by_hand():
    """1 GB of weights, 100 million of them trained; 16 GPUs in two nodes of 8, 100 GB/s within a node and 10 between."""
    rates = scaling.Rates(node_gb_s=100, network_gb_s=10)
    of = {e.name: e for e in scaling.ENGINES}

    def seconds(name: str, gpus: int = 16) -> tuple[float, float]:
        return scaling.seconds_between(of[name], gpus, 8, weights=1e9, trained=1e8, passes=3, rates=rates)

    assert seconds("LoRA, DDP", 1) == (0, 0)
    assert seconds("LoRA, DDP") == pytest.approx((0.8e9 * 15 / 16 / 10e9, 0))  # gradients in float32, there and back
    assert seconds("LoRA, DDP", 8) == pytest.approx((0.8e9 * 7 / 8 / 100e9, 0))
    assert seconds("all weights, zero2.json") == pytest.approx((0.2e9 * 15 / 16 / 10e9,) * 2)
    assert seconds("all weights, zero3.json") == pytest.approx((3.2e9 * 15 / 16 / 10e9, 0))
    within = 3.2e9 * 7 / 8 / 100e9 + 0.8e9 / 8 / 2 / 10e9  # weights in the node, an eighth of the gradients between two
    assert seconds("all weights, FSDP2 within nodes (not here)") == pytest.approx((within, 0))


@pytest.mark.slow
def test_steps_and_rollouts_on_paper():
    model, rates = "Qwen/Qwen2.5-VL-7B-Instruct", scaling.Rates(tflops=100)
    found = scaling.step_seconds(model, scaling.ENGINES[0], 8, rows=1, answer=150, rates=rates)
    twice = scaling.step_seconds(model, scaling.ENGINES[0], 8, rows=1, answer=150, rates=scaling.Rates(tflops=200))
    # 7.6 billion weights, 1,644 tokens: forward, backward, recomputed, and the reference, with adapters of rank 64 on top
    assert found["compute"] == pytest.approx(4 * 2 * 6.5e9 * 1644 / 100e12, rel=0.15)
    assert twice["compute"] == pytest.approx(found["compute"] / 2) and twice["gib"] == found["gib"] > 14
    assert found["step"] == max(found["compute"], found["between"])
    few, many = (scaling.rollout_seconds(model, prompts, 8, 100, scaling.Rates()) for prompts in (1, 16))
    assert few["in place"] == pytest.approx(100 * 28 * 0.4e-3)  # what Python takes, whatever is read
    assert few["server"] == pytest.approx(100 * 16.6e9 / 2000e9, rel=0.1)  # what is read: the weights
    assert many["server"] > few["server"]
