"""Fixtures: one tiny LLaVA checkpoint, images on disk, rows and files in the public formats."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that contacts a hub fails at once
# DeepSpeed compiles into a folder of this checkout: what other programs did in the user's cache changes no test.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / ".venv" / "torch_extensions"))

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
import json
import shlex
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging as transformers_logging

from tests import zoo

disable_progress_bars()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny: a second thread would only cost time

QUESTION = "What is in this image?"
ANSWERS = ["A red square on the table.", "two blue circles", "A green star and a yellow triangle.", "no"]


@pytest.fixture(scope="session")
def llava() -> str:
    """Folder of a tiny LLaVA checkpoint. Read only."""
    return zoo.checkpoint("llava")


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 0.png ... 7.png, all different."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        zoo.image(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def preference_rows(image_dir: Path) -> list[dict]:
    """Eight rows with one image, prompts of different lengths, two responses."""
    return [
        {
            "images": [str(image_dir / f"{i}.png")],
            "prompt": [{"role": "user", "content": QUESTION + " photo" * (i % 3)}],
            "responses": [ANSWERS[i % 4], ANSWERS[(i + 1) % 4]],
            "ranks": [0.0, 1.0],
        }
        for i in range(8)
    ]


@pytest.fixture(scope="session")
def preference_data(preference_rows: list[dict]) -> Dataset:
    return Dataset.from_list(preference_rows)


@pytest.fixture(scope="session")
def pairs_json(preference_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as a plain_dpo file; images are relative to image_dir."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(
        json.dumps(
            [
                {
                    "image": Path(row["images"][0]).name,
                    "prompt": row["prompt"][0]["content"],
                    "chosen": row["responses"][0],
                    "rejected": row["responses"][1],
                }
                for row in preference_rows
            ]
        )
    )
    return path


@pytest.fixture(scope="session")
def conversations_json(preference_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations in the vlquery_json format, one or two turns."""
    path = tmp_path_factory.mktemp("conversations") / "conversations.json"
    rows = []
    for i, row in enumerate(preference_rows):
        turns = [("user", "<image>\n" + row["prompt"][0]["content"]), ("assistant", row["responses"][0])]
        if i % 2:
            turns += [("user", "Anything else?"), ("assistant", row["responses"][1])]
        rows.append(
            {
                "image": Path(row["images"][0]).name,
                "conversations": [{"from": role, "value": value} for role, value in turns],
            }
        )
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def command(
    tmp_path: Path, llava: str, image_dir: Path, pairs_json: Path, conversations_json: Path
) -> Callable[..., list[str]]:
    """Build an argv for a script: command("dpo", "--use_lora True")."""

    def build(algorithm: str, extra: str = "", model: str = llava, out: Path | None = None) -> list[str]:
        data = (
            f"--dataset_name vlquery_json --data_path {conversations_json}"
            if algorithm == "sft"
            else f"--dataset_name plain_dpo --data_path {pairs_json}"
        )
        return shlex.split(
            f"--model_name_or_path {model} {data} --image_root {image_dir} --output_dir {out or tmp_path / algorithm} --max_steps 2 "
            f"--per_device_train_batch_size 4 --learning_rate 1e-3 --save_strategy no --disable_tqdm True --seed 0 {extra}"
        )

    return build


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    """A file with a reward function, the length of the answer; beside it `odd`, whether it is odd."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "def length(images, prompts, responses):\n    return [float(len(r)) for r in responses]\n"
        "def odd(responses):\n    return [float(len(r) % 2) for r in responses]\n"
    )
    return f"{path}:length"
