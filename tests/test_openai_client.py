"""The client of inference servers, against a server on localhost that misbehaves."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from base.images import load_image
from common.errors import InputError
from common.openai_client import OpenAIClient, Refused, Unavailable, chat_body
from models import core_mapper_for
from tests.fake_server import FakeServer, completion

KEY = "sk-test-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeServer(lambda path, body: completion(body["messages"][0]["content"].upper()))
    yield fake
    fake.close()


def client(server: FakeServer, **changes: object) -> OpenAIClient:
    return OpenAIClient(server.url, **{"pause": 0.01, "timeout": 5.0, **changes})  # type: ignore[arg-type]


def body(text: str, **fields: object) -> dict:
    return chat_body("tiny", [{"role": "user", "content": text}], max_tokens=4, **fields)  # type: ignore[arg-type]


def texts(client: OpenAIClient, *asked: str) -> list[str]:
    return [reply.answers[0].text for reply in client.chat_all(body(text) for text in asked)]


def test_replies_come_in_order_some_at_a_time(server: FakeServer) -> None:
    plain = server.reply
    server.reply = lambda path, body: (time.sleep(0.02), plain(path, body))[1]
    asked = [f"question {n}" for n in range(12)]
    assert texts(client(server, at_once=3), *asked) == [text.upper() for text in asked]
    assert server.most_at_once == 3
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("trouble", [[429], [500, 503], ["broken"], ["cut"], [{"choices": []}], ["slow"], [408, "cut"]])
def test_trouble_is_tried_again(server: FakeServer, trouble: list) -> None:
    server.script = list(trouble)
    assert texts(client(server, timeout=1.0 if "slow" in trouble else 5.0), "a") == ["A"]
    assert len(server.requests) == len(trouble) + 1


def test_a_server_that_comes_back_is_waited_for(server: FakeServer) -> None:
    port = server.server.server_port
    server.close()
    ask = OpenAIClient(f"http://127.0.0.1:{port}/v1", pause=0.01, attempts=2)
    with pytest.raises(Unavailable, match=r"the server http://127\.0\.0\.1:\d+/v1 failed 2 times, last with connection refused"):  # fmt: skip
        texts(ask, "a")


def test_what_was_answered_is_kept_when_a_later_request_fails(server: FakeServer) -> None:
    server.script = [None, None, 400]
    got: dict[int, str] = {}
    with pytest.raises(Refused, match=r"answered 400 Bad Request \(no\): check --url") as refused:
        client(server, at_once=1).chat_all((body(str(n)) for n in range(9)), lambda n, r: got.update({n: r.answers[0].text}))  # fmt: skip
    assert got == {0: "0", 1: "1"} and refused.value.status == 400
    assert len(server.requests) == 3  # the others were not sent


def test_fields_that_a_server_refuses_are_left_out(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    strict = server.reply

    def reply(path: str, body: dict) -> object:
        unknown = [name for name in ("return_token_ids", "return_tokens_as_token_ids") if name in body]
        if unknown:
            return 400, {"error": {"message": f"Unknown parameter: {unknown[0]}"}}
        return strict(path, body)

    server.reply = reply
    ask = client(server, at_once=1)
    assert texts(ask, "a", "b") == ["A", "B"]
    assert len(server.requests) == 4  # two refusals, then both questions without
    assert server.requests[-1]["logprobs"] is True
    assert caplog.text.count("does not take return_token_ids: left out") == 1
    server.reply = lambda path, body: (400, {"detail": "max_tokens is too large"})
    with pytest.raises(Refused, match="max_tokens is too large"):  # of a field that is needed
        texts(ask, "a")


def test_tokens_and_their_log_probs(server: FakeServer) -> None:
    """vLLM gives ids beside the text, or in the place of the tokens; log-probs without ids belong to no token."""
    content = [{"token": "token_id:7", "logprob": -0.5}, {"token": "token_id:2", "logprob": -1.25}]
    server.reply = lambda path, body: {
        "usage": {"prompt_tokens": 3},
        "prompt_token_ids": [1, 5, 6],
        "choices": [
            {"index": 1, "message": {"content": "b"}, "finish_reason": "length", "token_ids": [8]},
            {"index": 0, "message": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": content}},
        ],
    }
    (reply,) = client(server).chat_all([body("q", num_answers=2, seed=5, temperature=0.5)], num_answers=2)
    assert (reply.prompt_tokens, reply.prompt_ids) == (3, [1, 5, 6])
    first, second = reply.answers
    assert (first.token_ids, first.logps, first.ended) == ([7, 2], [-0.5, -1.25], True)
    assert (second.token_ids, second.logps, second.ended) == ([8], None, False)
    asked = server.requests[0]
    assert (asked["n"], asked["seed"], asked["temperature"], asked["return_token_ids"]) == (2, 5, 0.5, True)
    for token in content:
        token["token"] = "word"
    (reply,) = client(server).chat_all([body("q")], num_answers=2)
    assert reply.answers[0].token_ids is None and reply.answers[0].logps is None
    with pytest.raises(Unavailable, match="failed 2 times, last with 2 of 3 answers"):
        client(server, attempts=2).chat_all([body("q", num_answers=3)], num_answers=3)


def test_the_model_that_is_served(server: FakeServer) -> None:
    assert client(server).served_model() == "tiny"
    server.models = []
    with pytest.raises(InputError, match="serves no model"):
        client(server).served_model()
    with pytest.raises(InputError, match=r"--rollout_url localhost:8000 is not an address"):
        OpenAIClient("localhost:8000", flag="--rollout_url")


def test_messages_of_a_row(llava: str, tmp_path: Path) -> None:
    """Pictures stand where the template puts them, as files of the same pixels: a JPEG that is turned comes upright."""
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((20, 10), 90).convert("RGB").save(path, exif=exif)
    processor = core_mapper_for(llava).processor(llava)
    (message,) = processor.api_messages([{"role": "user", "content": "<image>\nWhat?"}], [str(path)])
    picture, text = message["content"]
    assert text == {"type": "text", "text": "What?"}
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert sent.size == (10, 20) and sent.tobytes() == load_image(str(path)).tobytes()
    json.dumps(message)
