"""Which adapter folder serves a checkpoint, and the one way to load it.

To add a family: a folder with a `core_mapper`, one line in MODEL_NICKNAME_MAP (docs/CustomizedModel.md).
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
import contextlib
import importlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from base.compat import keep_quantised_linears_trainable
from base.errors import InputError
from base.lora import use_fast_lora
from models.core_mapper import ModelCoreMapper

__all__ = [
    "FLASH_ATTN_MODELS",
    "MODEL_NICKNAME_MAP",
    "ModelCoreMapper",
    "add_lora",
    "core_mapper_for",
    "load_for_training",
    "load_model",
    "reference_for",
]

# Class name in a checkpoint's config.json ("architectures") -> folder in models/
MODEL_NICKNAME_MAP = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "InstructBlipForConditionalGeneration": "instructblip",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "InternVLForConditionalGeneration": "internvl",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "smolvlm",
    "PaliGemmaForConditionalGeneration": "paligemma",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Mistral3ForConditionalGeneration": "mistral3",
    "MllamaForConditionalGeneration": "mllama",
    "VipLlavaForConditionalGeneration": "vipllava",
    "Idefics2ForConditionalGeneration": "idefics2",
    "AyaVisionForConditionalGeneration": "aya_vision",
    "Ovis2ForConditionalGeneration": "ovis2",
    "Glm4vForConditionalGeneration": "glm4v",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Lfm2VlForConditionalGeneration": "lfm2_vl",
    "DeepseekVLForConditionalGeneration": "deepseek_vl",
    "Gemma4ForConditionalGeneration": "gemma4",
    "QwenVLForConditionalGeneration": "qwen_vl",
    "InternLMXComposer2ForConditionalGeneration": "internlm_xcomposer2",
}

# Class name of a remote-code checkpoint -> folder whose converter rewrites it once
CONVERTED_MODELS = {
    "QWenLMHeadModel": "qwen_vl",
    "InternLMXComposer2ForCausalLM": "internlm_xcomposer2",
}

# Classes of which transformers says `_supports_flash_attn`
FLASH_ATTN_MODELS = [
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "InstructBlipForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Ovis2ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "QwenVLForConditionalGeneration",
    "InternLMXComposer2ForConditionalGeneration",
]


def base_model_path(model_name_or_path: str) -> str:
    """The checkpoint itself or, for a LoRA adapter folder, the base that its adapter_config.json names."""
    adapter = Path(model_name_or_path) / "adapter_config.json"
    if not adapter.is_file():
        return model_name_or_path
    base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"{adapter} names no base_model_name_or_path: add the checkpoint that the adapter was trained on."
        )
    return base


def architecture_of(model_name_or_path: str) -> str:
    """The class name in the checkpoint's config.json.

    Raises:
        InputError: the folder or hub id has no config.json, or the config names no architecture.
    """
    path = base_model_path(model_name_or_path)
    try:
        config_file = cached_file(path, "config.json")
    except OSError as error:
        raise InputError(
            f"{path} is neither a checkpoint folder with a config.json nor a model that the hub can give: {error}"
        ) from error
    try:
        architectures = json.loads(Path(config_file).read_text()).get("architectures") or []
    except json.JSONDecodeError as error:
        raise InputError(
            f"{config_file} is not valid JSON (line {error.lineno}, column {error.colno}): download it again."
        ) from error
    if len(architectures) != 1:
        raise InputError(f"{config_file} must name one class under `architectures`, not {architectures}.")
    return architectures[0]


def core_mapper_for(model_name_or_path: str) -> ModelCoreMapper:
    """The adapter of a checkpoint: a full checkpoint or a LoRA adapter folder, a local path or a hub id.

    Raises:
        InputError: no adapter serves the checkpoint's architecture.
    """
    architecture = architecture_of(model_name_or_path)
    if architecture in CONVERTED_MODELS:
        raise InputError(
            f"{model_name_or_path} is a {architecture} in the original remote-code layout: convert it once with "
            f"`python -m models.{CONVERTED_MODELS[architecture]}.convert {model_name_or_path} OUT` and pass OUT."
        )
    if architecture not in MODEL_NICKNAME_MAP:
        raise InputError(
            f"{model_name_or_path} is a {architecture}, which no folder of models/ serves. Known are "
            f"{', '.join(sorted(MODEL_NICKNAME_MAP))}. docs/CustomizedModel.md shows how to add one."
        )
    return importlib.import_module(f"models.{MODEL_NICKNAME_MAP[architecture]}").core_mapper


def load_model(
    model_name_or_path: str,
    *,
    dtype: torch.dtype | str = "auto",
    use_flash_attention_2: bool = False,
    bits: int | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> torch.nn.Module:
    """Load a checkpoint, or a LoRA adapter on its base, as its adapter's class. Every weight must be found.

    Args:
        bits: 4 (NF4 with double quantisation) or 8 quantise the language model, not vision tower, projector or lm_head.
        is_trainable: an adapter's weights require gradients.
        kwargs: go to from_pretrained.

    Raises:
        InputError: weights are missing, unexpected or of another shape, or flash attention cannot be had.
    """
    path = base_model_path(model_name_or_path)
    model_class = core_mapper_for(path).model
    if use_flash_attention_2:
        kwargs["attn_implementation"] = _flash_attention(path)
    if bits is not None:
        kwargs["quantization_config"] = _quantisation(model_class, path, bits, dtype)
    # ZeRO-3 draws all weights before it reads them. Adapters and heads, which are drawn next, must not depend on that.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        model, info = model_class.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    wrong = {
        name: sorted(map(str, info.get(name) or ())) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        listed = "; ".join(
            f"{name.replace('_', ' ')} {', '.join(keys[:5])}" + ", ..." * (len(keys) > 5)
            for name, keys in wrong.items()
            if keys
        )
        raise InputError(
            f"The weights of {path} do not fit {model_class.__name__}: {listed}. Save the checkpoint anew."
        )
    if is_deepspeed_zero3_enabled():
        # transformers keeps all renamings of a class here, not only those that this checkpoint's names needed, and saves wrong names with them.
        model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or [] if c.was_used()]
    if bits is not None:
        keep_quantised_linears_trainable(model)
    if path != model_name_or_path:
        if bits is not None and is_trainable:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = PeftModel.from_pretrained(model, model_name_or_path, is_trainable=is_trainable)
    return model


def load_for_training(model_args: Any, lora_args: Any, training_args: Any) -> torch.nn.Module:
    """Load the policy as the flags of args.py say, freeze its vision tower, add LoRA."""
    if model_args.merge_first:
        model_args.model_name_or_path = _merged_base(model_args, training_args)
    dtype = getattr(torch, model_args.torch_dtype, None)
    if dtype is None:  # auto: a frozen base may be bf16, trained weights keep float32 masters under autocast
        dtype = torch.bfloat16 if training_args.bf16 and lora_args.use_lora else torch.float32
    if training_args.share_prefix and not core_mapper_for(model_args.model_name_or_path).model.packs:
        logging.getLogger(__name__).warning(
            "Layers of this model would mix a row's responses: --share_prefix is switched off."
        )
        training_args.share_prefix = False
    flash = model_args.use_flash_attention_2
    if flash and training_args.share_prefix:
        logging.getLogger(__name__).warning(
            "Packed rows need a 4-D mask: using sdpa. --share_prefix False uses FlashAttention-2."
        )
        flash = False
    model = load_model(
        model_args.model_name_or_path,
        dtype=dtype,
        use_flash_attention_2=flash,
        bits=model_args.bits if model_args.q_lora else None,
        is_trainable=True,
    )
    if model_args.freeze_vision_tower:
        (model.get_base_model() if isinstance(model, PeftModel) else model).freeze_vision_tower()
    if lora_args.use_lora and not isinstance(model, PeftModel):
        model = add_lora(model, lora_args, gradient_checkpointing=training_args.gradient_checkpointing)
    use_fast_lora(model)
    return model


def _merged_base(model_args: Any, training_args: Any) -> str:
    """For --merge_first: the folder `merged_base` of the run, a plain checkpoint. What is trained next names it as its base."""
    from models.merging import bits_of, merge_to  # merging imports this module

    adapter, merged = model_args.model_name_or_path, Path(training_args.output_dir) / "merged_base"
    if adapter == str(merged):  # done for the policy; now the reference is loaded
        return adapter
    base = base_model_path(adapter)
    if base == adapter:
        raise InputError(f"--merge_first needs a LoRA adapter, and {adapter} has no adapter_config.json: leave it out.")
    with training_args.main_process_first(local=training_args.save_on_each_node, desc="merging the adapter"):
        first = training_args.local_process_index if training_args.save_on_each_node else training_args.process_index
        if first == 0 and not (training_args.resume_from_checkpoint and merged.is_dir()):
            shutil.rmtree(merged, ignore_errors=True)
            with one_process_loads():
                merge_to(base, adapter, merged, bits_of(adapter))
    return str(merged)


@contextlib.contextmanager
def one_process_loads() -> Iterator[None]:
    """Load whole models, on one process alone: under ZeRO-3 from_pretrained would share them out and wait for the others."""
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config() and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def reference_for(
    model: torch.nn.Module, model_args: Any, lora_args: Any, training_args: Any
) -> torch.nn.Module | None:
    """The frozen reference of a policy from `load_for_training`, before its first step.

    All weights train: a second copy of the checkpoint. A fresh LoRA adapter: None, the base itself is the reference. A loaded adapter that
    training continues: None, and a frozen copy of it inside the policy, under the name "ref". With `--precompute_ref_log_probs` no copy: the
    policy answers before its first step. Only ZeRO-3, which cannot run a model before its optimizer exists, needs one for that.
    """
    if getattr(training_args, "precompute_ref_log_probs", False):
        if is_deepspeed_zero3_enabled():
            reference = load_for_training(model_args, lora_args, training_args)
            fresh = base_model_path(model_args.model_name_or_path) == model_args.model_name_or_path
            # Its fresh adapter says nothing yet, but would give every seed log-probs of its own in the cache.
            return reference.unload() if fresh and isinstance(reference, PeftModel) else reference
        if not isinstance(model, PeftModel):
            return None
    if not isinstance(model, PeftModel):
        return load_for_training(model_args, lora_args, training_args)
    if base_model_path(model_args.model_name_or_path) != model_args.model_name_or_path:
        model.load_adapter(model_args.model_name_or_path, adapter_name="ref", is_trainable=False)
        model.set_adapter("default")
    return None


def add_lora(model: torch.nn.Module, lora_args: Any, gradient_checkpointing: bool = False) -> PeftModel:
    """Wrap a model with a fresh LoRA adapter. Named targets are looked up in the language model only; a regular expression is taken as it is.

    Raises:
        InputError: a target names no linear layer of the language model.
    """
    targets = lora_args.lora_target_modules
    try:
        regex = (
            targets[0]
            if len(targets) == 1 and re.search(r"[*^$()\[\]|\\]", targets[0])
            else model.lora_target_regex(None if targets == ["auto"] else targets)
        )
    except ValueError as error:
        raise InputError(f"--lora_target_modules: {error}") from error
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return get_peft_model(
        model,
        LoraConfig(
            r=lora_args.lora_r,
            lora_alpha=lora_args.lora_alpha,
            lora_dropout=lora_args.lora_dropout,
            target_modules=regex,
            bias=lora_args.lora_bias,
            modules_to_save=lora_args.modules_to_save,
            task_type="CAUSAL_LM",
        ),
    )


def _flash_attention(path: str) -> str:
    from transformers.utils import is_flash_attn_2_available

    architecture = architecture_of(path)
    if architecture not in FLASH_ATTN_MODELS:
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


# Not transformers' own: importing their folders registers them with its Auto classes.
for _folder in CONVERTED_MODELS.values():
    importlib.import_module(f"models.{_folder}")
