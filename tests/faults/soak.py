"""Train for long while things break, and compare with a run that nothing disturbed.

    python -m tests.faults.soak --script dpo ppo --steps 2000 --seed 0

Every 60 to 200 steps the run is killed (SIGKILL, or SIGTERM), every third time with a fault on top that is promised to be recoverable: a full disk
that is freed again, or a newest checkpoint of which a byte is altered. The undisturbed run goes on beside it; at the end weights and
logged numbers must be equal. RSS of the undisturbed run is printed after each tenth of the steps, and the seconds of both.
"""

import argparse
import json
import multiprocessing
import random
import shlex
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from base.resume import newest_whole_checkpoint
from tests import zoo
from tests.processes import Run, history

ANSWERS = ["A red square on the table.", "two blue circles", "A green star and a yellow triangle.", "no"]


def argv_of(script: str, data: Path, out: Path, steps: int) -> list[str]:
    """The command line, the same for a run and its restarts."""
    extra = (
        f"--reward_fn {data / 'rewards.py'}:length --response_length 3 --num_ppo_epochs 2" if script == "ppo" else ""
    )
    return shlex.split(
        f"--model_name_or_path {zoo.checkpoint('llava')} --dataset_name plain_dpo --data_path {data / 'pairs.json'} --image_root {data} "
        f"--output_dir {out} --max_steps {steps} --per_device_train_batch_size 2 --learning_rate 1e-4 --save_strategy steps --save_steps 20 "
        f"--save_total_limit 3 --disable_tqdm True --seed 0 --use_lora True --lora_r 4 --resume_from_checkpoint True {extra}"
    )


def write_data(folder: Path) -> None:
    """Eight pairs with their images, and a reward function."""
    rows = []
    for i in range(8):
        zoo.image(i).save(folder / f"{i}.png")
        rows.append(
            {
                "image": f"{i}.png",
                "prompt": "What is in this image?" + " photo" * (i % 3),
                "chosen": ANSWERS[i % 4],
                "rejected": ANSWERS[(i + 1) % 4],
            }
        )
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "rewards.py").write_text(
        "def length(images, prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )


def rss(run: Run) -> int:
    """Resident memory of a run in MiB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{run.process.pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmRSS")), 0)


def undisturbed(script: str, data: Path, out: Path, steps: int) -> None:
    """Run to the end, and print the memory."""
    began, found = time.monotonic(), dict[int, int]()
    run = Run(script, argv_of(script, data, out, steps), out.with_suffix(".log"))
    last = 0
    while run.process.is_alive():
        last = rss(run) or last
        if (done := run.steps) >= (len(found) + 1) * steps // 10:
            found[done] = last
        time.sleep(0.2)
    assert run.wait() == 0, run.output[-2000:]
    listed = ", ".join(f"{memory} MiB at step {step}" for step, memory in found.items())
    print(f"{script}, undisturbed: {time.monotonic() - began:.0f} s; RSS {listed}, {last} MiB at the end", flush=True)


def disturbed(script: str, data: Path, out: Path, steps: int, draw: random.Random) -> dict[str, int]:
    """Run with kills and faults to the end; how many of each."""
    began = time.monotonic()
    count = {"SIGKILL": 0, "SIGTERM": 0, "full disk": 0, "damaged checkpoint": 0}
    for n in range(10_000):
        limit = None
        if n % 3 == 2:
            newest = newest_whole_checkpoint(str(out))
            if newest and draw.random() < 0.5:
                file = Path(newest) / draw.choice(
                    ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "scheduler.pt"]
                )
                content = bytearray(file.read_bytes())
                content[draw.randrange(len(content))] ^= 1
                file.write_bytes(content)
                count["damaged checkpoint"] += 1
            elif newest:
                limit = 30_000
                count["full disk"] += 1
        log = out.with_name(f"{out.name}-{n}.log")
        run = Run(script, argv_of(script, data, out, steps), log, file_size=limit)
        wanted = draw.randint(60, 200)
        run.until(lambda run=run, wanted=wanted: run.steps >= wanted, timeout=3600, every=0.2)
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        if run.process.is_alive() and run.signal(number):
            count[number.name] += 1
        status = run.wait()
        expected = (0, 75, -signal.SIGKILL) if limit is None else (0, 2, 75, -signal.SIGKILL)
        assert status in expected and "Traceback" not in run.output, run.output[-3000:]
        print(f"{script}, disturbed: start {n} ended with {status}, {time.monotonic() - began:.0f} s", flush=True)
        if status == 0:
            return count
    raise AssertionError("the run never ended")


def main() -> None:
    """Soak the scripts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", nargs="+", choices=["sft", "dpo", "rm", "ppo"], default=["dpo", "ppo"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    write_data(folder)
    for script in args.script:
        whole, out = folder / f"{script}-whole", folder / f"{script}-out"
        beside = multiprocessing.get_context("spawn").Process(
            target=undisturbed, args=(script, folder, whole, args.steps)
        )
        beside.start()
        count = disturbed(script, folder, out, args.steps, random.Random(args.seed))
        beside.join()
        assert beside.exitcode == 0, "the undisturbed run failed"
        mine, theirs = (load_file(o / "adapter_model.safetensors") for o in (out, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), (
            "other weights"
        )
        assert history(out) == history(whole), "other numbers"
        print(f"{script}: {args.steps} steps with {count}: weights and logged numbers are equal", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
