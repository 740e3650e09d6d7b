"""Two ranks against one: DDP and every DeepSpeed config, all four scripts, all weights and LoRA, through the real launchers."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed_jobs import SCRIPTS
from tests.processes import ROOT, history

MODES = {"full": "", "lora": "--use_lora True --lora_r 4 --lora_dropout 0"}
CELLS = list(itertools.product(SCRIPTS, MODES))
# One launch per config, and between them every script in both modes; test_every_cell runs the others.
QUICK = {
    "zero2": [("sft", "lora"), ("ppo", "full")],
    "zero2_offload": [("dpo", "full")],
    "zero3": [("sft", "full"), ("dpo", "lora"), ("rm", "full"), ("ppo", "lora")],
    "zero3_offload": [("rm", "lora")],
}
_PORT = itertools.count(29600)

Jobs = list[dict]


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a launcher in a process group of its own; it prints to `log`."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True, start_new_session=True
        )


def finish(process: subprocess.Popen, log: Path, timeout: float = 1500) -> None:
    """Wait for a launcher; a hang ends with all its processes."""
    try:
        assert process.wait(timeout) == 0, log.read_text()[-6000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def launch(launcher: str, jobs: Jobs, folder: Path) -> None:
    """Run jobs on two ranks by torchrun or deepspeed."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    port = ["--master_port", str(next(_PORT))]
    module = "tests.distributed_jobs"
    command = {
        "torchrun": ["torchrun", "--nproc_per_node", "2", *port, "-m", module, str(path)],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", *port, "--module", module, str(path)],
    }[launcher]
    finish(start(command, folder / "log"), folder / "log")


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text("def length(images, prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    return f"{path}:length"


@pytest.fixture
def job(command, rewards, tmp_path: Path) -> Callable[..., dict]:
    """job(script, mode, folder, batch size on one rank, further flags): three steps of a global batch of 4."""

    def build(script: str, mode: str, folder: str, batch: int, extra: str = "") -> dict:
        flags = f"--per_device_train_batch_size {batch} --max_steps 3 {MODES[mode]}"
        if script == "ppo":
            flags += f" --reward_fn {rewards} --response_length 6 --num_ppo_epochs 2"
        out = tmp_path / folder / f"{script}-{mode}"
        return {
            "name": f"{script}-{mode}",
            "script": script,
            "argv": command(script, f"{flags} {extra}", out=out),
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
    for file in sorted(p.relative_to(one) for p in one.rglob("*.safetensors")):
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys(), f"{file}: {sorted(a.keys() ^ b.keys())[:4]}"
        for name, tensor in a.items():
            # Adam divides by the root of a tiny square: where a gradient is noise, a weight moves by up to the learning rate in either direction
            difference = (tensor - b[name]).abs()
            assert difference.max() < 4e-3 and difference.mean() < 1e-4, name


def check_cells(cells: list[tuple[str, str]], setup: str, job, tmp_path: Path) -> None:
    """Run cells on one process and on two ranks; compare what they logged and saved."""
    flags = "--use_cpu True --ddp_backend gloo" if setup == "ddp" else f"--deepspeed ds_configs/{setup}.json"
    alone = [job(*cell, "one", 4) for cell in cells]
    two = [job(*cell, "two", 2, flags) for cell in cells]
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    launch("torchrun" if setup == "ddp" else "deepspeed", two, tmp_path)
    print(setup, (tmp_path / "jobs.times").read_text())
    for one, other in zip(alone, two, strict=True):
        assert_same_curve(Path(one["out"]), Path(other["out"]))


def test_ddp_equals_one_process(job, tmp_path: Path):
    check_cells(CELLS, "ddp", job, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", QUICK)
def test_deepspeed_equals_one_process(job, tmp_path: Path, config: str):
    check_cells(QUICK[config], config, job, tmp_path)


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
@pytest.mark.parametrize("setup", ["ddp", "zero3"])
def test_ranks_without_images(job, mixed_files, tmp_path: Path, setup: str):
    """Text-only rows on one rank, images on the other: nobody waits, and the curve is that of one process."""
    cells = [
        ("sft", "full", ""),
        ("dpo", "lora", ""),
        ("rm", "full", "--freeze_vision_tower False"),
        ("ppo", "lora", ""),
    ]
    flags = "--use_cpu True --ddp_backend gloo" if setup == "ddp" else "--deepspeed ds_configs/zero3.json"

    def build(script: str, mode: str, extra: str, folder: str, batch: int, more: str) -> dict:
        data = mixed_files["sft" if script == "sft" else "other"]
        return job(script, mode, folder, batch, f"{data} {extra} {more} --max_steps 4")

    alone = [build(*cell, "one", 2, "") for cell in cells]
    two = [build(*cell, "two", 1, flags) for cell in cells]
    for one in alone:
        SCRIPTS[one["script"]].main(one["argv"])
    launch("torchrun" if setup == "ddp" else "deepspeed", two, tmp_path)
    for one, other in zip(alone, two, strict=True):
        assert_same_curve(Path(one["out"]), Path(other["out"]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--use_cpu True --ddp_backend gloo", "--deepspeed ds_configs/zero3.json"])
def test_killed_on_two_ranks_and_resumed(command, tmp_path: Path, flags: str):
    """Both ranks and their launcher die; the resumed curve is the uninterrupted one to 1e-6."""
    saving = (
        f"--use_lora True --max_steps 5 --per_device_train_batch_size 2 --save_strategy steps --save_steps 1 {flags}"
    )

    def run(out: Path, **more: float) -> tuple[subprocess.Popen, Path]:
        launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(next(_PORT))]
        jobs, log = tmp_path / f"{out.name}.json", tmp_path / f"{out.name}.log"
        argv = command("dpo", f"{saving} --resume_from_checkpoint True", out=out)
        jobs.write_text(json.dumps([{"name": out.name, "script": "dpo", "argv": argv} | more]))
        return start([*launcher, "-m", "tests.distributed_jobs", str(jobs)], log), log

    finish(*run(tmp_path / "whole"))
    process, log = run(tmp_path / "killed", pause=0.3)
    while not (tmp_path / "killed" / "checkpoint-2").exists():
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "trainer_state.json").exists()
    finish(*run(tmp_path / "killed"))
    whole, again = history(tmp_path / "whole"), history(tmp_path / "killed")
    assert len(whole) == len(again) == 5
    for a, b in zip(whole, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)


@pytest.mark.slow
def test_two_nodes_on_loopback(command, tmp_path: Path):
    """`torchrun --nnodes 2`, one process on each: what a cluster runs on every machine."""
    port, log = str(next(_PORT)), tmp_path / "log"
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


@pytest.mark.slow
def test_unreachable_rank_is_one_sentence(command):
    lonely = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29699"}
    environment = os.environ | lonely | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    argv = [sys.executable, "train_sft.py", *command("sft", "--deepspeed ds_configs/zero2.json --ddp_timeout 3")]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "train_sft.py: Process 1 of 2 cannot reach the others at 127.0.0.1:29699" in done.stderr
    assert "Traceback" not in done.stderr


def test_configs_differ_in_what_their_names_say():
    configs = {name: json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) for name in QUICK}
    for name, config in configs.items():
        zero = config["zero_optimization"]
        assert zero["stage"] == int(name[4])
        assert ("offload_optimizer" in zero) == name.endswith("offload")
        assert ("offload_param" in zero) == (name == "zero3_offload")
        assert zero.get("stage3_gather_16bit_weights_on_model_save", zero["stage"] == 2)
