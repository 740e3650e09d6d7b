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
4. From a server that gives fewer answers to a request than it is asked for (llama.cpp, transformers serve), the others are asked for one by one.
5. A proxy of the environment (HTTPS_PROXY, ...) is not asked for addresses of this machine.
"""

import asyncio
import base64
import logging
import math
import os
import random
import re
import ssl
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx2

from common.errors import InputError
from common.seeds import stable_seed

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
MANY = 8  # prompts that make a pattern
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
        token_ids: up to and with the end token; None where the server does not give them. No check that the vocabulary has them.
        logps: of each token under the server's model, in nats, as many as `token_ids`; None where the server does not give them.
        ended: whether it ended by itself; False for one that was cut at max_tokens, None where the server does not say.
    """

    text: str
    token_ids: list[int] | None
    logps: list[float] | None
    ended: bool | None


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
        timeouts: how many of the attempts may take all of `timeout`.
        at_once: requests on their way at a time.
        hints: HTTP status -> what to do about it.
        final: of the words with which 5xx come, those that no other attempt would change; by default there are none.

    Raises:
        InputError: `url` is not an address, or the key cannot be sent.
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
        timeouts: int = 3,
        pause: float = 1.0,
        at_once: int = 32,
        hints: Mapping[int, str] | None = None,
        final: re.Pattern[str] | None = None,
    ) -> None:
        self.url, self.flag, self.what = _checked(url, flag).rstrip("/"), flag, what
        self.timeout, self.attempts, self.timeouts = timeout, attempts, timeouts
        self.pause, self.at_once = pause, at_once
        self._key, self._final = _key(keys), final
        self.asked = 0  # requests sent
        self._left_out: set[str] = set()  # fields that the server has refused
        self._hints = {
            401: f"set {keys[0]} to a valid key",
            403: "this key may not do this",
            404: f"check {flag} (it ends in /v1) and the model's name",
        } | dict(hints or {})
        self._tls = ssl.create_default_context() if url.startswith("https://") else False
        self._warned: set[str] = set()
        self._alike = 0.0  # prompts whose answers were all equal; minus infinity after one whose were not

    @property
    def shown_url(self) -> str:
        """The address without a name and password in it."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    # -- any request ---------------------------------------------------------------------------------------------------

    def get(self, path: str, read: Callable[[httpx2.Response], Reply]) -> Reply:
        """What `read` makes of the reply to GET. Raises as `post_all`."""
        return self._run([None], lambda http, body: self._ask(http, "GET", path, body, read), None)[0]

    def post(self, path: str, body: Body, read: Callable[[httpx2.Response], Reply]) -> Reply:
        """What `read` makes of the reply to one POST. Raises as `post_all`."""
        return self.post_all(path, [body], read)[0]

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
            read: raises ValueError, KeyError, IndexError, TypeError or AttributeError for a reply that is not what it should be: it is asked again.
            done: called with (number of the body, reply) as replies come; what it has got is not lost when a later request fails.

        Raises:
            Refused: the server does not want a request; the others are dropped.
            Unavailable: a request failed as often as it may.
            ServerError: nothing is sent to this address: its certificate is not trusted, or the environment's proxy cannot be used.
        """
        return self._run(bodies, lambda http, body: self._ask(http, "POST", path, body, read), done)

    def _run(
        self,
        bodies: Iterable[Body | None],
        ask: Callable[[httpx2.AsyncClient, Any], Awaitable[Reply]],
        done: Callable[[int, Reply], None] | None,
    ) -> list[Reply]:
        replies: dict[int, Reply] = {}
        waiting = enumerate(bodies)

        async def worker(http: httpx2.AsyncClient) -> None:
            for n, body in waiting:
                replies[n] = await ask(http, body)
                if done is not None:
                    done(n, replies[n])

        async def all_workers() -> None:
            async with self._connections() as http:
                workers = [asyncio.ensure_future(worker(http)) for _ in range(self.at_once)]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for each in workers:
                        each.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)

        asyncio.run(all_workers())
        return [replies[n] for n in range(len(replies))]

    def _connections(self) -> httpx2.AsyncClient:
        try:
            return httpx2.AsyncClient(
                verify=self._tls, timeout=None, follow_redirects=False, trust_env=not _on_this_machine(self.url)
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise ServerError(
                f"The proxy of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot be used for {self.shown_url}: {error} Or add its host "
                "to NO_PROXY."
            ) from None

    async def _ask(
        self,
        http: httpx2.AsyncClient,
        method: str,
        path: str,
        body: Body | None,
        read: Callable[[httpx2.Response], Reply],
    ) -> Reply:
        last, wait = "", 0.0
        attempt = timed_out = 0
        while attempt < self.attempts and timed_out < self.timeouts:
            if attempt:
                pause = max(wait, min(60.0, self.pause * 2 ** (attempt - 1)))
                await asyncio.sleep(pause * _random.uniform(1.0, 1.2))
            attempt, wait = attempt + 1, 0.0
            try:
                async with asyncio.timeout(self.timeout):
                    self.asked += 1
                    sent = self._accepted(body)
                    response = await http.request(method, f"{self.url}/{path}", json=sent, headers=self._headers())
                status, said = response.status_code, _message(response)
                if (status in _TRY_AGAIN or status >= 500) and not (self._final and self._final.search(said)):
                    after = response.headers.get("Retry-After") or ""
                    wait = min(60.0, float(after)) if after.replace(".", "", 1).isdigit() else 0.0
                    last = f"HTTP {status}{f' ({said})' if said else ''}"
                elif status >= 300:
                    if not self._learns(response, sent):
                        raise self._refusal(response)
                    attempt -= 1
                else:
                    try:
                        return read(response)
                    except WrongReply as error:
                        last = str(error)
                    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                        last = f"a reply that cannot be read ({_start(response)})"
            except TimeoutError:
                last, timed_out = f"no answer within {self.timeout:g} s", timed_out + 1
            except httpx2.HTTPError as error:
                if (why := _not_to_be_trusted(error)) is not None:
                    raise ServerError(f"{self.what} {self.shown_url}: {why}") from None
                last = _cause(error)
        times = "once" if attempt == 1 else f"{attempt} times"
        raise Unavailable(f"{self.what} {self.shown_url}{self._through()} failed {times}, last with {last}")

    def _through(self) -> str:
        """Names the proxy's part in a message, if it has one."""
        proxies, host = urllib.request.getproxies(), httpx2.URL(self.url).host
        asked = proxies.get(self.url.partition("://")[0]) or proxies.get("all")
        direct = not asked or _on_this_machine(self.url) or urllib.request.proxy_bypass(host)
        return "" if direct else ", through the proxy of the environment,"

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _accepted(self, body: Body | None) -> Body | None:
        return body and {name: value for name, value in body.items() if name not in self._left_out}

    def _learns(self, response: httpx2.Response, sent: Body | None) -> bool:
        """Whether a refusal names optional fields of what was sent, which are left out from now on."""
        if sent is None or response.status_code not in (400, 422):
            return False
        named = {name for name in OPTIONAL_FIELDS if name in sent and name in response.text}
        if sent.get("n", 1) > 1 and re.search(r"\bn\b", _message(response)):
            named.add("n")
        if new := named - self._left_out:
            logger.warning("%s %s does not take %s: left out.", self.what, self.shown_url, ", ".join(sorted(new)))
        self._left_out |= named
        return bool(named)

    def _refusal(self, response: httpx2.Response) -> Refused:
        status, said = response.status_code, _message(response)
        hint = self._hints.get(status, f"check {self.flag} and the model's name")
        if status < 400:
            to = response.headers.get("Location", "nowhere")
            hint = f"it sends on to {to}, which is not followed, because the key would go there: let {self.flag} name the address itself"
        words = f"{self.what} {self.shown_url}{self._through()} answered {status} {response.reason_phrase}"
        return Refused(f"{words}{f' ({said})' if said else ''}: {hint}", status, said)

    def warn_once(self, message: str, *values: object) -> None:
        """Log "the server URL" and a message with its values, unless that message was there before."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(f"%s %s {message}", self.what, self.shown_url, *values)

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
            num_answers: to each. Where a reply has fewer, further requests with other seeds bring the rest.
        """
        return self._run(bodies, lambda http, body: self._chat(http, body, num_answers), done)

    async def _chat(self, http: httpx2.AsyncClient, body: Body, num_answers: int) -> ChatReply:
        async def ask(body: Body, at_most: int) -> ChatReply:
            def read(response: httpx2.Response) -> ChatReply:
                reply = read_chat(response)
                if len(reply.answers) > at_most:
                    raise WrongReply(f"{len(reply.answers)} answers, {at_most} asked for")
                return reply

            return await self._ask(http, "POST", "chat/completions", body, read)

        reply = await ask(body, num_answers)
        while (left := num_answers - len(reply.answers)) > 0:
            self.warn_once("gives fewer answers to a request than it is asked for: the others are asked for anew.")
            seed = {"seed": stable_seed(body["seed"], len(reply.answers)) % 2**31} if "seed" in body else {}
            further = await ask(body | seed | {"n": left}, left)
            reply = replace(reply, answers=[*reply.answers, *further.answers])
        if any(answer.ended is None for answer in reply.answers):
            self.warn_once("does not say why an answer ends (finish_reason): it counts as one that ended by itself.")
            reply = replace(reply, answers=[replace(a, ended=a.ended is not False) for a in reply.answers])
        if num_answers > 1:
            self._alike = -math.inf if len({answer.text for answer in reply.answers}) > 1 else self._alike + 1
            if self._alike == MANY:
                self.warn_once(
                    f"has answered {MANY} times with equal answers to one prompt: does it sample (temperature, do_sample)?"
                )
        return reply


# ---------------------------------------------------------------------------------------------------------------------
# Addresses, keys, and what goes wrong with them
# ---------------------------------------------------------------------------------------------------------------------


def _checked(url: str, flag: str) -> str:
    """An address to which a path can be added. Raises InputError for another one."""
    example = "write e.g. http://localhost:8000/v1"
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise InputError(
            f"{flag} {url} is not an address ({error}); {example}, an IPv6 address in brackets: http://[::1]:8000/v1"
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 <= (parsed.port or 0) < 2**16:
        raise InputError(f"{flag} {url} is not an address; {example}")
    if parsed.query or parsed.fragment:
        raise InputError(f"{flag} {url}: paths are added to the address, which has no ? and no #; {example}")
    return url.strip()


def _key(names: Sequence[str]) -> str | None:
    """The key of the first variable that is set, which no message may show."""
    name = next((name for name in names if os.environ.get(name, "").strip()), None)
    if name is None:
        return None
    key = os.environ[name].strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{name} is not a key: it has spaces or letters that no key has. Set it anew.")
    return key


def _on_this_machine(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else found.__cause__ or found.__context__


def _cause(error: BaseException) -> str:
    """What the system said of a connection that failed."""
    for found in _causes(error):
        if isinstance(found, ssl.SSLError):
            return str(found.reason or found).lower().replace("_", " ")
        if isinstance(found, OSError) and found.errno:
            return (os.strerror(found.errno) if found.errno > 0 else str(found.strerror)).lower()  # below 0: of a name
    return str(error) or type(error).__name__


def _not_to_be_trusted(error: BaseException) -> str | None:
    """What is wrong with the server's TLS and stays so; None for other trouble."""
    for found in _causes(error):
        if isinstance(found, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted ({found.verify_message}): if it is your own, let SSL_CERT_FILE name a file with it, else check "
                "the address."
            )
        if isinstance(found, ssl.SSLError) and found.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "it speaks no TLS: write http:// in place of https://."
    return None


def _message(response: httpx2.Response) -> str:
    """What a refusal says, in one line."""
    try:
        return _error_of(response.json())
    except (ValueError, AttributeError):
        return ""


def _start(response: httpx2.Response) -> str:
    return repr(" ".join(response.text.split())[:80])


def _error_of(reply: object) -> str:
    """The error in a reply, in one line; "" if there is none. Servers put it into `error`, `message` or `detail`."""
    found = reply.get("error", reply) if isinstance(reply, dict) else reply
    found = found.get("message", found.get("detail", "")) if isinstance(found, dict) else found
    return " ".join(str(found or "").split())[:300]


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
    """The choices of a chat completion. Raises as `read` of `post_all` for what is none."""
    reply = response.json()
    if not reply.get("choices"):
        raise WrongReply(f"a reply without an answer: {_error_of(reply) or _start(response)}")
    # Some servers do not count them
    choices = sorted(reply["choices"], key=lambda choice: choice.get("index") or 0)
    usage = reply.get("usage") or {}
    count, ids, said = usage.get("prompt_tokens"), _ids(reply.get("prompt_token_ids")), reply.get("prompt_logprobs")
    logps = None
    if ids is not None and said is not None:
        logps = [None if of is None else _logp(of[str(id)]) for id, of in zip(ids, said, strict=True)]
    return ChatReply([_answer(choice) for choice in choices], None if count is None else int(count), ids, logps)


def _answer(choice: Mapping[str, Any]) -> Answer:
    content = (choice.get("logprobs") or {}).get("content")
    token_ids = _ids(choice.get("token_ids", choice.get("response_token_ids")))  # of vLLM, of SGLang
    if token_ids is None and content and all(str(token["token"]).startswith("token_id:") for token in content):
        token_ids = [int(token["token"].removeprefix("token_id:")) for token in content]
    logps = [_logp(token) for token in content] if content else None
    if logps is not None and (token_ids is None or len(token_ids) != len(logps)):
        logps = None  # of no use without the tokens that they belong to
    text = choice["message"]["content"] or ""  # None where a parser of the server has taken thoughts out
    if not isinstance(text, str):  # parts
        text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
    reason = choice.get("finish_reason")
    if reason in ("abort", "error"):
        raise WrongReply(f"an answer that was broken off (finish_reason {reason})")
    return Answer(text, token_ids, logps, None if reason is None else reason not in ("length", "max_tokens"))


def _ids(ids: Sequence[Any] | None) -> list[int] | None:
    return None if ids is None else [int(id) for id in ids]


def _logp(token: Mapping[str, Any]) -> float:
    if not math.isfinite(logp := float(token["logprob"])):
        raise WrongReply(f"a log-prob of {logp}")
    return logp
