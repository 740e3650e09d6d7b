"""Training steps of several trainers, alternating, so that other load on the machine slows all of them alike."""

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

MIB = 1 << 20
# Kinds of work in a profile: beginnings of operators' names (CPU) and kernels' names (GPU)
KINDS = {
    "matrix products": r"(add|b|badd)?(b?mm|linear)|.*(gemm|cutlass|nvjet)",
    "attention": r"_?scaled_dot_product|_flash|_efficient|.*(flash|fmha|attention)",
    "elementwise": r"(mul|add|sub|div|silu|gelu|sigmoid|tanh|exp|pow|neg|rsqrt|sum|mean|where|masked_fill|threshold|native_layer_norm"
    r"|_?log_softmax|_?softmax|nll|norm|lt|le|gt|ge|eq|bitwise|addc|sqrt|lerp|cos|sin|clamp|_foreach|_fused)"
    r"|.*(elementwise|reduce|softmax|norm)",
    "copies": r"(cat|copy|clone|fill|zero|empty|index|gather|scatter|embedding|masked_scatter|slice|constant_pad|_to_copy)"
    r"|.*(copy|Memcpy|Memset|CatArray)",
}


@dataclass
class Timings:
    """Seconds and losses of every measured step of one side."""

    data: list[float] = field(default_factory=list)  # rows -> batch: decoding, image processor, tokeniser
    compute: list[float] = field(default_factory=list)  # forward, backward, clipping, optimizer
    cpu: list[float] = field(default_factory=list)  # processor seconds of all threads, without other processes
    losses: list[float] = field(default_factory=list)
    held_mib: float = 0.0  # weights, gradients and optimizer states between steps
    peak_mib: float = 0.0  # the peak within a step

    @property
    def step(self) -> float:
        """Median seconds of a step, images included."""
        return statistics.median(d + c for d, c in zip(self.data, self.compute, strict=True))

    @property
    def step_cpu(self) -> float:
        """Median processor seconds of a step."""
        return statistics.median(self.cpu)

    @property
    def step_compute(self) -> float:
        """Median seconds of a step whose batch is ready (loader workers)."""
        return statistics.median(self.compute)


class Side:
    """A Trainer with its collator and optimizer, stepped by hand."""

    def __init__(self, trainer: Trainer, batches: Sequence[Callable[[], Any]]) -> None:
        """
        Args:
            batches: functions that make the batches to train on, used in turn.
        """
        self.trainer, self.batches, self.count = trainer, batches, 0
        trainer.create_optimizer()
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model = model
        trainer.current_gradient_accumulation_steps = 1
        self.timings = Timings()

    def step(self, measure: bool = True) -> float:
        """One optimizer step on the next batch; returns its loss."""
        trainer, parameters = self.trainer, [p for p in self.model.parameters() if p.requires_grad]
        start, cpu = _now(), time.process_time()
        batch = self.batches[self.count % len(self.batches)]()
        ready = _now()
        loss = trainer.training_step(self.model, batch)
        trainer.accelerator.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        value = loss.item()
        done = _now()
        self.count += 1
        if measure:
            self.timings.data.append(ready - start)
            self.timings.compute.append(done - ready)
            self.timings.cpu.append(time.process_time() - cpu)
            self.timings.losses.append(value)
        return value

    def measure_memory(self) -> None:
        """One more step, to measure the peak memory of its tensors."""
        gc.collect()
        held = tensor_bytes(self.trainer)
        if torch.cuda.is_available():
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(measure=False)
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = held + peak_of(lambda: self.step(measure=False))
        self.timings.held_mib, self.timings.peak_mib = held / MIB, peak / MIB

    def profile(self) -> dict[str, float]:
        """One more step: which share of its operators' time each kind takes, by torch's profiler."""
        with torch.profiler.profile() as profile:
            self.step(measure=False)
        cuda = torch.cuda.is_available()
        times: dict[str, float] = dict.fromkeys(KINDS, 0.0) | {"other": 0.0}
        for event in profile.key_averages():
            seconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            name = event.key.removeprefix("aten::")
            times[next((kind for kind, names in KINDS.items() if re.match(names, name)), "other")] += seconds
        return {kind: seconds / sum(times.values()) for kind, seconds in times.items()}


def peak_of(run: Callable[[], Any]) -> int:
    """Peak bytes of CPU tensors that `run` adds to those before it, counted by torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return peak_in(profile)


def peak_in(profile: torch.profiler.profile) -> int:
    """Peak bytes of CPU tensors in a profile with memory, beyond those before it."""
    level = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


def tensor_bytes(trainer: Trainer) -> int:
    """Bytes of weights, buffers, the reference's, and the optimizer's states."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    tensors = [t for m in models if m is not None for t in (*m.parameters(), *m.buffers())]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(sides: dict[str, Side], steps: int, warmup: int = 1) -> None:
    """Warm up, measure memory, then `steps` rounds in which every side takes one step."""
    for side in sides.values():
        for _ in range(warmup):
            side.step(measure=False)
        side.measure_memory()
    for _ in range(steps):
        for side in sides.values():
            side.step()


def matmul_rate(tokens: int, width: int, inner: int, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Multiply-adds per second of this process in a product of a decoder's shape, the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(tokens, width, dtype=dtype, device=device), torch.randn(width, inner, dtype=dtype, device=device)
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        start = _now()
        for _ in range(4):
            a @ b
        best = max(best, 4 * tokens * width * inner / (_now() - start))
    return best


class LoadWatch:
    """Mean one-minute load of the machine while a block runs."""

    def __enter__(self) -> "LoadWatch":
        self.loads = [os.getloadavg()[0]]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(5):
            self.loads.append(os.getloadavg()[0])

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mean(self) -> float:
        """Mean load, to one decimal; read after the `with` block."""
        return round(statistics.mean(self.loads), 1)


def machine() -> dict[str, Any]:
    """Date, hardware and versions, for a table's heading."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
    }


def write(name: str, found: dict[str, Any], table: str, out: str | None) -> None:
    """Print the table; write it and the JSON to a folder."""
    print(table)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (Path(out) / f"{name}.md").write_text(table + "\n")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of equal-keyed rows."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows])
