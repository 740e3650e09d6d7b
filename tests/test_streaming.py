"""`--streaming`: the rows of the files, one after the other; what is refused; runs that resume with the rows that come next."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

import data
import train_dpo
import train_ppo
import train_rm
import train_sft
from args import DataArguments, DPOConfig, PPOConfig
from base.ppo_batches import BatchSizes, PromptBatches
from base.reward_functions import BUILT_IN
from base.rewards import FunctionReward
from base.row_checks import ProcessorCheck
from common import errors
from common.errors import InputError
from data.lengths import LengthLimits
from data.stream import BUFFER, StreamedRows, Streaming
from models import core_mapper_for

SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm, "ppo": train_ppo}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.effect_noise((30 + i, 30), 60).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def pair(i: int, **more: object) -> dict:
    return {"image": f"{i % 3}.png", "prompt": f"What is {i}?", "chosen": f"A {i}.", "rejected": "No."} | more


def write(path: Path, rows: list[dict]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            lines = [rows[0], *(row.values() for row in rows)]
            path.write_text("\n".join(",".join(map(str, line)) for line in lines))
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        case "":
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
        case _:
            path.write_text(json.dumps(rows))
    return path


def arguments(folder: Path, *paths: Path, streaming: bool = True, **flags: object) -> DataArguments:
    names = ",".join(map(str, paths))
    return DataArguments(dataset_name=names, image_root=str(folder / "images"), streaming=streaming, **flags)


def stream(folder: Path, *paths: Path, kind: str = "preference", length: int = 10, **flags: object) -> StreamedRows:
    return data.load_train_eval(
        arguments(folder, *paths, **flags), kind, 0, folder / "out", None, Streaming(length)
    ).train


def asked(rows: object) -> list[str]:
    return [row["prompt"][-1]["content"].removeprefix("<image>") for row in rows]


def in_order(rows: StreamedRows) -> StreamedRows:
    rows.shuffle = False
    return rows.only(lambda row: None)


# ----------------------------------------------------------------------------------------------------------------------
# The rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "saved"])
def test_streamed_rows_are_those_that_are_loaded(folder: Path, name: str) -> None:
    path = write(folder / name, [pair(i, note=f"n{i}") for i in range(5)])
    loaded = data.load_train_eval(arguments(folder, path, streaming=False), "preference", 0).train.to_list()
    rows = in_order(stream(folder, path, length=7))
    found = [rows[i] for i in range(7)]
    expected = [{k: v for k, v in row.items() if v is not None} for row in [*loaded, *loaded[:2]]]  # begins again
    if path.suffix in (".parquet", ""):  # pictures might be bytes
        expected = [row | {"images": [{"bytes": None, "path": row["images"][0]}]} for row in expected]
    assert found == expected and len(rows) == 7 and {*rows.column_names} >= {"images", "responses", "note", "where"}


def test_pictures_as_bytes_are_not_decoded(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((20, 20), 60).save(buffer, "PNG")
    features = datasets.Features(
        {"image": datasets.Image(), **{n: datasets.Value("string") for n in ("prompt", "chosen", "rejected")}}
    )
    rows = [pair(i, image={"bytes": buffer.getvalue(), "path": "x.png"}) for i in range(3)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "a.parquet"))
    assert stream(folder, folder / "a.parquet")[0]["images"] == [{"bytes": buffer.getvalue(), "path": "x.png"}]


def test_conversations_and_pairs_serve_as_prompts(folder: Path) -> None:
    said = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    talks = write(folder / "a.json", [{"image": "0.png", "messages": said, "solution": "x"}])
    (row,) = [stream(folder, talks, kind="prompt", length=1)[0]]
    assert asked([row]) == ["Hi?"] and row["reference"] == "Hello." and row["solution"] == "x" and "messages" not in row
    row = stream(folder, write(folder / "b.json", [pair(0, scores=[2, 1])]), kind="prompt", length=1)[0]
    assert asked([row]) == ["What is 0?"] and not {"responses", "ranks", "scores"} & row.keys()
    with pytest.raises(InputError, match=r"holds conversation rows, which train_sft\.py can train on, not preference"):
        stream(folder, talks)


def test_any_place_can_be_asked_for_and_is_the_same_row(folder: Path) -> None:
    """As ranks, loader workers and resumed runs do."""
    rows = stream(folder, write(folder / "a.jsonl", [pair(i) for i in range(50)]), length=40)
    whole = asked(rows[i] for i in range(40))
    assert asked([rows[30], rows[3], rows[3], rows[4], rows[39], rows[0]]) == [whole[i] for i in (30, 3, 3, 4, 39, 0)]
    assert asked([copy.deepcopy(rows)[17]]) == [whole[17]]
    with pytest.raises(IndexError):
        rows[40]
    for workers in (0, 2):
        loader = DataLoader(rows, batch_size=4, num_workers=workers, collate_fn=asked)
        assert [text for batch in loader for text in batch] == whole


def test_rows_are_drawn_from_a_buffer(folder: Path) -> None:
    path = write(folder / "a.jsonl", [pair(i) for i in range(3 * BUFFER)])
    numbers = [int(text[8:-1]) for text in asked(stream(folder, path, length=BUFFER, check_images="none"))]
    assert len(set(numbers)) == BUFFER and numbers != sorted(numbers) and max(numbers) > BUFFER
    assert all(number <= place + BUFFER for place, number in enumerate(numbers))
    again = stream(folder, path, length=BUFFER, check_images="none")
    assert [int(text[8:-1]) for text in asked(again)] == numbers
    again.seed = 1
    assert [int(text[8:-1]) for text in asked(again.only(lambda row: None))] != numbers


def test_several_sets_get_their_shares(folder: Path) -> None:
    a = write(folder / "a.jsonl", [pair(i) for i in range(100)])
    b = write(folder / "b.jsonl", [pair(i) for i in range(100, 103)])  # begins again
    rows = in_order(stream(folder, a, b, length=40, dataset_weights="3,1"))
    of_b = [int(text[8:-1]) >= 100 for text in asked(rows)]
    assert sum(of_b) == 10 and all(sum(of_b[i : i + 4]) == 1 for i in range(0, 40, 4))
    with pytest.raises(InputError, match="give --dataset_weights"):
        stream(folder, a, b)


def test_evaluation_rows_are_never_training_rows(folder: Path) -> None:
    path = write(folder / "a.jsonl", [pair(i) for i in range(6)])
    held = write(folder / "b.jsonl", [pair(2), pair(4)])
    found = data.load_train_eval(
        arguments(folder, path, eval_data_path=str(held)), "preference", 0, None, None, Streaming(20)
    )
    assert {*asked(found.train)} == {f"What is {i}?" for i in (0, 1, 3, 5)} and len(found.eval) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Rows that cannot be used, flags that cannot work


def test_bad_rows_are_met_by_name_or_left_out_and_listed(folder: Path) -> None:
    bad = [pair(1, image="none.png"), pair(2, chosen=""), pair(3, prompt="<image><image>?")]
    path = write(folder / "a.jsonl", [pair(0), *bad, pair(4)])
    with pytest.raises(InputError, match=r"a\.jsonl, row 1 \(line 2\): names the image .*--on_bad_row drop would"):
        stream(folder, path)
    rows = stream(folder, path, on_bad_row="drop")
    assert {*asked(rows)} == {"What is 0?", "What is 4?"}
    listed = [json.loads(line) for line in (folder / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert ["row 1" in listed[0]["where"], "row 2" in listed[1]["where"], "row 3" in listed[2]["where"]] == [True] * 3
    assert len(listed) == 3 and not any(entry["skipped"] for entry in listed)  # once, however often the file is read
    with pytest.raises(InputError, match="no row can be used"):
        stream(folder, write(folder / "b.jsonl", bad), on_bad_row="drop")
    assert len({*asked(stream(folder, write(folder / "c.jsonl", bad[:1] + [pair(7)]), check_images="none"))}) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_steps -1", "say with --max_steps how long"),
        ("--eval_ratio .2", "--eval_ratio is a share of all rows"),
        ("--data_ratio .5", "--data_ratio is a share of all rows"),
        ("--eval_strategy steps --eval_steps 1", "--eval_strategy needs rows to evaluate on"),
        ("--check_images sample", "--check_images sample is a share"),
        ("--train_sampling_strategy group_by_length", "--train_sampling_strategy group_by_length compares all rows"),
        ("--precompute_ref_log_probs True --use_lora True", "--precompute_ref_log_probs passes over all rows"),
        ("--dataset_name shapes --data_path", "shapes is drawn, not read"),
    ],
)
def test_what_cannot_work_is_refused_by_name(command: Callable, flags: str, message: str) -> None:
    flags = flags if not flags.endswith("--data_path") else f"{flags} x"
    with pytest.raises(InputError, match=message):
        train_dpo.main(command("dpo", f"--streaming True {flags}"))


def test_the_drawn_set_tar_files_and_dynamic_sampling_are_refused(folder: Path, rewards: str) -> None:
    with pytest.raises(InputError, match="shapes is not read from a file"):
        data.load_train_eval(DataArguments("shapes", streaming=True), "preference", 0, None, None, Streaming(5))
    with pytest.raises(InputError, match="is for the training scripts"):
        data.load_train_eval(DataArguments("shapes", streaming=True), "preference", 0)
    flags = dict(
        max_steps=3, per_device_train_batch_size=4, rollouts_per_prompt=2, num_mini_batches=2, reward_fn=[rewards]
    )
    ppo = PPOConfig(output_dir=str(folder), advantage_estimator="rloo", **flags)
    assert data.streaming_of(DataArguments("x", streaming=True), ppo) == (3 * 4 * 2 // 2, True)
    assert data.streaming_of(DataArguments("x"), ppo) is None
    ppo.dynamic_sampling = True
    with pytest.raises(InputError, match="--dynamic_sampling draws further prompts"):
        data.streaming_of(DataArguments("x", streaming=True), ppo)
    dpo = DPOConfig(output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert data.streaming_of(DataArguments("x", streaming=True), dpo) == (24, True)


def test_what_a_loader_worker_says_is_one_sentence(capsys: pytest.CaptureFixture, folder: Path) -> None:
    rows = stream(
        folder, write(folder / "a.jsonl", [pair(0), pair(1), pair(2, chosen="")]), length=9, on_bad_row="drop"
    )
    for own in rows.streams:
        own.data_args.on_bad_row = "error"
    with pytest.raises(SystemExit):
        errors.run(lambda: list(DataLoader(rows, num_workers=1, collate_fn=asked)))
    said = capsys.readouterr().err
    assert "row 2 (line 3): its chosen is empty" in said and "Traceback" not in said


def test_prompts_come_in_order_and_all_of_them() -> None:
    sizes = BatchSizes(micro_prompts=2, micro_batches=2, mini_batches=1, update_prompts=8, update_rollouts=8)
    of_rank = [[*PromptBatches(16, sizes, rank, 0, in_order=True)] for rank in range(2)]
    assert of_rank == [[[0, 1], [2, 3], [8, 9], [10, 11]], [[4, 5], [6, 7], [12, 13], [14, 15]]]


# ----------------------------------------------------------------------------------------------------------------------
# The four scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_resumes_goes_on_with_the_next_rows(
    script: str, command: Callable, tmp_path: Path, rewards: str
) -> None:
    """Four steps, or two and two: the same losses, which differ from step to step and from those of other rows."""
    flags = "--use_lora True --lora_dropout 0 --streaming True --max_steps 4 --save_strategy steps --save_steps 2 "
    flags += "--per_device_train_batch_size 2 "
    flags += {"ppo": f"--reward_fn {rewards} --response_length 4", "sft": "--dataloader_num_workers 1"}.get(script, "")

    def curve(out: Path) -> list[float]:
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        name = "objective/kl" if script == "ppo" else "loss"
        return [entry["grad_norm"] for entry in history if name in entry or "grad_norm" in entry]

    whole = tmp_path / "whole"
    SCRIPTS[script].main(command(script, flags, out=whole))
    before = curve(whole)
    assert len(set(before)) == 4
    (whole / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    SCRIPTS[script].main(command(script, f"{flags} --resume_from_checkpoint True", out=whole))
    assert curve(whole) == before
    run = json.loads((whole / "run.json").read_text())
    assert run["data"]["streaming"] and run["data"]["train_rows"] == 8


def test_streamed_and_loaded_rows_train_alike(command: Callable, tmp_path: Path) -> None:
    """In the order of the file, with the length limits: the same losses."""
    flags = (
        "--use_lora True --lora_dropout 0 --train_sampling_strategy sequential --max_length 60 --max_target_length 3"
    )

    def losses(more: str, out: str) -> list[float]:
        train_dpo.main(command("dpo", f"{flags} {more}", out=tmp_path / out))
        history = json.loads((tmp_path / out / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    assert losses("--streaming True", "streamed") == losses("", "loaded")


def test_rows_beyond_the_limits_and_of_the_processor_are_left_out(folder: Path, llava: str) -> None:
    adapter = core_mapper_for(llava)
    processor = adapter.processor(llava)
    Image.new("RGB", (2100, 2)).save(folder / "images" / "thin.png")
    rows = [pair(0), pair(1, prompt="word " * 300), pair(2, image="thin.png"), pair(3, chosen="<image_soft_token>")]
    path = write(folder / "a.jsonl", rows)
    args = arguments(folder, path, on_bad_row="drop")
    found = data.load_train_eval(args, "preference", 0, folder / "out", ProcessorCheck(processor), Streaming(5)).train
    collator = adapter.dpo_collator(processor, LengthLimits(max_length=100))
    kept, _ = collator.drop_overlong(found)
    assert {*asked(kept)} == {"What is 0?"}
    reasons = [json.loads(line)["reason"] for line in (folder / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [reason.split()[0:2] for reason in reasons] == [
        ["is", "longer"],
        ["has", "a"],
        ["has", "<image_soft_token>"],
    ]
    strict = adapter.dpo_collator(processor, LengthLimits(max_length=100, overlong="error"))
    with pytest.raises(InputError, match=r"row 1 \(line 2\): its prompt of \d+ tokens"):
        strict.drop_overlong(data.load_train_eval(args, "preference", 0, None, None, Streaming(5)).train)[0][3]


def test_a_reward_with_an_answer_key_takes_rows_that_have_one(folder: Path) -> None:
    rows = [{"image": "0.png", "prompt": f"{i}?"} | ({"solution": "1"} if i != 1 else {}) for i in range(3)]
    path = write(folder / "a.jsonl", rows)
    reward = FunctionReward("exact_answer", 1.0, BUILT_IN["exact_answer"])
    found = stream(folder, path, kind="prompt", on_bad_row="drop")
    reward.check_columns(found)
    assert {*asked(found)} == {"0?", "2?"}
    listed = (folder / "out" / "bad_rows.jsonl").read_text()
    assert "row 1 (line 2)" in listed and "has no solution, which the reward exact_answer reads" in listed
    with pytest.raises(InputError, match=r"row 1 \(line 2\): has no solution"):
        strict = stream(folder, path, kind="prompt")
        reward.check_columns(strict)
        asked(strict)


def test_two_ranks_take_the_rows_of_one(folder: Path) -> None:
    """As accelerate hands them out, with and without workers, and after some batches that a resumed run passes over."""
    path = write(folder / "a.jsonl", [pair(i) for i in range(50)])
    whole = asked(in_order(stream(folder, path, length=16)))
    batches = [whole[i : i + 2] for i in range(0, 16, 2)]
    for workers, passed_over in ((0, 0), (1, 0), (0, 3)):
        for rank in range(2):
            rows = in_order(stream(folder, path, length=16))
            loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=asked)
            shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
            shard = skip_first_batches(shard, passed_over) if passed_over else shard
            assert [*shard] == batches[rank::2][passed_over:]
