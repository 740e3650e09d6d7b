"""scripts/*.sh of papers' recipes: each read as it stands and run for a step on a tiny checkpoint."""

import json
import math
import re
import subprocess

import pytest

import args
import train_dpo
import train_rm
from tests import zoo
from tests.test_launch_scripts import ROOT, TINY, flags_of, small_flags

RECIPES = {
    "rlhfv_ddpo_llava": "llava",
    "rlhfv_rm_llava": "llava",
    "mdpo_llava": "llava",
    "rlaifv_dpo_llava": "llava",
    "mpo_internvl": "internvl",
}


@pytest.mark.parametrize("recipe, family", RECIPES.items())
def test_recipe_runs(recipe: str, family: str, pairs_json, image_dir, tmp_path):
    path = ROOT / "scripts" / f"{recipe}.sh"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert re.search(r"# Settings: .*arXiv:", text, re.DOTALL)
    algorithm = re.search(r"deepspeed train_(\w+)\.py", text)[1]
    config, main = (args.RMConfig, train_rm.main) if algorithm == "rm" else (args.DPOConfig, train_dpo.main)
    flags = flags_of(text[text.index("deepspeed train_") :], f"train_{algorithm}.py")
    kinds = (args.ModelArguments, args.DataArguments, args.LoraArguments, config)
    small = args.parse(*kinds, argv=[*flags, *small_flags(text), "--use_cpu", "True"])
    assert small[0].q_lora and small[2].use_lora and small[3].per_device_train_batch_size == 1

    local = f"--dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --output_dir {tmp_path} --data_ratio 1"
    local += " --eval_ratio 0.25 --eval_steps 1" if algorithm == "rm" else ""
    main([*flags, *TINY.split(), "--model_name_or_path", zoo.checkpoint(family), *local.split()])
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert math.isfinite(next(entry["loss"] for entry in history if "loss" in entry))
