"""What several files say about the project agrees: versions, links between documents, the index."""

import re
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
