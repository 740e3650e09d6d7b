"""The scripts from the command line: real files in, checkpoints and run.json out, one sentence for wrong input."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import args
import train_dpo
import train_ppo
import train_rm
import train_sft
from base.loading import load_model
from common.errors import InputError
from models import core_mapper_for
from tests import zoo
from tests.test_distributed import free_port

ROOT = Path(__file__).parents[1]
SCRIPT = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo}
MAIN = {"sft": train_sft.main, "dpo": train_dpo.main}


def history(out: Path) -> list[dict]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("flags", ["", "--use_lora True", "--freeze_vision_tower False --gradient_checkpointing True"])
@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_script_trains_and_describes_its_run(command, tmp_path, llava, algorithm: str, flags: str):
    evaluation = "--eval_ratio 0.25 --eval_strategy steps --eval_steps 2 --log_image_sensitivity True"
    MAIN[algorithm](command(algorithm, f"{flags} {evaluation}"))
    out = tmp_path / algorithm
    steps = history(out)
    assert next(e["eval_image_sensitivity"] for e in steps if "eval_image_sensitivity" in e) > 1e-3
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2]
    assert any("eval_loss" in entry for entry in steps)
    run = json.loads((out / "run.json").read_text())
    assert run["seed"] == 0 and run["arguments"]["ModelArguments"]["model_name_or_path"] == llava
    assert run["versions"]["torch"] == torch.__version__ and run["argv"] == sys.argv


def test_the_load_plan_is_printed_and_kept(command, tmp_path, llava, capsys):
    train_dpo.main(command("dpo", "--use_lora True --fast_lora False --share_prefix False"))
    expected = {
        "checkpoint": llava,
        "base": llava,
        "dtype": "float32",
        "attention": "sdpa",
        "share_prefix": False,
        "fast_lora": False,
        "bits": None,
        "freeze_vision_tower": True,
    }
    plan = json.loads((tmp_path / "dpo" / "run.json").read_text())["plan"]
    assert {name: plan[name] for name in expected} == expected and set(plan) - set(expected) == {
        "date",
        "enable_thinking",
        "freeze_language_model",
        "max_pixels",
        "min_pixels",
        "train_projector",
        "train_vision_layers",
        "video_frames",
        "video_fps",
    }
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Loading") + 1
    assert [line.split() for line in lines[start : start + 8]] == [[n, str(v)] for n, v in expected.items()]


# Flags away from their defaults, those above all that decide how something is loaded, batched or scheduled
FAR_FROM_DEFAULT = {
    "sft": "--use_lora True --lora_r 4 --fast_lora False --train_on last --max_length 300 --eval_ratio 0.25 --eval_strategy steps "
    "--eval_steps 1 --log_image_sensitivity True --gradient_checkpointing True --train_sampling_strategy group_by_length",
    "rm": "--freeze_vision_tower False --share_prefix False --pairs adjacent --center_rewards_coefficient 0.01 --logging_steps 0.5 "
    "--eval_ratio 0.25 --warmup_steps 0.5 --max_target_length 3",
    "dpo": "--use_lora True --lora_bias all --loss_type sigmoid ipo --loss_weights 1 0.5 --precompute_ref_log_probs True "
    "--pairs best_worst --gradient_accumulation_steps 2 --dataloader_num_workers 1 --save_strategy steps --save_steps 0.5",
    "ppo": "--use_lora True --response_length 4 --rollouts_per_prompt 2 --num_ppo_epochs 2 --target_kl 1 --whiten_rewards True "
    "--init_value_from_reward False --value_adapter shared --total_episodes 8 --num_sample_generations 1",
}


@pytest.mark.parametrize("algorithm", FAR_FROM_DEFAULT)
def test_the_project_changes_no_argument_after_parse(command, tmp_path, rewards, monkeypatch, algorithm: str):
    script, parsed, before = SCRIPT[algorithm], [], []

    def values(flags: object) -> dict:
        return {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags)}

    def parse(*classes: type, argv: list[str]) -> tuple:
        parsed.extend(args.parse(*classes, argv=argv))
        before.extend(copy.deepcopy(values(flags)) for flags in parsed)
        return tuple(parsed)

    monkeypatch.setattr(script, "parse", parse)
    extra = {"ppo": f"--reward_fn {rewards}", "dpo": f"--ref_log_probs_dir {tmp_path / 'cache'}"}.get(algorithm, "")
    script.main(command(algorithm, f"{FAR_FROM_DEFAULT[algorithm]} {extra}"))
    assert len(parsed) == 4 and history(tmp_path / algorithm)[-1]["step"] == 2
    for flags, old in zip(parsed, before, strict=True):
        assert values(flags) == old  # transformers writes to none of them either


def test_saved_checkpoints_load_without_this_project(command, tmp_path, llava, image_dir):
    """Plain transformers and peft, in a process that cannot see the project, give the same logits."""
    train_sft.main(command("sft"))
    train_dpo.main(command("dpo", "--use_lora True"))
    inputs = core_mapper_for(llava).processor(llava)
    inputs.infer()
    batch = inputs(texts=["USER: <image>\nWhat is this? ASSISTANT:"], images=[[str(image_dir / "3.png")]])
    logits = {}
    for name in ("sft", "dpo"):
        with torch.no_grad():
            logits[name] = load_model(str(tmp_path / name), dtype=torch.float32).eval()(**batch).logits.tolist()
    (tmp_path / "expected.json").write_text(json.dumps(logits))
    script = tmp_path / "load.py"
    # works around a defect of the environment, like any script on such a machine
    compat = (
        (ROOT / "common" / "compat.py")
        .read_text()
        .split("def ")[0]
        .replace("from common.errors import InputError\n", "")
    )
    script.write_text(
        compat
        + f"""
import json, sys
assert not any("{ROOT}" == p for p in sys.path)
from PIL import Image
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
expected = json.load(open("expected.json"))
for name, base in (("sft", "sft"), ("dpo", r"{llava}")):
    model = AutoModelForImageTextToText.from_pretrained(base)
    assert model.config.architectures == ["LlavaForConditionalGeneration"]
    if name == "dpo":
        model = PeftModel.from_pretrained(model, name)
    processor = AutoProcessor.from_pretrained(name)
    batch = processor(text="USER: <image>\\nWhat is this? ASSISTANT:", images=Image.open(r"{image_dir}/3.png"), return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    assert (logits - torch.tensor(expected[name])).abs().max() < 1e-5, name
"""
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_lora_reaches_the_language_model_only(command, tmp_path):
    train_dpo.main(command("dpo", "--use_lora True"))
    weights = peft.load_peft_weights(str(tmp_path / "dpo"))
    assert weights and all("language_model" in name for name in weights)


def test_dpo_after_sft_lora_starts_from_that_adapter(command, tmp_path, llava):
    """An adapter folder continues: its initial state is the reference, so the first loss is ln 2 and rewards are 0."""
    train_sft.main(command("sft", "--use_lora True"))
    train_dpo.main(command("dpo", "--use_lora True", model=str(tmp_path / "sft")))
    first = history(tmp_path / "dpo")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["rewards/margins"] == 0
    assert first["logps/chosen"] != pytest.approx(0)
    assert json.loads((tmp_path / "dpo" / "adapter_config.json").read_text())["base_model_name_or_path"] == llava
    assert not (tmp_path / "dpo" / "ref").exists()


def test_config_file_and_the_command_line_wins(command, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 0.5\nbeta: 0.7\n")
    argv = command("dpo", f"--config {config}")
    train_dpo.main(argv)
    arguments = json.loads((tmp_path / "dpo" / "run.json").read_text())["arguments"]["DPOConfig"]
    assert arguments["beta"] == 0.7 and arguments["learning_rate"] == 1e-3


BAD_INPUT = {
    "noise of no step": ("--loss_type povid --diffusion_step 1000", r"--diffusion_step is a step from 0 to 999"),
    "columns that the collator reads": (
        "--remove_unused_columns True",
        r"--remove_unused_columns True would drop the images",
    ),
    "missing config file": ("--config nowhere.yaml", r"Config file nowhere\.yaml does not exist"),
    "unknown loss": ("--loss_type sigmoidd", r"sigmoidd.*sigmoid"),
    "quantised base without an adapter": ("--q_lora True", r"--use_lora True"),
    "tower that LoRA does not train": ("--use_lora True --freeze_vision_tower False", r"leave --freeze_vision_tower"),
    "LoRA flag without LoRA": ("--lora_r 8", r"--lora_r needs --use_lora True"),
    "LoRA layers without LoRA": ("--fast_lora False", r"--fast_lora needs --use_lora True"),
    "LoRA target that is not there": ("--use_lora True --lora_target_modules c_attn", r"c_attn.*choose from.*q_proj"),
    "weights for other losses": ("--loss_type sigmoid --loss_weights 1 2", r"loss_weights has 2 values for 1 losses"),
    "image sensitivity of nothing": ("--log_image_sensitivity True", r"add --eval_ratio or --eval_data_path"),
    "wandb names without wandb": ("--project_name p", r"add --report_to wandb"),
    "a wandb group without wandb": ("--group_name g", r"add --report_to wandb"),
    "flash attention where there is none": (
        "--use_flash_attention_2 True --share_prefix False",
        r"FlashAttention-2 is not available",
    ),
}


@pytest.mark.parametrize("flags, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_flags_are_one_sentence(command, flags: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        train_dpo.main(command("dpo", flags))
    assert "\n" not in str(error.value)


def _row(**changes) -> dict:
    return {"image": "0.png", "prompt": "What?", "chosen": "a cat", "rejected": "a dog"} | changes


BAD_FILES = {
    "no JSON": ('[{"image": "0.png",}]', r"line 1.*column"),
    "missing image": ([_row(image="gone.png")], r"gone\.png"),
    "marks and images differ": ([_row(prompt="<image> or <image>?")], r"(?i)image"),
    "empty response": ([_row(chosen=" ")], r"(?i)empty|chosen"),
    "missing column": ([{"image": "0.png", "prompt": "What?", "chosen": "a"}], r"rejected"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_sentence(command, tmp_path, content: str | list, message: str):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        train_dpo.main(command("dpo", f"--data_path {path}"))
    assert "bad.json" in str(error.value)


def test_unknown_architecture_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"GPT2LMHeadModel.*LlavaForConditionalGeneration.*docs/CustomizedModel\.md"):
        core_mapper_for(str(tmp_path))


def test_missing_and_unexpected_weights_are_refused(tmp_path):
    folder = zoo.build("llava", tmp_path / "broken")
    file = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    head = weights.pop("language_model.lm_head.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no lm_head\.weight"):
        load_model(str(folder))
    save_file(weights | {"language_model.lm_head.weight": head, "extra": head.clone()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected keys extra"):
        load_model(str(folder))


@pytest.mark.parametrize("algorithm", SCRIPT)
def test_help_names_every_flag(algorithm: str, capsys):
    with pytest.raises(SystemExit) as end:
        SCRIPT[algorithm].main(["--help"])
    assert end.value.code == 0 and "--share_prefix" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train_sft", "train_dpo"])
def test_wrong_input_ends_in_one_line_and_status_2(script: str):
    """A fresh process: imports work in any order, the sentence is all that is printed, nothing is downloaded."""
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--config", "nowhere.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{script}.py: Config file nowhere.yaml does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc_per_node", "2"],
        ["deepspeed", "--num_accelerators", "1"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers(command, tmp_path, launcher: list[str]):
    """Two ranks, or DeepSpeed, train as one process does on the same global batch."""
    ranks = 2 if launcher[0] == "torchrun" else 1
    flags = "--use_lora True --lora_dropout 0 --per_device_train_batch_size"
    train_dpo.main(command("dpo", f"{flags} 4", out=tmp_path / "one"))
    deepspeed = "--deepspeed ds_configs/zero2.json" if launcher[0] == "deepspeed" else ""
    argv = [
        *launcher,
        "--master_port",
        free_port(),
        "train_dpo.py",
        *command("dpo", f"{flags} {4 // ranks} {deepspeed}"),
    ]
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "dpo" / "run.json").read_text())["world_size"] == ranks
    one, several = ([e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("one", "dpo"))
    assert several == pytest.approx(one, abs=1e-5) and several[0] != several[1]
