"""Flags of VL-RLHF, TRL, LLaMA-Factory, ms-swift, LLaVA and older versions of transformers, in the words of this project.

`translate` runs before the parser. A flag with a meaning of its own here is not looked up: `--beta` stays `--beta`. What
means the same is taken, and said; what means something else is refused with the flag to use. docs/from_others.md has the
tables.
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from common.errors import InputError

Values = list[str]


class Ignored(NamedTuple):
    """A flag that needs nothing here, and why."""

    why: str


class Refused(NamedTuple):
    """A flag that means something else, or nothing, here; a sentence with what to write."""

    instead: str


class Variable(NamedTuple):
    """A flag that became an environment variable."""

    name: str


# One entry per flag: the new name; value -> flags (an empty text: that is how it is here) or a refusal; a note; or a refusal.
Entry = str | Mapping[str, str | Refused] | Ignored | Refused | Variable


def switch(on: str | None, off: str | None = "") -> dict[str, str | Refused]:
    """Both spellings of a flag that is on or off; None: that setting has no counterpart."""
    return {
        word: flags
        for words, flags in ((("True", "true"), on), (("False", "false"), off))
        if flags is not None
        for word in words
    }


FOUR_BITS, EIGHT_BITS = "--q_lora True --bits 4", "--q_lora True --bits 8"
FLASH = "--use_flash_attention_2 True"
ATTENTION = {"flash_attention_2": FLASH, "flash_attn": FLASH, "fa2": FLASH, "sdpa": "", "auto": ""}
LORA_OR_FULL = {"lora": "--use_lora True", "full": "--use_lora False"}
PROJECTOR_FROZEN = switch("--train_projector False", "--train_projector True")
BY_SCRIPT = Refused("the script says it: train_sft.py, train_rm.py, train_dpo.py or train_ppo.py")
SUM_WITH_SFT = Refused("write --loss_type NAME sft --loss_weights 1 WEIGHT")
NO_WEIGHT: dict[str, str | Refused] = {"0": "", "0.0": ""}
ZERO_HEAD = Ignored("a value head starts at zero; --init_value_from_reward True starts it as the reward's")
REWARD_FUNCTION = Refused("write --reward_fn file.py:name")
ONE_AUTOCAST = Ignored("torch's autocast is the only one")
SHUFFLED = switch("", "--train_sampling_strategy sequential")
SERVER = Refused("write --rollout_url URL of a server that runs")
REFERENCE = Refused("--model_name_or_path is the policy and the reference: start from that model")
SAMPLES = Ignored("every run writes samples of its answers")

OLDER_TRANSFORMERS: dict[str, Entry] = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a number below 1 is a share of all steps
    "no_cuda": "use_cpu",
    "group_by_length": switch("--train_sampling_strategy group_by_length"),
    "logging_dir": Variable("TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": switch("", None),
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "fp16_opt_level": ONE_AUTOCAST,
    "fp16_backend": ONE_AUTOCAST,
    "half_precision_backend": ONE_AUTOCAST,
}
VL_RLHF: dict[str, Entry] = {
    "data_dir": "data_path",
    "log_with": "report_to",
    "ppo_epochs": "num_ppo_epochs",
    "init_kl_coef": "kl_coef",
    "max_new_tokens": "response_length",
    "use_value_adapter": switch("--value_adapter separate", "--value_adapter shared"),
    "reward_adapter_name": Ignored("adapters are told apart by themselves"),
    "per_device_gamelog_size": Ignored("--num_sample_generations says how many tables of samples a run writes"),
    "v_head_init_strategy": ZERO_HEAD,
    "v_head_initializer_range": ZERO_HEAD,
    "ignore_bias_buffers": Ignored("no family here has such buffers"),
    "label_pad_token_id": {"-100": ""},
    "merge_peft_model": Refused("run merge_lora.py after training"),
}
TRL: dict[str, Entry] = {
    "use_peft": "use_lora",
    "load_in_4bit": switch(FOUR_BITS),
    "load_in_8bit": switch(EIGHT_BITS),
    "bnb_4bit_quant_type": {"nf4": ""},
    "use_bnb_nested_quant": switch("", None),
    "attn_implementation": ATTENTION,
    "dtype": "torch_dtype",
    "max_seq_length": "max_length",
    "max_completion_length": "max_target_length",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": {"CAUSAL_LM": ""},
    "reward_funcs": "reward_fn",
    "reward_model_path": "reward_model_name_or_path",
    "trust_remote_code": switch(None),
    "reference_free": switch(None),
    "ref_model_name_or_path": REFERENCE,
    "dataset_train_split": {"train": ""},
    "dataset_test_split": Refused("write --eval_data_path FILE or --eval_ratio SHARE"),
    "dataset_config": Refused("write --data_path with the file or folder of that configuration"),
    "use_vllm": switch(None),
    "packing_strategy": {"bfd": ""},
    "eval_packing": switch(None),
    "vllm_importance_sampling_cap": "rollout_importance_cap",
    "vllm_importance_sampling_clip_max": "rollout_importance_cap",
    "cpo_alpha": Refused("write --loss_type cpo sft --loss_weights 1 ALPHA"),
    "assistant_only_loss": switch("", None),
    "completion_only_loss": switch("", None),
    "disable_dropout": switch("", None),
    "sync_ref_model": switch(None),
    "activation_offloading": switch(None),
    "shuffle_dataset": SHUFFLED,
    "dataset_streaming": "streaming",
    "test_split_size": "eval_ratio",
    "dataset_text_field": Refused("rows are conversations, in one of the layouts of docs/data.md"),
    "model_revision": {"main": "", "": Refused("download that revision and give its folder as --model_name_or_path")},
    "pad_to_multiple_of": Ignored("rows of a batch lie end to end, without padding"),
    "log_completions": SAMPLES,
    "num_completions_to_print": SAMPLES,
    "vllm_mode": SERVER,
    "vllm_server_base_url": "rollout_url",
    "vllm_server_host": SERVER,
    "vllm_server_port": SERVER,
}
LLAMA_FACTORY: dict[str, Entry] = {
    "stage": {"kto": "--loss_type kto", "": BY_SCRIPT},
    "finetuning_type": LORA_OR_FULL,
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "additional_target": "modules_to_save",
    "cutoff_len": "max_length",
    "pref_beta": "beta",
    "pref_loss": {
        **{name: f"--loss_type {name}" for name in ("sigmoid", "hinge", "ipo", "kto_pair", "simpo")},
        "orpo": "--loss_type sft orpo",
    },
    "pref_ftx": NO_WEIGHT | {"": SUM_WITH_SFT},
    "pref_bco_weight": NO_WEIGHT | {"": Refused("write --loss_type sigmoid bco_pair --loss_weights 1 WEIGHT")},
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "ld_alpha": Refused("LD-DPO is not one of the losses of docs/losses.md"),
    "dataset": "dataset_name",
    "dataset_dir": "data_path",
    "template": Ignored("prompts come from the checkpoint's own chat template"),
    "val_size": "eval_ratio",
    "max_samples": Refused("write --data_ratio, a share of the rows"),
    "preprocessing_num_workers": "dataset_num_proc",
    "quantization_bit": {"4": FOUR_BITS, "8": EIGHT_BITS},
    "quantization_method": {"bnb": "", "bitsandbytes": ""},
    "flash_attn": ATTENTION,
    "adapter_name_or_path": Refused("write --model_name_or_path ADAPTER: its adapter_config.json names the base"),
    "reward_model": Refused("write --reward_adapter or --reward_model_name_or_path"),
    "reward_model_type": Refused("write --reward_adapter or --reward_model_name_or_path"),
    "create_new_adapter": Refused("write --merge_first True"),
    "neat_packing": switch("--packing True"),
    "plot_loss": Ignored("the numbers of a run lie in its trainer_state.json"),
    "overwrite_cache": Ignored("what is cached is compared with the files"),
    "freeze_multi_modal_projector": PROJECTOR_FROZEN,
    "pissa_init": switch("--init_lora_weights pissa"),
    "pissa_iter": Refused("write --init_lora_weights pissa_niter_N"),
    "pissa_convert": switch("", None),  # what is saved works on the base as it was
    "media_dir": "image_root",
    "train_on_prompt": switch(None),
    "mask_history": switch("--train_on last"),
    "image_max_pixels": "max_pixels",
    "image_min_pixels": "min_pixels",
    "video_maxlen": Refused("write --video_frames N, which takes N of every video, or --video_fps F"),
    "double_quantization": switch("", None),
    "quantization_type": {"nf4": ""},
    "disable_gradient_checkpointing": switch("--gradient_checkpointing False", "--gradient_checkpointing True"),
    "disable_shuffling": switch("--train_sampling_strategy sequential"),
    "early_stopping_steps": "early_stopping_patience",
    "use_fast_tokenizer": switch("", None),
    "low_cpu_mem_usage": switch("", None),
    "cache_dir": Refused("set the environment variable HF_HUB_CACHE"),
    "hf_hub_token": Refused("set the environment variable HF_TOKEN, or run `hf auth login`"),
    "mix_strategy": {"concat": ""},
    "ref_model": REFERENCE,
    "ppo_whiten_rewards": "whiten_rewards",
    "ppo_target": "target_kl",
    "use_galore": switch(None) | {"": Refused("write --optim galore_adamw --optim_target_modules NAMES")},
    "use_apollo": switch(None) | {"": Refused("write --optim apollo_adamw --optim_target_modules NAMES")},
    "use_badam": switch(None),
    "use_unsloth": switch(None),
    "use_muon": switch(None),
    "use_llama_pro": switch(None),
    "enable_liger_kernel": "use_liger_kernel",
    "use_swanlab": switch("--report_to swanlab"),
    "pure_bf16": switch(None),
    "shift_attn": switch(None),
}
MS_SWIFT: dict[str, Entry] = {
    "model": "model_name_or_path",
    "val_dataset": "eval_data_path",
    "split_dataset_ratio": "eval_ratio",
    "train_type": LORA_OR_FULL,
    "tuner_type": LORA_OR_FULL,
    "target_modules": "lora_target_modules",
    "freeze_vit": "freeze_vision_tower",
    "freeze_aligner": PROJECTOR_FROZEN,
    "freeze_llm": "freeze_language_model",
    "vit_lr": "vision_lr",
    "aligner_lr": "projector_lr",
    "lorap_lr_ratio": "loraplus_lr_ratio",
    "init_weights": {
        **switch("", None),
        **{
            name: f"--init_lora_weights {name}" for name in ("gaussian", "pissa", "olora", "loftq", "orthogonal", "eva")
        },
    },
    "early_stop_interval": "early_stopping_patience",
    "rlhf_type": {
        "kto": "--loss_type kto",
        "orpo": "--loss_type sft orpo",
        "cpo": "--loss_type cpo sft",
        "simpo": Refused("write --loss_type simpo sft --beta 2 --simpo_gamma 1, which are its defaults there"),
        "gkd": Refused("distillation is not one of the four scripts"),
        "": BY_SCRIPT,
    },
    "rpo_alpha": SUM_WITH_SFT,
    "attn_impl": ATTENTION,
    "quant_bits": {"4": FOUR_BITS, "8": EIGHT_BITS},
    "quant_method": {"bnb": ""},
    "reward_model_plugin": REWARD_FUNCTION,
    "external_plugins": REWARD_FUNCTION,
    "padding_free": Ignored("rows of a batch lie end to end, without padding"),
    "target_regex": "lora_target_modules",
    "dataset_shuffle": SHUFFLED,
    "model_type": Ignored("the checkpoint's config.json says it"),
    "use_hf": switch("", None),
    "lazy_tokenize": Ignored("pictures and texts are encoded batch by batch"),
    "load_from_cache_file": Ignored("what is cached is compared with the files"),
    "truncation_strategy": {"delete": "", "": Refused("rows that are longer than --max_length are left out")},
    "loss_scale": {"default": "", "last_round": "--train_on last"},
    "sequence_parallel_size": {"1": ""},
    "tuner_backend": {"peft": ""},
    "task_type": {"causal_lm": ""},
    "add_version": Ignored("a run lies in --output_dir itself"),
    "bnb_4bit_use_double_quant": switch("", None),
    "bnb_4bit_compute_dtype": Ignored("4-bit layers compute in --torch_dtype, or in bf16 with --bf16 True"),
    "system": Refused("write the system prompt into the rows, as a first message"),
    "freeze_parameters": Refused(
        "write --freeze_vision_tower, --freeze_language_model, --train_projector or --train_vision_layers"
    ),
}
# LLaVA, Qwen2-VL-Finetune and their kin
LLAVA: dict[str, Entry] = {
    "lora_enable": "use_lora",
    "lora_weight_path": Refused("write --model_name_or_path ADAPTER: its adapter_config.json names the base"),
    "mm_projector_lr": "projector_lr",
    "mm_vision_tower_lr": "vision_lr",
    "merger_lr": "projector_lr",
    "tune_mm_mlp_adapter": switch("--freeze_language_model True"),
    "freeze_mm_mlp_adapter": PROJECTOR_FROZEN,
    "freeze_merger": PROJECTOR_FROZEN,
    "freeze_backbone": "freeze_language_model",
    "unfreeze_mm_vision_tower": switch("--freeze_vision_tower False", "--freeze_vision_tower True"),
    "vision_lora": "lora_vision",
    "model_max_length": "max_length",
    "image_folder": "image_root",
}
OTHERS: dict[str, dict[str, Entry]] = {
    "VL-RLHF": VL_RLHF,
    "older transformers": OLDER_TRANSFORMERS,
    "TRL": TRL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "ms-swift": MS_SWIFT,
    "LLaVA": LLAVA,
}


def translate(argv: list[str], known: Collection[str], lists: Collection[str]) -> tuple[list[str], list[str]]:
    """The command line in this project's flags, and a sentence for each flag that had another name.

    Args:
        argv: a command line.
        known: flags of this script, without dashes. They are never translated.
        lists: those that take several values, as `a b` or `a,b`.

    Raises:
        InputError: a flag that means something else here, with what to write.
    """
    notes: list[str] = []
    flags = _split(argv)
    _add_dataset_name(flags, known, notes)
    if "value_adapter" in known:
        flags = _ppo_of_trl_0_8(flags, notes)
    taken: list[tuple[str, Values]] = []
    for name, values in flags:
        key = name.replace("-", "_")
        whose = next((whose for whose, table in OTHERS.items() if key in table), None)
        if key in known:
            taken += [(key, values)] if values != ["None"] else []
        elif whose is None:
            taken.append((name, values))
        else:
            new, note = _apply(key, values, OTHERS[whose][key], known)
            taken += new
            notes.append(f"--{' '.join([key, *values])} ({whose}) {note}.")
            if any(name == "loss_type" for name, _ in new) and any(name == "loss_type" for name, _ in flags):
                raise InputError(f"--{key} and --loss_type both name a loss: leave --{key} out.")
    return _join(taken, lists), notes


def without(argv: list[str], names: Collection[str]) -> list[str]:
    """The command line less these flags."""
    return _join([(name, values) for name, values in _split(argv) if name not in names], ())


def _apply(name: str, values: Values, entry: Entry, known: Collection[str]) -> tuple[list[tuple[str, Values]], str]:
    """Our flags for one of theirs, and the rest of a sentence about it."""
    value = " ".join(values) or "True"
    match entry:
        case Refused(instead):
            raise InputError(f"--{name} is unknown here: {instead}.")
        case Ignored(why):
            return [], f"does nothing here: {why}"
        case Variable(variable):
            os.environ[variable] = value
            return [], f"is the environment variable {variable} here"
        case str():
            if entry not in known:
                raise InputError(f"--{name} is --{entry} here, which this script does not have: leave it out.")
            if name == "warmup_ratio" and float(value) >= 1:
                raise InputError(f"--warmup_ratio {value} is not a share below 1: write --warmup_steps.")
            return [(entry, values)], f"is --{entry} here"
        case _:
            ours = entry.get(value, entry.get(""))  # "" stands for all other values
            if ours is None:
                raise InputError(f"--{name} {value} has no counterpart here, only {', '.join(entry)}.")
            if isinstance(ours, Refused):
                raise InputError(f"--{name} {value} is unknown here: {ours.instead}.")
            return _split(ours.split()), f"is {ours} here" if ours else "is how it is here"


def _add_dataset_name(flags: list[tuple[str, Values]], known: Collection[str], notes: list[str]) -> None:
    """VL-RLHF's scripts without --dataset_name read one format each."""
    names = {name for name, _ in flags}
    if "data_dir" in names and "dataset_name" not in names:
        name = "vlquery_json" if "value_adapter" in known else "vlfeedback_paired"
        flags.append(("dataset_name", [name]))
        notes.append(f"--data_dir (VL-RLHF) without --dataset_name: --dataset_name {name}.")


def _ppo_of_trl_0_8(flags: list[tuple[str, Values]], notes: list[str]) -> list[tuple[str, Values]]:
    """Batch sizes and KL controller of TRL 0.8's PPO, which VL-RLHF used, with its defaults.

    There an update has `batch_size` rollouts, in steps of `mini_batch_size` x `gradient_accumulation_steps`; here it has
    `per_device_train_batch_size` x `gradient_accumulation_steps` x `num_mini_batches`. There the KL coefficient moves unless
    `adap_kl_ctrl` is off; here it does with `target_kl`.
    """
    given = {name: values[0] for name, values in flags if len(values) == 1}
    old = ("batch_size", "mini_batch_size", "adap_kl_ctrl", "target", "horizon", "backward_batch_size")
    new: dict[str, str] = {}
    if "batch_size" in given or "mini_batch_size" in given:
        rollouts = int(given.get("batch_size", 128))
        micro = int(given.get("mini_batch_size", min(128, rollouts)))
        step = micro * int(given.get("gradient_accumulation_steps", 1))
        if rollouts % step:
            raise InputError(
                f"--batch_size {rollouts} is not a multiple of --mini_batch_size x --gradient_accumulation_steps = {step}: here an "
                "update has --per_device_train_batch_size x --gradient_accumulation_steps x --num_mini_batches rollouts per device."
            )
        new = {"per_device_train_batch_size": str(micro), "num_mini_batches": str(rollouts // step)}
    if not given.keys().isdisjoint(("init_kl_coef", "adap_kl_ctrl", "target", "horizon")):
        if given.get("adap_kl_ctrl", "True").lower() == "true":
            new |= {"target_kl": given.get("target", "6"), "kl_horizon": given.get("horizon", "10000")}
        elif "horizon" in given or "target" in given:
            notes.append("--horizon and --target (VL-RLHF) do nothing without --adap_kl_ctrl.")
    theirs = " ".join(f"--{name} {given[name]}" for name in old if name in given)
    if new:
        ours = " ".join(f"--{name} {value}" for name, value in new.items())
        notes.append(f"{theirs or '--init_kl_coef'} (VL-RLHF, TRL 0.8's PPO) is {ours} here.")
    return [(name, values) for name, values in flags if name not in old] + [(n, [v]) for n, v in new.items()]


def _split(argv: list[str]) -> list[tuple[str, Values]]:
    """(flag without dashes, its values) in their order; words before any flag come under ""."""
    flags: list[tuple[str, Values]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            flags.append(("", [word]))
    return flags


def _join(flags: list[tuple[str, Values]], lists: Collection[str]) -> list[str]:
    """Back to a command line; each value of a list in a word of its own."""
    words: list[str] = []
    for name, values in flags:
        words += [f"--{name}"] if name else []
        words += [v for value in values for v in _several(value)] if name in lists else values
    return words


def _several(value: str) -> list[str]:
    """The values of `a,b`. A regular expression, as --lora_target_modules takes one, may hold commas of its own."""
    return [value] if re.search(r"[(\[{\\]", value) else [part.strip() for part in value.split(",") if part.strip()]
