"""How it is trained: what the four algorithms share on top of transformers' TrainingArguments."""

import dataclasses
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import is_liger_kernel_available

from common import compat
from common.dataclass_flags import USUAL
from common.errors import InputError
from common.flags import nearest
from common.fsdp_flags import Sharding, sharding_of, sharding_of_launcher

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


def one_line(error: BaseException) -> str:
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
            compat.join_processes_on_cpu(bool(self.deepspeed), self.ddp_timeout)
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
            raise InputError(f"transformers refuses these flags: {one_line(error)}") from error

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
            raise InputError(f"{flags} cannot be had with these flags: {one_line(error)}") from error
        if optimizer is None:
            return
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=self.lr_scheduler_kwargs)
        except (ValueError, TypeError, KeyError) as error:
            given = f" --lr_scheduler_kwargs {json.dumps(self.lr_scheduler_kwargs)}" * bool(self.lr_scheduler_kwargs)
            raise InputError(
                f"--lr_scheduler_type {_name_of(self.lr_scheduler_type)}{given} does not work: {one_line(error)}"
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
