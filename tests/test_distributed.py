"""Two ranks against one: DDP, every DeepSpeed config and FSDP, all weights and LoRA, through the real launchers."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from base.loading import load_model
from base.ppo_trainer import VLPPOTrainer
from tests import zoo
from tests.distributed_jobs import SCRIPTS
from tests.processes import ON_POLICY, ROOT, ZERO_OR_ONE, history, script_of
from tests.tiny_server import TinyServer

MODES = {"full": "", "lora": "--use_lora True --lora_r 4 --lora_dropout 0"}
CELLS = [
    *itertools.product(("sft", "dpo", "rm", "ppo", "grpo"), MODES),
    ("rloo", "lora"),
    ("reinforce_plus_plus", "full"),
    ("drop_uniform_groups", "lora"),
    ("dynamic_sampling", "lora"),
    ("online_dpo", "lora"),
]
# One launch per config, and between them every script in both modes; test_every_cell runs the others.
QUICK = {
    "zero2": [("sft", "lora"), ("ppo", "full"), ("grpo", "full"), ("rloo", "lora")],
    "zero2_offload": [("dpo", "full")],
    "zero3": [
        ("sft", "full"),
        ("dpo", "lora"),
        ("rm", "full"),
        ("ppo", "lora"),
        ("grpo", "lora"),
        ("dynamic_sampling", "lora"),
    ],
    "zero3_offload": [("rm", "lora")],
}

Jobs = list[dict]


def free_port() -> str:
    """A port on which no other run on this machine listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a launcher in a new process group; it prints to `log`."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True, start_new_session=True
        )


def kill(process: subprocess.Popen) -> None:
    """Kill a launcher and everything below it; torchrun starts its workers in new sessions."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            one.kill()
    process.wait()


def finish(process: subprocess.Popen, log: Path, timeout: float = 900) -> None:
    """Wait for a launcher; if it hangs, kill all its processes."""
    try:
        assert process.wait(timeout) == 0, log.read_text()[-6000:]
    finally:
        if process.poll() is None:
            kill(process)


def launch(launcher: str, jobs: Jobs, folder: Path) -> None:
    """Run jobs on two ranks by torchrun or deepspeed."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    port = ["--master_port", free_port()]
    module = "tests.distributed_jobs"
    command = {
        "torchrun": ["torchrun", "--nproc_per_node", "2", *port, "-m", module, str(path)],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", *port, "--module", module, str(path)],
    }[launcher]
    finish(start(command, folder / "log"), folder / "log")


@pytest.fixture
def job(command, rewards, tmp_path: Path, llava: str) -> Callable[..., dict]:
    """job(script, mode, folder, batch size on one rank, further flags): three steps of a global batch of 4."""

    def build(
        script: str, mode: str, folder: str, batch: int, extra: str = "", model: str = llava, name: str = ""
    ) -> dict:
        flags = f"--per_device_train_batch_size {batch} --max_steps 3 --ddp_timeout 300 {MODES[mode]}"
        if script in ON_POLICY:
            reward = rewards.replace(":length", ":odd") if script in ZERO_OR_ONE else rewards
            flags += f" --reward_fn {reward} --response_length 6 {ON_POLICY[script]}"
        name = name or f"{script}-{mode}"
        out = tmp_path / folder / name
        return {
            "name": name,
            "script": script_of(script),
            "argv": command(script, f"{flags} {extra}", model, out),
            "out": str(out),
        }

    return build


def assert_same_curve(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Every logged number of every step, and the weights under the same names."""
    mine, theirs = history(one), history(other)
    assert len(mine) == len(theirs) >= 3
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, a["step"])
    saved = (p.relative_to(one) for p in one.rglob("*.safetensors"))
    for file in sorted(p for p in saved if p.parts[0] != "rollout_adapter"):  # whose names are drawn
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys(), f"{file}: {sorted(a.keys() ^ b.keys())[:4]}"
        for name, tensor in a.items():
            # Where a gradient is only rounding error, Adam divides it by a number as small, and the weight moves by up
            # to the learning rate in either direction. Single weights may differ so; a key's bias does as a whole,
            # because softmax cancels it and its gradient is 0.
            difference = (tensor - b[name]).abs().where(tensor != b[name], 0)  # Gemma 4 has infinite bounds
            assert difference.max() < 4e-3 and (difference.mean() < 1e-5 or name.endswith("k_proj.bias")), name


LAUNCH = {
    "ddp": ("torchrun", "--use_cpu True --ddp_backend gloo"),
    "fsdp": ("torchrun", '--use_cpu True --ddp_backend gloo --fsdp "full_shard auto_wrap"'),
} | {name: ("deepspeed", f"--deepspeed ds_configs/{name}.json") for name in QUICK}


def check_cells(cells: list[tuple[str, str]], setup: str, job, tmp_path: Path) -> None:
    """Run cells on one process and on two ranks; compare what they logged and saved."""
    launcher, flags = LAUNCH[setup]
    alone = [job(*cell, "one", 4) for cell in cells]
    two = [job(*cell, "two", 2, flags) for cell in cells]
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    launch(launcher, two, tmp_path)
    print(setup, (tmp_path / "jobs.times").read_text())
    for one, other in zip(alone, two, strict=True):
        assert_same_curve(Path(one["out"]), Path(other["out"]))
        if one["name"].startswith("dynamic_sampling"):
            assert any(step["val/generation_rounds"] > 1 for step in history(Path(one["out"]))), "nothing was replaced"


def test_ddp_equals_one_process(job, tmp_path: Path):
    check_cells(CELLS, "ddp", job, tmp_path)


@pytest.mark.parametrize("config", QUICK)
def test_deepspeed_equals_one_process(job, tmp_path: Path, config: str):
    check_cells(QUICK[config], config, job, tmp_path)


OF_FSDP = [*itertools.product(("sft", "dpo", "rm"), MODES)]
QUICK_OF_FSDP = [("sft", "full"), ("dpo", "lora")]


@pytest.mark.parametrize(
    "cells",
    [
        QUICK_OF_FSDP,
        pytest.param([cell for cell in OF_FSDP if cell not in QUICK_OF_FSDP], marks=pytest.mark.slow),
    ],
)
def test_fsdp_equals_one_process(job, tmp_path: Path, cells: list[tuple[str, str]]):
    check_cells(cells, "fsdp", job, tmp_path)
    held = re.findall(r"this process holds ([\d,]+) of ([\d,]+) weights", (tmp_path / "log").read_text())
    assert len(held) == len(cells)  # the first process says it; its part is half, rounded up in every weight
    for part, total in ([int(n.replace(",", "")) for n in pair] for pair in held):
        assert 0.5 * total <= part < 0.52 * total


def without_dropout(checkpoint: str, folder: Path) -> str:
    """A copy of a checkpoint whose layers drop nothing out (Q-Formers do): ranks draw other numbers than one process."""
    shutil.copytree(checkpoint, folder)
    file = folder / "config.json"
    file.write_text(re.sub(r'("\w*dropout\w*": )[\d.]+', r"\g<1>0.0", file.read_text()))
    return str(folder)


def assert_two_equal_one(launcher: str, two: Jobs, alone: Jobs, folder: Path) -> None:
    """The curves of runs on two ranks are those of the same runs in this process."""
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    launch(launcher, two, folder)
    for one, other in zip(alone, two, strict=True):
        assert_same_curve(Path(one["out"]), Path(other["out"]))


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.BUILDERS)
def test_families_under_fsdp(job, tmp_path: Path, family: str):
    """Towers, projectors and decoders of all kinds, with tied and untied heads, in layers that FSDP finds by itself or by their class."""
    launcher, flags = LAUNCH["fsdp"]
    model = without_dropout(zoo.checkpoint(family), tmp_path / "model")
    kinds = sorted({type(layer).__name__ for layer in load_model(model).get_decoder().layers})
    by_class = f"--fsdp_config '{json.dumps({'transformer_layer_cls_to_wrap': kinds})}'"
    # PaliGemma's template takes one turn
    cells = [("rm" if family == "paligemma" else "sft", "full", ""), ("dpo", "lora", by_class)]
    alone = [job(script, mode, "one", 4, model=model) for script, mode, _ in cells]
    two = [job(script, mode, "two", 2, f"{flags} {config}", model=model) for script, mode, config in cells]
    assert_two_equal_one(launcher, two, alone, tmp_path)


@pytest.mark.slow
def test_losses_that_read_more_under_fsdp(job, tmp_path: Path):
    """Logits and vocabularies of both models (chip, tpo_token), with all weights and adapters; and DoRA."""
    # Noise is drawn batch by batch, and the batches of two ranks are others
    cells = {
        "chip": ("dpo", "full", "--loss_type chip --corruption black"),
        "tpo_token": ("dpo", "lora", "--loss_type tpo_token --corruption black"),
        "dora": ("sft", "lora", "--use_dora True"),
        "orthogonal": ("dpo", "lora", "--init_lora_weights orthogonal --gradient_checkpointing True"),
    }
    launcher, flags = LAUNCH["fsdp"]
    alone, two = (
        [
            job(script, mode, folder, batch, f"{extra} {more}", name=name)
            for name, (script, mode, extra) in cells.items()
        ]
        for folder, batch, more in (("one", 4, ""), ("two", 2, flags))
    )
    assert_two_equal_one(launcher, two, alone, tmp_path)


@pytest.mark.slow
def test_fsdp_by_the_launcher_of_accelerate(job, tmp_path: Path):
    """Its config file in place of the flag."""
    alone = job("sft", "full", "one", 4)
    two = job("sft", "full", "two", 2, "--use_cpu True --ddp_backend gloo")
    SCRIPTS["sft"].main(alone["argv"])
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/fsdp2.yaml", "--num_processes", "2"]
    log = tmp_path / "log"
    finish(start([*command, "--main_process_port", free_port(), "train_sft.py", *two["argv"]], log), log)
    assert "FSDP gathers 4 layers" in log.read_text()
    assert_same_curve(Path(alone["out"]), Path(two["out"]))


@pytest.mark.slow
def test_checkpoints_of_fsdp_are_those_of_one_process(job, tmp_path: Path):
    """One goes on where two have stopped and the other way round; evaluation alone and the best checkpoint read them as well."""
    launcher, flags = LAUNCH["fsdp"]
    saving = "--save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 1 --eval_ratio 0.25"
    saving += " --dataloader_drop_last True --lr_scheduler_type constant --load_best_model_at_end True"
    cells = [("sft", "full"), ("rm", "lora")]
    half = [job(*cell, "half", 4, saving) for cell in cells]
    whole, crossed, evaluated = [], [], []
    for cell, one in zip(cells, half, strict=True):
        second = f"{flags} --resume_from_checkpoint {one['out']}/checkpoint-2"
        whole.append(job(*cell, "whole", 2, f"{saving} --max_steps 4 {flags}"))
        crossed.append(job(*cell, "crossed", 2, f"{saving} --max_steps 4 {second}"))
        evaluated.append(job(*cell, "evaluated", 2, f"--do_train False --eval_ratio 0.25 {second}"))
    for one in half:
        SCRIPTS[one["script"]].main(one["argv"])
    launch(launcher, [*whole, *crossed, *evaluated], tmp_path)
    for i, cell in enumerate(cells):
        back = job(*cell, "back", 4, f"{saving} --max_steps 4 --resume_from_checkpoint {whole[i]['out']}/checkpoint-2")
        SCRIPTS[back["script"]].main(back["argv"])
        assert_same_curve(Path(back["out"]), Path(whole[i]["out"]))
        assert_same_curve(Path(back["out"]), Path(crossed[i]["out"]))
        expected = next(entry for entry in history(Path(half[i]["out"])) if entry["step"] == 2 and "eval_loss" in entry)
        found = json.loads((Path(evaluated[i]["out"]) / "eval_results.json").read_text())
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", QUICK)
def test_every_cell(job, tmp_path: Path, config: str):
    check_cells([cell for cell in CELLS if cell not in QUICK[config]], config, job, tmp_path)


@pytest.fixture
def mixed_files(preference_rows: list[dict], image_dir: Path, tmp_path: Path) -> dict[str, str]:
    """Rows with 0, 1 and 2 images, so that in most steps the ranks hold different numbers."""
    pairs, conversations = [], []
    for i, row in enumerate(preference_rows):
        images = [f"{(i + n) % 8}.png" for n in range((0, 1, 0, 2)[i % 4])]
        prompt = "<image>" * len(images) + "What is this?"
        chosen, rejected = row["responses"]
        pairs.append({"image": images, "prompt": prompt, "chosen": chosen, "rejected": rejected})
        turns = [{"from": "user", "value": prompt}, {"from": "assistant", "value": chosen}]
        conversations.append({"image": images, "conversations": turns})
    files = {}
    for name, rows in (("sft", conversations), ("other", pairs)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows))
        files[name] = f"--data_path {path}"
    return files


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero3", "fsdp"])
def test_ranks_without_images(job, mixed_files, tmp_path: Path, setup: str):
    """Text-only rows on one rank, images on the other: no rank waits forever, and the curve is that of one process."""
    reward_model = tmp_path / "one" / "rm-full"
    cells = [
        ("sft", "full", ""),
        ("dpo", "lora", ""),
        ("rm", "full", "--freeze_vision_tower False"),  # comes before the cell that reads it
        ("ppo", "lora", "--gradient_accumulation_steps 2 --ds3_gather_for_generation False"),
        # The tower trains; value function and reward model have separate towers.
        (
            "ppo",
            "full",
            "--gradient_accumulation_steps 2 --ds3_gather_for_generation False --freeze_vision_tower False "
            f"--reward_model_name_or_path {reward_model} --init_value_from_reward True",
        ),
    ]
    launcher, flags = LAUNCH[setup]
    if setup == "fsdp":
        cells = [*cells[:3], ("sft", "full", "--freeze_vision_tower False --gradient_accumulation_steps 2")]

    def build(script: str, mode: str, extra: str, folder: str, batch: int, more: str) -> dict:
        data = mixed_files["sft" if script == "sft" else "other"]
        return job(script, mode, folder, batch, f"{data} {extra} {more} --max_steps 4")

    alone = [build(*cell, "one", 2, "") for cell in cells]
    two = [build(*cell, "two", 1, flags) for cell in cells]
    assert_two_equal_one(launcher, two, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3"])
def test_kinds_of_adapters(job, tmp_path: Path, setup: str):
    """Adapters in the tower beside a projector that trains, rates by part; kinds and starts, where DeepSpeed takes them."""
    cells = {
        "vision": ("dpo", "--lora_vision True --train_projector True --vision_lr 1e-4 --loraplus_lr_ratio 4"),
        "orthogonal": ("sft", "--init_lora_weights orthogonal --gradient_checkpointing True"),
    }
    if setup != "zero3":
        cells["dora"] = ("sft", "--use_dora True --use_rslora True")
        cells["eva"] = ("dpo", "--init_lora_weights eva")
        cells["loftq"] = ("dpo", "--q_lora True --init_lora_weights loftq")
    if setup == "ddp":
        cells["pissa"] = ("dpo", "--init_lora_weights pissa")
    launcher, flags = LAUNCH[setup]
    alone, two = (
        [job(script, "lora", folder, batch, f"{extra} {more}", name=name) for name, (script, extra) in cells.items()]
        for folder, batch, more in (("one", 4, ""), ("two", 2, flags))
    )
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    launch(launcher, two, tmp_path)
    for one, other in zip(alone, two, strict=True):
        if one["name"] != "eva":
            assert_same_curve(Path(one["out"]), Path(other["out"]))
            continue
        # Components of nearly equal size turn with the order in which rounding errors add up
        for a, b in zip(history(Path(one["out"])), history(Path(other["out"])), strict=True):
            assert b == pytest.approx(a, rel=5e-4, abs=5e-5), a["step"]


@pytest.fixture
def talkative(llava: str, tmp_path: Path) -> str:
    """A checkpoint for which a sixth of all tokens end an answer, so that answers end anywhere."""
    folder = tmp_path / "talkative"
    shutil.copytree(llava, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    file.write_text(json.dumps(settings | {"eos_token_id": [*range(10, vocabulary, 6)]}))
    return str(folder)


@pytest.mark.parametrize("gather", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rollouts_of_different_lengths(job, talkative, tmp_path: Path, monkeypatch, gather: bool):
    """ZeRO-3, gathered by layer or per rollout: ranks end together or alone, and sample what one process samples."""
    longest = []
    write = VLPPOTrainer._write_samples

    def note(self: VLPPOTrainer, rollouts: list) -> None:
        lengths = rollouts[0].mask.sum(1).tolist()
        longest.append((max(lengths[:2]), max(lengths[2:])))  # of the rows of each rank
        write(self, rollouts)

    monkeypatch.setattr(VLPPOTrainer, "_write_samples", note)
    _, flags = LAUNCH["zero3"]
    more = "--response_length 12"
    cells = [*(("ppo", mode) for mode in MODES), ("grpo", "lora")]
    alone = [job(*cell, "one", 4, more, talkative) for cell in cells]
    two = [job(*cell, "two", 2, f"{more} {flags} --ds3_gather_for_generation {gather}", talkative) for cell in cells]
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    assert sum(a != b for a, b in longest) >= 3, f"the ranks end together: {longest}"
    launch("deepspeed", two, tmp_path)
    for one, other in zip(alone, two, strict=True):
        assert_same_curve(Path(one["out"]), Path(other["out"]))


@pytest.fixture
def server(llava: str) -> Iterator[TinyServer]:
    tiny = TinyServer(llava)
    yield tiny
    tiny.close()


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3"])
def test_a_server_answers_two_ranks(job, server, tmp_path: Path, setup: str):
    """Each rank asks for its own prompts, the first one alone gives the server the adapter, and the numbers are those of one process."""
    launcher, flags = LAUNCH[setup]
    cells = [("grpo", "lora"), ("ppo", "lora")]
    alone = [job(*cell, "one", 4, f"--rollout_timeout 60 --rollout_url {server.url}") for cell in cells]
    two = [job(*cell, "two", 2, f"--rollout_timeout 60 --rollout_url {server.url} {flags}") for cell in cells]
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    asked = [path.rpartition("/")[2] for path in server.paths]
    launch(launcher, two, tmp_path)
    assert sorted(path.rpartition("/")[2] for path in server.paths) == sorted(2 * asked)
    assert asked.count("load_lora_adapter") == len(cells) * 3 and len(server.loaded) == len(set(server.loaded))
    for one, other in zip(alone, two, strict=True):
        assert_same_curve(Path(one["out"]), Path(other["out"]))
        ratios = [step["first/ratio_deviation"] for step in history(Path(other["out"]))]
        assert max(ratios) < 1e-4 or "ppo" in one["name"]  # sampled at .7, and log-probs are those before temperature


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero2"])
def test_a_server_that_fails_one_rank_ends_both(job, server, tmp_path: Path, setup: str):
    """In the second update it answers one prompt and not the other: both ranks end in a sentence, with a checkpoint; resumed, the run asks for
    that prompt alone and ends as one that met no trouble."""
    launcher, flags = LAUNCH[setup]
    flags += f" --rollout_timeout 60 --rollout_url {server.url} --save_strategy steps --save_steps 1"
    whole, part = job("grpo", "lora", "whole", 2, flags), job("grpo", "lora", "part", 2, flags)
    launch(launcher, [whole], tmp_path)
    refused: list[int] = []

    def reply(path: str, body: dict) -> object:
        if path.endswith("completions") and body["model"].endswith("-1"):
            with server.lock:
                refused.append(body["seed"])
            if body["seed"] == refused[0]:
                return 400, {"error": {"message": "no room"}}
        return server.route(path, body)

    server.reply = reply
    launch(launcher, [part | {"refused": True}], tmp_path)
    said = sorted((tmp_path / f"jobs.said-{rank}").read_text() for rank in (0, 1))
    kept = f"The answers are kept in {part['out']}: --resume_from_checkpoint True goes on with them."
    assert said[0] == f"The rollout server failed on another process. {kept}"
    assert "answered 400 Bad Request (no room)" in said[1] and said[1].endswith(kept)
    assert (Path(part["out"]) / "checkpoint-1").is_dir()
    server.reply, before = server.route, len(server.requests)
    launch(launcher, [part | {"argv": [*part["argv"], "--resume_from_checkpoint", "True"]}], tmp_path)
    again = [body["seed"] for body in server.requests[before:] if body.get("model", "").endswith("-1")]
    assert again == [refused[0]]
    assert_same_curve(Path(whole["out"]), Path(part["out"]))


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3", "fsdp"])
def test_cached_reference_on_two_ranks(job, pairs_json, tmp_path: Path, setup: str):
    """All weights, a fresh adapter, a continued one: the online reference's curve; a second run computes nothing."""
    rows = tmp_path / "five.json"  # one rank gets a row more
    rows.write_text(json.dumps(json.loads(pairs_json.read_text())[:5]))
    launcher, flags = LAUNCH[setup]
    cache = tmp_path / "cache"
    common = f"--data_path {rows} --dataloader_drop_last True"
    caching = (
        f"{common} {flags} --precompute_ref_log_probs True --ref_log_probs_dir {cache} --precompute_ref_batch_size 2"
    )
    first = job("dpo", "lora", "start", 4, f"{common} --learning_rate 0.03")
    SCRIPTS["dpo"].main(first["argv"])
    cells = {"full": {"mode": "full"}, "fresh": {"mode": "lora"}, "continued": {"mode": "lora", "model": first["out"]}}
    alone, two, again = [], [], []
    for name, cell in cells.items():
        alone.append(job("dpo", **cell, name=name, folder="one", batch=4, extra=common))
        two.append(job("dpo", **cell, name=name, folder="two", batch=2, extra=caching))
        again.append(job("dpo", **cell, name=name, folder="again", batch=2, extra=caching))
    for one in alone:
        SCRIPTS["dpo"].main(one["argv"])
    launch(launcher, two, tmp_path)
    keys = sorted(p.parent.name for p in cache.glob("*/about.json"))
    files = sorted(cache.rglob("*.safetensors"))
    # Under ZeRO-3 the reference of a fresh adapter is a second model, the same as with all weights.
    assert len(keys) == (2 if setup == "zero3" else 3) and len(files) == 2 * len(keys), files
    launch(launcher, again, tmp_path)
    assert sorted(cache.rglob("*.safetensors")) == files, "computed again"
    for one, other, third in zip(alone, two, again, strict=True):
        assert history(Path(one["out"]))[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert_same_curve(Path(one["out"]), Path(other["out"]))
        assert_same_curve(Path(one["out"]), Path(third["out"]))


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero3", "fsdp"])
def test_killed_on_two_ranks_and_resumed(command, tmp_path: Path, setup: str):
    """Both ranks and their launcher die; the resumed curve is the uninterrupted one to 1e-6."""
    saving = f"--use_lora True --max_steps 5 --per_device_train_batch_size 2 --save_strategy steps --save_steps 1 {LAUNCH[setup][1]}"

    def run(out: Path, **more: float) -> tuple[subprocess.Popen, Path]:
        launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port()]
        jobs, log = tmp_path / f"{out.name}.json", tmp_path / f"{out.name}.log"
        argv = command("dpo", f"{saving} --resume_from_checkpoint True", out=out)
        jobs.write_text(json.dumps([{"name": out.name, "script": "dpo", "argv": argv} | more]))
        return start([*launcher, "-m", "tests.distributed_jobs", str(jobs)], log), log

    finish(*run(tmp_path / "whole"))
    process, log = run(tmp_path / "killed", pause=0.3)
    while not (tmp_path / "killed" / "checkpoint-2").exists():
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.01)
    kill(process)
    assert not (tmp_path / "killed" / "trainer_state.json").exists()
    finish(*run(tmp_path / "killed"))
    whole, again = history(tmp_path / "whole"), history(tmp_path / "killed")
    assert len(whole) == len(again) == 5
    for a, b in zip(whole, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)


@pytest.mark.slow
def test_two_nodes_on_loopback(command, tmp_path: Path):
    """`torchrun --nnodes 2`, one process on each: what a cluster runs on every machine."""
    port, log = free_port(), tmp_path / "log"
    flags = "--use_lora True --use_cpu True --ddp_backend gloo"
    nodes = [
        start(
            ["torchrun", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
            + ["--master_addr", "127.0.0.1", "--master_port", port, "train_dpo.py", *command("dpo", flags)],
            log,
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        finish(node, log)
    run = json.loads((tmp_path / "dpo" / "run.json").read_text())
    assert run["world_size"] == 2 and history(tmp_path / "dpo")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("flags", ["", pytest.param("--deepspeed ds_configs/zero2.json", marks=pytest.mark.slow)])
def test_unreachable_rank_is_one_sentence(command, flags: str):
    with (
        socket.socket() as held
    ):  # a port where nobody listens, and where nobody else can for as long as this test runs
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
        lonely = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | lonely | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        argv = [sys.executable, "train_sft.py", *command("sft", f"{flags} --ddp_timeout 3")]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"train_sft.py: Process 1 of 2 cannot reach the others at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_configs_differ_in_what_their_names_say():
    configs = {name: json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) for name in QUICK}
    for name, config in configs.items():
        zero = config["zero_optimization"]
        assert zero["stage"] == int(name[4])
        assert ("offload_optimizer" in zero) == name.endswith("offload")
        assert ("offload_param" in zero) == (name == "zero3_offload")
        assert zero.get("stage3_gather_16bit_weights_on_model_save", zero["stage"] == 2)
