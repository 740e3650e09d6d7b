"""Every preference loss on the embedded pictures, three seeds: one table, one plot. A toy problem, trained for real.

    make demo && python -m benchmarks.losses --demo runs/demo --output_dir runs/losses
    make demo LOSS=mdpo                     # one of them in the demo itself

Each run is `train_dpo.py` from the demo's SFT checkpoint on the same pairs for the same number of steps with the same
learning rate, so the table compares what a loss does under one budget, not what it could do when tuned. Losses that
read a column get it: severity is 1 for an invented or a wrong object and 0.5 otherwise, margin the same number,
image_rejected the next row's picture.
"""

import contextlib
import io
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

import losses
import train_dpo
from base.loading import load_adapter, load_model
from common.errors import InputError
from common.flags import FlagParser
from data.scenes import CAPTION_PROMPT
from eval.shapes import evaluate, read_scenes
from models import core_mapper_for

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE = (
    "--use_lora True --lora_r 32 --lora_alpha 64 --lora_dropout 0 --learning_rate 3e-4 --lr_scheduler_type cosine "
    "--per_device_train_batch_size 16 --max_steps 60 --save_strategy no --logging_steps 20 --disable_tqdm True"
)
COLUMNS = {
    "chair_i": "CHAIR_i",
    "chair_s": "CHAIR_s",
    "yesno_accuracy": "yes/no accuracy",
    "exact_captions": "exact captions",
    "kl": "KL",
    "image_sensitivity": "image sensitivity",
    "seconds": "seconds",
}


def pairs_with_columns(demo: Path, output_dir: Path) -> Path:
    """The demo's pairs, with every column that any loss reads."""
    rows = json.loads((demo / "data" / "pairs.json").read_text())
    for i, row in enumerate(rows):
        badness = 1.0 if row["error"] == "object" else 0.5
        row |= {"severity": [0.0, badness], "margin": badness, "image_rejected": rows[(i + 1) % len(rows)]["image"]}
    path = output_dir / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


@torch.inference_mode()
def kl_and_sensitivity(model: str, adapter: str, scenes: Sequence[dict]) -> tuple[float, float]:
    """Sampled captions of held-out scenes, scored under adapter and base.

    Returns: KL(policy || reference) per caption in nats, the mean log-ratio of captions sampled from the policy; and
        the mean absolute change of their log-probs when each picture is replaced by the next.
    """
    mapper = core_mapper_for(model)
    processor = mapper.processor(model)
    policy = load_adapter(load_model(model), adapter).eval()
    processor.infer()
    prompt = [{"role": "user", "content": CAPTION_PROMPT}]
    images = [[scene["image"]] for scene in scenes]
    inputs = processor(convs=[prompt] * len(scenes), images=images)
    torch.manual_seed(0)
    tokens = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=48)
    texts = [processor.decode_response(ids) for ids in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    processor.train()
    collator = mapper.dpo_collator(processor)

    def logps(pictures: Sequence[list[str]]) -> torch.Tensor:
        rows = [
            {"images": picture, "prompt": prompt, "responses": [text.strip() or "."], "ranks": [0.0]}
            for picture, text in zip(pictures, texts, strict=True)
        ]
        batch = collator(rows)
        mask, core = batch["completion_mask"], policy.get_base_model()
        outputs = policy(
            **core.packed_inputs(batch["input_ids"], batch["segment_ids"], batch["img_input_dict"], batch["packed"]),
            completion_index=batch["completion_index"][mask],
            completion_ids=batch["completion_ids"][mask],
        )
        return torch.zeros(mask.shape).masked_scatter(mask, outputs.logps).sum(1)

    own = logps(images)
    swapped = logps(images[1:] + images[:1])
    with policy.disable_adapter():
        reference = logps(images)
    return (own - reference).mean().item(), (own - swapped).abs().mean().item()


def run_one(name: str, seed: int, demo: Path, pairs: Path, output_dir: Path, recipe: str) -> dict[str, float]:
    """Train one loss with one seed and measure it; a finished run is read from its scores.json."""
    out, sft = output_dir / f"{name}-{seed}", demo / "sft"
    done = out / "scores.json"
    if done.is_file() and "kl" in (scores := json.loads(done.read_text())):
        return scores
    started = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        train_dpo.main(
            shlex.split(
                f"--model_name_or_path {sft} --dataset_name plain_dpo --data_path {pairs} --image_root {demo / 'data'} --output_dir {out} "
                f"--loss_type {name} --seed {seed} {recipe}"
            )
        )
    seconds = time.time() - started
    scores = evaluate(str(sft), str(out), demo / "data" / "eval.json", out, batch_size=100)
    kl, sensitivity = kl_and_sensitivity(str(sft), str(out), read_scenes(demo / "data" / "eval.json")[:100])
    scores |= {"kl": kl, "image_sensitivity": sensitivity, "seconds": seconds}
    done.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def table(results: dict[str, list[dict[str, float]]], sft: dict[str, float]) -> str:
    """Markdown: mean over seeds, and half the range after ± where there are several."""

    def cell(values: Sequence[float]) -> str:
        digits = 0 if max(map(abs, values)) >= 100 else 3 if max(map(abs, values)) < 2 else 1
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = ["| loss | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append("| (SFT) | " + " | ".join(f"{sft[c]:.3f}" if c in sft else "" for c in COLUMNS) + " |")
    for name, runs in sorted(results.items(), key=lambda item: statistics.mean(r["chair_i"] for r in item[1])):
        lines.append(f"| {name} | " + " | ".join(cell([run[c] for run in runs]) for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, float]]], sft: dict[str, float], path: Path) -> None:
    """Hallucination against distance from the reference: lower is better, and so is further left."""
    figure, axes = plt.subplots(figsize=(9, 6))
    for name, runs in results.items():
        x, y = (statistics.mean(run[c] for run in runs) for c in ("kl", "chair_i"))
        axes.errorbar(
            x,
            y,
            xerr=[[x - min(r["kl"] for r in runs)], [max(r["kl"] for r in runs) - x]],
            yerr=[[y - min(r["chair_i"] for r in runs)], [max(r["chair_i"] for r in runs) - y]],
            fmt="o",
            markersize=4,
            elinewidth=0.6,
        )
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.axhline(sft["chair_i"], linestyle=":", color="grey")
    axes.annotate("SFT", (axes.get_xlim()[0], sft["chair_i"]), fontsize=8, color="grey", va="bottom")
    axes.set_xlabel("KL to the reference, nats per caption")
    axes.set_ylabel("CHAIR_i on held-out pictures")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)  # most losses end near 0
    axes.set_ylim(bottom=-0.001)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train and evaluate every loss with every seed, then write the table and the plot."""
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="folder of `make demo`: its data and its SFT checkpoint"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/losses"))
    parser.add_argument("--losses", nargs="+", default=list(losses.LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", default=RECIPE, help="flags of train_dpo.py that all losses share")
    args = parser.parse_args()
    if not (args.demo / "sft").is_dir():
        raise SystemExit(f"{args.demo / 'sft'} does not exist: run `make demo` first.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pairs = pairs_with_columns(args.demo, args.output_dir)
    sft = evaluate(
        str(args.demo / "sft"), None, args.demo / "data" / "eval.json", args.output_dir / "sft", batch_size=100
    )
    results: dict[str, list[dict[str, float]]] = {}
    jobs = [(name, seed) for name in args.losses for seed in args.seeds]
    for name, seed in tqdm(jobs, desc="losses"):
        try:
            results.setdefault(name, []).append(run_one(name, seed, args.demo, pairs, args.output_dir, args.recipe))
        except InputError as error:
            raise SystemExit(f"{name}: {error}") from error
        text = table(results, sft)
        (args.output_dir / "losses.md").write_text(text)
        plot(results, sft, args.output_dir / "losses.png")
    print(text)


if __name__ == "__main__":
    main()
