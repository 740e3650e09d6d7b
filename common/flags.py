"""Command lines that take a flag as it is spelt, or name the nearest one: argparse's parser takes `--learning_rat` for `--learning_rate`."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from common.errors import InputError, fail


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about a wrong name: ": did you mean learning_rate?", or all names if none is near."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if near:
        return f": did you mean {near[0]}?"
    return f": one of {', '.join(names)}." if len(names) < 30 else ": --help lists the flags."


def refuse_unknown(parser: argparse.ArgumentParser, argv: Sequence[str], others: bool = False) -> None:
    """Look at every flag of a command line before anything else is said about it.

    A mistyped flag that is required would otherwise be reported as missing.

    Args:
        others: another program takes what the parser does not have: only what is nearly one of its flags is refused.

    Raises:
        InputError: a flag that the parser does not have.
    """
    known = parser._option_string_actions
    for word in argv:
        if word == "--":
            return
        flag = word.split("=", 1)[0]
        if word.startswith("--") and " " not in word and flag not in known:
            spelling = "_" if "-" in flag[2:] else "-"  # the one that was not used: most flags have both
            shown = [name for name, action in known.items() if action.help != argparse.SUPPRESS]
            alike = [name for name in shown if spelling not in name[2:]]
            if others and not difflib.get_close_matches(flag, alike, n=1, cutoff=0.8):
                continue
            raise InputError(f"There is no flag {flag}{nearest(flag, alike)}")


class FlagParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations; wrong flags end in one sentence, without the usage of all others.

    The description keeps its line breaks: it is the docstring of the module.
    """

    def __init__(self, **options: Any) -> None:
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options
        super().__init__(**options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse's; flags that do not exist are refused first."""
        try:
            refuse_unknown(self, sys.argv[1:] if args is None else args)
        except InputError as error:
            fail(error)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with status 2."""
        fail(f"{message} (--help lists the flags)")
