"""Which checkpoint a run goes on from."""

import functools
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from common.errors import InputError
from common.files import write_json

CHECKSUMS = "checksums.json"
ASIDE = ".incomplete"  # where a checkpoint is written before it gets its name


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
    for _, folder in sorted(checkpoints_of(output_dir).items(), reverse=True):
        reason = what_is_wrong_with(folder)
        if reason is None:
            return folder
        print(f"{folder} is passed over: {reason}", file=sys.stderr)
    return None


def checkpoints_of(output_dir: str) -> dict[int, str]:
    """step -> folder. A `checkpoint-3.bak` is somebody's own."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).iterdir())
    return {int(name[1]): str(path) for name, path in named if name and path.is_dir()}


def write_checksums(checkpoint: Path) -> None:
    """Write how long every file of a checkpoint is and its digest, for `what_is_wrong_with`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    digests = _digests(files)
    listed = {
        str(path.relative_to(checkpoint)): [path.stat().st_size, digest]
        for path, digest in zip(files, digests, strict=True)
    }
    write_json(checkpoint / CHECKSUMS, {"algorithm": "blake2b-128", "files": listed})


def what_is_wrong_with(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None.

    Every byte is compared with the checksums that were written with it. Without them (another program's checkpoint) headers and sizes are read.
    """
    checkpoint = Path(checkpoint)
    if reason := _other_than_written(checkpoint):
        return reason
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"its {TRAINER_STATE_NAME} is cut short"
    except OSError as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({error.strerror})"
    if not isinstance(state, dict) or not all(isinstance(state.get(n), int) for n in ("global_step", "max_steps")):
        return f"its {TRAINER_STATE_NAME} does not say how many steps were done"
    return _cut_short(checkpoint) or _missing_state(checkpoint)


def damage_of(checkpoint: str | Path) -> str | None:
    """Why the weights of a checkpoint cannot be loaded, or None; unlike `what_is_wrong_with` it asks for nothing that only a run needs."""
    checkpoint = Path(checkpoint)
    return _other_than_written(checkpoint) or _cut_short(checkpoint)


def _cut_short(checkpoint: Path) -> str | None:
    weights = sorted(checkpoint.rglob("*.safetensors"))
    for index in checkpoint.rglob("*.safetensors.index.json"):
        try:
            weights += [index.parent / name for name in set(json.loads(index.read_text())["weight_map"].values())]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
    if not weights and not [*checkpoint.glob("global_step*")]:
        return "it has no weights"
    for file in weights:
        try:
            with safe_open(file, "pt"):  # compares the header with the size of the file
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is damaged ({error})"
    for file in (*checkpoint.rglob("*.pt"), *checkpoint.glob("rng_state*.pth")):
        if not zipfile.is_zipfile(file):  # the directory of a zip file is its end
            return f"{file.name} is cut short"
    return None


def _missing_state(checkpoint: Path) -> str | None:
    """Files without which Trainer goes on with other numbers, and does not say so."""
    if not [*checkpoint.glob("global_step*")]:  # DeepSpeed's, which hold all of it
        if not (checkpoint / "optimizer.pt").is_file():
            return "it has no optimizer state (--save_only_model)"
        if not (checkpoint / "scheduler.pt").is_file():
            return "it has no scheduler.pt, without which the optimizer's state is not loaded either"
    if not [*checkpoint.glob("rng_state*.pth")]:
        return "it has no random state (rng_state.pth)"
    return None


def _other_than_written(checkpoint: Path) -> str | None:
    """The first file that is not as its checksum says; None without checksums."""
    if not (checkpoint / CHECKSUMS).is_file():
        return None
    try:
        files = json.loads((checkpoint / CHECKSUMS).read_text())["files"]
        listed = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {CHECKSUMS} is damaged"
    for name, (size, _) in listed.items():
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} is damaged ({(checkpoint / name).stat().st_size} bytes instead of {size})"
    try:
        digests = _digests([checkpoint / name for name in listed])
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    wrong = [name for (name, (_, digest)), found in zip(listed.items(), digests, strict=True) if digest != found]
    return f"{wrong[0]} is damaged (its checksum is another)" if wrong else None


def _digests(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _digest(path, path.stat().st_size, path.stat().st_mtime_ns), files))


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a file of this size and time of change, so that it is read once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
