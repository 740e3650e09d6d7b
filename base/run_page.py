"""`index.html` and `curves.png` in the folder of a run: what is trained, how far it is, curves, warnings, samples. No service is needed.

The page loads itself again while the run goes on. Both files are replaced as a whole.
"""

import gc
import html
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from args import RUN_JSON
from base.charts import Points, charts_of, draw_png, legend_name, series, svg
from base.run_warnings import run_warnings
from common.files import write_text
from common.pages import page

logger = logging.get_logger(__name__)

EVERY, EVERY_PNG = 15.0, 300.0  # seconds between two versions of the page, of the picture, at least
SHARE = 0.02  # of the run's time that each of them may take, however many steps it has to draw
MIN_POINTS = 5  # logged steps from which on there is a picture
_STYLE = (
    "svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .rule{stroke:var(--line)}"
    ".legend{display:flex;flex-wrap:wrap;gap:.1rem .8rem;font-size:.82rem;color:var(--soft)}"
    ".legend i{display:inline-block;width:1.1rem;border-top:3px solid var(--c);vertical-align:middle;margin-right:.3rem}"
    ".legend .held{border-top-style:dotted}"
    "progress{width:100%}iframe{width:100%;height:36rem;border:1px solid var(--line);border-radius:6px;background:var(--ground)}"
)


def memory_gib(device: torch.device) -> float:
    """Peak of the run so far: of the GPU's memory, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def not_before(began: float, every: float) -> float:
    """When something that began at a time of the clock and ends now may be done again: in `every` seconds, or later if it took long."""
    now = time.monotonic()
    return max(now + every, began + (now - began) / SHARE)


class RunPage(TrainerCallback):
    """Writes the page and the picture on the main process."""

    def __init__(self, tokens_seen: Callable[[], int], beta: float = 1.0) -> None:
        """
        Args:
            tokens_seen: tokens of this process's batches so far.
            beta: of the implicit rewards, whose margins are looked at.
        """
        self.tokens_seen, self.beta = tokens_seen, beta
        self.found: dict[str, Points] = {}  # what was logged, and the speed of this process alone
        self.read = 0  # entries of the log that stand in `found`
        self.warned: set[str] = set()
        self.said: dict[str, str] = {}
        self.write_at = self.draw_at = 0.0  # on the clock, not before
        self.status = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.start = self.last = time.monotonic()
        self.first_step = self.last_step = state.global_step
        self.last_tokens = self.tokens_seen()
        self.draw_at = self.start + EVERY_PNG  # or at the end
        self.found, self.read = {}, 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, warn, and write the page if it is older than EVERY."""
        if not state.is_world_process_zero or not hasattr(self, "start"):
            return
        now, steps = time.monotonic(), state.global_step - self.last_step
        if steps > 0:
            entry = {
                "step": state.global_step,
                "seconds_per_step": (now - self.last) / steps,
                "memory_gib": memory_gib(args.device),
            }
            seen = self.tokens_seen()
            if seen > self.last_tokens:
                entry["tokens_per_second"] = (seen - self.last_tokens) * args.world_size / (now - self.last)
            self._add([entry])
            self.last, self.last_step, self.last_tokens = now, state.global_step, seen
        self._add(state.log_history[self.read :])  # not all of it: a log would take longer with every step
        self.read = len(state.log_history)
        for name, sentence in run_warnings(self.found, self.beta).items():
            if name not in self.warned:
                self.warned.add(name)
                logger.warning(sentence)
                self.said[name] = f"Step {state.global_step}: {sentence}"
        self.status = f"running, step {state.global_step} of {state.max_steps}{self._left(state)}"
        if now > self.write_at:
            self.write(args, state, refresh=30)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last version."""
        if state.is_world_process_zero:
            done = state.global_step >= state.max_steps
            self.status = f"{'finished' if done else 'stopped'} after step {state.global_step} of {state.max_steps}"
            self.write(args, state, draw=True)

    def _add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for name, points in series(entries).items():
            self.found.setdefault(name, []).extend(points)

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        seconds = (time.monotonic() - self.start) / done * (state.max_steps - state.global_step)
        return f", about {seconds / 3600:.1f} h left" if seconds > 5400 else f", about {seconds / 60:.0f} min left"

    def write(
        self, args: TrainingArguments, state: TrainerState, refresh: int | None = None, draw: bool = False
    ) -> None:
        """Both files as of now; a disk that refuses them, or a matplotlib that fails, does not end the run."""
        out, now = Path(args.output_dir), time.monotonic()
        longest = max(map(len, self.found.values()), default=0)
        try:
            if longest >= MIN_POINTS and (draw or now > self.draw_at):
                draw_png(self.found, out / "curves.png")
                gc.collect()  # 60,000 objects in rings: left to Python, several pictures (28 MiB each) are there at once
                self.draw_at = not_before(now, EVERY_PNG)
                now = time.monotonic()
            write_text(out / "index.html", self.html(out, self.found, refresh))
        except Exception as error:  # whatever it is, no step is lost for a picture
            logger.warning(f"The page of the run could not be written: {type(error).__name__}: {error}")
            self.draw_at = not_before(now, EVERY_PNG)
        self.write_at = not_before(now, EVERY)

    def html(self, out: Path, found: dict[str, list[tuple[float, float]]], refresh: int | None) -> str:
        """The page's text."""
        about = json.loads((out / RUN_JSON).read_text()) if (out / RUN_JSON).is_file() else {}
        data = about.get("data") or {}
        facts = [
            f"<code>{html.escape(Path(about['argv'][0]).name)}</code>" if about else "",
            f"base <code>{html.escape(str(about['plan']['checkpoint']))}</code>" if about.get("plan") else "",
            f"{data.get('train_rows')} rows, {data.get('eval_rows') or 0} held out" if data else "",
        ]
        cards = []
        for chart, present in charts_of(found):
            legend = "".join(
                f'<span><i class="{"held" if name.startswith("eval_") else ""}" style="--c:var(--c{chart.colour(name)})"></i>'
                f"{html.escape(legend_name(name))} {points[-1][1]:.4g}</span>"
                for name, points in present.items()
            )
            unit = f' <span class="soft">({html.escape(chart.unit)})</span>' if chart.unit else ""
            cards.append(
                f'<div class="card"><h3>{html.escape(chart.title)}{unit}</h3>{svg(chart, present)}<div class="legend">{legend}</div></div>'
            )
        tables = sorted((out / "samples").glob("step-*.html"), reverse=True)
        links = " · ".join(f'<a href="samples/{t.name}">{int(t.stem.split("-")[1])}</a>' for t in tables)
        samples = (
            f'<h2>Samples</h2><p>At step {links}</p><iframe src="samples/{tables[0].name}" title="latest samples"></iframe>'
            if tables
            else ""
        )
        command = f"<h2>Command</h2><pre>{html.escape(shlex.join(about['argv']))}</pre>" if about else ""
        warnings = "".join(f'<p class="warn">{html.escape(text)}</p>' for text in self.said.values())
        written = time.strftime("%Y-%m-%d %H:%M:%S")
        body = (
            f'<h1>{html.escape(out.resolve().name)}</h1><p>{html.escape(self.status)} <span class="soft">({written})</span></p>'
            f'<p class="soft">{" · ".join(filter(None, facts))}</p>{warnings}<h2>Curves</h2><p class="soft">By step. Thin: as '
            "logged; thick: smoothed; dots: held-out rows. The number is the last one.</p>"
            f'<div class="grid">{"".join(cards)}</div>{samples}{command}'
        )
        return page(out.resolve().name, body, _STYLE, refresh)
