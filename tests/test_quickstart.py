"""Every command of docs/quickstart.md, as it stands, on a tiny checkpoint; and eval.chat, with which it ends."""

import csv
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from common.errors import InputError
from eval import chat
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


# -- chat --------------------------------------------------------------------------------------------------------------------


class Echo(chat.Chat):
    """Says how many turns it has seen, and of which picture."""

    def __init__(self, name: str) -> None:
        self.name, self.messages = name, []

    def answer(self, question: str, images: list[str]) -> str:
        self.messages += [question, ""]
        return f"{self.name} {len(self.messages) // 2} {images}"


def test_a_conversation_goes_on_until_an_empty_line(image_dir: Path):
    other = str(image_dir / "1.png")
    lines = ["one\n", "two\n", "/new\n", "three\n", f"/image {other}\n", "four\n", "\n", "five\n"]
    said = list(chat.talk({"a": Echo("a")}, ["0.png"], lines))
    assert said == ["a 1 ['0.png']", "a 2 ['0.png']", "a 1 ['0.png']", f"a 1 ['{other}']"]


def test_several_checkpoints_answer_one_below_the_other():
    said = list(chat.talk({"sft": Echo("x"), "dpo-2": Echo("y")}, [], ["one"]))
    assert said == ["sft    x 1 []", "dpo-2  y 1 []"]


def test_a_real_conversation_remembers(llava: str, image_dir: Path):
    """The second question is read behind the first and its answer: the prompt of the second turn holds both."""
    import torch

    from eval.generate import Answerer

    answerer = Answerer(llava, None, torch.device("cpu"), bf16=False)
    talker = chat.Chat(answerer, {"max_new_tokens": 4, "do_sample": False}, 0)
    seen = []
    answer = answerer.answer
    answerer.answer = lambda encoded, *rest: seen.append(encoded[0]["ids"]) or answer(encoded, *rest)  # type: ignore[method-assign]
    first = talker.answer("What is it?", [str(image_dir / "0.png")])
    talker.answer("And now?", [str(image_dir / "0.png")])
    decoded = answerer.processor.tokenizer.decode(seen[1])
    assert [m["role"] for m in talker.messages] == ["user", "assistant"] * 2 and talker.messages[1]["content"] == first
    assert decoded.index("What is it?") < decoded.index("And now?") and len(seen[1]) > len(seen[0])


def test_a_picture_that_is_not_there():
    with pytest.raises(InputError, match=r"the image nowhere\.png does not exist"):
        chat.main(["--model_name_or_path", "m", "--image", "nowhere.png"])
