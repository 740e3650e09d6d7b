"""The one exception for wrong input, and how a command ends with it, or with a disk that is full."""

import errno
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
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

_interrupts: list[int] = []  # every Ctrl-C while `run` runs


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
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in a shell's background
        signal.signal(signal.SIGINT, _interrupt)
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
        _interrupts.clear()
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def raise_dropped_interrupt() -> None:
    """Raise KeyboardInterrupt for a Ctrl-C since the start: Python drops those that come while it cleans up an object."""
    if _interrupts:
        raise KeyboardInterrupt


def fail(message: InputError | str) -> NoReturn:
    """Print one sentence on stderr and exit with status 2."""
    # torch puts the worker's traceback before what it said
    message = re.sub(r"\ACaught \w+ in DataLoader worker.*\bInputError: ", "", str(message), flags=re.DOTALL).strip()
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)
