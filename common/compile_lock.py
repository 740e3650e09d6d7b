"""The lock under which torch compiles extensions (DeepSpeed's), so that a killed run does not stop the next one.

torch marks a compilation by a file, and waits without a word for as long as that file exists: a killed process leaves it
behind, and every later run hangs. Here the process that compiles also holds a lock of the kernel on the file, which ends
with the process. A file whose owner is dead is taken over, and that is said.
"""

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from common.errors import InputError

SAY_AFTER, STALE_AFTER = 60, 600  # seconds
MARK = b"held by flock\n"  # what a file of ours holds; those of torch itself are empty


def try_acquire(baton: FileBaton) -> bool:
    """In place of FileBaton.try_acquire: also takes over the file of a process that is dead."""
    path = baton.lock_file_path
    while True:
        try:
            baton.fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        except FileExistsError:
            try:
                descriptor = os.open(path, os.O_RDWR)
            except FileNotFoundError:  # released just now
                continue
            if not _abandoned(descriptor, Path(path)):
                os.close(descriptor)
                return False
            print(f"{path} was left by a killed process: it is taken over.", file=sys.stderr, flush=True)
            baton.fd = descriptor
            os.ftruncate(descriptor, 0)
        else:
            with contextlib.suppress(OSError):  # a file system without locks: the file alone, as in torch
                fcntl.flock(baton.fd, fcntl.LOCK_EX)
        os.pwrite(baton.fd, MARK, 0)
        return True


def wait(baton: FileBaton) -> None:
    """In place of FileBaton.wait, which says nothing and never ends.

    Raises:
        InputError: if the process that compiles dies meanwhile.
    """
    lock, start, said = Path(baton.lock_file_path), time.monotonic(), False
    while True:
        time.sleep(baton.wait_seconds)
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            if _abandoned(descriptor, lock):
                raise InputError(f"The process that compiled in {lock.parent} was killed. Start again.")
        finally:
            os.close(descriptor)
        if not said and time.monotonic() - start > SAY_AFTER:
            print(
                f"Waiting for another process to compile in {lock.parent}. If none does, delete {lock}.",
                file=sys.stderr,
                flush=True,
            )
            said = True


def _abandoned(descriptor: int, path: Path) -> bool:
    """Whether nobody compiles under this file any more; if so, `descriptor` holds its lock.

    An empty file comes from a process without this module: it counts as abandoned once it is older than STALE_AFTER and
    no process of this machine, a compiler for one, has its working folder beside it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.fstat(descriptor).st_ino == path.stat().st_ino  # else released, and perhaps made anew, meanwhile
    except OSError:
        return False
    if not same:
        return False
    if os.pread(descriptor, len(MARK), 0) == MARK:
        return True
    return time.time() - os.fstat(descriptor).st_mtime > STALE_AFTER and not _works_in(path.parent)


def _works_in(folder: Path) -> bool:
    """Whether a process of this machine has its working folder there."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.resolve() == folder.resolve():
                return True
    return False


FileBaton.try_acquire, FileBaton.wait = try_acquire, wait
