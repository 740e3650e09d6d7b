"""What happens inside every side's process: one adapter for all, and processor seconds, losses and memory of its steps.

Imports torch, transformers and what they need alone, for it runs in the environments of other projects too.
"""

import gc
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from benchmarks.steps import MIB, peak_in, tensor_bytes

WARMUP = 1  # steps before the measured ones


@dataclass
class Job:
    """What the parent asks of a side.

    Attributes:
        script: dpo, rm or sft.
        family: of benchmarks/models.py.
        checkpoint, rows, adapter, folder: the base, preference rows (JSON lines), the first weights of the adapter (written by the
            first side, read by the others), and where the side may write.
        batch: rows of a step. answers: of a row; a side without rows of several answers takes their pairs.
        options: flags of the side.
    """

    script: str
    family: str
    checkpoint: str
    rows: str
    adapter: str
    folder: str
    batch: int
    answers: int
    steps: int
    bf16: bool = False
    options: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """For `run_jobs`."""
        path.write_text(json.dumps(asdict(self)))

    @property
    def data(self) -> list[dict[str, Any]]:
        """The rows."""
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]

    @property
    def max_steps(self) -> int:
        """Steps to take: those before, the measured ones, and one whose memory is watched."""
        return WARMUP + self.steps + 1

    @property
    def pairs(self) -> int:
        """Pairs of a step."""
        return self.batch * self.answers * (self.answers - 1) // 2


def pairs_of(job: Job) -> list[dict[str, Any]]:
    """The rows as pairs: `images`, `prompt` (text), `chosen`, `rejected`. An answer of a lower rank is better."""
    return [
        {"images": row["images"], "prompt": row["prompt"][0]["content"], "chosen": answers[a], "rejected": answers[b]}
        for row in job.data
        for answers in [row["responses"]]
        for a in range(job.answers)
        for b in range(a + 1, job.answers)
    ]


def run_jobs(run: Callable[[Job], None]) -> None:
    """Run the jobs whose files the command line names, all in this process: importing a rival takes longer than a case's steps."""
    for path in sys.argv[1:]:
        job = Job(**json.loads(Path(path).read_text()))
        try:
            with watch(job):
                run(job)
        except Exception:  # the next case may run
            Path(job.folder, "error.txt").write_text(traceback.format_exc())
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def watch(job: Job) -> Iterator[None]:
    """Within the block every `train` of transformers' Trainer is measured, and its rows come in order."""
    train = Trainer.train

    def watched(self: Trainer, *args: object, **kwargs: object) -> object:
        self.add_callback(Watch(self, job))
        return train(self, *args, **kwargs)

    def in_order(self: Trainer, rows: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if rows is None else rows)

    with mock.patch.multiple(Trainer, train=watched, _get_train_sampler=in_order):
        yield


class Watch(TrainerCallback):
    """Writes `result.json` into the job's folder when training ends."""

    def __init__(self, trainer: Trainer, job: Job) -> None:
        self.trainer, self.job = trainer, job
        self.seconds: list[float] = []  # of the processor, step by step, with what lies between steps
        self.wall: list[float] = []
        self.losses: list[float] = []
        training_step = trainer.training_step

        def step(*args: object, **kwargs: object) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

        trainer.training_step = step

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Start from the common adapter."""
        same_start(self.trainer.model, Path(self.job.adapter))
        self.before = time.process_time(), time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *rest: object, **kwargs: object) -> None:
        """Measure the step, or the memory of the last one."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        now = time.process_time(), time.perf_counter()
        if WARMUP < state.global_step <= WARMUP + self.job.steps:
            self.seconds.append(now[0] - self.before[0])
            self.wall.append(now[1] - self.before[1])
        if state.global_step == self.job.max_steps - 1:
            self.held = tensor_bytes(self.trainer)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                activities = [torch.profiler.ProfilerActivity.CPU]
                self.profile = torch.profiler.profile(activities=activities, profile_memory=True)
                self.profile.start()
        elif state.global_step == self.job.max_steps:
            if cuda:
                peak = torch.cuda.max_memory_allocated()
            else:
                self.profile.stop()
                peak = self.held + peak_in(self.profile)
            result = {
                "step_cpu": statistics.median(self.seconds),
                "step": statistics.median(self.wall),
                "seconds": self.seconds,
                "losses": self.losses,
                "peak_mib": peak / MIB,
                "held_mib": self.held / MIB,
            }
            Path(self.job.folder, "result.json").write_text(json.dumps(result))
        self.before = time.process_time(), time.perf_counter()


def same_start(model: torch.nn.Module, path: Path) -> None:
    """Write what trains to a file, or if it is there already set it to what it holds.

    Names differ between peft's, trl's and transformers' wrappers: a factor of an adapter is known by its layer and what stands behind it, the
    head of a reward model as `head`.

    Raises:
        ValueError: other weights train here than on the side that wrote the file.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of trl's head
    mine = {known_as(name): p for name, p in model.named_parameters() if p.requires_grad}
    if "head.bias" in mine:  # of trl's head: it cancels in differences of rewards
        torch.nn.init.zeros_(mine.pop("head.bias"))
    if not path.exists():
        save_file({name: p.detach().cpu().contiguous() for name, p in mine.items()}, path)
        return
    given = load_file(path)
    if given.keys() != mine.keys():
        raise ValueError(f"other weights train here: {sorted(given.keys() ^ mine.keys())[:6]}")
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(given[name].view_as(p))


def known_as(name: str) -> str:
    """`base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight` -> `layers.0.mlp.up_proj.lora_A`."""
    found = re.search(r"(layers\.\d+\..*\.lora_[AB])\.", name)
    if found:
        return found[1]
    head = re.search(r"(?:^|\.)(?:head|score|v_head)\..*(weight|bias)$", name)
    return {"weight": "head", "bias": "head.bias"}[head[1]] if head else name
