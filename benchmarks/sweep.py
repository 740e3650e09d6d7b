"""The same training over a grid of flags and seeds: one table with mean and deviation, LaTeX, and plots.

    python -m benchmarks.sweep train_dpo.py --grid beta=.05,.1,.2,.5 seed=0,1,2 --output runs/beta \\
        -- --model_name_or_path runs/sft --use_lora True --dataset_name pairs.json --image_root images --eval_ratio 0.1
    python -m benchmarks.sweep ... --gpus 0,1,2,3 --benchmarks benchmarks.yaml -- ...
    python -m benchmarks.sweep ... --evaluate "python my_eval.py --adapter RUN --output RUN/scores.json" -- ...

What stands behind `--` goes to every run. --evaluate is a command of yours for each run, whose folder takes the place of
RUN: the numbers in RUN/scores.json become columns. Runs take turns, or one each GPU of --gpus. The same command goes on where it was
stopped: finished runs are kept, others resume from their checkpoint. `seed`, if it is in the grid, is averaged over.
Flags that change together are one entry: lora_r:lora_alpha=4:8,32:64

    runs/beta/beta=.05,seed=0/     a run each, and its .log
    table.md  table.tex            a row per setting; mean ± standard deviation over seeds (n - 1)
    results.json                   every number of every run
    beta.png                       every metric against each flag whose values are numbers
"""

import itertools
import json
import math
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from args import RUN_JSON, run
from common.errors import InputError
from common.files import replacing, write_json, write_text
from common.flags import FlagParser
from common.pages import LIGHT
from eval.report import cells, columns, read_runs
from eval.sweep import run_names

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_sft.py", "train_rm.py", "train_dpo.py", "train_ppo.py")
SEED = "seed"
Setting = tuple[tuple[str, str], ...]  # (flag, value), seed left out


@dataclass(frozen=True)
class Job:
    """One run: its values of the grid's flags, and its command."""

    values: dict[str, str]
    folder: Path
    command: list[str]

    @property
    def setting(self) -> Setting:
        """What seeds share."""
        return tuple((name, value) for name, value in self.values.items() if name != SEED)

    def finished(self) -> bool:
        """Whether its last step was taken and the model saved.

        Raises:
            InputError: the folder holds a run of another command.
        """
        if (self.folder / RUN_JSON).is_file():
            argv = json.loads((self.folder / RUN_JSON).read_text())["argv"][1:]
            if (argv[:-2] if argv[-2:] == RESUME else argv) != self.command[2:]:
                raise InputError(
                    f"{self.folder} holds a run of another command ({shlex.join(argv)}): give another --output, or remove it."
                )
        state = self.folder / "trainer_state.json"  # of the end: checkpoints have their own
        return state.is_file() and (lambda s: s["global_step"] >= s["max_steps"])(json.loads(state.read_text()))


RESUME = ["--resume_from_checkpoint", "True"]


def read_grid(given: Sequence[str]) -> dict[str, list[str]]:
    """["beta=.05,.1", "seed=0,1"] -> {"beta": [".05", ".1"], "seed": ["0", "1"]}; a name may be "lora_r:lora_alpha".

    Raises:
        InputError: an entry has no values, a value of too few or too many flags, or a flag or a value comes twice.
    """
    grid: dict[str, list[str]] = {}
    for entry in given:
        name, _, values = entry.removeprefix("--").partition("=")
        listed = [value for value in values.split(",") if value]
        if (
            not listed
            or set(name.split(":")) & {n for key in grid for n in key.split(":")}
            or len(set(listed)) < len(listed)
        ):
            raise InputError(f"--grid {entry}: give every flag once, as name=value,value,... with different values.")
        if uneven := [value for value in listed if ":" in name and value.count(":") != name.count(":")]:
            raise InputError(f"--grid {entry}: {uneven[0]} is not one value for each flag of {name}.")
        grid[name] = listed
    return grid


def jobs_of(script: str, grid: dict[str, list[str]], output: Path, flags: Sequence[str]) -> list[Job]:
    """One job per combination, seeds last.

    Raises:
        InputError: the flags of all runs hold one of the grid, or --output_dir.
    """
    names = [name for key in grid for name in key.split(":")]
    for name in (*names, "output_dir", "overwrite_output_dir", "resume_from_checkpoint"):
        if any(word.split("=")[0].replace("-", "_") == f"__{name}" for word in flags):
            raise InputError(f"--{name} stands behind --, where the flags of all runs stand: the sweep sets it.")
    jobs = []
    for values in itertools.product(*grid.values()):
        together = zip(grid, values, strict=True)
        chosen = dict(
            pair
            for key, value in together
            for pair in (zip(key.split(":"), value.split(":"), strict=True) if ":" in key else [(key, value)])
        )
        folder = output / ",".join(f"{name}={value.replace('/', '_')}" for name, value in chosen.items())
        own = [word for name, value in chosen.items() for word in (f"--{name}", *_words(value))]
        jobs.append(
            Job(chosen, folder, [sys.executable, str(ROOT / script), *flags, *own, "--output_dir", str(folder)])
        )
    return jobs


def _words(value: str) -> list[str]:
    """sigmoid+sft are two words, 1e+5 is one."""
    return [value] if _number(value) is not None else value.split("+")


def call(command: Sequence[str], log: str, environment: dict[str, str]) -> int:
    """Run a command, what it prints goes to the end of `log`; returns its exit status."""
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment).wait()


def train(jobs: Sequence[Job], gpus: Sequence[str]) -> list[Job]:
    """Run what is not finished, one job per GPU at a time (in turn, if no GPU is named); returns the jobs that failed.

    Raises:
        SystemExit: after Ctrl-C, which the runs get as well: they save a checkpoint, and no other one starts.
    """
    waiting: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        if job.finished():
            print(f"{job.folder}: finished before")
        else:
            waiting.put(job)
    failed: list[Job] = []
    stop = threading.Event()

    def work(gpu: str | None) -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
            goes_on = RESUME if [*job.folder.glob("checkpoint-*")] else []
            print(f"{job.folder}: {'going on' if goes_on else 'starting'}", flush=True)
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            if code := call([*job.command, *goes_on], f"{job.folder}.log", environment):
                failed.append(job)
                print(f"{job.folder}: exit status {code}, see {job.folder}.log", flush=True)

    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        if gpus:
            with ThreadPoolExecutor(len(gpus)) as pool:
                for ended in [pool.submit(work, gpu) for gpu in gpus]:
                    ended.result()
        else:
            work(None)
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.is_set():
        print("Stopped; the same command goes on.", file=sys.stderr)
        raise SystemExit(130)
    return failed


def numbers_of(job: Job) -> dict[str, float]:
    """The last value of every metric on held-out rows; without any, of the training loss."""
    last: dict[str, float] = {}
    for entry in json.loads((job.folder / "trainer_state.json").read_text())["log_history"]:
        last |= {name: value for name, value in entry.items() if isinstance(value, int | float)}
    held = {
        name: v
        for name, v in last.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    }
    return held or {"train_loss": last["train_loss"]}


def benchmark_numbers(
    jobs: Sequence[Job], benchmarks: str, output: Path, flags: Sequence[str]
) -> list[dict[str, float]]:
    """Headline numbers of eval.sweep for every job."""
    checkpoints = [str(job.folder) for job in jobs]
    command = [sys.executable, "-m", "eval.sweep", "--benchmarks", benchmarks, "--output", str(output / "eval"), *flags]
    command += ["--checkpoints", *checkpoints]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode:
        raise InputError(f"The benchmarks ended with an error, see above: {shlex.join(command)}")
    runs = read_runs([output / "eval" / name for name in run_names(checkpoints)])
    table = columns(runs)
    return [
        {metric.title: value for (_, metric), value in zip(table, row, strict=True) if value is not None}
        for row in cells(runs, table)
    ]


def command_numbers(jobs: Sequence[Job], command: str) -> list[dict[str, float]]:
    """The numbers that `command` leaves in scores.json of every job's folder; what is younger than its run is kept.

    Raises:
        InputError: the command ended with an error, or left no such file.
    """
    found = []
    for job in jobs:
        file, trained = job.folder / "scores.json", job.folder / "trainer_state.json"
        if not file.is_file() or file.stat().st_mtime < trained.stat().st_mtime:
            words = [word.replace("RUN", str(job.folder)) for word in shlex.split(command)]
            words = [sys.executable if words[0] in ("python", "python3") else words[0], *words[1:]]
            print(f"{job.folder}: evaluating", flush=True)
            if code := call(words, f"{job.folder}.log", dict(os.environ)):
                raise InputError(f"--evaluate ended with exit status {code}, see {job.folder}.log: {shlex.join(words)}")
            if not file.is_file():
                raise InputError(f"--evaluate has not written {file}: {shlex.join(words)}")
        scores = json.loads(file.read_text())
        found.append({k: v for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)})
    return found


def averaged(
    jobs: Sequence[Job], numbers: Sequence[dict[str, float]]
) -> dict[Setting, dict[str, tuple[float, float | None, int]]]:
    """Setting -> metric -> (mean, standard deviation with n - 1, or None of a single run, n)."""
    groups: dict[Setting, dict[str, list[float]]] = {}
    for job, found in zip(jobs, numbers, strict=True):
        for name, value in found.items():
            groups.setdefault(job.setting, {}).setdefault(name, []).append(value)
    return {
        setting: {
            name: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else None, len(v))
            for name, v in metrics.items()
        }
        for setting, metrics in groups.items()
    }


def _shown(cell: tuple[float, float | None, int] | None, sign: str) -> str:
    if cell is None:
        return "-"
    mean, deviation, _ = cell
    return f"{mean:.4g}" + (f" {sign} {deviation:.2g}" if deviation is not None else "")


def tables(means: dict[Setting, dict[str, tuple[float, float | None, int]]], metrics: Sequence[str]) -> tuple[str, str]:
    """The table as Markdown and as LaTeX (booktabs)."""
    flags = [name for name, _ in next(iter(means))]
    seeds = [max(n for _, _, n in found.values()) for found in means.values()]
    head = [*flags, *metrics, "runs"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(flags)}{'---:|' * (len(metrics) + 1)}"]
    body = []
    for (setting, found), n in zip(means.items(), seeds, strict=True):
        values = [value for _, value in setting]
        lines.append(f"| {' | '.join([*values, *(_shown(found.get(m), '±') for m in metrics), str(n)])} |")
        body.append(
            " & ".join([*map(_latex, values), *(_shown(found.get(m), r"$\pm$") for m in metrics), str(n)]) + r" \\"
        )
    rule = f"\\begin{{tabular}}{{{'l' * len(flags)}{'r' * (len(metrics) + 1)}}}\n\\toprule\n"
    latex = (
        rule
        + " & ".join(map(_latex, head))
        + " \\\\\n\\midrule\n"
        + "\n".join(body)
        + "\n\\bottomrule\n\\end{tabular}\n"
    )
    return "\n".join(lines) + "\n", latex


def _latex(text: str) -> str:
    for mark in "&%$#_":
        text = text.replace(mark, "\\" + mark)
    return text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def tied(settings: Sequence[Setting], flag: str) -> set[str]:
    """The flag, and those that change with it and only with it."""
    rows = [dict(setting) for setting in settings]
    values = len({row[flag] for row in rows})
    return {n for n in rows[0] if values == len({row[n] for row in rows}) == len({(row[flag], row[n]) for row in rows})}


def plot(
    means: dict[Setting, dict[str, tuple[float, float | None, int]]], metrics: Sequence[str], flag: str, path: Path
) -> None:
    """Every metric against one flag; a line per setting of the other flags, bars of one deviation."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lines: dict[Setting, list[tuple[float, dict]]] = {}
    with_it = tied(list(means), flag)
    for setting, found in means.items():
        others = tuple((name, value) for name, value in setting if name not in with_it)
        lines.setdefault(others, []).append((float(dict(setting)[flag]), found))
    wide = min(3, len(metrics))
    tall = math.ceil(len(metrics) / wide)
    figure = Figure(figsize=(3.8 * wide, 2.9 * tall), layout="constrained")
    axes = figure.subplots(tall, wide, squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for n, (others, points) in enumerate(lines.items()):
            known = sorted((x, found[metric]) for x, found in points if metric in found)
            x, y, spread = [k[0] for k in known], [k[1][0] for k in known], [k[1][1] or 0 for k in known]
            label = ", ".join(f"{name} {value}" for name, value in others)
            axis.errorbar(x, y, spread, marker="o", markersize=4, capsize=3, color=LIGHT[n % len(LIGHT)], label=label)
        xs = [x for points in lines.values() for x, _ in points]
        if min(xs) > 0 and max(xs) >= 8 * min(xs):
            axis.set_xscale("log")
        axis.set_xticks(sorted(set(xs)), [f"{x:g}" for x in sorted(set(xs))])
        axis.minorticks_off()
        axis.set_xlabel(flag, fontsize=9)
        axis.set_title(metric, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        figure.legend(
            *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
        )
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130, format="png")


def report(jobs: Sequence[Job], numbers: Sequence[dict[str, float]], wanted: Sequence[str], output: Path) -> None:
    """Write results.json, both tables, and a plot for every flag with several numbers as values.

    Raises:
        InputError: no run has a metric that --metrics names.
    """
    known = list(dict.fromkeys(name for found in numbers for name in found))
    if missing := [name for name in wanted if name not in known]:
        raise InputError(f"--metrics {missing[0]}: no run has it; they have {', '.join(known)}.")
    metrics = list(wanted) or known
    means = averaged(jobs, numbers)
    write_json(
        output / "results.json",
        [{**job.values, "folder": str(job.folder), **n} for job, n in zip(jobs, numbers, strict=True)],
    )
    markdown, latex = tables(means, metrics)
    write_text(output / "table.md", markdown)
    write_text(output / "table.tex", latex)
    written = ["results.json", "table.md", "table.tex"]
    for flag in dict.fromkeys(name for setting in means for name, _ in setting):
        values = {dict(setting)[flag] for setting in means}
        if len(values) > 1 and all(_number(value) is not None for value in values):
            plot(means, metrics, flag, output / f"{flag}.png")
            written.append(f"{flag}.png")
    print(f"\n{markdown}\n{output}: {' '.join(written)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, report; the exit status is 1 if a run failed, whose numbers are then left out."""
    words = list(sys.argv[1:] if argv is None else argv)
    mine, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = FlagParser(description=__doc__)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--grid", nargs="+", required=True, help="name=value,value,...; sigmoid+sft are two words")
    parser.add_argument("--output", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--gpus", default="", help="one run each at a time: 0,1,2,3")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        help="columns of the table; default: all of held-out rows, and the benchmarks",
    )
    parser.add_argument("--benchmarks", help="benchmarks.yaml of eval.sweep: evaluate every run, too")
    parser.add_argument("--evaluate", help="a command for every run that writes RUN/scores.json")
    parser.add_argument(
        "--benchmark_flags", default="", help='further flags of eval.sweep, in quotes: "--bf16 True --limit 100"'
    )
    if not flags and not {"-h", "--help"} & set(mine):
        raise InputError(
            "The flags of the training stand at the end, behind --, as in: ... --output runs/beta -- --use_lora True"
        )
    args = parser.parse_args(mine)
    jobs = jobs_of(args.script, read_grid(args.grid), args.output, flags)
    failed = train(jobs, [gpu for gpu in args.gpus.split(",") if gpu])
    done = [job for job in jobs if job not in failed]
    if not done:
        raise InputError(f"All {len(jobs)} runs failed; {jobs[0].folder}.log says why the first one did.")
    numbers = [numbers_of(job) for job in done]
    if args.benchmarks:
        more = benchmark_numbers(done, args.benchmarks, args.output, shlex.split(args.benchmark_flags))
        numbers = [a | b for a, b in zip(numbers, more, strict=True)]
    if args.evaluate:
        numbers = [a | b for a, b in zip(numbers, command_numbers(done, args.evaluate), strict=True)]
    report(done, numbers, args.metrics, args.output)
    return 1 if failed else 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
