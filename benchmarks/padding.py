"""Steps on rows of different lengths, padded and end to end (base/packed_attention.py), alternating in one process.

OMP_NUM_THREADS=1 python -m benchmarks.padding --size cpu --out benchmarks/results
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

import args as flags
import train_dpo
import train_rm
import train_sft
from base.model import VLModelMixin
from benchmarks.models import PICTURES, SIZES, build, rows
from benchmarks.steps import LoadWatch, Side, machine, markdown, take_turns, write
from common.flags import FlagParser
from data import DataSplits

ANSWERS = (30, 120, 240, 400)  # tokens of both answers of a row
SCRIPTS = {
    "dpo": (train_dpo, flags.DPOConfig),
    "rm": (train_rm, flags.RMConfig),
    "sft": (train_sft, flags.SFTConfig),
}
CASES = [
    ("dpo", "llava", ""),
    ("dpo", "llava", "--precompute_ref_log_probs True"),
    ("dpo", "qwen2_5_vl", "--precompute_ref_log_probs True"),
    ("rm", "llava", ""),
    ("sft", "llava", ""),
]


class RowsSide(Side):
    """A side whose rows lie end to end, or are padded."""

    end_to_end = True

    def step(self, measure: bool = True) -> float:
        """As Side's."""
        VLModelMixin.end_to_end, before = self.end_to_end, VLModelMixin.end_to_end
        try:
            return super().step(measure)
        finally:
            VLModelMixin.end_to_end = before


def ragged(family: str, size: str, checkpoint: Path) -> list[dict[str, Any]]:
    """Two batches of four rows, with answers and, for a family that takes them as they are, pictures of different sizes."""
    found = []
    for i, tokens in enumerate(ANSWERS * 2):
        row = rows(family, size, checkpoint, tokens if size != "tiny" else tokens // 10, i + 1)[-1]
        if family == "qwen2_5_vl" and size != "tiny":
            width, height = PICTURES[family]
            with Image.open(row["images"][0]) as picture:
                picture.resize((width, height * (4 - i % 4) // 4)).save(row["images"][0])
        found.append(row)
    return found


def side_of(script: str, checkpoint: Path, data: list[dict[str, Any]], options: str) -> RowsSide:
    """The trainer that a script builds; its initial weights are the same every time."""
    module, config = SCRIPTS[script]
    parsed = flags.parse(
        flags.ModelArguments,
        flags.DataArguments,
        flags.LoraArguments,
        config,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {checkpoint}/out --disable_tqdm True --learning_rate 1e-4 "
        f"--seed 0 --per_device_train_batch_size {len(ANSWERS)} --use_lora True --lora_r 16 --lora_dropout 0 --max_steps 1000 "
        f"{options}".split(),
    )
    if script == "sft":
        data = [
            {
                "images": row["images"],
                "messages": [*row["prompt"], {"role": "assistant", "content": row["responses"][0]}],
            }
            for row in data
        ]
    trainer, _ = module.build(*parsed, data=DataSplits(Dataset.from_list(data), None, {}))
    if getattr(trainer.args, "precompute_ref_log_probs", False):
        trainer.precompute_reference_logps()
    dataset, collate = trainer.train_dataset, trainer.data_collator
    starts = range(0, len(dataset), len(ANSWERS))
    return RowsSide(trainer, [lambda s=s: collate([dataset[i] for i in range(s, s + len(ANSWERS))]) for s in starts])


def run_case(script: str, family: str, options: str, size: str, steps: int, precision: str) -> dict[str, Any]:
    """Both sides on the same data, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build(family, size, Path(folder))
        data = ragged(family, size, checkpoint)
        cache = f"--ref_log_probs_dir {folder}/reference" if options else ""
        sides = {
            n: side_of(script, checkpoint, data, f"{precision} {options} {cache}") for n in ("padded", "end to end")
        }
        sides["padded"].end_to_end = False
        layout = sides["padded"].batches[0]()["layout"]
        with LoadWatch() as load:
            take_turns(sides, steps)
    padded, ours = (side.timings for side in sides.values())
    return {
        "case": f"{script}, {family}{', reference cached' if options else ''}",
        "real share": layout.tokens / (layout.shape[0] * layout.shape[1]),
        "timings": {n: asdict(s.timings) | {"step_cpu": s.timings.step_cpu} for n, s in sides.items()},
        "ratio": padded.step_cpu / ours.step_cpu,
        "memory_ratio": ours.peak_mib / padded.peak_mib,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(padded.losses, ours.losses, strict=True)),
        "load": load.mean,
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every case, print and write the table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", help="folder for padding_SIZE.json and .md")
    options = parser.parse_args(argv)
    about, precision = machine(), "--bf16 True" if options.size == "7b" else "--use_cpu True"
    found = [run_case(*case, options.size, options.steps, precision) for case in CASES]
    table = markdown(
        [
            {
                "case": f["case"],
                "real tokens": f"{f['real share']:.0%}",
                "padded, processor s": f"{f['timings']['padded']['step_cpu']:.2f}",
                "end to end, processor s": f"{f['timings']['end to end']['step_cpu']:.2f}",
                "faster": f"{f['ratio']:.2f}",
                "memory": f"{f['memory_ratio']:.2f}",
                "last losses": " / ".join(f"{t['losses'][-1]:.5f}" for t in f["timings"].values()),
                "load": f["load"],
            }
            for f in found
        ]
    )
    heading = (
        f"{about['date']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
    )
    write(f"padding_{options.size}", {"machine": about, "cases": found}, f"{heading}\n\n{table}", options.out)
    return found


if __name__ == "__main__":
    main()
