"""A client of servers that speak OpenAI's API: vLLM, SGLang, transformers serve, llama.cpp, hosted ones.

    client = OpenAIClient("http://localhost:8000/v1", flag="--url")
    model = client.served_model()
    bodies = [chat_body(model, messages, num_answers=4, max_tokens=64, temperature=1.0, seed=3)]
    for reply in client.chat_all(bodies):
        reply.answers[0].text, reply.answers[0].token_ids, reply.answers[0].logps, reply.prompt_tokens

1. Requests run side by side, `at_once` of them; 408, 409, 429, 5xx, time-outs, a connection that is refused or cut and replies that cannot be read
   are tried again with growing pauses, so that a server may restart meanwhile.
2. The key comes from the environment and is written nowhere. A redirect is not followed: it would carry the key to another host.
3. What a server does not know is left out after it has said so (`return_token_ids`, ...): hosted ones refuse fields that are not OpenAI's.
"""

import asyncio
import base64
import logging
import os
import random
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from common.errors import InputError

Body = dict[str, Any]
Reply = TypeVar("Reply")

# Asked for, and left out where a server refuses them: token ids (vLLM), log-probs, and whether the server puts <s> in front of the template's text.
OPTIONAL_FIELDS = (
    "return_token_ids",
    "return_tokens_as_token_ids",
    "add_special_tokens",
    "skip_special_tokens",
    "chat_template_kwargs",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "logprobs",
    "seed",
)
logger = logging.getLogger(__name__)
_TRY_AGAIN = (408, 409, 429)
_random = random.Random()  # not the global one, on which a training run may depend


class ServerError(InputError):
    """A server that does not do what it is asked."""


class Refused(ServerError):
    """An answer that another attempt will not change.

    Attributes:
        status: of HTTP.
        said: the server's own words, "" if there are none.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class WrongReply(ValueError):
    """A reply that is one, and not what was asked for. Says what is wrong."""


class Unavailable(ServerError):
    """No answer after all attempts: the server is down, too slow, or answers what cannot be read."""


@dataclass(frozen=True)
class Answer:
    """One choice of a chat completion.

    Attributes:
        text: without special tokens.
        token_ids: up to and with the end token; None where the server does not give them.
        logps: of each token under the server's model, in nats, as many as `token_ids`; None where the server does not give them.
        ended: whether it ended by itself; False for one that was cut at max_tokens.
    """

    text: str
    token_ids: list[int] | None
    logps: list[float] | None
    ended: bool


@dataclass(frozen=True)
class ChatReply:
    """All choices of a chat completion.

    Attributes:
        answers: as many as were asked for.
        prompt_tokens: how many the server counted, images included; None where it does not say.
        prompt_ids: what it read; None where the server does not give them.
        prompt_logps: of each of `prompt_ids`, the first one's None; None where they were not asked for (`prompt_logprobs=0` of vLLM).
    """

    answers: list[Answer]
    prompt_tokens: int | None
    prompt_ids: list[int] | None
    prompt_logps: list[float | None] | None = None


class OpenAIClient:
    """Requests to one server. Safe to call from several threads.

    Args:
        url: up to /v1.
        flag: that names the address, for messages.
        what: names the server in messages.
        keys: environment variables that may hold the key, the first one that is set counts.
        timeout: seconds for a request, its time in the server's queue included.
        attempts, pause: how often a request is tried; seconds before the second attempt, doubled each time up to a minute.
        at_once: requests on their way at a time.
        hints: HTTP status -> what to do about it.

    Raises:
        InputError: `url` is not an address.
    """

    def __init__(
        self,
        url: str,
        *,
        flag: str = "--url",
        what: str = "the server",
        keys: Sequence[str] = ("SERVER_API_KEY", "OPENAI_API_KEY"),
        timeout: float = 600.0,
        attempts: int = 8,
        pause: float = 1.0,
        at_once: int = 32,
        hints: Mapping[int, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{flag} {url} is not an address; write e.g. http://localhost:8000/v1")
        self.url, self.flag, self.what, self.keys = url.rstrip("/"), flag, what, tuple(keys)
        self.timeout, self.attempts, self.pause, self.at_once = timeout, attempts, pause, at_once
        self.asked = 0  # requests sent
        self._left_out: set[str] = set()  # fields that the server has refused
        self._hints = {
            401: f"set {keys[0]} to a valid key",
            403: "this key may not do this",
            404: f"check {flag} (it ends in /v1) and the model's name",
        } | dict(hints or {})
        self._tls = ssl.create_default_context() if url.startswith("https://") else False

    @property
    def shown_url(self) -> str:
        """The address without a name and password in it."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    # -- any request ---------------------------------------------------------------------------------------------------

    def get(self, path: str, read: Callable[[httpx2.Response], Reply]) -> Reply:
        """What `read` makes of the reply to GET. Raises as `post_all`."""
        return self._run("GET", path, [None], read, None)[0]

    def post(self, path: str, body: Body, read: Callable[[httpx2.Response], Reply]) -> Reply:
        """What `read` makes of the reply to one POST. Raises as `post_all`."""
        return self._run("POST", path, [body], read, None)[0]

    def post_all(
        self,
        path: str,
        bodies: Iterable[Body],
        read: Callable[[httpx2.Response], Reply],
        done: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """POST every body, `at_once` at a time; what `read` makes of the replies, in order.

        Args:
            bodies: made one by one as they are sent, so that not all pictures lie in memory.
            read: raises ValueError, KeyError, IndexError or TypeError for a reply that is not what it should be: it is asked again.
            done: called with (number of the body, reply) as replies come; what it has got is not lost when a later request fails.

        Raises:
            Refused: the server does not want a request; the others are dropped.
            Unavailable: a request failed as often as it may.
        """
        return self._run("POST", path, bodies, read, done)

    def _run(
        self,
        method: str,
        path: str,
        bodies: Iterable[Body | None],
        read: Callable[[httpx2.Response], Reply],
        done: Callable[[int, Reply], None] | None,
    ) -> list[Reply]:
        replies: dict[int, Reply] = {}
        waiting = enumerate(bodies)

        async def worker(http: httpx2.AsyncClient) -> None:
            for n, body in waiting:
                replies[n] = await self._ask(http, method, path, body, read)
                if done is not None:
                    done(n, replies[n])

        async def all_workers() -> None:
            async with httpx2.AsyncClient(verify=self._tls, timeout=None, follow_redirects=False) as http:
                workers = [asyncio.ensure_future(worker(http)) for _ in range(self.at_once)]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for each in workers:
                        each.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)

        asyncio.run(all_workers())
        return [replies[n] for n in range(len(replies))]

    async def _ask(
        self,
        http: httpx2.AsyncClient,
        method: str,
        path: str,
        body: Body | None,
        read: Callable[[httpx2.Response], Reply],
    ) -> Reply:
        last, wait = "", 0.0
        attempt = 0
        while attempt < self.attempts:
            if attempt:
                pause = max(wait, min(60.0, self.pause * 2 ** (attempt - 1)))
                await asyncio.sleep(pause * _random.uniform(1.0, 1.2))
            attempt, wait = attempt + 1, 0.0
            try:
                async with asyncio.timeout(self.timeout):
                    self.asked += 1
                    sent = self._accepted(body)
                    response = await http.request(method, f"{self.url}/{path}", json=sent, headers=self._headers())
                if response.status_code in _TRY_AGAIN or response.status_code >= 500:
                    after = response.headers.get("Retry-After") or ""
                    wait = min(60.0, float(after)) if after.replace(".", "", 1).isdigit() else 0.0
                    last = f"HTTP {response.status_code}"
                elif response.status_code >= 300:
                    if not self._learns(response, sent):
                        raise self._refusal(response)
                    attempt -= 1
                else:
                    return read(response)
            except TimeoutError:
                last = f"no answer within {self.timeout:g} s"
            except httpx2.HTTPError as error:
                last = _cause(error)
            except (ServerError, httpx2.InvalidURL):
                raise
            except WrongReply as error:
                last = str(error)
            except (ValueError, KeyError, IndexError, TypeError):
                last = "a reply that cannot be read"
        raise Unavailable(f"{self.what} {self.shown_url} failed {self.attempts} times, last with {last}")

    def _headers(self) -> dict[str, str]:
        key = next((os.environ[name] for name in self.keys if os.environ.get(name)), None)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _accepted(self, body: Body | None) -> Body | None:
        return body and {name: value for name, value in body.items() if name not in self._left_out}

    def _learns(self, response: httpx2.Response, sent: Body | None) -> bool:
        """Whether a refusal names optional fields of what was sent, which are left out from now on."""
        if sent is None or response.status_code not in (400, 422):
            return False
        named = {name for name in OPTIONAL_FIELDS if name in sent and name in response.text}
        if new := named - self._left_out:
            logger.warning("%s %s does not take %s: left out.", self.what, self.shown_url, ", ".join(sorted(new)))
        self._left_out |= named
        return bool(named)

    def _refusal(self, response: httpx2.Response) -> Refused:
        status, said = response.status_code, _message(response)
        hint = self._hints.get(status, f"check {self.flag} and the model's name")
        words = f"{self.what} {self.shown_url} answered {status} {response.reason_phrase}"
        return Refused(f"{words}{f' ({said})' if said else ''}: {hint}", status, said)

    # -- chat ----------------------------------------------------------------------------------------------------------

    def served_model(self) -> str:
        """The name of the first model that the server lists. Raises InputError if it lists none."""
        models = self.get("models", lambda response: [str(model["id"]) for model in response.json()["data"]])
        if not models:
            raise InputError(f"{self.what} {self.shown_url} serves no model: start it with one")
        return models[0]

    def chat_all(
        self, bodies: Iterable[Body], done: Callable[[int, ChatReply], None] | None = None, num_answers: int = 1
    ) -> list[ChatReply]:
        """Chat completions of `chat_body`s, in order; for `done` and errors see `post_all`.

        Args:
            num_answers: to each; a reply with another number is asked again.
        """

        def read(response: httpx2.Response) -> ChatReply:
            reply = read_chat(response)
            if len(reply.answers) != num_answers:
                raise WrongReply(f"{len(reply.answers)} of {num_answers} answers")
            return reply

        return self.post_all("chat/completions", bodies, read, done)


def _cause(error: BaseException) -> str:
    """What the system said of a connection that failed."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno:
            return (os.strerror(found.errno) if found.errno > 0 else str(found.strerror)).lower()  # below 0: of a name
        found = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else found.__cause__ or found.__context__
    return str(error) or type(error).__name__


def _message(response: httpx2.Response) -> str:
    """What a refusal says, in one line."""
    try:
        found = response.json()
        found = found.get("error", found)
        found = found.get("message", found.get("detail", "")) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        found = ""
    return " ".join(str(found).split())[:300]


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """A file as the address that an `image_url` part takes."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def chat_body(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    num_answers: int = 1,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    tokens: bool = True,
    **fields: Any,
) -> Body:
    """The body of a chat completion.

    Args:
        messages: `role` and `content`, of text or parts; pictures are parts {"type": "image_url", "image_url": {"url": data_url(...)}}.
        tokens: ask for token ids and log-probs, which a server without them leaves out.
        fields: further ones; those of `OPTIONAL_FIELDS` are left out where the server refuses them.
    """
    body: Body = {"model": model, "messages": list(messages), "n": num_answers, "max_tokens": max_tokens}
    body |= {"temperature": temperature, "top_p": top_p}
    if seed is not None:
        body["seed"] = seed
    if tokens:
        body |= {"logprobs": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    return body | fields


def read_chat(response: httpx2.Response) -> ChatReply:
    """The choices of a chat completion. Raises ValueError, KeyError, IndexError or TypeError for what is none."""
    reply = response.json()
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    if not choices:
        raise ValueError("no choices")
    usage = reply.get("usage") or {}
    ids, said = reply.get("prompt_token_ids"), reply.get("prompt_logprobs")
    logps = None
    if ids is not None and said is not None:
        logps = [None if of is None else float(of[str(id)]["logprob"]) for id, of in zip(ids, said, strict=True)]
    return ChatReply([_answer(choice) for choice in choices], usage.get("prompt_tokens"), ids, logps)


def _answer(choice: Mapping[str, Any]) -> Answer:
    content = (choice.get("logprobs") or {}).get("content")
    token_ids = choice.get("token_ids")
    if token_ids is None and content and all(str(token["token"]).startswith("token_id:") for token in content):
        token_ids = [int(token["token"].removeprefix("token_id:")) for token in content]
    logps = [float(token["logprob"]) for token in content] if content else None
    if logps is not None and (token_ids is None or len(token_ids) != len(logps)):
        logps = None  # of no use without the tokens that they belong to
    text = choice["message"]["content"] or ""  # None where a parser of the server has taken thoughts out
    return Answer(text, token_ids, logps, choice.get("finish_reason") != "length")
