"""scripts/{sft,rm,dpo,ppo,grpo}_{family}.sh: what scripts/generate.py writes, each read as it stands and run on the family's tiny checkpoint."""

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

import args
from models import MODEL_NICKNAME_MAP
from scripts.generate import ALGORITHMS, MARK, families, generated, script
from tests import zoo
from tests.test_models import files  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
FAMILIES = [row["family"] for row in families()]
CONFIGS = {
    "sft": args.SFTConfig,
    "rm": args.RMConfig,
    "dpo": args.DPOConfig,
    "ppo": args.PPOConfig,
    "grpo": args.PPOConfig,
}
DDP = ["torchrun", "--nproc_per_node", "8"]
# What a laptop changes of a script's settings; what is given twice counts the second time.
TINY = (
    "--use_cpu True --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --save_strategy no "
    "--logging_steps 1 --disable_tqdm True"
)


def command(text: str) -> tuple[list[str], str, str, list[str]]:
    """The command of a launch script: launcher, train_{algorithm}.py, DeepSpeed config or "", and the other flags.

    `${LAUNCH:-launcher}` stands for the launcher; --deepspeed stands first, where there is one.
    """
    found = re.search(r"^\$\{LAUNCH:-(.*)\} (train_\w+\.py) (.*)", text, re.MULTILINE | re.DOTALL)
    assert found, "no command"
    words = shlex.split(found[3].replace("\\\n", " "))
    assert words.pop() == "$@"
    config = ""
    if words[0] == "--deepspeed":
        config = words[1]
        assert (ROOT / config).is_file()
        words = words[2:]
    return found[1].split(), found[2], config, words


def one_gpu_flags(text: str) -> list[str]:
    """The flags that the comment at the top adds for one GPU, where plain python runs the script."""
    comment = "\n".join(line[1:] for line in text[text.index("GPU instead") :].splitlines() if line.startswith("#   "))
    words = shlex.split(comment.replace("\\\n", " "))
    assert words[:2] == ["LAUNCH=python", "bash"] and (ROOT / words[2]).read_text() == text
    return words[3:]


def check_launch(text: str, kinds: tuple[type, ...]) -> list[str]:
    """A script's launcher fits what it trains, its one-GPU command is valid; returns its flags without --deepspeed."""
    launcher, train, config, flags = command(text)
    printed = subprocess.run(
        ["bash", "-c", text], env={**os.environ, "LAUNCH": "echo"}, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [train, *(["--deepspeed", config] if config else []), *flags]
    lora = "--use_lora" in flags
    assert launcher == (["deepspeed"] if config else DDP)
    assert config or lora, "all weights under DDP are float32 with their optimizer states on every GPU: docs/memory.md"
    assert not lora or config in ("", "ds_configs/zero3.json"), "ZeRO-2 saves nothing of a LoRA run: docs/memory.md"
    small = args.parse(*kinds, argv=[*flags, *one_gpu_flags(text), "--use_cpu", "True"])
    assert (
        small[0].q_lora and small[2].use_lora and small[3].per_device_train_batch_size == (8 if "grpo" in flags else 1)
    )
    assert ("--deepspeed" in one_gpu_flags(text)) == bool(config) and not small[3].deepspeed
    return flags


def test_table_names_families_of_this_repository():
    """A family of models/ needs no row, and then no launch script; a row needs its family."""
    assert len(set(FAMILIES)) == len(FAMILIES)
    unknown = set(FAMILIES) - set(MODEL_NICKNAME_MAP.values())
    assert not unknown, (
        f"scripts/models.tsv names {unknown}: remove the row, or add the family to MODEL_NICKNAME_MAP in models/__init__.py"
    )


def test_scripts_are_what_the_table_and_the_templates_say():
    """Scripts that somebody wrote by hand may lie beside them."""
    found = {path.name: path.read_text() for path in (ROOT / "scripts").glob("*.sh")}
    expected = generated()
    assert {name for name, text in found.items() if MARK in text} == expected.keys(), "run `make scripts`"
    for name, text in expected.items():
        assert found[name] == text, f"scripts/{name} differs: change models.tsv or templates/, then run `make scripts`"
        assert "Settings:" not in text and "%{" not in text


def test_table_refuses_what_no_template_writes():
    row = families()[0]
    for algorithm, cell in (("rm", "full zero2"), ("sft", "lora zero2")):
        with pytest.raises(ValueError, match=f'column {algorithm}: "{cell}" is not one of'):
            script(algorithm, row | {algorithm: cell})


def flags_of(algorithm: str, family: str) -> list[str]:
    """What a launch script hands to which training script: launcher and one-GPU command are looked at on the way."""
    text = (ROOT / "scripts" / f"{algorithm}_{family}.sh").read_text()
    assert command(text)[1] == f"train_{algorithm.replace('grpo', 'ppo')}.py"
    return check_launch(text, (args.ModelArguments, args.DataArguments, args.LoraArguments, CONFIGS[algorithm]))


@pytest.mark.parametrize("family", FAMILIES)
def test_launch_scripts_are_read(family: str):
    """Each of the five: bash reads it, launcher and one-GPU command are right, the flags are those of the script."""
    for algorithm in ALGORITHMS:
        subprocess.run(["bash", "-n", ROOT / "scripts" / f"{algorithm}_{family}.sh"], check=True)
        assert flags_of(algorithm, family)


@pytest.mark.parametrize(
    "family", [f if i % 3 == 0 else pytest.param(f, marks=pytest.mark.slow) for i, f in enumerate(FAMILIES)]
)
def test_launch_scripts_run(family: str, files: Path, tmp_path: Path):  # noqa: F811
    """One step of each of the five with its flags on a tiny checkpoint."""
    for algorithm in ALGORITHMS:  # PPO last: it wants the reward model
        flags = flags_of(algorithm, family)
        train = algorithm.replace("grpo", "ppo")
        name = "vlquery_json" if algorithm == "sft" else "plain_dpo"
        file = "conversations.json" if algorithm == "sft" else "pairs.json"
        out = tmp_path / algorithm
        argv = [*flags, *TINY.split(), "--model_name_or_path", zoo.checkpoint(family), "--output_dir", str(out)]
        argv += ["--dataset_name", name, "--data_path", f"{files}/{file}", "--image_root", str(files)]
        if algorithm == "rm":
            argv += ["--eval_ratio", "0.25", "--eval_steps", "1"]
        if algorithm == "ppo":
            argv += ["--reward_adapter", str(tmp_path / "rm"), "--num_mini_batches", "1", "--response_length", "4"]
        if algorithm == "grpo":
            argv += [
                "--num_generations",
                "2",
                "--response_length",
                "4",
                "--reward_fn",
                "think_format",
                "repetition_penalty",
            ]
        importlib.import_module(f"train_{train}").main(argv)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses and np.isfinite(losses).all()
