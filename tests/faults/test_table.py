"""The table of faults: moment x fault, and what is promised.

    refused     the command ends with status 2 and one sentence that names the file (or flag); nothing that lay there before is changed,
                nothing half-written stays under its final name
    recovered   the command goes on and its numbers are those of a run without the fault; where it took something else instead, it says so

Faults of steps (NaN, signals), of checkpoints and of used folders have files of their own beside this one; tests/test_resume.py kills.
"""

import importlib
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from datasets import Dataset

import merge_lora
from eval import generate
from tests import zoo
from tests.faults import later_cells, odd_cells  # noqa: F401  more cells
from tests.faults.bed import (
    CACHE,
    CELLS,
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
    state,
)

# -- load --------------------------------------------------------------------------------------------------------------------

for script in ("sft", "dpo", "rm", "ppo"):
    for how in ("missing", "empty", "cut", "NaN", "a folder"):

        @cell(f"load ({script})", f"model.safetensors {how}")
        def _(bed: Bed, script: str = script, how: str = how) -> None:
            model = bed.copy(zoo.checkpoint("llava"), "model")
            damage(model / "model.safetensors", how)
            bed.refused(lambda: bed.train(script, LORA, model=model), str(model), untouched=model)


for name in ("config.json", "tokenizer.json", "processor_config.json"):
    for how in ("missing", "empty", "cut"):

        @cell("load (dpo)", f"{name} {how}")
        def _(bed: Bed, name: str = name, how: str = how) -> None:
            model = bed.copy(zoo.checkpoint("llava"), "model")
            damage(model / name, how)
            bed.refused(lambda: bed.train("dpo", LORA, model=model), str(model), untouched=model)


for moment in ("load (dpo)", "merge"):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        for how in ("missing", "empty", "cut") + (("NaN",) if "model" in name else ()):

            @cell(moment, f"{name} {how}")
            def _(bed: Bed, moment: str = moment, name: str = name, how: str = how) -> None:
                adapter = adapter_of(bed)
                damage(adapter / name, how)
                base, out = zoo.checkpoint("llava"), bed.tmp / "merged"
                run = (
                    (lambda: merge_lora.main([base, str(adapter), str(out)]))
                    if moment == "merge"
                    else (lambda: bed.train("dpo", LORA, model=adapter))
                )
                bed.refused(run, str(adapter), untouched=adapter)
                assert not out.exists()


for how in ("missing", "empty", "cut", "NaN"):

    @cell("load (ppo)", f"reward_head.safetensors {how}")
    def _(bed: Bed, how: str = how) -> None:
        rm = adapter_of(bed, "rm")
        damage(rm / "reward_head.safetensors", how)
        argv = bed.argv("ppo", f"{LORA} --reward_adapter {rm}")
        bed.refused(lambda: importlib.import_module("train_ppo").main(argv), str(rm), untouched=rm)


# -- reading -----------------------------------------------------------------------------------------------------------------


for how in ("missing", "empty", "cut", "a folder"):

    @cell("reading", f"data file {how}")
    def _(bed: Bed, how: str = how) -> None:
        data, images = rows_of(bed)
        damage(data, how)
        bed.refused(lambda: bed.train("dpo", LORA, data_path=data, image_root=images), str(data))


for how in ("missing", "empty", "cut", "a folder"):

    @cell("reading, after a run with the same rows", f"image {how}")
    def _(bed: Bed, how: str = how) -> None:
        data, images = rows_of(bed)
        bed.train("dpo", f"{LORA} --max_steps 1", data_path=data, image_root=images, out=bed.tmp / "before")
        damage(images / "7.png", how)
        bed.refused(
            lambda: bed.train("dpo", f"{LORA} --max_steps 1", data_path=data, image_root=images), r"row 7.*7\.png"
        )


@cell("reading", "a JSON key twice")
def _(bed: Bed) -> None:
    data, _ = rows_of(bed)
    data.write_text(data.read_text().replace('"chosen"', '"chosen": "x", "chosen"', 1))
    bed.refused(lambda: bed.train("dpo", LORA, data_path=data), str(data), "row 0", "the key 'chosen' twice")


@cell("reading", "a link loop in a folder of parquet files", "recovered")
def _(bed: Bed) -> None:
    from data.files import read_file

    folder = bed.tmp / "parts"
    (folder / "a").mkdir(parents=True)
    Dataset.from_list([{"n": i} for i in range(16)]).to_parquet(folder / "a" / "train.parquet")
    os.symlink("..", folder / "a" / "loop")
    assert len(read_file(str(folder), "--data_path")[0]) == 16
    os.symlink(folder / "a", bed.tmp / "elsewhere")  # a link that ends is followed
    assert len(read_file(str(bed.tmp / "elsewhere"), "--data_path")[0]) == 16


@cell("reading", "a parquet file cut")
def _(bed: Bed) -> None:
    data = bed.tmp / "pairs.parquet"
    pyarrow.parquet.write_table(
        Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 500).data.table, data
    )
    damage(data, "cut")
    bed.refused(lambda: bed.train("dpo", LORA, data_path=data), str(data))


for how in ("cut", "empty"):

    @cell("reading", f"the cached copy of the rows {how}", "recovered")
    def _(bed: Bed, how: str = how) -> None:
        data, _ = rows_of(bed)
        bed.train("dpo", f"{LORA} --max_steps 1", data_path=data, out=bed.tmp / "before")
        cached = [
            f
            for f in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")
            if str(data).encode() in f.read_bytes() and f.name.startswith("generator")
        ]
        assert cached
        for file in cached:
            os.truncate(file, file.stat().st_size // 2 if how == "cut" else 0)
        bed.train("dpo", f"{LORA} --max_steps 1", data_path=data)
        assert_equal(bed.tmp / "before", bed.out)


# -- reference pass ----------------------------------------------------------------------------------------------------------

for how in ("empty", "cut", "altered"):

    @cell("reference pass", f"cached log-probs {how}", "recovered")
    def _(bed: Bed, how: str = how) -> None:
        flags = f"{CACHE} --ref_log_probs_dir {bed.tmp / 'cache'}"
        bed.train("dpo", flags, out=bed.tmp / "before")
        (file,) = (bed.tmp / "cache").rglob("*.safetensors")
        damage(file, how)
        bed.train("dpo", flags)
        assert_equal(bed.tmp / "before", bed.out)
        assert file.with_suffix(".damaged").exists()


@cell("reference pass", "a folder that cannot be written")
def _(bed: Bed) -> None:
    (bed.tmp / "file").write_text("")
    bed.refused(lambda: bed.train("dpo", f"{CACHE} --ref_log_probs_dir {bed.tmp / 'file'}"), "--ref_log_probs_dir")


@cell("reference pass", "full disk")
def _(bed: Bed) -> None:
    def run() -> None:
        argv = bed.argv("dpo", f"{CACHE} --ref_log_probs_dir {bed.tmp / 'cache'}")
        from base.reference_cache import ReferenceCache

        flush = ReferenceCache.flush

        def on_a_full_disk(self: ReferenceCache) -> None:
            with full_disk(100):
                flush(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ReferenceCache, "flush", on_a_full_disk)
            importlib.import_module("train_dpo").main(argv)

    bed.refused(run, "could not be written", "free space")
    assert not [*(bed.tmp / "cache").rglob("*.safetensors*")]


@cell("step", "an image replaced after the reference has seen it")
def _(bed: Bed) -> None:
    from base.trainer import VLDPOTrainer

    data, images = rows_of(bed)
    precompute = VLDPOTrainer.precompute_reference_logps

    def then_replace(self: VLDPOTrainer) -> None:
        precompute(self)
        for i in range(8):
            zoo.image(20 + i).save(images / f"{i}.png")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLDPOTrainer, "precompute_reference_logps", then_replace)
        flags = f"{CACHE} --ref_log_probs_dir {bed.tmp / 'cache'}"
        bed.refused(
            lambda: bed.train("dpo", flags, data_path=data, image_root=images), r"pairs\.json", "image has changed"
        )


@cell("step", "an image deleted after it was checked")
def _(bed: Bed) -> None:
    from base.trainer import VLDPOTrainer

    data, images = rows_of(bed)
    train = VLDPOTrainer.train

    def without_images(self: VLDPOTrainer, *args: object, **kwargs: object) -> object:
        shutil.rmtree(images)
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLDPOTrainer, "train", without_images)
        bed.refused(lambda: bed.train("dpo", LORA, data_path=data, image_root=images), r"pictures/\d\.png")


# -- resume ------------------------------------------------------------------------------------------------------------------

for change in ("rows taken out", "rows added", "sides swapped", "order", "an image replaced"):

    @cell("resume", f"data: {change}")
    def _(bed: Bed, change: str = change) -> None:
        data, images = rows_of(bed)
        flags = f"{LORA} {SAVE}"
        bed.train("dpo", f"{flags} --max_steps 1", data_path=data, image_root=images)
        rows = json.loads(data.read_text())
        match change:
            case "rows taken out":
                rows = rows[:5]
            case "rows added":
                rows.append(rows[0] | {"prompt": "And now?"})
            case "sides swapped":
                rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
            case "order":
                rows.reverse()
            case _:
                zoo.image(30).save(images / "3.png")
        data.write_text(json.dumps(rows))
        again = f"{flags} --max_steps 2 --resume_from_checkpoint True"
        bed.refused(
            lambda: bed.train("dpo", again, data_path=data, image_root=images), "rows are not those", "--resume_on_other_data",
            untouched=bed.out,
        )  # fmt: skip


# -- save: full disks and folders that cannot be written ---------------------------------------------------------------------

for script in ("sft", "dpo", "rm", "ppo"):
    for limit in (100, 3_000, 15_000, 40_000):

        @cell(f"save ({script})", f"full disk at {limit:,} bytes a file")
        def _(bed: Bed, script: str = script, limit: int = limit) -> None:
            flags = "" if script == "sft" else LORA
            bed.train(script, f"{flags} {SAVE} --max_steps 1")
            kept = state(bed.out / "checkpoint-1")
            argv = bed.argv(script, f"{flags} {SAVE} --max_steps 2 --resume_from_checkpoint True")

            def run() -> None:
                with full_disk(limit):
                    importlib.import_module(f"train_{script}").main(argv)

            bed.refused(run, "could not be written|cannot be written")
            assert state(bed.out / "checkpoint-1") == kept and not (bed.out / "checkpoint-2").exists()
            importlib.import_module(f"train_{script}").main(argv)  # space is free again
            assert (bed.out / "checkpoint-2").is_dir()

    for where in ("a file", "below a file", "a system folder", "a line break"):

        @cell(f"save ({script})", f"--output_dir is {where}")
        def _(bed: Bed, script: str = script, where: str = where) -> None:
            (bed.tmp / "file").write_text("kept")
            out = {"a file": bed.tmp / "file", "below a file": bed.tmp / "file" / "out", "a system folder": Path("/proc/out"),
                   "a line break": bed.tmp / "a\nb"}[where]  # fmt: skip
            argv = bed.argv(script, LORA)
            argv[argv.index("--output_dir") + 1] = str(out)
            bed.refused(lambda: importlib.import_module(f"train_{script}").main(argv), "--output_dir")
            assert (bed.tmp / "file").read_text() == "kept"


@cell("save", "full disk for bad_rows.jsonl")
def _(bed: Bed) -> None:
    data, images = rows_of(bed)
    for i in range(8):
        (images / f"{i}.png").unlink()

    def run() -> None:
        from data import _report_refused as report

        def on_a_full_disk(*args: object) -> None:
            with full_disk(100):
                report(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data._report_refused", on_a_full_disk)
            bed.train("dpo", LORA, data_path=data, image_root=images)

    bed.refused(run, "bad_rows|could not be written")
    assert not (bed.out / "bad_rows.jsonl").exists()


# -- merge -------------------------------------------------------------------------------------------------------------------

for where in ("full disk", "below a file", "a system folder", "not empty"):

    @cell("merge", f"the folder to write: {where}")
    def _(bed: Bed, where: str = where) -> None:
        adapter = adapter_of(bed)
        (bed.tmp / "file").write_text("kept")
        (bed.tmp / "used").mkdir()
        (bed.tmp / "used" / "notes").write_text("kept")
        out = {
            "below a file": bed.tmp / "file" / "out",
            "a system folder": Path("/proc/out"),
            "not empty": bed.tmp / "used",
        }.get(where, bed.tmp / "merged")

        def run() -> None:
            with full_disk(20_000 if where == "full disk" else 1 << 40):
                merge_lora.main([zoo.checkpoint("llava"), str(adapter), str(out)])

        bed.refused(run, untouched=adapter)
        assert not (bed.tmp / "merged").exists() and [p.name for p in (bed.tmp / "used").iterdir()] == ["notes"]


# -- evaluation and generate -------------------------------------------------------------------------------------------------


for what in ("image missing", "image cut", "questions cut", "questions missing", "model cut", "model NaN", "full disk"):

    @cell("generate", what)
    def _(bed: Bed, what: str = what) -> None:
        file, model = questions(bed), bed.copy(zoo.checkpoint("llava"), "model")
        name, _, how = what.partition(" ")
        target = {"image": file.parent / "2.png", "questions": file, "model": model / "model.safetensors"}.get(name)
        if target is not None:
            damage(target, how)

        def run() -> None:
            with full_disk(100 if what == "full disk" else 1 << 40):
                generate.main(generate_argv(bed, file, model))

        bed.refused(run)
        assert not (bed.tmp / "answers.jsonl").exists()


@cell("generate", "killed in the middle of a line", "recovered")
def _(bed: Bed) -> None:
    file = questions(bed)
    generate.main(generate_argv(bed, file))
    whole = (bed.tmp / "answers.jsonl").read_text()
    (bed.tmp / "answers.jsonl").unlink()
    (bed.tmp / "answers.jsonl.part-0").write_text(whole[: len(whole) // 2])
    generate.main(generate_argv(bed, file))
    assert (bed.tmp / "answers.jsonl").read_text() == whole


for how in ("missing", "empty", "cut"):

    @cell("evaluation", f"image of an evaluation row {how}")
    def _(bed: Bed, how: str = how) -> None:
        data, images = rows_of(bed)
        held = bed.tmp / "eval.json"
        zoo.image(40).save(images / "other.png")
        held.write_text(json.dumps([json.loads(data.read_text())[0] | {"image": "other.png", "prompt": "What now?"}]))
        damage(images / "other.png", how)
        flags = f"{LORA} --eval_data_path {held} --eval_strategy steps --eval_steps 1"
        bed.refused(lambda: bed.train("dpo", flags, data_path=data, image_root=images), r"eval\.json", r"other\.png")


# ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bed(tmp_path, command, rewards, capsys, monkeypatch) -> Bed:
    return Bed(tmp_path, command, rewards, capsys)


def _quick_cells() -> set[int]:
    """Of every second fault the cell that comes first, few of later_cells: these run in `make test`, all in `make test-all`."""
    first: dict[tuple[str, int], int] = {}
    later = [i for i, c in enumerate(CELLS) if c.try_it.__module__ == later_cells.__name__]
    for i, c in enumerate(CELLS):
        if i not in later:
            first.setdefault((c.try_it.__module__, c.try_it.__code__.co_firstlineno), i)
    return {*sorted(first.values())[::2], *(i for i in later if CELLS[i].fault in later_cells.QUICK)}


_QUICK = _quick_cells()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, id=f"{c.moment} - {c.fault} - {c.promise}", marks=[] if i in _QUICK else [pytest.mark.slow])
        for i, c in enumerate(CELLS)
    ],
)
def test_cell(bed: Bed, number: int):
    CELLS[number].try_it(bed)


def test_table_is_whole():
    """No cell twice, and every moment has cells."""
    names = [(c.moment, c.fault) for c in CELLS]
    assert len(set(names)) == len(names)
    moments = {re.sub(r"[ ,(].*", "", c.moment) for c in CELLS}
    assert moments == {"load", "reading", "reference", "step", "save", "evaluation", "generate", "merge", "resume"}
    assert len(CELLS) >= 200 and all(c.promise in ("refused", "recovered") for c in CELLS)
