"""Every command of docs/quickstart.md, as it stands, on a tiny checkpoint."""

import csv
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

from tests.conftest import ANSWERS

ROOT = Path(__file__).parents[1]
MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
# What a laptop changes of the training command; what is given twice counts the second time
TINY = "--max_steps 2 --gradient_accumulation_steps 1 --eval_steps 1 --save_strategy no --disable_tqdm True --lora_r 4"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "quickstart.md").read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def main_of(words: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of `python file.py ...` or `python -m module ...`."""
    assert words[0] == "python"
    return (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])


def test_every_command(tmp_path: Path, monkeypatch, llava: str, image_dir: Path, capsys):
    shutil.copytree(image_dir, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    with open("table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "question", "good_answer", "bad_answer"])
        table.writerows(
            [f"{i}.png", "Which bar is the tallest?", ANSWERS[i % 4], ANSWERS[(i + 1) % 4]] for i in range(8)
        )
    text = (ROOT / "docs" / "quickstart.md").read_text()
    Path("questions.json").write_text(re.search(r"^\[\{.*?\]$", text, re.MULTILINE | re.DOTALL)[0])

    ran = []
    for words in commands():
        module, argv = main_of(words)
        if module != "benchmarks.memory":  # which knows the published model without its weights
            argv = [llava if word == MODEL else word for word in argv]
        if module == "train_dpo":
            argv += TINY.split()
        capsys.readouterr()
        result = importlib.import_module(module).main(argv)
        assert not result, module
        ran.append(module)
        if module == "benchmarks.memory":
            assert "GiB" in capsys.readouterr().out
    assert ran[:3] == ["data.check", "benchmarks.memory", "train_dpo"] and ran[-2:] == ["merge_lora", "eval.chat"]
    assert capsys.readouterr().out.strip()  # the answer
    for page in ("check", "dpo", "report"):
        assert (tmp_path / "runs" / page / "index.html").is_file()
    assert "own questions" in (tmp_path / "runs" / "report" / "report.md").read_text()
    assert json.loads((tmp_path / "runs/dpo/run.json").read_text())["data"]["eval_rows"] >= 1
