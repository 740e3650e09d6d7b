"""All test files in two processes side by side: most tests keep one core busy, and two cores are what `make test` counts on.

    python -m tests.in_two -m "not slow"        further words go to pytest

One process takes files from the beginning of the list, the other from its end, until they meet: on any machine both end at
about the same time. Within a process it is one run of pytest, so that imports, trained models and fixtures are shared.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TAKEN, FROM_THE_END = "TEST_FILES_TAKEN", "TEST_FILES_FROM_THE_END"
# Run their own two processes, so they come where the two meet: beside a single other file, not beside each other.
ON_TWO_RANKS = ("test_distributed.py", "test_fsdp.py")
# Takes minutes in one process: begun when the two meet, it would keep the other one waiting.
LONGEST = "test_models.py"


def ordered(files: list[Path], from_the_end: bool) -> list[Path]:
    """The order in which a process looks at the files."""
    special = {name: [file for file in files if file.name == name] for name in (*ON_TWO_RANKS, LONGEST)}
    others = [file for file in files if file.name not in special]
    middle = [file for name in ON_TWO_RANKS for file in special[name]]
    line = [*others[: len(others) // 2], *middle, *others[len(others) // 2 :], *special[LONGEST]]
    return line[::-1] if from_the_end else line


class OneOfTwo:
    """A plug-in of pytest: of each file it asks for, the process that asks first runs all tests."""

    def __init__(self, folder: Path, from_the_end: bool) -> None:
        self.folder, self.from_the_end = folder, from_the_end
        self.mine: dict[Path, bool] = {}

    def takes(self, file: Path) -> bool:
        """Whether this process runs the file: the first to make its mark does."""
        if file not in self.mine:
            try:
                (self.folder / f"{file.parent.name}-{file.name}").touch(exist_ok=False)
                self.mine[file] = True
            except FileExistsError:
                self.mine[file] = False
        return self.mine[file]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files in our order, the tests of a file in theirs."""
        files = ordered(sorted({item.path for item in items}), self.from_the_end)
        place = {file: n for n, file in enumerate(files)}
        items.sort(key=lambda item: place[item.path])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True: this test is done, as far as this process is concerned."""
        return None if self.takes(item.path) else True


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest in each of the two processes (-p tests.in_two)."""
    if TAKEN in os.environ:
        config.pluginmanager.register(OneOfTwo(Path(os.environ[TAKEN]), FROM_THE_END in os.environ))


def main() -> int:
    """Run both; what the second one prints follows when both have ended."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.in_two", *sys.argv[1:], "tests"]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as taken:
        environment = os.environ | {TAKEN: taken}
        beside = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment | {FROM_THE_END: "1"}
        )
        try:
            status = subprocess.run(command, env=environment).returncode
            beside.wait()
        finally:
            beside.kill()
        output.seek(0)
        print("\n" + output.read())
    return status or beside.returncode


if __name__ == "__main__":
    sys.exit(main())
