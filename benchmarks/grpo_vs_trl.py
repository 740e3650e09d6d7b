"""GRPO updates of TRL's trainer and of ours on the same rows, weights and batch: a prompt with one picture, K answers, LoRA, on policy.

    OMP_NUM_THREADS=1 python -m benchmarks.grpo_vs_trl --size cpu --out benchmarks/results
    python -m benchmarks.grpo_vs_trl --size cpu --case llava-50        (one case)

Processor seconds of this process, medians over updates after the first: of the whole update, of the rollout, of forward
and backward; and the most that tensors take in the latter beyond what was there before. The bound is what multiply-adds
of the decoder allow: K (P + T) / (P + K T) for a prompt of P tokens and answers of T. No token ends an answer on either
side, so that all have T tokens; at its own ends a random model stops anywhere.
"""

import dataclasses
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import transformers
import trl
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import Trainer, TrainerCallback

import args as flags
import train_ppo
from benchmarks.models import SIZES, build, lora_targets, rows
from benchmarks.steps import MIB, LoadWatch, machine, markdown, peak_of, write
from common.flags import FlagParser
from data import DataSplits

# Family and pixels of a case. 672 x 672 are the 576 image tokens of LLaVA's picture, 448 x 448 are 256.
PICTURES = {
    "llava": ("llava", (336, 336)),
    "qwen2_5_vl": ("qwen2_5_vl", (672, 672)),
    "qwen2_5_vl_256": ("qwen2_5_vl", (448, 448)),
}
CASES = [f"{name}-{tokens}" for name in PICTURES for tokens in (50, 150, 400)]
NO_END = [-1]
Row = dict[str, Any]


def count_words(responses: Sequence[str], **_: object) -> list[float]:
    """The reward: any function would do."""
    return [float(len(response.split())) for response in responses]


def count_words_for_trl(completions: Sequence[list[dict[str, str]]], **_: object) -> list[float]:
    """The same in TRL's signature."""
    return count_words([completion[0]["content"] for completion in completions])


class Clock(TrainerCallback):
    """Processor seconds of every update, and of named methods of a trainer."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peak_mib = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.seconds["update"].append(time.process_time() - self.start)

    def watch(self, trainer: Trainer, method: str, phase: str, peak: bool = False) -> None:
        """Time a method; with `peak` measure its memory instead."""
        run = getattr(trainer, method)

        def timed(*args: object, **kwargs: object) -> object:
            start, result = time.process_time(), []
            if peak:
                self.peak_mib = max(self.peak_mib, peak_of(lambda: result.append(run(*args, **kwargs))) / MIB)
            else:
                result.append(run(*args, **kwargs))
            self.seconds[phase].append(time.process_time() - start)
            return result[0]

        setattr(trainer, method, timed)

    def median(self, phase: str) -> float:
        """Without the first update."""
        return statistics.median(self.seconds[phase][1:])


def ours(checkpoint: Path, data: list[Row], tokens: int, answers: int, updates: int, peak: bool) -> Clock:
    """Updates of train_ppo.py."""
    parsed = flags.parse(
        flags.ModelArguments,
        flags.DataArguments,
        flags.LoraArguments,
        flags.PPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {checkpoint}/ours --disable_tqdm True --seed 0 --use_cpu True "
        f"--use_lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0 --advantage_estimator grpo --num_generations {answers} "
        f"--per_device_train_batch_size {answers} --response_length {tokens} --max_steps {updates + 1} --learning_rate 1e-5 --save_strategy no "
        f"--num_sample_generations 0 --reward_fn {__file__}:count_words".split(),
    )
    prompts = Dataset.from_list([{"images": r["images"], "prompt": r["prompt"]} for r in data])
    trainer, _ = train_ppo.build(*parsed, data=DataSplits(prompts, None, {}))
    trainer.sampler = dataclasses.replace(trainer.sampler, end_ids=NO_END)
    clock = Clock()
    clock.watch(trainer, "rollout", "rollout")
    clock.watch(trainer, "_micro_step", "training pass", peak)
    trainer.add_callback(clock)
    trainer.train()
    return clock


def theirs(checkpoint: Path, data: list[Row], tokens: int, answers: int, updates: int, peak: bool) -> Clock:
    """Updates of TRL's GRPOTrainer."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32")
    lora = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        task_type="CAUSAL_LM",
        target_modules=lora_targets(model),
    )
    config = trl.GRPOConfig(
        output_dir=str(checkpoint / "trl"),
        per_device_train_batch_size=answers,
        num_generations=answers,
        max_completion_length=tokens,
        learning_rate=1e-5,
        max_steps=updates + 1,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    prompts = [{"image": Image.open(row["images"][0]), "prompt": row["prompt"]} for row in data]
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=transformers.AutoProcessor.from_pretrained(checkpoint),
        reward_funcs=count_words_for_trl,
        train_dataset=Dataset.from_list(prompts),
        args=config,
        peft_config=lora,
    )
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = NO_END
    clock = Clock()
    clock.watch(trainer, "_generate", "rollout")
    _watch_training_pass(clock, trainer, peak)
    trainer.add_callback(clock)
    trainer.train()
    return clock


def _watch_training_pass(clock: Clock, trainer: Trainer, peak: bool) -> None:
    """Forward and backward, which training_step runs after it has sampled and scored."""
    sample_and_score: Callable[[Any], Any] = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: inputs
    clock.watch(trainer, "training_step", "training pass", peak)
    forward_and_backward = trainer.training_step

    def whole(model: nn.Module, inputs: object, *args: object) -> object:
        return forward_and_backward(model, sample_and_score(inputs), *args)

    trainer.training_step = whole


def run_case(case: str, size: str, answers: int, updates: int) -> dict[str, Any]:
    """Seconds, memory and ratios of one case."""
    name, _, tokens = case.rpartition("-")
    (family, pixels), T = PICTURES[name], int(tokens)
    with tempfile.TemporaryDirectory() as folder, LoadWatch() as load:
        checkpoint = build(family, size, Path(folder))
        data = rows(family, size, checkpoint, T, updates + 2, pixels=pixels)
        processor = transformers.AutoProcessor.from_pretrained(checkpoint)
        text = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": data[0]["prompt"][0]["content"]}],
                }
            ],
            add_generation_prompt=True,
        )
        P = processor(text=text, images=Image.open(data[0]["images"][0]), return_tensors="pt")["input_ids"].shape[1]
        clocks = {}
        for name, run in (("trl", theirs), ("ours", ours)):
            clocks[name] = run(checkpoint, data, T, answers, updates, peak=False)
            clocks[name].peak_mib = run(checkpoint, data, T, answers, 1, peak=True).peak_mib
            gc.collect()
    seconds = {
        name: {phase: clock.median(phase) for phase in ("update", "rollout", "training pass")}
        for name, clock in clocks.items()
    }
    return {
        "case": case,
        "prompt": P,
        "bound": answers * (P + T) / (P + answers * T),
        "seconds": seconds,
        "ratio": {phase: seconds["trl"][phase] / seconds["ours"][phase] for phase in seconds["ours"]},
        "memory": clocks["ours"].peak_mib / clocks["trl"].peak_mib,
        "load": load.mean,
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--case", action="append", choices=CASES, help="several; all by default")
    parser.add_argument("--answers", type=int, default=8, help="K")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--out", help="folder of the JSON and the table")
    options = parser.parse_args(argv)
    found = [run_case(case, options.size, options.answers, options.updates) for case in options.case or CASES]
    about = machine()
    table = markdown(
        [
            {
                "case": one["case"],
                "P": one["prompt"],
                **{
                    f"{phase}, s (TRL, ours)": f"{one['seconds']['trl'][phase]:.2f}, {one['seconds']['ours'][phase]:.2f}"
                    for phase in one["ratio"]
                },
                **{f"{phase}, ratio": f"{ratio:.2f}" for phase, ratio in one["ratio"].items()},
                "bound": f"{one['bound']:.1f}",
                "memory, ours / TRL": f"{one['memory']:.2f}",
                "load": one["load"],
            }
            for one in found
        ]
    )
    heading = (
        f"{about['date']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
    )
    write(f"grpo_vs_trl_{options.size}", {"machine": about, "cases": found}, f"{heading}\n\n{table}", options.out)
    return found


if __name__ == "__main__":
    main()
