"""How long a step waits for its batch, prepared in the main process or in loader workers during the computation.

    OMP_NUM_THREADS=1 python -m benchmarks.data_wait --size cpu --out benchmarks/results

A batch is decoded, resized and tokenised. Pictures have the size of photographs (1280 x 960 JPEG, a new one for every
row), because decoding costs most. Each setting is one run of the trainer of train_dpo.py; `waiting` is the time inside
the loader's `next`, without the first batch, for which workers start.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.dpo_vs_trl import CASES, MORE_CASES, Case, our_trainer
from benchmarks.models import SIZES, build, picture, rows
from benchmarks.steps import LoadWatch, machine, markdown, write
from common.flags import FlagParser


def photographs(folder: Path, data: list[dict[str, Any]]) -> None:
    """Give every row a JPEG of 1280 x 960."""
    for i, row in enumerate(data):
        path = folder / f"photograph{i}.jpg"
        picture((1280, 960), i).save(path, quality=90)
        row["images"] = [str(path)]


def run(case: Case, checkpoint: Path, data: list[dict[str, Any]], workers: int, steps: int, precision: str) -> dict:
    """Seconds that a step of one run takes, and how many of them it waits."""
    options = f"{precision} --dataloader_num_workers {workers} --save_strategy no --report_to none"
    trainer = our_trainer(case, checkpoint, data, options, checkpoint / "reference")
    trainer.args.max_steps = steps + 1
    waits: list[float] = []
    ends: list[float] = []
    fetch, step = trainer.get_batch_samples, trainer.training_step

    def timed_fetch(*arguments: Any) -> tuple[list[dict[str, Any]], Any]:
        start = time.perf_counter()
        batches = fetch(*arguments)
        if batches[0]:
            waits.append(time.perf_counter() - start)
        return batches

    def timed_step(*arguments: Any) -> torch.Tensor:
        loss = step(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return loss

    trainer.get_batch_samples, trainer.training_step = timed_fetch, timed_step
    trainer.train()
    whole = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "workers": workers,
        "step": statistics.median(whole),
        "waiting": statistics.median(waits[1:]),
        "share": sum(waits[1:]) / sum(whole),
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every number of loader workers on one case, print and write the table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--case", default="llava-50", help="a case of benchmarks.dpo_vs_trl")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="folder for data_wait_SIZE.json and .md")
    options = parser.parse_args(argv)
    case = next(c for c in CASES + MORE_CASES if c.name == options.case)
    dtype = torch.bfloat16 if options.size == "7b" else torch.float32
    precision = "--bf16 True" if options.size == "7b" else "--use_cpu True"
    about = machine()
    with tempfile.TemporaryDirectory() as folder, LoadWatch() as load:
        checkpoint = build(case.family, options.size, Path(folder), dtype)
        count = (options.steps + 1) * case.batch  # one epoch: workers start once
        data = rows(case.family, options.size, checkpoint, case.answer, count, case.responses, case.common)
        photographs(Path(folder), data)
        found = [run(case, checkpoint, data, n, options.steps, precision) for n in options.workers]
    table = markdown(
        [
            {
                "loader workers": f["workers"],
                "step, s": f"{f['step']:.3f}",
                "of it waiting for data, s": f"{f['waiting']:.4f}",
                "share": f"{f['share']:.2%}",
            }
            for f in found
        ]
    )
    heading = f"{case.name}, {about['date']}, {about['device']}, {about['threads']} threads, {about['commit']}, load {load.mean}"
    write(f"data_wait_{options.size}", {"machine": about, "runs": found}, f"{heading}\n\n{table}", options.out)
    return found


if __name__ == "__main__":
    main()
