"""Command-line arguments: one dataclass per concern, and the helpers with which every script starts and ends.

`parse(ModelArguments, DataArguments, LoraArguments, DPOConfig)` reads the command line and, with `--config file.yaml`, a YAML file whose
values the command line overrides. The `*Config` classes add their algorithm's flags to transformers' `TrainingArguments`.
"""

import common.compat  # isort: skip  # must come before transformers
import common.compile_lock  # isort: skip  # DeepSpeed's compilation
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import huggingface_hub
import torch
import yaml
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import is_liger_kernel_available

import losses
from common import errors, other_flags
from common.dataclass_flags import USUAL, DataclassParser
from common.errors import InputError
from common.files import check_writable, write_text
from common.flags import nearest
from common.fsdp_flags import Sharding, sharding_of, sharding_of_launcher
from common.versions import installed_versions

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
    "write_run_json",
]

RUN_JSON = "run.json"  # in the folder of a run, and in each of its checkpoints

# ---------------------------------------------------------------------------------------------------------------------
# What is trained, on which rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which checkpoint to train and how to load it."""

    title: ClassVar[str] = "Model"
    model_name_or_path: str = field(
        metadata={"help": "Hub id, checkpoint folder or LoRA adapter folder to start from."}
    )
    use_flash_attention_2: bool = field(
        default=False,
        metadata={
            "help": "FlashAttention-2. Packed rows use the kernel of it that torch brings, with and without this flag."
        },
    )
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Precision of the loaded weights; auto is bfloat16 with --bf16, else float32, float16 too small in range for most."
        },
    )
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Keep the vision encoder fixed; its features are then shared by every pass."}
    )
    train_vision_layers: int | None = field(
        default=None,
        metadata={
            "help": "Of a frozen vision tower let the last N layers train; with --lora_vision True they alone get adapters."
        },
    )
    train_projector: bool | None = field(
        default=None,
        metadata={
            "help": "Train the modules between vision tower and language model, all their weights; by default they train without "
            "--use_lora, and not with it.",
            "nargs": "?",
            "const": True,
        },
    )
    freeze_language_model: bool = field(
        default=False,
        metadata={
            "help": "Keep the language model fixed: the projector alone trains, and what else of the tower is named."
        },
    )
    q_lora: bool = field(
        default=False, metadata={"help": "Load the base in --bits and train LoRA on it (needs --use_lora)."}
    )
    bits: Literal[4, 8] = field(default=4, metadata={"help": "With --q_lora: 4 (NF4, double quantisation) or 8."})
    max_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Larger pictures are shrunk (fewer tiles, where a family cuts them), saved with the processor; by default as the "
            "checkpoint says. Qwen2.5-VL: 784 pixels are a token, 1003520 are 1280."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Qwen-VL and GLM-V: smaller pictures are enlarged to this."}
    )
    video_frames: int | None = field(
        default=None,
        metadata={
            "help": "So many frames, evenly spread, of every video that has more: for a bound on tokens and memory. Saved with the "
            "processor; by default as the checkpoint says, else as its family's authors do (docs/models.md)."
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={
            "help": "So many frames of each second of a video, for events that a fixed number of frames would miss in long ones."
        },
    )
    enable_thinking: bool = field(
        default=False,
        metadata={
            "help": "Let the model think before it answers, where its chat template has that switch (Qwen3.5, ...)."
        },
    )
    merge_first: bool = field(
        default=False,
        metadata={
            "help": "Merge the adapter that --model_name_or_path names into its base, and start from that; else the adapter itself continues."
        },
    )


# LoRA flags that were not given, where training does not continue an adapter
NEW_ADAPTER: dict[str, Any] = {
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["auto"],
    "lora_bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": "default",
    "lora_vision": False,
}
# --init_lora_weights, and what is said of them; pissa_niter_N is pissa by N subspace iterations
LORA_INITS: dict[str, str] = {
    "default": "A random, B 0",
    "gaussian": "A normal, B 0",
    "orthogonal": "A and B orthogonal, their product 0",
    "pissa": "the largest singular values of each weight, 2404.02948; pissa_niter_16 is quicker",
    "olora": "the QR decomposition of each weight, 2406.01775",
    "loftq": "what --q_lora rounds off, 2310.08659",
}
CHANGE_BASE = ("pissa", "olora")  # take what the adapter starts with out of the base's weights
OF_NEW_ADAPTER = "by default the adapter's that training continues, of a new one"


@dataclass
class LoraArguments:
    """LoRA through peft. `parse` fills in what was not given, so that run.json has it."""

    title: ClassVar[str] = "LoRA"
    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int | None = field(default=None, metadata={"help": f"Rank; {OF_NEW_ADAPTER} 64."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": f"Scale, the update is multiplied by alpha / r; {OF_NEW_ADAPTER} 16."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": f"Dropout on the adapter's input; {OF_NEW_ADAPTER} 0.05."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names looked up in the language model only, a regular expression over all names, or auto: the family's "
            f"language-model targets; {OF_NEW_ADAPTER} auto."
        },
    )
    lora_bias: Literal["none", "all", "lora_only"] | None = field(
        default=None,
        metadata={
            "help": f"Which biases train: none, all, or lora_only (of layers with an adapter); {OF_NEW_ADAPTER} none."
        },
    )
    use_dora: bool | None = field(
        default=None,
        metadata={
            "help": "DoRA (2402.09353): direction by LoRA and a trained length per output; better at small ranks, slower.",
            "nargs": "?",
            "const": True,
        },
    )
    use_rslora: bool | None = field(
        default=None,
        metadata={
            "help": "rsLoRA (2312.03732): the scale is alpha / sqrt(r), which does not fade at large ranks.",
            "nargs": "?",
            "const": True,
        },
    )
    init_lora_weights: str | None = field(
        default=None,
        metadata={
            "help": f"What a new adapter starts with. {'; '.join(f'{name}: {what}' for name, what in LORA_INITS.items())}."
        },
    )
    lora_vision: bool | None = field(
        default=None,
        metadata={
            "help": "Adapters also in the layers of the vision tower (--train_vision_layers: in the last of them), whose "
            "features are then computed in every pass.",
            "nargs": "?",
            "const": True,
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved beside the adapter, e.g. lm_head."}
    )
    fast_lora: bool = field(
        default=True,
        metadata={
            "help": "Compute LoRA layers with fewer passes over wide tensors (base/fast_lora.py). False keeps peft's own layers."
        },
    )

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} is 1 or more, not {value}.")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is a share from 0 to below 1, not {self.lora_dropout}.")
        init = self.init_lora_weights
        if init is not None and init not in LORA_INITS and not re.fullmatch(r"pissa_niter_\d+", init):
            known = ", ".join(LORA_INITS)
            if init in ("eva", "corda", "lora_ga"):
                raise InputError(
                    f"--init_lora_weights {init} reads data first, which is not supported: one of {known}."
                )
            raise InputError(f"--init_lora_weights {init} is unknown: one of {known}, pissa_niter_N.")


@dataclass
class DataArguments:
    """Which rows to train on. See docs/data.md for the formats."""

    title: ClassVar[str] = "Data"
    dataset_name: str = field(
        metadata={"help": "A name of data.DATASET_MAP, a hub id or a path; several joined by commas."}
    )
    data_path: str | None = field(default=None, metadata={"help": "File or folder of the data set; one per name."})
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image names in the rows are relative to."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Our names for the file's columns: prompt=question,image=file; =mask leaves mask out. Several sets: joined by ;."
        },
    )
    dataset_weights: str | None = field(default=None, metadata={"help": "Mixing weights of several sets: .7,.3"})
    data_ratio: float = field(default=1.0, metadata={"help": "Use this share of the rows, drawn with --seed."})
    eval_ratio: float = field(default=0.0, metadata={"help": "Hold out this share for evaluation; never trained on."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Evaluate on this file instead of a share."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes for reading and checking the rows."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and check rows as training takes them, for sets that do not fit on the disk twice; needs --max_steps."
        },
    )
    check_images: Literal["all", "sample", "none"] = field(
        default="all",
        metadata={
            "help": "Whose image files are looked at before training: of all rows, of a sample of 1000, or of none."
        },
    )
    on_bad_row: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "error stops at a bad row, drop leaves it out and writes it to bad_rows.jsonl."},
    )
    allow_outside_image_root: bool = field(
        default=False, metadata={"help": "Accept image paths that leave --image_root."}
    )
    pairs: Literal["best_worst", "all", "adjacent", "score_margin"] = field(
        default="all",
        metadata={
            "help": "Which ordered pairs of a row with more than two responses enter the loss: all, best_worst (one), adjacent ranks, or "
            "score_margin: all that --score_margin keeps."
        },
    )
    score_margin: float | None = field(
        default=None,
        metadata={"help": "Of these pairs keep those whose scores differ by this much; -1 keeps the largest gap only."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt + response, in tokens. Responses are cut."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, image tokens included. Never cut."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Longest response, in tokens. Cut at the end."}
    )
    overlong: Literal["drop", "error"] = field(
        default="drop",
        metadata={"help": "A row whose prompt alone is too long: drop leaves it out and counts it, error stops."},
    )
    train_on: Literal["all", "last"] = field(
        default="all", metadata={"help": "SFT: the loss covers all assistant turns, or the last one only."}
    )

    def __post_init__(self) -> None:
        for name in ("dataset_num_proc", "max_length", "max_prompt_length", "max_target_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} is 1 or more, not {value}.")
        for name in ("data_ratio", "eval_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if self.streaming and (self.eval_ratio or self.data_ratio != 1):
            name = "eval_ratio" if self.eval_ratio else "data_ratio"
            instead = "give --eval_data_path" if self.eval_ratio else "leave it out"
            raise InputError(f"--{name} is a share of all rows, which --streaming does not know: {instead}.")
        if self.streaming and self.check_images == "sample":
            raise InputError(
                "--check_images sample is a share of all rows, which --streaming does not know: all or none."
            )


# ---------------------------------------------------------------------------------------------------------------------
# How it is trained: one class per algorithm
# ---------------------------------------------------------------------------------------------------------------------

# transformers' flags that `--help` shows beside ours, with a shorter help; the others are shown by `--help_all`
USUAL_OF_TRANSFORMERS: dict[str, str] = {
    "output_dir": "Folder of the run: weights, checkpoints, run.json, index.html with curves and samples. One run per folder.",
    "num_train_epochs": "Passes over the rows.",
    "max_steps": "Steps to take, in place of --num_train_epochs.",
    "per_device_train_batch_size": "Rows (PPO: rollouts) that a device computes at once.",
    "gradient_accumulation_steps": "Such batches per step: a larger batch in the same memory.",
    "lr_scheduler_type": "How the learning rate changes over the run, behind the warm-up: linear and cosine fall to 0, constant stays.",
    "warmup_steps": "Steps, or a share of all steps if below 1, in which the rate rises from 0.",
    "weight_decay": "Weight decay of AdamW.",
    "max_grad_norm": "Longer gradients are scaled to this norm; 0 leaves them.",
    "bf16": "Compute in bfloat16; weights that train stay float32.",
    "gradient_checkpointing": "Compute activations a second time instead of keeping them: much less memory, about a third slower.",
    "seed": "Of everything that is drawn at random.",
    "deepspeed": "ds_configs/zero2.json or zero3.json, for all weights of large models (docs/distributed.md).",
    "dataloader_num_workers": "Processes that read images ahead; 4 on a GPU.",
    "eval_strategy": "When held-out rows are evaluated besides the end: no, every --eval_steps steps, every epoch.",
    "eval_steps": "Steps between evaluations, or a share of all steps if below 1; --logging_steps by default.",
    "per_device_eval_batch_size": "Rows that a device evaluates at once.",
    "save_strategy": "When checkpoints are written: no (the end alone), every --save_steps steps, every epoch, at the best evaluation.",
    "save_steps": "Steps between checkpoints, or a share of all steps if below 1.",
    "save_total_limit": "Checkpoints to keep, the newest ones.",
    "resume_from_checkpoint": "True goes on from the newest checkpoint of --output_dir; or a checkpoint folder.",
    "run_name": "Name of the run in the services of --report_to.",
}

# transformers' flags that would do nothing, or harm, beside what they say: given another value than the default, they are
# refused with the sentence. tests/test_flags.py has a line for every flag.
REFUSED: dict[str, str] = {
    "average_tokens_across_devices": "False is not supported: losses are means over all devices, whatever their number",
    "label_smoothing_factor": "smooths the labels of classifiers: in train_dpo.py --label_smoothing smooths preferences",
    "prediction_loss_only": "does nothing: evaluation computes losses and metrics and keeps no predictions",
    "eval_do_concat_batches": "does nothing: evaluation keeps no predictions",
    "eval_use_gather_object": "does nothing: evaluation keeps no predictions",
    "eval_accumulation_steps": "does nothing: evaluation keeps no predictions",
    "include_for_metrics": "does nothing: evaluation keeps no predictions",
    "batch_eval_metrics": "does nothing: evaluation keeps no predictions",
    "label_names": "does nothing: collators say what is trained",
    "do_predict": "does nothing: python -m eval.generate writes answers",
    "use_cache": "does nothing: training passes keep no cache, rollouts always do",
    "bf16_full_eval": "would leave the weights in bf16 after the first evaluation: --bf16 True evaluates in bf16, too",
    "fp16_full_eval": "would leave the weights in float16 after the first evaluation: --fp16 True evaluates in float16, too",
    "parallelism_config": "is not supported: use DDP or --deepspeed",
    "enable_jit_checkpoint": "does nothing more: SIGTERM always saves a checkpoint (docs/distributed.md)",
}
REFUSED_IN_COMPARISONS: dict[str, str] = {
    "neftune_noise_alpha": "adds noise to one of two passes that are compared: it is for train_sft.py",
}
REFUSED_IN_RM: dict[str, str] = {"num_sample_generations": "does nothing here: a reward model writes no answers"}
REFUSED_IN_PPO: dict[str, str] = {
    "fsdp": "is not supported in PPO, whose rollouts would gather all weights for every token: --deepspeed ds_configs/zero3.json gathers them once",
    "fsdp_config": "is not supported in PPO: --deepspeed ds_configs/zero3.json shares the weights out",
    "per_device_eval_batch_size": "does nothing in PPO: evaluation samples --per_device_train_batch_size answers at a time",
    "dataloader_drop_last": "does nothing in PPO: an update always takes whole micro batches",
    "train_sampling_strategy": "does nothing in PPO: prompts are shuffled with --seed",
    "data_seed": "does nothing in PPO: prompts are shuffled with --seed",
    "ignore_data_skip": "does nothing in PPO: a resumed run goes on with the next prompts",
    "torch_empty_cache_steps": "does nothing in PPO",
    "auto_find_batch_size": "cannot work in PPO: an update has a fixed number of rollouts",
    "include_num_input_tokens_seen": "does nothing in PPO: episode counts rollouts",
}


# Whose state is a tensor of the weight's shape, or a number: what base/fsdp.py shares out and puts together again
OPTIMIZERS_OF_FSDP = ("adamw_torch_fused", "adamw_torch", "sgd")

# Of torch.utils.checkpoint
CHECKPOINTING_OPTIONS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "torch_empty_cache_steps",
)
NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "warmup_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "eval_delay",
    "seed",
    "data_seed",
    "dataloader_num_workers",
    "num_sample_generations",
)


def _name_of(value: object) -> str:
    """The word of a choice, before transformers has made its own type of it and after."""
    return str(getattr(value, "value", value))


def _one_line(error: BaseException) -> str:
    """What a library says of a mistake, as the end of a sentence."""
    return " ".join(str(error).split()).rstrip(".")[:300] + "."


# Where services read the name of a run's project; trackio reads TrainingArguments.project
PROJECT_VARIABLES = (
    "WANDB_PROJECT",
    "MLFLOW_EXPERIMENT_NAME",
    "COMET_PROJECT_NAME",
    "CLEARML_PROJECT",
    "SWANLAB_PROJECT",
)


def _trackers(report_to: str | list[str] | None) -> list[str]:
    """The names of --report_to, however they were joined.

    Raises:
        InputError: one that transformers does not have, or whose package is not installed.
    """
    given = [report_to or "none"] if isinstance(report_to, str | None) else report_to
    names = [name for text in given for name in re.split(r"[\s,\[\]'\"]+", text) if name]
    if "none" in names and len(names) > 1:
        raise InputError(f"--report_to {' '.join(names)}: none stands alone.")
    available = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all") or name in available:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"--report_to {name} is unknown{nearest(name, INTEGRATION_TO_CALLBACK)}")
        raise InputError(
            f"--report_to {name} needs a package that is not installed: pip install {name.replace('_', '-')} "
            "(requirements-trackers.txt has the usual ones)."
        )
    return names


@dataclass
class VLConfig(TrainingArguments):
    """What the four algorithms share on top of transformers' TrainingArguments."""

    title: ClassVar[str] = USUAL
    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_COMPARISONS
    default_metric: ClassVar[str] = "loss"  # of the best checkpoint
    report_to: None | str | list[str] = field(  # noqa: RUF036  the parser reads the members in this order
        default="none",
        metadata={
            "help": "Services that get the numbers, too: wandb, tensorboard, trackio, ... (requirements-trackers.txt). Several: a b, or a,b.",
            "nargs": "+",
        },
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every N steps, or a share of all steps if below 1."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Must stay False: it would log 0 for a loss that is NaN (base/bad_steps.py looks at every step)."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the raw rows."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Give up another run whose checkpoints and weights lie in --output_dir, which is refused otherwise."
        },
    )
    resume_on_other_data: bool = field(
        default=False,
        metadata={
            "help": "Go on from a checkpoint that was trained on other rows or images, which is refused otherwise."
        },
    )
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute the prompt once per row and let its K responses share it. False: one row per response."
        },
    )
    do_train: bool = field(
        default=True,
        metadata={
            "help": "False evaluates and ends: the model as loaded, or the checkpoint of --resume_from_checkpoint."
        },
    )
    num_sample_generations: int = field(
        default=10,
        metadata={
            "help": "How many pages of samples a run writes to its folder, 0 for none: PPO's rollouts; in SFT and DPO answers to the "
            "first held-out rows, if the run has as many steps."
        },
    )
    project_name: str | None = field(
        default=None, metadata={"help": "Project of the run in wandb, trackio, mlflow, comet_ml, clearml, swanlab."}
    )
    group_name: str | None = field(default=None, metadata={"help": "Group of the run in wandb."})
    vision_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the vision tower; --learning_rate by default, LLaVA-OneVision takes a fifth."
        },
    )
    projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; --learning_rate by default."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "LoRA+ (2402.12354): the rate of lora_B is this many times that of lora_A; 16 is the paper's, with half the "
            "--learning_rate."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations without a better --metric_for_best_model; needs --load_best_model_at_end True."
        },
    )
    log_image_sensitivity: bool = field(
        default=False,
        metadata={"help": "At each evaluation, log how much response log-probs change when the images are swapped."},
    )

    @property
    def sharding(self) -> Sharding | None:
        """How FSDP2 shares the model out; None without FSDP."""
        return sharding_of(self.fsdp, self.fsdp_config)

    @property
    def place_model_on_device(self) -> bool | None:
        """For Trainer: a model that FSDP shares out does not go to a device as a whole; None leaves it to Trainer."""
        return False if self.fsdp else None

    @property
    def rates_differ(self) -> bool:
        """Whether any part has a learning rate of its own."""
        return any(rate is not None for rate in (self.vision_lr, self.projector_lr, self.loraplus_lr_ratio))

    def _refuse_flags(self) -> None:
        known = {f.name: f for f in dataclasses.fields(self)}
        for name, why in self.refused.items():
            default = known[name].default
            # The parser turns the default "no" of a flag that takes text or a switch into False
            unset = ("no", False) if default == "no" else (None if default is dataclasses.MISSING else default,)
            value = getattr(self, name)
            if value not in unset and value != []:
                raise InputError(f"--{name} {why}.")
        if self.do_eval and self.do_train and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise InputError(
                "--do_eval True evaluates alone, with --do_train False; beside training --eval_strategy says when."
            )
        if not self.do_train and self.deepspeed:
            raise InputError("--do_train False evaluates without DeepSpeed: leave --deepspeed out.")
        self._check_hub()

    def _check_hub(self) -> None:
        """Before a model is loaded: whether its upload can begin at all."""
        if not self.push_to_hub:
            if self.hub_model_id:
                raise InputError(
                    f"--hub_model_id {self.hub_model_id} needs --push_to_hub True: nothing is uploaded without it."
                )
            return
        if not self.do_train:
            raise InputError(
                "--do_train False writes no model, which --push_to_hub could upload: leave --push_to_hub out."
            )
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise InputError(
                "--push_to_hub cannot reach the hub while HF_HUB_OFFLINE is set: unset it, or leave the flag out."
            )
        if not (self.hub_token or huggingface_hub.get_token()):
            raise InputError(
                "--push_to_hub needs a token that may write: run `hf auth login` once, set HF_TOKEN, or give --hub_token."
            )

    def _settle_fsdp(self) -> None:
        """Take FSDP from the flags or from accelerate's launcher, and write it in one form: `sharding`.

        Raises:
            InputError: it is given twice, asks for what is not supported, or stands beside flags that it does not work with.
        """
        launcher = sharding_of_launcher(os.environ)
        if launcher and self.fsdp:
            raise InputError("--fsdp stands in the config of accelerate launch, too: leave the flag out.")
        sharding = launcher or self.sharding
        self.fsdp, self.fsdp_config = (sharding.words, sharding.config) if sharding else (None, None)

    def _refuse_beside_fsdp(self) -> None:
        if not self.fsdp:
            return
        beside = {
            "deepspeed": (None, "both share the weights out: leave one of them out"),
            "fp16": (False, "take --bf16 True"),
            "torch_compile": (False, "leave it out"),
            "auto_find_batch_size": (False, "give --per_device_train_batch_size"),
        }
        for name, (value, instead) in beside.items():
            if getattr(self, name) not in (value, ""):
                raise InputError(f"--{name} does not work with --fsdp: {instead}.")
        optim = str(getattr(self.optim, "value", self.optim))
        if optim not in OPTIMIZERS_OF_FSDP:
            raise InputError(f"--optim {optim} does not work with --fsdp: take {', '.join(OPTIMIZERS_OF_FSDP)}.")
        if not torch.distributed.is_initialized():
            raise InputError(
                "--fsdp shares weights out over several processes, and this is one: start it with torchrun --nproc_per_node 8, "
                "or accelerate launch (docs/distributed.md)."
            )

    def __post_init__(self) -> None:
        self._settle_fsdp()
        self._refuse_flags()
        if self.output_dir is None:
            raise InputError("--output_dir is missing: name the folder of this run, for example runs/first.")
        self.report_to = _trackers(self.report_to)
        self._name_project()
        if self.logging_nan_inf_filter:
            raise InputError("--logging_nan_inf_filter True would hide a loss that is not finite: leave it out.")
        if self.remove_unused_columns:
            raise InputError("--remove_unused_columns True would drop the images: leave it out.")
        self._read_deepspeed_file()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else several CPU processes would each train alone, without an error
            self.dataloader_pin_memory = False  # pinned memory needs an accelerator to copy to
        if self.use_cpu:
            common.compat.join_processes_on_cpu(bool(self.deepspeed), self.ddp_timeout)
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing drops the gradients of a frozen base with LoRA.
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        self._fill_in_metric()
        self._check_early_stopping()
        self._check_numbers()
        fsdp, self.fsdp = self.fsdp, None  # Trainer would hand it to accelerate, whose FSDP is another
        self._let_transformers_check()
        self.fsdp = fsdp
        self._refuse_beside_fsdp()
        self._check_learning_rates()
        self._check_optimizer_and_schedule()
        self._check_combinations()

    def _let_transformers_check(self) -> None:
        try:
            super().__post_init__()
        except (InputError, torch.distributed.DistError):
            raise
        except (ValueError, TypeError, KeyError, ImportError, NotImplementedError, OSError) as error:
            raise InputError(f"transformers refuses these flags: {_one_line(error)}") from error

    def _name_project(self) -> None:
        """Hand --project_name and --group_name to the services; tensorboard's project is a folder."""
        services = {*self.report_to} - {"none"}
        if (self.project_name or self.group_name) and not services:
            raise InputError(
                "--project_name and --group_name name a run in a service: add --report_to wandb (or another), or leave them out."
            )
        if self.group_name and services == {"tensorboard"}:
            raise InputError("--group_name has no part in tensorboard: leave it out, or add --report_to wandb.")
        if self.project_name:
            self.project = self.project_name  # which trackio reads
            os.environ.update(dict.fromkeys(PROJECT_VARIABLES, self.project_name))
            if "tensorboard" in services:
                place = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(self.output_dir, "runs")
                run = os.path.join(
                    self.project_name, self.run_name or os.path.basename(os.path.abspath(self.output_dir))
                )
                if not place.endswith(run):
                    os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(place, run)
        if self.group_name:
            os.environ["WANDB_RUN_GROUP"] = self.group_name

    def _read_deepspeed_file(self) -> None:
        if self.deepspeed and isinstance(self.deepspeed, str) and not self.deepspeed.lstrip().startswith("{"):
            try:
                json.loads(Path(self.deepspeed).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(
                    f"--deepspeed {self.deepspeed} cannot be read ({error}): give a file of ds_configs/, or one like them."
                ) from error
        if self.deepspeed and "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
            raise InputError(
                "--deepspeed needs a launcher, on one device, too: write `deepspeed` or `torchrun` in place of `python`."
            )

    def _fill_in_metric(self) -> None:
        """What the best checkpoint, early stopping and schedules that wait for progress look at."""
        best, schedule = _name_of(self.save_strategy) == "best", _name_of(self.lr_scheduler_type)
        looks = self.load_best_model_at_end or best or schedule in ("reduce_lr_on_plateau", "greedy")
        if looks and self.metric_for_best_model is None:
            self.metric_for_best_model = self.default_metric
        evaluates, saves = _name_of(self.eval_strategy), _name_of(self.save_strategy)
        if self.load_best_model_at_end and not best and evaluates != saves:
            raise InputError(
                f"--load_best_model_at_end True needs an evaluation of every checkpoint: with --save_strategy {saves} write "
                f"--eval_strategy {saves}, not {evaluates}."
            )
        if best and evaluates == "no":
            raise InputError("--save_strategy best saves at evaluations: add --eval_strategy steps or epoch.")

    def _check_numbers(self) -> None:
        for name in AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} is 1 or more, not {value}.")
        for name in NOT_NEGATIVE:
            if (value := getattr(self, name)) is not None and float(value) < 0:
                raise InputError(f"--{name} is 0 or more, not {value}.")

    def _check_optimizer_and_schedule(self) -> None:
        """Make both for one weight: what a package lacks or refuses would show after the data are read."""
        if self.deepspeed:
            return  # its file may bring both
        flags = f"--optim {_name_of(self.optim)}" + (f" --optim_args {self.optim_args}" if self.optim_args else "")
        layer = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1)  # draws no random number
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self, layer)
            optimizer = None if is_optimizer_factory(kind) else kind(layer.parameters(), **options)
        except (ValueError, TypeError, ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
            if self.optim_target_modules is not None and not isinstance(error, ImportError):
                return  # it is made for layers that this one is not
            raise InputError(f"{flags} cannot be had with these flags: {_one_line(error)}") from error
        if optimizer is None:
            return
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=self.lr_scheduler_kwargs)
        except (ValueError, TypeError, KeyError) as error:
            given = f" --lr_scheduler_kwargs {json.dumps(self.lr_scheduler_kwargs)}" * bool(self.lr_scheduler_kwargs)
            raise InputError(
                f"--lr_scheduler_type {_name_of(self.lr_scheduler_type)}{given} does not work: {_one_line(error)}"
            ) from error

    def _check_combinations(self) -> None:
        """What Trainer would refuse when the model is loaded."""
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise InputError("--use_liger_kernel needs a package that is not installed: pip install liger-kernel.")
        if self.torch_compile and self.torch_compile_backend not in torch.compiler.list_backends(()):
            raise InputError(
                f"--torch_compile_backend {self.torch_compile_backend} is unknown"
                f"{nearest(str(self.torch_compile_backend), torch.compiler.list_backends(()))}"
            )
        if "num_steps" in (getattr(self.accelerator_config, "gradient_accumulation_kwargs", None) or {}):
            raise InputError("--accelerator_config with num_steps: write --gradient_accumulation_steps.")
        unknown = {*(self.gradient_checkpointing_kwargs or {})} - {*CHECKPOINTING_OPTIONS}
        if unknown:
            raise InputError(
                f"--gradient_checkpointing_kwargs has {min(unknown)}, which torch does not: {', '.join(CHECKPOINTING_OPTIONS)}."
            )
        if self.deepspeed and self.save_only_model and self.load_best_model_at_end:
            raise InputError(
                "--save_only_model True leaves out what DeepSpeed needs for --load_best_model_at_end: leave one of them out."
            )
        if self.deepspeed and self.auto_find_batch_size:
            raise InputError("--auto_find_batch_size does not work with --deepspeed: leave it out.")

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            return
        if self.early_stopping_patience < 1:
            raise InputError(f"--early_stopping_patience counts evaluations, not {self.early_stopping_patience}.")
        if not self.load_best_model_at_end:
            raise InputError(
                "--early_stopping_patience waits for a better evaluation: add --load_best_model_at_end True, and the same "
                "--eval_strategy and --save_strategy."
            )
        self.restore_callback_states_from_checkpoint = True  # how long it has waited

    def _check_learning_rates(self) -> None:
        for name in ("vision_lr", "projector_lr"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise InputError(f"--{name} is above 0, not {rate}: what is not to train is frozen.")
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio < 1:
            raise InputError(f"--loraplus_lr_ratio is 1 or more, not {self.loraplus_lr_ratio}.")
        config = getattr(getattr(self, "hf_deepspeed_config", None), "config", {})
        if self.rates_differ and "optimizer" in config:
            raise InputError(
                "--vision_lr, --projector_lr and --loraplus_lr_ratio have no part in an optimizer of DeepSpeed's: leave "
                "`optimizer` out of the file of --deepspeed."
            )

    def __getstate__(self) -> dict[str, Any]:
        # training_args.bin lies in checkpoints, which are handed on
        return vars(self) | {"hub_token": None}


@dataclass
class SFTConfig(VLConfig):
    """Supervised fine-tuning on conversations: token-mean cross-entropy of the assistant's turns."""

    title: ClassVar[str] = "Supervised fine-tuning"
    refused: ClassVar[dict[str, str]] = REFUSED
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put conversations together up to --max_length tokens; --per_device_train_batch_size then counts such bins. For "
            "conversations much shorter than what a GPU takes, or of very different lengths: steps become fewer and equally large."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing and self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise InputError(
                f"--packing fills all batches alike: leave --train_sampling_strategy {self.train_sampling_strategy} out."
            )


# What losses may read of answers that were just sampled: nothing beside the answers themselves
ONLINE_NEEDS = frozenset({"per_token", "token_kl", "running_delta"})


@dataclass
class RolloutFlags:
    """How answers are sampled, and what they are worth: of PPO and its relatives, and of DPO with --online."""

    title: ClassVar[str] = "Rollouts and rewards"
    rollouts_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Answers sampled to each prompt; they share its tokens in every pass. 1 with gae, 2 in DPO, else 8.",
            "aliases": ["--num_generations"],
        },
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Rollouts generated at once on a device."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Of sampling, and of the log-probs that train the policy (in DPO of sampling alone); .7 with gae, else 1."
        },
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Nucleus of sampling; log-probs stay those of the whole vocabulary."}
    )
    response_length: int = field(
        default=53, metadata={"help": "Longest answer, in tokens.", "aliases": ["--max_completion_length"]}
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Within this many tokens of --response_length the score falls in a line (2503.14476 eq. 13)."
        },
    )
    overlong_penalty: float = field(default=1.0, metadata={"help": "With --overlong_buffer: what it falls by."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of an answer that does not end within --response_length."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Clip scores to [-x, x]."})
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "ZeRO-3: gather all weights once per rollout. False needs less memory and is slower: layer by layer, for every token."
        },
    )
    reward_adapter: list[str] = field(
        default_factory=list, metadata={"help": "Output folders of train_rm.py, LoRA on the policy's base."}
    )
    reward_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Reward models of their own, of any family."}
    )
    reward_timeout: float = field(
        default=1800,
        metadata={"help": "Seconds that a call of a reward function may take before the run stops; 0: without limit."},
    )
    reward_fn: list[str] = field(
        default_factory=list,
        metadata={
            "help": "file.py:name of functions (images, prompts, responses, columns of the data) -> one number per response; or names of "
            "base/reward_functions.py (exact_answer, ...)."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of adapters, models and functions, in this order; 1 by default."}
    )

    def check_rollouts(self, what: str) -> None:
        """Raise InputError for flags that cannot sample or score answers; `what` names the algorithm."""
        sources = len(self.reward_adapter) + len(self.reward_model_name_or_path) + len(self.reward_fn)
        if not sources:
            raise InputError(
                f"{what} needs a reward: give --reward_adapter, --reward_model_name_or_path or --reward_fn."
            )
        if self.reward_weights is not None and len(self.reward_weights) != sources:
            raise InputError(
                f"--reward_weights has {len(self.reward_weights)} numbers for {sources} reward(s): give one each."
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"--temperature must be above 0 and --top_p within (0, 1]: {what} learns from what it samples."
            )
        if self.overlong_buffer is not None and not 0 < self.overlong_buffer <= self.response_length:
            raise InputError(f"--overlong_buffer {self.overlong_buffer} must be within 1 ... --response_length.")
        if self.overlong_penalty != 1 and self.overlong_buffer is None:
            raise InputError("--overlong_penalty needs --overlong_buffer.")


@dataclass
class DPOConfig(RolloutFlags, VLConfig):
    """Direct preference optimisation and its relatives (losses/, docs/losses.md).

    `parse` adds a field for every hyper-parameter of every loss, under its name: `args.beta`, `args.mdpo_delta`, ...
    """

    title: ClassVar[str] = "DPO and other preference losses"
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate; with LoRA 10 times this is usual."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One or more names; several are summed."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per --loss_type; 1 by default."}
    )
    corruption: Literal["crop", "diffusion", "black", "patch", "swap"] | None = field(
        default=None,
        metadata={
            "help": "How losses that need it corrupt the image; their papers' way by default. crop: a small part, diffusion: noise, "
            "black: a black picture, patch: half of the squares greyed out, swap: another row's image."
        },
    )
    diffusion_step: int = field(default=500, metadata={"help": "Noise of --corruption diffusion, of 1000 steps."})
    online: bool = field(
        default=False,
        metadata={
            "help": "Learn from the policy's own answers instead of the data's: every step samples --rollouts_per_prompt answers to "
            "each prompt, rewards score them, --pairs says which of them are compared (2402.04792)."
        },
    )
    response_length: int = field(default=53, metadata={"help": "With --online: longest answer, in tokens."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once, keep them on disk, train without a reference."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device in that pass; --per_device_train_batch_size by default."}
    )
    ref_log_probs_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where they are kept, for all runs of all nodes; $HF_HOME/vl_rlhf/reference_logps by default."
        },
    )

    @property
    def row_kind(self) -> Literal["preference", "unpaired", "prompt"]:
        """The rows (data/rows.py) that are read."""
        if self.online:
            return "prompt"
        return "preference" if losses.reads_pairs(self.loss_type) else "unpaired"

    @property
    def compares_answers(self) -> bool:
        """Whether an answer without a score can be left out: pairs are made of the others."""
        return True

    @property
    def reads_reference(self) -> bool:
        """Whether any loss depends on the reference's log-probs."""
        return not all(losses.get_loss(name).reference_free for name in self.loss_type)

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.check_losses(
            self.loss_type, self.loss_weights, vars(self), precompute_ref_log_probs=self.precompute_ref_log_probs
        )
        for name, value in losses.common_hyperparameters(self.loss_type, vars(self)).items():
            setattr(self, name, value)  # a flag whose default is the loss's own shows it from here on
        ways = {loss.corruption for name in self.loss_type if (loss := losses.get_loss(name)).corruption}
        if self.corruption and not ways:
            raise InputError(
                f"--corruption does nothing with --loss_type {' '.join(self.loss_type)}: no image is corrupted."
            )
        if len(ways) > 1 and not self.corruption:
            raise InputError(
                f"These losses corrupt images in different ways ({', '.join(sorted(ways))}): give --corruption."
            )
        self.corruption = self.corruption or next(iter(ways), None)
        if "mismatched" in losses.needs_of(self.loss_type):
            for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
                if getattr(self, name) < 2:
                    raise InputError(
                        f"--{name} 1 leaves no other answer in a batch, on which --loss_type {' '.join(self.loss_type)} estimates the KL "
                        "to the reference: give 2 or more."
                    )
        if "running_delta" in losses.needs_of(self.loss_type):
            self.restore_callback_states_from_checkpoint = True
        if not 0 <= self.diffusion_step < 1000:
            raise InputError(f"--diffusion_step is a step from 0 to 999, not {self.diffusion_step}.")
        if self.online:
            self._settle_online()
        else:
            self._refuse_rollouts()

    def _refuse_rollouts(self) -> None:
        for f in dataclasses.fields(RolloutFlags):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            if getattr(self, f.name) != default:
                raise InputError(f"--{f.name} needs --online True: without it the answers are those of the data.")

    def _settle_online(self) -> None:
        self.rollouts_per_prompt = 2 if self.rollouts_per_prompt is None else self.rollouts_per_prompt
        self.temperature = 1.0 if self.temperature is None else self.temperature
        self.check_rollouts("Online DPO")
        if self.rollouts_per_prompt < 2:
            raise InputError("--online compares answers: --rollouts_per_prompt 2 at least.")
        if self.precompute_ref_log_probs:
            raise InputError(
                "--precompute_ref_log_probs knows the data's answers, not those of --online: leave it out."
            )
        if self.log_image_sensitivity:
            raise InputError("--log_image_sensitivity reads answers in the data; --online takes none: leave it out.")
        for name in self.loss_type:
            reads = {*losses.needs_of([name]) - ONLINE_NEEDS, *losses.columns_of([name])}
            if reads:
                raise InputError(
                    f"--loss_type {name} reads {', '.join(sorted(reads))}, which answers of --online do not have: take another loss."
                )

    def __reduce__(self) -> tuple[object, ...]:
        # Trainer pickles its arguments. pickle cannot find a class that `parse` has made: a plain DPOConfig comes back.
        return object.__new__, (DPOConfig,), self.__getstate__()


def _with_loss_flags(config: type[DPOConfig]) -> type[DPOConfig]:
    """The class with a field for each hyper-parameter of the losses registered so far, and their names in its help."""
    known = {f.name: f for f in dataclasses.fields(config)}
    names = "; ".join(
        f"{name}: {loss.summary}{f' ({loss.paper})' if loss.paper else ''}" for name, loss in losses.LOSSES.items()
    )
    loss_type = known["loss_type"]
    described = field(
        default_factory=loss_type.default_factory, metadata={"help": f"{loss_type.metadata['help']} {names}."}
    )
    fields: list[tuple[str, Any, Any]] = [("loss_type", loss_type.type, described)]
    for name, flag in losses.flags().items():
        if name in known:
            raise ValueError(f"--{name} is a flag already: give the hyper-parameter of the loss another name.")
        kind = flag.type | None if flag.default is None else flag.type
        fields.append((name, kind, field(default=flag.default, metadata={"help": flag.help})))
    namespace = {"__module__": config.__module__, "__doc__": config.__doc__}
    return dataclasses.make_dataclass(config.__name__, fields, bases=(config,), namespace=namespace)


@dataclass
class RMConfig(VLConfig):
    """Reward model: a scalar head trained to rank responses (Bradley-Terry)."""

    title: ClassVar[str] = "Reward model"
    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_COMPARISONS | REFUSED_IN_RM
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate; with LoRA 10 times this is usual."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Pull the rewards of a pair towards mean 0 (2312.09244 eq. 2); 0.01 is usual. PPO likes it."},
    )


# Flags of PPOConfig whose default depends on --advantage_estimator: (gae, the others). None: the flag has no part in it and is refused.
BY_ESTIMATOR: dict[str, tuple[Any, Any]] = {
    "num_ppo_epochs": (4, 1),
    "rollouts_per_prompt": (1, 8),
    "kl_coef": (0.05, 0.0),
    "temperature": (0.7, 1.0),
    "cliprange_value": (0.2, None),
    "vf_coef": (0.1, None),
    "lam": (0.95, None),
    "whiten_rewards": (False, None),
    "value_adapter": ("separate", None),
    "init_value_from_reward": (False, None),
}


@dataclass
class PPOConfig(RolloutFlags, VLConfig):
    """Policy optimisation against rewards (base/ppo_trainer.py), with a value function or without. Batch sizes are counted in rollouts."""

    title: ClassVar[str] = "PPO and other policy gradients"
    default_metric: ClassVar[str] = "eval_objective/scores"  # evaluation has no loss
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = field(
        default="gae",
        metadata={
            "help": "gae is PPO with a value function. The others need none (docs/rl.md): rloo and grpo compare an answer with its prompt's others, "
            "reinforce_plus_plus with the whole batch, reinforce_plus_plus_baseline with both."
        },
    )

    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_COMPARISONS | REFUSED_IN_PPO
    learning_rate: float = field(
        default=3e-6, metadata={"help": "Peak learning rate; with LoRA 10 times this is usual."}
    )
    num_ppo_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Passes over the rollouts of an update; 4 with gae, else 1.",
            "aliases": ["--num_iterations"],
        },
    )
    num_mini_batches: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps per pass. An update takes per_device_train_batch_size x gradient_accumulation_steps x this x devices rollouts."
        },
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Stop after this many rollouts, instead of --num_train_epochs or --max_steps."}
    )
    kl_coef: float | None = field(
        default=None,
        metadata={
            "help": "Penalty in the reward per nat of KL to the reference, at every token; .05 with gae, else 0."
        },
    )
    kl_in_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL to the reference (k3) in the loss, as in GRPO.", "aliases": ["--beta"]},
    )
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={"help": "Multiply the KL in the loss by the probability ratio, so that its gradient is unbiased."},
    )
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1", metadata={"help": "k1 is unbiased and may be negative; k3 is not negative, with less variance."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Move --kl_coef so that an answer's KL stays near this many nats (1909.08593 §2.2)."},
    )
    kl_horizon: int = field(
        default=10000, metadata={"help": "With --target_kl: rollouts in which the coefficient can move by a fifth."}
    )
    cliprange: float = field(
        default=0.2,
        metadata={"help": "Clip of the probability ratio (1707.06347 eq. 7).", "aliases": ["--epsilon"]},
    )
    cliprange_high: float | None = field(
        default=None,
        metadata={
            "help": "Upper clip, if it is another than --cliprange (2503.14476: .28).",
            "aliases": ["--epsilon_high"],
        },
    )
    delta: float | None = field(
        default=None,
        metadata={"help": "Largest ratio where the advantage is negative, above 1 + the upper clip (2505.07291)."},
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = field(
        default="dapo",
        metadata={
            "help": "Mean over the tokens of a mini batch (dapo) or of a micro batch (bnpo), over answers of token means (grpo), or over answers of "
            "sums by --response_length (dr_grpo)."
        },
    )
    importance_sampling_level: Literal["token", "sequence"] = field(
        default="token",
        metadata={
            "help": "token: a probability ratio per token. sequence: one per answer, the mean over its tokens (GSPO, 2507.18071)."
        },
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={
            "help": "With grpo: deviation that advantages are divided by, of the group or of the batch; none is Dr. GRPO (2503.20783)."
        },
    )
    drop_uniform_groups: bool = field(
        default=False,
        metadata={"help": "Leave out of the loss's mean groups whose answers all have the same score."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace groups whose answers all have the same score by new prompts (2503.14476)."},
    )
    max_num_gen_batches: int | None = field(
        default=None,
        metadata={"help": "With --dynamic_sampling: how often an update draws prompts at most; 10 by default."},
    )
    cliprange_value: float | None = field(
        default=None, metadata={"help": "Clip of the value's move within an update; .2 by default."}
    )
    vf_coef: float | None = field(default=None, metadata={"help": "Weight of the value loss; .1 by default."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float | None = field(
        default=None, metadata={"help": "GAE's lambda: bias against variance (1506.02438); .95 by default."}
    )
    whiten_rewards: bool | None = field(
        default=None,
        metadata={"help": "Scale token rewards to unit variance per update.", "nargs": "?", "const": True},
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Answers that do not end within --response_length do not enter the loss."}
    )
    rollout_url: str | None = field(
        default=None,
        metadata={
            "help": "Let an inference server sample, http://host:8000/v1 (docs/serving.md): where rollouts take most of the time. Needs --use_lora."
        },
    )
    rollout_timeout: float = field(
        default=600,
        metadata={
            "help": "With --rollout_url: seconds for a request, its time in the server's queue included, before it is tried again."
        },
    )
    rollout_importance_cap: float | None = field(
        default=None,
        metadata={
            "help": "With --rollout_url: largest importance weight of a token, its probability here over that on the server; 3 by default, 0 leaves "
            "weights out."
        },
    )
    value_adapter: Literal["separate", "shared"] | None = field(
        default=None,
        metadata={
            "help": "Weights of the value function: its own (separate, the default: an adapter; with full fine-tuning a second model), or the "
            "policy's, with a head (shared)."
        },
    )
    init_value_from_reward: bool | None = field(
        default=None,
        metadata={
            "help": "Start the value function, head included, as the first reward model.",
            "nargs": "?",
            "const": True,
        },
    )

    @property
    def has_value_function(self) -> bool:
        """Whether there is a critic."""
        return self.advantage_estimator == "gae"

    @property
    def compares_answers(self) -> bool:
        """Whether an advantage depends on the other answers to the prompt."""
        return self.advantage_estimator in ("rloo", "grpo", "reinforce_plus_plus_baseline")

    @property
    def reads_reference(self) -> bool:
        """Whether anything depends on the reference's log-probs."""
        return self.has_value_function or self.kl_coef != 0 or self.kl_in_loss != 0

    @property
    def reads_old_logps(self) -> bool:
        """Whether anything depends on log-probs before the first optimizer step; else those of that step serve."""
        several_steps = self.num_ppo_epochs > 1 or self.num_mini_batches > 1
        return self.has_value_function or self.kl_coef != 0 or several_steps or self.rollout_url is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fill_in_for_estimator()
        self._check_loss_flags()
        self._check_rollout_flags()
        self.check_rollouts("PPO")
        if self.init_value_from_reward and self.value_adapter != "separate":
            raise InputError(
                "--init_value_from_reward needs --value_adapter separate: the shared trunk is the policy's."
            )
        if self.init_value_from_reward and not (self.reward_adapter or self.reward_model_name_or_path):
            raise InputError("--init_value_from_reward needs a reward model: a function has no weights.")
        if self.per_device_train_batch_size % self.rollouts_per_prompt:
            raise InputError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size} counts rollouts and must be a multiple of "
                f"--rollouts_per_prompt {self.rollouts_per_prompt}: the answers to a prompt stay together."
            )
        if self.log_image_sensitivity:
            raise InputError("--log_image_sensitivity reads answers in the data; in PPO there are none: leave it out.")
        if self.total_episodes is not None:
            size = (
                self.per_device_train_batch_size
                * self.gradient_accumulation_steps
                * self.num_mini_batches
                * self.world_size
            )
            if self.total_episodes % size:
                raise InputError(
                    f"--total_episodes {self.total_episodes} is not a multiple of the {size} rollouts of an update."
                )
            self.max_steps = self.total_episodes // size

    def _fill_in_for_estimator(self) -> None:
        estimator = self.advantage_estimator
        for name, (with_critic, without) in BY_ESTIMATOR.items():
            if not self.has_value_function and without is None and getattr(self, name) is not None:
                raise InputError(f"--{name} has no part in --advantage_estimator {estimator}: leave it out.")
            if getattr(self, name) is None:
                setattr(self, name, with_critic if self.has_value_function else without)
        if self.dynamic_sampling and self.max_num_gen_batches is None:
            self.max_num_gen_batches = 10
        if self.scale_rewards != "group" and estimator != "grpo":
            raise InputError(f"--scale_rewards belongs to grpo, not to {estimator}: leave it out.")
        if self.gamma != 1 and estimator not in ("gae", "reinforce_plus_plus"):
            raise InputError(f"--gamma has no part in --advantage_estimator {estimator}: leave it out.")
        if self.compares_answers and self.rollouts_per_prompt < 2:
            raise InputError(f"--advantage_estimator {estimator} compares answers: --rollouts_per_prompt 2 at least.")
        if (self.drop_uniform_groups or self.dynamic_sampling) and not self.compares_answers:
            raise InputError(
                f"{estimator} compares no answers: leave out --drop_uniform_groups and --dynamic_sampling."
            )
        if self.max_num_gen_batches is not None and (not self.dynamic_sampling or self.max_num_gen_batches < 1):
            raise InputError("--max_num_gen_batches is 1 or more, and needs --dynamic_sampling True.")

    def _check_rollout_flags(self) -> None:
        if self.rollout_url is None:
            if self.rollout_importance_cap is not None or self.rollout_timeout != 600:
                raise InputError(
                    "--rollout_importance_cap and --rollout_timeout need --rollout_url, the server's address."
                )
            return
        if self.rollout_importance_cap is None:
            self.rollout_importance_cap = 3.0
        if self.rollout_importance_cap < 0 or 0 < self.rollout_importance_cap < 1 or self.rollout_timeout <= 0:
            raise InputError(
                "--rollout_importance_cap is 1 or more, or 0 for no weights, and --rollout_timeout is above 0."
            )

    def _check_loss_flags(self) -> None:
        high = self.cliprange if self.cliprange_high is None else self.cliprange_high
        if self.delta is not None and self.delta <= 1 + high:
            raise InputError(
                f"--delta {self.delta} must be above {1 + high}, 1 + the upper clip: below it the clip has no part."
            )
        if self.target_kl is not None and not self.kl_coef:
            raise InputError("--target_kl moves --kl_coef, which is 0: give a coefficient to start from.")
        if not self.use_bias_correction_kl and not self.kl_in_loss:
            raise InputError("--use_bias_correction_kl needs --kl_in_loss.")


# ---------------------------------------------------------------------------------------------------------------------
# The command line -> one instance per dataclass
# ---------------------------------------------------------------------------------------------------------------------


def parse(*classes: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read the command line (or `argv`) and `--config file.yaml` into one instance per dataclass.

    The hyper-parameters of all losses registered by now are flags of a DPOConfig.

    Raises:
        InputError: unknown flags, a missing or malformed config file, flags that contradict each other.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    try:
        kinds = [_with_loss_flags(kind) if issubclass(kind, DPOConfig) else kind for kind in classes]
        parser = DataclassParser(kinds, USUAL_OF_TRANSFORMERS)
        parsed = parser.parse_args_into_dataclasses(_in_our_flags(argv, parser))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(_one_line(error)) from error
    except torch.distributed.DistError as error:
        raise InputError(_unreachable(error)) from error
    _refuse_contradictions(parsed)
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
        "init_lora_weights": "default" if (init := config.get("init_lora_weights", True)) is True else str(init),
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


def _refuse_contradictions(parsed: Sequence[Any]) -> None:
    """Refuse flags that would silently do nothing, or something else, beside others."""
    flags = {f.name: getattr(p, f.name) for p in parsed for f in dataclasses.fields(p)}
    if flags.get("q_lora") and not flags.get("use_lora"):
        raise InputError("--q_lora trains an adapter on a quantised base: add --use_lora True.")
    if flags.get("use_lora") and (flags.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        raise InputError(
            "--gradient_checkpointing_kwargs with use_reentrant true gives adapters no gradient: leave it out."
        )
    _refuse_what_would_not_train(flags)
    _refuse_starts_of_adapters(flags)
    if any(isinstance(p, PPOConfig) for p in parsed) or flags.get("online"):
        _refuse_where_answers_are_sampled(flags)
    if not flags.get("use_lora"):
        _refuse_lora_alone(flags)
    if any(c.is_zero3() for p in parsed if (c := getattr(p, "hf_deepspeed_config", None))):
        _refuse_under_zero3(flags)
    if flags.get("q_lora") and flags.get("fsdp"):
        raise InputError("--q_lora does not work with --fsdp, which cannot share quantised weights out: take DDP.")
    _refuse_training_in_16_bits(flags)
    for config in parsed:
        if isinstance(config, DPOConfig):
            _refuse_pairs_of_single_answers(config, flags)
    if flags.get("eval_data_path") and flags.get("eval_ratio"):
        raise InputError("--eval_data_path and --eval_ratio both say what to evaluate on: give one of them.")
    if flags.get("pairs") == "score_margin" and flags.get("score_margin") is None:
        raise InputError("--pairs score_margin needs --score_margin.")


def _refuse_what_would_not_train(flags: dict[str, Any]) -> None:
    """Flags of the vision side that name what the others keep fixed, or the other way round."""
    lora, layers = flags.get("use_lora"), flags.get("train_vision_layers")
    if lora and not flags.get("freeze_vision_tower", True):
        raise InputError(
            "--use_lora trains adapters: leave --freeze_vision_tower False out; --lora_vision True puts adapters into the vision tower."
        )
    if layers is not None and layers < 1:
        raise InputError(f"--train_vision_layers counts layers, 1 or more, and is {layers}.")
    if layers is not None and not flags.get("freeze_vision_tower", True):
        raise InputError(
            "--train_vision_layers trains a part of the tower that --freeze_vision_tower False trains whole."
        )
    if layers is not None and lora and not flags.get("lora_vision"):
        raise InputError("--train_vision_layers with --use_lora says where adapters go: add --lora_vision True.")
    if flags.get("freeze_language_model") and lora:
        raise InputError("--freeze_language_model True trains without adapters: leave --use_lora out.")
    trains_vision = not flags.get("freeze_vision_tower", True) or layers
    if flags.get("freeze_language_model") and flags.get("train_projector") is False and not trains_vision:
        raise InputError("--freeze_language_model True and --train_projector False leave nothing to train.")


def _refuse_under_zero3(flags: dict[str, Any]) -> None:
    """Kinds of LoRA that read whole weights."""
    if flags.get("q_lora"):
        raise InputError(
            "--q_lora does not work with ZeRO-3, which cannot partition quantised weights: take ZeRO-2, or DDP."
        )
    if flags.get("use_dora"):
        raise InputError("--use_dora does not work with ZeRO-3, which hides the weights' shapes: take ZeRO-2, or DDP.")


def _refuse_lora_alone(flags: dict[str, Any]) -> None:
    """Flags of adapters in a run without them."""
    if flags.get("loraplus_lr_ratio") is not None:
        raise InputError("--loraplus_lr_ratio needs --use_lora True: it is a ratio of the rates of lora_B and lora_A.")
    defaults = {
        f.name: (f.default_factory() if f.default is dataclasses.MISSING else f.default)
        for f in dataclasses.fields(LoraArguments)
    }
    for name, default in defaults.items():
        if flags.get(name, default) != default:
            raise InputError(f"--{name} needs --use_lora True: without it all weights are trained.")


def _refuse_starts_of_adapters(flags: dict[str, Any]) -> None:
    """--init_lora_weights beside what it cannot be combined with."""
    init = flags.get("init_lora_weights") or "default"
    changes_base = init.startswith(CHANGE_BASE)
    if init == "loftq" and not (flags.get("q_lora") and flags.get("bits") == 4):
        raise InputError("--init_lora_weights loftq makes up for what 4 bits lose: add --q_lora True --bits 4.")
    if changes_base and flags.get("q_lora"):
        raise InputError(f"--init_lora_weights {init} changes weights, which --q_lora has rounded: take loftq.")
    if changes_base and (flags.get("deepspeed") or flags.get("fsdp")):
        raise InputError(
            f"--init_lora_weights {init} changes the base, which checkpoints of DeepSpeed and FSDP leave out: train with DDP."
        )
    if (changes_base or init == "loftq") and flags.get("use_dora"):
        raise InputError(f"--use_dora starts from the base's own weights: leave --init_lora_weights {init} out.")
    if init == "orthogonal" and (flags.get("lora_r") or 0) % 2:
        raise InputError(f"--init_lora_weights orthogonal needs an even --lora_r, not {flags['lora_r']}.")


def _refuse_where_answers_are_sampled(flags: dict[str, Any]) -> None:
    """What would change the base or the image features that policy, reference and rewards share in PPO and online DPO."""
    where = "online DPO" if flags.get("online") else "PPO"
    if flags.get("fsdp"):
        raise InputError(
            f"--fsdp is not supported in {where}, which would gather all weights for every token: take DDP or ZeRO-3."
        )
    for name in ("lora_vision", "train_projector", "train_vision_layers", "freeze_language_model"):
        if flags.get(name):
            raise InputError(f"--{name} is not supported in {where}, whose roles share the features of an image.")
    if flags.get("rollout_url") and not flags.get("use_lora"):
        raise InputError(
            "--rollout_url needs --use_lora True: the server gets an adapter in every update, and has no way to get all weights."
        )
    if flags.get("lora_bias") not in (None, "none"):
        raise InputError(
            f"--lora_bias must be none in {where}: trained biases belong to the base, which the reference and the rewards share."
        )
    if (init := flags.get("init_lora_weights") or "default").startswith(CHANGE_BASE):
        raise InputError(
            f"--init_lora_weights {init} changes the base, which rewards and value function share in {where}: take another."
        )


def _refuse_pairs_of_single_answers(config: DPOConfig, flags: dict[str, Any]) -> None:
    """Losses of single answers have no pairs to choose."""
    for name, default in (("pairs", "all"), ("score_margin", None)):
        if config.row_kind == "unpaired" and flags.get(name, default) != default:
            raise InputError(
                f"--{name} chooses pairs, and --loss_type {' '.join(config.loss_type)} reads single answers."
            )


def _refuse_training_in_16_bits(flags: dict[str, Any]) -> None:
    """Weights that train are float32, or have a float32 copy in DeepSpeed's optimizer: 16 bits lose small steps."""
    dtype, mixed = flags.get("torch_dtype"), flags.get("bf16") or flags.get("fp16")
    if dtype not in ("bfloat16", "float16") or (mixed and (flags.get("use_lora") or flags.get("deepspeed"))):
        return
    if not flags.get("use_lora"):
        raise InputError(
            f"--torch_dtype {dtype} would train 16-bit weights, whose small steps are lost: leave it out (--bf16 True "
            "computes in bf16 on float32 weights), or add --bf16 True and --deepspeed, which keeps a float32 copy."
        )
    for name, default in (("modules_to_save", None), ("lora_bias", "none")):
        if flags.get(name, default) != default:
            raise InputError(f"--{name} trains float32 weights beside those of --torch_dtype {dtype}: add --bf16 True.")


# ---------------------------------------------------------------------------------------------------------------------
# A run: its errors, and what it leaves in run.json
# ---------------------------------------------------------------------------------------------------------------------


def run(main: Callable[[], Any]) -> None:
    """`common.errors.run` for commands that may run in several processes: one that cannot be reached is a sentence, too."""
    try:
        errors.run(main)
    except RuntimeError as error:
        # gloo raises a bare RuntimeError.
        if not (isinstance(error, torch.distributed.DistError) or re.search(r"\bgloo\b|NCCL", str(error))):
            raise
        errors.fail(_unreachable(error))


def _unreachable(error: BaseException) -> str:
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


def write_run_json(output_dir: str | Path, *parsed: Any, **facts: Any) -> Path:
    """Write `run.json`: argv, resolved arguments, git commit, versions, seed, device, and `facts` (data fingerprint, counts).

    Called on the main process when training starts, so that a run that dies is described too.
    """
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "pillow")
    training = next(p for p in parsed if isinstance(p, TrainingArguments))
    info = {
        "argv": without_token(sys.argv),
        "arguments": describe(*parsed),
        "git": _git_state(),
        "versions": installed_versions(packages) | {"torch": str(torch.__version__)},  # its build, too
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
