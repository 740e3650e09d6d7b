"""Steps of TRL, ms-swift, LLaMA-Factory and ours: processor seconds and peak memory on the same rows, weights, adapter and optimizer.

    OMP_NUM_THREADS=1 python -m benchmarks.rivals --swift ENV/bin/python --factory ENV/bin/python --out benchmarks/results

Each project is a process in its own environment, which runs its own train() loop (benchmarks/README.md says how it is installed and at
which settings it runs); one after the other, because processor time hardly depends on the load. Losses are compared step by step:
where they agree, a ratio of times is a ratio of implementations. A side whose environment is not given is left out.
"""

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import SIZES, build, rows
from benchmarks.padding import ragged
from benchmarks.rivals.watch import Job
from benchmarks.steps import LoadWatch, machine, markdown, write
from common.flags import FlagParser

ROOT = Path(__file__).parents[2]
CLOCK = (
    "step" if torch.cuda.is_available() else "step_cpu"
)  # of the watch, which a GPU's work shows on; of the processor
RIVALS = {"trl": "TRL", "swift": "ms-swift", "factory": "LLaMA-Factory"}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    script: str
    family: str
    batch: int = 2  # rows
    answers: int = 2
    ragged: bool = (
        False  # answers of 30 to 400 tokens and, where a family takes them as they are, pictures of different sizes
    )
    rivals: tuple[str, ...] = tuple(RIVALS)


CASES = [
    Case("dpo, equal rows", "dpo", "llava"),
    Case("dpo, ragged rows", "dpo", "llava", batch=4, ragged=True),
    Case("dpo, Qwen2.5-VL, equal rows", "dpo", "qwen2_5_vl"),
    Case("dpo, Qwen2.5-VL, ragged rows", "dpo", "qwen2_5_vl", batch=4, ragged=True),
    Case("dpo, four answers", "dpo", "llava", batch=1, answers=4),
    Case("dpo, half of 7B's width", "dpo", "llava_wide"),
    Case("rm, equal rows", "rm", "llava", rivals=("swift", "factory")),
    Case("rm, Qwen2.5-VL, equal rows", "rm", "qwen2_5_vl", rivals=("swift", "factory")),
    Case("rm, ragged rows", "rm", "llava", batch=4, ragged=True, rivals=("swift", "factory")),
    Case("sft, packed", "sft", "llava", batch=4, ragged=True, rivals=("trl",)),
]


def prepare(case: Case, size: str, steps: int, folder: Path) -> dict[str, Job]:
    """Write checkpoint, rows and jobs of a case; the jobs by the names of their columns."""
    full = size == "7b"
    folder.mkdir(parents=True)
    checkpoint = build(case.family, size, folder / "base", torch.bfloat16 if full else torch.float32)
    if case.ragged:
        data = ragged(case.family, size, checkpoint)[: case.batch]
    else:
        data = rows(case.family, size, checkpoint, 50, case.batch, case.answers)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    mine = {"ours": []}
    if case.script == "dpo":
        mine["cached"] = ["--precompute_ref_log_probs", "True"]
    elif case.script == "sft":  # all rows of a step in one
        mine["ours"] = f"--packing True --max_length {1 << 20} --per_device_train_batch_size 1".split()
    jobs = {}
    for name in [*mine, *case.rivals]:
        jobs[name] = Job(
            case.script, case.family, str(checkpoint), str(folder / "rows.jsonl"), str(folder / "adapter.safetensors"),
            str(folder / name), case.batch, case.answers, steps, full, mine.get(name, []),
        )  # fmt: skip
        Path(jobs[name].folder).mkdir()
        jobs[name].write(folder / name / "job.json")
    return jobs


def run_side(name: str, python: str, jobs: list[Job], folder: Path) -> str:
    """Run one project's jobs in a process of its own environment; returns its output."""
    command = [python, "-m", f"benchmarks.rivals.{name}", *(f"{job.folder}/job.json" for job in jobs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    return done.stdout


def result_of(job: Job, output: str) -> dict[str, Any]:
    """What a side wrote: its figures, or why there are none as `error`."""
    for name, read in (("result.json", json.loads), ("error.txt", lambda text: {"error": text})):
        if Path(job.folder, name).exists():
            return read(Path(job.folder, name).read_text())
    return {"error": output[-3000:] or "no output"}


def run_cases(cases: list[Case], size: str, steps: int, pythons: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """All sides, one after the other; the first of ours writes the adapter that all start from.

    Raises:
        RuntimeError: our own side did not run.
    """
    jobs = {case: prepare(case, size, steps, folder / str(n)) for n, case in enumerate(cases)}
    found: dict[Case, dict[str, Any]] = {case: {} for case in cases}
    columns = {"ours": ["ours", "cached"]} | {name: [name] for name in RIVALS}
    with LoadWatch() as load:
        for side, python in {"ours": sys.executable, **pythons}.items():
            todo = [(case, name, jobs[case][name]) for case in cases for name in columns[side] if name in jobs[case]]
            output = run_side(side, python, [job for _, _, job in todo], folder) if todo else ""
            for case, name, job in todo:
                found[case][name] = result_of(job, output)
                if side == "ours" and "error" in found[case][name]:
                    raise RuntimeError(f"our side failed in {case.name}:\n{found[case][name]['error']}\n{output}")
    return [{"case": case.name, "sides": found[case], "load": load.mean, **compared(found[case])} for case in cases]


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each rival over our sides: time, our memory over its, and the largest difference of losses in any step."""
    result: dict[str, Any] = {"ratio": {}, "memory": {}, "loss_difference": {}}
    mine = [name for name in ("ours", "cached") if name in found]
    for name in [n for n in RIVALS if n in found and "error" not in found[n]]:
        theirs = found[name]
        result["ratio"][name] = [theirs[CLOCK] / found[m][CLOCK] for m in mine]
        result["memory"][name] = [found[m]["peak_mib"] / theirs["peak_mib"] for m in mine]
        result["loss_difference"][name] = max(
            abs(a - b) for m in mine for a, b in zip(found[m]["losses"], theirs["losses"], strict=True)
        )
    return result


def table(cases: list[dict[str, Any]], names: list[str]) -> str:
    """A line per case: seconds, ratios (reference online / cached), memory, differences of losses."""

    def cell(numbers: list[float] | None, form: str) -> str:
        return "–" if numbers is None else " / ".join(format(n, form) for n in numbers)

    lines = []
    for f in cases:
        sides = f["sides"]
        line = {
            "case": f["case"],
            "ours, s": cell([sides[n][CLOCK] for n in ("ours", "cached") if n in sides], ".2f"),
        }
        for name in names:
            line[RIVALS[name]] = cell(f["ratio"].get(name), ".2f")
            line[f"memory over {RIVALS[name]}'s"] = cell(f["memory"].get(name), ".2f")
        differences = f["loss_difference"].values()
        line["losses differ by at most"] = f"{max(differences):.1e}" if differences else "–"
        lines.append(line | {"load": f["load"]})
    return markdown(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every case asked for, print and write the table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of every side")
    parser.add_argument("--case", action="append", help="names or patterns; all otherwise")
    parser.add_argument("--list", metavar="PATTERN", help="print the names of these cases and end")
    parser.add_argument("--swift", help="python of an environment with ms-swift")
    parser.add_argument("--factory", help="python of an environment with LLaMA-Factory")
    parser.add_argument("--out", help="folder for rivals_SIZE.json and .md")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(c.name for c in CASES if fnmatch.fnmatch(c.name, options.list)))
        return []
    pythons = {"trl": sys.executable, "swift": options.swift, "factory": options.factory}
    pythons = {name: python for name, python in pythons.items() if python}
    cases = [c for c in CASES if any(fnmatch.fnmatch(c.name, pattern) for pattern in options.case or ["*"])]
    if not cases:
        parser.error(f"no case is called {' or '.join(options.case)}: {'; '.join(c.name for c in CASES)}")
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = run_cases(cases, options.size, options.steps, pythons, Path(folder))
    for case in found:
        for name, side in case["sides"].items():
            if "error" in side:
                print(
                    f"{case['case']}: {RIVALS[name]} did not run: {side['error'].strip().splitlines()[-1]}",
                    file=sys.stderr,
                )
    heading = (
        f"{about['date']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
    )
    write(
        f"rivals_{options.size}",
        {"machine": about, "cases": found},
        f"{heading}\n\n{table(found, [*pythons])}",
        options.out,
    )
    return found


if __name__ == "__main__":
    main()
