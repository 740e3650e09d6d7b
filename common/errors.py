"""The one exception for wrong input, and how a command ends with it."""

import sys
from collections.abc import Callable
from pathlib import Path


class InputError(ValueError):
    """Wrong input from the user: one sentence that names the file, the row and the fix. `run` prints it without a traceback."""


def run(main: Callable[[], object]) -> None:
    """Call a command's main: wrong input ends in one sentence on stderr and exit status 2, anything else in its traceback."""
    try:
        main()
    except InputError as error:
        fail(error)


def fail(message: InputError | str) -> None:
    """Print one sentence on stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)
