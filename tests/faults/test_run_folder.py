"""Whose checkpoint is it: another run's is refused, changed settings are said, a used folder is not mixed up."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train_dpo
import train_sft
from base.loading import load_model
from base.resume import CHECKSUMS, newest_whole_checkpoint, what_is_wrong_with
from base.run_folder import LOCK
from common.errors import InputError
from tests.processes import Run

LORA = "--use_lora True --lora_r 4 --save_strategy steps --save_steps 1 --max_steps 2"
RESUME = "--resume_from_checkpoint True"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llava, image_dir, pairs_json):
    """The folder of a DPO run of two steps. Copied by `used`."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train_dpo.main(
        f"--model_name_or_path {llava} --dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --output_dir {out} "
        f"--per_device_train_batch_size 4 --learning_rate 1e-3 --disable_tqdm True --seed 0 {LORA}".split()
    )
    return out


@pytest.fixture
def used(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def digest(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != LOCK}


@pytest.mark.parametrize(
    "script, flags, reason",
    [
        ("sft", "", r"trained with train_dpo\.py, this is train_sft\.py"),
        ("rm", "", r"trained with train_dpo\.py, this is train_rm\.py"),
        ("dpo", "--lora_r 8", "--lora_r 4, this has 8"),
        ("dpo", "--lora_alpha 3", "--lora_alpha 16, this has 3"),
        ("dpo", "--lora_target_modules q_proj", "--lora_target_modules auto, this has q_proj"),
        ("dpo", "--seed 7", "--seed 0, this has 7"),
        ("dpo", "--optim sgd", "--optim adamw_torch_fused, this has sgd"),
        ("dpo", "--model", "started from other weights"),
    ],
)
def test_another_runs_checkpoint_is_refused(command, used, llava, tmp_path, script: str, flags: str, reason: str):
    model = llava
    if flags == "--model":
        flags, model = "", shutil.copytree(llava, tmp_path / "other")
        weights = load_file(model / "model.safetensors")
        weights = {n: t + 1e-3 for n, t in weights.items()}
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    before = digest(used)
    with pytest.raises(InputError, match=f"is of another run: .*{reason}"):
        importlib.import_module(f"train_{script}").main(
            command(script, f"{LORA} {flags} {RESUME}", out=used, model=str(model))
        )
    assert digest(used) == before


def test_all_weights_do_not_go_on_from_lora(command, used):
    with pytest.raises(InputError, match="--use_lora True, this has False"):
        train_dpo.main(command("dpo", f"--max_steps 2 {RESUME}", out=used))


def test_other_settings_are_said_and_kept_in_the_history(command, used, capsys):
    flags = f"{LORA} {RESUME} --max_steps 3 --learning_rate 5e-4 --beta 0.2 --lr_scheduler_type constant"
    train_dpo.main(command("dpo", flags, out=used))
    said = capsys.readouterr().err
    for change in (
        "--learning_rate 0.0005 (was 0.001)",
        "--beta 0.2 (was 0.1)",
        "--lr_scheduler_type constant (was linear)",
    ):
        assert change in said
    first, second = json.loads((used / "run.json").read_text())["history"]
    assert first["resumed_from"] is None and second["resumed_from"].endswith("checkpoint-2")
    assert second["changed"]["learning_rate"] == [1e-3, 5e-4]


def test_the_same_command_says_nothing(command, used, capsys):
    (used / "checkpoint-2").rename(used / "x")
    shutil.rmtree(used / "x")
    train_dpo.main(command("dpo", f"{LORA} {RESUME}", out=used))
    assert "other settings" not in capsys.readouterr().err


def test_end_of_a_run_with_other_settings_is_not_handed_back(command, used):
    with pytest.raises(
        InputError, match=r"the end of a run that had other settings: --learning_rate 0\.01 \(was 0\.001\)"
    ):
        train_dpo.main(command("dpo", f"{LORA} {RESUME} --learning_rate 1e-2", out=used))


def test_other_rows_are_refused_or_said(command, used, pairs_json, tmp_path, capsys):
    shutil.rmtree(used / "checkpoint-2")
    rows = json.loads(pairs_json.read_text())
    other = tmp_path / "other.json"
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    other.write_text(json.dumps(rows))
    argv = command("dpo", f"{LORA} {RESUME}", out=used)
    argv[argv.index(str(pairs_json))] = str(other)
    with pytest.raises(
        InputError, match=r"rows are not those that .*checkpoint-1 was trained on \(8 rows then, 8 now\)"
    ):
        train_dpo.main(argv)
    train_dpo.main([*argv, "--resume_on_other_data", "True"])
    assert "going on, as --resume_on_other_data says" in capsys.readouterr().err
    assert "data" in json.loads((used / "run.json").read_text())["history"][1]["changed"]


def test_a_used_folder_is_refused_or_emptied(command, used, tmp_path):
    """All weights after LoRA: the adapter's files would be loaded over the new weights."""
    (used / "notes.txt").write_text("mine")
    flags = "--max_steps 1 --learning_rate 1e-2"
    with pytest.raises(
        InputError, match=r"holds another run \(adapter_model.safetensors, checkpoint-1, .*--overwrite_output_dir"
    ):
        train_sft.main(command("sft", flags, out=used))
    train_sft.main(command("sft", f"{flags} --overwrite_output_dir True", out=used))
    names = {p.name for p in used.iterdir()}
    assert "notes.txt" in names and "model.safetensors" in names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "checkpoint-1", "checkpoint-2"}
    assert not hasattr(load_model(str(used)), "peft_config")


def test_a_used_folder_keeps_what_this_run_has_written_already(command, used, conversations_json, tmp_path):
    """The list of bad rows is written while the data are read, before the folder is emptied."""
    (used / "bad_rows.jsonl").write_text("of the other run\n")
    os.utime(used / "bad_rows.jsonl", (0, 0))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([*json.loads(conversations_json.read_text()), {"image": "0.png", "conversations": []}]))
    argv = command("sft", "--max_steps 1 --overwrite_output_dir True --on_bad_row drop", out=used)
    argv[argv.index(str(conversations_json))] = str(rows)
    train_sft.main(argv)
    (row,) = (json.loads(line) for line in (used / "bad_rows.jsonl").read_text().splitlines())
    assert "rows.json, row 8" in row["where"]
    assert not (used / "checkpoint-1").exists()


def test_overwriting_does_not_take_the_model_it_starts_from(command, used):
    with pytest.raises(InputError, match=r"--model_name_or_path .*checkpoint-1 lies in --output_dir"):
        train_dpo.main(
            command("dpo", f"{LORA} --overwrite_output_dir True", out=used, model=str(used / "checkpoint-1"))
        )
    assert (used / "checkpoint-1").is_dir()


def test_a_folder_that_no_run_wrote_is_never_emptied(command, llava, tmp_path):
    model = shutil.copytree(llava, tmp_path / "model")
    with pytest.raises(InputError, match=r"no run\.json says of which run"):
        train_sft.main(command("sft", "--overwrite_output_dir True", out=model))
    assert (model / "model.safetensors").is_file()


def test_a_model_beside_an_adapter_is_refused(used, llava):
    shutil.copy(Path(llava) / "model.safetensors", used)
    with pytest.raises(InputError, match="holds a whole model and an adapter"):
        load_model(str(used))


def test_a_run_that_saved_nothing_leaves_the_folder_free(command, used):
    for path in used.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_sft.main(command("sft", "--max_steps 1", out=used))


def test_two_runs_do_not_share_a_folder(command, tmp_path):
    out = tmp_path / "out"
    first = Run("sft", command("sft", "--max_steps 5000", out=out), tmp_path / "log", pause=0.2)
    assert first.until(lambda: first.steps >= 1), first.output[-2000:]
    with pytest.raises(InputError, match=rf"in use by another run \(process {first.process.pid} on .* since"):
        train_sft.main(command("sft", "--max_steps 1", out=out))
    first.process.kill()
    first.wait()
    train_sft.main(command("sft", "--max_steps 1", out=out))  # the dead run's lock holds nobody up


def test_run_json_lies_in_every_checkpoint(finished):
    for folder in finished.glob("checkpoint-*"):
        assert json.loads((folder / "run.json").read_text()) == json.loads((finished / "run.json").read_text())
        assert what_is_wrong_with(folder) is None


def test_run_json_lies_in_a_checkpoint_that_was_moved(command, finished, tmp_path):
    """Whose it is does not depend on what lies beside it."""
    moved = shutil.copytree(finished / "checkpoint-1", tmp_path / "kept" / "checkpoint-1")
    with pytest.raises(InputError, match=r"is of another run: it has --seed 0, this has 7"):
        train_dpo.main(command("dpo", f"{LORA} --seed 7 --resume_from_checkpoint {moved}"))


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json", CHECKSUMS]


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "altered"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_older_checkpoint_taken(used, capsys, name: str, how: str):
    file = used / "checkpoint-2" / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"empty": b"", "cut": content[:middle], "altered": altered}[how])
    expected = "checkpoint-2" if (name, how) == (CHECKSUMS, "missing") else "checkpoint-1"
    assert newest_whole_checkpoint(str(used)) == str(used / expected)
    if expected == "checkpoint-1":
        said = capsys.readouterr().err
        assert "checkpoint-2 is passed over" in said and (name in said or (how == "altered" and name == CHECKSUMS))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_without_checksums_missing_state_is_seen(used, name: str):
    """A checkpoint of an older version, or one that was copied without all of its files."""
    (used / "checkpoint-2" / CHECKSUMS).unlink()
    (used / "checkpoint-2" / name).unlink()
    assert newest_whole_checkpoint(str(used)) == str(used / "checkpoint-1")


def test_line_break_in_the_folder(command, tmp_path):
    argv = command("sft", "--max_steps 1")
    argv[argv.index("--output_dir") + 1] = f"{tmp_path}/a\nb"
    with pytest.raises(InputError, match="holds a line break"):
        train_sft.main(argv)
