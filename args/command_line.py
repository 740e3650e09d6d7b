"""The command line -> one instance per dataclass."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from args.contradictions import refuse_contradictions
from args.dpo import DPOConfig, with_loss_flags
from args.model import NEW_ADAPTER, LoraArguments, ModelArguments
from args.ppo import PPOConfig
from args.record import unreachable
from args.rows import DataArguments
from args.training import USUAL_OF_TRANSFORMERS, one_line
from common import other_flags
from common.dataclass_flags import DataclassParser
from common.errors import InputError
from common.files import check_writable
from common.flags import nearest


def parse(*classes: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read the command line (or `argv`) and `--config file.yaml` into one instance per dataclass.

    The hyper-parameters of all losses registered by now are flags of a DPOConfig.

    Raises:
        InputError: unknown flags, a missing or malformed config file, flags that contradict each other.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    try:
        kinds = [with_loss_flags(kind) if issubclass(kind, DPOConfig) else kind for kind in classes]
        parser = DataclassParser(kinds, USUAL_OF_TRANSFORMERS)
        parsed = parser.parse_args_into_dataclasses(_in_our_flags(argv, parser))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(one_line(error)) from error
    except torch.distributed.DistError as error:
        raise InputError(unreachable(error)) from error
    refuse_contradictions(parsed)
    flags = {type(p): p for p in parsed}
    _name_evaluation_rows(parsed)
    if LoraArguments in flags and flags[LoraArguments].use_lora:
        _settle_lora(flags[ModelArguments], flags[LoraArguments])
    if PPOConfig in flags and flags[LoraArguments].use_lora and flags[PPOConfig].ddp_find_unused_parameters is None:
        flags[PPOConfig].ddp_find_unused_parameters = False  # every adapter weight takes part in every step
    for config in parsed:
        if isinstance(config, TrainingArguments):
            if any(ord(character) < 32 for character in config.output_dir):
                raise InputError(
                    f"--output_dir {config.output_dir!r} holds a line break or another control character: rename it."
                )
            check_writable(config.output_dir)
    return parsed


def _name_evaluation_rows(parsed: Sequence[Any]) -> None:
    """`--eval_strategy` without rows to evaluate on holds out as many as VL-RLHF does, and says so."""
    data = next((p for p in parsed if isinstance(p, DataArguments)), None)
    training = next((p for p in parsed if isinstance(p, TrainingArguments)), None)
    if data is None or training is None or data.eval_data_path or data.eval_ratio:
        return
    if training.eval_strategy != "no":
        if data.streaming:
            raise InputError(
                "--eval_strategy needs rows to evaluate on, of which --streaming cannot hold out a share: give --eval_data_path."
            )
        data.eval_ratio = 0.005
        if training.process_index == 0:
            print(
                "--eval_strategy without rows to evaluate on: --eval_ratio 0.005 is held out. --eval_data_path names others.",
                file=sys.stderr,
            )


def _settle_lora(model_args: ModelArguments, lora_args: LoraArguments) -> None:
    """Fill in the LoRA flags that were not given; refuse those that the adapter that training continues contradicts."""
    file = Path(model_args.model_name_or_path) / "adapter_config.json"
    if model_args.merge_first or not file.is_file():
        for name, value in NEW_ADAPTER.items():
            if getattr(lora_args, name) is None:
                setattr(lora_args, name, value)
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): copy or download the file again.") from error
    targets, saved = config.get("target_modules"), config.get("modules_to_save")
    has = {
        "lora_r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout"),
        "lora_bias": config.get("bias"),
        "lora_target_modules": [targets] if isinstance(targets, str) else sorted(targets or ()),
        "modules_to_save": sorted(saved) if saved else None,
        "use_dora": bool(config.get("use_dora")),
        "use_rslora": bool(config.get("use_rslora")),
        "init_lora_weights": "default"
        if (init := config.get("init_lora_weights", True)) in (True, "eva")
        else str(init),
        "lora_vision": isinstance(targets, str) and "(?P<vision>" in targets,
    }
    if model_args.train_projector and not saved:
        raise InputError(
            f"--train_projector True adds weights to the adapter in {file.parent}, which has none of the projector: leave it out, or "
            "start a new adapter with --merge_first True."
        )
    for name, value in has.items():
        given = getattr(lora_args, name)
        same = value
        if (
            name == "lora_target_modules"
            and isinstance(targets, str)
            and (names := re.search(r"\((?!\.)([^()]*)\)$", targets))
        ):
            same = sorted(names[1].replace("\\", "").split("|"))  # names, as add_lora wrote them
        if given is not None and (sorted(given) if isinstance(given, list) else given) not in (value, same):
            raise InputError(
                f"--{name} {' '.join(given) if isinstance(given, list) else given} contradicts the adapter in {file.parent}, which "
                f"has {' '.join(value) if isinstance(value, list) else value}: leave the flag out, or start a new adapter with "
                "--merge_first True."
            )
        setattr(lora_args, name, value)


def _in_our_flags(argv: Sequence[str], parser: DataclassParser) -> list[str]:
    """The command line behind the entries of its `--config`, with flags of other projects in our words."""
    known = {option.lstrip("-") for option in parser._option_string_actions}
    lists = {
        option.lstrip("-") for option, action in parser._option_string_actions.items() if action.nargs in ("+", "*")
    }
    config, argv = _read_config_file([*argv])
    argv, notes = other_flags.translate(argv, known, lists)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    config, more = other_flags.translate(config, known, lists)
    names: dict[str, str] = {}
    for name in (word[2:] for word in config if word.startswith("--")):
        if name not in known:
            raise InputError(f"The file of --config has the key {name}, which is no flag{nearest(name, known)}")
        flag = parser._option_string_actions[f"--{name}"].dest
        if flag in names:
            raise InputError(f"The config file gives {flag} twice, under different names ({name}): leave one out.")
        names[flag] = name
    if os.environ.get("RANK", "0") == "0":
        for note in notes + more:
            print(note, file=sys.stderr)
    return other_flags.without(config, given) + argv


def _read_config_file(argv: list[str]) -> tuple[list[str], list[str]]:
    """(entries of the YAML file that `--config` names, as a command line; the other words). Sets the variables under `env`."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in argv:
        return [], argv
    at = argv.index("--config")
    path = Path(argv[at + 1]) if at + 1 < len(argv) else Path()
    if not path.is_file():
        raise InputError(f"Config file {path} does not exist: give --config the path of a YAML file.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"Config file {path} cannot be read: {' '.join(str(error).split())}.") from error
    variables = config.pop("env", {}) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(variables, dict):
        raise InputError(f"Config file {path} must contain flag: value lines, and under env: variable: value lines.")
    os.environ.update({name: str(value) for name, value in variables.items()})
    words: list[str] = []
    for name, value in config.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words, argv[:at] + argv[at + 2 :]
