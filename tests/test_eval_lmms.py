"""eval.lmms: the command line that lmms-eval gets, and, where it is installed, a local task through its own entry point."""

import importlib.util
import json
from pathlib import Path

import pytest

from common.errors import InputError
from eval import lmms
from tests import zoo

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval: make test-all installs it")

TASK = """
task: tiny_pope
dataset_path: json
dataset_kwargs:
  data_files: {test: DATA}
test_split: test
output_type: OUTPUT
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: label
generation_kwargs: {max_new_tokens: 4, until: ["."]}
process_results: !function utils.results
metric_list: [{metric: answered, aggregation: mean, higher_is_better: true}]
"""

UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, kwargs=None):
    return doc["text"]


def results(doc, results):
    text = str(results[0])  # lmms-eval 0.7.3 hands the pair (loss, greedy) over as text
    return {"answered": float(float(text[1:].split(",")[0]) > 0 if text.startswith("(") else "." not in text)}
"""


def test_flags_go_to_the_model_and_the_rest_to_lmms_eval() -> None:
    argv = lmms.forwarded(
        ["--model_name_or_path", "m", "--adapter", "a", "--bf16", "True", "--tasks", "mmstar,ai2d", "--limit", "4"]
    )
    assert argv[:4] == ["--model", "vl_rlhf", "--model_args", "pretrained=m,adapter=a,bf16=True,enable_thinking=False"]
    assert argv[4:] == ["--batch_size", "8", "--tasks", "mmstar,ai2d", "--limit", "4"]
    with pytest.raises(InputError, match="cannot take a path with ',' or '='"):
        lmms.forwarded(["--model_name_or_path", "runs/lr=1e-6"])
    with pytest.raises(InputError, match="There is no flag --adapte: did you mean --adapter"):  # and is not handed on
        lmms.forwarded(["--adapte", "a", "--model_name_or_path", "m"])


@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
def test_without_lmms_eval_the_command_says_what_to_install() -> None:
    with pytest.raises(InputError, match="make lmms"):
        lmms.register()


def tiny_task(folder: Path, output: str, model: str) -> list[str]:
    """The arguments of a task with three questions."""
    zoo.image(0).save(folder / "0.png")
    rows = [{"image": str(folder / "0.png"), "text": f"Is there a {w}?", "label": "no"} for w in ("dog", "cat", "star")]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = folder / "tasks"
    task.mkdir()
    (task / "tiny.yaml").write_text(TASK.replace("DATA", str(folder / "data.jsonl")).replace("OUTPUT", output))
    (task / "utils.py").write_text(UTILS)
    return (
        f"--model_name_or_path {model} --batch_size 2 --tasks tiny_pope --include_path {task} --output_path {folder}/logs "
        "--log_samples"
    ).split()


@needs_lmms_eval
@pytest.mark.parametrize("output", ["generate_until", "loglikelihood"])
def test_a_local_task_runs_through_lmms_eval(output: str, tmp_path: Path, llava: str) -> None:
    lmms.main(tiny_task(tmp_path, output, llava))
    found = [json.loads(p.read_text()) for p in (tmp_path / "logs").rglob("*results.json")]
    assert len(found) == 1 and found[0]["results"]["tiny_pope"]["answered,none"] == 1.0


@needs_lmms_eval
def test_an_evaluation_that_fails_is_an_error(tmp_path: Path, llava: str) -> None:
    """lmms-eval prints it and ends with status 0."""
    argv = tiny_task(tmp_path, "generate_until", llava)
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match=r"lmms-eval ended in an error, see above: .*0\.png"):
        lmms.main(argv)
