"""From the start of a script to its first step on a tiny checkpoint: what is imports, what is ours. Processor seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.startup
    OMP_NUM_THREADS=1 python -m benchmarks.startup --scripts dpo --profile True

Each script runs one step in a process of its own, on 200 of the embedded pictures. The time of imports is that of the
modules' own code, whenever they are imported, those of this repository apart; the other columns are phases of the run
without the imports in them. --profile prints the functions of this repository in which most of the time after the
imports is spent, callees included (it makes everything slower).
"""

import argparse
import contextlib
import cProfile
import importlib
import io
import json
import os
import pstats
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from pathlib import Path

from common.files import write_json
from common.flags import FlagParser

ROOT = Path(__file__).parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
COLUMNS = (
    *("imports of others", "of them torch", "imports of ours", "start of Python", "flags"),
    *("model and rows", "before the first step", "first step", "all"),
)
LORA = "--use_lora True --lora_r 8 --per_device_train_batch_size 4"
PAIRS = f"--dataset_name plain_dpo --data_path DATA/pairs.json {LORA}"
SCRIPTS = {
    "sft": f"--dataset_name vlquery_json --data_path DATA/sft.json {LORA}",
    "rm": PAIRS,
    "dpo": PAIRS,
    "ppo": "--dataset_name DATA/prompts.json --reward_fn scripts/demo_rewards.py:caption_f1 --advantage_estimator grpo "
    f"--num_generations 4 --response_length 8 {LORA}",
}
ALL = "--image_root DATA --max_steps 1 --logging_steps 1 --save_strategy no --disable_tqdm True --use_cpu True"


class Imports:
    """Processor seconds of the code of modules while they are imported, what they import in turn left out.

    Attributes:
        seconds: by package.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._nested: list[float] = []
        for loader in (SourceFileLoader, ExtensionFileLoader):
            for name in ("create_module", "exec_module"):
                setattr(loader, name, self._timed(getattr(loader, name)))

    def _timed(self, load: Callable) -> Callable:
        def timed(loader: SourceFileLoader | ExtensionFileLoader, module: object) -> object:
            self._nested.append(0.0)
            started = time.process_time()
            try:
                return load(loader, module)
            finally:
                took = time.process_time() - started
                self.seconds[loader.name.split(".")[0]] += took - self._nested.pop()
                if self._nested:
                    self._nested[-1] += took

        return timed


def inside(script: str, file: Path, profile: bool, flags: Sequence[str]) -> None:
    """What the process of a script does: run it, and write the seconds of imports and phases to `file`."""
    imports, row = Imports(), {}
    spent = [0.0, 0.0]

    def end(phase: str) -> None:
        """Of a phase: keep its time without the imports in it."""
        now = [time.process_time(), sum(imports.seconds.values())]
        row.setdefault(phase, (now[0] - spent[0]) - (now[1] - spent[1]))
        spent[:] = now

    module = importlib.import_module(f"train_{script}")
    from transformers import TrainerCallback

    end("start of Python")

    class Ends(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            end("before the first step")

        def on_step_end(self, *_: object, **__: object) -> None:
            end("first step")
            ours = sum(seconds for name, seconds in imports.seconds.items() if name in OURS)
            row["imports of others"] = sum(imports.seconds.values()) - ours
            row.update({"of them torch": imports.seconds["torch"], "imports of ours": ours, "all": time.process_time()})

    build = module.build

    def watched(*args: object) -> tuple:
        end("flags")
        trainer, about = build(*args)
        end("model and rows")
        trainer.add_callback(Ends)
        return trainer, about

    module.build = watched
    profiler = cProfile.Profile()
    with profiler if profile else contextlib.nullcontext():
        module.main(list(flags))
    write_json(file, row)
    if profile:
        profiler.dump_stats(file.with_suffix(".profile"))


def measure(script: str, data: Path, out: Path, profile: bool) -> dict[str, float]:
    """Run a script in a process of its own; seconds by column."""
    file = out / f"{script}.json"
    flags = f"--model_name_or_path {data}/init --output_dir {out}/{script} {ALL} {SCRIPTS[script]}"
    # Not -m: the package `benchmarks` imports torch before anything can be measured.
    alone = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", alone, "--inside", script, str(file), str(profile)]
    run = subprocess.run(
        [*command, *flags.replace("DATA", str(data)).split()], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"train_{script}.py ended with {run.returncode}:\n{run.stdout}{run.stderr}"[-3000:])
    if profile:
        print(profiled(file.with_suffix(".profile")))
    return json.loads(file.read_text())


def profiled(file: Path) -> str:
    """The functions of this repository that take longest, callees included."""
    text = io.StringIO()
    pstats.Stats(str(file), stream=text).sort_stats("cumulative").print_stats(re.escape(str(ROOT)) + r"/(?!\.venv)", 25)
    return text.getvalue().replace(f"{ROOT}/", "")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every script and print a table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--profile", default=False, type=lambda word: word == "True", help="True: print a profile, too")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--inside"]:
        inside(words[1], Path(words[2]), words[3] == "True", words[4:])
        return
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        made = f"--output_dir {data} --num_train 200 --num_eval 10 --init_model {data}/init"
        subprocess.run(
            [sys.executable, "-m", "data.shapes", *made.split()], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        rows = {script: measure(script, data, Path(folder), args.profile) for script in args.scripts}
    print("| | " + " | ".join(COLUMNS) + " |\n|---" + "|---:" * len(COLUMNS) + "|")
    for script, row in rows.items():
        print(f"| train_{script}.py | " + " | ".join(f"{row[column]:.2f}" for column in COLUMNS) + " |")
    print(f"\n{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
