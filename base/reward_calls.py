"""Calling a user's reward function: in time, with one sentence for what it raises, and without losing the answers that it was asked about."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from common.files import write_json

Answers = list[list[list[int]]]  # [prompt][answer] -> token ids
AnswerLogps = list[list[list[float]]]  # [prompt][answer] -> the log-prob of each token
Kept = tuple[Answers, AnswerLogps | None]


class _TooLong(BaseException):
    """Not an Exception: the function's own `except Exception` must not take it."""


def call_in_time(
    function: Callable[..., Any], arguments: dict[str, list], name: str, where: Sequence[str], seconds: float
) -> list:
    """The list that a reward function returns.

    Args:
        arguments: one entry per answer each.
        where: the row of each answer, for messages.
        seconds: how long it may take; 0 is without limit.

    Raises:
        InputError: it raises (with the first row for which it does so alone), takes too long, or returns nothing to iterate over.
    """
    try:
        with _limited(seconds), _left_alone():
            values = _called(function, arguments)
    except _TooLong:
        raise InputError(
            f"Reward {name} has not returned within {seconds:g} seconds for {len(where)} answers ({where[0]}, ...): look at what it "
            "waits for, or raise --reward_timeout."
        ) from None
    except Exception as error:
        row, cause = _first_that_raises(function, arguments, where, seconds) or (
            f"the {len(where)} answers together",
            error,
        )
        raise InputError(
            f"Reward {name} raised {_said(cause, function)} for {row}: fix the function or the row."
        ) from error
    if not isinstance(values, list):
        raise InputError(f"Reward {name} returned {type(values).__name__}: return a list of one number per answer.")
    return values


def _called(function: Callable[..., Any], arguments: dict[str, list]) -> Any:
    """What the function returns, as a list if it has a number per answer: a generator's code runs here, too."""
    values = function(**arguments)
    one_each = hasattr(values, "__iter__") and not isinstance(values, str | bytes | dict) and getattr(values, "ndim", 1)
    return list(values) if one_each else values


def _first_that_raises(
    function: Callable[..., Any], arguments: dict[str, list], where: Sequence[str], seconds: float
) -> tuple[str, Exception] | None:
    for i, row in enumerate(where):
        try:
            with _limited(seconds), _left_alone():
                _called(function, {name: values[i : i + 1] for name, values in arguments.items()})
        except _TooLong:
            return None
        except Exception as error:
            return row, error
    return None


def _said(error: Exception, function: Callable[..., Any]) -> str:
    """The error with the line of the function's file that raised it."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    file, line, trace = code and code.co_filename, None, error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"{text} ({file}, line {line})" if line else text


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLong after some seconds. By an alarm, not in a thread: functions with alarms of their own need the main one."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _left_alone() -> Iterator[None]:
    """Training goes on in the folder and with the settings of torch that it had, and an exit is an error of the function.

    Raises:
        RuntimeError: the function wanted to end the program.
    """
    folder, dtype, gradients = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it called sys.exit({error.code!r})") from error
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


class UnscoredAnswers:
    """The answers of an update that failed, by its reward function or by a server, kept beside the checkpoint: the resumed run does not sample
    them again."""

    def __init__(self, folder: str, process: int) -> None:
        self.path = Path(folder) / f"unscored_answers_{process}.json"
        self._key: dict[str, Any] = {}
        self._sampled: dict[str, Kept] = {}  # of this update
        self._kept: dict[str, Kept] = {}  # what a failed run has left for it

    def begin(self, **key: Any) -> None:
        """Start an update, or go on with it; `key` is everything that the answers depend on besides the weights."""
        if key == self._key:
            return
        self._key, self._sampled, self._kept = key, {}, {}
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["key"] == json.loads(json.dumps(key)):
                self._kept = kept["answers"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # nothing was left, or nothing that can be read: the answers are sampled

    def get(self, prompts: Sequence[list[int]], places: Sequence[int]) -> Kept | None:
        """The answers that a failed run has left to these prompts (token ids) at these places of the update, and the server's log-probs of them."""
        kept = self._kept.get(json.dumps([*zip(places, prompts, strict=True)]))
        return None if kept is None else (kept[0], kept[1])

    def put(
        self, prompts: Sequence[list[int]], places: Sequence[int], answers: Answers, logps: AnswerLogps | None = None
    ) -> None:
        """Remember answers, and the server's log-probs of them, until the next update begins."""
        self._sampled[json.dumps([*zip(places, prompts, strict=True)])] = answers, logps

    def write(self) -> Path:
        """Write them, whole or not at all."""
        write_json(self.path, {"key": self._key, "answers": self._sampled})
        return self.path

    def forget(self) -> None:
        """The update is done."""
        self._key = {}
        self.path.unlink(missing_ok=True)
