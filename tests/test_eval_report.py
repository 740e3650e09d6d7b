"""results.json, the database, tables, charts, the page, and the sweep that makes all of them."""

import json
import re
import sqlite3
from pathlib import Path

import pytest
import yaml

from args import LoraArguments
from base.loading import load_model
from common.errors import InputError
from eval import choice, report, sweep, yesno
from eval.results import append_to_database, meta_path, sha256
from models.assemble import add_lora
from tests import zoo

GOLDENS = Path(__file__).parent / "goldens" / "eval"
EVIL = 'Yes</script><script>alert(1)</script> <img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs with POPE and MME: a base and two steps, through the command lines; one answer is hostile."""
    root = tmp_path_factory.mktemp("runs")
    questions = GOLDENS / "pope/coco_pope_random.json"
    answers = [json.loads(line)["answer"] for line in (GOLDENS / "pope/answers_random.jsonl").read_text().splitlines()]
    folders = [root / "base", root / "dpo_100%" / "checkpoint-10", root / "dpo_100%" / "checkpoint-20"]
    for n, folder in enumerate(folders):
        (folder / "eval").mkdir(parents=True)
        file = folder / "eval" / "pope.jsonl"
        texts = [EVIL, *answers[1:]] if n == 0 else ["Yes"] * n * 10 + answers[n * 10 :]
        file.write_text("".join(json.dumps({"id": f"random/{i + 1}", "answer": t}) + "\n" for i, t in enumerate(texts)))
        meta = {"data_sha256": sha256(questions), "checkpoint": "org/base", "generation": {"num_beams": 1 + n // 2}}
        meta |= {"adapter": str(folder) if n else None, "step": 10 * n or None}
        meta_path(file).write_text(json.dumps(meta))
        yesno.main(["--task", "pope", "--data_path", str(questions), "--answers", str(file)])
        mme = [
            "--task",
            "mme",
            "--data_path",
            str(GOLDENS / "mme/MME.tsv"),
            "--answers",
            str(GOLDENS / "mme/predictions.jsonl"),
        ]
        yesno.main([*mme, "--output", str(folder / "eval")])
    return folders


def test_results_say_where_they_come_from(runs: list[Path]) -> None:
    results = json.loads((runs[1] / "eval/results.json").read_text())
    assert list(results) == ["pope", "mme"]
    pope = results["pope"]
    assert pope["data_sha256"] == sha256(GOLDENS / "pope/coco_pope_random.json")
    assert pope["answers_sha256"] == sha256(runs[1] / "eval/pope.jsonl")
    assert (pope["checkpoint"], pope["adapter"], pope["step"]) == ("org/base", str(runs[1]), 10)
    assert pope["generation"] == {"num_beams": 1} and pope["rows"] == 72 and pope["judge"] is None
    assert {"python", "transformers", "torch"} <= set(pope["versions"]["scored"])
    # answers of another tool: their settings are unknown, and none are made up
    assert results["mme"]["checkpoint"] is None


def test_answers_to_another_file_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "coco_pope_random.json"
    other.write_text((GOLDENS / "pope/coco_pope_random.json").read_text().replace("dog", "cow"))
    with pytest.raises(InputError, match=r"was generated from another coco_pope_random\.json"):
        yesno.main(["--task", "pope", "--data_path", str(other), "--answers", str(runs[0] / "eval/pope.jsonl")])


def test_markdown_and_latex(runs: list[Path]) -> None:
    found = report.read_runs(runs)
    assert [r.name for r in found] == ["base", "checkpoint-10", "checkpoint-20"]
    text = report.markdown(found)
    pope = [r.results["pope"]["scores"]["mean/f1"] for r in found]
    assert f"**{100 * max(pope):.1f}**" in text and "| MME-P |" in text and "| 800.0 |" in text.replace("*", "")
    assert "POPE yes" in text and "generation settings differ" in text and "NOT comparable" not in text
    latex = report.latex(report.read_runs(runs[1:]))
    assert latex.count("\\\\") == 3 and r"\textbf{" in latex and r"\toprule" in latex
    assert not re.search(r"(?<!\\)[%_](?![^\n]*\|)", latex.split("\\begin")[1])


def test_notes_warn_of_what_cannot_be_compared(runs: list[Path]) -> None:
    found = report.read_runs(runs[:2])
    judged = {"model": "gpt-a", "prompt": "built in", "prompt_sha256": "1"}
    for run, model in zip(found, ("gpt-a", "gpt-b"), strict=True):
        run.results["mmhal"] = dict(run.results["pope"], judge=judged | {"model": model}, scores={"average_score": 3.0})
    found[1].results["pope"] = dict(found[1].results["pope"], data_sha256="other", rows=3, limit=3)
    text = "\n".join(report.notes(found))
    assert "mmhal: judged by gpt-a, gpt-b" in text and "mmhal: NOT comparable, the judge or its prompt differs" in text
    assert "pope: NOT comparable, the runs were scored on different data files" in text
    assert "pope: NOT comparable, the runs have 72 and 3 rows" in text
    assert "pope: the first rows only (checkpoint-10 3)" in text


def test_lower_is_better_where_it_is(runs: list[Path]) -> None:
    found = report.read_runs(runs[:2])
    for run, value in zip(found, (0.5, 0.25), strict=True):
        run.results = {"chair": dict(run.results["pope"], scores={"CHAIRs": value, "CHAIRi": value})}
    assert "**25.0**" in report.markdown(found) and "**50.0**" not in report.markdown(found)
    metric = report.HEADLINES["chair"][0]
    assert report._goodness(25.0, metric) > report._goodness(50.0, metric)


def test_report_page_is_whole_and_harmless(runs: list[Path], tmp_path: Path) -> None:
    report.main([*map(str, runs), "--output", str(tmp_path), "--max_rows", "30"])
    assert {p.name for p in tmp_path.iterdir()} == {
        "report.md", "report.tex", "radar.png", "bars.png", "curve.png", "index.html"
    }  # fmt: skip
    for name in ("radar.png", "bars.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page and "onerror=" not in page.replace("\\u003cimg src=x onerror=", "")
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["runs"] == ["base", "checkpoint-10", "checkpoint-20"]
    pope, mme = data["benchmarks"]
    assert (len(pope["rows"]), pope["total"], len(mme["rows"]), mme["total"]) == (30, 72, 30, 168)
    assert any(a["answer"] == EVIL for row in pope["rows"] for a in row["runs"].values())
    assert all(source.startswith("data:image/jpeg;base64,") for source in data["images"])
    used = {i for b in data["benchmarks"] for row in b["rows"] for i in row["images"]}
    assert used == set(range(len(data["images"]))) and len(set(data["images"])) == len(data["images"])  # once each
    assert mme["rows"][0]["question"].startswith("Is the") and set(mme["rows"][0]["runs"]) == {"0", "1", "2"}
    differing = [len({a["correct"] for a in row["runs"].values()}) > 1 for row in pope["rows"]]
    assert any(differing) and differing == sorted(differing, reverse=True)  # they come first


def test_database_gets_the_same_rows_again_and_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    argv = [
        "--task",
        "pope",
        "--data_path",
        str(GOLDENS / "pope/coco_pope_random.json"),
        "--output",
        str(tmp_path / "run"),
    ]
    argv += ["--answers", str(GOLDENS / "pope/answers_random.jsonl"), "--results_db", url]
    yesno.main(argv)
    yesno.main(argv)
    scores = json.loads((tmp_path / "run/results.json").read_text())["pope"]["scores"]
    with sqlite3.connect(tmp_path / "x.db") as database:
        rows = database.execute("select metric, value from eval_scores where benchmark = 'pope' order by id").fetchall()
    assert rows == 2 * list(scores.items())


def test_database_errors_hide_the_password(tmp_path: Path) -> None:
    entry = {"time": "", "rows": 1, "judge": None, "checkpoint": None, "adapter": None, "step": None, "data_sha256": "",
             "answers_sha256": "", "generation": None, "versions": {}, "scores": {"a": 1.0}}  # fmt: skip
    with pytest.raises(InputError, match="not a SQLAlchemy URL"):
        append_to_database("scores.db", "run", "pope", entry)
    with pytest.raises(InputError, match=r"needs the driver '\w+'; pip install it") as error:
        append_to_database("postgresql+pg8000://me:secret@localhost/db", "run", "pope", entry)
    assert "secret" not in str(error.value)
    with pytest.raises(InputError, match=r"cannot be written \(OperationalError\)"):
        append_to_database(f"sqlite:///{tmp_path}/no/such/folder/x.db", "run", "pope", entry)


def test_report_needs_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no results\.json; run a scorer first"):
        report.main([str(tmp_path)])


# ----------------------------------------------------------------------------------------------------- sweep


def test_sweep_goes_from_checkpoints_to_the_curve(tmp_path: Path, llava: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        zoo.image(i).save(tmp_path / f"{i}.png")
    questions = [
        {"question_id": n, "image": f"{n % 2}.png", "text": f"Is there a {word}?", "label": "no"}
        for n, word in enumerate(["dog", "cat", "star"])
    ]
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
    seed = {"question": "What is it?", "answer": "A", "data_id": "0.png", "question_type_id": 1, "data_type": "image"}
    seed |= {f"choice_{c}": c for c in "abcd"}
    (tmp_path / "SEED-Bench.json").write_text(
        json.dumps({"questions": [seed | {"question_id": "7"}], "question_type": {}})
    )
    benchmarks = {
        "pope": {"data": str(tmp_path / "coco_pope_random.json"), "generate": {"max_new_tokens": 2}},
        "seed": {"data": str(tmp_path / "SEED-Bench.json")},
        "mme": {"data_path": "not asked for"},
    }
    (tmp_path / "benchmarks.yaml").write_text(yaml.safe_dump(benchmarks))
    checkpoints = [llava]
    for step in (10, 20):
        folder = tmp_path / "dpo" / f"checkpoint-{step}"
        add_lora(load_model(llava), LoraArguments(use_lora=True, lora_r=2)).save_pretrained(folder)
        checkpoints.append(str(folder))
    out = tmp_path / "sweep"
    argv = ["--checkpoints", *checkpoints, "--benchmarks", str(tmp_path / "benchmarks.yaml"), "--tasks", "pope,seed"]
    argv += ["--output", str(out), "--max_new_tokens", "4", "--num_workers", "0", "--batch_size", "4"]
    sweep.main(argv)
    results = json.loads((out / "checkpoint-20/results.json").read_text())
    assert set(results) == {"pope", "seed"}
    assert results["pope"]["generation"]["max_new_tokens"] == 2 and results["seed"]["generation"]["max_new_tokens"] == 4
    assert (results["pope"]["step"], results["pope"]["adapter"]) == (20, checkpoints[2])
    assert {"curve.png", "report.md", "index.html"} <= {p.name for p in (out / "report").iterdir()}

    monkeypatch.setattr(sweep.Answerer, "answer", lambda *_: pytest.fail("answered again"))
    sweep.main(argv)  # everything is there


def test_sweep_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.yaml"
    file.write_text("pope: {data: x, beams: 3}\nother: {data: y}\n")
    with pytest.raises(InputError, match=r"has no entry 'mme'; it has pope, other"):
        sweep.read_benchmarks(str(file), "mme")
    with pytest.raises(InputError, match="no scorer is known for 'other'"):
        sweep.read_benchmarks(str(file), "other")
    with pytest.raises(InputError, match="pope has 'beams'; known are data_path, image_root, generate and score"):
        sweep.read_benchmarks(str(file), "pope")
    assert sweep.flags({"coco": "x", "quick": True, "no": False}) == ["--coco", "x", "--quick"]
    with pytest.raises(InputError, match="the same folder twice"):
        sweep.run_names(["a/b", "a/b"])


def test_likelihood_belongs_to_seed() -> None:
    with pytest.raises(InputError, match="variant of --task seed only"):
        choice.main(["--task", "mmmu", "--likelihood", "--data_path", "x", "--answers", "y"])


def test_equal_numbers_have_no_best(runs: list[Path]) -> None:
    found = report.read_runs(runs)
    for run in found:
        run.results = {"chair": dict(run.results["pope"], scores={"CHAIRs": 0.5, "CHAIRi": 0.25})}
    assert "**" not in report.markdown(found) and r"\textbf" not in report.latex(found)


def test_answers_without_yes_or_no_are_noted(runs: list[Path], tmp_path: Path) -> None:
    """The official rule takes them as yes: 66.7 without one clear answer."""
    answers = tmp_path / "pope.jsonl"
    answers.write_text(
        "".join(json.dumps({"id": f"random/{i + 1}", "answer": "A dog. Nothing else"}) + "\n" for i in range(72))
    )
    questions = GOLDENS / "pope/coco_pope_random.json"
    yesno.main(["--task", "pope", "--data_path", str(questions), "--answers", str(answers)])
    found = report.read_runs([tmp_path])
    assert found[0].results["pope"]["scores"]["mean/f1"] == pytest.approx(2 / 3)
    (note,) = [note for note in report.notes(found) if "neither yes nor no" in note]
    assert note.endswith(f"{found[0].name} 72 of 72")
    text = answers.read_text().replace("A dog. Nothing else", "Hm. Yes").replace("Yes", "No, none", 1)
    answers.write_text(text)
    yesno.main(["--task", "pope", "--data_path", str(questions), "--answers", str(answers)])
    assert not [note for note in report.notes(report.read_runs([tmp_path])) if "neither" in note]


@pytest.mark.parametrize("number", [3, 5, 9])
def test_the_legend_lies_below_the_bars(runs: list[Path], tmp_path: Path, monkeypatch, number: int) -> None:
    import matplotlib.pyplot as plt

    kept: list = []
    monkeypatch.setattr(plt, "close", kept.append)
    found = [report.Run(f"run {i}", runs[0], report.read_runs(runs[:1])[0].results) for i in range(number)]
    table = report.columns(found)
    report._small_multiples(found, table, report.cells(found, table), tmp_path / "bars.png", report._bars)
    (figure,) = kept
    (legend,) = figure.legends
    top = legend.get_window_extent().y1
    assert all(top <= axis.get_tightbbox().y0 for axis in figure.axes if axis.axison)
    monkeypatch.undo()
    plt.close(figure)


def test_bars_begin_at_zero_have_units_and_colours_for_everybody(runs: list[Path]) -> None:
    import matplotlib.pyplot as plt

    from common.pages import LIGHT

    report._pyplot()
    figure, axis = plt.subplots()
    found = report.read_runs(runs)
    for metric, values, top in (
        (report.HEADLINES["chair"][0], [0.0, 0.0, 0.0], 100),
        (report.HEADLINES["mme"][0], [5.0, 10.0, None], 11.5),
    ):
        axis.clear()
        report._bars(axis, found, values, metric)
        assert axis.get_ylim() == pytest.approx((0, top))
        assert [plt.matplotlib.colors.to_hex(bar.get_facecolor()) for bar in axis.patches] == list(LIGHT[:3])
    assert [m.unit for m in (report.HEADLINES["chair"][0], report.HEADLINES["mme"][0], report.HEADLINES["plain"][2])] == [
        "%", "points", "words per answer"
    ]  # fmt: skip
    plt.close(figure)
