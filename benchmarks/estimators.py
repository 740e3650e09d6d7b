"""Every advantage estimator on the embedded pictures, three seeds: one table, one plot. A toy problem, trained for real.

    OMP_NUM_THREADS=1 python -m benchmarks.estimators --output_dir runs/estimators

A seed draws scenes and trains the demo's SFT model on noisy captions. From it every estimator trains 30 updates of 8
prompts with 8 answers each against the rule of scripts/demo_rewards.py, the F1 of named objects: `gae` with the demo's
settings of PPO (two passes, KL in the reward), the others on policy without KL. What is finished is read from the
folder: a run that was stopped goes on.
"""

import contextlib
import io
import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from tqdm import tqdm

import data.shapes
import train_ppo
import train_sft
from common.files import write_json, write_text
from common.flags import FlagParser
from eval.shapes import evaluate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# scripts/demo.sh
COMMON = "--lr_scheduler_type cosine --save_strategy no --disable_tqdm True --use_cpu True"
SFT = (
    "--dataset_name vlquery_json --freeze_vision_tower False --per_device_train_batch_size 16 --num_train_epochs 3 --learning_rate 1e-3 "
    "--warmup_steps 0.05"
)
RL = (
    "--use_lora True --lora_r 32 --lora_alpha 64 --lora_dropout 0 --reward_fn scripts/demo_rewards.py:caption_f1 --num_generations 8 "
    "--response_length 64 --temperature 1.0 --per_device_train_batch_size 32 --gradient_accumulation_steps 2 --max_steps 30 "
    "--learning_rate 5e-4 --num_sample_generations 0"
)
ESTIMATORS = {
    "gae": "--num_ppo_epochs 2 --kl_coef 0.05",
    "rloo": "",
    "grpo": "",
    "reinforce_plus_plus": "",
    "reinforce_plus_plus_baseline": "",
}
COLUMNS = {
    "chair_i": "CHAIR_i",
    "exact_captions": "captions exactly right",
    "yesno_accuracy": "yes/no",
    "counting_accuracy": "counting",
    "seconds": "processor seconds",
}
Scores = dict[str, float]


def _quietly(main: Callable[[list[str]], None], flags: str) -> float:
    """Run a script's main and return the processor seconds that it took."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        main(shlex.split(flags))
    return time.process_time() - started


def finished(out: Path) -> Scores | None:
    """The scores of a run that is done."""
    file = out / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def train_base(seed: int, folder: Path) -> Scores:
    """Scenes and the SFT model of a seed, and what it scores."""
    sft, scenes = folder / "sft", folder / "data"
    if (found := finished(sft)) is not None:
        return found
    _quietly(
        data.shapes.main,
        f"--output_dir {scenes} --num_train 3500 --num_eval 300 --seed {seed} --init_model {folder}/init",
    )
    seconds = _quietly(
        train_sft.main,
        f"--model_name_or_path {folder}/init --output_dir {sft} --data_path {scenes}/sft.json --image_root {scenes} --seed {seed} "
        f"--overwrite_output_dir True {SFT} {COMMON}",
    )
    return keep(sft, evaluate(str(sft), None, scenes / "eval.json", sft / "eval", batch_size=100), seconds)


def train_policy(estimator: str, seed: int, folder: Path) -> Scores:
    """One estimator from the SFT model of a seed."""
    out, scenes = folder / estimator, folder / "data"
    if (found := finished(out)) is not None:
        return found
    seconds = _quietly(
        train_ppo.main,
        f"--model_name_or_path {folder}/sft --output_dir {out} --dataset_name {scenes}/prompts.json --image_root {scenes} --seed {seed} "
        f"--overwrite_output_dir True --advantage_estimator {estimator} {ESTIMATORS[estimator]} {RL} {COMMON}",
    )
    return keep(out, evaluate(f"{folder}/sft", str(out), scenes / "eval.json", out / "eval", batch_size=100), seconds)


def keep(out: Path, scores: Scores, seconds: float) -> Scores:
    """Mark a run as done."""
    found = {name: scores[name] for name in COLUMNS if name in scores} | {"seconds": seconds}
    write_json(out / "result.json", found)
    return found


def table(results: dict[str, list[Scores]]) -> str:
    """Markdown: mean over seeds, and half the range after ± where there are several."""

    def cell(column: str, values: Sequence[float]) -> str:
        digits = 0 if column == "seconds" else 3
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in results.items():
        lines.append(f"| {name} | " + " | ".join(cell(c, [run[c] for run in runs]) for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def rewards_of(out: Path) -> list[float]:
    """The mean reward of every update."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["objective/scores"] for entry in entries if "objective/scores" in entry]


def plot(results: dict[str, list[Scores]], curves: dict[str, list[list[float]]], path: Path) -> None:
    """Left the reward of sampled captions update by update, right CHAIR_i of held-out pictures before and after."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    for place, (name, runs) in enumerate(curves.items()):
        means = [statistics.mean(values) for values in zip(*runs, strict=True)]
        (line,) = left.plot(range(1, len(means) + 1), means, linewidth=1.2, label=name)
        lowest, highest = ([limit(v) for v in zip(*runs, strict=True)] for limit in (min, max))
        left.fill_between(range(1, len(means) + 1), lowest, highest, color=line.get_color(), alpha=0.12, linewidth=0)
        for seed, (before, after) in enumerate(zip(results["sft"], results[name], strict=False)):
            height = place + 0.2 * (seed - (len(runs) - 1) / 2)
            right.plot([before["chair_i"], after["chair_i"]], [height, height], color=line.get_color(), linewidth=0.6)
            right.plot(before["chair_i"], height, "o", color="white", markeredgecolor=line.get_color(), markersize=4)
            right.plot(after["chair_i"], height, "o", color=line.get_color(), markersize=4)
    left.set_xlabel("update of 64 answers")
    left.set_ylabel("F1 of named objects, sampled captions")
    left.legend(fontsize=8, frameon=False)
    right.set_yticks(range(len(curves)), list(curves), fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("CHAIR_i, held out: before (rings), after (dots)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Scores]]:
    """Train and evaluate every estimator with every seed, and write table and plot after each seed."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args(argv)
    results: dict[str, list[Scores]] = {"sft": []}
    curves: dict[str, list[list[float]]] = {}
    text = ""
    with tqdm(desc="estimators", total=len(args.seeds) * (1 + len(args.estimators))) as bar:
        for seed in args.seeds:
            folder = args.output_dir / f"seed-{seed}"
            results["sft"].append(train_base(seed, folder))
            bar.update()
            for estimator in args.estimators:
                results.setdefault(estimator, []).append(train_policy(estimator, seed, folder))
                curves.setdefault(estimator, []).append(rewards_of(folder / estimator))
                bar.update()
            text = table(results)
            write_text(args.output_dir / "estimators.md", text)
            plot(results, curves, args.output_dir / "estimators.png")
    print(text)
    return results


if __name__ == "__main__":
    main()
