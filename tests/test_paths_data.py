"""From a file of each format to the rows that a trainer reads: which answer is the better one, what is asked, what is held out."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

import data
import data.files
import data.rlaifv
from args import DataArguments
from tests.test_data import arguments, load, own_cache, write  # noqa: F401  (a fixture)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images/0.png ... 3.png, all different."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (12 + i, 10), (i * 40, 255 - i * 40, 9)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def ranked(row: dict) -> list[str]:
    """The responses of a row, best first."""
    return [text for _, text in sorted(zip(row["ranks"], row["responses"], strict=True))]


RECORDS = {
    "plain_dpo": {"image": "0.png", "prompt": "What?", "chosen": "right", "rejected": "wrong"},
    "rlaifv": {"image": "0.png", "question": "What?", "chosen": "right", "rejected": "wrong"},
    "rlhfv": {"image": "0.png", "text": json.dumps({"question": "What?", "chosen": "right", "rejected": "wrong"})},
    "mmrlhf": {"image": "0.png", "question": "What?", "chosen": "right", "rejected": "wrong"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_chosen_answer_is_the_better_one(folder: Path, name: str) -> None:
    (row,) = load(arguments(folder, name, write(folder / "d.jsonl", [RECORDS[name]]))).train.to_list()
    assert ranked(row) == ["right", "wrong"] and row["ranks"][0] != row["ranks"][1]


@pytest.mark.parametrize(
    "columns",
    [
        {"rankings": [3, 1, 2]},
        {"ranks": [3, 1, 2]},
        {"scores": [0.5, 9, 4]},
        {"ranks": [3, 1, 2], "rankings": [1, 2, 3]},  # `ranks` is the first that is looked for
        {"ranks": [3, 1, 2], "scores": [9, 4, 0.5]},  # and scores do not overrule it
    ],
)
def test_ranks_beside_the_responses_of_mmrlhf(folder: Path, columns: dict) -> None:
    record = {"image": "0.png", "question": "What?", "responses": ["worst", "best", "second"]} | columns
    (row,) = load(arguments(folder, "mmrlhf", write(folder / "d.jsonl", [record]))).train.to_list()
    assert ranked(row) == ["best", "second", "worst"]


def test_the_same_question_about_another_image_is_another_row(folder: Path) -> None:
    """--eval_data_path takes its rows out of training: those with the same images and the same question, no more."""
    rows = [RECORDS["plain_dpo"] | {"image": f"{i}.png"} for i in range(3)]
    rows.append(rows[0] | {"prompt": "Where?"})
    train = write(folder / "train.json", rows)
    held = write(folder / "eval.json", rows[:1])
    splits = load(arguments(folder, "plain_dpo", train, eval_data_path=str(folder / held)))
    assert [Path(row["images"][0]).name for row in splits.train.to_list()] == ["1.png", "2.png", "0.png"]
    assert splits.info["sets"][0]["left_out_as_in_eval_data"] == 1


def test_a_conversation_as_a_prompt_keeps_all_but_its_last_answer(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is this?"},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Red."},
    ]
    file = write(folder / "d.json", [{"image": "0.png", "messages": messages}])
    args = DataArguments(dataset_name=str(folder / file), image_root=str(folder / "images"))
    (row,) = load(args, kind="prompt").train.to_list()
    assert row["prompt"] == messages[:-1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_read_anew_when_the_code_that_made_them_changes(folder: Path, monkeypatch, kind: str) -> None:
    """`datasets` keeps converted rows and knows a converter by its name. It reads parquet itself, whatever our code."""
    path = folder / f"d.{kind}"
    if kind == "parquet":
        Dataset.from_list([RECORDS["rlaifv"]]).to_parquet(path)
    else:
        write(path, [RECORDS["rlaifv"]])
    args = arguments(folder, "rlaifv", path)

    def code_is(state: str) -> None:
        for name in ("data.files", "data.source", "data.verify"):
            monkeypatch.setattr(sys.modules[name], "code_state", lambda: state)

    def responses() -> list[str]:
        return load(args).train[0]["responses"]

    code_is("old")
    assert responses() == ["right", "wrong"]
    preference = data.rlaifv.preference
    monkeypatch.setattr(
        data.rlaifv, "preference", lambda record, asked, texts, ranks: preference(record, asked, ["new", "code"], ranks)
    )
    assert responses() == ["right", "wrong"]  # from the cache
    code_is("new")
    assert responses() == ["new", "code"]


def test_the_code_of_the_loaders_is_what_the_state_covers(tmp_path, monkeypatch) -> None:
    for name in ("rows.py", "rlaifv.py"):
        (tmp_path / name).write_text("one = 1\n")
    monkeypatch.setattr(data.files, "__file__", str(tmp_path / "files.py"))
    before = data.files.code_state()
    assert data.files.code_state() == before
    (tmp_path / "rlaifv.py").write_text("one = 2\n")
    assert data.files.code_state() != before
