"""PPO updates with everything shared, without vision reuse, and with nothing shared: time per phase, images encoded.

    OMP_NUM_THREADS=2 python -m benchmarks.ppo_reuse --size cpu --out benchmarks/results

`shared` is train_ppo.py. `pixels` gives every pass the pixels instead of features, so that each runs the tower. `plain`
does so too, with one row per answer. Configurations run one after the other, for several rounds; medians are over all
updates except the first of each configuration.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

import args as flags
import train_ppo
from base.self_check import SelfCheck
from benchmarks.models import SIZES, build, rows
from benchmarks.steps import LoadWatch, machine, markdown, write
from common.flags import FlagParser
from data import DataSplits

PHASES = ("rollout", "score", "evaluate_tokens", "optimise")
CONFIGURATIONS = ("plain", "pixels", "shared")


def count_words(images: list[Any], prompts: list[Any], responses: list[str]) -> list[float]:
    """The reward: any function would do."""
    return [float(len(response.split())) for response in responses]


def updates_of(
    name: str, checkpoint: Path, data: list[dict[str, Any]], tokens: int, updates: int, cpu: bool
) -> dict[str, Any]:
    """Seconds of each phase of every update after the first, images through the tower per update, and the losses."""
    parsed = flags.parse(
        flags.ModelArguments,
        flags.DataArguments,
        flags.LoraArguments,
        flags.PPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {checkpoint}/{name} --disable_tqdm True --learning_rate 1e-5 "
        f"--use_lora True --lora_r 16 --lora_dropout 0 --per_device_train_batch_size 4 --rollouts_per_prompt 2 --save_strategy no --seed 0 "
        f"--response_length {tokens} --max_steps {updates + 1} --num_sample_generations 0 --temperature 1.0 "
        f"--share_prefix {name != 'plain'} --reward_fn {__file__}:count_words {'--use_cpu True' if cpu else '--bf16 True'}".split(),
    )
    prompts = Dataset.from_list([{"images": r["images"], "prompt": r["prompt"]} for r in data])
    trainer, _ = train_ppo.build(*parsed, data=DataSplits(prompts, None, {}))
    if name != "shared":  # every pass encodes its images
        trainer.image_inputs = lambda model, batch: batch["img_input_dict"]
    seconds: dict[str, list[float]] = defaultdict(list)

    def clocked(phase: str) -> Callable[..., object]:
        timed = getattr(trainer, phase)

        def run(*arguments: object) -> object:
            start = time.perf_counter()
            result = timed(*arguments)
            seconds[phase].append(time.perf_counter() - start)
            return result

        return run

    for phase in PHASES:
        setattr(trainer, phase, clocked(phase))
    trainer.remove_callback(SelfCheck)  # which runs the tower before the first step
    images: list[int] = []
    trainer.base_model(trainer.model).get_vision_tower().register_forward_hook(
        lambda _, inputs, kwargs, output: images.append(len(inputs[0] if inputs else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    trainer.train()
    return {
        "seconds": {phase: times[1:] for phase, times in seconds.items()},
        "images_per_update": sum(images) / (updates + 1),
        "kl": [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure both configurations in turns, print and write the table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--family", default="llava")
    parser.add_argument("--tokens", type=int, default=50, help="tokens of every answer")
    parser.add_argument("--updates", type=int, default=1, help="measured updates per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", help="folder for ppo_reuse_SIZE.json and .md")
    options = parser.parse_args(argv)
    about = machine()
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, LoadWatch() as load:
        checkpoint = build(options.family, options.size, Path(folder))
        data = rows(options.family, options.size, checkpoint, options.tokens, 2 * (options.updates + 1))
        for _ in range(options.rounds):
            for name in CONFIGURATIONS:
                runs[name].append(
                    updates_of(name, checkpoint, data, options.tokens, options.updates, options.size != "7b")
                )
    phases = {
        name: {p: statistics.median(s for run in of for s in run["seconds"][p]) for p in PHASES}
        for name, of in runs.items()
    }
    totals = {name: sum(of.values()) for name, of in phases.items()}
    found = {
        "machine": about,
        "phases": phases,
        "ratio": {name: totals[name] / totals["shared"] for name in totals},
        "generation_share": {name: phases[name]["rollout"] / totals[name] for name in totals},
        "images_per_update": {name: of[0]["images_per_update"] for name, of in runs.items()},
        "kl": {name: of[0]["kl"] for name, of in runs.items()},
        "load": load.mean,
    }
    table = markdown(
        [
            {
                "configuration": name,
                **{f"{phase}, s": f"{phases[name][phase]:.2f}" for phase in PHASES},
                "update, s": f"{totals[name]:.2f}",
                "slower than shared": f"{found['ratio'][name]:.2f}",
                "rollout's share": f"{found['generation_share'][name]:.0%}",
                "images through the tower": f"{found['images_per_update'][name]:.0f}",
                "load": load.mean,
            }
            for name in CONFIGURATIONS
        ]
    )
    heading = (
        f"{about['date']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
    )
    write(f"ppo_reuse_{options.size}", found, f"{heading}\n\n{table}", options.out)
    return found


if __name__ == "__main__":
    main()
