"""scripts/published/*.sh, settings of papers and model cards: each read as it stands and run for a step on a tiny checkpoint."""

import importlib
import json
import math
import re
import subprocess
from pathlib import Path

import pytest

import args
from scripts.generate import algorithm_of
from tests import zoo
from tests.test_launch_scripts import CONFIGS, FAMILIES, ROOT, TINY, check_launch, command
from tests.test_models import files  # noqa: F401  (a fixture)

RECIPES = sorted((ROOT / "scripts" / "published").glob("*.sh"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path: Path, files: Path, tmp_path: Path):  # noqa: F811
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert re.search(r"# Settings: [^()]*\(.*(arXiv:|/)", text), "no source"
    [family] = [family for family in FAMILIES if path.stem.endswith(f"_{family}")]
    script, algorithm = command(text)[1].removesuffix(".py"), algorithm_of(text)
    flags = check_launch(text, (args.ModelArguments, args.DataArguments, args.LoraArguments, CONFIGS[algorithm]))
    assert flags[flags.index("--output_dir") + 1] == f"runs/published/{path.stem}"

    dataset = ("vlquery_json", "conversations.json") if algorithm == "sft" else ("plain_dpo", "pairs.json")
    local = f"--dataset_name {dataset[0]} --data_path {files}/{dataset[1]} --image_root {files} --output_dir {tmp_path}"
    if algorithm == "grpo":
        local = with_keys(local, files, tmp_path)
    local += " --data_ratio 1" + (" --eval_ratio 0.25 --eval_steps 1" if algorithm == "rm" else "")
    importlib.import_module(script).main(
        [*flags, *TINY.split(), "--model_name_or_path", zoo.checkpoint(family), *local.split()]
    )
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert math.isfinite(next(entry["loss"] for entry in history if "loss" in entry))


def with_keys(local: str, files: Path, folder: Path) -> str:  # noqa: F811
    """The same questions with an answer key, and two short answers to each."""
    rows = [
        {"images": [row["image"]], "prompt": row["prompt"], "solution": "[0, 0, 2, 3]"}
        for row in json.loads((files / "pairs.json").read_text())
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    local = local.replace("plain_dpo", f"{folder}/rows.json").replace(f"--data_path {files}/pairs.json ", "")
    return f"{local} --num_generations 2 --response_length 4"
