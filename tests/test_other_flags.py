"""Flags of other projects: taken in our words, or refused with what to write; VL-RLHF's own commands run."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

import args
from args.dpo import with_loss_flags
from common import other_flags
from common.dataclass_flags import DataclassParser
from common.errors import InputError
from models import core_mapper_for
from tests import zoo
from tests.processes import history

OTHERS = (args.ModelArguments, args.DataArguments, args.LoraArguments)
CONFIGS = {"sft": args.SFTConfig, "dpo": args.DPOConfig, "rm": args.RMConfig, "ppo": args.PPOConfig}


@pytest.fixture
def parsed(tmp_path: Path):
    """parsed("dpo", "--beta 1") -> all flags of the four classes by name."""

    def parse(script: str, line: str) -> dict:
        needed = f"--model_name_or_path m --output_dir {tmp_path / 'out'}"
        needed += " --reward_adapter r" * (script == "ppo") + " --dataset_name d" * ("--data_dir" not in line)
        classes = args.parse(*OTHERS, CONFIGS[script], argv=f"{needed} {line}".split())
        return {name: value for one in classes for name, value in vars(one).items()}

    return parse


TAKEN = {  # script, their flags, ours
    "warm-up": ("sft", "--warmup_ratio 0.1", {"warmup_steps": 0.1}),
    "a share of 0": ("sft", "--warmup_ratio 0", {"warmup_steps": 0}),
    "dashes": ("sft", "--warmup-ratio=0.1", {"warmup_steps": 0.1}),
    "evaluation": ("dpo", "--evaluation_strategy steps --eval_steps 9 --eval_ratio .1", {"eval_strategy": "steps"}),
    "lengths": ("rm", "--group_by_length True", {"train_sampling_strategy": "group_by_length"}),
    "no lengths": ("rm", "--group_by_length False", {"train_sampling_strategy": "random"}),
    "a switch alone": ("rm", "--group_by_length", {"train_sampling_strategy": "group_by_length"}),
    "None": ("sft", "--image_root None", {"image_root": None}),
    "commas": ("dpo", "--use_lora True --lora_target_modules a,b", {"lora_target_modules": ["a", "b"]}),
    "words": ("dpo", "--use_lora True --lora_target_modules a b", {"lora_target_modules": ["a", "b"]}),
    "twice: the last one counts": (
        "dpo",
        "--loss_type sigmoid --loss_type bco_pair,sft",
        {"loss_type": ["bco_pair", "sft"]},
    ),
    "numbers": ("dpo", "--loss_type sigmoid,ipo --loss_weights 1,.5", {"loss_weights": [1, 0.5]}),
    "a regular expression": (
        "dpo",
        r"--use_lora True --lora_target_modules .*\.(q|v)_proj{1,1}",
        {"lora_target_modules": [r".*\.(q|v)_proj{1,1}"]},
    ),
    "TRL's LoRA": (
        "dpo",
        "--use_peft --lora_modules_to_save lm_head",
        {"use_lora": True, "modules_to_save": ["lm_head"]},
    ),
    "TRL's 4 bits": ("sft", "--use_peft True --load_in_4bit True", {"q_lora": True}),
    "LLaMA-Factory's pictures and turns": (
        "sft",
        "--media_dir m --image_max_pixels 99 --mask_history True --disable_gradient_checkpointing False --disable_shuffling True",
        {
            "image_root": "m",
            "max_pixels": 99,
            "train_on": "last",
            "gradient_checkpointing": True,
            "train_sampling_strategy": "sequential",
        },
    ),
    "ms-swift's scales": (
        "sft",
        "--loss_scale last_round --dataset_shuffle false --truncation_strategy delete --init_weights eva --tuner_type lora",
        {"train_on": "last", "train_sampling_strategy": "sequential", "init_lora_weights": "eva", "use_lora": True},
    ),
    "TRL's answer length": ("dpo", "--max_completion_length 7", {"max_target_length": 7}),
    "the same in GRPO": ("ppo", "--max_completion_length 7", {"response_length": 7, "max_target_length": None}),
    "TRL's beta in GRPO": ("ppo", "--advantage_estimator grpo --beta .04 --num_generations 4", {"kl_in_loss": 0.04}),
    "LLaMA-Factory": (
        "dpo",
        "--finetuning_type lora --lora_rank 8 --lora_target all --cutoff_len 99 --pref_beta .2 --val_size .1 --template qwen2_vl",
        {
            "use_lora": True,
            "lora_r": 8,
            "lora_target_modules": ["all"],
            "max_length": 99,
            "beta": 0.2,
            "eval_ratio": 0.1,
        },
    ),
    "its bits": ("sft", "--finetuning_type lora --quantization_bit 8", {"q_lora": True, "bits": 8}),
    "ms-swift": (
        "sft",
        "--train_type lora --target_modules all-linear --split_dataset_ratio .2",
        {"use_lora": True, "lora_target_modules": ["all-linear"], "eval_ratio": 0.2},
    ),
    "its KTO": (
        "dpo",
        "--rlhf_type kto --desirable_weight 2 --undesirable_weight .5",
        {"loss_type": ["kto"], "desirable_weight": 2, "undesirable_weight": 0.5},
    ),
    "its CPO": ("dpo", "--rlhf_type cpo", {"loss_type": ["cpo", "sft"]}),
    "LLaMA-Factory's KTO": (
        "dpo",
        "--stage kto --kto_chosen_weight 2 --kto_rejected_weight .5 --pref_ftx 0",
        {"loss_type": ["kto"], "desirable_weight": 2, "undesirable_weight": 0.5},
    ),
    "its ORPO": ("dpo", "--pref_loss orpo --pref_beta .2", {"loss_type": ["sft", "orpo"], "beta": 0.2}),
    "its label smoothing": ("dpo", "--pref_loss sigmoid --dpo_label_smoothing .1", {"label_smoothing": 0.1}),
    "its tower": ("sft", "--freeze_vit false", {"freeze_vision_tower": False}),
    "its parts": (
        "sft",
        "--freeze_llm true --freeze_aligner false --aligner_lr 1e-4 --vit_lr 1e-5",
        {"freeze_language_model": True, "train_projector": True, "projector_lr": 1e-4, "vision_lr": 1e-5},
    ),
    "LLaVA's first stage": (
        "sft",
        "--tune_mm_mlp_adapter True --mm_projector_lr 1e-3",
        {"freeze_language_model": True, "projector_lr": 1e-3},
    ),
    "LLaMA-Factory's PiSSA": (
        "sft",
        "--finetuning_type lora --pissa_init True --freeze_multi_modal_projector False",
        {"init_lora_weights": "pissa", "train_projector": True},
    ),
    "VL-RLHF's PPO": (
        "ppo",
        "--batch_size 64 --mini_batch_size 2 --gradient_accumulation_steps 8 --ppo_epochs 3 --adap_kl_ctrl False --init_kl_coef .3 "
        "--horizon 5000 --max_new_tokens 512 --use_lora True --use_value_adapter False --log_with none --per_device_gamelog_size 2",
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_mini_batches": 4,
            "num_ppo_epochs": 3,
            "kl_coef": 0.3,
            "target_kl": None,
            "response_length": 512,
            "value_adapter": "shared",
        },
    ),
    "its moving coefficient": (
        "ppo",
        "--init_kl_coef .5 --horizon 4000 --batch_size 16 --mini_batch_size 2",
        {"kl_coef": 0.5, "target_kl": 6, "kl_horizon": 4000, "per_device_train_batch_size": 2, "num_mini_batches": 8},
    ),
    "its data": ("ppo", "--data_dir x.json", {"data_path": "x.json", "dataset_name": "vlquery_json"}),
    "its feedback": ("rm", "--data_dir x", {"data_path": "x", "dataset_name": "vlfeedback_paired"}),
    "evaluation without rows": ("rm", "--eval_strategy steps --eval_steps 9", {"eval_ratio": 0.005}),
}


# What these say is the default: that it is said is all there is to see.
NO_CHANGE = {"a share of 0", "no lengths", "None"}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(parsed, name: str):
    script, line, wanted = TAKEN[name]
    default = parsed(script, " ".join(re.findall(r"--advantage_estimator \w+|--use_lora True", line)))
    found = parsed(script, line)
    assert {flag: found[flag] for flag in wanted} == wanted
    assert name in NO_CHANGE or all(default[f] != v for f, v in wanted.items() if v is not None), "cannot fail"


REFUSED = {
    "GaLore's switch": ("sft", "--use_galore True", r"--use_galore True is unknown here: write --optim galore_adamw"),
    "cut-off rows": ("sft", "--truncation_strategy left", r"rows that are longer than --max_length are left out"),
    "dropout": ("dpo", "--disable_dropout False", r"--disable_dropout False has no counterpart here"),
    "a frame count": ("sft", "--video_maxlen 64", r"write --video_frames N"),
    "no share": ("sft", "--warmup_ratio 1.5", "write --warmup_steps"),
    "stage": ("sft", "--stage dpo", "the script says it"),
    "rlhf_type": ("dpo", "--rlhf_type grpo", "the script says it"),
    "SimPO's defaults": ("dpo", "--rlhf_type simpo", "write --loss_type simpo sft --beta 2 --simpo_gamma 1"),
    "two losses": ("dpo", "--loss_type ipo --pref_loss hinge", "--pref_loss and --loss_type both name a loss"),
    "weight of SFT": ("dpo", "--pref_ftx 0.5", "write --loss_type NAME sft --loss_weights 1 WEIGHT"),
    "KTO elsewhere": ("rm", "--rlhf_type kto", "loss_type"),
    "remote code": ("sft", "--trust_remote_code True", "True has no counterpart here, only False"),
    "adapter": ("sft", "--adapter_name_or_path a", "write --model_name_or_path ADAPTER"),
    "another script's": ("rm", "--pref_beta 1", "--pref_beta is --beta here, which this script does not have"),
    "freezing": ("sft", "--finetuning_type freeze", "only lora, full"),
    "quantisation": ("sft", "--use_peft True --quantization_bit 3", "3 has no counterpart here, only 4, 8"),
    "batch": ("ppo", "--batch_size 5 --mini_batch_size 2", "is not a multiple of --mini_batch_size"),
    "unknown": ("sft", "--no_such_flag 3", "no_such_flag"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(parsed, name: str):
    script, line, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence):
        parsed(script, line)


def test_what_is_taken_is_said(parsed, capsys):
    parsed("sft", "--warmup_ratio 0.1 --template llava --save_safetensors True")
    assert capsys.readouterr().err.splitlines() == [
        "--warmup_ratio 0.1 (older transformers) is --warmup_steps here.",
        "--template llava (LLaMA-Factory) does nothing here: prompts come from the checkpoint's own chat template.",
        "--save_safetensors True (older transformers) is how it is here.",
    ]


def test_tensorboard_folder(parsed, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    parsed("sft", "--logging_dir logs")
    assert other_flags.os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


def test_config_file(parsed, tmp_path: Path, monkeypatch):
    """Other names, lists and variables in YAML; the command line counts more, a list as a whole."""
    monkeypatch.setenv("VL_TEST", "")
    file = tmp_path / "c.yaml"
    lines = ["warmup_ratio: 0.1", "pref_beta: 0.3", "loss_type: [sigmoid, ipo]", "bf16: false", "run_name: null"]
    lines += [
        "lr_scheduler_type: cosine",
        "lr_scheduler_kwargs: {num_cycles: 2}",
        "env: {VL_TEST: 1}",
        "learning_rate: 1e-5",
    ]
    file.write_text("\n".join(lines))
    found = parsed("dpo", f"--config {file} --beta .4")
    assert (found["warmup_steps"], found["beta"], found["loss_type"]) == (0.1, 0.4, ["sigmoid", "ipo"])
    assert found["lr_scheduler_kwargs"] == {"num_cycles": 2} and found["learning_rate"] == 1e-5
    assert other_flags.os.environ["VL_TEST"] == "1"
    assert parsed("dpo", f"--loss_type hinge --config={file}")["loss_type"] == ["hinge"]
    file.write_text("a: [")
    with pytest.raises(InputError, match=r"c\.yaml cannot be read"):
        parsed("dpo", f"--config {file}")
    file.write_text("- a")
    with pytest.raises(InputError, match="flag: value lines"):
        parsed("dpo", f"--config {file}")


def test_every_target_exists():
    """No entry leads to a flag that none of the scripts has; none hides a flag of ours."""
    known = set()
    for config in CONFIGS.values():
        kinds = [*OTHERS, with_loss_flags(config) if config is args.DPOConfig else config]
        known |= {option.lstrip("-") for option in DataclassParser(kinds)._option_string_actions}
    for table in other_flags.OTHERS.values():
        for name, entry in table.items():
            targets = [entry] if isinstance(entry, str) else []
            if isinstance(entry, dict):
                ours = " ".join(flags for flags in entry.values() if isinstance(flags, str))
                targets = [word[2:] for word in ours.split() if word.startswith("--")]
            assert set(targets) <= known, name


def test_pages_name_every_flag():
    pages = "".join((Path("docs") / f"from_{name}.md").read_text() for name in ("vl_rlhf", "others"))
    for table in other_flags.OTHERS.values():
        for name in table:
            assert f"`--{name}`" in pages, name


@pytest.mark.parametrize("targets", ["all", "all-linear"])
def test_all_linear_layers(targets: str):
    model = core_mapper_for(zoo.checkpoint("llava")).model.from_pretrained(zoo.checkpoint("llava"))
    found = [name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_regex([targets]), name)]
    assert len(found) == 2 * 7 and all(
        "language_model" in name for name in found
    )  # 2 layers: q, k, v, o, gate, up, down


# The predecessor's 18 launch scripts as commands. PATHS stands for its names of checkpoints and data; what needs a GPU
# (--use_flash_attention_2 True, --tf32 True) or an account (--report_to wandb) is left out.
SCHEDULE = '--adam_beta1 0.9 --adam_epsilon 1e-6 --lr_scheduler_type "cosine" --gradient_checkpointing True --remove_unused_columns False'
LLM = "--freeze_vision_tower True --use_lora True --lora_dropout 0.05 --lora_bias none --dataset_num_proc 2"
LARGE = f"{LLM} --lora_r 128 --lora_alpha 256 --lora_target_modules auto --weight_decay 0.0 --warmup_ratio 0.03 --adam_beta2 0.98"
QWEN = "--use_lora True --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules c_attn,attn.c_proj,w1,w2 --lora_bias none"
QWEN_SLOW = f"{QWEN} --weight_decay 0.05 --warmup_ratio 0.1 --adam_beta2 0.98"
EVERY = "--eval_strategy steps --eval_steps 200 --save_strategy steps --logging_first_step False --logging_steps 10"
OLD = "--evaluation_strategy steps --eval_steps 200 --save_strategy epoch --save_total_limit 1 --logging_first_step True --logging_steps 5"
FEEDBACK = "--dataset_name vlfeedback_paired --data_path {feedback} --image_root None"
PAIRS = "--dataset_name plain_dpo --data_path {pairs} --image_root {images}"
TALK = "--dataset_name vlquery_json --data_path {talk} --image_root {images}"
LENGTHS = "--max_length 2048 --max_prompt_length 1024 --max_target_length 512"
PREFER = f"--per_device_eval_batch_size 2 {SCHEDULE} {LENGTHS} --beta 0.1"
COMMANDS = {
    "ddpo_instructblip": (
        "dpo",
        "instructblip",
        f"{PAIRS} {LARGE} {EVERY} {PREFER} --loss_type ddpo --score_margin -1",
    ),
    "ddpo_llava": (
        "dpo",
        "llava",
        f"{PAIRS} {LARGE} {EVERY} {PREFER} --loss_type ddpo --score_margin -1 --save_steps 50",
    ),
    "ddpo_qwenvl": (
        "dpo",
        "qwen_vl",
        f"{PAIRS} {QWEN_SLOW} {EVERY} {PREFER} --loss_type ddpo --data_ratio 1.0 --score_margin -1",
    ),
    "dpo_instructblip": ("dpo", "instructblip", f"{FEEDBACK} {LARGE} {EVERY} {PREFER} --score_margin 0"),
    "dpo_internlmxc2vl7b": (
        "dpo",
        "internlm_xcomposer2",
        f"{FEEDBACK} {LLM} --lora_r 64 --lora_alpha 64 --lora_target_modules auto --weight_decay 0.1 --warmup_ratio 0.01 "
        f"--adam_beta2 0.95 {EVERY} {PREFER} --score_margin 0 --save_total_limit 10",
    ),
    "dpo_llava": ("dpo", "llava", f"{FEEDBACK} {LARGE} {EVERY} {PREFER} --score_margin 0"),
    "dpo_llavanext": ("dpo", "llava_next", f"{FEEDBACK} {LARGE} {EVERY} {PREFER} --score_margin 0"),
    "dpo_qwenvl": ("dpo", "qwen_vl", f"--data_dir {{feedback}} {QWEN_SLOW} {OLD} {PREFER} --score_margin -1"),
    "kto_instructblip": (
        "dpo",
        "instructblip",
        f"{PAIRS} {LARGE} {EVERY} {PREFER} --loss_type kto_pair --score_margin -1",
    ),
    "kto_llava": ("dpo", "llava", f"{PAIRS} {LARGE} {EVERY} {PREFER} --loss_type kto_pair --score_margin -1"),
    "kto_llavanext": ("dpo", "llava_next", f"{PAIRS} {LARGE} {EVERY} {PREFER} --loss_type kto_pair --score_margin -1"),
    "kto_qwenvl": ("dpo", "qwen_vl", f"{PAIRS} {QWEN_SLOW} {EVERY} {PREFER} --loss_type kto_pair --score_margin -1"),
    "rm_qwenvl": (
        "rm",
        "qwen_vl",
        f"--data_dir {{feedback}} {QWEN_SLOW} {OLD} {SCHEDULE} --score_margin 0 --max_length 2048",
    ),
    "sft_instructblip": ("sft", "instructblip", f"{TALK} {LARGE} {EVERY} {SCHEDULE} --max_length 2048"),
    "sft_llava": ("sft", "llava", f"{TALK} {LARGE} {EVERY} {SCHEDULE} --max_length 2048"),
    "sft_llavanext": ("sft", "llava_next", f"{TALK} {LARGE} {EVERY} {SCHEDULE} --max_length 2048"),
    "sft_qwenvl": ("sft", "qwen_vl", f"{TALK} {QWEN_SLOW} {OLD} {SCHEDULE} --max_length 2048"),
    "ppo_qwenvl": (
        "ppo",
        "qwen_vl",
        f"--data_dir {{talk}} --image_root {{images}} {QWEN} --reward_adapter {{reward}} --use_value_adapter True --batch_size 8 "
        "--gradient_accumulation_steps 2 --learning_rate 5e-6 --gradient_checkpointing False --mini_batch_size 2 --ppo_epochs 4 "
        "--adap_kl_ctrl False --init_kl_coef 0.3 --horizon 5000 --max_new_tokens 6 --vf_coef 1 --v_head_initializer_range 0.1 "
        "--whiten_rewards True --log_with none --per_device_gamelog_size 2 --remove_unused_columns False",
    ),
}


@pytest.fixture(scope="module")
def paths(
    pairs_json: Path, conversations_json: Path, image_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict:
    """What the commands read: pairs, conversations, four rated answers a row, and a reward adapter."""
    folder = tmp_path_factory.mktemp("feedback")
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    rows = [
        {
            "image": shutil.copy(image_dir / f"{i}.png", folder),
            "prompt": f"What is in image {i}?",
            "completions": [
                {"response": f"answer {'very ' * k}good", "annotations": {a: {"Rating": str(5 - k)} for a in aspects}}
                for k in range(4)
            ],
        }
        for i in range(8)
    ]
    (folder / "feedback.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {
        "feedback": folder / "feedback.jsonl",
        "pairs": pairs_json,
        "talk": conversations_json,
        "images": image_dir,
    }
    reward = folder / "reward"
    importlib.import_module("train_rm").main(_words("rm_qwenvl", found, reward))
    return found | {"reward": reward}


def _words(name: str, paths: dict, out: Path) -> list[str]:
    script, family, line = COMMANDS[name]
    line = f"--model_name_or_path {zoo.checkpoint(family)} --output_dir {out} {line}".format(**paths).replace('"', "")
    line += " --max_steps 2 --save_strategy no --logging_steps 1 --disable_tqdm True --use_flash_attention_2 False"
    return line.split() + (["--per_device_train_batch_size", "2"] if script != "ppo" else [])


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_the_predecessor(name: str, paths: dict, tmp_path: Path):
    out = paths["reward"] if name == "rm_qwenvl" else tmp_path / "out"
    if name != "rm_qwenvl":
        importlib.import_module(f"train_{COMMANDS[name][0]}").main(_words(name, paths, out))
    steps = [entry for entry in history(out) if "loss" in entry]
    assert len(steps) == 2 and (out / "adapter_model.safetensors").is_file()
    if "c_attn" in COMMANDS[name][2]:
        targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        assert all(layer in targets for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"))
