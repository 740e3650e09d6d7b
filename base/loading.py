"""The one way to load a checkpoint, as its family's adapter class."""

import importlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file, is_flash_attn_2_available

from base.layout import (
    ADAPTER_CONFIG,
    base_model_path,
    check_base_of_adapter,
    check_weights,
    checkpoint_file,
    damaged_file,
)
from base.lora_start import LoraOnChangedBase
from base.other_heads import is_head_weight
from common.compat import keep_quantised_linears_trainable
from common.errors import InputError
from common.tensors import first_not_finite


class Family(Protocol):
    """What the layers below read of a `models.core_mapper.ModelCoreMapper`: the classes of a checkpoint's family."""

    model: type
    processor: type
    reward_model: type
    dpo_collator: type
    reward_collator: type


def core_mapper_for(model_name_or_path: str) -> Family:
    """The adapter of a checkpoint, see `models.core_mapper_for`."""
    return _families().core_mapper_for(model_name_or_path)


def _families() -> ModuleType:
    """The package `models`. Families are plug-ins that lie above this layer: they are found when a checkpoint is loaded."""
    return importlib.import_module("models")


def architecture_of(model_name_or_path: str) -> str:
    """The class name in the checkpoint's config.json.

    Raises:
        InputError: the folder or hub id has no config.json, or the config names no architecture or an encoder-decoder.
    """
    path = base_model_path(model_name_or_path)
    try:
        config_file = cached_file(path, "config.json")
    except OSError as error:
        reason = f"{path} is neither a checkpoint folder with a config.json nor a model that the hub can give"
        if path != model_name_or_path:
            raise InputError(
                f"{reason}, and {Path(model_name_or_path) / ADAPTER_CONFIG} names it as the adapter's base: if the base "
                "has moved, correct base_model_name_or_path there."
            ) from error
        raise InputError(f"{reason}: {error}") from error
    if config_file is None:
        raise InputError(
            f"{path} has no config.json: give the folder of a checkpoint, or of a LoRA adapter with its {ADAPTER_CONFIG}."
        )
    try:
        config = json.loads(Path(config_file).read_text())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{config_file} is not valid JSON (line {error.lineno}, column {error.colno}): download it again."
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{config_file} is not a configuration, which is a JSON object: download it again.")
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise InputError(f"{config_file} must name one class under `architectures`, not {architectures}.")
    if config.get("is_encoder_decoder") or config.get("use_decoder_only_language_model") is False:
        raise InputError(
            f"{path} is an encoder-decoder ({architectures[0]}): a row here is one sequence, in which the answer follows the "
            "prompt. Give a checkpoint with a decoder alone; of BLIP-2 and InstructBLIP those with OPT and Vicuna."
        )
    return architectures[0]


def load_model(
    model_name_or_path: str,
    *,
    dtype: torch.dtype | str = "auto",
    use_flash_attention_2: bool = False,
    bits: int | None = None,
    is_trainable: bool = False,
    with_other_head: bool = False,
    **kwargs: Any,
) -> torch.nn.Module:
    """Load a checkpoint, or a LoRA adapter on its base, as its adapter's class. Every weight must be found.

    Args:
        bits: 4 (NF4 with double quantisation) or 8 quantise the language model, not vision tower, projector or lm_head.
        is_trainable: an adapter's weights require gradients.
        with_other_head: the checkpoint may hold the head of a reward model in place of lm_head (base/other_heads.py), which is
            left out here.
        kwargs: go to from_pretrained.

    Raises:
        InputError: weights are missing, unexpected or of another shape, the adapter is another base's, or flash attention cannot be had.
    """
    path = base_model_path(model_name_or_path)
    model_class = core_mapper_for(model_name_or_path).model
    check_weights(path)
    if use_flash_attention_2:
        kwargs["attn_implementation"] = _flash_attention(path)
    if bits is not None:
        kwargs["quantization_config"] = _quantisation(model_class, path, bits, dtype)
    # ZeRO-3 draws random weights before it reads the real ones. Adapters and heads, which are drawn next, must not depend on that.
    if damaged := damaged_file(path):  # transformers passes over some of them without a word
        raise InputError(f"{damaged}: copy or download the file again.")
    check_base_of_adapter(model_name_or_path, path)
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            model, info = model_class.from_pretrained(
                path,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # an error below, with the names
                **kwargs,
            )
        except (SafetensorError, OSError) as error:
            reason = f"{path} cannot be loaded ({' '.join(str(error).split())[:300]})"
            raise InputError(f"{reason}: copy or download the files again.") from error
    wrong = _misfits(model, info, with_other_head)
    if set(wrong["missing_keys"]) == _head_names(model) and not (wrong["unexpected_keys"] or wrong["mismatched_keys"]):
        raise InputError(
            f"{path} has no {', '.join(wrong['missing_keys'])}: it was saved without a head, as embedding models are, and cannot "
            "write text. Give the checkpoint that it was made from."
        )
    if any(wrong.values()):
        listed = "; ".join(
            f"{name.replace('_', ' ')} {', '.join(keys[:5])}" + ", ..." * (len(keys) > 5)
            for name, keys in wrong.items()
            if keys
        )
        raise InputError(
            f"The weights of {path} do not fit {model_class.__name__}: {listed}. Save the checkpoint anew."
        )
    check_finite(model, path)
    model.freeze_unused()
    if is_deepspeed_zero3_enabled():
        # transformers keeps all renamings of a class here, not only those that this checkpoint needed, and would save wrong names with them.
        model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or [] if c.was_used()]
    if bits is not None:
        keep_quantised_linears_trainable(model)
    if path != model_name_or_path:
        if whole := [
            f for f in ("model.safetensors", "model.safetensors.index.json") if (Path(model_name_or_path) / f).is_file()
        ]:
            raise InputError(
                f"{model_name_or_path} holds a whole model and an adapter, of two runs: remove {ADAPTER_CONFIG} to load the model, "
                f"or {whole[0]} to load the adapter."
            )
        if bits is not None and is_trainable:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = load_adapter(model, model_name_or_path, is_trainable=is_trainable)
    return model


def _misfits(model: nn.Module, info: Mapping[str, Any], with_other_head: bool) -> dict[str, list[str]]:
    """What `from_pretrained` says of weights that are missing, unexpected or of another shape, by name."""
    wrong = {
        name: sorted(map(str, info.get(name) or ())) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if with_other_head:
        wrong["unexpected_keys"] = [name for name in wrong["unexpected_keys"] if not is_head_weight(name)]
        wrong["missing_keys"] = [name for name in wrong["missing_keys"] if name not in _head_names(model)]
    return wrong


def check_finite(model: nn.Module, path: str) -> None:
    """Raise InputError if a weight is NaN or infinite: every number that the model computes would be, too."""
    if bad := first_not_finite(model.named_parameters()):
        raise InputError(
            f"{bad} of {path} holds values that are not finite: the file is damaged, or its training diverged. Take another "
            "checkpoint, or load it in a wider type (--torch_dtype float32)."
        )


def _head_names(model: nn.Module) -> set[str]:
    head = model.get_output_embeddings()
    inside = {id(p) for p in head.parameters()} if head is not None else set()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside} or {""}


def load_adapter(
    model: nn.Module, folder: str, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Add the LoRA adapter in `folder` to a model, or to one that has adapters already. The only way to load an adapter.

    Raises:
        InputError: it is an adapter of another kind; its modules are not in the model, are of another size, or some of
            its weights are missing. peft itself only warns, and such an adapter would compute what the base computes.
    """
    if is_trainable or isinstance(model, PeftModel):
        _refuse_parts_of_the_base(folder)
    with _must_fit(model, folder) as renames:
        config = _with_names_of_today(_core(model), folder) if renames else _without_head(folder)
        if isinstance(model, PeftModel):
            if config is not None:
                config.inference_mode = not is_trainable
                model.add_adapter(adapter_name, config)
            model.load_adapter(folder, adapter_name=adapter_name, is_trainable=is_trainable, key_mapping=renames)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
                model = PeftModel.from_pretrained(
                    model,
                    folder,
                    adapter_name=adapter_name,
                    is_trainable=is_trainable,
                    config=config,
                    key_mapping=renames,
                )
    _set_adapter_weights(model, folder, adapter_name)
    if model.peft_config[adapter_name].init_lora_weights == "eva":  # what peft has saved has started already
        model.peft_config[adapter_name].init_lora_weights = True
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        model.peft_config[adapter_name].base_model_name_or_path = base_model_path(folder)  # where it lies now
    return model


def _refuse_parts_of_the_base(folder: str) -> None:
    """peft would change the base for such an adapter, and with it the reference and every other adapter on it."""
    config = Path(folder) / ADAPTER_CONFIG
    start = str(json.loads(config.read_text()).get("init_lora_weights")).lower() if config.is_file() else ""
    if start.startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
        raise InputError(
            f"The adapter in {folder} holds a part of its base ({start}): save it with peft's path_initial_model_for_weight_conversion, "
            "or merge it with merge_lora.py and start from that."
        )


def _set_adapter_weights(model: PeftModel, folder: str, adapter_name: str) -> None:
    """Overwrite an adapter's weights. Each weight of the folder has a place, and each place gets one."""
    with _must_fit(model, folder) as renames:
        weights = load_peft_weights(folder, device="cpu", key_mapping=renames)
        weights = {name: tensor for name, tensor in weights.items() if not is_head_weight(name)}
        result = set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
        if bad := first_not_finite(weights.items()):
            raise ValueError(f"{bad} holds values that are not finite: the file is damaged, or its training diverged.")
        missing = [name for name in result.missing_keys if "lora_" in name and f".{adapter_name}." in f"{name}."]
        for names, what in ((result.unexpected_keys, "has no place in the model"), (missing, "is not in the folder")):
            if names:
                raise ValueError(f"{min(names)} {what} ({len(names)} such weights, {len(weights)} in the folder).")


def _core(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _layers(core: nn.Module) -> dict[str, nn.Module]:
    """The modules without further modules in them, as they are without adapters, by name."""
    modules = {
        name: module
        for name, module in core.named_modules()
        if not re.search(r"\.(base_layer|original_module|lora_|modules_to_save|token_adapter)", name)
    }
    inner = {name.rpartition(".")[0] for name in modules}
    return {name: module for name, module in modules.items() if name not in inner}


def _renames(core: nn.Module, folder: str) -> dict[str, str]:
    """Of the family's `adapter_renames` those that an adapter needs, as peft takes them: regular expressions and what they become."""
    layers = _layers(core)

    def known(weight: str) -> bool:
        return any(weight[: dot.start()] in layers for dot in re.finditer(r"\.", weight))

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        foreign = [name for key in file.keys() if not known(name := key.removeprefix("base_model.model."))]  # noqa: SIM118
    renames: dict[str, str] = getattr(core, "adapter_renames", {})
    return {
        rf"^{re.escape(old)}": new
        for old, new in renames.items()
        if any(name.startswith(old) and known(new + name.removeprefix(old)) for name in foreign)
    }


def _with_names_of_today(core: nn.Module, folder: str) -> PeftConfig:
    """The configuration of an adapter that is written in older names of modules: its targets by their names, its patterns renamed."""
    config, renames = PeftConfig.from_pretrained(folder), core.adapter_renames

    def older(name: str) -> str:
        return next((old + name.removeprefix(new) for old, new in renames.items() if name.startswith(new)), name)

    def newer(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renames.items() if name.startswith(old)), name)

    kinds = (nn.Linear, nn.Embedding, BaseTunerLayer)
    config.target_modules = {
        name
        for name, module in _layers(core).items()
        if isinstance(module, kinds) and check_target_module_exists(config, older(name))
    }
    config.rank_pattern = {newer(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {newer(name): alpha for name, alpha in config.alpha_pattern.items()}
    return config


def _without_head(folder: str) -> PeftConfig | None:
    """The configuration of an adapter with another program's head in it, as that of the adapter alone; None for all others."""
    if checkpoint_file(folder, ADAPTER_CONFIG) is None:
        return None
    config = PeftConfig.from_pretrained(folder)
    saved = set(getattr(config, "modules_to_save", None) or ())
    if not any(is_head_weight(f"{name}.weight") for name in saved):
        return None
    config.modules_to_save = [name for name in saved if not is_head_weight(f"{name}.weight")] or None
    config.task_type = "CAUSAL_LM"
    return config


@contextmanager
def _must_fit(model: nn.Module, folder: str) -> Iterator[dict[str, str]]:
    """One sentence for what peft says of an adapter that does not fit; yields `_renames`."""
    core = _core(model)
    if damaged := damaged_file(folder):
        raise InputError(f"{damaged}: take another checkpoint, or copy the file again.")
    config = Path(folder) / ADAPTER_CONFIG
    if config.is_file() and (kind := json.loads(config.read_text()).get("peft_type", "LORA")) != "LORA":
        raise InputError(
            f"{folder} is an adapter of the kind {kind}, and only LoRA's are supported: merge it into its base with peft, or train "
            "a LoRA adapter."
        )
    if not [*Path(folder).glob("adapter_model.*")] and Path(folder).is_dir():
        raise InputError(f"{folder} has no adapter_model.safetensors: take another checkpoint, or copy the file again.")
    if (Path(folder) / "adapter_model.bin").is_file() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{folder} holds its weights as adapter_model.bin, and only safetensors are read: load and save the adapter "
            "with peft once."
        )
    try:
        yield _renames(core, folder) if Path(folder).is_dir() else {}
    except (ValueError, RuntimeError, KeyError) as error:  # target modules are missing, or of another size
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            reason = f"{error.args[0]} is not in the folder."
        raise InputError(f"The adapter in {folder} does not fit {core.config.name_or_path}: {reason}") from error


def load_weights(backbone: nn.Module, folder: str, adapter_name: str = "default") -> None:
    """Overwrite the weights of a model, or of one adapter, with those saved in `folder`."""
    if isinstance(backbone, LoraOnChangedBase):
        backbone.load_saved(folder)
        return
    if isinstance(backbone, PeftModel):
        _set_adapter_weights(backbone, folder, adapter_name)
        return
    # Names on disk differ from names in memory: load as from_pretrained does.
    fresh = load_model(folder, dtype=next(backbone.parameters()).dtype)
    backbone.load_state_dict(fresh.state_dict())


def _flash_attention(path: str) -> str:
    architecture = architecture_of(path)
    if architecture not in _families().FLASH_ATTN_MODELS:
        raise InputError(f"{architecture} does not support FlashAttention-2: leave --use_flash_attention_2 out.")
    if not is_flash_attn_2_available():
        raise InputError(
            "FlashAttention-2 is not available here (package flash-attn, a CUDA GPU): leave --use_flash_attention_2 out."
        )
    return "flash_attention_2"


def _quantisation(model_class: type, path: str, bits: int, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """Quantise the language model only. The patterns of bitsandbytes match from the start of a full module name."""
    with torch.device("meta"):
        empty = model_class(AutoConfig.from_pretrained(path))
    inside = {id(module) for module in empty.get_decoder().modules()}
    keep = [
        name
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in inside
    ]
    compute = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=keep,
    )
