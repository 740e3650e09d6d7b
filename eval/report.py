"""Tables, charts and a page of answers from the results.json of one or more runs.

    python -m eval.report runs/base/eval runs/dpo/eval --output report
    python -m eval.report runs/sweep/checkpoint-* --output report          # with steps: curve.png, too

report.md, report.tex   the table: one row per run, the best number of a column in bold, notes on judges and settings
radar.png, bars.png     headline metrics (radar: each axis 0 to its best possible value, "lower is better" turned round)
curve.png               headline metrics over training steps
index.html              answers side by side with hallucinated words marked, filters; one file, nothing is fetched
"""

import base64
import html
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common.errors import InputError, run
from common.files import write_text
from common.flags import FlagParser
from common.pages import LIGHT
from eval.benchmark_files import Row, prompt, read_task
from eval.files import read_any, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Metric:
    """A column: title, score key, unit (its best possible value when higher is better), direction, decimals."""

    title: str
    key: str
    best: float = 100.0
    lower: bool = False
    scale: float = 1.0

    @property
    def unit(self) -> str:
        """Of the y axis."""
        return "words per answer" if self.key == "words" else "%" if self.best == 100 else "points"

    def value(self, scores: dict[str, float]) -> float | None:
        """The number of this metric among the scores of a run, or None."""
        if self.key not in scores and self.key.startswith("*/"):  # MMBench names its split
            return next(
                (self.scale * v for k, v in scores.items() if k.count("/") == 1 and k.endswith(self.key[1:])), None
            )
        return self.scale * scores[self.key] if self.key in scores else None


def _percent(title: str, key: str, lower: bool = False) -> Metric:
    return Metric(title, key, lower=lower, scale=100.0)


# What papers print. Scores that are fractions are shown in percent.
HEADLINES: dict[str, list[Metric]] = {
    "objhal_judged": [_percent("ObjHal Resp.", "CHAIRs_refine", True), _percent("ObjHal Ment.", "CHAIRi", True)],
    "objhal_rule": [
        _percent("ObjHal rule Resp.", "CHAIRs_refine", True),
        _percent("ObjHal rule Ment.", "CHAIRi", True),
    ],
    "chair": [_percent("CHAIR_s", "CHAIRs", True), _percent("CHAIR_i", "CHAIRi", True)],
    "mmhal": [Metric("MMHal", "average_score", best=6), _percent("MMHal rate", "hallucination_rate", True)],
    "amber_generative": [
        Metric("AMBER CHAIR", "CHAIR", lower=True),
        Metric("Cover", "Cover"),
        Metric("Hal", "Hal", lower=True),
        Metric("Cog", "Cog", lower=True),
    ],
    "amber_discriminative": [Metric("AMBER Acc", "accuracy"), Metric("AMBER F1", "f1")],
    "pope": [_percent("POPE F1", "mean/f1"), _percent("POPE yes", "mean/yes_ratio")],
    "refomb": [_percent("RefoMB trust", "trustworthiness"), _percent("RefoMB win", "win_rate")],
    "hallusion": [Metric("HallB aAcc", "aAcc"), Metric("fAcc", "fAcc"), Metric("qAcc", "qAcc")],
    "hallusion_judged": [Metric("HallB judged aAcc", "repository/overall/aAcc")],
    "mme": [Metric("MME-P", "perception", best=2000), Metric("MME-C", "cognition", best=800)],
    "mmbench": [_percent("MMBench", "*/Overall")],
    "seed": [_percent("SEED-I", "overall")],
    "seed_likelihood": [Metric("SEED-I ppl", "total")],
    "mmmu": [_percent("MMMU", "overall")],
    "mathvista": [_percent("MathVista", "average")],
    "mathvista_rule": [_percent("MathVista rule", "average")],
    "mmvet": [Metric("MM-Vet", "total")],
    "vlrewardbench": [Metric("VL-RB", "overall"), Metric("VL-RB macro", "macro")],
    "mmrb": [_percent("MM-RB", "all")],
    "plain": [
        _percent("own questions", "accuracy"),
        Metric("judge, of 10", "judge_score", best=10),
        Metric("words", "words"),
    ],
    "mmrlhf": [_percent("MM-RLHF-RB", "overall/accuracy"), _percent("MM-RLHF-RB+", "overall/acc_plus")],
}
NO_AXIS = ("POPE yes", "words")  # neither high nor low is better


@dataclass
class Run:
    """One results.json: {score name: entry}."""

    name: str
    folder: Path
    results: dict[str, dict] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The training step of the checkpoint, if its folder names one."""
        return next((e["step"] for e in self.results.values() if e.get("step") is not None), None)


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Find results.json in each folder or in its eval/; names are the shortest path ends that tell the runs apart."""
    found = []
    for folder in map(Path, folders):
        place = next((p for p in (folder, folder / "eval") if (p / "results.json").is_file()), None)
        if place is None:
            raise InputError(
                f"{folder} has no results.json; run a scorer first, e.g. python -m eval.yesno --task pope ..."
            )
        found.append((folder.resolve(), place))
    depth = 1
    while depth < 8 and len({f.parts[-depth:] for f, _ in found}) < len(found):
        depth += 1
    runs = []
    for folder, place in found:
        results = read_any(place / "results.json")
        if not isinstance(results, dict) or not all(isinstance(e, dict) and "scores" in e for e in results.values()):
            raise InputError(f"{place / 'results.json'} is not a results file of this project")
        runs.append(Run("/".join(folder.parts[-depth:]), place, results))
    return runs


# --------------------------------------------------------------------------------------------------- table


def columns(runs: list[Run]) -> list[tuple[str, Metric]]:
    """(score name, metric) of everything that a run has; scores without a headline show their first numbers."""
    names = [n for n in HEADLINES if any(n in r.results for r in runs)]
    names += sorted({n for r in runs for n in r.results} - set(HEADLINES))
    out = []
    for name in names:
        scores = next(r.results[name]["scores"] for r in runs if name in r.results)
        plain = [Metric(f"{name} {key}", key) for key in list(scores)[:4]]
        found = [r.results[name]["scores"] for r in runs if name in r.results]
        out += [(name, m) for m in HEADLINES.get(name, plain) if any(m.value(s) is not None for s in found)]
    return out


def cells(runs: list[Run], table: list[tuple[str, Metric]]) -> list[list[float | None]]:
    """The table: a row per run, a column per metric."""
    return [[m.value(r.results[n]["scores"]) if n in r.results else None for n, m in table] for r in runs]


def _format(value: float | None, metric: Metric) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if metric.best <= 6 else f"{value:.1f}"


def _best(values: list[float | None], metric: Metric) -> float | None:
    present = [v for v in values if v is not None]
    # numbers that are all equal have no best
    return None if len(set(present)) < 2 or metric.title in NO_AXIS else (min if metric.lower else max)(present)


def notes(runs: list[Run]) -> list[str]:
    """What a reader must know before comparing: judges, limited runs, other data, other generation settings."""
    out = []
    for name in dict.fromkeys(n for r in runs for n in r.results):
        entries = [(r.name, r.results[name]) for r in runs if name in r.results]
        judges = dict.fromkeys((e["judge"] or {}).get("model") for _, e in entries if e.get("judge"))
        if judges:
            prompts = dict.fromkeys(
                Path((e["judge"] or {}).get("prompt", "")).name for _, e in entries if e.get("judge")
            )
            out.append(f"{name}: judged by {', '.join(map(str, judges))} (prompt: {', '.join(prompts)})")
            if len(judges) > 1 or len({(e["judge"] or {}).get("prompt_sha256") for _, e in entries}) > 1:
                out.append(f"{name}: NOT comparable, the judge or its prompt differs between runs")
        if len({e["data_sha256"] for _, e in entries}) > 1:
            out.append(f"{name}: NOT comparable, the runs were scored on different data files")
        rows = dict.fromkeys(e["rows"] for _, e in entries)
        if len(rows) > 1:
            out.append(f"{name}: NOT comparable, the runs have {' and '.join(map(str, rows))} rows")
        limits = [f"{run_name} {e['limit']}" for run_name, e in entries if e.get("limit")]
        if limits:
            out.append(f"{name}: the first rows only ({', '.join(limits)}), no number for a table")
        settings = {json.dumps(e.get("generation"), sort_keys=True) for _, e in entries if e.get("generation")}
        if len(settings) > 1:
            out.append(f"{name}: generation settings differ between runs: {' | '.join(sorted(settings))}")
        unclear = [
            f"{run_name} {e['scores']['unclear']:g} of {e['rows']}"
            for run_name, e in entries
            if e["scores"].get("unclear")
        ]
        if unclear:
            out.append(f"{name}: answers with neither yes nor no, which count as yes: {', '.join(unclear)}")
        if name.endswith("_rule"):
            out.append(f"{name}: rule mode, not the judged number of the papers")
    return out


def markdown(runs: list[Run]) -> str:
    """A GitHub table and the notes."""
    table = columns(runs)
    values = cells(runs, table)
    best = [_best([row[i] for row in values], m) for i, (_, m) in enumerate(table)]
    lines = ["| run | " + " | ".join(m.title + (" ↓" if m.lower else "") for _, m in table) + " |"]
    lines.append("|---|" + "---:|" * len(table))
    for r, row in zip(runs, values, strict=True):
        shown = [
            f"**{_format(v, m)}**" if v is not None and v == b else _format(v, m)
            for v, b, (_, m) in zip(row, best, table, strict=True)
        ]
        lines.append(f"| {r.name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n\n" + "".join(f"- {note}\n" for note in notes(runs))


def latex(runs: list[Run]) -> str:
    """The same as a booktabs table."""

    def escape(text: str) -> str:
        for mark in "\\&%$#_{}":
            text = text.replace(mark, "\\textbackslash{}" if mark == "\\" else "\\" + mark)
        return text

    table = columns(runs)
    values = cells(runs, table)
    best = [_best([row[i] for row in values], m) for i, (_, m) in enumerate(table)]
    head = " & ".join(escape(m.title) + (r" $\downarrow$" if m.lower else "") for _, m in table)
    body = []
    for r, row in zip(runs, values, strict=True):
        shown = [
            rf"\textbf{{{_format(v, m)}}}" if v is not None and v == b else _format(v, m)
            for v, b, (_, m) in zip(row, best, table, strict=True)
        ]
        body.append(f"{escape(r.name)} & " + " & ".join(shown) + r" \\")
    comments = "".join(f"% {note}\n" for note in notes(runs))
    return (
        f"{comments}\\begin{{tabular}}{{l{'r' * len(table)}}}\n\\toprule\nrun & {head} \\\\\n\\midrule\n"
        + "\n".join(body)
        + "\n\\bottomrule\n\\end{tabular}\n"
    )


# -------------------------------------------------------------------------------------------------- charts


def _goodness(value: float, metric: Metric) -> float:
    share = min(1.0, max(0.0, value / metric.best))
    return 1 - share if metric.lower else share


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=LIGHT)  # C0, C1, ...
    return plt


def charts(runs: list[Run], folder: Path) -> list[str]:
    """Write radar.png (three shared metrics at least), bars.png and, with steps, curve.png; return their names."""
    plt = _pyplot()
    table = columns(runs)
    values = cells(runs, table)
    written = []
    shared = [
        i for i, (_, m) in enumerate(table) if m.title not in NO_AXIS and all(row[i] is not None for row in values)
    ]
    shared = [i for i in shared if table[i][0] in HEADLINES]
    if len(shared) >= 3:
        import math

        angles = [2 * math.pi * n / len(shared) for n in range(len(shared))] + [0.0]
        figure, axis = plt.subplots(figsize=(7, 7), subplot_kw={"projection": "polar"})
        for r, row in zip(runs, values, strict=True):
            spokes = [_goodness(row[i], table[i][1]) for i in shared]
            axis.plot(angles, spokes + spokes[:1], label=r.name, linewidth=2)
            axis.fill(angles, spokes + spokes[:1], alpha=0.12)
        axis.set_xticks(angles[:-1], [table[i][1].title + (" ↓" if table[i][1].lower else "") for i in shared])
        axis.tick_params(axis="x", pad=16)
        axis.set_rlabel_position(180 / len(shared))
        axis.set_ylim(0, 1)
        axis.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "50 %", "", "best"])
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(3, len(runs)), frameon=False)
        figure.savefig(folder / "radar.png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        written.append("radar.png")
    _small_multiples(runs, table, values, folder / "bars.png", _bars)
    written.append("bars.png")
    if sum(r.step is not None for r in runs) >= 2:
        _small_multiples(runs, table, values, folder / "curve.png", _curve)
        written.append("curve.png")
    return written


def _small_multiples(
    runs: list[Run],
    table: list[tuple[str, Metric]],
    values: list[list[float | None]],
    path: Path,
    draw: Callable[..., None],
) -> None:
    """One small plot per metric: units differ, so axes are not shared."""
    plt = _pyplot()
    wide = min(4, len(table))
    tall = -(-len(table) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(3.4 * wide, 2.6 * tall), squeeze=False)
    for n, axis in enumerate(axes.flat):
        if n >= len(table):
            axis.axis("off")
            continue
        metric = table[n][1]
        axis.set_title(metric.title + (" (lower is better)" if metric.lower else ""), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_ylabel(metric.unit, fontsize=8)
        draw(axis, runs, [row[n] for row in values], metric)
    handles, labels = next(
        (a.get_legend_handles_labels() for a in axes.flat if a.get_legend_handles_labels()[0]), ([], [])
    )
    figure.tight_layout()
    if handles:  # below the axes, whatever its height: `bbox_inches` makes the picture as tall as that needs
        figure.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            ncols=min(4, len(handles)),
            frameon=False,
            fontsize=9,
        )
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _bars(axis: "Axes", runs: list[Run], values: list[float | None], metric: Metric) -> None:
    for n, (r, v) in enumerate(zip(runs, values, strict=True)):
        bar = axis.bar(n, v if v is not None else 0, color=f"C{n % 10}", label=r.name)
        axis.bar_label(bar, [_format(v, metric)], fontsize=8)
    axis.set_xticks([])
    highest = max((v for v in values if v is not None), default=0)
    axis.set_ylim(min(0, *(v or 0 for v in values)), 1.15 * highest if highest > 0 else metric.best)


def _curve(axis: "Axes", runs: list[Run], values: list[float | None], metric: Metric) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for r, v in zip(runs, values, strict=True):
        if v is None:
            continue
        if r.step is None:  # the starting point, or another model to compare with
            axis.axhline(v, linestyle="--", linewidth=1, color="grey", label=r.name)
        else:
            lines.setdefault(str(Path(r.name).parent), []).append((r.step, v))
    for name, points in lines.items():
        steps, heights = zip(*sorted(points), strict=True)
        axis.plot(steps, heights, marker="o", markersize=3, label=name if name != "." else "checkpoints")
    axis.set_xlabel("step", fontsize=8)


# --------------------------------------------------------------------------------------------------- page


def page_rows(runs: list[Run], name: str, max_rows: int) -> tuple[list[dict], int]:
    """Up to `max_rows` rows of one score for the page, those on which the runs differ first; and how many there are."""
    by_id: dict[str, dict] = {}
    for index, r in enumerate(runs):
        file = r.folder / "scored" / f"{name}.jsonl"
        if name not in r.results or not file.exists():
            continue
        for d in read_records(file):
            row = by_id.setdefault(
                str(d["id"]), {"id": str(d["id"]), "category": str(d.get("category", "")), "runs": {}}
            )
            row["label"] = d.get("label", d.get("truth"))
            row["runs"][index] = {k: d[k] for k in ("answer", "correct", "marks", "parsed", "review") if k in d}
    differ = [r for r in by_id.values() if len({a["correct"] for a in r["runs"].values()}) > 1]
    chosen = (
        (differ + [r for r in by_id.values() if r not in differ])[:max_rows]
        if max_rows < len(by_id)
        else list(by_id.values())
    )
    entry = next(r.results[name] for r in runs if name in r.results)
    data: dict[str, Row] = {}
    if Path(entry["data"]).exists():
        data = {str(r["id"]): r for r in read_task(entry["task"], entry["data"], entry.get("image_dir"))}
    for row in chosen:
        source = data.get(row["id"])
        if source is not None:
            row["question"] = prompt(entry["task"], source, "")
            row["images"] = [t for t in map(thumbnail, source["images"]) if t]
            row["label"] = row["label"] if row["label"] is not None else source.get("label")
    return chosen, len(by_id)


def thumbnail(image: str | dict, size: int = 320) -> str | None:
    """A small JPEG as a data URI; None if the image is not here."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image["bytes"]) if isinstance(image, dict) else image) as picture:
            small = picture.convert("RGB")
            small.thumbnail((size, size))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=80)
    except (OSError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(runs: list[Run], pictures: list[str], max_rows: int, folder: Path) -> str:
    """The HTML page. Model output is only ever put in as text, never as markup."""
    benchmarks = []
    for name in dict.fromkeys(n for r in runs for n in r.results):
        rows, total = page_rows(runs, name, max_rows)
        if rows:
            benchmarks.append({"name": name, "total": total, "rows": rows})
    # Several questions are asked about one picture: it is in the page once, rows have its place
    images = {
        source: n
        for n, source in enumerate(dict.fromkeys(s for b in benchmarks for r in b["rows"] for s in r.get("images", [])))
    }
    for row in (r for b in benchmarks for r in b["rows"] if "images" in r):
        row["images"] = [images[source] for source in row["images"]]
    everything = {"runs": [r.name for r in runs], "images": list(images), "benchmarks": benchmarks}
    data = json.dumps(everything, ensure_ascii=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    table = columns(runs)
    values = cells(runs, table)
    best = [_best([row[i] for row in values], m) for i, (_, m) in enumerate(table)]
    head = "".join(f"<th>{html.escape(m.title)}{' ↓' if m.lower else ''}</th>" for _, m in table)
    body = "".join(
        f"<tr><th>{html.escape(r.name)}</th>"
        + "".join(
            f"<td{' class=best' if v is not None and v == b else ''}>{_format(v, m)}</td>"
            for v, b, (_, m) in zip(row, best, table, strict=True)
        )
        + "</tr>"
        for r, row in zip(runs, values, strict=True)
    )
    charts_html = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}">'
        for name in pictures
    )
    note_html = "".join(f"<li>{html.escape(note)}</li>" for note in notes(runs))
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    for key, value in {"HEAD": head, "BODY": body, "NOTES": note_html, "CHARTS": charts_html, "DATA": data}.items():
        template = template.replace(f"<!--{key}-->", value)
    return template


def write_report(runs: list[Run], folder: Path, max_rows: int = 200) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", markdown(runs))
    write_text(folder / "report.tex", latex(runs))
    pictures = charts(runs, folder)
    write_text(folder / "index.html", page(runs, pictures, max_rows, folder))
    print(markdown(runs))
    print(f"{folder}: report.md report.tex index.html {' '.join(pictures)}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders with results.json (or with eval/results.json)")
    parser.add_argument("--output", default="report", help="folder to write")
    parser.add_argument(
        "--max_rows", type=int, default=200, help="rows per benchmark on the page, differing ones first"
    )
    args = parser.parse_args(argv)
    write_report(read_runs(args.runs), Path(args.output), args.max_rows)


if __name__ == "__main__":
    run(main)
