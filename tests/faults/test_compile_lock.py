"""A lock file of torch's extension builder that a killed process has left."""

import os
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from common import compile_lock
from common.errors import InputError

HOLD = """
import sys
import common.compile_lock
from torch.utils.file_baton import FileBaton
print(FileBaton(sys.argv[1]).try_acquire(), flush=True)
input()
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_lock, "SAY_AFTER", 0.05)
    path = tmp_path / "build" / "lock"
    path.parent.mkdir()
    return path


def baton(lock) -> FileBaton:
    return FileBaton(str(lock), wait_seconds=0.01)


def age(path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.fixture
def holder(lock):
    """Another process that compiles under the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def waits(lock) -> threading.Thread:
    """A thread that waits for the lock; it still does after half a second."""
    waiting = threading.Thread(target=baton(lock).wait, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    return waiting


def test_lock_of_a_killed_process_is_taken_over(lock, holder, capsys):
    age(lock, 3000)
    assert not baton(lock).try_acquire()
    holder.kill()
    holder.wait()
    next_run = baton(lock)
    assert next_run.try_acquire()
    assert f"{lock} was left by a killed process" in capsys.readouterr().err
    assert not baton(lock).try_acquire()  # the other rank of the next run
    next_run.release()
    assert not lock.exists()


def test_death_of_the_compiling_process_ends_the_wait(lock, holder):
    said = []

    def wait() -> None:
        try:
            baton(lock).wait()
        except InputError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)  # which may wait for ever
    waiting.start()
    holder.kill()
    waiting.join(20)
    assert said == [f"The process that compiled in {lock.parent} was killed. Start again."]


def test_one_of_many_takes_over(lock):
    for _ in range(20):
        lock.write_bytes(compile_lock.MARK)
        batons, got = [baton(lock) for _ in range(4)], []
        threads = [threading.Thread(target=lambda one=one, got=got: got.append(one.try_acquire())) for one in batons]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False, False, False, True]
        for one in batons:
            if one.fd is not None:
                one.release()


def test_old_empty_lock_is_taken_over(lock):
    lock.touch()
    age(lock, 3000)
    assert baton(lock).try_acquire()


def test_young_empty_lock_is_named_and_waited_for(lock, capsys):
    lock.touch()
    assert not baton(lock).try_acquire()
    waiting = waits(lock)
    assert capsys.readouterr().err.count(f"If none does, delete {lock}") == 1
    lock.unlink()
    waiting.join(10)
    assert not waiting.is_alive()


def test_old_empty_lock_of_a_compiler_at_work_is_waited_for(lock):
    lock.touch()
    age(lock, 3000)
    compiler = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=lock.parent)
    assert not baton(lock).try_acquire()
    waiting = waits(lock)
    lock.unlink()
    waiting.join(10)
    assert not waiting.is_alive()
    compiler.communicate(b"\n")
