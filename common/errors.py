"""The one exception for wrong input, and how a command ends with it, or with a disk that is full."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# What a disk says, and not a mistake of the program.
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENAMETOOLONG,
)
_DISK_TEXT = re.compile(
    r"No space left|Disk quota exceeded|File too large|Read-only file system|Permission denied|Input/output error"
    r"|PytorchStreamWriter|inline_container|unexpected pos"  # how torch.save says it
)


class InputError(ValueError):
    """Wrong input from the user: one sentence that names the file, the row and the fix. `run` prints it without a traceback."""


def disk_trouble(error: BaseException | None) -> str | None:
    """What a file system has refused, in words with the file where it is known; None for any other error."""
    while error is not None:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, OSError) and error.errno in _DISK:
            return f"{error.filename or 'A file'} could not be written or read ({error.strerror})"
        # safetensors and torch have errors of their own for what the system told them.
        told = isinstance(error, RuntimeError | OSError) or type(error).__name__ == "SafetensorError"
        if told and _DISK_TEXT.search(text):
            return f"A file could not be written ({text})"
        error = error.__cause__
    return None


def memory_trouble(error: BaseException) -> str | None:
    """What was said when memory ran out, the device's or the machine's; None for any other error."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return text or "MemoryError"
    # torch's allocator on a CPU, and cuBLAS and others on a GPU, have plain RuntimeErrors for it.
    told = isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory|ALLOC_FAILED", text)
    return text if told else None


def run(main: Callable[[], object]) -> None:
    """Call a command's main: wrong input, or a full disk, ends in one sentence on stderr and exit status 2, anything else in its traceback.

    Ctrl-C ends it with the status that shells give it, 130.
    """
    before, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        main()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: Stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        fail(error)
    except Exception as error:
        if memory := memory_trouble(error):
            fail(f"Memory ran out ({memory}): docs/faq.md lists what takes less, the cheapest first.")
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        fail(f"{trouble}: free space, or give a folder that can be written.")
    finally:
        sys.unraisablehook = before


def _interrupt_again(dropped: "sys.UnraisableHookArgs") -> None:
    """A hook for exceptions that Python drops : a Ctrl-C that came while it cleaned up an object comes again."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        # Not from here, where it would be dropped like the first.
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)


def fail(message: InputError | str) -> NoReturn:
    """Print one sentence on stderr and exit with status 2."""
    # torch puts the worker's traceback before what it said
    message = re.sub(r"\ACaught \w+ in DataLoader worker.*\bInputError: ", "", str(message), flags=re.DOTALL).strip()
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)
