"""The judge client against a local server that misbehaves, and the judged commands from files to results.json."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import InputError
from eval import judged, mathvista
from eval.files import read_records
from eval.judge import Judge, ask_all
from tests.fake_server import FakeServer, completion

GOLDENS = Path(__file__).parent / "goldens" / "eval"
KEY = "sk-test-0123456789"


class FakeJudge(FakeServer):
    """An endpoint whose replies `reply_to(prompt)` makes."""

    def __init__(self) -> None:
        self.reply_to: Callable[[str], str] = lambda prompt: f"reply to {prompt}"
        super().__init__(lambda path, body: completion(self.reply_to(body["messages"][0]["content"])))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeJudge()
    yield fake
    fake.close()


def client(server: FakeJudge, tmp_path: Path, **changes: object) -> Judge:
    return Judge(server.url, "judge-1", tmp_path / "cache.jsonl", **{"pause": 0.01, "timeout": 5.0, **changes})


def test_every_reply_is_asked_once_and_cached_by_content(server: FakeJudge, tmp_path: Path) -> None:
    judge = client(server, tmp_path)
    assert judge.ask("a") == "reply to a" and judge.ask("a") == "reply to a"
    judge.ask("a", temperature=0.5)
    judge.ask("a", sample=1)
    assert len(server.requests) == 3
    again = client(server, tmp_path)
    assert again.ask("a") == "reply to a" and len(server.requests) == 3
    other = Judge(server.url, "judge-2", tmp_path / "cache.jsonl", pause=0.01)
    other.ask("a")  # another model is another judge
    assert len(server.requests) == 4 and server.requests[-1]["model"] == "judge-2"
    for picture in ("one", "two", "one"):  # the same question about another picture is another question
        judge.ask("a", pictures=[f"data:image/png;base64,{picture}"])
    assert len(server.requests) == 6


def test_grades_of_mmvet_stand_at_their_answers() -> None:
    def ask(prompt: str, *, temperature: float = 0.0, sample: int = 0, **_: object) -> str:
        return str({"first": 0.1, "second": 0.5, "third": 0.9}[prompt] + sample / 100)

    rows = [{"question": "", "label": ""}] * 3
    grades = judged.review_mmvet(rows, ["first", "second", "third"], ask, "{answer}", runs=2, workers=2)
    assert grades == [pytest.approx(pair) for pair in ([0.1, 0.11], [0.5, 0.51], [0.9, 0.91])]


@pytest.mark.parametrize(
    "trouble", [[429], [500, 502, 503], ["broken"], ["cut"], [{"choices": []}], ["slow"], [429, "broken", 500, "slow"]]
)
def test_trouble_is_tried_again(server: FakeJudge, tmp_path: Path, trouble: list) -> None:
    server.script = list(trouble)
    assert client(server, tmp_path, timeout=3).ask("a") == "reply to a"
    assert len(server.requests) == len(trouble) + 1


def test_lasting_trouble_keeps_what_was_answered(server: FakeJudge, tmp_path: Path) -> None:
    judge = client(server, tmp_path, attempts=3)
    judge.ask("first")
    server.script = [500, 500, 503]
    with pytest.raises(InputError, match=r"failed 3 times, last with HTTP 503 .*; the replies so far are kept in"):
        judge.ask("second")
    assert len(read_records(tmp_path / "cache.jsonl")) == 1


@pytest.mark.parametrize(
    "status, hint",
    [(401, "JUDGE_API_KEY"), (404, "ends in /v1"), (302, "which is not followed"), (307, "which is not followed")],
)
def test_refusals_are_not_repeated(server: FakeJudge, tmp_path: Path, status: int, hint: str) -> None:
    server.script = [status] * 5
    with pytest.raises(InputError, match=rf"answered {status} .*{hint}"):
        client(server, tmp_path).ask("a")
    assert len(server.requests) == 1  # a redirect would have carried the key elsewhere


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"failed 2 times, last with .*refused"):
        Judge("http://127.0.0.1:9/v1", "m", tmp_path / "c.jsonl", attempts=2, pause=0.01).ask("a")
    with pytest.raises(InputError, match="not an address"):
        Judge("localhost:8000", "m", tmp_path / "c.jsonl")


def test_torn_cache_line_is_asked_again(server: FakeJudge, tmp_path: Path) -> None:
    client(server, tmp_path).ask("a")
    client(server, tmp_path).ask("b")
    cache = tmp_path / "cache.jsonl"
    cache.write_text(cache.read_text()[:-10])
    judge = client(server, tmp_path)
    assert judge.ask("a") == "reply to a" and judge.ask("b") == "reply to b"
    assert len(server.requests) == 3 and len(read_records(cache)) == 2


def test_many_at_a_time_stay_in_order(server: FakeJudge, tmp_path: Path) -> None:
    judge = client(server, tmp_path)
    prompts = [str(i) for i in range(40)]
    assert ask_all(judge.ask, prompts, workers=8) == [f"reply to {i}" for i in prompts]
    assert len(read_records(tmp_path / "cache.jsonl")) == 40


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, argv)])
    main()


def test_key_is_sent_and_stored_nowhere(
    server: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    server.reply_to = lambda prompt: "Rating: 4"
    folder = GOLDENS / "mmhal"
    argv = (
        "--task",
        "mmhal",
        "--data_path",
        folder / "mmhal-bench_answer_template.json",
        "--answers",
        folder / "answers.jsonl",
    )
    argv += ("--output", tmp_path, "--judge", server.url, "--judge_model", "judge-1")
    run(monkeypatch, judged.main, *argv)
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers) and len(server.headers) == 96
    results = json.loads((tmp_path / "results.json").read_text())["mmhal"]
    assert results["scores"]["average_score"] == 4 and results["scores"]["hallucination_rate"] == 0
    assert results["judge"]["model"] == "judge-1" and results["judge"]["prompt"] == "built in"
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file()) + "".join(capfd.readouterr())
    assert "sk-test" not in written and "Bearer" not in written
    run(monkeypatch, judged.main, *argv)
    assert len(server.headers) == 96  # all from the cache


def test_mmvet_command_repeats_what_does_not_parse(
    server: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reply_to = lambda prompt: "0.5" if prompt.endswith("Correctness:") and "nothing else" in prompt else "good"
    folder = GOLDENS / "mmvet"
    argv = (
        "--task",
        "mmvet",
        "--data_path",
        folder / "mm-vet.json",
        "--answers",
        folder / "answers.json",
        "--num_run",
        2,
    )
    run(monkeypatch, judged.main, *argv, "--output", tmp_path, "--judge", server.url, "--judge_model", "j")
    results = json.loads((tmp_path / "results.json").read_text())["mmvet"]
    assert (results["scores"]["total"], results["scores"]["std"]) == (50.0, 0.0)
    assert len(server.requests) == 27 * 2 * 2  # two runs, each asked twice, none answered from the other's cache
    assert {r["temperature"] for r in server.requests} == {0.0, 0.5}


def test_refomb_command(server: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "image_url": f"http://x/{i}.jpg",
            "question": f"Q{i}",
            "description": f"D{i}",
            "type": "OCR",
            "id": i,
            "answer": "",
        }
        for i in range(3)
    ]
    data, reference, answers = tmp_path / "dev.jsonl", tmp_path / "gpt4v.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    reference.write_text("".join(json.dumps(r | {"answer": f"ref {r['id']}"}) + "\n" for r in reversed(rows)))
    answers.write_text("".join(json.dumps({"id": str(i), "answer": f"mine {i}"}) + "\n" for i in range(3)))

    def reply(prompt: str) -> str:
        if "Review:" in prompt:
            return "[[C]]"
        i = int(prompt.split("Question: Q")[1][0])
        assert f"model A: ref {i}" in prompt and f"model B: mine {i}" in prompt and f"Description: D{i}" in prompt
        return f"thoughts [[{'ABC'[i]}]]"

    server.reply_to = reply
    argv = ("--task", "refomb", "--data_path", data, "--answers", answers, "--judge", server.url, "--judge_model", "j")
    with pytest.raises(InputError, match="pass --reference"):
        run(monkeypatch, judged.main, *argv)
    run(monkeypatch, judged.main, *argv, "--reference", reference)
    scores = json.loads((tmp_path / "results.json").read_text())["refomb"]["scores"]
    assert (scores["win_rate"], scores["trustworthiness"], scores["win"], scores["loss"]) == (0.5, 0.5, 1, 1)


def test_mathvista_command_asks_only_what_the_rule_leaves(
    server: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GOLDENS / "mathvista"
    argv = ("--data_path", folder / "testmini.json", "--answers", folder / "responses.json", "--output", tmp_path)
    expected = json.loads((folder / "expected.json").read_text())["runs"]["no_llm"]
    run(monkeypatch, mathvista.main, *argv)
    assert json.loads((tmp_path / "results.json").read_text())["mathvista_rule"]["scores"]["average"] == 0.25
    server.reply_to = lambda prompt: ""
    run(monkeypatch, mathvista.main, *argv, "--judge", server.url, "--judge_model", "j", "--judge_workers", 2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"mathvista_rule", "mathvista"}
    assert results["mathvista"]["scores"] == results["mathvista_rule"]["scores"]
    assert len(server.requests) == len(expected["llm_asked"])


def test_own_prompt_needs_its_fields(server: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Rate {answer}")
    folder = GOLDENS / "mmhal"
    argv = (
        "--task",
        "mmhal",
        "--data_path",
        folder / "mmhal-bench_answer_template.json",
        "--answers",
        folder / "answers.jsonl",
    )
    argv += ("--output", tmp_path, "--judge", server.url, "--judge_model", "j", "--judge_prompt", prompt)
    with pytest.raises(
        InputError, match=r"prompt\.txt has no \{question\}; the prompt needs question gt_answer answer"
    ):
        run(monkeypatch, judged.main, *argv)
