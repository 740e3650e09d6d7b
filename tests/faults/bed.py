"""What a cell of the table of faults is made of: a folder of its own with everything a run needs, ways to damage it, and the two promises."""

import hashlib
import importlib
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.run_folder import LOCK
from common import errors
from tests import zoo

LORA = "--use_lora True --lora_r 4"
SAVE = "--save_strategy steps --save_steps 1"
CACHE = f"{LORA} --precompute_ref_log_probs True"


class Cell(NamedTuple):
    moment: str
    fault: str
    promise: str  # refused or recovered
    try_it: Callable[["Bed"], None]


class Bed:
    """A folder of its own with everything a run needs, all of it free to be damaged."""

    def __init__(
        self, tmp_path: Path, command: Callable[..., list[str]], rewards: str, capsys: pytest.CaptureFixture
    ) -> None:
        self.tmp, self._command, self.rewards, self.capsys = tmp_path, command, rewards, capsys
        self.out = tmp_path / "out"

    def copy(self, what: str | Path, name: str) -> Path:
        return shutil.copytree(what, self.tmp / name)

    def argv(
        self, script: str, extra: str = "", model: str | Path | None = None, out: Path | None = None, **paths: Path
    ) -> list[str]:
        if script == "ppo":
            extra = f"--reward_fn {self.rewards} --response_length 4 {extra}"
        given = {} if model is None else {"model": str(model)}
        argv = self._command(script, extra, out=out or self.out, **given)
        for flag, value in paths.items():
            argv[argv.index(f"--{flag}") + 1] = str(value)
        return argv

    def train(self, script: str, *args: object, **kwargs: object) -> None:
        importlib.import_module(f"train_{script}").main(self.argv(script, *args, **kwargs))

    def refused(self, main: Callable[[], object], *named: str, untouched: Path | None = None) -> None:
        """`main` ends in one sentence that matches all of `named`."""
        before = state(untouched) if untouched else None
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            errors.run(main)
        said = self.capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        for name in named:
            assert re.search(name, said[-1]), said[-1]
        if untouched:
            assert state(untouched) == before
        assert not [p for p in self.tmp.rglob("*.incomplete") if p.is_dir() and any(p.iterdir())], (
            "something half-written stays"
        )

    def said(self) -> str:
        return "".join(self.capsys.readouterr())


def state(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in (LOCK, "bad_rows.jsonl")
    }


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {f"{f.name}/{n}": t for f in sorted(out.glob("*.safetensors")) for n, t in load_file(f).items()}


def assert_equal(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine and mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file grows beyond `after` bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    match how:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(content[: len(content) * 2 // 5])
        case "altered":
            middle = len(content) * 3 // 4
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "NaN":
            tensors = load_file(file)
            next(iter(tensors.values())).view(-1)[0] = float("nan")
            save_file(tensors, file, {"format": "pt"})
        case "a folder":
            file.unlink()
            file.mkdir()


CELLS: list[Cell] = []


def cell(moment: str, fault: str, promise: str = "refused") -> Callable:
    def add(try_it: Callable[[Bed], None]) -> Callable[[Bed], None]:
        CELLS.append(Cell(moment, fault, promise, try_it))
        return try_it

    return add


def adapter_of(bed: Bed, script: str = "dpo") -> Path:
    bed.train(script, f"{LORA} --max_steps 1", out=bed.tmp / "adapter")
    return bed.tmp / "adapter"


def rows_of(bed: Bed) -> tuple[Path, Path]:
    """(pairs.json, image folder), copies."""
    argv = bed.argv("dpo")
    data, images = (Path(argv[argv.index(flag) + 1]) for flag in ("--data_path", "--image_root"))
    copy = bed.tmp / "pairs.json"
    shutil.copy(data, copy)
    return copy, bed.copy(images, "pictures")


def questions(bed: Bed) -> Path:
    folder = bed.tmp / "pope"
    folder.mkdir()
    for i in range(4):
        zoo.image(i).save(folder / f"{i}.png")
    rows = [
        {"question_id": i, "image": f"{i}.png", "text": "Is there a dog in the image?", "label": "yes"}
        for i in range(4)
    ]
    file = folder / "coco_pope_random.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def generate_argv(bed: Bed, file: Path, model: str | Path | None = None) -> list[str]:
    return [
        *("--task", "pope", "--data_path", str(file), "--model_name_or_path", str(model or zoo.checkpoint("llava"))),
        *(
            "--output",
            str(bed.tmp / "answers.jsonl"),
            "--num_workers",
            "0",
            "--max_new_tokens",
            "3",
            "--batch_size",
            "1",
        ),
    ]
