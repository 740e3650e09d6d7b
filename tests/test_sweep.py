"""benchmarks.sweep: the grid, resuming, and means over seeds by hand."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

import train_dpo
from benchmarks import sweep
from common.errors import InputError


def job(output: Path = Path("runs"), **values: str) -> sweep.Job:
    return sweep.jobs_of("train_dpo.py", {k: [v] for k, v in values.items()}, output, [])[0]


def test_the_grid():
    grid = sweep.read_grid(["beta=.05,.1", "loss_type=sigmoid+sft,ipo", "seed=0,1"])
    jobs = sweep.jobs_of("train_dpo.py", grid, Path("runs"), ["--use_lora", "True"])
    assert len(jobs) == 8
    assert jobs[1].folder == Path("runs/beta=.05,loss_type=sigmoid+sft,seed=1")
    assert jobs[1].setting == (("beta", ".05"), ("loss_type", "sigmoid+sft"))
    words = "--use_lora True --beta .05 --loss_type sigmoid sft --seed 1 --output_dir".split()
    assert jobs[1].command[2:-1] == words and Path(jobs[1].command[1]).name == "train_dpo.py"
    assert job(learning_rate="1e+5").command[3] == "1e+5"


def test_flags_that_change_together():
    grid = sweep.read_grid(["lora_r:lora_alpha=4:8,32:64", "beta=.1,.5"])
    jobs = sweep.jobs_of("train_dpo.py", grid, Path("runs"), [])
    assert [job.setting for job in jobs] == [
        (("lora_r", r), ("lora_alpha", a), ("beta", b)) for r, a in (("4", "8"), ("32", "64")) for b in (".1", ".5")
    ]
    assert jobs[3].command[2:8] == "--lora_r 32 --lora_alpha 64 --beta .5".split()
    settings = [job.setting for job in jobs]
    assert sweep.tied(settings, "lora_r") == {"lora_r", "lora_alpha"} and sweep.tied(settings, "beta") == {"beta"}
    assert sweep.tied(settings[::2], "lora_r") == {"lora_r", "lora_alpha"}  # a flag that never changes is a line's


@pytest.mark.parametrize(
    ("grid", "flags"),
    [
        (["beta"], ""),
        (["beta=.1", "beta=.2"], ""),
        (["beta=.1,.1"], ""),
        (["lora_r=4", "lora_r:lora_alpha=4:8"], ""),
        (["lora_r:lora_alpha=4:8,32"], ""),
        (["lora_r:lora_alpha=4:8"], "--lora_alpha 8"),
        (["beta=.1"], "--beta .2"),
        (["beta=.1"], "--beta=.2"),
        (["learning_rate=1"], "--learning-rate 2"),
        (["beta=.1"], "--output_dir x"),
    ],
)
def test_a_grid_that_contradicts(grid: list[str], flags: str):
    with pytest.raises(InputError):
        sweep.jobs_of("train_dpo.py", sweep.read_grid(grid), Path("runs"), flags.split())


def test_means_and_deviations_by_hand():
    """Of 1, 2, 6: mean 3, deviation √((4 + 1 + 9) / 2) = √7."""
    jobs = [job(beta=b, seed=s) for b in (".1", ".5") for s in "012"]
    values = [1.0, 2.0, 6.0, 5.0, 5.0, 5.0]
    means = sweep.averaged(jobs, [{"eval_loss": v} for v in values])
    assert means[("beta", ".1"),]["eval_loss"] == (3.0, pytest.approx(7**0.5), 3)
    assert means[("beta", ".5"),]["eval_loss"] == (5.0, 0.0, 3)
    markdown, latex = sweep.tables(means, ["eval_loss"])
    assert "| beta | eval_loss | runs |" in markdown and "| .1 | 3 ± 2.6 | 3 |" in markdown
    assert r".1 & 3 $\pm$ 2.6 & 3 \\" in latex and r"eval\_loss" in latex and r"\begin{tabular}{lrr}" in latex


def test_a_single_run_has_no_deviation_and_a_missing_metric_a_dash():
    jobs = [job(beta=".1"), job(beta=".5")]
    means = sweep.averaged(jobs, [{"a": 1.0}, {"b": 2.0}])
    markdown, _ = sweep.tables(means, ["a", "b"])
    assert "| .1 | 1 | - | 1 |" in markdown and "| .5 | - | 2 | 1 |" in markdown


def test_plots_show_means_at_their_flags(tmp_path: Path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, spread, label, **_: drawn.append((x, y, spread, label)))
    jobs = [job(beta=b, loss_type=k, seed=s) for b in (".5", ".05") for k in ("ipo", "sigmoid") for s in "01"]
    numbers = [{"m": float(i)} for i in range(8)]
    sweep.report(jobs, numbers, [], tmp_path)
    assert drawn[0] == ([0.05, 0.5], [4.5, 0.5], [pytest.approx(0.5**0.5)] * 2, "loss_type ipo")
    assert drawn[1][:2] == ([0.05, 0.5], [6.5, 2.5]) and drawn[1][3] == "loss_type sigmoid" and len(drawn) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "table.md", "table.tex", "beta.png"}
    with pytest.raises(InputError, match="--metrics n: no run has it; they have m"):
        sweep.report(jobs, numbers, ["n"], tmp_path)


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Runs happen in this process; the commands that were started. beta 9 fails."""
    commands: list[list[str]] = []

    def call(command: list[str], log: str, environment: dict[str, str]) -> int:
        commands.append(command[2:])
        if "9" in command:
            return 1
        before, sys.argv = sys.argv, command[1:]
        try:
            train_dpo.main(command[2:])
        finally:
            sys.argv = before
        return 0

    monkeypatch.setattr(sweep, "call", call)
    return commands


def test_a_sweep_goes_on_where_it_was_stopped(command, started, tmp_path: Path):
    flags = command("dpo", "--use_lora True --lora_r 4 --eval_ratio 0.25")
    flags = [
        w
        for i, w in enumerate(flags)
        if "--output_dir" not in flags[max(i - 1, 0) : i + 1] and "--seed" not in flags[max(i - 1, 0) : i + 1]
    ]
    out = tmp_path / "sweep"
    argv = [
        "train_dpo.py",
        "--grid",
        "beta=.1,9",
        "seed=0,1",
        "--output",
        str(out),
        "--metrics",
        "eval_loss",
        "--",
        *flags,
    ]
    assert sweep.main(argv) == 1  # beta 9 failed, the others count
    assert (
        len(started) == 4
        and "| .1 | " in (out / "table.md").read_text()
        and "| 9 |" not in (out / "table.md").read_text()
    )
    found = json.loads((out / "results.json").read_text())
    assert [(r["beta"], r["seed"]) for r in found] == [(".1", "0"), (".1", "1")]
    states = [json.loads((Path(r["folder"]) / "trainer_state.json").read_text()) for r in found]
    losses = [next(e["eval_loss"] for e in s["log_history"] if "eval_loss" in e) for s in states]
    assert [r["eval_loss"] for r in found] == losses

    argv[2] = "beta=.1"
    assert sweep.main(argv) == 0 and len(started) == 4  # nothing was started
    with pytest.raises(InputError, match="holds a run of another command"):
        sweep.main([*argv, "--max_length", "99"])
    (out / "beta=.1,seed=0" / "trainer_state.json").unlink()
    (out / "beta=.1,seed=0" / "checkpoint-1").mkdir()
    (out / "beta=.1,seed=0" / "run.json").unlink()
    started.clear()
    with pytest.raises(InputError):  # an empty checkpoint: it was asked to go on from it
        sweep.main(argv)
    assert started[0][-2:] == sweep.RESUME


def test_one_run_per_gpu_and_ctrl_c_starts_no_other(tmp_path: Path, monkeypatch):
    jobs = [job(tmp_path, seed=str(i)) for i in range(6)]
    gpus: list[str] = []
    monkeypatch.setattr(
        sweep, "call", lambda command, log, environment: gpus.append(environment["CUDA_VISIBLE_DEVICES"]) or 0
    )
    assert sweep.train(jobs, ["0", "1"]) == [] and len(gpus) == 6 and set(gpus) <= {"0", "1"}

    def interrupted(command: list[str], log: str, environment: dict[str, str]) -> int:
        gpus.append("")
        os.kill(os.getpid(), signal.SIGINT)
        return 130

    gpus.clear()
    monkeypatch.setattr(sweep, "call", interrupted)
    with pytest.raises(SystemExit) as end:
        sweep.train(jobs, [])
    assert end.value.code == 130 and len(gpus) == 1


def test_what_a_run_prints_goes_to_its_log(tmp_path: Path):
    log = tmp_path / "run.log"
    for text, code in (("one", 0), ("two", 3)):
        command = [sys.executable, "-c", f"import sys; print('{text}'); sys.exit({code})"]
        assert sweep.call(command, str(log), dict(os.environ)) == code
    assert log.read_text() == "one\ntwo\n"


def test_numbers_of_a_command_of_ones_own(tmp_path: Path, capsys):
    """It runs once for each run, with the run's folder in the place of RUN, and again after another training."""
    jobs = [job(tmp_path, beta=b) for b in (".1", ".5")]
    for one in jobs:
        one.folder.mkdir()
        (one.folder / "trainer_state.json").write_text("{}")
    (tmp_path / "my_eval.py").write_text(
        "import json, sys\n"
        "beta = float(sys.argv[1].split('=')[-1])\n"
        "open(sys.argv[1] + '/scores.json', 'w').write(json.dumps({'model': 'm', 'twice': 2 * beta, 'fine': True}))\n"
    )
    command = f"python {tmp_path}/my_eval.py RUN"
    assert sweep.command_numbers(jobs, command) == [{"twice": 0.2}, {"twice": 1.0}]
    assert capsys.readouterr().out.count("evaluating") == 2
    os.utime(jobs[1].folder / "scores.json", (0, 0))
    sweep.command_numbers(jobs, command)
    assert capsys.readouterr().out == f"{jobs[1].folder}: evaluating\n"
    os.utime(jobs[0].folder / "scores.json", (0, 0))
    with pytest.raises(InputError, match=r"--evaluate ended with exit status 3, see .*beta=\.1\.log"):
        sweep.command_numbers(jobs, "python -c 'raise SystemExit(3)'")
    (jobs[0].folder / "scores.json").unlink()
    with pytest.raises(InputError, match=r"has not written .*beta=\.1/scores\.json"):
        sweep.command_numbers(jobs, "true")


def test_flags_of_the_training_in_the_wrong_place():
    with pytest.raises(InputError, match="stand at the end, behind --"):
        sweep.main("train_dpo.py --grid beta=.1 --output runs/x --use_lora True".split())
