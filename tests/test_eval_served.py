"""eval.generate --url: a server's answers are those of the checkpoint, what it has answered is kept, wrong servers are told."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import InputError
from eval import generate, served
from tests import zoo
from tests.fake_server import FakeServer, completion, seed_file
from tests.tiny_server import TinyServer

WORDS = ["dog", "cat", "red square", "table"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A POPE file: four questions about two images."""
    folder = tmp_path_factory.mktemp("pope")
    for i in range(2):
        zoo.image(i).save(folder / f"{i}.png")
    rows = [
        {"question_id": n, "image": f"{n % 2}.png", "text": f"Is there a {word} in the image?", "label": "yes"}
        for n, word in enumerate(WORDS)
    ]
    file = folder / "coco_pope_random.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tiny(llava: str) -> Iterator[TinyServer]:
    server = TinyServer(llava)
    yield server
    server.close()


@pytest.fixture
def server(tiny: TinyServer, monkeypatch: pytest.MonkeyPatch) -> TinyServer:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tiny.script, tiny.reply, tiny.requests[:] = [], tiny.route, []
    return tiny


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives up at once."""
    plain = served.OpenAIClient
    monkeypatch.setattr(served, "OpenAIClient", lambda url, **kw: plain(url, **kw, pause=0.01, attempts=2))


def answers(questions: Path, output: Path, *more: object) -> list[dict]:
    line = ["--task", "pope", "--data_path", questions, "--output", output, "--max_new_tokens", 6, "--num_workers", 0]
    generate.main([str(word) for word in (*line, *more)])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_server_gives_the_answers_of_the_checkpoint(server, llava, questions, tmp_path):
    """Token for token: text, order and all other columns; and the file says where they come from."""
    here = answers(questions, tmp_path / "here.jsonl", "--model_name_or_path", llava)
    there = answers(questions, tmp_path / "there.jsonl", "--model_name_or_path", llava, "--url", server.url)
    assert there == here and len({row["answer"] for row in here}) > 1
    meta = json.loads((tmp_path / "there.meta.json").read_text())
    assert meta["url"] == server.url and meta["generation"]["served_model"] == "tiny" and meta["weights"]
    asked = server.requests[0]
    assert asked["temperature"] == 0 and asked["repetition_penalty"] == 1 and "seed" not in asked
    answers(
        questions, tmp_path / "own.jsonl", "--model_name_or_path", llava, "--url", server.url, "--checkpoint_settings"
    )
    assert "repetition_penalty" not in server.requests[-1]


def test_samples(server, llava, questions, tmp_path):
    more = ("--model_name_or_path", llava, "--url", server.url, "--temperature", 1, "--num_samples", 2, "--seed", 5)
    rows = answers(questions, tmp_path / "a.jsonl", *more)
    assert all(row["answer"] == row["answers"][0] != row["answers"][1] for row in rows)
    assert sorted(body["seed"] for body in server.requests) == [5, 6, 7, 8]
    decided = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # else a server takes the checkpoint's
    assert all(body.items() >= decided.items() for body in server.requests)
    server.requests[:] = []
    answers(questions, tmp_path / "b.jsonl", *more, "--checkpoint_settings")
    assert server.requests and not any(decided.keys() & body.keys() for body in server.requests)


def test_a_run_goes_on_where_the_server_failed(server, impatient, llava, questions, tmp_path):
    more = ("--model_name_or_path", llava, "--url", server.url, "--batch_size", 1)
    whole = answers(questions, tmp_path / "whole.jsonl", *more)
    server.script, server.requests[:] = [None, None, 503, 503], []
    with pytest.raises(
        InputError, match=r"failed 2 times, last with HTTP 503 \(no\); the rows so far are kept, run the command again"
    ):
        answers(questions, tmp_path / "a.jsonl", *more)
    server.requests[:] = []
    assert answers(questions, tmp_path / "a.jsonl", *more) == whole and len(server.requests) == 2


def test_another_model_is_noticed(server, questions, tmp_path, llava):
    server.reply = lambda path, body: server.route(path, body | {"add_special_tokens": False})
    with pytest.raises(
        InputError, match=r"row 'random/\d': the prompt has \d+ tokens, \d+ here, as http.*: serve the checkpoint"
    ):
        answers(questions, tmp_path / "a.jsonl", "--model_name_or_path", llava, "--url", server.url)


def test_likelihood(server, llava, tmp_path):
    """The losses of a SEED question's choices, end token included, are those of our packed pass."""
    data = seed_file(tmp_path)
    line = f"--task seed --data_path {data} --image_root {tmp_path} --likelihood --model_name_or_path {llava} --num_workers 0"

    def losses(output: Path, more: str) -> list[float]:
        generate.main(f"{line} --output {output} {more}".split())
        return json.loads(output.read_text())["losses"]

    here = losses(tmp_path / "here.jsonl", "")
    assert losses(tmp_path / "there.jsonl", f"--url {server.url}") == pytest.approx(here, abs=1e-5)
    server.reply = lambda path, body: {k: v for k, v in server.route(path, body).items() if k != "prompt_logprobs"}
    with pytest.raises(InputError, match="gives no log-probs of prompts"):
        losses(tmp_path / "none.jsonl", f"--url {server.url}")
    server.reply = lambda path, body: _after_sampling(server.route(path, body))
    with pytest.raises(InputError, match="log-probs after sampling's changes"):
        losses(tmp_path / "processed.jsonl", f"--url {server.url}")
    with pytest.raises(InputError, match="needs --model_name_or_path"):
        generate.main(
            [
                *line.replace(f"--model_name_or_path {llava}", "").split(),
                "--output",
                str(tmp_path / "x"),
                "--url",
                server.url,
            ]
        )


def _after_sampling(reply: dict) -> dict:
    for token in reply["choices"][0]["logprobs"]["content"]:
        token["logprob"] = 0.0
    return reply


def test_a_hosted_model_of_which_nothing_is_known(questions, tmp_path, monkeypatch):
    """No checkpoint: pictures stand in front of the question, and fields that are not OpenAI's are left out after a refusal."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    known = {"model", "messages", "n", "max_tokens", "temperature", "top_p", "logprobs"}

    def reply(path: str, body: dict) -> object:
        if unknown := [name for name in body if name not in known]:
            return 400, {"error": {"message": f"Unknown parameter: '{unknown[0]}'."}}
        return completion(f" {body['messages'][0]['content'][1]['text']} ")

    fake = FakeServer(reply)
    rows = answers(questions, tmp_path / "a.jsonl", "--url", fake.url, "--served_model", "gpt-x")
    fake.close()
    assert [row["answer"] for row in rows] == [row["prompt"] for row in rows]
    picture, text = fake.requests[-1]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["type"] == "text"
    assert json.loads((tmp_path / "a.meta.json").read_text())["checkpoint"] == "gpt-x"


def test_pictures_stand_at_their_marks(image_dir):
    (message,) = served.plain_messages("<image> and <image>?", [str(image_dir / f"{i}.png") for i in range(2)])
    assert [part["type"] for part in message["content"]] == ["image_url", "text", "image_url", "text"]


@pytest.mark.parametrize(
    "more, message",
    [
        ("", "give --model_name_or_path, a checkpoint, hub id or adapter folder, or the --url of a server"),
        ("--served_model x --model_name_or_path m", "--served_model names a model of --url"),
        ("--url http://x/v1 --served_model x --num_beams 3", "--num_beams is nothing that a server takes"),
        ("--url http://x/v1 --served_model x --num_samples 3", "--num_samples 3 needs --temperature above 0"),
        ("--url http://x/v1 --served_model x --top_p .5", "--top_p belongs to sampling"),
        ("--url x:8000", "--url x:8000 is not an address"),
    ],
)
def test_flags(questions, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        answers(questions, tmp_path / "a.jsonl", *more.split())
