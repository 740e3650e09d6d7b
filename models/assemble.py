"""Build what a script trains from its flags: policy, reference, LoRA, quantisation."""

import contextlib
import dataclasses
import datetime
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import broadcast_object_list
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

from args import LoraArguments, ModelArguments, VLConfig
from args.model import CHANGE_BASE, NEW_ADAPTER
from base.adapters import Role
from base.fast_lora import use_fast_lora
from base.layout import without_cwd
from base.loading import base_model_path, load_adapter, load_model
from base.lora_start import LoraOnChangedBase, keep_start, start_as_rounding_error
from base.model import VLModelMixin
from base.resume import checkpoint_to_resume
from base.run_folder import run_of
from common.errors import InputError
from models import core_mapper_for
from models.merging import bits_of, merge_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadPlan:
    """What loading decides from the flags. It is printed, written to run.json, and read by what is built afterwards.

    Attributes:
        checkpoint: what is loaded: a plain checkpoint or a LoRA adapter folder; with --merge_first the merged one.
        base: the plain checkpoint under it.
        dtype: of the loaded weights, a name of torch.
        attention: transformers' name of the attention implementation.
        share_prefix: whether the responses of a row share its prompt (base/packing.py, base/packed_attention.py).
        fast_lora: whether LoRA layers compute as base/fast_lora.py; False without LoRA.
        bits: 4 or 8 for a quantised base.
        freeze_vision_tower: whether the vision encoder does not train.
        train_vision_layers: how many of its last layers train all the same (with LoRA: get adapters); None for none of a
            frozen one, and all that get any.
        train_projector: whether all weights between tower and language model train; None leaves it to LoRA or not.
        freeze_language_model: whether decoder and head do not train.
        enable_thinking, date: what chat templates are told; the date is the day on which the run began.
        min_pixels, max_pixels: of a picture (base/resolution.py); None is the checkpoint's own.
        video_frames, video_fps: of a video (base/videos.py); None is the checkpoint's own.
    """

    checkpoint: str
    base: str
    dtype: str
    attention: str
    share_prefix: bool
    fast_lora: bool
    bits: int | None
    freeze_vision_tower: bool
    enable_thinking: bool
    date: str
    min_pixels: int | None = None
    max_pixels: int | None = None
    train_vision_layers: int | None = None
    train_projector: bool | None = None
    freeze_language_model: bool = False
    video_frames: int | None = None
    video_fps: float | None = None

    @classmethod
    def of(cls, model_args: ModelArguments, lora_args: LoraArguments, training_args: VLConfig) -> Self:
        """Decide, merge the adapter first where --merge_first says so, and print the plan on the main process.

        Raises:
            InputError: there is no adapter to merge, or no family supports the checkpoint.
        """
        checkpoint = model_args.model_name_or_path
        if model_args.merge_first:
            checkpoint = _merged_base(checkpoint, training_args)
        dtype = model_args.torch_dtype
        if dtype == "auto":  # a frozen base may be bf16, trained weights keep float32 masters under autocast
            dtype = "bfloat16" if training_args.bf16 and lora_args.use_lora else "float32"
        share_prefix = training_args.share_prefix
        if share_prefix and not core_mapper_for(checkpoint).model.packs:
            logger.warning("Layers of this model would mix a row's responses: --share_prefix is switched off.")
            share_prefix = False
        base = base_model_path(checkpoint)
        plan = cls(
            checkpoint=checkpoint,
            base=base,
            dtype=dtype,
            attention="flash_attention_2" if model_args.use_flash_attention_2 else "sdpa",
            share_prefix=share_prefix,
            # DoRA's layers are peft's
            fast_lora=lora_args.fast_lora and (lora_args.use_lora or checkpoint != base) and not lora_args.use_dora,
            bits=model_args.bits if model_args.q_lora else None,
            freeze_vision_tower=model_args.freeze_vision_tower,
            enable_thinking=model_args.enable_thinking,
            date=_date_of(training_args),
            min_pixels=model_args.min_pixels,
            max_pixels=model_args.max_pixels,
            train_vision_layers=model_args.train_vision_layers,
            train_projector=model_args.train_projector,
            freeze_language_model=model_args.freeze_language_model,
            video_frames=model_args.video_frames,
            video_fps=model_args.video_fps,
        )
        if training_args.process_index == 0:
            print(f"Loading\n{plan}", flush=True)
        return plan

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        width = max(map(len, fields))
        return "\n".join(f"    {name:<{width}}  {value}" for name, value in fields.items())

    @property
    def rendering(self) -> dict[str, Any]:
        """Arguments of the family's processor."""
        return {
            "enable_thinking": self.enable_thinking,
            "date": datetime.date.fromisoformat(self.date),
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "video_frames": self.video_frames,
            "video_fps": self.video_fps,
        }

    @property
    def is_adapter(self) -> bool:
        """Whether training continues a LoRA adapter."""
        return self.checkpoint != self.base


def load_policy(plan: LoadPlan, lora_args: LoraArguments, training_args: VLConfig) -> torch.nn.Module:
    """Load what is trained, freeze what does not train, add LoRA.

    Raises:
        InputError: the checkpoint is an adapter and --use_lora is not given, or flags name modules that the model does not have.
    """
    if plan.is_adapter and not lora_args.use_lora:
        raise InputError(
            f"{plan.checkpoint} is a LoRA adapter: add --use_lora True to train it on, or --merge_first True to train all "
            "weights of its base."
        )
    model = _load(plan)
    if lora_args.use_lora and not isinstance(model, PeftModel):
        model = add_lora(
            model,
            lora_args,
            gradient_checkpointing=training_args.gradient_checkpointing,
            vision_layers=plan.train_vision_layers,
            with_projector=bool(plan.train_projector),
        )
        if lora_args.init_lora_weights == "loftq":
            start_as_rounding_error(model, load_model(plan.base, dtype=getattr(torch, plan.dtype)))
            keep_start(model)
    if plan.fast_lora:
        use_fast_lora(model)
    if not training_args.deepspeed:  # whose optimizers keep float32 copies of 16-bit weights
        for parameter in model.parameters():  # of --modules_to_save and --lora_bias; adapters are float32 already
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _load(plan: LoadPlan) -> torch.nn.Module:
    model = load_model(
        plan.checkpoint,
        dtype=getattr(torch, plan.dtype),
        use_flash_attention_2=plan.attention == "flash_attention_2",
        bits=plan.bits,
        is_trainable=True,
    )
    choose_what_trains(model.get_base_model() if isinstance(model, PeftModel) else model, plan)
    return model


def choose_what_trains(core: VLModelMixin, plan: LoadPlan) -> None:
    """Freeze what the flags keep fixed of a model whose weights all train. LoRA freezes all of them later.

    Raises:
        InputError: the vision tower has fewer layers than --train_vision_layers says.
    """
    if plan.freeze_vision_tower:
        core.freeze_vision_tower()
    if plan.train_vision_layers is not None:
        layers = core.vision_layers()
        if plan.train_vision_layers > len(layers):
            raise InputError(
                f"--train_vision_layers {plan.train_vision_layers} is more than the {len(layers)} layers whose output is used."
            )
        for layer in layers[-plan.train_vision_layers :]:
            layer.requires_grad_(True)
    if plan.train_projector is not None:
        for parameter in core.projector_parameters():
            parameter.requires_grad_(plan.train_projector)
    if plan.freeze_language_model:
        core.freeze_language_model()


def load_reference(policy: torch.nn.Module, plan: LoadPlan, training_args: VLConfig) -> torch.nn.Module | None:
    """The frozen reference of a policy from `load_policy`, before its first step.

    - All weights train: a second copy of the checkpoint.
    - A fresh LoRA adapter: None, the base itself is the reference.
    - An adapter that starts elsewhere than at zero (base/lora_start.py): None, its start lies in the policy as "ref".
    - A loaded adapter that training continues: None, and a frozen copy of it inside the policy, under the name "ref".
    - With `--precompute_ref_log_probs` the policy answers before its first step: None. Only ZeRO-3 needs a copy for that, because it cannot run a
      model before its optimizer exists.
    """
    if getattr(training_args, "precompute_ref_log_probs", False):
        if is_deepspeed_zero3_enabled():
            return _load(plan)
        if not isinstance(policy, PeftModel):
            return None
    if not isinstance(policy, PeftModel):
        return _load(plan)
    if plan.is_adapter:
        load_adapter(policy, plan.checkpoint, Role.REFERENCE.adapter)
        policy.set_adapter(Role.POLICY.adapter)
    return None


def _date_of(training_args: VLConfig) -> str:
    """Today, by the clock of the first process; of a run that goes on, the day on which it began."""
    resumed = checkpoint_to_resume(training_args)
    began = ((resumed and run_of(resumed)) or {}).get("plan", {}).get("date")
    if began:
        return str(began)
    today: list[str] = broadcast_object_list([datetime.datetime.now().date().isoformat()])
    return today[0]


def _merged_base(adapter: str, training_args: VLConfig) -> str:
    """For --merge_first: the folder `merged_base` of the run, a plain checkpoint. An adapter that is trained on it names it as its base."""
    merged = Path(training_args.output_dir) / "merged_base"
    base = base_model_path(adapter)
    if base == adapter:
        raise InputError(f"--merge_first needs a LoRA adapter, and {adapter} has no adapter_config.json: leave it out.")
    with training_args.main_process_first(local=training_args.save_on_each_node, desc="merging the adapter"):
        first = training_args.local_process_index if training_args.save_on_each_node else training_args.process_index
        if first == 0 and not (merged.is_dir() and checkpoint_to_resume(training_args)):
            shutil.rmtree(merged, ignore_errors=True)
            with one_process_loads():
                merge_to(base, adapter, merged, bits_of(adapter))
    return str(merged)


@contextlib.contextmanager
def one_process_loads() -> Iterator[None]:
    """Load whole models on one process alone: under ZeRO-3 from_pretrained would share them out and wait for the others."""
    config = deepspeed.deepspeed_config() and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def add_lora(
    model: torch.nn.Module,
    lora_args: LoraArguments,
    gradient_checkpointing: bool = False,
    vision_layers: int | None = None,
    with_projector: bool = False,
) -> PeftModel:
    """Wrap a model with a fresh LoRA adapter.

    Named targets are looked up in the language model, and with --lora_vision all linear layers of the tower's blocks are
    added; a regular expression is used as given. Flags that were not given get the values of a new adapter.

    Args:
        vision_layers: the last ones of the tower's that --lora_vision adds; None for all.
        with_projector: all weights of the projector train, and are saved beside the adapter.

    Raises:
        InputError: a target does not name a linear layer of the language model, or --modules_to_save no module.
    """
    new = {name: value for name, value in NEW_ADAPTER.items() if getattr(lora_args, name) is None}
    lora_args = dataclasses.replace(lora_args, **new)
    targets = _targets(lora_args.lora_target_modules, model)
    if lora_args.lora_vision:
        try:
            targets = f"{model.vision_lora_regex(vision_layers)}|{targets}"
        except ValueError as error:
            raise InputError(str(error)) from error
    _check_modules_to_save(lora_args.modules_to_save, model)
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    whole = [*(lora_args.modules_to_save or []), *(_names_of(model.projector(), model) if with_projector else [])]
    config = LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=targets,
        bias=lora_args.lora_bias,
        modules_to_save=whole or None,
        use_dora=lora_args.use_dora,
        use_rslora=lora_args.use_rslora,
        # LoftQ begins from the quantised layers, which peft does not do by itself
        init_lora_weights=True if lora_args.init_lora_weights in ("default", "loftq") else lora_args.init_lora_weights,
        eva_config=EvaConfig(rho=1.0) if lora_args.init_lora_weights == "eva" else None,  # see start_from_inputs
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
            peft_model = get_peft_model(model, config)
    except ValueError as error:  # the regular expression matches nothing, or a module that LoRA cannot adapt
        raise InputError(f"--lora_target_modules: {' '.join(str(error).split())[:300]}") from error
    if config.base_model_name_or_path:  # None of a model that was never saved
        config.base_model_name_or_path = without_cwd(config.base_model_name_or_path)  # goes to adapter_config.json
    if lora_args.init_lora_weights.startswith(CHANGE_BASE):
        peft_model.__class__ = LoraOnChangedBase
        keep_start(peft_model)
    return peft_model


def _targets(targets: list[str], model: torch.nn.Module) -> str:
    """--lora_target_modules as a regular expression over full module names."""
    if len(targets) == 1 and re.search(r"[*^$()\[\]|\\]", targets[0]):
        return targets[0]
    try:
        return model.lora_target_regex(None if targets == ["auto"] else targets)
    except ValueError as error:
        raise InputError(f"--lora_target_modules: {error}") from error


def _names_of(modules: list[torch.nn.Module], model: torch.nn.Module) -> list[str]:
    wanted = {id(module) for module in modules}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _check_modules_to_save(wanted: list[str] | None, model: torch.nn.Module) -> None:
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for module in wanted or ():
        if not any(name == module or name.endswith("." + module) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names if not re.search(r"\d", name)})
            raise InputError(
                f"--modules_to_save {module} is not a module of the model: choose from {', '.join(known)}."
            )
