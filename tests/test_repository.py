"""What several files say about the project agrees: versions, links between documents, the index."""

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.in_two import OneOfTwo

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(f for folder in ("docs", "scripts", "benchmarks") for f in (ROOT / folder).glob("*.md"))]
)


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    unreleased, *released = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert unreleased == "Unreleased"
    newest = re.search(r"^Becomes ([\d.]+)\.", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] == (newest[1] if newest else released[0])


def test_pre_commit_runs_the_ruff_of_the_requirements():
    [hook] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hook['rev'].removeprefix('v')}" in (ROOT / "requirements.txt").read_text().splitlines()


def test_workflow_calls_the_whole_check():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check"]["steps"]
    assert {"run": ".ci/run"} in steps


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        assert target.startswith(("https:", "http:")) or (document.parent / target).exists(), target


def test_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("pace", [1, 5])
def test_every_file_runs_in_one_of_two_processes(tmp_path, pace: int):
    """However fast the second is: they take turns, and it takes `pace` tests in its own."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    ran: list[list[tuple[str, int]]] = [[], []]
    turns = []
    for from_the_end in (False, True):
        process = OneOfTwo(tmp_path, from_the_end)
        line = [SimpleNamespace(path=file, n=n) for n in range(3) for file in files]
        process.pytest_collection_modifyitems(line)
        turns.append(iter([(process, item) for item in line]))

    def next_test(i: int) -> bool:
        item = next((item for process, item in turns[i] if not process.pytest_runtest_protocol(item)), None)
        ran[i] += [(str(item.path), item.n)] if item else []
        return item is not None

    while any([next_test(i) for i in (0, *[1] * pace)]):
        pass
    assert sorted(ran[0] + ran[1]) == [(str(file), n) for file in files for n in range(3)]
    first, second = ({file for file, _ in part} for part in ran)
    assert not first & second and abs(len(second) - pace * len(first)) <= pace + 1


# -- the Dockerfile, which no test builds ------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(COPY, "requirements*.txt ./"), ... of the Dockerfile."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def commands() -> list[list[str]]:
    """The words of every command in a RUN."""
    return [shlex.split(part) for name, rest in instructions() if name == "RUN" for part in rest.split("&&")]


def test_dockerfile_has_the_python_and_the_packages_of_the_readme():
    (name, image), *_ = instructions()
    python = re.fullmatch(r"python:(\d\.\d+)-slim", image)
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert name == "FROM" and python and [*map(int, python[1].split("."))] >= [*map(int, least[2:].split("."))]
    installs = [" ".join(w for w in words if w != "--no-cache-dir") for words in commands() if words[0] == "pip"]
    assert " && ".join(installs) in (ROOT / "README.md").read_text()
    assert installs[0].split()[-1] in (ROOT / "requirements.txt").read_text().splitlines()  # the pin of torch


def test_dockerfile_copies_what_is_there_and_not_left_out():
    left_out = (ROOT / ".dockerignore").read_text().split()
    kept = [f.name for f in ROOT.iterdir() if not any(fnmatch.fnmatch(f.name, pattern) for pattern in left_out)]
    assert not [name for name in kept if name.startswith(".venv") or name == "runs"]  # GBs
    here, seen = "/", []
    for name, rest in instructions():
        here = rest if name == "WORKDIR" else here
        if name == "COPY":
            *sources, target = rest.split()
            assert target in (".", "./") and here == "/vl-rlhf"
            seen += [f for source in sources for f in (kept if source == "." else fnmatch.filter(kept, source))]
            assert all(source == "." or fnmatch.filter(kept, source) for source in sources), rest
        if name == "RUN" and "-r requirements.txt" in rest:
            assert "requirements.txt" in seen
    assert {"train_dpo.py", "scripts", "ds_configs"} <= set(seen)


def test_dockerfile_leaves_no_package_lists_and_ends_in_a_command_that_is_there():
    """As hadolint asks: apt-get without questions and extras, lists removed in the same layer, CMD as a list."""
    first, *_ = [rest for name, rest in instructions() if name == "RUN"]
    update, install, remove = (shlex.split(part) for part in first.split("&&"))
    assert update == ["apt-get", "update"] and remove == ["rm", "-rf", "/var/lib/apt/lists/*"]
    assert install[:4] == ["apt-get", "install", "-y", "--no-install-recommends"]
    name, command = instructions()[-1]
    python, script, *flags = json.loads(command)
    assert name == "CMD" and python == "python" and (ROOT / script).is_file() and flags == ["--help"]
    mounts = re.findall(r"-v \S+?:(\S+)", (ROOT / "Dockerfile").read_text())
    assert mounts == ["/vl-rlhf/runs", "/root/.cache/huggingface"]  # WORKDIR, and the home of the image's user
