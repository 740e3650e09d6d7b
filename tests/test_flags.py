"""Every flag of the four scripts, transformers' own included: it works, or it is refused with one sentence."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import args
import losses
from args.contradictions import refuse_contradictions
from args.dpo import with_loss_flags
from args.training import REFUSED
from common.errors import InputError
from tests.processes import history

CONFIGS = {"sft": args.SFTConfig, "dpo": args.DPOConfig, "rm": args.RMConfig, "ppo": args.PPOConfig}
OWN = {"sft": args.SFTConfig, "dpo": with_loss_flags(args.DPOConfig), "rm": args.RMConfig, "ppo": args.PPOConfig}
OTHERS = (args.ModelArguments, args.DataArguments, args.LoraArguments)

# transformers' flags that no test of this project gives a value: who reads them. Nothing of ours stands between.
READ_BY = {
    "the scripts, see test_evaluation_alone": "do_train do_eval",
    "Trainer's optimizer and schedule": """lr_scheduler_kwargs optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
        optim_target_modules""",
    "Trainer's loop": """num_train_epochs tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
        liger_kernel_config torch_empty_cache_steps auto_find_batch_size ignore_data_skip full_determinism data_seed
        fp16 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs neftune_noise_alpha""",
    "Trainer's log and its reporters": """logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter
        include_num_input_tokens_seen log_level log_level_replica run_name project trackio_space_id trackio_bucket_id
        trackio_static_space_id debug skip_memory_metrics report_to""",
    "Trainer's evaluation and saving": """eval_delay eval_on_start save_only_model save_on_each_node greater_is_better
        metric_for_best_model load_best_model_at_end restore_callback_states_from_checkpoint""",
    "the hub": """push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "accelerate and PyTorch's data loader": """accelerator_config dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order length_column_name""",
    "DDP and the launcher": """ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
        local_rank""",
}
# Values that are refused, where the default's type does not say one
OTHER_VALUES = {
    "label_smoothing_factor": "0.5",
    "average_tokens_across_devices": "False",
    "eval_do_concat_batches": "False",
    "eval_accumulation_steps": "2",
    "include_for_metrics": "loss",
    "label_names": "labels",
    "fsdp": "full_shard,auto_wrap",
    "fsdp_config": "{}",
    "neftune_noise_alpha": "5",
    "per_device_eval_batch_size": "3",
    "train_sampling_strategy": "sequential",
    "data_seed": "3",
    "num_sample_generations": "3",
    "torch_empty_cache_steps": "2",
    "include_num_input_tokens_seen": "True",
}
NOT_ON_THE_COMMAND_LINE = {"parallelism_config"}  # an object of Python


def words_of_tests() -> str:
    here = Path(__file__)
    return " ".join(p.read_text() for p in here.parent.rglob("*.py") if p != here)


def test_every_flag_of_transformers_has_a_line():
    """A new version of transformers that adds a flag fails here."""
    text = words_of_tests()
    listed = {name: reader for reader, names in READ_BY.items() for name in names.split()}
    refused = set(REFUSED)
    for field in dataclasses.fields(TrainingArguments):
        places = [field.name in refused, field.name in listed, f"--{field.name} " in text or f"{field.name}=" in text]
        assert any(places), f"{field.name}: a test, a refusal or a reader"
        assert not (field.name in refused and field.name in listed), field.name
    assert listed.keys() <= {f.name for f in dataclasses.fields(TrainingArguments)}


def test_every_flag_of_ours_is_in_a_test():
    text = words_of_tests() + Path(__file__).read_text()
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    for kind in (*OTHERS, *OWN.values()):
        for field in dataclasses.fields(kind):
            known = field.name in inherited or field.name in losses.flags()  # tests/test_losses.py
            assert known or field.name in text, f"{kind.__name__}.{field.name}"


def parse(script: str, folder: Path, flags: str) -> tuple:
    common = f"--model_name_or_path m --dataset_name d --output_dir {folder} --save_strategy no"
    if script == "ppo":
        common += " --reward_fn f.py:g"
    return args.parse(*OTHERS, CONFIGS[script], argv=f"{common} {flags}".split())


REFUSALS = [
    (script, name)
    for script, config in CONFIGS.items()
    for name in config.refused
    if name not in NOT_ON_THE_COMMAND_LINE
]


@pytest.mark.parametrize(("script", "name"), REFUSALS)
def test_refused_with_its_sentence(tmp_path, script: str, name: str):
    with pytest.raises(InputError, match=f"^--{name} [a-zA-Z].*[a-z.]$"):
        parse(script, tmp_path, f"--{name} {OTHER_VALUES.get(name, 'True')}")


@pytest.mark.parametrize("script", CONFIGS)
def test_nothing_is_refused_by_default(tmp_path, script: str):
    parse(script, tmp_path, "")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--do_eval True", "--do_eval True evaluates alone"),
        ("--do_train False --deepspeed ds_configs/zero2.json", "without DeepSpeed"),
    ],
)
def test_flags_of_evaluation_that_contradict(tmp_path, flags: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        parse("sft", tmp_path, flags)


@pytest.mark.parametrize("script", CONFIGS)
def test_evaluation_alone(command, rewards, tmp_path, script: str):
    """Of a checkpoint, it gives what the run that wrote the checkpoint found; weights are not written."""
    main = importlib.import_module(f"train_{script}").main
    flags = "--use_lora True --lora_r 4 --eval_ratio 0.25"
    if script == "ppo":
        flags += f" --reward_fn {rewards} --response_length 4"
    run = tmp_path / "run"
    main(command(script, f"{flags} --eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2", out=run))
    alone = tmp_path / "alone"
    main(command(script, f"{flags} --do_train False --resume_from_checkpoint {run / 'checkpoint-2'}", out=alone))
    expected = next(e for e in history(run) if any(name.startswith("eval_") for name in e))
    found = json.loads((alone / "eval_results.json").read_text())
    names = [name for name in expected if name.startswith("eval_")]
    assert names and {name: found[name] for name in names} == pytest.approx({n: expected[n] for n in names}, abs=1e-6)
    assert not list(alone.glob("*.safetensors"))
    with pytest.raises(InputError, match="--eval_ratio or --eval_data_path"):
        main(command(script, flags.replace("--eval_ratio 0.25", "--do_train False"), out=tmp_path / "none"))


@pytest.mark.parametrize("flag", ["--q_lora True", "--use_dora True", "--init_lora_weights eva"])
def test_what_needs_whole_weights_is_refused_under_zero3(command, flag: str):
    """As parse would do under a launcher, which has to be there for DeepSpeed's configuration to be read."""
    argv = command("dpo", f"--use_lora True {flag}")
    *others, training = args.parse(*OTHERS, args.DPOConfig, argv=argv)
    training.hf_deepspeed_config = HfDeepSpeedConfig("ds_configs/zero2.json")
    refuse_contradictions([*others, training])
    training.hf_deepspeed_config = HfDeepSpeedConfig("ds_configs/zero3.json")
    with pytest.raises(InputError, match=f"{flag.removesuffix(' True')} .*ZeRO-3.*take ZeRO-2, or DDP"):
        refuse_contradictions([*others, training])
    unset_hf_deepspeed_config()


def test_online_dpo_under_fsdp_is_refused(command, rewards: str):
    """As parse would do where torchrun has started several processes."""
    argv = command("dpo", f"--use_lora True --online True --reward_fn {rewards} --response_length 4")
    *others, training = args.parse(*OTHERS, args.DPOConfig, argv=argv)
    training.fsdp = "full_shard auto_wrap"
    with pytest.raises(InputError, match=r"--fsdp is not supported in online DPO.*take DDP or ZeRO-3"):
        refuse_contradictions([*others, training])
