"""Output that no run dies of: whoever read the log has gone, or the disk below it is full."""

import sys
from collections.abc import Callable
from typing import Any, TextIO


class Unbreakable:
    """A text stream whose writes do not fail. What cannot be written is dropped, which is said once on another stream."""

    def __init__(self, stream: TextIO, name: str, other: TextIO | None = None) -> None:
        """
        Args:
            name: of the stream, for the sentence.
            other: where that is written; None if there is nowhere.
        """
        self._stream, self._name, self._other, self._told = stream, name, other, False

    def write(self, text: str) -> int:
        """Write, or drop the text; its length."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, or leave it."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., object], *args: str) -> None:
        try:
            call(*args)
        except (OSError, ValueError) as error:  # ValueError: it is closed, or cannot show a character
            if not self._told and self._other is not None:
                print(f"{self._name} cannot be written ({error}); the run goes on.", file=self._other, flush=True)
            self._told = True

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  as many types as the stream has attributes
        return getattr(self._stream, name)


def make_output_unbreakable() -> None:
    """Put `Unbreakable` in the place of this process's stdout and stderr."""
    stdout, stderr = sys.stdout, sys.stderr
    if isinstance(stdout, Unbreakable):
        return
    sys.stderr = Unbreakable(stderr, "stderr")  # type: ignore[assignment]
    sys.stdout = Unbreakable(stdout, "stdout", sys.stderr)  # type: ignore[assignment, arg-type]
