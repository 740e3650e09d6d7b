"""What a run shows without a service: curves, warnings, samples, all in the folder of the run."""

import gc
import importlib
import json
import logging
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from base import answer_samples, run_page
from base.charts import CHARTS, Chart, charts_of, draw_png, series, smoothed, svg, ticks
from base.log_lines import log_line
from base.run_warnings import LAST, run_warnings
from base.samples import Sample, asked_and_told, html_page, report_table, write_samples
from tests.processes import history

SCRIPT = {name: importlib.import_module(f"train_{name}") for name in ("sft", "dpo", "rm", "ppo")}


class Whole(HTMLParser):
    """Fails on tags that are not closed in order; keeps what a page shows and loads."""

    VOID = {"meta", "img", "br", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


# -- charts ------------------------------------------------------------------------------------------------------------------


def test_series_leave_out_what_is_no_curve():
    log = [
        {"step": 1, "loss": 0.5, "epoch": 0.1, "learning_rate": 1e-3},
        {"step": 2, "loss": float("nan"), "epoch": 0.2, "learning_rate": 5e-4},
        {"step": 2, "eval_loss": 0.7, "eval_runtime": 3.0, "eval_samples_per_second": 2.0},
        {"step": 2, "train_runtime": 9.0, "train_loss": 0.6, "total_flos": 1.0},
    ]
    assert series(log) == {"loss": [(1, 0.5)], "learning_rate": [(1, 1e-3), (2, 5e-4)], "eval_loss": [(2, 0.7)]}


def test_the_moving_average_by_hand():
    """Weight .8 below 50 points: 1; (.8 · .2 · 1 + .2 · 2) / (1 - .8²)."""
    (_, first), (_, second) = smoothed([(0, 1.0), (1, 2.0)])
    assert first == pytest.approx(1.0) and second == pytest.approx((0.16 + 0.4) / 0.36)
    assert all(value == pytest.approx(3.0) for _, value in smoothed([(i, 3.0) for i in range(300)]))


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.5, 1]),
        (-1.2, 3.1, [0, 2]),
        (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
        (97, 103, [98, 100, 102]),
        (5, 5, [5]),
    ],
)
def test_round_ticks(low: float, high: float, found: list[float]):
    assert ticks(low, high) == pytest.approx(found)


def test_a_metric_without_a_place_has_a_chart_of_its_own():
    found = {"mine": [(1, 2.0)], "eval_mine": [(2, 3.0)], "eval_rewards/chosen": [(1, 0.0)]}
    charts = charts_of(found)
    assert [(chart.title, list(present)) for chart, present in charts] == [
        ("Rewards", ["eval_rewards/chosen"]),
        ("mine", ["mine", "eval_mine"]),
    ]
    names = [name for chart in CHARTS for name in chart.names]
    assert len(names) == len(set(names))


def test_points_stand_where_their_values_are():
    """Two points at the lower left and the upper right, 6 % away from the frame; held-out rows have the same colour, dashed."""
    chart = Chart("A & B", "", ("a",))
    drawn = svg(chart, {"a": [(0, 0.0), (10, 1.0)], "eval_a": [(10, 0.5)]})
    first, second = re.findall(r'<polyline [^>]*points="([^"]*)"', drawn)
    (x0, y0), (x1, y1) = [tuple(map(float, dot.split(","))) for dot in first.split()]
    assert (x0, x1) == (52, 410) and y0 - y1 == pytest.approx(168 / 1.12, abs=0.1)
    x, y = map(float, second.split(","))
    assert x == 410 and y == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert drawn.count("var(--c0)") == 3 and "var(--c1)" not in drawn and "A &amp; B" in drawn
    Whole(drawn)


def test_one_point_and_equal_points_can_be_drawn(tmp_path: Path):
    found = {"loss": [(1, 0.0)], "margin": [(1, 2.0), (2, 2.0)], "other": [(i, math.sin(i)) for i in range(3000)]}
    for chart, present in charts_of(found):
        assert "nan" not in svg(chart, present)
    assert len(svg(Chart("", "", ("other",)), {"other": found["other"]})) < 50_000  # as many points as pixels
    draw_png(found, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500 and [p.name for p in tmp_path.iterdir()] == ["curves.png"]


# -- warnings ----------------------------------------------------------------------------------------------------------------


def points(*values: float) -> list[tuple[float, float]]:
    return [*enumerate(values, 1)]


def dpo(chosen: float, margin: float = 1.0, steps: int = LAST) -> dict:
    flat = [chosen] * steps
    return {
        "rewards/chosen": points(*flat),
        "logps/chosen": points(*flat),
        "rewards/margins": points(*[margin] * steps),
    }


@pytest.mark.parametrize(
    ("found", "beta", "signs"),
    [
        (dpo(-5.1), 0.1, {"chosen"}),  # a log-ratio of -51 nats
        (dpo(-4.9), 0.1, set()),
        (dpo(-5.1), 0.5, set()),
        (dpo(-5.1, steps=LAST - 1), 0.1, set()),
        (dpo(0, margin=20.5), 0.1, {"margin"}),
        ({"margin": points(*[21.0] * LAST)}, 1.0, {"margin"}),
        ({"margin": points(*[50.0] * LAST, *[1.0] * LAST)}, 1.0, set()),  # what was there once and is no more
        ({"rewards/chosen": points(*[-99.0] * LAST)}, 1.0, set()),  # a reward model's scale is its own
        ({"eval_loss": points(0.7, 0.5, 0.6, 0.7)}, 1.0, {"held out"}),
        ({"eval_loss": points(0.7, 0.5, 0.51)}, 1.0, set()),
        ({"eval_loss": points(0.7, 0.5, 0.5, 0.7)}, 1.0, set()),  # one bad evaluation
        ({"val/response_length": points(*[10.0] * LAST, *[21.0] * LAST)}, 1.0, {"length"}),
        ({"val/response_length": points(*[10.0] * LAST, *[19.0] * LAST)}, 1.0, set()),
        ({}, 1.0, set()),
    ],
)
def test_signs_of_a_run_that_goes_wrong(found: dict, beta: float, signs: set):
    assert set(run_warnings(found, beta)) == signs


# -- what the page costs -----------------------------------------------------------------------------------------------------


def test_every_entry_of_the_log_is_read_once(tmp_path: Path, monkeypatch):
    """And all of an earlier run's that was resumed; a second call of train starts anew."""
    read = []
    monkeypatch.setattr(run_page, "series", lambda entries: read.append(len(entries)) or series(entries))
    page = run_page.RunPage(lambda: 0)
    args = SimpleNamespace(output_dir=str(tmp_path), device=torch.device("cpu"), world_size=1)
    for _ in range(2):
        log = [{"step": step, "loss": 1 / step} for step in range(1, 31)]
        state = TrainerState(global_step=30, max_steps=100, log_history=log, is_world_process_zero=True)
        page.on_train_begin(args, state, None)
        for step in range(31, 81):
            state.global_step = step
            log.append({"step": step, "loss": 1 / step, "mine": 2.0})
            page.on_log(args, state, None)
        assert sum(read) == 80 + 50  # and the speed of 50 logs
        found = {name: points for name, points in page.found.items() if name not in ("seconds_per_step", "memory_gib")}
        assert found == series(log) and [step for step, _ in page.found["seconds_per_step"]] == [*range(31, 81)]
        read.clear()


def test_page_and_picture_take_a_fiftieth_of_the_time(monkeypatch):
    """Two seconds of drawing are followed by 98 of rest, and a short one by the least that is asked for."""
    monkeypatch.setattr(run_page.time, "monotonic", lambda: 1002.0)
    assert run_page.not_before(1000.0, every=15.0) == pytest.approx(1100.0)
    assert run_page.not_before(1000.0, every=300.0) == 1302.0
    assert run_page.not_before(1001.9, every=15.0) == 1017.0


def test_nothing_of_a_picture_stays_in_memory(tmp_path: Path):
    page = run_page.RunPage(lambda: 0)
    page.found = {"loss": [(step, 1 / step) for step in range(1, 9)]}
    gc.disable()
    try:
        page.write(SimpleNamespace(output_dir=str(tmp_path)), TrainerState(), draw=True)
        assert (tmp_path / "curves.png").is_file()
        assert not [figure for figure in gc.get_objects() if type(figure) is Figure]
    finally:
        gc.enable()


# -- whole runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A page at every log, and pictures from the second step on."""
    monkeypatch.setattr(run_page, "EVERY", 0.0)
    monkeypatch.setattr(run_page, "MIN_POINTS", 2)


@pytest.mark.parametrize("name", SCRIPT)
def test_the_page_of_a_run(command, rewards: str, small, name: str, tmp_path: Path):
    extra = {"ppo": f"--reward_fn {rewards} --response_length 4", "rm": ""}.get(name, "--num_sample_generations 2")
    SCRIPT[name].main(command(name, f"--use_lora True --lora_r 4 --eval_ratio 0.25 --max_steps 3 {extra}"))
    out = tmp_path / name
    page = Whole((out / "index.html").read_text())
    said = " ".join(" ".join(page.text).split())
    assert f"{name} finished after step 3 of 3" in said and "6 rows, 2 held out" in said
    last = {k: v for e in history(out) for k, v in e.items()}
    for chart in CHARTS:
        logged = [n for n in chart.names if n in last]
        assert (chart.title in said) == bool(logged or chart.title in ("Speed", "Time of a step", "Memory, peak")), (
            chart
        )
        for n in logged:
            assert f"{n} {last[n]:.4g}" in said, n
    speed = float(re.search(r"tokens_per_second ([\d.e+]+)", said)[1])
    assert speed > 0
    assert Image.open(out / "curves.png").format == "PNG"
    assert "http-equiv" not in (out / "index.html").read_text()  # it has ended

    pages = sorted(p.name for p in (out / "samples").glob("*.html")) if (out / "samples").exists() else []
    steps = {"sft": [0, 1, 2, 3], "dpo": [0, 1, 2, 3], "ppo": [1, 2, 3], "rm": []}[name]
    assert pages == [f"step-{step:06d}.html" for step in steps]
    assert [link for link in page.loaded if link.startswith("samples/")][:-1] == [
        f"samples/{p}" for p in reversed(pages)
    ][: len(pages)]
    for file in pages:
        sample = Whole((out / "samples" / file).read_text())
        words = " ".join(sample.text)
        assert all(link.startswith("data:image/jpeg") for link in sample.loaded) and sample.loaded
        if name == "dpo":
            assert words.count("chosen") == 2 == words.count("before training")
            # in the title, the heading, and at both rows
            assert words.count("at step") == (2 if file == "step-000000.html" else 4)
        if name == "sft":
            assert words.count("in the data") == 2


def test_the_page_while_the_run_goes_on(command, small, tmp_path: Path, monkeypatch):
    seen = []
    write = run_page.RunPage.write

    def look(self, args, state, *rest, **kwargs):
        write(self, args, state, *rest, **kwargs)
        seen.append((Path(args.output_dir) / "index.html").read_text())

    monkeypatch.setattr(run_page.RunPage, "write", look)
    SCRIPT["dpo"].main(command("dpo", "--use_lora True --lora_r 4 --num_sample_generations 0"))
    assert 'http-equiv="refresh" content="30"' in seen[0] and "running, step 1 of 2, about 0 min left" in seen[0]
    assert "refresh" not in seen[-1] and not (tmp_path / "dpo" / "samples").exists()


def test_sampling_changes_no_number_of_training(command, tmp_path: Path):
    for tables in (0, 3):
        flags = f"--use_lora True --lora_r 4 --lora_dropout 0.5 --max_steps 3 --num_sample_generations {tables}"
        SCRIPT["sft"].main(command("sft", flags, out=tmp_path / str(tables)))
    without, with_samples = ([e["loss"] for e in history(tmp_path / t) if "loss" in e] for t in ("0", "3"))
    assert without == with_samples
    before = json.loads((tmp_path / "3" / "samples" / "before.json").read_text())
    assert len(before) == 4 and any(before)


def test_a_run_of_fewer_steps_writes_no_answers(command, tmp_path: Path):
    SCRIPT["sft"].main(command("sft", "--use_lora True --lora_r 4"))
    assert not (tmp_path / "sft" / "samples").exists() and (tmp_path / "sft" / "index.html").is_file()


def test_warnings_stand_on_the_page_and_are_said_once(command, small, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(run_page, "run_warnings", lambda found, beta: {"margin": f"<b> at beta {beta:g}"})
    monkeypatch.setattr(run_page.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        SCRIPT["dpo"].main(command("dpo", "--use_lora True --lora_r 4 --beta 0.25"))
    assert caplog.text.count("<b> at beta 0.25") == 1
    assert (tmp_path / "dpo" / "index.html").read_text().count('class="warn">Step 1: &lt;b&gt; at beta 0.25') == 1


def test_ppo_shows_prompt_and_picture_once_and_no_markup_of_a_model(image_dir: Path):
    prompt = [{"role": "user", "content": "What?"}]
    images = [str(image_dir / "0.png")]
    samples = [Sample(images, prompt, f"<script>{i}</script>", float(i), 0.5 if i else None) for i in range(3)]
    text = html_page(samples, 7)
    page = Whole(text)
    assert len(page.loaded) == 1 and text.count("user: What?") == 1 and "<script>" not in text
    words = " ".join(page.text)
    assert "reward 2.000, KL 0.500 nats" in words and "reward 0.000 " in words + " "


def test_what_data_answer():
    row = {"prompt": [{"role": "user", "content": "Q"}], "responses": ["b", "a", "c"], "ranks": [1.0, 0.0, 2.0]}
    assert asked_and_told(row)[1] == [("rank 0", "a"), ("rank 1", "b"), ("rank 2", "c")]
    row = {"prompt": row["prompt"], "responses": ["b", "a"], "ranks": [1.0, 0.0]}
    assert asked_and_told(row)[1] == [("chosen", "a"), ("rejected", "b")]
    turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")]
    prompt, told = asked_and_told({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert [m["content"] for m in prompt] == ["Q", "A", "R"] and told == [("in the data", "B")]


# -- trackers and the terminal -----------------------------------------------------------------------------------------------


class FakeTracker:
    """What wandb and trackio have in common, and TensorBoard's writer."""

    run = object()

    def __init__(self):
        self.logged, self.texts, self.pictures = [], [], []

    def Image(self, picture):  # their name
        return picture.size

    def Table(self, columns, data):  # their name
        assert all(len(row) == len(columns) for row in data)
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log(self, values):
        self.logged.append(values)

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))

    def add_image(self, tag, picture, step, dataformats):
        self.pictures.append((tag, picture.shape, step, dataformats))


def callback_of(kind: type, name: str, tracker: FakeTracker) -> TrainerCallback:
    callback = object.__new__(kind)  # its own __init__ wants the package
    setattr(callback, name, tracker)
    return callback


@pytest.mark.parametrize(("kind", "name"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_trackers_get_samples_with_pictures(image_dir: Path, tmp_path: Path, kind: type, name: str):
    tracker = FakeTracker()
    prompt = [{"role": "user", "content": "What?"}]
    samples = [Sample([str(image_dir / "0.png")], prompt, "A | B", 0.5, None)]
    write_samples(samples, tmp_path, 3, [callback_of(kind, name, tracker)])
    size = Image.open(image_dir / "0.png").size
    row = {"pictures": [size], "prompt": "user: What?", "response": "A | B", "reward": 0.5, "KL": None}
    assert tracker.logged == [{"samples": [row], "train/global_step": 3}]


def test_tensorboard_gets_every_picture_once(command, tmp_path: Path, monkeypatch):
    tracker = FakeTracker()
    monkeypatch.setattr(
        answer_samples,
        "report_table",
        lambda *table: report_table(*table[:3], [callback_of(TensorBoardCallback, "tb_writer", tracker)]),
    )
    SCRIPT["dpo"].main(command("dpo", "--use_lora True --lora_r 4 --num_sample_generations 1"))
    (tag, first, _), (_, second, step) = tracker.texts
    assert (tag, step) == ("samples", 2) and first.splitlines()[0] == "| prompt | whose | answer |"
    whose = [line.split(" | ")[1] for line in second.splitlines()[2:]]
    assert whose[:4] == ["chosen", "rejected", "before training", "at step 2"]
    rows = len(whose) // 4
    assert len(tracker.pictures) == 2 * rows  # though each stands beside four answers
    tag, shape, _, order = tracker.pictures[0]
    assert tag == "samples/picture 0" and shape[2] == 3 and order == "HWC"


def test_a_line_of_the_log_by_hand():
    logs = {"epoch": 0.5, "mine": 7, "grad_norm": 2.0, "loss": 0.69314, "learning_rate": 5e-5, "total_flos": 1.0}
    first, second = log_line(logs, 8, 120), log_line(logs | {"loss": 12345.6, "grad_norm": 0.03}, 10, 120)
    assert first == "step       8/120  loss 0.6931     learning_rate 5e-05      grad_norm 2          mine 7"
    assert [first.index(name) for name in ("grad_norm", "mine")] == [second.index(n) for n in ("grad_norm", "mine")]
    held_out = log_line({"eval_loss": float("nan"), "eval_runtime": 2.0, "epoch": 1.0}, 10, 120)
    assert held_out == "held out  10/120  loss nan"
    assert (
        log_line({"train_runtime": 61.4, "train_loss": 0.5, "epoch": 1.0}, 120, 120)
        == "120 steps in 61 s, mean loss 0.5"
    )
    many = log_line({f"m{i}": 1.0 for i in range(30)} | {"loss": 1.0}, 1, 2)
    assert many.count("  m") == 7 and "  loss 1" in many


@pytest.mark.parametrize("bars", [True, False])
def test_a_run_prints_one_line_per_log(command, capsys, bars: bool):
    argv = command("sft", "--use_lora True --lora_r 4 --eval_ratio 0.25")
    argv[argv.index("--disable_tqdm") + 1] = str(not bars)
    SCRIPT["sft"].main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith(("step ", "held out"))]
    assert [line[:12] for line in lines] == ["step     1/2", "step     2/2", "held out 2/2"] and "{'" not in out
    assert all("loss 6." in line or "loss 5." in line for line in lines)
    assert ("2/2 [" in err) == bars
