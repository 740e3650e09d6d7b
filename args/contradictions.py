"""Flags that would silently do nothing, or something else, beside others."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from args.dpo import DPOConfig
from args.model import CHANGE_BASE, LoraArguments
from args.ppo import PPOConfig
from args.sft import SFTConfig
from args.training import VLConfig
from common.errors import InputError


def refuse_contradictions(parsed: Sequence[Any]) -> None:
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
    _refuse_flags_of_other_rows(parsed, flags)
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
    if flags.get("init_lora_weights") == "eva":
        raise InputError(
            "--init_lora_weights eva runs the model before DeepSpeed starts, which ZeRO-3 does not allow: take ZeRO-2, or DDP."
        )


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
    if init == "eva" and flags.get("streaming"):
        raise InputError(
            "--init_lora_weights eva reads rows in random order, which --streaming does not have: leave it out."
        )
    if init == "eva" and flags.get("fsdp"):
        raise InputError(
            "--init_lora_weights eva runs the whole model first, which --fsdp shares out: train with DDP or ZeRO-2."
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
    if flags.get("rollout_url"):
        for name in ("use_dora", "modules_to_save"):
            if flags.get(name):
                raise InputError(f"--{name} makes an adapter that vLLM does not serve: leave it or --rollout_url out.")
        if flags.get("init_lora_weights") == "loftq":
            raise InputError(
                "--init_lora_weights loftq belongs to a rounded base, and the server has another one: leave it or --rollout_url out."
            )
    if flags.get("lora_bias") not in (None, "none"):
        raise InputError(
            f"--lora_bias must be none in {where}: trained biases belong to the base, which the reference and the rewards share."
        )
    if flags.get("init_lora_weights") == "eva":
        raise InputError(f"--init_lora_weights eva reads answers in the data; in {where} there are none: take another.")
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


def _refuse_flags_of_other_rows(parsed: Sequence[Any], flags: dict[str, Any]) -> None:
    """Flags that choose pairs, where rows have none, and turns, where the loss covers answers."""
    trains, sft, ppo = (any(isinstance(p, kind) for p in parsed) for kind in (VLConfig, SFTConfig, PPOConfig))
    if trains and not sft and flags.get("train_on", "all") != "all":
        raise InputError("--train_on chooses turns of conversations, which train_sft.py alone trains on: leave it out.")
    for name, default in (("pairs", "all"), ("score_margin", None)):
        if (sft or ppo) and flags.get(name, default) != default:
            raise InputError(
                f"--{name} chooses pairs of answers, which {'conversations' if sft else 'prompts'} do not have: leave it out."
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
