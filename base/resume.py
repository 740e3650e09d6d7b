"""Which checkpoint a run goes on from."""

import json
import os
import sys
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from common.errors import InputError


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means; None starts from the beginning.

    With `True` and nothing saved yet the run starts from the beginning, so that one command line serves a job and its restarts.

    Raises:
        InputError: the flag names a folder that cannot be resumed from.
    """
    asked = args.resume_from_checkpoint
    if not asked or asked in ("False", "false"):
        return None
    if asked in (True, "True", "true"):
        return newest_whole_checkpoint(args.output_dir)
    if reason := what_is_wrong_with(asked):
        raise InputError(f"--resume_from_checkpoint {asked} cannot be used: {reason}.")
    return asked


def newest_whole_checkpoint(output_dir: str) -> str | None:
    """The checkpoint-N with the largest N that can be resumed from. Incomplete ones, which other programs may have left, are passed over."""
    if not os.path.isdir(output_dir):
        return None
    for folder in reversed(sort_checkpoints(output_dir)):
        reason = what_is_wrong_with(folder)
        if reason is None:
            return folder
        print(f"{folder} is passed over: {reason}", file=sys.stderr)
    return None


def what_is_wrong_with(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None. Reads headers and sizes, not the weights."""
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except json.JSONDecodeError:
        return f"its {TRAINER_STATE_NAME} is cut short"
    weights = sorted(checkpoint.rglob("*.safetensors"))
    for index in checkpoint.rglob("*.safetensors.index.json"):
        weights += [index.parent / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    sharded_state = [*checkpoint.glob("global_step*")]
    if not weights and not sharded_state:
        return "it has no weights"
    for file in weights:
        try:
            with safe_open(file, "pt"):  # compares the header with the size of the file
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is damaged ({error})"
    for file in checkpoint.rglob("*.pt"):
        if not zipfile.is_zipfile(file):  # the directory of a zip file is its end
            return f"{file.name} is cut short"
    if not sharded_state and not (checkpoint / "optimizer.pt").is_file():
        return "it has no optimizer state (--save_only_model)"
    return None
