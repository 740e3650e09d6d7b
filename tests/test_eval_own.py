"""The user's own questions: rules by hand, the table, and answers side by side without a rule."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from common.errors import InputError
from eval import own, report
from tests.fake_server import FakeServer, completion


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
        ("yesno", ["No."], "No.", True),  # as the answers of data sets are written
        ("yesno", ["Yes!"], "No.", False),
        ("choice", ["(b)"], "B", True),
        ("choice", ["B."], "A", False),
        ("choice", ["Four."], "B", True),
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
        (
            {"answer": "C", "choices": {"A": "x", "B": "y"}},
            None,
            "has the answer 'C', which is none of its choices A, B",
        ),
        ({"answer": "red"}, "yesno", "has the answer 'red', which the rule yesno cannot find"),
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


# -- a judge with a rubric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Good.\nScore: 7", 7.0),
        ("**Score:** 7.5/10", 7.5),
        ("Score: 3? No.\nscore: 10", 10.0),
        ("Score: 11", None),
        ("Score: -1", None),
        ("7", None),
        ("I would score it.", None),
    ],
)
def test_points_of_a_reply(reply: str, found: float | None):
    assert own.points(reply) == found


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    points = {"a dog": "A cat is there.\nScore: 2", "a cat": "Right.\nScore: 9"}
    server = FakeServer(lambda path, body: completion(next(v for k, v in points.items() if k in json.dumps(body))))
    yield server
    server.close()


def judged_run(folder: Path, data: Path, url: str, *flags: str) -> dict:
    file = folder / "plain.jsonl"
    file.write_text(
        "".join(json.dumps({"id": str(n), "answer": a}) + "\n" for n, a in enumerate(["a dog", "a cat", "yes"]))
    )
    argv = [
        "--data_path",
        str(data),
        "--image_root",
        str(folder),
        "--answers",
        str(file),
        "--judge",
        url,
        "--judge_model",
        "j",
    ]
    own.main([*argv, *flags])
    return json.loads((folder / "results.json").read_text())["plain"]


def test_a_judge_sees_the_picture_and_the_rubric(tmp_path: Path, judge: FakeServer):
    Image.new("RGB", (2000, 500), "red").save(tmp_path / "0.png")
    data, rubric = tmp_path / "questions.json", tmp_path / "rubric.txt"
    rows = [
        {"image": "0.png", "question": "What?", "rule": "judge", "category": "animals"},
        {"image": "0.png", "question": "What?", "rule": "judge", "rubric": "Cats {only}.", "answer": "cat"},
        {"image": "0.png", "question": "Is it?", "answer": "yes"},
    ]
    data.write_text(json.dumps(rows))
    rubric.write_text("Name the animal.")
    entry = judged_run(tmp_path, data, judge.url, "--rubric", str(rubric), "--judge_workers", "1")
    assert entry["scores"] == {"animals/judge_score": 2.0, "judge_score": 5.5, "accuracy": 1.0, "words": 5 / 3}
    assert entry["judge"]["rubric"] == "Name the animal." and entry["judge"]["model"] == "j"
    (first, text), (_, second) = (body["messages"][0]["content"] for body in judge.requests)
    picture = Image.open(io.BytesIO(base64.b64decode(first["image_url"]["url"].partition(",")[2])))
    assert picture.size == (1024, 256) and picture.getpixel((0, 0)) == (255, 0, 0)
    assert "Rubric: Name the animal." in text["text"] and "answer: a dog" in text["text"]
    assert "Rubric: Cats {only}." in second["text"] and "known: cat" in second["text"]
    reviews = [json.loads(line) for line in (tmp_path / "scored" / "plain.jsonl").read_text().splitlines()]
    assert reviews[1]["parsed"] == "9 of 10" and reviews[1]["review"].startswith("Right.")
    report.main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert "| own questions | judge, of 10 | words |" in (tmp_path / "report" / "report.md").read_text()


def test_a_judge_that_sees_no_pictures(tmp_path: Path, judge: FakeServer):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    data, rubric = tmp_path / "questions.json", tmp_path / "rubric.txt"
    data.write_text(
        json.dumps(
            [{"image": "0.png", "question": q, "rule": r} for q, r in [("a", "judge"), ("b", "judge"), ("c", "none")]]
        )
    )
    rubric.write_text("R")
    assert judged_run(tmp_path, data, judge.url, "--rubric", str(rubric), "--judge_text_only")["judge"]["text_only"]
    assert all(isinstance(body["messages"][0]["content"], str) for body in judge.requests)
    with pytest.raises(InputError, match="question 0 has the rule judge and no `rubric`: give --rubric FILE"):
        judged_run(tmp_path, data, judge.url)


def test_a_judge_without_points_is_an_error():
    replies = iter(["fine", "fine", "Score: 4"])
    assert own.grade(question(), "a", "R", own.RUBRIC_PROMPT, lambda *_, **__: next(replies), []) == (4.0, "Score: 4")
    with pytest.raises(InputError, match=r'question 0 no "Score: N" from 0 to 10 in 5 replies, the last was \'fine\''):
        own.grade(question(), "a", "R", own.RUBRIC_PROMPT, lambda *_, **__: "fine", [])
