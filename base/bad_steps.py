"""Steps whose loss or gradient is not finite: skipped, reported, and the run stopped at the second in a row.

One such step, let through, turns every weight into NaN. Whether to skip is decided on the device, where the number is: the host reads the verdict
of a step while the next one computes, so that looking at every step costs no wait.

    training_step   -> see_loss    of every micro batch, with its rows
    _get_grad_norm  -> decide      the gradient of the step is complete: skip it or not
    before a save   -> report      what is still unread
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import InputError


class BadSteps:
    """Watches the optimizer steps of one process; all processes come to the same verdicts."""

    def __init__(self, limit: int, norm_counts: bool, on_any_process: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            limit: how many bad steps in a row end the run. 1 where a step cannot be skipped (DeepSpeed steps by itself).
            norm_counts: whether a gradient that is not finite is a fault. With fp16 it is how the loss scale is found.
            on_any_process: a flag () on this process -> whether it is set on any, on the device.
        """
        self.limit, self.norm_counts, self.on_any_process = limit, norm_counts, on_any_process
        self._bad: Tensor | None = None  # () bool: a loss of this step
        self._rows: list[str] = []
        self._streak: Tensor | None = None  # () how many bad steps in a row
        self._skipped: Tensor | None = None  # () how many since the last log
        self._unread: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None

    def see_rows(self, rows: Sequence[str]) -> None:
        """The rows of the step to come, for its report."""
        self._rows.extend(rows)

    def named_rows(self) -> str:
        """` on the rows A, B, ...`: those of the step that is under way; empty before the first."""
        rows = self._rows
        return f" on the rows {', '.join(rows[:16])}{', ...' if len(rows) > 16 else ''}" if rows else ""

    def see_loss(self, loss: Tensor) -> Tensor:
        """Look at the loss () of a micro batch; returns it, 0 in place of a number that is not finite, for averages."""
        bad = ~loss.detach().isfinite()
        self._bad = bad if self._bad is None else self._bad | bad
        return torch.where(bad, 0, loss.detach())

    def decide(self, norm: Tensor | float | None, step: int, optimizer: Optimizer, model: nn.Module) -> None:
        """Look at the gradient norm of a step before the optimizer takes it; if it is bad the optimizer will not move anything.

        Raises:
            InputError: the step before was the last one that is allowed to be bad.
        """
        bad = self._bad if self._bad is not None else torch.zeros((), dtype=torch.bool)
        if norm is not None and self.norm_counts:
            norm = torch.as_tensor(norm, device=bad.device if self._bad is not None else None)
            bad = bad.to(norm.device) | ~norm.isfinite()
        bad, rows = self.on_any_process(bad), self._rows
        self._bad, self._rows = None, []
        if self._streak is None:
            self._streak = self._skipped = torch.zeros((), dtype=torch.long, device=bad.device)
        self._streak = torch.where(bad, self._streak + 1, 0)
        self._skipped = self._skipped + bad
        if self.norm_counts and self.limit > 1:
            _skip(optimizer, model, bad)
        self.report()
        event = None
        if bad.is_cuda:
            event = torch.cuda.Event()
            streak = self._streak.to("cpu", non_blocking=True)
            event.record()
        else:
            streak = self._streak
        self._unread = (step, rows, streak, event)

    def report(self) -> None:
        """Read the verdict on the last step.

        Raises:
            InputError: it was bad, and so were as many before it as end the run.
        """
        if self._unread is None:
            return
        step, rows, streak, event = self._unread
        self._unread = None
        if event is not None:
            event.synchronize()
        streak = int(streak)
        if not streak:
            return
        listed = f" Its rows: {', '.join(rows[:16])}{', ...' if len(rows) > 16 else ''}." if rows else ""
        if streak >= self.limit:
            which = f"{streak} steps in a row, the last of them step {step}, have" if streak > 1 else f"Step {step} has"
            raise InputError(
                f"{which} a loss or gradient that is not finite.{listed} Look at these rows, lower --learning_rate, or "
                "compute in a wider type (--bf16 True, --torch_dtype float32)."
            )
        print(
            f"A step is skipped (step {step}): its loss or gradient is not finite.{listed}", file=sys.stderr, flush=True
        )

    def skipped_since_last_call(self) -> int:
        """How many steps were skipped; for the log, which waits for the device anyway."""
        if self._skipped is None:
            return 0
        count = int(self._skipped)
        self._skipped = torch.zeros_like(self._skipped)
        return count


def _skip(optimizer: Optimizer, model: nn.Module, bad: Tensor) -> None:
    """Let the optimizer's next step do nothing where `bad` is set."""
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # Fused optimizers, transformers' default among them, read this flag in their kernel (it is made for loss scaling).
        optimizer.found_inf = bad.float()
    elif bad.item():
        model.zero_grad(set_to_none=True)  # optimizers pass over weights without a gradient
