"""The client of inference servers, against a server on localhost that misbehaves."""

import base64
import io
import json
import re
import subprocess
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
    with pytest.raises(Unavailable, match="failed 2 times, last with 2 answers, 1 asked for"):
        client(server, attempts=2).chat_all([body("q")])


def test_answers_that_are_missing_are_asked_for(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp and transformers serve give one answer, however many are wanted; some refuse `n`. Every request has a seed of its own."""
    server.reply = lambda path, body: completion(f"answer to {body.get('seed')}")
    ask = client(server, at_once=1)
    (reply,) = ask.chat_all([body("q", num_answers=3, seed=5, temperature=1.0)], num_answers=3)
    asked = [(request["n"], request["seed"]) for request in server.requests]
    assert (
        [n for n, _ in asked] == [3, 2, 1] and asked[0][1] == 5 and len(dict(asked)) == len({s for _, s in asked}) == 3
    )
    assert [answer.text for answer in reply.answers] == [f"answer to {seed}" for _, seed in asked]
    ask.chat_all([body("q", num_answers=2)], num_answers=2)
    assert caplog.text.count("gives fewer answers to a request than it is asked for") == 1
    one = completion("one")
    server.reply = lambda path, body: (422, {"detail": "Unexpected keys: n"}) if "n" in body else one
    (reply,) = client(server, at_once=1).chat_all([body("q", num_answers=2)], num_answers=2)
    assert [answer.text for answer in reply.answers] == ["one", "one"]


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"response_token_ids": [7, 2]}, ("a", [7, 2], None, True)),  # SGLang
        ({"index": None}, ("a", None, None, True)),
        ({"token_ids": ["7", "2"]}, ("a", [7, 2], None, True)),
        ({"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}, ("ab", None, None, True)),
        ({"message": {"content": None, "reasoning_content": "hm"}}, ("", None, None, True)),
        ({"finish_reason": None}, ("a", None, None, True)),
        ({"finish_reason": "max_tokens"}, ("a", None, None, False)),
        ({"logprobs": None}, ("a", None, None, True)),
        ({"logprobs": {"content": None, "tokens": ["a"]}}, ("a", None, None, True)),
        ({"logprobs": {"content": [{"token": "a", "logprob": -1.0}]}, "token_ids": [7, 2]}, ("a", [7, 2], None, True)),
    ],
)  # fmt: skip
def test_replies_of_other_servers(server: FakeServer, changes: dict, found: tuple) -> None:
    reply = completion("a")
    reply["choices"][0] |= changes
    server.reply = lambda path, body: reply
    (reply_,) = client(server).chat_all([body("q")])
    (answer,) = reply_.answers
    assert (answer.text, answer.token_ids, answer.logps, answer.ended) == found


def test_who_does_not_say_why_an_answer_ends_is_named(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    server.reply = lambda path, body: {"choices": [{"message": {"content": "a"}}], "usage": None}
    assert texts(client(server), "q", "r") == ["a", "a"]
    assert caplog.text.count("does not say why an answer ends (finish_reason)") == 1


def test_a_server_that_does_not_sample_is_named(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """transformers serve is greedy at any temperature, unless generation_config.json says do_sample."""
    server.reply = lambda path, body: completion(body["messages"][0]["content"], "b")
    client(server, at_once=1).chat_all([body(text) for text in "a" + "b" * 20], num_answers=2)
    assert "does it sample" not in caplog.text
    client(server, at_once=1).chat_all([body("b")] * 20, num_answers=2)
    assert caplog.text.count("has answered 8 times with equal answers to one prompt: does it sample") == 1


@pytest.mark.parametrize(
    "reply, said",
    [
        ({"error": {"message": "out of\nmemory"}}, r"a reply without an answer: out of memory$"),
        ({"choices": None}, r"a reply without an answer: '\{\"choices\": null\}'$"),
        ([], r"a reply that cannot be read \('\[\]'\)$"),
        (b"<html> Please log in </html>", r"a reply that cannot be read \('<html> Please log in </html>'\)$"),
        ({"choices": [{"index": 0, "text": "a completion"}]}, "a reply that cannot be read"),
        ({"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}, r"broken off \(finish_reason abort\)"),
        (completion("a", prompt_token_ids=["x"]), "a reply that cannot be read"),
        ((503, {"error": {"message": "loading"}}), r"HTTP 503 \(loading\)$"),
    ],
)
def test_replies_that_are_none(server: FakeServer, reply: object, said: str) -> None:
    """Asked for once more, then one sentence with the server's words."""
    server.reply = lambda path, body: reply
    with pytest.raises(Unavailable, match=f"failed 2 times, last with.*{said}"):
        texts(client(server, attempts=2), "q")
    assert len(server.requests) == 2


def test_log_probs_that_are_no_numbers(server: FakeServer) -> None:
    token = {"token": "token_id:7", "logprob": float("-inf")}
    reply = completion("a")
    reply["choices"][0]["logprobs"] = {"content": [token]}
    server.reply = lambda path, body: reply
    with pytest.raises(Unavailable, match="last with a log-prob of -inf"):
        texts(client(server, attempts=2), "q")


def test_words_that_end_it_at_once(server: FakeServer) -> None:
    """vLLM answers 500 to an adapter that it cannot load."""
    server.reply = lambda path, body: (500, {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16."}})
    ask = client(server, final=re.compile("lora", re.IGNORECASE), hints={500: "raise it"})
    with pytest.raises(Refused, match=r"answered 500 Internal Server Error \(LoRA rank 64 .* 16\.\): raise it$"):
        texts(ask, "q")
    assert len(server.requests) == 1


def test_a_server_that_hangs_is_left_before_one_that_is_down(server: FakeServer) -> None:
    server.script = ["slow"] * 9
    with pytest.raises(Unavailable, match=r"failed 2 times, last with no answer within 0\.2 s"):
        texts(client(server, timeout=0.2, timeouts=2), "q")


# ------------------------------------------------------------------------------------------------ addresses and keys


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "ftp://h/v1", "http://::1:8000/v1", "http://h:port/v1", "http://h:99999/v1"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match=r"--rollout_url .* is not an address.*write e\.g\. http://localhost:8000/v1"):
        OpenAIClient(url, flag="--rollout_url")


def test_addresses_in_other_forms(server: FakeServer) -> None:
    assert OpenAIClient(f" {server.url}/ ").url == server.url
    with pytest.raises(InputError, match=r"paths are added to the address, which has no \?"):
        OpenAIClient(f"{server.url}?api-version=1")
    try:
        other = FakeServer(server.reply, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    try:
        assert other.url.startswith("http://[::1]:") and texts(client(other), "a") == ["A"]
    finally:
        other.close()


def test_a_redirect_is_named_and_not_followed(server: FakeServer) -> None:
    server.script = [307]
    with pytest.raises(Refused, match=rf"answered 307 Temporary Redirect .*sends on to {server.url}/elsewhere, which is not followed"):  # fmt: skip
        texts(client(server), "a")
    assert len(server.requests) == 1


def test_proxies_of_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not asked for this machine's own addresses; for others they are, and messages say so."""
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    for host in ("127.0.0.1", "localhost"):
        assert texts(OpenAIClient(server.url.replace("127.0.0.1", host)), "a") == ["A"]
    assert server.paths == ["/v1/chat/completions"] * 2
    assert texts(OpenAIClient("http://server.invalid/v1"), "a") == ["A"]
    assert server.paths[2] == "http://server.invalid/v1/chat/completions"
    server.script = [403]
    with pytest.raises(Refused, match=r"http://server\.invalid/v1, through the proxy of the environment, answered 403"):
        texts(OpenAIClient("http://server.invalid/v1"), "a")
    monkeypatch.setenv("http_proxy", "socks9://127.0.0.1:1")
    with pytest.raises(InputError, match=r"proxy of the environment .* cannot be used for http://server\.invalid/v1: "):
        texts(OpenAIClient("http://server.invalid/v1"), "a")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed one with its key, for 127.0.0.1."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout {file}.key -out {file}"
    subprocess.run(command.split(), check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.key").read_text())
    return file


def test_certificates(server: FakeServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody has signed is refused at once, and taken where SSL_CERT_FILE names it; http is no https."""
    safe = FakeServer(server.reply, certificate=certificate)
    try:
        with pytest.raises(
            InputError, match=r"its certificate is not trusted \(self-signed certificate\): .*SSL_CERT_FILE"
        ):
            texts(client(safe), "a")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert texts(client(safe), "a") == ["A"]
        with pytest.raises(InputError, match=r"it speaks no TLS: write http:// in place of https://"):
            texts(OpenAIClient(server.url.replace("http:", "https:")), "a")
        assert server.requests[1:] == []
    finally:
        safe.close()


def test_keys(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line break that a file leaves behind a key is none of it. Without one nothing is sent, and the server's refusal names the variable."""
    monkeypatch.setenv("SERVER_API_KEY", f" {KEY}\n")
    texts(client(server), "a")
    monkeypatch.setenv("SERVER_API_KEY", "schlüssel")
    with pytest.raises(InputError, match=r"SERVER_API_KEY is not a key: it has spaces or letters") as said:
        client(server)
    assert "schl" not in str(said.value)
    monkeypatch.setenv("SERVER_API_KEY", "")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.script = [401]
    with pytest.raises(Refused, match=r"answered 401 Unauthorized \(no\): set SERVER_API_KEY to a valid key"):
        texts(client(server), "a")
    assert [h.get("Authorization") for h in server.headers] == [f"Bearer {KEY}", None]


def test_the_model_that_is_served(server: FakeServer) -> None:
    assert client(server).served_model() == "tiny"
    server.models = []
    with pytest.raises(InputError, match="serves no model"):
        client(server).served_model()


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
