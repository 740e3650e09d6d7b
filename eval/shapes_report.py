"""What `make demo` shows: report.json, report.html and a table, from the folders that its stages left.

    python -m eval.shapes_report runs/demo

reads, as far as they are there, of every stage (sft, rm, dpo, ppo, grpo) `<stage>/trainer_state.json` and
`eval/<stage>/` (python -m eval.shapes), and seconds.tsv. The page is one file that fetches nothing.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError, run
from common.files import write_json, write_text
from common.flags import FlagParser
from data.scenes import Thing
from eval.shapes import marked, mentions, read_scenes

STAGES = ("sft", "rm", "dpo", "ppo", "grpo")
SCORES = ("chair_i", "chair_s", "yesno_accuracy", "exact_captions", "coverage", "counting_accuracy")
# What the curves show of each stage: titles and names in trainer_state.json.
CURVES = {
    "sft": {"loss": "loss"},
    "rm": {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    "dpo": {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"},
    "ppo": {"reward": "objective/scores", "KL": "objective/kl", "value loss": "loss/value_avg"},
    "grpo": {
        "reward": "objective/scores",
        "deviation within groups": "reward_std",
        "groups without variance": "frac_reward_zero_std",
    },
}
PICTURES = 24

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.35em .9em;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.stage{color:#666;white-space:nowrap}
.card{display:flex;gap:1.2em;padding:.8em 0;border-bottom:1px solid #ddd}.card img{width:96px;height:96px;image-rendering:pixelated}
.card table{margin:0}.card td{border:0;padding:.1em .8em .1em 0}mark{background:#ffb3ab}del{color:#888}
.curves{display:flex;flex-wrap:wrap;gap:1.2em}figure{margin:0}figcaption{color:#666}svg{background:#f7f7f7}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_history(folder: Path) -> list[dict]:
    """The logged metrics of a run, in order; none if it left no trainer_state.json."""
    path = folder / "trainer_state.json"
    return json.loads(path.read_text())["log_history"] if path.is_file() else []


def read_seconds(path: Path) -> dict[str, float]:
    """Wall-clock seconds of every stage: lines of a name and a number, summed by name."""
    seconds: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, value = line.split("\t")
        seconds[name] = seconds.get(name, 0.0) + float(value)
    return seconds


def last(history: Sequence[dict], name: str) -> float | None:
    """The last logged value of a metric."""
    return next((entry[name] for entry in reversed(history) if name in entry), None)


def report_of(folder: Path) -> dict[str, dict[str, float]]:
    """report.json: for every stage that ran, its scores and seconds; of the reward model its accuracy on held-out pairs.

    Raises:
        InputError: no stage left anything.
    """
    seconds = read_seconds(folder / "seconds.tsv")
    report: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        scores = folder / "eval" / stage / "scores.json"
        history = read_history(folder / stage)
        found = {}
        if scores.is_file():
            values = json.loads(scores.read_text())
            found = {name: values[name] for name in SCORES}
        if stage == "rm" and (accuracy := last(history, "eval_accuracy")) is not None:
            found = {"accuracy": accuracy}
        if stage in ("ppo", "grpo") and found:
            logged = {"reward": last(history, "objective/scores"), "kl": last(history, "objective/kl")}
            found |= {name: value for name, value in logged.items() if value is not None}
        if found:
            report[stage] = found | ({"seconds": seconds[stage]} if stage in seconds else {})
    if not report:
        raise InputError(f"{folder} holds no results: `make demo` fills it.")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Showing

COLUMNS = {
    "chair_i": "CHAIR_i",
    "chair_s": "CHAIR_s",
    "yesno_accuracy": "yes/no",
    "exact_captions": "exact captions",
    "accuracy": "pairs ranked right",
    "reward": "reward",
    "kl": "KL",
    "seconds": "seconds",
}


def table(report: dict[str, dict[str, float]]) -> list[list[str]]:
    """Header and one line per stage, as texts; columns that no stage fills are left out."""
    columns = [name for name in COLUMNS if any(name in scores for scores in report.values())]
    lines = [["", *(COLUMNS[name] for name in columns)]]
    for stage, scores in report.items():
        cells = [
            "" if name not in scores else f"{scores[name]:.0f}" if name == "seconds" else f"{scores[name]:.3f}"
            for name in columns
        ]
        lines.append([stage.upper(), *cells])
    return lines


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A line over steps as an SVG figure, with the lowest and highest value written at the axis."""
    width, height, left, pad = 300, 150, 48, 10
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    x_span, y_span = max(xs) - min(xs) or 1, high - low or 1
    line = " ".join(
        f"{left + (x - min(xs)) / x_span * (width - left - pad):.1f},{height - pad - (y - low) / y_span * (height - 2 * pad):.1f}"
        for x, y in points
    )
    labels = "".join(
        f'<text x="{left - 5}" y="{y}" text-anchor="end" font-size="11">{value:.3g}</text>'
        for value, y in ((high, pad + 6), (low, height - pad))
    )
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">{labels}'
        f'<polyline points="{line}" fill="none" stroke="#2456b8" stroke-width="1.5"/></svg>'
        f"<figcaption>{html.escape(title)}, {max(xs):.0f} steps</figcaption></figure>"
    )


def curves(folder: Path) -> str:
    """The curves of the runs as one SVG text."""
    figures = []
    for stage, metrics in CURVES.items():
        history = read_history(folder / stage)
        for title, name in metrics.items():
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if len(points) > 1:
                figures.append(curve(f"{stage.upper()}: {title}", points))
    return f'<div class="curves">{"".join(figures)}</div>'


def marked_html(text: str, scene: Sequence[Thing]) -> str:
    """A caption with its wrong words marked and the objects that it leaves out struck through behind it."""
    shown = "".join(f"<mark>{html.escape(p)}</mark>" if wrong else html.escape(p) for p, wrong in marked(text, scene))
    missing = [thing.name for thing in scene if thing.name not in mentions(text)]
    return shown + (f" <del>{', '.join(missing)}</del>" if missing else "")


def cards(folder: Path, stages: Sequence[str]) -> str:
    """PICTURES held-out pictures with the captions of every stage: first those in which a stage says something wrong, as far as half of them."""
    rows = read_scenes(folder / "data" / "eval.json")
    captions = {}
    for stage in stages:
        lines = (folder / "eval" / stage / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        captions[stage] = [json.loads(line)["answer"] for line in lines[: len(rows)]]
    telling = [i for i, row in enumerate(rows) if captions["sft"][i] != row["caption"]][: PICTURES // 2]
    chosen = telling + [i for i in range(len(rows)) if i not in telling][: PICTURES - len(telling)]
    parts = []
    for i in sorted(chosen):
        picture = base64.b64encode(Path(rows[i]["image"]).read_bytes()).decode()
        said = "".join(
            f'<tr><td class="stage">{stage.upper()}<td>{marked_html(captions[stage][i], rows[i]["scene"])}'
            for stage in stages
        )
        parts.append(
            f'<div class="card"><img src="data:image/png;base64,{picture}" alt="{html.escape(rows[i]["caption"])}"><table>{said}</table></div>'
        )
    return "".join(parts)


def page(folder: Path, report: dict[str, dict[str, float]]) -> str:
    """report.html."""
    header, *lines = table(report)
    cells = "".join(f'<th class="n">{name}' for name in header)
    body = "".join(f"<tr><th>{line[0]}" + "".join(f'<td class="n">{cell}' for cell in line[1:]) for line in lines)
    stages = [stage for stage in report if (folder / "eval" / stage / "answers.jsonl").is_file()]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>VL-RLHF demo</title><style>{STYLE}</style><h1>VL-RLHF demo</h1>'
        "<p>A tiny LLaVA learns to describe coloured shapes from captions of which about 30 % name an object that is not there. "
        "Preference learning then corrects what it hallucinates. All numbers are of held-out pictures: CHAIR_i is the share of the objects "
        "mentioned that are not there, CHAIR_s the share of captions that mention one.</p>"
        f"<table><tr>{cells}{body}</table><h2>Training</h2>{curves(folder)}<h2>Held-out pictures</h2>"
        "<p><mark>Wrong</mark> words are marked, <del>objects left out</del> are struck through. "
        "Half of these pictures are ones that the SFT model describes wrongly; the others come as they are drawn.</p>"
        f"{cards(folder, stages)}</html>\n"
    )


def main() -> None:
    """Write the report of a demo folder."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="runs/demo")
    folder = parser.parse_args().folder
    report = report_of(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", page(folder, report))
    lines = table(report)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"-> {folder / 'report.json'}, {folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
