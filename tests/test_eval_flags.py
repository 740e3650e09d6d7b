"""The evaluation commands take the project's flags; the names of earlier versions go on working and are not shown."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from common.errors import InputError, run
from eval import choice, generate, judged, lmms, reward, score, shapes, sweep, yesno
from eval.flags import add_data_flags, add_model_flags, add_switch

GOLDENS = Path(__file__).parent / "goldens" / "eval"


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser()
    add_model_flags(built)
    add_data_flags(built)
    add_switch(built, "--bf16")
    return built


@pytest.mark.parametrize("switch", [["--bf16"], ["--bf16", "True"], ["--bf16", "true"]])
def test_older_names_mean_the_same(switch: list[str]) -> None:
    new = parser().parse_args(["--model_name_or_path", "m", "--data_path", "d", "--image_root", "i", "--bf16", "True"])
    assert parser().parse_args(["--model", "m", "--data", "d", "--image_dir", "i", *switch]) == new
    assert vars(new) == {"model_name_or_path": "m", "adapter": None, "data_path": "d", "image_root": "i", "bf16": True}
    off = ["--model", "m", "--data_path", "d"]
    assert not parser().parse_args(off).bf16 and not parser().parse_args([*off, "--bf16", "False"]).bf16


def test_both_names_or_none_are_refused(capsys: pytest.CaptureFixture) -> None:
    for argv in (["--model", "a", "--model_name_or_path", "b", "--data", "d"], ["--data", "d"]):
        with pytest.raises(SystemExit):
            parser().parse_args(argv)
        assert "--model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("command", [yesno, generate, choice, judged, reward, score, shapes, sweep, lmms])
def test_help_shows_the_new_names_only(command, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", [command.__name__, "--help"])
    with pytest.raises(SystemExit):
        command.main()
    words = set(capsys.readouterr().out.replace("[", " ").replace("(", " ").split())
    assert not words & {"--model", "--data", "--image_dir"}
    assert words & {"--model_name_or_path", "--data_path", "--checkpoints"}


def test_a_score_is_the_same_by_either_name(tmp_path: Path) -> None:
    data, answers = GOLDENS / "pope/coco_pope_random.json", GOLDENS / "pope/answers_random.jsonl"
    for name, new in (("a", ["--data_path", "--image_root"]), ("b", ["--data", "--image_dir"])):
        yesno.main(["--task", "pope", new[0], str(data), new[1], "i", "--answers", str(answers), "--output", str(tmp_path / name)])  # fmt: skip
    first, second = (json.loads((tmp_path / n / "results.json").read_text())["pope"] for n in "ab")
    assert first["scores"] == second["scores"] and first["image_dir"] == second["image_dir"] == "i"


def test_older_names_in_the_file_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("pope: {data: x, image_dir: y}\nmme: {data_path: z}\n")
    assert sweep.read_benchmarks(str(tmp_path / "b.yaml"), None) == {
        "pope": {"data_path": "x", "image_root": "y"},
        "mme": {"data_path": "z"},
    }


@pytest.mark.parametrize("given", ["missing", "a folder", "bytes", "null", "a number", "a text"])
@pytest.mark.parametrize("flag", ["--data_path", "--answers", "--judge_prompt"])
def test_wrong_paths_are_one_sentence(flag: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wrong = tmp_path / "x.json"
    if given == "a folder":
        wrong.mkdir()
    elif given != "missing":
        wrong.write_bytes({"bytes": b"PAR1\xff\xfe", "null": b"null", "a number": b"5", "a text": b'"x"'}[given])
    for name in ("mm-vet.json", "answers.json"):
        shutil.copy(GOLDENS / "mmvet" / name, tmp_path / name)
    argv = {"--data_path": tmp_path / "mm-vet.json", "--answers": tmp_path / "answers.json"}
    argv |= {"--judge": "http://127.0.0.1:9/v1", "--judge_model": "j", "--output": tmp_path / "out", flag: wrong}
    with pytest.raises(SystemExit) as end:
        run(lambda: judged.main(["--task", "mmvet", *(str(x) for pair in argv.items() for x in pair)]))
    shown = capsys.readouterr().err
    assert end.value.code == 2 and str(wrong) in shown and shown.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    def broken() -> None:
        raise FileNotFoundError("a bug")

    with pytest.raises(FileNotFoundError):
        run(broken)
    with pytest.raises(SystemExit):
        run(lambda: (_ for _ in ()).throw(InputError("a sentence")))
