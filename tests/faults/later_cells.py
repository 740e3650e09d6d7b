"""Cells of a second look, faults that none of the others has: things beside a run that change or break while it runs or between two runs."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge_lora
import train_dpo
import train_ppo
from base import run_page
from base.ppo_trainer import VLPPOTrainer
from base.trainer import VLDPOTrainer
from data.convert import Reader
from eval import generate
from tests import zoo
from tests.faults.bed import (
    CACHE,
    LORA,
    SAVE,
    Bed,
    adapter_of,
    assert_equal,
    cell,
    damage,
    full_disk,
    generate_argv,
    questions,
    rows_of,
)
from tests.faults.odd_cells import RESUME, go_on, started, train_while
from tests.processes import ROOT, Run

QUICK = (  # in `make test`; the others are slow
    "--overwrite_output_dir in a folder that is of no run",
    "the picture of the curves: matplotlib fails",
    "no memory is left",
    "checksums.json is numbers",
    "fewer steps than were done",
)

# -- load --------------------------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: object) -> None:
    """Change adapter_config.json by hand."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


EDITS: dict[str, dict[str, object]] = {
    "another rank": {"r": 8},
    "another kind of adapter": {"peft_type": "LOHA"},
    "an unknown kind of adapter": {"peft_type": "NONE"},
    "fewer modules": {"target_modules": ["q_proj"]},
    "no module": {"target_modules": []},
    "a base that is null": {"base_model_name_or_path": None},
    "the rank as a text": {"r": "4"},
}
for what, changes in EDITS.items():

    @cell("load (dpo)", f"adapter_config.json edited by hand: {what}")
    def _(bed: Bed, changes: dict[str, object] = changes) -> None:
        adapter = adapter_of(bed)
        edited(adapter, **changes)
        bed.refused(lambda: bed.train("dpo", LORA, model=adapter), str(adapter), untouched=adapter)


for moment in ("load (dpo)", "generate"):

    @cell(moment, "the base below an adapter was trained on in place")
    def _(bed: Bed, moment: str = moment) -> None:
        base = bed.copy(zoo.checkpoint("llava"), "base")
        bed.train("dpo", f"{LORA} --max_steps 1", model=base, out=bed.tmp / "adapter")
        other = {n: t + 0.01 for n, t in load_file(base / "model.safetensors").items()}
        save_file(other, base / "model.safetensors", {"format": "pt"})
        if moment == "generate":
            argv = generate_argv(bed, questions(bed), bed.tmp / "adapter")
            bed.refused(lambda: generate.main(argv), str(base))
        else:
            bed.refused(lambda: bed.train("dpo", LORA, model=bed.tmp / "adapter"), str(base))


for how in ("named like it", "loop", "empty", "too long"):

    @cell("save", f"--output_dir is odd: {how}")
    def _(bed: Bed, how: str = how) -> None:
        out = {
            "named like it": bed.tmp / "a",
            "loop": bed.tmp / "loop",
            "empty": "",
            "too long": bed.tmp / ("x" * 300),
        }[how]
        (bed.tmp / "loop").symlink_to(bed.tmp / "loop")
        if how == "named like it":
            (bed.tmp / "a").symlink_to("b")
            (bed.tmp / "b").write_text("")
        argv = bed.argv("dpo", LORA)
        argv[argv.index("--output_dir") + 1] = str(out)
        bed.refused(lambda: train_dpo.main(argv), "--output_dir")


@cell("save", "--overwrite_output_dir in a folder that is of no run", "recovered")
def _(bed: Bed) -> None:
    (bed.out / "samples").mkdir(parents=True)
    mine = [bed.out / "vocab.txt", bed.out / "tokenizer_notes", bed.out / "samples" / "photo.txt"]
    for file in mine:
        file.write_text("mine")
    bed.train("dpo", f"{LORA} --max_steps 1 --overwrite_output_dir True")
    assert [file.read_text() for file in mine] == ["mine"] * 3


@cell("save", "a README.md of somebody else")
def _(bed: Bed) -> None:
    bed.out.mkdir()
    (bed.out / "README.md").write_text("mine")
    for flags in ("", "--overwrite_output_dir True"):
        bed.refused(lambda flags=flags: bed.train("dpo", f"{LORA} {flags}"), "README.md", untouched=bed.out)


# -- step --------------------------------------------------------------------------------------------------------------------

PAGE_TROUBLE = {
    "full disk": None,
    "matplotlib is broken": ImportError("libfreetype.so.6: cannot open shared object file"),
    "matplotlib fails": ValueError("Image size of 131072x65536 pixels is too large"),
    "no memory": MemoryError(),
}
for what, error in PAGE_TROUBLE.items():

    @cell("step", f"the picture of the curves: {what}", "recovered")
    def _(bed: Bed, error: Exception | None = error) -> None:
        bed.train("dpo", f"{LORA} --max_steps 6", out=bed.tmp / "before")
        draw = run_page.draw_png

        def broken(found, path) -> None:
            if error:
                raise error
            with full_disk(2_000):
                draw(found, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_page, "draw_png", broken)
            patch.setattr(run_page, "EVERY_PNG", 0.0)
            bed.train("dpo", f"{LORA} --max_steps 6")
        assert_equal(bed.tmp / "before", bed.out)
        assert not (bed.out / "curves.png").exists() and not [*bed.out.glob(".curves*")]


for what in ("reader has gone", "disk is full"):

    @cell("step", f"the log's {what}", "recovered")
    def _(bed: Bed, what: str = what) -> None:
        """`| head`, a `tee` that died, or a file on a full disk."""
        flags = f"{LORA} --max_steps 3"
        bed.train("sft", flags, out=bed.tmp / "before")
        argv = [sys.executable, "train_sft.py", *bed.argv("sft", flags)]
        with open("/dev/full" if "full" in what else "/dev/null", "w") as log:
            process = subprocess.Popen(
                argv, stdout=log if "full" in what else subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
            if process.stdout:
                process.stdout.close()
            said = process.stderr.read()
        assert process.wait() == 0 and "stdout cannot be written" in said, said[-2000:]
        assert_equal(bed.tmp / "before", bed.out)


@cell("step", "the terminal is closed (SIGHUP)", "recovered")
def _(bed: Bed) -> None:
    run = Run("dpo", bed.argv("dpo", f"{LORA} --max_steps 5000"), bed.tmp / "log", pause=0.1)
    assert run.until(lambda: run.steps >= 2)
    run.signal(signal.SIGHUP)
    assert run.wait() == 75 and "Stopped by SIGHUP" in run.output, run.output[-2000:]
    assert [*bed.out.glob("checkpoint-*")]


@cell("step", "no memory is left")
def _(bed: Bed) -> None:
    def no_memory(self, *args, **kwargs):
        return torch.empty(1 << 60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLDPOTrainer, "compute_loss", no_memory)
        bed.refused(lambda: bed.train("dpo", LORA), "Memory ran out in step 1", "row", "faq.md")


@cell("step", "the reward model says NaN")
def _(bed: Bed) -> None:
    bed.train("rm", f"{LORA} --max_steps 1", out=bed.tmp / "rm")
    argv = bed.argv("ppo", f"{LORA} --reward_adapter {bed.tmp / 'rm'}")
    i = argv.index("--reward_fn")
    del argv[i : i + 2]
    plain = VLPPOTrainer._adapter_pass

    def nan(self, r, role):
        found = plain(self, r, role)
        found[1] = float("nan")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLPPOTrainer, "_adapter_pass", nan)
        bed.refused(lambda: train_ppo.main(argv), "row", "rm")
    assert not [*bed.out.glob("*.safetensors")]


@cell("step", "the value head becomes infinite")
def _(bed: Bed) -> None:
    update = VLPPOTrainer.update

    def then_break(self, *args, **kwargs):
        update(self, *args, **kwargs)
        if self.state.global_step == 1:
            head = next(
                p for n, p in self.model.named_parameters() if "head" in n and p.requires_grad and "lm_head" not in n
            )
            with torch.no_grad():
                head.view(-1)[0] = float("inf")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLPPOTrainer, "update", then_break)
        bed.refused(lambda: bed.train("ppo", f"{LORA} {SAVE} --max_steps 4"), "finite", "checkpoint-1")
    assert not (bed.out / "checkpoint-2").exists()


@cell("step", "the folder's disk has vanished")
def _(bed: Bed) -> None:
    def vanish() -> None:
        bed.out.rename(bed.tmp / "elsewhere")
        bed.out.write_text("")

    bed.refused(
        lambda: train_while(bed, "dpo", f"{LORA} {SAVE} --max_steps 4", 3, vanish), str(bed.out), "could not be written"
    )
    assert (bed.tmp / "elsewhere" / "checkpoint-2").is_dir()


# -- evaluation --------------------------------------------------------------------------------------------------------------


for how in ("missing", "cut"):

    @cell("evaluation", f"the best checkpoint at the end: adapter_model.safetensors {how}")
    def _(bed: Bed, how: str = how) -> None:
        flags = f"{LORA} {SAVE} --max_steps 4 --eval_strategy steps --eval_steps 1 --eval_ratio 0.25 --load_best_model_at_end True"

        def break_all() -> None:
            for checkpoint in bed.out.glob("checkpoint-*"):
                damage(checkpoint / "adapter_model.safetensors", how)

        flags += " --metric_for_best_model loss"
        bed.refused(lambda: train_while(bed, "dpo", flags, 4, break_all), "the best checkpoint", "checkpoint-")


# -- resume ------------------------------------------------------------------------------------------------------------------

STATES = {"null": "null", "a list": "[]", "no step": "{}", "a text for the step": '{"global_step": "x"}'}
for what, text in STATES.items():

    @cell("resume", f"trainer_state.json of the newest checkpoint is {what}, without checksums", "recovered")
    def _(bed: Bed, text: str = text) -> None:
        started(bed)
        (bed.out / "checkpoint-2" / "checksums.json").unlink()
        (bed.out / "checkpoint-2" / "trainer_state.json").write_text(text)
        go_on(bed)
        assert "checkpoint-2 is passed over" in bed.said()
        assert_equal(bed.tmp / "whole", bed.out)


SUMS = {
    "null": "null",
    "numbers": '{"files": {"optimizer.pt": 3}}',
    "a list": '{"files": []}',
    "a text": '{"files": "x"}',
}
for what, text in SUMS.items():

    @cell("resume", f"checksums.json is {what}", "recovered")
    def _(bed: Bed, text: str = text) -> None:
        started(bed)
        (bed.out / "checkpoint-2" / "checksums.json").write_text(text)
        go_on(bed)
        assert "checkpoint-2 is passed over" in bed.said()
        assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "the newest checkpoint is a file", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    shutil.rmtree(bed.out / "checkpoint-2")
    (bed.out / "checkpoint-2").write_text("mine")
    go_on(bed)
    assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "run.json of the folder is a folder")
def _(bed: Bed) -> None:
    started(bed)
    (bed.out / "run.json").unlink()
    (bed.out / "run.json").mkdir()
    bed.refused(lambda: go_on(bed), r"run\.json")


@cell("resume", "names in another case lie beside", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    shutil.copytree(bed.out / "checkpoint-1", bed.out / "Checkpoint-7")
    shutil.copytree(bed.out / "checkpoint-1", bed.out / "checkpoint-07x")
    go_on(bed)
    assert_equal(bed.tmp / "whole", bed.out)
    assert (bed.out / "Checkpoint-7").is_dir()


@cell("resume", "files of an unfinished rsync lie in the checkpoint", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    newest = bed.out / "checkpoint-2"
    (newest / ".optimizer.pt.k3XyzQ").write_bytes(b"\0" * 100)
    (newest / ".adapter_model.safetensors.Ab12Cd").write_bytes(b"\0" * 100)
    go_on(bed)
    assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "half of a file is zeros, at its full size", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    file = bed.out / "checkpoint-2" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2))
    go_on(bed)
    assert "checkpoint-2 is passed over" in bed.said()
    assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "another version of torch", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    for folder in (bed.out, *bed.out.glob("checkpoint-*")):
        run = json.loads((folder / "run.json").read_text())
        run["versions"]["torch"] = "1.0.0"
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "checksums.json").unlink(missing_ok=True)
    bed.said()
    go_on(bed)
    assert "(was 1.0.0)" in bed.said()
    assert json.loads((bed.out / "run.json").read_text())["history"][-1]["changed"]["torch"][0] == "1.0.0"


@cell("resume", "the reward function was edited", "recovered")
def _(bed: Bed) -> None:
    started(bed, "ppo")
    file = Path(bed.rewards.partition(":")[0])
    file.write_text(file.read_text().replace("float(len(r))", "-float(len(r))"))
    bed.said()
    go_on(bed, "ppo")
    assert "others than when it was written: --reward_fn rewards.py" in bed.said()


@cell("resume", "the reward adapter was trained on", "recovered")
def _(bed: Bed) -> None:
    bed.train("rm", f"{LORA} --max_steps 1", out=bed.tmp / "rm")
    argv = bed.argv("ppo", f"{LORA} {SAVE} --max_steps 1 --reward_adapter {bed.tmp / 'rm'}")
    i = argv.index("--reward_fn")
    del argv[i : i + 2]
    train_ppo.main(argv)
    for name in ("adapter_model.safetensors", "reward_head.safetensors"):
        file = bed.tmp / "rm" / name
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        save_file({n: t + 0.1 for n, t in load_file(file).items()}, file, about)
    argv[len(argv) - 1 - argv[::-1].index("--max_steps") + 1] = "2"
    bed.said()
    train_ppo.main([*argv, *RESUME.split()])
    assert "others than when it was written: --reward_adapter rm" in bed.said()


@cell("resume", "the chat template of the base was edited", "recovered")
def _(bed: Bed) -> None:
    model = bed.copy(zoo.checkpoint("llava"), "model")
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 1", model=model)
    file = model / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    bed.said()
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 2 {RESUME}", model=model)
    assert "others than when it was written: chat_template.jinja" in bed.said()


@cell("resume", "fewer steps than were done")
def _(bed: Bed) -> None:
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 3")
    bed.refused(lambda: bed.train("dpo", f"{LORA} {SAVE} --max_steps 2 {RESUME}"), "max_steps")


@cell("resume", "labels of KTO's rows changed")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    rows = [
        {"images": [row["image"]], "prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(json.loads(data.read_text()))
    ]
    file = bed.tmp / "rows.jsonl"
    flags = f"{LORA} {SAVE} --loss_type kto --dataset_name {file} --image_root {images}"

    def train(steps: str) -> None:
        argv = bed.argv("dpo", f"{flags} {steps}")
        at = argv.index("--data_path")
        del argv[at - 2 : at + 2]
        train_dpo.main(argv)

    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("--max_steps 1")
    file.write_text("".join(json.dumps(row | {"label": not row["label"]}) + "\n" for row in rows))
    bed.refused(lambda: train(f"--max_steps 2 {RESUME}"), "rows are not those", untouched=bed.out)


@cell("resume", "streamed rows changed, in a file of the same size")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    flags = f"{LORA} {SAVE} --streaming True"
    bed.train("dpo", f"{flags} --max_steps 1", data_path=data, image_root=images)
    rows = json.loads(data.read_text())
    data.write_text(json.dumps([row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]))
    again = f"{flags} --max_steps 2 {RESUME}"
    bed.refused(
        lambda: bed.train("dpo", again, data_path=data, image_root=images), "rows are not those", untouched=bed.out
    )


@cell("resume", "a run that was killed while its rows were read", "recovered")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    bed.train("dpo", f"{LORA} --max_steps 1", data_path=data, image_root=images, out=bed.tmp / "before")
    data.write_text(data.read_text() + "\n")  # what is cached is of the other file
    row, seen = Reader.row, []

    def then_stop(self: Reader, *args: object) -> object:
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return row(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "row", then_stop)
        with pytest.raises(KeyboardInterrupt):
            bed.train("dpo", f"{LORA} --max_steps 1", data_path=data, image_root=images)
    bed.train("dpo", f"{LORA} --max_steps 1", data_path=data, image_root=images)
    assert_equal(bed.tmp / "before", bed.out)


@cell("resume", "the base that --merge_first wrote is cut")
def _(bed: Bed) -> None:
    adapter = adapter_of(bed, "sft")
    flags = f"{LORA} {SAVE} --merge_first True"
    bed.train("dpo", f"{flags} --max_steps 1", model=adapter)
    file = bed.out / "merged_base" / "model.safetensors"
    damage(file, "cut")
    bed.refused(lambda: bed.train("dpo", f"{flags} --max_steps 2 {RESUME}", model=adapter), "merged_base")


@cell("resume", ".incomplete is a link")
def _(bed: Bed) -> None:
    started(bed)
    (bed.tmp / "precious").mkdir()
    (bed.out / ".incomplete").symlink_to(bed.tmp / "precious")
    bed.refused(lambda: go_on(bed), r"\.incomplete", untouched=bed.out)
    assert (bed.out / ".incomplete").is_symlink() and (bed.tmp / "precious").is_dir()


@cell("resume", "twice at once")
def _(bed: Bed) -> None:
    again = bed.argv("dpo", f"{LORA} {SAVE} --max_steps 5000 {RESUME}")
    first = Run("dpo", again, bed.tmp / "log", pause=0.2)
    try:
        assert first.until(lambda: first.steps >= 1), first.output[-2000:]
        second = Run("dpo", again, bed.tmp / "log2")
        assert second.wait() == 2 and "in use by another run" in second.output, second.output[-2000:]
    finally:
        first.process.kill()
        first.wait()


@cell("merge", "into the folder of the adapter, or of the base")
def _(bed: Bed) -> None:
    adapter, base = adapter_of(bed), bed.copy(zoo.checkpoint("llava"), "base")
    for out in (adapter, base):
        bed.refused(lambda out=out: merge_lora.main([str(base), str(adapter), str(out)]), str(out), untouched=out)


@cell("reference pass", "a cache that is a file of another program", "recovered")
def _(bed: Bed) -> None:
    flags = f"{CACHE} --ref_log_probs_dir {bed.tmp / 'cache'}"
    bed.train("dpo", flags, out=bed.tmp / "before")
    for file in (bed.tmp / "cache").rglob("*.safetensors"):
        save_file({"x": torch.zeros(3)}, file)
    bed.train("dpo", flags)
    assert_equal(bed.tmp / "before", bed.out)


@cell("reference pass", "two runs fill one cache at once", "recovered")
def _(bed: Bed) -> None:
    flags = f"{CACHE} --max_steps 1 --ref_log_probs_dir {bed.tmp / 'cache'}"
    runs = [Run("dpo", bed.argv("dpo", flags, out=bed.tmp / f"out{n}"), bed.tmp / f"log{n}") for n in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].output[-1000:] + runs[1].output[-1000:]
    assert_equal(bed.tmp / "out0", bed.tmp / "out1")


@cell("reading", "full disk for the cached rows")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    data.write_text(data.read_text() + "\n")
    load = train_dpo.load_train_eval

    def on_a_full_disk(*args: object) -> object:
        with full_disk(100):
            return load(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "load_train_eval", on_a_full_disk)
        bed.refused(
            lambda: bed.train("dpo", LORA, data_path=data, image_root=images), "could not be written|[Ff]ile too large"
        )


@cell("step", "the file that is streamed is deleted")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    flags = f"{LORA} {SAVE} --streaming True --max_steps 9"
    bed.refused(
        lambda: train_while(bed, "dpo", flags, 2, data.unlink, data_path=data, image_root=images), r"pairs\.json"
    )


@cell("generate", "twice at once into one file")
def _(bed: Bed) -> None:
    file = questions(bed)
    argv = [sys.executable, "-m", "eval.generate", *generate_argv(bed, file)]
    both = [
        subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 0], [0, 2]), said
    lines = [*map(json.loads, (bed.tmp / "answers.jsonl").read_text().splitlines())]
    assert len(lines) == 4 and all(isinstance(line, dict) for line in lines)
