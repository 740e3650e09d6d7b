"""A lock file of torch's extension builder that a killed process has left."""

import os
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from common import compat
from common.errors import InputError


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "SAY_AFTER", 0.05)
    path = tmp_path / "build" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def age(path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_stale_lock_is_named(lock):
    age(lock, 3000)
    with pytest.raises(InputError, match=rf"{lock} is 50 minutes old and no process compiles there.*Delete that file"):
        FileBaton(str(lock), wait_seconds=0.01).wait()


def test_old_lock_of_a_compiler_at_work_is_waited_for(lock, capsys):
    age(lock, 3000)
    compiler = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=lock.parent)
    waiting = threading.Thread(target=FileBaton(str(lock), wait_seconds=0.01).wait)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    lock.unlink()
    waiting.join(10)
    assert not waiting.is_alive()
    assert capsys.readouterr().err.count(f"If none does, delete {lock}") == 1
    compiler.communicate(b"\n")


def test_young_lock_is_named_and_waited_for(lock, capsys):
    waiting = threading.Thread(target=FileBaton(str(lock), wait_seconds=0.01).wait)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and f"delete {lock}" in capsys.readouterr().err
    lock.unlink()
    waiting.join(10)
    assert not waiting.is_alive()
