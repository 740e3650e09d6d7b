"""Does the suite see single faults? Puts each fault of the catalogue into the code and runs the tests that should fail.

    make mutants                              every fault
    python -m tests.mutants --changed main    faults in files that differ from a branch
    python -m tests.mutants --only "KL"       faults with these words in their description, in the file's or the tests' name
    python -m tests.mutants --check           whether every fault still applies; runs nothing

Prints the score, the share of faults that some test saw, and ends with status 1 if a fault survived, no longer applies, or if
its tests fail without it. Every fault runs in a copy of the repository, in a process that is forked after the libraries were
imported.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import DoesNotApply, Mutant

ROOT = Path(__file__).parents[2]
LIBRARIES = "torch transformers trl peft accelerate datasets PIL pytest".split()  # imported once, for all processes
FORK = multiprocessing.get_context("fork")
PYTEST = "-x -q -p no:cacheprovider -p no:randomly --no-header".split()
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # exit statuses of pytest; a fault that stops an import interrupts it
SECONDS = 900  # for the tests of one fault


@dataclass
class Job:
    """Tests on a copy of the repository, with a fault or (to see that they pass) without."""

    tests: list[str]
    mutant: Mutant | None
    copy: Path
    process: BaseProcess
    start: float

    @property
    def output(self) -> str:
        """What pytest printed."""
        return (self.copy / ".output").read_text(errors="replace")


def import_libraries() -> None:
    """Import what is slow to import, but nothing of the project."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    compat = importlib.import_module("common.compat")
    for name in LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("transformers.trainer")
    importlib.import_module("trl.trainer.utils")
    if hasattr(compat, "_TORCHVISION_OPS"):
        compat._TORCHVISION_OPS._destroy()  # every copy declares them anew
    for name in [n for n in sys.modules if n.partition(".")[0] in {"common"}]:
        del sys.modules[name]


def copy_repository(to: Path) -> None:
    """Copy tracked and new files, without those that git ignores."""
    listed = subprocess.run(
        "git ls-files -z --cached --others --exclude-standard".split(), cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def run_tests(copy: Path, tests: list[str]) -> None:
    """In the child: pytest's exit status is the process's."""
    os.setsid()
    os.chdir(copy)
    descriptor = os.open(copy / ".output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    temporary = copy / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    import pytest

    status = pytest.main([*PYTEST, *tests])
    sys.stdout.flush()
    os._exit(int(status))


def start(copy: Path, tests: list[str], mutant: Mutant | None) -> Job:
    """Start the tests of a fault in a copy."""
    if mutant is not None:
        mutant.apply_to(copy)
    process = FORK.Process(target=run_tests, args=(copy, tests))
    process.start()
    return Job(tests, mutant, copy, process, time.monotonic())


def stop(job: Job) -> None:
    """End what tests have left behind, and take the fault out."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, signal.SIGKILL)
    job.process.join()
    if job.mutant is not None:
        shutil.copy2(ROOT / job.mutant.file, job.copy / job.mutant.file)


def run_all(work: list[tuple[list[str], Mutant | None]], copies: list[Path]) -> Iterable[tuple[Job, int | None, float]]:
    """Run everything, as many at a time as there are copies; yields job, exit status (None: out of time), and seconds."""
    waiting, running, free = list(work), [], list(copies)
    while waiting or running:
        while waiting and free:
            running.append(start(free.pop(), *waiting.pop(0)))
        multiprocessing.connection.wait([job.process.sentinel for job in running], timeout=1)
        for job in list(running):
            seconds = time.monotonic() - job.start
            if job.process.is_alive() and seconds < SECONDS:
                continue
            status = None if job.process.is_alive() else job.process.exitcode
            stop(job)
            running.remove(job)
            free.append(job.copy)
            yield job, status, seconds


def changed_since(branch: str) -> set[str]:
    """Files that differ from a branch, as they are on disk."""
    done = subprocess.run(
        ["git", "diff", "--name-only", "--merge-base", branch], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def chosen(args: argparse.Namespace) -> list[Mutant]:
    """The faults that the flags name."""
    mutants = MUTANTS
    if args.changed:
        changed = changed_since(args.changed)
        mutants = [m for m in mutants if m.file in changed or m.tests in changed]
    if args.only:
        mutants = [m for m in mutants if any(args.only in text for text in (m.fault, m.file, m.tests))]
    return mutants


def without_faults(mutants: list[Mutant]) -> list[list[str]]:
    """pytest's arguments for all tests that are needed, a file at a time: they must pass when nothing is wrong."""
    words: dict[str, dict[str, None]] = {}
    for mutant in mutants:
        words.setdefault(mutant.tests, {})[mutant.words] = None
    return [[file, "-k", " or ".join(f"({w})" for w in of_file)] for file, of_file in words.items()]


def check(mutants: list[Mutant]) -> list[str]:
    """Why faults do not apply, one sentence each."""
    errors = []
    for mutant in mutants:
        try:
            compile(mutant.applied((ROOT / mutant.file).read_text()), mutant.file, "exec")
            if not (ROOT / mutant.tests).is_file():
                raise DoesNotApply(f"{mutant.tests} does not exist ({mutant.fault})")
        except (DoesNotApply, OSError) as error:
            errors.append(str(error))
    return errors


def main() -> int:
    """Run the faults; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changed", metavar="BRANCH", help="faults of files that differ from this branch")
    parser.add_argument("--only", metavar="WORDS", help="faults with these words in description, file or tests")
    parser.add_argument("--check", action="store_true", help="whether every fault applies; run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    args = parser.parse_args()
    mutants = chosen(args)
    errors = check(mutants)
    for error in errors:
        print(f"error: {error}")
    if args.check or errors:
        print(f"{len(mutants) - len(errors)} of {len(mutants)} faults apply")
        return int(bool(errors))
    import_libraries()
    work: list[tuple[list[str], Mutant | None]] = [(tests, None) for tests in without_faults(mutants)]
    work += [([m.tests, "-k", m.words], m) for m in mutants]
    seen, survived = 0, []
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        copies = [Path(folder) / str(n) for n in range(args.jobs)]
        for copy in copies:
            copy_repository(copy)
        for job, status, seconds in run_all(work, copies):
            about = (
                f"{job.mutant.file}: {job.mutant.fault}" if job.mutant else f"without a fault: {' '.join(job.tests)}"
            )
            if job.mutant is None:
                verdict = "passed" if status == PASSED else "ERROR"
            else:
                verdict = {PASSED: "SURVIVED", FAILED: "seen", INTERRUPTED: "seen"}.get(status, "ERROR")
            print(f"{verdict:9}{seconds:6.1f} s  {about}", flush=True)
            if verdict == "ERROR":
                errors.append(about)
                print(job.output[-3000:])
            seen += verdict == "seen"
            survived += [about] if verdict == "SURVIVED" else []
    for about in survived:
        print(f"survived: {about}")
    for about in errors:
        print(f"error: {about}")
    print(f"{seen} of {len(mutants)} faults seen ({100 * seen / max(len(mutants), 1):.1f} %)")
    return int(bool(survived or errors))


if __name__ == "__main__":
    sys.exit(main())
