"""The output folder of a run: one run at a time uses it, and nothing of another run is taken for its own.

    open_run      lock the folder; which checkpoint the run goes on from, if what lies there is of the same run
    record_run    once the data is known: compare it too, remove what --overwrite_output_dir gives up, write run.json

run.json says which run a folder is of, and its copy in every checkpoint which run that is of.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from args import RUN_JSON, describe, without_token, write_run_json
from args.model import NEW_ADAPTER
from args.record import versions
from base.layout import PROCESSOR_FILES, base_model_path, processor_path, weights_fingerprint
from base.resume import ASIDE, checkpoint_to_resume, checkpoints_of
from common.errors import InputError

LOCK = ".lock"
# What makes another run of it: with other values the weights, the optimizer's state or the order of the rows would not be those of the checkpoint.
FIXED = {
    "ModelArguments": [
        "q_lora",
        "bits",
        "merge_first",
        "freeze_vision_tower",
        "train_vision_layers",
        "train_projector",
        "freeze_language_model",
    ],
    "LoraArguments": ["use_lora", "modules_to_save", *(name for name in NEW_ADAPTER if name != "lora_dropout")],
    "config": ["optim", "seed", "value_adapter", "vision_lr", "projector_lr", "loraplus_lr_ratio"],
}
# What changes no number of a run. Data are compared by their content, the base by its weights.
_NEUTRAL = (
    "output_dir resume_from_checkpoint resume_on_other_data overwrite_output_dir model_name_or_path dataset_name data_path image_root "
    "columns eval_data_path dataset_num_proc check_images on_bad_row allow_outside_image_root local_rank run_name report_to project "
    "project_name group_name trackio_space_id disable_tqdm ddp_timeout restore_callback_states_from_checkpoint ref_log_probs_dir "
    "dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers "
    "num_sample_generations reward_timeout log_level log_level_replica log_on_each_node seed optim do_train do_eval do_predict"
).split()
_NEUTRAL_PREFIXES = ("logging_", "save_", "eval_", "push_to_hub", "hub_", "debug", "include_")
# What a run writes to its folder. Anything else that lies there is the user's.
_OF_A_RUN = (
    "checkpoint-[0-9]* .incomplete *.safetensors *.safetensors.index.json adapter_config.json config.json generation_config.json "
    "run.json trainer_state.json training_args.bin bad_rows.jsonl unscored_answers*.json samples calibration*.png index.html curves.png merged_base "
    "value_function reward_[0-9]* README.md tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *processor_config.json "
    "chat_template.*"
).split()

_REPLACED = ("README.md", "index.html")  # with names that others have, too
# Beside the weights of the base: what makes token ids and pixels of a row
_RENDERING = ("chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json", *PROCESSOR_FILES)
_COMPUTES = ("torch", "transformers", "peft", "accelerate", "deepspeed")  # packages that numbers are computed with

_held: IO[str] | None = None  # the lock of this process
_found: dict[Path, int] = {}  # what of a run lay in the folder then, and its time of change in ns


def open_run(*flags: Any) -> str | None:
    """Take the folder `--output_dir`; returns the checkpoint that `--resume_from_checkpoint` means, None to start from the beginning.

    Raises:
        InputError: another process trains into the folder; it holds another run (without --overwrite_output_dir), or what no run.json
            describes; the checkpoint is of another run, or cannot be used.
    """
    global _found
    args = next(p for p in flags if isinstance(p, TrainingArguments))
    out = Path(args.output_dir)
    if args.should_save:
        lock(out)
        # What lies there without a run.json is nobody's run, but somebody's.
        _found = {p: p.lstat().st_mtime_ns for p in _written_by_runs(out)} if (out / RUN_JSON).is_file() else {}
    aside = out / ASIDE
    if aside.is_symlink() or (aside.exists() and not aside.is_dir()):
        raise InputError(f"{aside} is in the way of checkpoints, which are written there first: move it elsewhere.")
    asked = args.resume_from_checkpoint not in (None, False, "False", "false", "")
    checkpoint = checkpoint_to_resume(args)
    saved = _saved(out)
    if checkpoint is not None:
        other = _why_another_run(run_of(checkpoint), flags)
        here = Path(checkpoint).resolve().parent == out.resolve()
        if other is None and (here or not saved or _why_another_run(run_of(out) or {}, flags) is None):
            _say_changes(checkpoint, flags)
            return checkpoint
        if other and not (here and args.overwrite_output_dir):
            raise InputError(
                f"{checkpoint} is of another run: {other}. Give another --output_dir"
                + (", or --overwrite_output_dir True to give that run up." if here else ".")
            )
    elif not saved:
        theirs = [name for name in _REPLACED if (out / name).exists()] if not (out / RUN_JSON).is_file() else []
        if theirs:
            raise InputError(
                f"--output_dir {out} holds {theirs[0]} of somebody else, which a run replaces: give another folder."
            )
        return None  # nothing is lost
    elif (out / RUN_JSON).is_file() and asked and _why_another_run(run_of(out), flags) is None:
        return None  # the same run, whose checkpoints are gone or unusable, which was said
    if not (out / RUN_JSON).is_file():
        raise InputError(f"--output_dir {out} holds {saved}, and no run.json says of which run: give another folder.")
    if not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {out} holds another run ({saved}): give another folder, --resume_from_checkpoint True to go on with that "
            "run, or --overwrite_output_dir True to give it up."
        )
    inside = [
        f"--{name} {value}"
        for p in flags
        for name in ("model_name_or_path", "reward_adapter", "reward_model_name_or_path", "data_path", "image_root")
        for value in _as_list(getattr(p, name, None))
        if Path(value).exists() and out.resolve() in (Path(value).resolve(), *Path(value).resolve().parents)
    ]
    if inside:
        raise InputError(f"{inside[0]} lies in --output_dir {out}, which --overwrite_output_dir True would empty.")
    return None


def record_run(*flags: Any, resumed_from: str | None, **about: Any) -> None:
    """Compare the data with those of the checkpoint, remove another run's files, and write run.json with the run's history.

    Raises:
        InputError: the rows are not those that the checkpoint was trained on (without --resume_on_other_data).
    """
    args = next(p for p in flags if isinstance(p, TrainingArguments))
    out = Path(args.output_dir)
    before = run_of(resumed_from) if resumed_from else None
    changed: dict[str, Any] = _changes(before, flags) | _other_surroundings(before, flags) if before else {}
    if before:
        was, now = ((facts.get("data") or {}).get("train_fingerprint") for facts in (before, about))
        if was != now and was and now:
            said = (
                f"The rows are not those that {resumed_from} was trained on ({(before['data'] or {}).get('train_rows')} rows then, "
                f"{about['data'].get('train_rows')} now)"
            )
            if not args.resume_on_other_data:
                raise InputError(
                    f"{said}: put the old file and images back, or go on all the same with --resume_on_other_data True."
                )
            _say(args, f"{said}; going on, as --resume_on_other_data says.")
            changed["data"] = [was, now]
    if args.should_save and args.overwrite_output_dir and not resumed_from:
        _remove_other_run(out)
    entry = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "argv": without_token(sys.argv),
        "resumed_from": resumed_from,
        "world_size": args.world_size,
        "changed": changed,
    }
    history = [*(before or {}).get("history", []), entry]
    base = _fingerprint(_model_of(flags).model_name_or_path)
    write_run_json(out, *flags, **about, base_fingerprint=base, inputs=_inputs(flags), history=history)


def lock(folder: Path) -> None:
    """Keep other processes out of a folder until this one ends, however it ends: the system itself takes the lock back.

    Raises:
        InputError: another process has it.
    """
    global _held
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if _held is not None:
        if _held.name == str(path) and path.exists():
            return
        _held.close()
    _held = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held until the process ends
    try:
        # lockf, not flock: it also holds between the machines of a shared file system, and data workers do not inherit it.
        fcntl.lockf(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _held.seek(0)
        who = _held.read().strip()
        _held.close()
        _held = None
        if not isinstance(error, BlockingIOError | PermissionError):
            print(
                f"{path}: this file system has no locks ({error.strerror}); see that no other run writes there.",
                file=sys.stderr,
            )
            return
        raise InputError(
            f"--output_dir {folder} is in use by another run ({who or 'which is just starting'}): wait for it, or give another folder."
        ) from error
    _held.truncate(0)
    _held.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
    _held.flush()


# -- which run it is ---------------------------------------------------------------------------------------------------------


def run_of(folder: str | Path) -> dict[str, Any] | None:
    """The run.json of a run's folder or checkpoint; None where there is none (of another program, or an older version).

    Raises:
        InputError: it is there and damaged.
    """
    damaged = None
    for place in (Path(folder), Path(folder).parent):
        try:
            run = json.loads((place / RUN_JSON).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            run = None
        if isinstance(run, dict):
            return run
        damaged = damaged or place / RUN_JSON
    if damaged:
        raise InputError(
            f"{damaged} is damaged, and nothing else says which run {folder} is of: give another folder, or delete that file to go "
            "on without knowing."
        )
    return None


def _now(run: dict[str, Any], flags: tuple[Any, ...]) -> dict[str, Any]:
    """The flags by group. Those of LoRA that were not given are filled in as loading will, which comes later."""
    now = describe(*flags)
    model = _model_of(flags).model_name_or_path
    fresh = NEW_ADAPTER if base_model_path(model) == model else run["arguments"].get("LoraArguments", {})
    lora = now.get("LoraArguments", {})
    if lora.get("use_lora"):
        now["LoraArguments"] = lora | {name: fresh.get(name) for name in NEW_ADAPTER if lora[name] is None}
    return now


def _why_another_run(run: dict[str, Any] | None, flags: tuple[Any, ...]) -> str | None:
    """What tells the run of these flags from the recorded one, in words; None if they are one run, or if nothing is known."""
    if run is None:
        return None
    if not any("output_dir" in values for values in run.get("arguments", {}).values()):
        return f"its {RUN_JSON} does not say which"
    was, now = run["arguments"], _now(run, flags)
    config, old_config = _config_name(now), _config_name(was)
    if config != old_config:
        return f"it trained with {_script(old_config)}, this is {_script(config)}"
    for group, names in FIXED.items():
        name_of = config if group == "config" else group
        for name in names:
            old, new = was.get(name_of, {}).get(name), now[name_of].get(name)
            if name == "bits" and not now[name_of]["q_lora"]:
                continue
            if name in was.get(name_of, {}) and old != new:
                return f"it has --{name} {_shown(old)}, this has {_shown(new)}"
    if bool(was[config].get("deepspeed")) != bool(now[config].get("deepspeed")):
        return "one of them runs under DeepSpeed, whose checkpoints differ"
    fingerprint = _fingerprint(_model_of(flags).model_name_or_path)
    if run.get("base_fingerprint") and fingerprint and run["base_fingerprint"] != fingerprint:
        path = was["ModelArguments"]["model_name_or_path"]
        return f"it started from other weights ({path}) than those of {_model_of(flags).model_name_or_path}"
    return None


def _say_changes(checkpoint: str, flags: tuple[Any, ...]) -> None:
    """Name the settings that are not those of the run so far.

    Raises:
        InputError: the run had ended, so that they would do nothing.
    """
    args, run = next(p for p in flags if isinstance(p, TrainingArguments)), run_of(checkpoint)
    if run is None:
        _say(args, f"No run.json says which run {checkpoint} is of; going on from it.")
        return
    changes = _changes(run, flags)
    if others := _other_surroundings(run, flags):
        listed = [f"{name} {new} (was {old})" if old else name for name, (old, new) in others.items()]
        _say(
            args, f"Going on from {checkpoint}, though these are others than when it was written: {', '.join(listed)}."
        )
    if not changes:
        return
    listed = ", ".join(f"--{name} {_shown(new)} (was {_shown(old)})" for name, (old, new) in changes.items())
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    longer = {"max_steps", "num_train_epochs", "total_episodes"} & changes.keys()
    for name in longer:
        old, new = changes[name]
        if old and old > 0 and 0 < new < old and state["global_step"] > state["max_steps"] * new / old:
            raise InputError(
                f"{checkpoint} is {state['global_step']} steps in, which is more than --{name} {_shown(new)} asks for: ask for more, or give "
                "an earlier checkpoint and another --output_dir."
            )
    if state["global_step"] >= state["max_steps"] and not longer:
        raise InputError(
            f"{checkpoint} is the end of a run that had other settings: {listed}. Give another --output_dir, or more steps to go on."
        )
    _say(args, f"Going on from {checkpoint} with other settings than so far: {listed}.")


def _changes(run: dict[str, Any], flags: tuple[Any, ...]) -> dict[str, list[Any]]:
    """name -> [old, new] of the settings that differ and may change a number."""
    was, now = run["arguments"], _now(run, flags)
    args = next(p for p in flags if isinstance(p, TrainingArguments))
    found = {
        name: [was[group][name], value]
        for group, values in now.items()
        for name, value in values.items()
        if name in was.get(group, {}) and was[group][name] != value
        if name not in _NEUTRAL and not name.startswith(_NEUTRAL_PREFIXES)
    }
    if run.get("world_size", args.world_size) != args.world_size:
        found["nproc_per_node"] = [run["world_size"], args.world_size]
    return found


def _inputs(flags: tuple[Any, ...]) -> dict[str, str]:
    """Name -> digest of what numbers depend on besides flags, rows and the weights of the base: templates, processor, rewards."""
    folder = processor_path(_model_of(flags).model_name_or_path)
    files = {name: Path(folder) / name for name in _RENDERING}
    args = next(p for p in flags if isinstance(p, TrainingArguments))
    for spec in getattr(args, "reward_fn", None) or ():
        files[f"--reward_fn {Path(spec).name}"] = Path(spec.rpartition(":")[0] or spec)
    found = {
        name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        for name, file in files.items()
        if file.is_file()
    }
    for flag in ("reward_adapter", "reward_model_name_or_path"):
        for model in getattr(args, flag, None) or ():
            if identity := _fingerprint(model):
                found[f"--{flag} {Path(model).name}"] = identity
    return found


def _other_surroundings(run: dict[str, Any], flags: tuple[Any, ...]) -> dict[str, list[Any]]:
    """name -> [old, new] of packages whose version differs, name -> [None, None] of files whose content does."""
    was, now = run.get("versions", {}), versions()
    found: dict[str, list[Any]] = {
        name: [was[name], now[name]] for name in _COMPUTES if name in was and name in now and was[name] != now[name]
    }
    old, new = run.get("inputs", {}), _inputs(flags)
    return found | {name: [None, None] for name in new if name in old and old[name] != new[name]}


def _fingerprint(model_name_or_path: str) -> str | None:
    """Identity of what a run starts from: of the base's weights, and of the adapter on it."""
    base = base_model_path(model_name_or_path)
    return weights_fingerprint(base, model_name_or_path if model_name_or_path != base else None)


def _model_of(flags: tuple[Any, ...]) -> Any:
    return next(p for p in flags if hasattr(p, "model_name_or_path") and not isinstance(p, TrainingArguments))


def _config_name(arguments: dict[str, Any]) -> str:
    return next(name for name, values in arguments.items() if "output_dir" in values)


def _script(config: str) -> str:
    return f"train_{config.removesuffix('Config').lower()}.py"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _say(args: TrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, file=sys.stderr, flush=True)


# -- what lies in the folder --------------------------------------------------------------------------------------------------


def _saved(out: Path) -> str | None:
    """What of value lies in a folder: a checkpoint or weights."""
    found = sorted(p.name for pattern in ("checkpoint-[0-9]*", "*.safetensors") for p in out.glob(pattern))
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "") if found else None


def _remove_other_run(out: Path) -> None:
    """Remove what a run writes, except what this one has written already."""
    for path in _written_by_runs(out):
        if _found.get(path) != path.lstat().st_mtime_ns:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written_by_runs(out: Path) -> set[Path]:
    own = {path.name for path in out.glob("checkpoint-*")} - {Path(p).name for p in checkpoints_of(str(out)).values()}
    return {path for pattern in _OF_A_RUN for path in out.glob(pattern) if path.name not in own}
