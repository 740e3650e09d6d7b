"""scripts/{sft,rm,dpo,ppo}_{family}.sh: one per pair, each read as it stands and run on the family's tiny checkpoint."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

import args
from models import MODEL_NICKNAME_MAP
from tests import zoo
from tests.test_models import files  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
ALGORITHMS = ["sft", "rm", "dpo", "ppo"]  # PPO last: it wants the reward model
CONFIGS = {"sft": args.SFTConfig, "rm": args.RMConfig, "dpo": args.DPOConfig, "ppo": args.PPOConfig}
# What a laptop changes of a published setting; what is given twice counts the second time.
TINY = (
    "--use_cpu True --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --save_strategy no "
    "--logging_steps 1 --disable_tqdm True"
)


def text_of(algorithm: str, family: str) -> str:
    return (ROOT / "scripts" / f"{algorithm}_{family}.sh").read_text()


def flags_of(command: str, script: str) -> list[str]:
    """The flags of a whole `deepspeed train_x.py ...` command, without --deepspeed, which is checked and left out."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["deepspeed", script] and words[-1] == "$@"
    config = words.index("--deepspeed")
    assert (ROOT / words[config + 1]).is_file()
    return words[2:config] + words[config + 2 : -1]


def small_flags(text: str) -> list[str]:
    """The flags that the comment at the top adds for one GPU."""
    small = text[text.index("GPU instead") :]
    comment = "\n".join(line[1:] for line in small.splitlines() if line.startswith("#   "))
    words = shlex.split(comment.replace("\\\n", " "))
    assert words[0] == "bash" and (ROOT / words[1]).is_file()
    if "--deepspeed" in words:
        config = words.index("--deepspeed")
        assert (ROOT / words[config + 1]).is_file()
        del words[config : config + 2]
    return words[2:]


def test_there_is_one_script_per_family_and_algorithm():
    expected = {f"{algorithm}_{family}.sh" for algorithm in ALGORITHMS for family in MODEL_NICKNAME_MAP.values()}
    found = {path.name for path in (ROOT / "scripts").glob("*.sh") if re.match(r"(sft|rm|dpo|ppo)_", path.name)}
    assert found == expected


@pytest.mark.parametrize("family", MODEL_NICKNAME_MAP.values())
def test_launch_scripts_run(family: str, files: Path, tmp_path: Path):  # noqa: F811
    """Each of the four: bash reads it, its source is named, its one-GPU flags are valid, one step runs with its flags on a tiny checkpoint."""
    for algorithm in ALGORITHMS:
        text, script = text_of(algorithm, family), f"train_{algorithm}.py"
        subprocess.run(["bash", "-n", ROOT / "scripts" / f"{algorithm}_{family}.sh"], check=True)
        assert re.search(r"# Settings: [^()]*\(.*(arXiv:|/)", text), "no source"
        flags = flags_of(text[text.index("deepspeed train_") :], script)
        kinds = (args.ModelArguments, args.DataArguments, args.LoraArguments, CONFIGS[algorithm])
        small = args.parse(*kinds, argv=[*flags, *small_flags(text), "--use_cpu", "True"])
        assert small[0].q_lora and small[2].use_lora and small[3].per_device_train_batch_size == 1

        name = "vlquery_json" if algorithm == "sft" else "plain_dpo"
        file = "conversations.json" if algorithm == "sft" else "pairs.json"
        out = tmp_path / algorithm
        argv = [*flags, *TINY.split(), "--model_name_or_path", zoo.checkpoint(family), "--output_dir", str(out)]
        argv += ["--dataset_name", name, "--data_path", f"{files}/{file}", "--image_root", str(files)]
        if algorithm == "rm":
            argv += ["--eval_ratio", "0.25", "--eval_steps", "1"]
        if algorithm == "ppo":
            argv += ["--reward_adapter", str(tmp_path / "rm"), "--num_mini_batches", "1", "--response_length", "4"]
        importlib.import_module(script.removesuffix(".py")).main(argv)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses and np.isfinite(losses).all()
