"""A run: its errors, and what it leaves in run.json."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from common import errors
from common.files import write_text
from common.output import make_output_unbreakable
from common.versions import installed_versions

RUN_JSON = "run.json"  # in the folder of a run, and in each of its checkpoints


def run(main: Callable[[], Any]) -> None:
    """`common.errors.run` for commands that train, maybe in several processes.

    One that cannot be reached is a sentence, too; an output that cannot be written costs no step.
    """
    make_output_unbreakable()
    try:
        errors.run(main)
    except RuntimeError as error:
        # gloo raises a bare RuntimeError.
        if not (isinstance(error, torch.distributed.DistError) or re.search(r"\bgloo\b|NCCL", str(error))):
            raise
        errors.fail(unreachable(error))


def unreachable(error: BaseException) -> str:
    """One sentence for a process of the run that cannot be reached, or has died."""
    environment = os.environ
    return (
        f"Process {environment.get('RANK', 0)} of {environment.get('WORLD_SIZE', 1)} cannot reach the others at "
        f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')} ({' '.join(str(error).split())[:160]}): look at the first "
        "error of the other processes, at the address and its firewall, and at --ddp_timeout."
    )


def without_token(argv: Sequence[str]) -> list[str]:
    """A command line without the token that writes to the hub."""
    secret = {i + 1 for i, word in enumerate(argv) if word in ("--hub_token", "--hub-token")}
    return ["..." if i in secret else re.sub("^(--hub.token=).*", r"\1...", word) for i, word in enumerate(argv)]


def describe(*parsed: Any) -> dict[str, dict[str, Any]]:
    """The arguments as run.json holds them: class name -> {flag: value}."""
    arguments = {
        type(p).__name__: p.to_dict() if isinstance(p, TrainingArguments) else dataclasses.asdict(p) for p in parsed
    }
    return json.loads(json.dumps(arguments, default=str))


def versions() -> dict[str, str]:
    """Of Python and the packages that a run computes with, as run.json holds them."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "pillow")
    return installed_versions(packages) | {"torch": str(torch.__version__)}  # its build, too


def write_run_json(output_dir: str | Path, *parsed: Any, **facts: Any) -> Path:
    """Write `run.json`: argv, resolved arguments, git commit, versions, seed, device, and `facts` (data fingerprint, counts).

    Called on the main process when training starts, so that a run that dies is described too.
    """
    training = next(p for p in parsed if isinstance(p, TrainingArguments))
    info = {
        "argv": without_token(sys.argv),
        "arguments": describe(*parsed),
        "git": _git_state(),
        "versions": versions(),
        "seed": training.seed,
        "device": str(training.device),
        "world_size": training.world_size,
        **facts,
    }
    if training.device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(training.device)
    path = Path(output_dir) / RUN_JSON
    if training.process_index == 0:
        write_text(path, json.dumps(info, indent=2, default=str) + "\n")
    return path


def _git_state() -> dict[str, Any]:
    def git(*command: str) -> str | None:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status) if status is not None else None}
