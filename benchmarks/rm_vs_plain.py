"""Reward-model steps on packed and on plain rows (`--share_prefix False`), alternating; images encoded are counted.

OMP_NUM_THREADS=2 python -m benchmarks.rm_vs_plain --size cpu --out benchmarks/results
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

import args as flags
import train_rm
from benchmarks.models import SIZES, build, rows
from benchmarks.steps import LoadWatch, Side, machine, markdown, take_turns, write
from common.flags import FlagParser
from data import DataSplits

CASES = [
    ("llava", 50, 2),
    ("llava", 150, 2),
    ("llava", 50, 4),
    ("llava_wide", 50, 2),
]  # family, tokens of an answer, answers per row


def side_of(checkpoint: Path, data: list[dict[str, Any]], batch: int, options: str) -> Side:
    """The trainer that train_rm.py builds; its initial weights do not depend on the options."""
    parsed = flags.parse(
        flags.ModelArguments,
        flags.DataArguments,
        flags.LoraArguments,
        flags.RMConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {checkpoint}/rm --disable_tqdm True --learning_rate 1e-4 --seed 0 "
        f"--per_device_train_batch_size {batch} --use_lora True --lora_r 16 --lora_dropout 0 --max_steps 1000 {options}".split(),
    )
    trainer, _ = train_rm.build(*parsed, data=DataSplits(Dataset.from_list(data), None, {}))
    dataset, collate = trainer.train_dataset, trainer.data_collator
    starts = range(0, len(dataset), batch)
    return Side(trainer, [lambda s=s: collate([dataset[i] for i in range(s, s + batch)]) for s in starts])


def run_case(family: str, tokens: int, responses: int, size: str, steps: int, precision: str) -> dict[str, Any]:
    """Steps of packed and of plain rows on the same data, in turns: times, memory, images per step, losses."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build(family, size, Path(folder))
        batch = 2 if responses == 2 else 1
        data = rows(family, size, checkpoint, tokens, 2 * batch, responses)
        sides = {
            name: side_of(checkpoint, data, batch, f"{precision} --share_prefix {name == 'shared'}")
            for name in ("plain", "shared")
        }
        images: dict[str, list[int]] = {name: [] for name in sides}
        for name, side in sides.items():
            tower = side.trainer.base_model(side.trainer.model).get_vision_tower()
            tower.register_forward_hook(
                lambda _, inputs, kwargs, output, name=name: images[name].append(
                    len(inputs[0] if inputs else kwargs["pixel_values"])
                ),
                with_kwargs=True,
            )
        with LoadWatch() as load:
            take_turns(sides, steps)
        timings = {name: side.timings for name, side in sides.items()}
    plain, shared = timings["plain"], timings["shared"]
    return {
        "case": f"{family}-{tokens}, {responses} answers",
        "timings": {name: asdict(t) | {"step": t.step, "step_compute": t.step_compute} for name, t in timings.items()},
        "tower_images_per_step": {name: seen[-1] for name, seen in images.items()},
        "ratio": plain.step / shared.step,
        "ratio_compute": plain.step_compute / shared.step_compute,
        "memory_ratio": shared.peak_mib / plain.peak_mib,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(plain.losses, shared.losses, strict=True)),
        "load": load.mean,
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every case, print and write the table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", help="folder for rm_vs_plain_SIZE.json and .md")
    options = parser.parse_args(argv)
    about, precision = machine(), "--bf16 True" if options.size == "7b" else "--use_cpu True"
    found = [run_case(*case, options.size, options.steps, precision) for case in CASES]
    table = markdown(
        [
            {
                "case": f["case"],
                "plain, s": f"{f['timings']['plain']['step']:.2f}",
                "shared, s": f"{f['timings']['shared']['step']:.2f}",
                "faster": f"{f['ratio']:.2f}",
                "compute alone": f"{f['ratio_compute']:.2f}",
                "memory": f"{f['memory_ratio']:.2f}",
                "images through the tower": f"{f['tower_images_per_step']['plain']} / {f['tower_images_per_step']['shared']}",
                "last losses": " / ".join(f"{f['timings'][n]['losses'][-1]:.5f}" for n in ("plain", "shared")),
                "load": f["load"],
            }
            for f in found
        ]
    )
    heading = (
        f"{about['date']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
    )
    write(f"rm_vs_plain_{options.size}", {"machine": about, "cases": found}, f"{heading}\n\n{table}", options.out)
    return found


if __name__ == "__main__":
    main()
