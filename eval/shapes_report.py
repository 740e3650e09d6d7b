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

from base.charts import CHARTS, Chart, series, svg
from common.errors import InputError, run
from common.files import write_json, write_text
from common.flags import FlagParser
from common.pages import page
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
UNITS = {name: chart.unit for chart in CHARTS for name in chart.names} | {
    "reward_std": "reward",
    "frac_reward_zero_std": "share",
}
PICTURES = 24

STYLE = (
    ".scroll{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.3rem .8rem;text-align:left;vertical-align:top}"
    "thead th,tbody tr{border-bottom:1px solid var(--line)}.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".scene{display:flex;flex-wrap:wrap;gap:1rem}.scene img{width:96px;height:96px;image-rendering:pixelated}"
    ".scene table{margin:0;flex:1;min-width:14rem}.scene td{border:0;padding:.1rem .6rem .1rem 0}.scene tr{border:0}"
    ".scene td:first-child{white-space:nowrap;overflow-wrap:normal}@media(max-width:34rem){.scroll td,.scroll th{padding:.3rem .45rem}}"
    "mark{background:var(--warn);color:var(--ground);border-radius:2px;padding:0 .15em}del{color:var(--soft)}"
    "svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .rule{stroke:var(--line)}"
)


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


def curves(folder: Path) -> str:
    """The curves of the runs, a card each."""
    figures = []
    for stage, metrics in CURVES.items():
        found = series(read_history(folder / stage))
        for title, name in metrics.items():
            if len(found.get(name, [])) > 1:
                chart = Chart(f"{stage.upper()}: {title}", UNITS.get(name, ""), (name,))
                unit = f' <span class="soft">({chart.unit})</span>' if chart.unit else ""
                figures.append(
                    f'<div class="card"><h3>{html.escape(chart.title)}{unit}</h3>{svg(chart, {name: found[name]})}</div>'
                )
    return f'<div class="grid">{"".join(figures)}</div>'


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
            f'<tr><td class="soft">{stage.upper()}<td>{marked_html(captions[stage][i], rows[i]["scene"])}'
            for stage in stages
        )
        parts.append(
            f'<div class="card scene"><img src="data:image/png;base64,{picture}" alt="{html.escape(rows[i]["caption"])}"><table>{said}</table></div>'
        )
    return "".join(parts)


def html_page(folder: Path, report: dict[str, dict[str, float]]) -> str:
    """report.html."""
    header, *lines = table(report)
    cells = "".join(f'<th class="n">{name}' for name in header)
    body = "".join(f"<tr><th>{line[0]}" + "".join(f'<td class="n">{cell}' for cell in line[1:]) for line in lines)
    stages = [stage for stage in report if (folder / "eval" / stage / "answers.jsonl").is_file()]
    return page(
        "VL-RLHF demo",
        "<h1>VL-RLHF demo</h1>"
        "<p>A tiny LLaVA learns to describe coloured shapes from captions of which about 30 % name an object that is not there. "
        "Preference learning then corrects what it hallucinates. All numbers are of held-out pictures: CHAIR_i is the share of the objects "
        "mentioned that are not there, CHAIR_s the share of captions that mention one.</p>"
        f'<div class="scroll"><table><thead><tr>{cells}</thead><tbody>{body}</tbody></table></div>'
        f"<h2>Training</h2><p>Over steps; thin: as logged, thick: smoothed.</p>{curves(folder)}<h2>Held-out pictures</h2>"
        "<p><mark>Wrong</mark> words are marked, <del>objects left out</del> are struck through. "
        "Half of these pictures are ones that the SFT model describes wrongly; the others come as they are drawn.</p>"
        f'<div class="grid">{cards(folder, stages)}</div>',
        STYLE,
    )


def main() -> None:
    """Write the report of a demo folder."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="runs/demo")
    folder = parser.parse_args().folder
    report = report_of(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", html_page(folder, report))
    lines = table(report)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"-> {folder / 'report.json'}, {folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
