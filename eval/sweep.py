"""Several checkpoints on several benchmarks: generate, score, report, with a curve over steps.

    python -m eval.sweep --checkpoints llava-hf/llava-1.5-7b-hf runs/dpo/checkpoint-* --benchmarks benchmarks.yaml \
        --tasks pope,mme,chair --output runs/dpo/sweep --bf16 True
    torchrun --nproc_per_node 8 -m eval.sweep ...

benchmarks.yaml says once where everything lies; `generate` and `score` hold flags of eval.generate and of the task's scorers:

    pope:    {data_path: coco_pope/, image_root: val2014/}
    chair:   {data_path: chair_images.jsonl, generate: {num_beams: 3}, score: {coco: annotations/, synonyms: synonyms.txt}}
    mmhal:   {data_path: mmhal-bench_answer_template.json, image_root: images/,
              score: {judge: "http://localhost:8000/v1", judge_model: M}}

Each checkpoint is loaded once. Everything resumes: what is answered is not answered again.
"""

import argparse
import copy
from pathlib import Path

import torch
import yaml

from args import run
from common.errors import InputError
from common.flags import FlagParser
from eval import chair, choice, judged, mathvista, own, report, reward, reward_benchmarks, yesno
from eval.benchmark_files import read_task
from eval.files import read_text
from eval.generate import Answerer, add_generation_arguments, answer_rows, barrier, ranks, rendering_of

SCORERS = {
    "pope": [yesno.main],
    "mme": [yesno.main],
    "hallusion": [yesno.main],
    "amber": [yesno.main, chair.main],
    "mmbench": [choice.main],
    "seed": [choice.main],
    "mmmu": [choice.main],
    "mathvista": [mathvista.main],
    "chair": [chair.main],
    "objhal": [chair.main],
    "mmhal": [judged.main],
    "mmvet": [judged.main],
    "plain": [own.main],
    "refomb": [judged.main],
    **{task: [reward.main] for task in reward_benchmarks.SCORERS},
}


def read_benchmarks(path: str, tasks: str | None) -> dict[str, dict]:
    """The entries of benchmarks.yaml (paths relative to the working directory), cut down to `tasks` (joined by commas)."""
    try:
        entries = yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise InputError(f"{path} is not YAML: {str(e).splitlines()[0]}") from None
    if isinstance(entries, dict):
        entries = {name: _renamed(e) if isinstance(e, dict) else e for name, e in entries.items()}
    if not isinstance(entries, dict) or not all(isinstance(e, dict) and "data_path" in e for e in entries.values()):
        raise InputError(f"{path}: every task needs an entry with 'data_path'; python -m eval.sweep --help shows one")
    names = tasks.split(",") if tasks else list(entries)
    for name in names:
        if name not in entries:
            raise InputError(f"{path} has no entry '{name}'; it has {', '.join(entries)}")
        if name not in SCORERS:
            raise InputError(f"no scorer is known for '{name}'; known are {', '.join(SCORERS)}")
        wrong = set(entries[name]) - {"data_path", "image_root", "generate", "score"}
        if wrong:
            raise InputError(f"{path}: {name} has '{min(wrong)}'; known are data_path, image_root, generate and score")
    return {name: entries[name] for name in names}


def _renamed(entry: dict) -> dict:
    """An entry with today's names in the place of the older ones."""
    names = {"data": "data_path", "image_dir": "image_root"}
    return {names.get(key, key): value for key, value in entry.items()}


def run_names(checkpoints: list[str]) -> list[str]:
    """A folder name per checkpoint: the shortest ends of the paths that tell them apart."""
    parts = [Path(c).parts for c in checkpoints]
    depth = 1
    while depth < 8 and len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    names = ["-".join(p.strip("/") for p in part[-depth:]) for part in parts]
    if len(set(names)) < len(names):
        raise InputError("--checkpoints names the same folder twice")
    return names


def flags(values: dict | None) -> list[str]:
    """{"coco": "x", "quick_extract": True} -> ["--coco", "x", "--quick_extract"]."""
    out: list[str] = []
    for name, value in (values or {}).items():
        if value is not False and value is not None:
            out += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return out


def evaluate(
    args: argparse.Namespace, checkpoint: str, folder: Path, benchmarks: dict[str, dict], place: tuple
) -> None:
    """Generate on every rank, score on the first."""
    rank, world, device = place
    answerer = None
    for task, entry in benchmarks.items():
        common = ["--task", task, "--data_path", entry["data_path"], *flags({"image_root": entry.get("image_root")})]
        common += flags({"results_db": args.results_db})
        if task in reward_benchmarks.SCORERS:  # loads the model by itself, on one rank
            if rank == 0:
                reward.main(
                    [*common, "--model_name_or_path", checkpoint, "--output", str(folder), *flags(entry.get("score"))]
                )
            continue
        generation = copy.copy(args)
        unknown = set(entry.get("generate") or {}) - set(vars(args))
        if unknown:
            raise InputError(f"{args.benchmarks}: {task} has the unknown generate setting '{min(unknown)}'")
        vars(generation).update({"num_workers": args.num_workers, **(entry.get("generate") or {})})
        vars(generation).update(
            task=task,
            data_path=entry["data_path"],
            image_root=entry.get("image_root"),
            model_name_or_path=checkpoint,
            adapter=None,
        )
        generation.output = str(folder / f"{task}.jsonl")
        if answerer is None:
            answerer = Answerer(checkpoint, None, device, args.bf16, **rendering_of(generation))
        answer_rows(
            generation,
            read_task(task, generation.data_path, generation.image_root, generation.limit),
            answerer,
            rank,
            world,
        )
        if rank == 0:
            for score in SCORERS[task]:
                score([*common, "--answers", generation.output, *flags(_accepted(score, entry.get("score")))])
    del answerer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next checkpoint needs the room at once


def _accepted(score: object, values: dict | None) -> dict | None:
    """AMBER has two scorers with one `score` entry: --annotations is for both, other flags for the generative one."""
    if score is yesno.main:
        return {k: v for k, v in (values or {}).items() if k == "annotations"}
    return values


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--checkpoints", nargs="+", required=True, help="checkpoints, hub ids or adapter folders")
    parser.add_argument("--benchmarks", required=True, help="benchmarks.yaml, see above")
    parser.add_argument("--tasks", help="joined by commas; default: all of the file")
    parser.add_argument("--output", required=True, help="one folder per checkpoint, and report/")
    parser.add_argument("--results_db", help="also append the scores here: any SQLAlchemy URL")
    parser.add_argument("--max_rows", type=int, default=200, help="rows per benchmark on the report page")
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    benchmarks = read_benchmarks(args.benchmarks, args.tasks)
    folders = [Path(args.output) / name for name in run_names(args.checkpoints)]
    with ranks() as place:
        for checkpoint, folder in zip(args.checkpoints, folders, strict=True):
            evaluate(args, checkpoint, folder, benchmarks, place)
            barrier(place[1])
        if place[0] == 0:
            report.write_report(report.read_runs(folders), Path(args.output) / "report", args.max_rows)


if __name__ == "__main__":
    run(main)
