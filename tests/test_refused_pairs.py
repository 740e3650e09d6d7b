"""Flags that transformers, accelerate, peft, torch or a missing package refuse: one sentence, before anything is loaded.

The rows follow what the pinned versions check: TrainingArguments.__post_init__ and _validate_args, Trainer.__init__ and
create_accelerator_and_postprocess, trainer_optimizer.py, optimization.py, AcceleratorConfig, LoraConfig and the LoRA
layers' inits, torch.utils.checkpoint. What they find out later than that is looked for here before the model is loaded.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

import args
import train_ppo
import train_sft
from args import training as training_flags
from args.training import PROJECT_VARIABLES
from common.errors import InputError
from tests.processes import history
from tests.test_flags import OTHERS, parse

NEEDED = "--model_name_or_path m --dataset_name d"
BEST = "--load_best_model_at_end True"
PAIRS = {
    # -- TrainingArguments
    "sft --eval_strategy steps --logging_steps 0": "non-zero --logging_steps|requires either non-zero",
    "sft --logging_steps 0": "requires non-zero --logging_steps",
    "sft --logging_steps 1.5": "--logging_steps must be an integer if bigger than 1",
    "sft --eval_strategy steps --eval_steps 2.5": "--eval_steps must be an integer if bigger than 1",
    "sft --save_strategy steps --save_steps 2.5": "--save_steps must be an integer if bigger than 1",
    f"sft {BEST} --save_strategy steps": "with --save_strategy steps write --eval_strategy steps, not no",
    f"dpo {BEST} --save_strategy steps --eval_strategy epoch": "write --eval_strategy steps, not epoch",
    f"rm {BEST} --save_strategy steps --save_steps 4 --eval_strategy steps --eval_steps 3": "round multiple",
    f"rm {BEST} --save_strategy steps --save_steps 4 --eval_strategy steps --eval_steps .1": "mixing ratio and absolute",
    f"rm {BEST} --save_strategy steps --save_steps .4 --eval_strategy steps --eval_steps .3": "not a multiple of 0.3",
    "sft --save_strategy best": "add --eval_strategy steps or epoch",
    "sft --fp16 True --bf16 True": "At most one of fp16 and bf16",
    "sft --lr_scheduler_type reduce_lr_on_plateau": "requires an eval strategy",
    "sft --lr_scheduler_type greedy": "requires an eval strategy",
    "sft --dataloader_prefetch_factor 2": "--dataloader_num_workers > 0",
    "sft --torch_empty_cache_steps 0": "--torch_empty_cache_steps is 1 or more",
    "sft --warmup_steps -1": "--warmup_steps is 0 or more",
    "sft --debug nonsense": "invalid DebugOption",
    "sft --hub_strategy nonsense": "--hub_strategy.*invalid choice",
    "sft --lr_scheduler_kwargs {bad": "transformers refuses these flags: Expecting property name",
    # -- accelerate
    "sft --accelerator_config nowhere.json": "No such file or directory: 'nowhere.json'",
    'sft --accelerator_config {"foo":1}': "unexpected keyword argument 'foo'",
    'sft --accelerator_config {"gradient_accumulation_kwargs":{"num_steps":2}}': "write --gradient_accumulation_steps",
    "sft --deepspeed ds_configs/zero2.json": "--deepspeed needs a launcher",
    "sft --deepspeed nowhere.json": "nowhere.json cannot be read",
    # -- Trainer's optimizer and schedule
    "sft --optim galore_adamw": "--optim galore_adamw cannot be had.*galore_torch",
    "dpo --optim galore_adamw --optim_target_modules attn": "galore_torch",
    "sft --optim lomo": "lomo",
    "ppo --optim schedule_free_adamw": "pip install schedulefree",
    "sft --optim adamw_torch_4bit": "torchao",
    "sft --optim apollo_adamw": "apollo",
    "sft --optim grokadamw": "pip install grokadamw",
    "sft --optim stable_adamw": "torch-optimi",
    "sft --optim adamw_anyprecision": "torchdistx",
    "sft --optim adamw_torch_xla": "torch_xla",
    "sft --optim adamw_torch_npu_fused": "torch_npu",
    "sft --optim_args foo": "--optim_args foo cannot be had",
    "sft --adam_beta1 2": "Invalid beta parameter",
    "sft --learning_rate -1": "--learning_rate is 0 or more",
    "sft --weight_decay -1": "--weight_decay is 0 or more",
    "sft --lr_scheduler_type cosine_with_min_lr": "One of min_lr or min_lr_rate should be set",
    'sft --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6,"min_lr_rate":0.1}': "Only one of",
    "sft --lr_scheduler_type warmup_stable_decay": "num_decay_steps",
    'sft --lr_scheduler_type cosine --lr_scheduler_kwargs {"foo":1}': "unexpected keyword argument 'foo'",
    'sft --lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":1}': "must be smaller than initial lr",
    # -- Trainer
    "sft --use_liger_kernel True": "pip install liger-kernel",
    "sft --torch_compile True --torch_compile_backend nonsense": "--torch_compile_backend nonsense is unknown",
    'sft --gradient_checkpointing True --gradient_checkpointing_kwargs {"foo":true}': "has foo, which torch does not",
    'dpo --use_lora True --gradient_checkpointing True --gradient_checkpointing_kwargs {"use_reentrant":true}': (
        "gives adapters no gradient"
    ),
    "sft --early_stopping_patience 2": "add --load_best_model_at_end True",
    f"sft --early_stopping_patience 0 {BEST} --eval_strategy epoch --save_strategy epoch": "counts evaluations, not 0",
    # -- numbers
    "sft --per_device_train_batch_size 0": "--per_device_train_batch_size is 1 or more",
    "sft --gradient_accumulation_steps 0": "--gradient_accumulation_steps is 1 or more",
    "sft --num_train_epochs -1": "--num_train_epochs is 0 or more",
    "sft --max_grad_norm -1": "--max_grad_norm is 0 or more",
    "sft --save_total_limit 0": "--save_total_limit is 1 or more",
    "sft --dataloader_num_workers -1": "--dataloader_num_workers is 0 or more",
    "sft --seed -3": "--seed is 0 or more",
    "sft --ddp_timeout -1": "--ddp_timeout is 1 or more",
    "sft --max_length 0": "--max_length is 1 or more",
    "sft --dataset_num_proc 0": "--dataset_num_proc is 1 or more",
    # -- peft
    "sft --use_lora True --lora_r 0": "--lora_r is 1 or more",
    "sft --use_lora True --lora_alpha 0": "--lora_alpha is 1 or more",
    "sft --use_lora True --lora_dropout 1": "--lora_dropout is a share from 0 to below 1",
    "sft --use_lora True --init_lora_weights nonsense": "nonsense is unknown: one of default, gaussian",
    "sft --use_lora True --init_lora_weights lora_ga": "lora_ga takes what it starts with out of the base",
    "sft --use_lora True --init_lora_weights eva --streaming True": "eva reads rows in random order",
    "ppo --use_lora True --init_lora_weights eva": "eva reads answers in the data",
    "sft --use_lora True --init_lora_weights loftq": "add --q_lora True --bits 4",
    "sft --use_lora True --q_lora True --bits 8 --init_lora_weights loftq": "add --q_lora True --bits 4",
    "sft --use_lora True --q_lora True --init_lora_weights pissa": "which --q_lora has rounded",
    "sft --use_lora True --use_dora True --init_lora_weights olora": "leave --init_lora_weights olora out",
    "sft --use_lora True --init_lora_weights orthogonal --lora_r 3": "needs an even --lora_r, not 3",
    "ppo --use_lora True --init_lora_weights pissa_niter_4": "rewards and value function share",
    "ppo --use_lora True --lora_vision True": "--lora_vision is not supported in PPO",
    "ppo --train_projector True": "--train_projector is not supported in PPO",
    "sft --use_dora True": "--use_dora needs --use_lora True",
    "sft --use_rslora": "--use_rslora needs --use_lora True",
    "sft --lora_vision": "--lora_vision needs --use_lora True",
    "sft --init_lora_weights pissa": "--init_lora_weights needs --use_lora True",
    "sft --loraplus_lr_ratio 4": "--loraplus_lr_ratio needs --use_lora True",
    "sft --use_lora True --loraplus_lr_ratio 0.5": "--loraplus_lr_ratio is 1 or more",
    "sft --vision_lr 0": "--vision_lr is above 0",
    "sft --projector_lr -1": "--projector_lr is above 0",
    "sft --use_lora True --freeze_language_model True": "leave --use_lora out",
    "sft --train_vision_layers 2 --freeze_vision_tower False": "trains whole",
    "sft --train_vision_layers 0": "counts layers",
    "sft --use_lora True --train_vision_layers 2": "add --lora_vision True",
    "sft --freeze_language_model True --train_projector False": "leave nothing to train",
    "sft --pairs adjacent": "chooses pairs of answers, which conversations do not have",
    "ppo --score_margin 2": "chooses pairs of answers, which prompts do not have",
    "rm --train_on last": "which train_sft.py alone trains on",
    # -- services
    "sft --report_to none --group_name g": "add --report_to wandb",
}
# Packages that somebody may have, with which the row says something else
PACKAGES = {
    "galore": "galore_torch",
    "lomo": "lomo_optim",
    "schedule": "schedulefree",
    "4bit": "torchao",
    "apollo": "apollo_torch",
}
PACKAGES |= {"grokadamw": "grokadamw", "stable": "optimi", "liger": "liger_kernel", "deepspeed ds": "mpi4py"}
PACKAGES |= {"xla": "torch_xla", "npu": "torch_npu", "anyprecision": "torchdistx"}


@pytest.mark.parametrize("line", PAIRS)
def test_one_sentence(tmp_path, line: str):
    if any(word in line and importlib.util.find_spec(package) for word, package in PACKAGES.items()):
        pytest.skip("the package is there")
    script, _, flags = line.partition(" ")
    with pytest.raises(InputError, match=PAIRS[line]) as error:
        parse(script, tmp_path, flags)
    said = str(error.value)
    assert "\n" not in said and len(said) < 2000


WORKS = [
    "--optim adafactor",
    "--optim adamw_8bit",
    "--optim sgd",
    '--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":2}',
    "--torch_compile True",
    f"{BEST} --eval_strategy steps --save_strategy steps --save_steps 1",
    '--gradient_checkpointing True --gradient_checkpointing_kwargs {"use_reentrant":true}',
]


@pytest.mark.parametrize("flags", WORKS)
def test_what_works_is_not_refused(tmp_path, flags: str):
    *_, config = args.parse(*OTHERS, args.SFTConfig, argv=f"{NEEDED} --output_dir {tmp_path} {flags}".split())
    assert config.output_dir == str(tmp_path)


def test_the_best_checkpoint_of_ppo_and_a_schedule_that_waits(command, rewards, tmp_path):
    """PPO's default metric: of the last evaluations the best one's weights stay, early stopping and plateau schedules look at it."""
    flags = f"--use_lora True --reward_fn {rewards} --response_length 4 --eval_ratio 0.25 --eval_strategy steps --eval_steps 1"
    flags += f" --save_strategy steps --save_steps 1 {BEST} --early_stopping_patience 1 --max_steps 4 --per_device_train_batch_size 4"
    train_ppo.main(command("ppo", f"{flags} --lr_scheduler_type reduce_lr_on_plateau"))
    state = json.loads((tmp_path / "ppo" / "trainer_state.json").read_text())
    scores = [entry["eval_objective/scores"] for entry in history(tmp_path / "ppo") if "eval_objective/scores" in entry]
    best = state["best_global_step"]
    assert state["best_metric"] == max(scores) == scores[best - 1]
    assert state["global_step"] == min(best + 1, 4), "one evaluation without a better one ends it"
    run = json.loads((tmp_path / "ppo" / "run.json").read_text())["arguments"]["PPOConfig"]
    assert run["metric_for_best_model"] == "eval_objective/scores" and run["greater_is_better"] is True


def test_an_unknown_metric_in_ppo(command, rewards):
    flags = f"--use_lora True --reward_fn {rewards} --response_length 4 --eval_ratio 0.25 --eval_strategy steps --eval_steps 1"
    flags += f" --save_strategy steps --save_steps 1 {BEST} --metric_for_best_model accuracy"
    with pytest.raises(
        InputError, match="accuracy is not what evaluation logs: choose from objective/kl, objective/scores"
    ):
        train_ppo.main(command("ppo", flags))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ("--lora_r 8", "it has --lora_r 4, this has 8"),
        ("--use_dora True", "it has --use_dora False, this has True"),
        ("--init_lora_weights pissa", "it has --init_lora_weights default, this has pissa"),
        ("--train_projector True", "it has --train_projector None, this has True"),
        ("--loraplus_lr_ratio 4", "it has --loraplus_lr_ratio None, this has 4"),
        ("--lora_vision True", "it has --lora_vision False, this has True"),
    ],
)
def test_another_kind_of_run_does_not_go_on(finished: Path, command, changed: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        train_sft.main(command("sft", f"{RUN} --resume_from_checkpoint True {changed}", out=finished))


RUN = "--use_lora True --lora_r 4 --save_strategy steps --save_steps 1 --max_steps 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llava, image_dir, conversations_json) -> Path:
    """A run of one step with a checkpoint."""
    out = tmp_path_factory.mktemp("finished")
    argv = f"--model_name_or_path {llava} --dataset_name vlquery_json --data_path {conversations_json} --image_root {image_dir} "
    argv += (
        f"--output_dir {out} --disable_tqdm True --per_device_train_batch_size 4 --learning_rate 1e-3 --seed 0 {RUN}"
    )
    train_sft.main(argv.split())
    return out


def test_tensorboard_has_a_folder_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(training_flags, "get_available_reporting_integrations", lambda: ["tensorboard"])
    for variable in (*PROJECT_VARIABLES, "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(variable, "")
    flags = "--report_to tensorboard --project_name p --run_name r"
    parse("sft", tmp_path, flags)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "runs" / "p" / "r")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/logs")
    parse("sft", tmp_path, flags)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/logs/p/r"
    with pytest.raises(InputError, match="--group_name has no part in tensorboard"):
        parse("sft", tmp_path, "--report_to tensorboard --group_name g")
