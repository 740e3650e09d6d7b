"""One client for language-model judges: any OpenAI-compatible chat endpoint (a hosted one, vLLM, llama.cpp, ...).

    export JUDGE_API_KEY=...                      never an argument, never written to a log, a cache or a result
    ... --judge https://api.openai.com/v1 --judge_model gpt-4o-2024-08-06 [--judge_cache judge_cache.jsonl]

Replies are cached by the hash of everything that determines them, so a run that dies, or a second scorer, asks nothing
twice. Trouble is tried again with growing pauses (common/openai_client.py).
"""

import argparse
import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import httpx2

from base.images import ImageSource, load_image, png
from common.errors import InputError
from common.files import write_text
from common.openai_client import OpenAIClient, Unavailable, data_url
from eval.files import read_text

PICTURE_SIDE = 1024  # pixels that a judge sees
Item = TypeVar("Item")
Reply = TypeVar("Reply")


class Ask(Protocol):
    """What scorers take instead of a Judge. `sample` tells repeated questions apart: each number is a fresh reply."""

    def __call__(self, prompt: str, *, temperature: float = 0.0, sample: int = 0, pictures: Sequence[str] = ()) -> str:
        """The reply to one prompt; `sample` numbers repeated questions. `pictures` are data URLs, shown before the text."""


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
        self.client = OpenAIClient(
            url,
            flag="--judge",
            what="judge",
            keys=("JUDGE_API_KEY", "OPENAI_API_KEY"),
            timeout=timeout,
            attempts=attempts,
            pause=pause,
            hints={404: "check --judge (it ends in /v1) and --judge_model"},
        )
        self.model, self.cache, self.max_tokens = model, Path(cache), max_tokens
        self._lock = threading.Lock()
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
        return {"model": self.model, "url": self.client.shown_url, "max_tokens": self.max_tokens}

    def ask(self, prompt: str, *, temperature: float = 0.0, sample: int = 0, pictures: Sequence[str] = ()) -> str:
        """Return the reply to one user message. Raises InputError when the endpoint refuses or keeps failing."""
        content: str | list[dict] = prompt
        if pictures:
            shown = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
            content = [*shown, {"type": "text", "text": prompt}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": temperature,
                "max_tokens": self.max_tokens}  # fmt: skip
        key = hashlib.sha256(json.dumps([body, sample], sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self._replies:
                return self._replies[key]
        try:
            reply = self.client.post("chat/completions", body, _content)
        except Unavailable as error:
            raise InputError(
                f"{error}; the replies so far are kept in {self.cache}, run the command again to go on"
            ) from error
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


def _content(response: httpx2.Response) -> str:
    content = response.json()["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("content")
    return content


def as_judges_see(image: ImageSource) -> str:
    """A picture as a data URL, at most PICTURE_SIDE pixels wide and high."""
    picture = load_image(image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return data_url(png(picture))


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


def fill(template: str, **fields: object) -> str:
    """Put the fields into a prompt; braces within the fields are left alone."""
    return re.sub(r"\{(\w+)\}", lambda m: str(fields[m[1]]) if m[1] in fields else m[0], template)
