"""Cells of the table that nobody plans for: links, clocks, copies by hand, reward functions that meddle, folders where files belong."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from base.checkpoints import Preemption
from eval import generate
from tests import zoo
from tests.faults.bed import (
    LORA,
    SAVE,
    Bed,
    adapter_of,
    assert_equal,
    cell,
    damage,
    generate_argv,
    questions,
    rows_of,
)
from tests.processes import Run

RESUME = "--resume_from_checkpoint True"


def train_while(bed: Bed, script: str, flags: str, step: int, do, **kwargs: object) -> None:
    """Train, and call `do` when a step begins."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == step:
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preemption, "on_step_begin", on_step_begin)
        bed.train(script, flags, **kwargs)


# -- load --------------------------------------------------------------------------------------------------------------------


def sharded(bed: Bed) -> Path:
    """The base in two files and their index."""
    model = bed.copy(zoo.checkpoint("llava"), "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, inside in parts.items():
        save_file({n: tensors[n] for n in inside}, model / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, inside in parts.items() for n in inside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


for name in ("model.safetensors.index.json", "model-00002-of-00002.safetensors"):
    for how in ("missing", "empty", "cut", "a folder"):

        @cell("load (dpo)", f"{name} {how}")
        def _(bed: Bed, name: str = name, how: str = how) -> None:
            model = sharded(bed)
            damage(model / name, how)
            bed.refused(lambda: bed.train("dpo", LORA, model=model), str(model), untouched=model)


for name in ("tokenizer_config.json", "generation_config.json"):
    for how in ("empty", "cut"):

        @cell("load (sft)", f"{name} {how}")
        def _(bed: Bed, name: str = name, how: str = how) -> None:
            model = bed.copy(zoo.checkpoint("llava"), "model")
            damage(model / name, how)
            bed.refused(lambda: bed.train("sft", LORA, model=model), name, untouched=model)


@cell("load (dpo)", "chat_template.jinja empty")
def _(bed: Bed) -> None:
    model = bed.copy(zoo.checkpoint("llava"), "model")
    damage(model / "chat_template.jinja", "empty")
    bed.refused(lambda: bed.train("dpo", LORA, model=model), str(model))


@cell("load (dpo)", "a weight is missing")
def _(bed: Bed) -> None:
    model = bed.copy(zoo.checkpoint("llava"), "model")
    tensors = load_file(model / "model.safetensors")
    gone = next(n for n in tensors if "down_proj" in n)
    del tensors[gone]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    bed.refused(lambda: bed.train("dpo", LORA, model=model), "missing keys .*down_proj")


@cell("load (dpo)", "config.json says another width")
def _(bed: Bed) -> None:
    model = bed.copy(zoo.checkpoint("llava"), "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 2
    (model / "config.json").write_text(json.dumps(config))
    bed.refused(lambda: bed.train("dpo", LORA, model=model), str(model))


@cell("load (dpo)", "a weight of the adapter is missing")
def _(bed: Bed) -> None:
    adapter = adapter_of(bed)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(iter(tensors))]
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    bed.refused(lambda: bed.train("dpo", LORA, model=adapter), "is not in the folder")


@cell("load (dpo)", "the adapter's base has moved")
def _(bed: Bed) -> None:
    adapter = adapter_of(bed)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    bed.refused(lambda: bed.train("dpo", LORA, model=adapter), "/nowhere/base", "base_model_name_or_path")


for how in ("missing", "empty", "cut", "a folder"):

    @cell("load (dpo)", f"DeepSpeed's configuration {how}")
    def _(bed: Bed, how: str = how) -> None:
        file = bed.tmp / "zero.json"
        shutil.copy("ds_configs/zero2.json", file)
        damage(file, how)
        bed.refused(lambda: bed.train("dpo", f"{LORA} --deepspeed {file}"), r"zero\.json")


# -- reading -----------------------------------------------------------------------------------------------------------------

for form in ("data", "ids"):

    @cell("reading", f"a JSON key twice in a row of an object ({form})")
    def _(bed: Bed, form: str = form) -> None:
        data, _ = rows_of(bed)
        rows = json.loads(data.read_text())
        text = json.dumps({"data": rows} if form == "data" else {f"a{i}": row for i, row in enumerate(rows)})
        data.write_text(text.replace('"chosen"', '"chosen": "x", "chosen"', 1))
        bed.refused(lambda: bed.train("dpo", LORA, data_path=data), str(data), "row 0", "the key 'chosen' twice")


@cell("reading", "a JSON key twice around the rows")
def _(bed: Bed) -> None:
    data, _ = rows_of(bed)
    data.write_text(f'{{"data": {data.read_text()}, "data": []}}')
    bed.refused(lambda: bed.train("dpo", LORA, data_path=data), str(data), "the key 'data' twice")


for what in ("a link to itself", "a pipe", "a device", "a float picture with NaN"):

    @cell("reading", f"an image is {what}")
    def _(bed: Bed, what: str = what) -> None:
        data, images = rows_of(bed)
        file = images / "3.png"
        file.unlink()
        if what == "a link to itself":
            file.symlink_to(file)
        elif what == "a pipe":
            os.mkfifo(file)
        elif what == "a device":
            file.symlink_to("/dev/zero")
        else:
            from PIL import Image

            Image.fromarray(torch.full((8, 8), float("nan")).numpy()).save(file, format="TIFF")
        bed.refused(lambda: bed.train("dpo", LORA, data_path=data, image_root=images), r"row 3.*3\.png")


@cell("reading", "data and images behind links", "recovered")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    bed.train("dpo", LORA, data_path=data, image_root=images, out=bed.tmp / "before")
    (bed.tmp / "links").mkdir()
    for file in (data, images, Path(zoo.checkpoint("llava"))):
        (bed.tmp / "links" / file.name).symlink_to(file)
    links = bed.tmp / "links"
    bed.train(
        "dpo",
        LORA,
        data_path=links / data.name,
        image_root=links / images.name,
        model=links / Path(zoo.checkpoint("llava")).name,
    )
    assert_equal(bed.tmp / "before", bed.out)


@cell("reading", "the cache of datasets cannot be written")
def _(bed: Bed) -> None:
    data, _ = rows_of(bed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/cache"))
        bed.refused(lambda: bed.train("dpo", LORA, data_path=data), "/proc/cache")


@cell("reading", "a file replaced by one of the same size and time", "recovered")
def _(bed: Bed) -> None:
    data, _ = rows_of(bed)
    bed.train("dpo", LORA, data_path=data, out=bed.tmp / "before")
    stat, text = data.stat(), data.read_text()
    other = text.replace("A red square", "A red circle")
    assert len(other) == len(text) and other != text
    data.write_text(other)
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bed.train("dpo", LORA, data_path=data)
    with pytest.raises(AssertionError):
        assert_equal(bed.tmp / "before", bed.out)


# -- step --------------------------------------------------------------------------------------------------------------------

REFUSED_REWARDS = {
    "exits with status 0": "sys.exit(0)",
    "returns inf": "return [float('inf')] * len(responses)",
    "returns 1e300": "return [1e300] * len(responses)",
    "never stops calling itself": "return f(images, prompts, responses)",
    "returns too many": "return [1.0] * (len(responses) + 1)",
}
for fault, body in REFUSED_REWARDS.items():

    @cell("step", f"the reward function {fault}")
    def _(bed: Bed, body: str = body) -> None:
        file = bed.tmp / "meddles.py"
        file.write_text(f"import sys\n\ndef f(images, prompts, responses, **columns):\n    {body}\n")
        bed.rewards = f"{file}:f"
        bed.refused(lambda: bed.train("ppo", LORA), r"[Rr]eward f")
        assert not [*bed.out.glob("*.safetensors")]


MEDDLING = {
    "seeds the random numbers": "torch.manual_seed(0); random.seed(0); np.random.seed(0)",
    "changes the folder": "os.chdir('/')",
    "empties its arguments": "[x.clear() for x in (images, prompts, responses) if isinstance(x, list)]",
    "edits the prompts": "[m.update(content='x') for p in prompts for m in p]",
    "prints 10 MB": "print('x' * 10_000_000)",
    "turns gradients off": "torch.set_grad_enabled(False)",
    "changes the default type": "torch.set_default_dtype(torch.float64)",
    "takes the signals": "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.alarm(100); signal.alarm(0)",
}
for fault, body in MEDDLING.items():

    @cell("step", f"the reward function {fault}", "recovered")
    def _(bed: Bed, body: str = body) -> None:
        head = "import os, random, signal\nimport numpy as np\nimport torch\n\ndef f(images, prompts, responses, **columns):\n    "
        found = []
        here, (soft, handlers) = os.getcwd(), (torch.get_default_dtype(), signal.getsignal(signal.SIGTERM))
        try:
            for n, line in enumerate(("pass", body)):
                file = bed.tmp / f"meddles{n}.py"
                file.write_text(f"{head}scores = [float(len(r)) for r in responses]\n    {line}\n    return scores\n")
                bed.rewards, out = f"{file}:f", bed.tmp / f"out{n}"
                bed.train("ppo", f"{LORA} --max_steps 3 --num_ppo_epochs 2", out=out)
                found.append(out)
        finally:
            os.chdir(here)
            torch.set_default_dtype(soft)
            torch.set_grad_enabled(True)
            signal.signal(signal.SIGTERM, handlers)
        assert_equal(*found)


@cell("step", "a data worker is killed")
def _(bed: Bed) -> None:
    flags = f"{LORA} --max_steps 5000 --per_device_train_batch_size 1 --dataloader_num_workers 1 --dataloader_prefetch_factor 2"
    # In a process of its own: PyTorch raises the worker's death wherever the process is at that moment.
    run = Run("sft", bed.argv("sft", flags), bed.tmp / "log", pause=0.2)
    assert run.until(lambda: run.steps >= 2)
    for worker in psutil.Process(run.process.pid).children(recursive=True):  # below a fork server of its own
        worker.kill()
    assert run.wait() == 2 and "A data worker has died" in run.output, run.output[-2000:]


@cell("step", "too many open files")
def _(bed: Bed) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # of which all are in use

    def run() -> None:
        try:
            train_while(bed, "sft", f"{LORA} {SAVE}", 2, limit)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    bed.refused(run, "[Tt]oo many open files")


# -- save --------------------------------------------------------------------------------------------------------------------

IN_THE_WAY = {
    "a file": [".incomplete", "checkpoint-1", "adapter_model.safetensors"],
    "a folder": ["checkpoint-1", "adapter_model.safetensors", "run.json", "trainer_state.json", ".lock"],
}
for kind, names in IN_THE_WAY.items():
    for name in names:

        @cell("save", f"{name} is {kind} of somebody else")
        def _(bed: Bed, name: str = name, kind: str = kind) -> None:
            bed.out.mkdir()
            (bed.out / name).mkdir() if kind == "a folder" else (bed.out / name).write_text("mine")
            bed.refused(lambda: bed.train("dpo", f"{LORA} {SAVE}"), name)
            assert (bed.out / name).is_dir() if kind == "a folder" else (bed.out / name).read_text() == "mine"


@cell("save", "the folder is a link", "recovered")
def _(bed: Bed) -> None:
    (bed.tmp / "disk").mkdir()
    (bed.tmp / "link").symlink_to(bed.tmp / "disk")
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 1", out=bed.tmp / "link")
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 2 {RESUME}", out=bed.tmp / "disk")
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 2")
    assert_equal(bed.out, bed.tmp / "link")


@cell("save", "the folder is a link to nowhere")
def _(bed: Bed) -> None:
    bed.out.symlink_to(bed.tmp / "nowhere")
    bed.refused(lambda: bed.train("dpo", LORA), "--output_dir")


@cell("save", "the folder is removed while training", "recovered")
def _(bed: Bed) -> None:
    bed.train("dpo", f"{LORA} {SAVE}", out=bed.tmp / "before")
    train_while(bed, "dpo", f"{LORA} {SAVE}", 2, lambda: shutil.rmtree(bed.out))
    assert_equal(bed.tmp / "before", bed.out)
    assert [p.name for p in bed.out.glob("checkpoint-*")] == ["checkpoint-2"]


@cell("save", "the clock goes back", "recovered")
def _(bed: Bed) -> None:
    """The newest checkpoint is the one of the largest step, not the one with the latest time."""

    def in_the_future() -> None:
        later = time.time() + 86_400
        os.utime(bed.out / "checkpoint-1", (later, later))

    train_while(bed, "dpo", f"{LORA} {SAVE} --max_steps 4 --save_total_limit 1", 2, in_the_future)
    assert [p.name for p in bed.out.glob("checkpoint-*")] == ["checkpoint-4"]


@cell("save", "an older checkpoint after a damaged newer one", "recovered")
def _(bed: Bed) -> None:
    """What was written last counts as the newest, although the damaged one has a larger number."""
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 4", out=bed.tmp / "whole")
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 4")
    for n in (3, 4):
        damage(bed.out / f"checkpoint-{n}" / "optimizer.pt", "cut")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_while(bed, "dpo", f"{LORA} {SAVE} --max_steps 4 --save_total_limit 1 {RESUME}", 4, stop)
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 4 --save_total_limit 1 {RESUME}")
    assert "going on" not in bed.said()
    assert_equal(bed.tmp / "whole", bed.out)


@cell("save", "files of another run with a time in the future", "recovered")
def _(bed: Bed) -> None:
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 1")
    later = time.time() + 86_400
    for path in (*bed.out.rglob("*"), *bed.out.glob("*")):
        os.utime(path, (later, later))
    bed.train("sft", "--overwrite_output_dir True --max_steps 1")
    names = {p.name for p in bed.out.iterdir()}
    assert "model.safetensors" in names and not names & {"adapter_config.json", "checkpoint-1"}


# -- resume ------------------------------------------------------------------------------------------------------------------


def started(bed: Bed, script: str = "dpo", flags: str = "") -> None:
    """Two steps of three."""
    bed.train(script, f"{LORA} {SAVE} --max_steps 3 {flags}", out=bed.tmp / "whole")
    bed.train(script, f"{LORA} {SAVE} --max_steps 3 {flags}")
    shutil.rmtree(bed.out / "checkpoint-3")
    for file in bed.out.glob("*.safetensors"):
        file.unlink()


def go_on(bed: Bed, script: str = "dpo", flags: str = "") -> None:
    bed.train(script, f"{LORA} {SAVE} --max_steps 3 {RESUME} {flags}")


CONTENTS = {"a list": "[]", "empty": "", "of no run": '{"arguments": {}}', "no text": b"\xff\xfe\x00", "a number": "3"}
for what, content in CONTENTS.items():

    @cell("resume", f"run.json everywhere: {what}")
    def _(bed: Bed, content: str | bytes = content) -> None:
        started(bed)
        for folder in (bed.out, *bed.out.glob("checkpoint-*")):
            (folder / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
            (folder / "checksums.json").unlink(missing_ok=True)
        bed.refused(lambda: go_on(bed), r"run\.json")

    @cell("resume", f"run.json of the folder: {what}", "recovered")
    def _(bed: Bed, content: str | bytes = content) -> None:
        started(bed)
        (bed.out / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        go_on(bed)
        assert_equal(bed.tmp / "whole", bed.out)
        assert len(json.loads((bed.out / "run.json").read_text())["history"]) == 2


for what in ("renamed", "a copy beside it", "a link to another disk", "half copied", "half copied, without checksums"):

    @cell("resume", f"the newest checkpoint is {what}", "recovered")
    def _(bed: Bed, what: str = what) -> None:
        started(bed)
        newest = bed.out / "checkpoint-2"
        match what:
            case "renamed":
                newest.rename(bed.out / "checkpoint-200")
            case "a copy beside it":
                shutil.copytree(bed.out / "checkpoint-1", bed.out / "checkpoint-3.bak")
            case "a link to another disk":
                shutil.move(newest, bed.tmp / "elsewhere")
                newest.symlink_to(bed.tmp / "elsewhere")
            case _:
                names = sorted(p.name for p in newest.iterdir() if p.is_file())
                for name in names[len(names) // 2 :]:
                    (newest / name).unlink()
                if "without" in what:
                    (newest / "checksums.json").unlink(missing_ok=True)
        go_on(bed)
        assert_equal(bed.tmp / "whole", bed.out)
        assert not (bed.out / "checkpoint-3.bak").exists() or what == "a copy beside it"


@cell("resume", "a checkpoint that is a link is given up by --save_total_limit", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    shutil.move(bed.out / "checkpoint-2", bed.tmp / "elsewhere")
    (bed.out / "checkpoint-2").symlink_to(bed.tmp / "elsewhere")
    go_on(bed, flags="--save_total_limit 1")
    assert_equal(bed.tmp / "whole", bed.out)
    assert [p.name for p in bed.out.glob("checkpoint-*")] == ["checkpoint-3"]


@cell("resume", "value_function is missing", "recovered")
def _(bed: Bed) -> None:
    started(bed, "ppo")
    shutil.rmtree(bed.out / "checkpoint-2" / "value_function")
    go_on(bed, "ppo")
    assert "checkpoint-2 is passed over" in bed.said()
    assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "kept answers of a failed reward are damaged", "recovered")
def _(bed: Bed) -> None:
    started(bed, "ppo")
    (bed.out / "unscored_answers_0.json").write_text('{"key": {"seed"')
    go_on(bed, "ppo")
    assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "the base has moved", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    bed.train("dpo", f"{LORA} {SAVE} --max_steps 3 {RESUME}", model=bed.copy(zoo.checkpoint("llava"), "moved"))
    assert_equal(bed.tmp / "whole", bed.out)


CHANGES = {
    "--bf16 True": "--bf16",
    "--max_length 64": "--max_length",
    "--dataloader_drop_last True": "--dataloader_drop_last",
    "--warmup_steps 2": "--warmup_steps",
    "--max_grad_norm 0.1": "--max_grad_norm",
    "--adam_beta2 0.9": "--adam_beta2",
    "--train_sampling_strategy sequential": "--train_sampling_strategy",
    "--fast_lora False": "--fast_lora",
    "--lora_dropout 0.3": "--lora_dropout",
}
for flags, named in CHANGES.items():

    @cell("resume", f"another flag: {flags}", "recovered")
    def _(bed: Bed, flags: str = flags, named: str = named) -> None:
        """It is said, and kept in the history."""
        started(bed)
        bed.said()
        go_on(bed, flags=flags)
        assert f"other settings than so far: {named}" in bed.said()


@cell("resume", "index of sharded weights cut, without checksums", "recovered")
def _(bed: Bed) -> None:
    started(bed)
    (bed.out / "checkpoint-2" / "checksums.json").unlink()
    (bed.out / "checkpoint-2" / "model.safetensors.index.json").write_text('{"weight_map": {')
    go_on(bed)
    assert "checkpoint-2 is passed over" in bed.said()
    assert_equal(bed.tmp / "whole", bed.out)


@cell("resume", "the folder through a link at the same time")
def _(bed: Bed) -> None:

    (bed.tmp / "link").symlink_to(bed.out)
    first = Run("dpo", bed.argv("dpo", f"{LORA} --max_steps 5000"), bed.tmp / "log", pause=0.2)
    assert first.until(lambda: first.steps >= 1), first.output[-2000:]
    try:
        bed.refused(lambda: bed.train("dpo", LORA, out=bed.tmp / "link"), "in use by another run")
    finally:
        first.process.kill()
        first.wait()


# -- merge, generate -----------------------------------------------------------------------------------------------------------


@cell("merge", "another base of the same shape")
def _(bed: Bed) -> None:
    adapter, base = adapter_of(bed), bed.copy(zoo.checkpoint("llava"), "base")
    save_file(
        {n: t + 0.01 for n, t in load_file(base / "model.safetensors").items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    bed.refused(lambda: merge_lora.main([str(base), str(adapter), str(bed.tmp / "merged")]), str(base))
    assert not (bed.tmp / "merged").exists()


@cell("generate", "the model changed between kill and restart")
def _(bed: Bed) -> None:
    file, model = questions(bed), bed.copy(zoo.checkpoint("llava"), "model")
    generate.main(generate_argv(bed, file, model))
    whole = (bed.tmp / "answers.jsonl").read_text()
    (bed.tmp / "answers.jsonl").unlink()
    (bed.tmp / "answers.jsonl.part-0").write_text(whole[: len(whole) // 2])
    tensors = {n: t + 0.01 for n, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    bed.refused(lambda: generate.main(generate_argv(bed, file, model)), r"answers\.jsonl", "--overwrite")


@cell("generate", "the description of the answers is damaged")
def _(bed: Bed) -> None:
    file = questions(bed)
    generate.main(generate_argv(bed, file))
    for described in bed.tmp.glob("answers*meta*"):
        described.write_text('{"task": ')
    bed.refused(lambda: generate.main(generate_argv(bed, file)), r"answers", "--overwrite")


@cell("generate", "the output is a folder")
def _(bed: Bed) -> None:
    file = questions(bed)
    (bed.tmp / "answers.jsonl").mkdir()
    bed.refused(lambda: generate.main(generate_argv(bed, file)), r"answers\.jsonl")


@cell("generate", "an answer in the middle is damaged", "recovered")
def _(bed: Bed) -> None:
    file = questions(bed)
    generate.main(generate_argv(bed, file))
    whole = (bed.tmp / "answers.jsonl").read_text()
    (bed.tmp / "answers.jsonl").unlink()
    lines = whole.splitlines(keepends=True)
    lines[1] = lines[1][:10] + "\n"
    (bed.tmp / "answers.jsonl.part-0").write_text("".join(lines[:3]))
    generate.main(generate_argv(bed, file))
    assert (bed.tmp / "answers.jsonl").read_text() == whole
