"""The log in the terminal: one line per logging step, numbers of one name below each other."""

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from base.charts import CHARTS, has_curve

MOST = 8  # numbers in a line; trainer_state.json, the run's page and trackers have them all
_FIRST = [name for chart in CHARTS for name in chart.names]


def log_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """What was logged at a step as one line, numbers with a chart of their own first."""
    if "train_runtime" in logs:
        return f"{step} steps in {logs['train_runtime']:.0f} s, mean loss {logs['train_loss']:.4g}"
    held_out = any(name.startswith("eval_") for name in logs)
    found = {
        name.removeprefix("eval_"): value
        for name, value in logs.items()
        if has_curve(name) and isinstance(value, int | float)
    }
    names = sorted(found, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))[:MOST]
    numbers = [f"{name} {found[name]:<9.4g}" for name in names]
    place = f"{'held out' if held_out else 'step':<8} {step:>{len(str(steps))}}/{steps}"
    return "  ".join([place, *numbers]).rstrip()


class Bars(ProgressCallback):
    """transformers' progress bars, without the dictionaries that it writes above them."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """`LogLines` writes."""


class LogLines(TrainerCallback):
    """Writes the lines, above the bars if there are any."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line."""
        if state.is_world_process_zero and logs:
            tqdm.write(log_line(logs, state.global_step, state.max_steps))
