"""Curves of a run: which numbers share a chart, smoothing, and the charts as SVG for a page and as one PNG for a paper's draft."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import replacing
from common.pages import COLOURS, LIGHT

Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Chart:
    """A title, the unit of its y axis, and the names of the metrics that share it; those that a run does not log are left out."""

    title: str
    unit: str
    names: tuple[str, ...]
    noisy: bool = True  # else it is not smoothed

    def colour(self, name: str) -> int:
        """Of a curve; training and held-out rows share one."""
        return self.names.index(name.removeprefix("eval_")) % COLOURS


CHARTS = (
    Chart("Loss", "", ("loss",)),
    Chart("Score of the answers", "reward", ("objective/scores", "objective/rlhf_reward")),
    Chart("Rewards", "reward", ("rewards/chosen", "rewards/rejected")),
    Chart("Margin, chosen over rejected", "reward", ("rewards/margins", "margin")),
    Chart("Pairs in the right order", "share", ("rewards/accuracies", "accuracy")),
    Chart("Log-probability of an answer", "nats", ("logps/chosen", "logps/rejected")),
    Chart("KL to the reference", "nats per answer", ("objective/kl",)),
    Chart("Entropy", "nats per token", ("policy/entropy_avg",)),
    Chart("Length of the answers", "tokens", ("val/response_length",)),
    Chart("Clipped tokens", "share", ("policy/clipfrac_avg",)),
    Chart("Learning rate", "", ("learning_rate",), noisy=False),
    Chart("Norm of the gradient", "", ("grad_norm",)),
    Chart("Speed", "tokens per second", ("tokens_per_second",)),
    Chart("Time of a step", "seconds", ("seconds_per_step",)),
    Chart("Memory, peak", "GiB", ("memory_gib",), noisy=False),
)
# Numbers of the whole run, or of no interest as a curve
NO_CURVE = ("epoch", "step", "total_flos", "episode", "train_loss", "num_input_tokens_seen")


def has_curve(name: str) -> bool:
    """Whether a logged number changes with the steps: no count of the whole run, no time of an evaluation."""
    timing = name.endswith(("_runtime", "_per_second")) and name != "tokens_per_second"
    return name not in NO_CURVE and not timing


def series(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Name -> points of every number that was logged; NaN and infinity are left out."""
    found: dict[str, Points] = {}
    for entry in log_history:
        for name, value in entry.items():
            if not has_curve(name) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            found.setdefault(name, []).append((entry["step"], value))
    return found


def charts_of(found: Mapping[str, Points]) -> list[tuple[Chart, dict[str, Points]]]:
    """The charts that have points, those of CHARTS first, then one for every other metric."""
    charts = list(CHARTS)
    known = {name for chart in CHARTS for name in chart.names}
    others = dict.fromkeys(name.removeprefix("eval_") for name in found)
    charts += [Chart(name, "", (name,)) for name in others if name not in known]
    filled = []
    for chart in charts:
        names = [*chart.names, *(f"eval_{name}" for name in chart.names)]
        if present := {name: found[name] for name in names if name in found}:
            filled.append((chart, present))
    return filled


def smoothed(points: Points) -> Points:
    """The exponential moving average over a tenth of the points or so, 5 to 20, without its bias towards the start."""
    weight = 1 - 1 / min(20, max(5, len(points) / 10))
    mean, total, result = 0.0, 0.0, []
    for step, value in points:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append((step, mean / total))
    return result


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if low == high:
        return [low]
    span = high - low
    step = 10 ** math.floor(math.log10(span / wanted))
    step = next((step * f for f in (1, 2, 5, 10) if span / (step * f) <= wanted + 1e-9), step * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 1200 -> 1200, 0.00002 -> 2e-05."""
    return f"{value:.4g}"


def svg(chart: Chart, present: Mapping[str, Points]) -> str:
    """One chart; thin: as logged, thick: smoothed, dots: held-out rows. Colours are CSS variables --c0, --c1, ..."""
    width, height, left, bottom, top, right = 420, 200, 52, 24, 8, 10
    xs = [x for points in present.values() for x, _ in points]
    ys = [y for points in present.values() for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    y0, y1 = y0 - pad, y1 + pad

    def place(points: Points) -> list[tuple[float, float]]:
        return [
            (
                left + (width - left - right) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5),
                top + (height - top - bottom) * (1 - (y - y0) / (y1 - y0)),
            )
            for x, y in points
        ]

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(chart.title)}">']
    for y in ticks(y0, y1):
        ((_, at),) = place([(x0, y)])
        parts.append(f'<path class="rule" d="M{left} {at:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    parts.append(f'<text x="{left - 6}" y="{height - 6}" text-anchor="end">step</text>')
    for x in ticks(x0, x1) if x1 > x0 else [x0]:
        ((at, _),) = place([(x, y0)])
        parts.append(f'<text x="{at:.1f}" y="{height - 6}" text-anchor="middle">{number(x)}</text>')
    for name, points in present.items():
        colour = f"var(--c{chart.colour(name)})"
        if name.startswith("eval_") or len(points) == 1:
            dots = place(points)
            parts.append(_line(dots, colour, 'stroke-width="1.5" stroke-dasharray="4 3"'))
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
        elif len(points) < 20 or not chart.noisy:
            parts.append(_line(place(points), colour, 'stroke-width="2"'))
        else:
            parts.append(_line(place(points), colour, 'stroke-width="1" opacity=".35"'))
            parts.append(_line(place(smoothed(points)), colour, 'stroke-width="2.2"'))
    return "".join([*parts, "</svg>"])


def _line(dots: Points, colour: str, style: str) -> str:
    if len(dots) > 1000:  # more than pixels
        dots = dots[:: len(dots) // 1000]
    return f'<polyline fill="none" stroke="{colour}" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in dots)}"/>'


def legend_name(name: str) -> str:
    """As it is called beside the chart."""
    return f"{name.removeprefix('eval_')}, held out" if name.startswith("eval_") else name


def draw_png(found: Mapping[str, Points], path: Path) -> None:
    """All charts in one picture."""
    import matplotlib  # slow to import, and only the main process draws

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    charts = charts_of(found)
    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(charts) :]:
        axis.axis("off")
    for axis, (chart, present) in zip(axes.flat, charts, strict=False):
        for name, points in present.items():
            colour = LIGHT[chart.colour(name)]
            x, y = zip(*points, strict=True)
            if name.startswith("eval_"):
                axis.plot(x, y, "o--", color=colour, markersize=3, linewidth=1, label=legend_name(name))
            elif len(points) < 20 or not chart.noisy:
                axis.plot(x, y, color=colour, label=name)
            else:
                axis.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
                axis.plot(*zip(*smoothed(points), strict=True), color=colour, label=name)
        axis.set_title(chart.title, fontsize=9)
        axis.set_ylabel(chart.unit, fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        if len(present) > 1:  # below the curves, not on them; a single one is what the title says
            axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130, format="png")
