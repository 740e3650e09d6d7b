"""One client for language-model judges: any OpenAI-compatible chat endpoint (a hosted one, vLLM, llama.cpp, ...).

    export JUDGE_API_KEY=...                      never an argument, never written to a log, a cache or a result
    ... --judge https://api.openai.com/v1 --judge_model gpt-4o-2024-08-06 [--judge_cache judge_cache.jsonl]

Replies are cached by the hash of everything that determines them, so a run that dies, or a second scorer, asks nothing
twice. 429, 5xx, time-outs and broken JSON are tried again with growing pauses.
"""

import argparse
import hashlib
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Protocol, TypeVar

from common.errors import InputError
from common.files import write_text
from eval.files import read_text

Item = TypeVar("Item")
Reply = TypeVar("Reply")


class Ask(Protocol):
    """What scorers take instead of a Judge. `sample` tells repeated questions apart: each number is a fresh reply."""

    def __call__(self, prompt: str, *, temperature: float = 0.0, sample: int = 0) -> str:
        """The reply to one prompt; `sample` numbers repeated questions."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


class Judge:
    """A chat endpoint with a cache. Safe to call from several threads.

    Args: `url` up to /v1; `cache` a JSON-lines file, shared between runs; `pause` seconds before the second attempt,
        doubled each time up to a minute.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: str | Path,
        *,
        max_tokens: int = 1024,
        timeout: float = 120.0,
        attempts: int = 8,
        pause: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--judge {url} is not an address; write e.g. http://localhost:8000/v1")
        self.url, self.model, self.cache = url.rstrip("/"), model, Path(cache)
        self.max_tokens, self.timeout, self.attempts, self.pause = max_tokens, timeout, attempts, pause
        self.asked = 0  # requests that reached the endpoint
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._replies = self._read_cache()

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Judge":
        """The judge that the flags name."""
        if not args.judge or not args.judge_model:
            raise InputError("this score needs a judge: --judge URL --judge_model NAME (key in JUDGE_API_KEY)")
        cache = args.judge_cache or Path(args.output or Path(args.answers).parent) / "judge_cache.jsonl"
        return cls(args.judge, args.judge_model, cache, max_tokens=args.judge_max_tokens, timeout=args.judge_timeout)

    def describe(self) -> dict:
        """What is stored with every score."""
        return {"model": self.model, "url": self.url.split("@")[-1], "max_tokens": self.max_tokens}

    def ask(self, prompt: str, *, temperature: float = 0.0, sample: int = 0) -> str:
        """Return the reply to one user message. Raises InputError when the endpoint refuses or keeps failing."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": temperature,
                "max_tokens": self.max_tokens}  # fmt: skip
        key = hashlib.sha256(json.dumps([body, sample], sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self._replies:
                return self._replies[key]
        reply = self._request(body)
        with self._lock:
            self._replies[key] = reply
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as f:
                f.write(json.dumps({"key": key, "model": self.model, "reply": reply}) + "\n")
        return reply

    def _read_cache(self) -> dict[str, str]:
        if not self.cache.exists():
            return {}
        text = self.cache.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        if torn:  # a kill cut the last line: drop it, the question is asked again
            write_text(self.cache, whole + "\n" if whole else "")
        try:
            return {r["key"]: r["reply"] for r in map(json.loads, filter(None, whole.split("\n")))}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{self.cache} is not a judge cache; delete it or pass another --judge_cache") from None

    def _request(self, body: dict) -> str:
        last, wait = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(max(wait, min(60.0, self.pause * 2 ** (attempt - 1))) * random.uniform(1.0, 1.2))
            wait = 0.0
            try:
                return self._once(body)
            except urllib.error.HTTPError as e:
                if e.code not in (408, 409, 429) and e.code < 500:
                    raise InputError(
                        f"judge {self.describe()['url']} answered {e.code} {e.reason}: {_hint(e.code)}"
                    ) from None
                after = e.headers.get("Retry-After") or ""
                wait = min(60.0, float(after)) if after.replace(".", "", 1).isdigit() else 0.0
                last = f"HTTP {e.code}"
            except TimeoutError:
                last = f"no answer within {self.timeout:g} s"
            except urllib.error.URLError as e:
                last = str(e.reason)
            except (HTTPException, ConnectionError) as e:
                last = type(e).__name__
            except (ValueError, KeyError, IndexError, TypeError):
                last = "a reply that is not a chat completion"
        raise InputError(
            f"judge {self.describe()['url']} failed {self.attempts} times, last with {last}; "
            f"the replies so far are kept in {self.cache}, run the command again to go on"
        )

    def _once(self, body: dict) -> str:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with self._lock:
            self.asked += 1
        with self._opener.open(request, timeout=self.timeout) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("content")
        return content


def ask_all(ask: Callable[[Item], Reply], items: list[Item], workers: int = 4) -> list[Reply]:
    """Call `ask` on every item, `workers` at a time; results in order. The first error stops it."""
    from tqdm import tqdm

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(ask, item) for item in items]
        try:
            return [f.result() for f in tqdm(futures, desc="judge", unit="reply", disable=None)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hint(code: int) -> str:
    return {
        401: "set JUDGE_API_KEY to a valid key",
        403: "this key may not use this model",
        404: "check --judge (it ends in /v1) and --judge_model",
    }.get(code, "check --judge and --judge_model")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every scorer that can ask a judge; `Judge.from_args` complains if it must and cannot."""
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    group.add_argument("--judge_model", help="model name; stored with the score")
    group.add_argument("--judge_prompt", help="file with the prompt, fields in braces as in the default (see docs)")
    group.add_argument("--judge_cache", help="JSON lines of replies; default: judge_cache.jsonl beside results.json")
    group.add_argument("--judge_max_tokens", type=int, default=1024)
    group.add_argument("--judge_timeout", type=float, default=120.0, help="seconds per request")
    group.add_argument("--judge_workers", type=int, default=4, help="requests at a time")


def judge_template(args: argparse.Namespace, default: str, fields: str) -> tuple[str, dict]:
    """The prompt of --judge_prompt or the default, and its description for results.json.

    Raises InputError if a file lacks one of the space-separated {fields}.
    """
    text = default
    if args.judge_prompt:
        text = read_text(args.judge_prompt)
        for field in fields.split():
            if f"{{{field}}}" not in text:
                raise InputError(f"{args.judge_prompt} has no {{{field}}}; the prompt needs {fields}")
    return text, {"prompt": args.judge_prompt or "built in", "prompt_sha256": hashlib.sha256(text.encode()).hexdigest()}
