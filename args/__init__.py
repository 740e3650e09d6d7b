"""Command-line arguments: one dataclass per concern, and the helpers with which every script starts and ends.

`parse(ModelArguments, DataArguments, LoraArguments, DPOConfig)` reads the command line and, with `--config file.yaml`, a YAML file whose
values the command line overrides. The `*Config` classes add their algorithm's flags to transformers' `TrainingArguments`.
"""

import common.compat

import common.compile_lock  # noqa: F401 isort: skip  # DeepSpeed's compilation
from args.command_line import parse
from args.dpo import DPOConfig
from args.model import LoraArguments, ModelArguments
from args.ppo import PPOConfig
from args.record import RUN_JSON, describe, run, without_token, write_run_json
from args.rm import RMConfig
from args.rollouts import RolloutFlags
from args.rows import DataArguments
from args.sft import SFTConfig
from args.training import VLConfig

__all__ = [
    "RUN_JSON",
    "DPOConfig",
    "DataArguments",
    "LoraArguments",
    "ModelArguments",
    "PPOConfig",
    "RMConfig",
    "RolloutFlags",
    "SFTConfig",
    "VLConfig",
    "describe",
    "parse",
    "run",
    "without_token",
    "write_run_json",
]
