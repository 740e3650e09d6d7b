"""All test files in two processes side by side: most tests keep one core busy, and two cores are what `make test` counts on.

python -m tests.in_two -m "not slow"        further words go to pytest
"""

import subprocess
import sys
import tempfile
from pathlib import Path


def halves() -> tuple[list[str], list[str]]:
    """The files in the order of their names, about the same time in each half; processes on two ranks come last."""
    names = sorted(str(path) for path in Path("tests").glob("test_*.py"))
    ranks = "tests/test_distributed.py"
    first = ["tests/faults", *(name for name in names if name < "tests/test_n" and name != ranks)]
    return first, [*(name for name in names if name >= "tests/test_n"), ranks]


def main() -> int:
    """Run both; what the second one prints follows when both have ended."""
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    first, second = halves()
    with tempfile.TemporaryFile("w+") as output:
        beside = subprocess.Popen([*command, *second], stdout=output, stderr=subprocess.STDOUT)
        try:
            status = subprocess.run([*command, *first]).returncode
            beside.wait()
        finally:
            beside.kill()
        output.seek(0)
        print("\n" + output.read())
    return status or beside.returncode


if __name__ == "__main__":
    sys.exit(main())
