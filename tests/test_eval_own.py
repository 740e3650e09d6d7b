"""The user's own questions: rules by hand, the table, and answers side by side without a rule."""

import json
import re
from pathlib import Path

import pytest

from common.errors import InputError
from eval import own, report


def question(n: int = 0, **fields: object) -> dict:
    return {"id": str(n), "images": [], "question": "Q", **fields}


@pytest.mark.parametrize(
    ("rule", "right", "answer", "correct"),
    [
        ("exact", ["green"], "The green.", True),
        ("exact", ["green"], "It is green", False),
        ("exact", ["red", "green"], "GREEN", True),
        ("contains", ["green"], "It is green, I think", True),
        ("contains", ["green"], "It is greenish", False),
        ("contains", ["dark green"], "a dark, green bar", True),
        ("contains", ["green"], "", False),
        ("choice", ["B"], "B", True),
        ("choice", ["B"], "The answer is B.", True),
        ("choice", ["B"], "(A)", False),
        ("choice", ["four"], "B", True),  # `answer` is the option's text
        ("choice", ["B"], "four", True),  # and so is what is said
        ("choice", ["B"], "no idea", False),
        ("yesno", ["yes"], "Yes, there is.", True),
        ("yesno", ["yes"], "yes or no", False),
        ("yesno", ["No"], "no", True),
    ],
)
def test_rules_by_hand(rule: str, right: list[str], answer: str, correct: bool):
    row = question(answer=right, choices={"A": "three", "B": "four"})
    scores, (detail,) = own.score([row], [answer], rule)
    assert detail["correct"] is correct and scores["accuracy"] == correct


def test_options_may_be_a_list():
    assert own.score([question(answer="B", choices=["three", "four"])], ["B"])[0]["accuracy"] == 1


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "none"),
        ({"answer": ""}, "none"),
        ({"answer": "green"}, "contains"),
        ({"answer": "Yes."}, "yesno"),
        ({"answer": ["no"]}, "yesno"),
        ({"answer": "A", "choices": {"A": "x"}}, "choice"),
        ({"answer": "green", "rule": "exact"}, "exact"),
    ],
)
def test_the_rule_of_a_question(fields: dict, rule: str):
    assert own.rule_of(question(**fields), None) == rule


@pytest.mark.parametrize(
    ("fields", "given", "sentence"),
    [
        ({}, "exact", "question 0 has no `answer`, which the rule exact reads"),
        ({"answer": "A"}, "choice", "has no `choices`"),
        ({"answer": "A", "rule": "fuzzy"}, None, "has the rule 'fuzzy': one of exact"),
    ],
)
def test_rules_that_cannot_be(fields: dict, given: str | None, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        own.rule_of(question(**fields), given)


def run_of(folder: Path, data: Path, answers: list[str]) -> Path:
    (folder / "eval").mkdir(parents=True)
    file = folder / "eval" / "plain.jsonl"
    file.write_text("".join(json.dumps({"id": str(n), "answer": a}) + "\n" for n, a in enumerate(answers)))
    own.main(["--data_path", str(data), "--answers", str(file)])
    return folder


def test_from_the_command_line_to_the_report(tmp_path: Path):
    data = tmp_path / "questions.json"
    rows = [
        {"question": "Which?", "answer": "green", "category": "colours"},
        {"question": "Is it?", "answer": "yes"},
        {"question": "Describe."},
    ]
    data.write_text(json.dumps(rows))
    runs = [run_of(tmp_path / "a", data, ["green", "no", "x y z"]), run_of(tmp_path / "b", data, ["green", "yes", "x"])]
    scores = json.loads((runs[0] / "eval" / "results.json").read_text())["plain"]["scores"]
    assert scores == {"accuracy": 0.5, "colours/accuracy": 1.0, "words": 5 / 3}
    report.main([*map(str, runs), "--output", str(tmp_path / "report")])
    assert "| own questions | words |" in (tmp_path / "report" / "report.md").read_text()
    assert "| b | **100.0** | 1.0 |" in (tmp_path / "report" / "report.md").read_text().replace("1.00", "1.0")


def test_without_any_rule_the_answers_stand_side_by_side(tmp_path: Path):
    data = tmp_path / "questions.json"
    data.write_text(json.dumps([{"question": "Describe."}]))
    runs = [run_of(tmp_path / name, data, [f"said by {name}"]) for name in "ab"]
    report.main([*map(str, runs), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "index.html").read_text()
    (shown,) = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["benchmarks"]
    (row,) = shown["rows"]
    assert [row["runs"][str(i)]["answer"] for i in range(2)] == ["said by a", "said by b"]
    assert row["runs"]["0"]["correct"] is None and row["question"] == "Describe."
