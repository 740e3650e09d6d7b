"""Data: every format from a file made here, the checks of rows and files, and the splits."""

import importlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageFile

import data
from args import DataArguments
from common.errors import InputError
from common.threads import map_in_threads
from data.pairs import ordered_pairs
from data.records import json_list
from data.splits import held_out, interleaved, kept

ROOT = Path(__file__).parent.parent
verify = sys.modules["data.verify"]  # `data.verify` is its function


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """A fresh cache, so that nothing of an earlier run is reused."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images/0.png ... 5.png, all different."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (12 + i, 10), (i * 40, 255 - i * 40, 9)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def arguments(folder: Path, name: str, file: str | None, **flags) -> DataArguments:
    flags = {"image_root": str(folder / "images")} | flags
    return DataArguments(dataset_name=name, data_path=file and str(folder / file), **flags)


def write(path: Path, rows: list) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), color).save(buffer, "PNG")
    return buffer.getvalue()


def load(args: DataArguments, kind: str = "preference", out: Path | None = None, seed: int = 0) -> data.DataSplits:
    return data.load_train_eval(args, kind, seed, out)


def pair(i: int, **changes) -> dict:
    row = {"image": f"{i % 6}.png", "prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."}
    return {k: v for k, v in (row | changes).items() if v is not ...}


def talk(i: int, **changes) -> dict:
    turns = [{"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]
    return {k: v for k, v in ({"image": f"{i % 6}.png", "conversations": turns} | changes).items() if v is not ...}


# ----------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_plain_dpo_takes_one_image_several_or_none(folder: Path, suffix: str) -> None:
    rows = [
        pair(0),
        pair(1, image=["1.png", "2.png"], prompt="<image> or <image>?"),
        pair(2, image=...),
        pair(3, image=["3.png"], margin=0.5, scores=[4, 2.5], image_rejected="4.png"),
    ]
    train = load(arguments(folder, "plain_dpo", write(folder / f"d{suffix}", rows))).train
    images = str(folder / "images")
    assert train["images"][:] == [
        [f"{images}/0.png"],
        [f"{images}/1.png", f"{images}/2.png"],
        [],
        [f"{images}/3.png"],
    ]
    assert train[0]["prompt"] == [{"role": "user", "content": "<image>What is 0?"}]  # no mark: the image goes first
    assert train[1]["prompt"][0]["content"] == "<image> or <image>?"
    assert train[2]["prompt"][0]["content"] == "What is 2?"
    assert (train[0]["responses"], train[0]["ranks"]) == (["It is 0.", "No idea."], [0.0, 1.0])
    assert (train[3]["margin"], train[3]["scores"], train[3]["image_rejected"]) == (0.5, [4.0, 2.5], f"{images}/4.png")
    assert train[0]["scores"] is None and "severity" not in train.column_names
    assert "row 2" in train[2]["where"] and f"d{suffix}" in train[2]["where"]


def test_preference_prompt_has_system_and_earlier_turns(folder: Path) -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is this?"},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ]
    unmarked = [
        prompt[0],
        prompt[1] | {"content": "What is this?"},
        *prompt[2:],
    ]  # images stand before the first question
    rows = [pair(0, prompt=prompt), pair(0, prompt=unmarked)]
    train = load(arguments(folder, "plain_dpo", write(folder / "d.json", rows))).train
    assert train["prompt"][:] == [prompt, prompt]


@pytest.mark.parametrize("name", ["vlquery_json", "llava_instruct"])
def test_conversations_of_several_turns(folder: Path, name: str) -> None:
    turns = [("human", "Look.\n<image>"), ("gpt", "Yes."), ("user", "And now?"), ("assistant", "No.")]
    conversation = [{"from": role, "value": value} for role, value in turns]
    system = [{"from": "system", "value": "Be kind."}, *conversation]
    rows = [talk(0, id="a", conversations=conversation), talk(1, image=["1.png"], conversations=system), talk(2)]
    rows[2] = {"id": "text", "conversations": conversation[2:]}
    train = load(arguments(folder, name, write(folder / "d.json", rows)), "conversation").train
    assert [m["role"] for m in train[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert train[0]["messages"][0]["content"] == "Look.\n<image>"
    assert train[1]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert train[2]["images"] == []


def vlfeedback(ratings: list[list[str]], as_list: bool = False) -> dict:
    aspects = ["Helpfulness", "Visual Faithfulness", "Ethical Considerations"]
    annotations = [{a: {"Rating": r, "Rationale": "x"} for a, r in zip(aspects, rs, strict=True)} for rs in ratings]
    texts, models = [f"answer {i}" for i in range(len(ratings))], ["m"] * len(ratings)
    if as_list:
        return [
            {"annotations": a, "response": r, "model": m} for a, r, m in zip(annotations, texts, models, strict=True)
        ]
    return {"annotations": annotations, "response": texts, "model": models}


VLFEEDBACK_ROWS = [
    {"prompt": "four", "completions": vlfeedback([["5", "4", "3"], ["2", "2", "2"], ["4", "4", "4"], ["1", "1", "1"]])},
    {"prompt": "no number", "completions": vlfeedback([["5", "4", "3"], ["N/A", "2", "2"], ["1", "1", "1"]])},
    {"prompt": "all tied", "completions": vlfeedback([["3", "3", "3"], ["3", "3", "3"], ["2", "3", "4"]])},
    {"prompt": "one rated", "completions": vlfeedback([["3", "3", "3"], ["N/A", "3", "3"]])},
]


def test_vlfeedback_parquet_with_ties_and_ratings_that_are_no_numbers(folder: Path) -> None:
    rows = [row | {"image": {"bytes": png((i, 0, 0)), "path": None}} for i, row in enumerate(VLFEEDBACK_ROWS)]
    features = datasets.Dataset.from_list(rows).features
    features["image"] = datasets.Image()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "v.parquet")
    found = load(arguments(folder, "vlfeedback_paired", "v.parquet", image_root=None), out=folder / "out")
    assert len(found.train) == 2  # the others hold no preference: the format leaves them out, and they are counted
    assert (found.info["sets"][0]["skipped"], found.info["sets"][0]["bad"]) == (2, 0)
    first, second = found.train
    assert first["ranks"] == [0.0, 1.0, 0.0, 2.0] and first["scores"] == [4.0, 2.0, 4.0, 1.0]
    assert second["responses"] == ["answer 0", "answer 2"] and second["scores"] == [4.0, 1.0]
    assert Image.open(io.BytesIO(first["images"][0]["bytes"])).size == (9, 9)
    listed = [json.loads(line) for line in (folder / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [entry["skipped"] for entry in listed] == [True, True] and "row 2" in listed[0]["where"]


def test_vlfeedback_json_lines_and_score_margin(folder: Path) -> None:
    rows = [dict(VLFEEDBACK_ROWS[0], img_path="1.png"), dict(VLFEEDBACK_ROWS[1], img_path="2.png")]
    rows[1]["completions"] = vlfeedback([["5", "5", "4"], ["4", "4", "4"]], as_list=True)
    file = write(folder / "v.jsonl", rows)
    assert len(load(arguments(folder, "vlfeedback_paired", file)).train) == 2
    far = load(arguments(folder, "vlfeedback_paired", file, score_margin=1.0, pairs="score_margin"))
    assert far.train["prompt"][0][0]["content"] == "<image>four" and len(far.train) == 1
    assert far.info["sets"][0]["skipped"] == 1
    assert len(load(arguments(folder, "vlfeedback_paired", file, score_margin=-1.0)).train) == 2


def test_a_row_without_a_pair_of_the_flags_is_skipped(folder: Path) -> None:
    """Scores 3, 2 and 1: no neighbours are 1.5 apart, and the best and the worst are."""
    rows = [
        {"image": f"{i}.png", "question": "Q?", "responses": ["a", "b", "c"], "scores": scores}
        for i, scores in enumerate(([3, 2, 1], [9, 2, 1]))
    ]
    file = write(folder / "r.jsonl", rows)
    kept_with = {
        pairs: load(arguments(folder, "mmrlhf", file, score_margin=1.5, pairs=pairs)).info["sets"][0]["train"]
        for pairs in ("all", "adjacent")
    }
    assert kept_with == {"all": 2, "adjacent": 1}


@pytest.mark.parametrize("look", [True, False])
def test_keys_of_rows(folder: Path, look: bool) -> None:
    """What makes another group, whose rows are held out together, and what another row, of which run.json has the sum."""
    asked = [{"role": "user", "content": "<image>What is  it?"}]
    first, second = (str(folder / "images" / f"{i}.png") for i in (0, 1))
    row = {"images": [first], "prompt": asked, "responses": ["a", "b"], "ranks": [0.0, 1.0], "problem": None}

    def keys(kind: str = "preference", **changed) -> tuple[int, int]:
        pairs = "all" if kind == "preference" else None
        verdict = verify.verify_row(row | changed, kind, "/", True, pairs, None, look=look)
        assert verdict.problem is None
        return verdict.group, verdict.content

    group, content = keys()
    assert keys(severity=[0.0, 1.0]) == (group, content)
    for changed in ({"responses": ["a", "c"]}, {"ranks": [1.0, 0.0]}, {"image_rejected": second}):
        assert keys(**changed)[0] == group and keys(**changed)[1] != content, changed
    assert keys("prompt", reference="a") != keys("prompt", reference="b")
    labels = [keys("unpaired", responses=["a"], label=label) for label in (True, False)]
    assert labels[0][0] == labels[1][0] == group and labels[0][1] != labels[1][1]
    spaced = keys(prompt=[{"role": "user", "content": "What is it? <image>"}])
    assert spaced[0] == group and spaced[1] != content  # the same question about the same image
    for changed in ({"images": [second]}, {"prompt": [{"role": "user", "content": "<image>What is that?"}]}):
        assert keys(**changed)[0] != group, changed
    unscored = verify.verify_row(row, "preference", "/", True, "all", 0.0, look=False)
    assert "has ranks and no scores" in unscored.problem and not unscored.skipped


def test_rlhfv_reads_json_in_a_column(folder: Path) -> None:
    text = {"question": "Q?", "chosen": "good", "rejected": "bad"}
    rows = [
        {
            "ds_name": "d",
            "image": {"bytes": png((0, i, 0)), "path": "x.png"},
            "text": json.dumps(text if i != 1 else "no object"),
            "origin_dataset": "o",
            "origin_split": "{}",
            "idx": i,
            "image_path": "gone/x.png",
        }
        for i in range(3)
    ]
    hub = folder / "RLHF-V-Dataset"
    (hub / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(
        hub / "data" / "train-00000-of-00001.parquet"
    )
    with pytest.raises(InputError, match=r"row 1: has a `text` that is not an object"):
        load(arguments(folder, "rlhfv", "RLHF-V-Dataset", image_root=None))
    found = load(arguments(folder, "rlhfv", "RLHF-V-Dataset", image_root=None, on_bad_row="drop"))
    assert len(found.train) == 2
    assert found.train[0]["prompt"] == [{"role": "user", "content": "<image>Q?"}]
    assert found.train[0]["responses"] == ["good", "bad"]


def test_rlaifv_parquet(folder: Path) -> None:
    row = {"image": {"bytes": png((1, 2, 3)), "path": "a.jpg"}, "question": "Q?", "chosen": "good", "rejected": "bad"}
    datasets.Dataset.from_list([row | {"idx": "1", "origin_dataset": "o"}]).to_parquet(folder / "r.parquet")
    train = load(arguments(folder, "rlaifv", "r.parquet")).train
    assert train[0]["responses"] == ["good", "bad"] and train[0]["images"][0]["bytes"] == png((1, 2, 3))


def test_parquet_text_that_is_not_utf8_names_the_row(folder: Path) -> None:
    row = {"image": "0.png", "question": "Q?", "chosen": "a word to find", "rejected": "bad"}
    table = pyarrow.Table.from_pylist([row | {"chosen": "good"}] * 2 + [row])
    pyarrow.parquet.write_table(table, folder / "r.parquet", compression="none")
    content = (folder / "r.parquet").read_bytes()
    (folder / "r.parquet").write_bytes(content.replace(b"a word to find", b"a word to \xff\xfe\xfd\xfc"))
    with pytest.raises(InputError, match=r"r\.parquet, row 2: a text is not UTF-8"):
        load(arguments(folder, "rlaifv", "r.parquet"))


def test_mmrlhf_pairs_ranked_responses_and_video(folder: Path) -> None:
    rows = [
        {"image": "0.png", "prompt": "Q?", "chosen": "good", "rejected": "bad"},
        {"image": "1.png", "question": "Q?", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
        {
            "image": "2.png",
            "question": "Q?",
            "responses": [{"response": "a", "score": 1}, {"response": "b", "score": 3}],
        },
        {"video": "video/7.mp4", "question": "Q?", "chosen": "good", "rejected": "bad"},
        {"video": "video/8.mp4", "question": "Q?", "chosen": "good", "rejected": "bad"},
    ]
    file = write(folder / "m.jsonl", rows)
    with pytest.raises(
        InputError, match=r"^2 of 5 rows .* row 3 \(line 4\): names the video .*video/7\.mp4, which does not exist"
    ):
        load(arguments(folder, "mmrlhf", file))
    found = load(arguments(folder, "mmrlhf", file, on_bad_row="drop"))
    assert found.info["sets"][0]["bad"] == 2
    assert found.train["ranks"][:] == [[0.0, 1.0], [2.0, 1.0, 2.0], [1.0, 0.0]]


def test_any_other_name_is_a_path_in_trl_format(folder: Path) -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}
    good, bad = ({"role": "assistant", "content": [{"type": "text", "text": t}]} for t in ("good", "bad"))
    rows = [{"images": ["0.png"], "prompt": [user], "chosen": [good], "rejected": [bad]}] * 2
    write(folder / "t.jsonl", rows)
    train = load(arguments(folder, str(folder / "t.jsonl"), None)).train
    assert train[0]["prompt"] == [{"role": "user", "content": "<image>Q?"}]
    assert train[0]["responses"] == ["good", "bad"]
    write(folder / "i.jsonl", [{"images": ["0.png"], "chosen": [user, good], "rejected": [user, bad]}])
    assert load(arguments(folder, str(folder / "i.jsonl"), None)).train[0]["prompt"] == train[0]["prompt"]

    parts = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "Hi"}, good | {"content": "Hello"}]}])
    picture = [[{"bytes": png((5, 5, 5)), "path": None}]]
    hub = parts.add_column("images", picture).cast_column("images", datasets.List(datasets.Image()))
    (folder / "hub" / "data").mkdir(parents=True)
    hub.to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    train = load(arguments(folder, str(folder / "hub"), None, image_root=None), "conversation").train
    assert train[0]["messages"][0]["content"] == "<image>Hi" and train[0]["images"][0]["bytes"] == png((5, 5, 5))
    hub.save_to_disk(str(folder / "saved"))
    assert (
        load(arguments(folder, str(folder / "saved"), None), "conversation").train[0]["messages"]
        == train[0]["messages"]
    )

    write(folder / "p.json", [{"image": "0.png", "prompt": "Q?", "reference": "A"}])
    assert load(arguments(folder, str(folder / "p.json"), None), "prompt").train[0]["reference"] == "A"
    write(folder / "c.json", [{"image": "0.png", "prompt": "Q?", "completion": "A"}])
    train = load(arguments(folder, str(folder / "c.json"), None), "conversation").train
    assert train[0]["messages"][-1] == {"role": "assistant", "content": "A"}
    with pytest.raises(InputError, match="has the columns answer, question"):
        load(arguments(folder, str(folder / write(folder / "x.json", [{"question": "a", "answer": "b"}])), None))


def test_a_users_loader_is_checked_like_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "images": ["0.png"],
            "prompt": [{"role": "user", "content": "Q?"}],
            "responses": ["a", "b"],
            "ranks": [0.0, 1.0],
        }
    ]
    rows += [rows[0] | {"images": ["gone.png"]}]
    monkeypatch.setitem(data.DATASET_MAP, "mine", lambda data_args: datasets.Dataset.from_list(rows))
    with pytest.raises(InputError, match=r"mine, row 1: names the image .*gone\.png, which does not exist"):
        load(arguments(folder, "mine", None))
    found = load(arguments(folder, "mine", None, on_bad_row="drop"))
    assert found.train[0]["prompt"][0]["content"] == "<image>Q?" and len(found.train) == 1


def test_preference_and_conversation_rows_serve_as_prompts(folder: Path) -> None:
    train = load(arguments(folder, "plain_dpo", write(folder / "d.json", [pair(0), pair(1)])), "prompt").train
    assert train[0]["prompt"][0]["content"] == "<image>What is 0?" and "responses" not in train.column_names
    train = load(arguments(folder, "vlquery_json", write(folder / "t.json", [talk(0), talk(1)])), "prompt").train
    assert train[1]["prompt"] == [{"role": "user", "content": "<image>\nWhat is 1?"}]
    assert train[1]["reference"] == "It is 1."
    with pytest.raises(
        InputError,
        match=r"holds preference rows \(of the columns chosen, image, prompt, rejected\), which train_dpo\.py and train_rm\.py can",
    ):
        load(arguments(folder, "plain_dpo", "d.json"), "conversation")


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def turns(*roles: str) -> list[dict]:
    return [{"from": role, "value": f"text {i}"} for i, role in enumerate(roles)]


BAD_PAIRS = {
    "missing column": (pair(0, chosen=...), r"has no `chosen` \(it has image, prompt, rejected\)"),
    "null": (pair(0, prompt=None), "has no `prompt`"),
    "empty prompt": (pair(0, prompt=" \n"), "its `prompt` is empty"),
    "empty response": (pair(0, rejected=""), "its rejected is empty"),
    "same responses": (pair(0, rejected=" It is 0."), "same text as chosen and as rejected"),
    "number as text": (pair(0, chosen=3), "its chosen is a number, not a text"),
    "list as text": (pair(0, rejected=["a"]), "its rejected is a list, not a text"),
    "surrogate": (pair(0, chosen="\ud800"), r"half a character \(\\ud800"),
    "huge": (pair(0, chosen="a" * 1_000_001), "1,000,001 characters"),
    "too many marks": (pair(0, prompt="<image><image>Q?"), "has 2 <image> marks and 1 image"),
    "mark without image": (pair(0, image=..., prompt="<image>Q?"), "has 1 <image> mark and 0 images"),
    "mark in response": (pair(0, chosen="see <image>"), "has an <image> mark in its chosen"),
    "image is a number": (pair(0, image=7), "its `image` is a number"),
    "image is an object": (pair(0, image={"file": "x"}), "neither bytes nor a path"),
    "no name": (pair(0, image=""), "its `image` is an empty name"),
    "two image columns": (pair(0, images=["1.png"]), "has both `image` and `images`"),
    "no file": (pair(0, image="gone.png"), r"gone\.png, which does not exist: check --image_root"),
    "folder": (pair(0, image="."), "lies outside of --image_root|which is a folder"),
    "url": (pair(0, image="https://a.b/c.png"), "by URL: download it first"),
    "data url": (pair(0, image="data:image/png;base64,AAAA"), "by URL: download it first"),
    "parent": (pair(0, image="../secret.png"), "lies outside of --image_root"),
    "absolute": (pair(0, image="/etc/hostname"), "lies outside of --image_root"),
    "zero character": (pair(0, image="a\0b.png"), "zero character"),
    "margin": (pair(0, margin="much"), "its `margin` is a text, not a number"),
    "scores": (pair(0, scores=[1, 2, 3]), "its `scores` must be a list of 2 numbers"),
    "infinite": (pair(0, scores=[1, 10**400]), "not a finite number"),
    "no object": ([1, 2], "is a list, not an object"),
    "no prompt turn": (pair(0, prompt=[{"role": "system", "content": "x"}]), "must end with one of user"),
    "prompt ends wrong": (pair(0, prompt=turns("user", "assistant")), "ends with a message of assistant"),
}
BAD_TALKS = {
    "same role twice": (talk(0, image=..., conversations=turns("user", "user", "gpt")), "role user in message 1 where"),
    "assistant first": (talk(0, image=..., conversations=turns("gpt", "human")), "role assistant in message 0"),
    "no answer": (talk(0, image=..., conversations=turns("human")), "it must end with one of assistant"),
    "late system": (talk(0, image=..., conversations=turns("user", "system")), "role system in message 1"),
    "unknown role": (talk(0, conversations=turns("robot", "gpt")), "has the role 'robot'"),
    "no messages": (talk(0, conversations=[]), "must be a list of messages"),
    "text for messages": (talk(0, conversations="hello"), "must be a list of messages"),
    "message is a text": (talk(0, conversations=["hello"]), r"conversations\[0\] is a text"),
    "no value": (talk(0, conversations=[{"from": "user"}]), r"has no `conversations\[0\].value`"),
    "mark in answer": (
        talk(0, image=..., conversations=[*turns("user"), {"from": "gpt", "value": "<image>"}]),
        "mark in message 1, of assistant",
    ),
    "video part": (
        talk(
            0, conversations=[{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "A."}]
        ),
        "names <video> in the text of message 0",
    ),
    "audio part": (
        talk(0, conversations=[{"role": "user", "content": [{"type": "audio"}]}]),
        "has the type 'audio': only text, image and video parts",
    ),
}


def test_every_bad_row_is_refused_with_its_reason(folder: Path) -> None:
    for name, cases, good, kind in (
        ("plain_dpo", BAD_PAIRS, pair, "preference"),
        ("vlquery_json", BAD_TALKS, talk, "conversation"),
    ):
        rows = [good(0), *(row for row, _ in cases.values()), good(1)]
        file = write(folder / f"{name}.jsonl", rows)
        out = folder / name
        with pytest.raises(InputError, match=f"^{len(cases)} of {len(rows)} rows cannot be used .*bad_rows.jsonl"):
            load(arguments(folder, name, file), kind, out)
        listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
        for i, ((label, (_, reason)), entry) in enumerate(zip(cases.items(), listed, strict=True), start=1):
            assert f"{file}, row {i} (line {i + 1})" in entry["where"], label
            assert re.search(reason, entry["reason"]), (label, entry["reason"])
        found = load(arguments(folder, name, file, on_bad_row="drop"), kind, out)
        assert len(found.train) == 2 and found.info["sets"][0]["bad"] == len(cases)


def test_one_bad_row_is_one_sentence_with_file_row_and_mend(folder: Path) -> None:
    file = write(folder / "d.json", [pair(0), pair(1, rejected="")])
    with pytest.raises(InputError) as error:
        load(arguments(folder, "plain_dpo", file))
    assert str(error.value) == (
        f"{folder}/d.json, row 1 (line 8): its rejected is empty: fill it in or take the row out. Rows count from 0. "
        "--on_bad_row drop would leave the row out."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt" "b"}]', "line 2, column 12, in row 1"),
        ('[{"prompt": "a"}\n', "line 2, column 1, in row 1 .*ends too early"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "column 18, in row 1 .*a comma or"),
        ('[{"prompt": "a"}] x', "column 19.*text follows"),
        ('[{"prompt": "a]', "column 13, in row 0 .*Unterminated"),
        ('[{"prompt": "a"},]', "line 1, column 18, in row 1"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "row 0 .*4300 digits"),
    ],
)
def test_json_list_that_does_not_parse_names_line_and_column(folder: Path, text: str, message: str) -> None:
    (folder / "d.json").write_text(text)
    for on_bad_row in ("error", "drop"):  # what follows cannot be read, so there is nothing to drop
        with pytest.raises(InputError, match=message):
            load(arguments(folder, "plain_dpo", "d.json", on_bad_row=on_bad_row))


def test_json_lines_that_do_not_parse_are_bad_rows(folder: Path) -> None:
    good = json.dumps(pair(0)).encode()
    lines = [good, b'{"prompt" "b"}', b'{"prompt": "\xff"}', b"", b"[" * 100_000, b"9" * 5000, b"null", good]
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found = load(arguments(folder, "plain_dpo", "d.jsonl", on_bad_row="drop"), out=folder)
    assert len(found.train) == 2
    reasons = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert "row 1 (line 2)" in reasons[0]["where"] and "line 2, column 11" in reasons[0]["reason"]
    assert "not UTF-8 (byte 0xff at column 13)" in reasons[1]["reason"]
    assert "row 3 (line 5)" in reasons[2]["where"] and "nested too deeply" in reasons[2]["reason"]
    assert len(reasons) == 5


def test_json_list_is_read_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [v for i in range(40) for v in ({"t": 'é"\\ ] }\n,' * i}, [i], i * 7, f"[{i}", None, 1.5e10)]
    (folder / "d.json").write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    for size in (1, 3, 64, 1 << 20):
        monkeypatch.setattr("data.records._CHUNK_CHARS", size)
        records = list(json_list(str(folder / "d.json")))
        assert [json.loads(record["text"]) for record in records] == values
    text = (folder / "d.json").read_text(encoding="utf-8").split("\n")
    assert all(text[r["line"] - 1].strip().startswith(r["text"].split("\n")[0][:5]) for r in records)
    for empty in ("[]", " [ ] \n"):
        (folder / "e.json").write_text(empty)
        assert list(json_list(str(folder / "e.json"))) == []


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("plain_dpo", "gone.json", "gone.json does not exist"),
        ("plain_dpo", None, "needs --data_path"),
        ("plain_dpo", "d.txt", "is neither JSON .* nor CSV or TSV"),
        ("rlaifv", "broken.parquet", "broken.parquet cannot be read"),
        ("./gone", None, "--dataset_name ./gone does not exist"),
        ("plain_dpo", "images", "is a folder without parquet, JSON"),
        ("plain_dpo", "empty.json", "holds no rows"),
    ],
)
def test_files_that_cannot_be_read(folder: Path, name: str, file: str | None, message: str) -> None:
    (folder / "d.txt").write_text("x")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (folder / "empty.json").write_text("[]")
    with pytest.raises(InputError, match=message):
        load(arguments(folder, name, file))


def test_unknown_name_without_network_is_one_sentence(folder: Path) -> None:
    with pytest.raises(InputError, match=r"Data set nobody/nothing is neither a known name, nor a local path"):
        load(DataArguments(dataset_name="nobody/nothing"))


def test_image_root_must_be_a_folder(folder: Path) -> None:
    file = write(folder / "d.json", [pair(0)])
    with pytest.raises(InputError, match="is not a folder"):
        load(arguments(folder, "plain_dpo", file, image_root=str(folder / "gone")))
    write(folder / "images" / "beside.json", [pair(0)])  # without the flag: the folder of the file
    assert len(load(arguments(folder, "plain_dpo", "images/beside.json", image_root=None)).train) == 1


def test_paths_that_leave_the_image_root(folder: Path) -> None:
    secret = folder / "secret"
    secret.mkdir()
    shutil.copy(folder / "images" / "0.png", secret / "s.png")
    (folder / "images" / "link.png").symlink_to(secret / "s.png")
    (folder / "images" / "linked").symlink_to(secret)
    (folder / "images" / "inside.png").symlink_to("1.png")
    shutil.copytree(secret, folder / "images-2")  # another folder whose name begins with the same letters
    names = [
        "link.png",
        "linked/s.png",
        "../secret/s.png",
        str(secret / "s.png"),
        "../images-2/s.png",
        "a/../../secret/s.png",
    ]
    fine = ["inside.png", "./2.png", str(folder / "images" / "3.png"), "../images/4.png"]
    file = write(folder / "d.json", [pair(i, image=name) for i, name in enumerate([*names, *fine])])
    found = load(arguments(folder, "plain_dpo", file, on_bad_row="drop"), out=folder)
    assert len(found.train) == len(fine)
    reasons = [json.loads(line)["reason"] for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert len(reasons) == len(names) and all("outside of --image_root" in reason for reason in reasons)
    assert len(load(arguments(folder, "plain_dpo", file, allow_outside_image_root=True)).train) == len(names) + len(
        fine
    )


def test_images_are_checked_without_being_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder / "images"
    for format in ("JPEG", "WEBP", "GIF", "PNG"):
        Image.effect_noise((200, 150), 60).convert("RGB").save(images / f"whole.{format}", format)
        whole = (images / f"whole.{format}").read_bytes()
        (images / f"cut.{format}").write_bytes(whole[: len(whole) * 2 // 3])
        (images / f"padded.{format}").write_bytes(whole + b"\0" * 100)
    (images / "zero.png").touch()
    (images / "text.png").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    Image.new("1", (10_000, 9_500)).save(images / "large.png")  # above our limit, below Pillow's
    damaged = bytearray((images / "whole.PNG").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (images / "damaged.png").write_bytes(damaged)
    os.mkfifo(images / "pipe.png")  # opening it would wait forever
    decoded: list[str] = []
    original = ImageFile.ImageFile.load

    def watched(self: ImageFile.ImageFile):
        if self.fp is not None:  # not yet loaded
            decoded.append(self.fp.name)
        return original(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    names = sorted(path.name for path in images.iterdir())
    file = write(folder / "d.json", [pair(i, image=name) for i, name in enumerate(names)])
    found = load(arguments(folder, "plain_dpo", file, on_bad_row="drop"), out=folder)
    refused = {
        names[int(json.loads(line)["where"].split("row ")[1].split()[0])]: json.loads(line)["reason"]
        for line in (folder / "bad_rows.jsonl").read_text().splitlines()
    }
    bad = {f"cut.{f}" for f in ("JPEG", "WEBP", "GIF", "PNG")}
    bad |= {"zero.png", "text.png", "bomb.png", "large.png", "damaged.png", "pipe.png"}
    assert set(refused) == bad
    assert "0 bytes" in refused["zero.png"] and "Pillow's limit" in refused["large.png"]
    assert "no regular file" in refused["pipe.png"] and "broken or cut off" in refused["cut.JPEG"]
    # Only pictures with an unusual end were decoded to be certain.
    assert {Path(name).name for name in decoded} == {f"cut.{f}" for f in ("JPEG", "GIF", "PNG")}
    assert len(found.train) == len(names) - len(bad)


def test_an_image_that_was_put_there_later_is_seen(folder: Path) -> None:
    args = arguments(folder, "plain_dpo", write(folder / "d.json", [pair(0), pair(1, image="late.png")]))
    with pytest.raises(InputError, match=r"late\.png, which does not exist"):
        load(args)
    shutil.copy(folder / "images" / "2.png", folder / "images" / "late.png")
    assert len(load(args).train) == 2  # the file of rows has not changed, but the cached result is checked again


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(folder, "plain_dpo", write(folder / "d.json", [pair(0)]))
    first = load(args).train
    monkeypatch.setattr("data.files.json_list", lambda path: pytest.fail("read again"))
    assert load(args).train[:] == first[:]
    monkeypatch.undo()
    write(folder / "d.json", [pair(3)])
    assert load(args).train[0]["prompt"][0]["content"] == "<image>What is 3?"


def test_a_file_is_asked_for_its_state_once_for_all_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    states = {"": None, "a": (1, 2), "b": (3, 4), "c": None}
    monkeypatch.setattr(verify, "size_and_time", lambda path: asked.append(path) or states[path])
    rows = {"images": [["b", "a"], ["a"], [], ["b"]] * 50, "image_rejected": ["a", None, "", "c"] * 50}
    state = verify._state_of_files(datasets.Dataset.from_dict(rows), "all")
    assert sorted(asked) == ["a", "b", "c"]
    states["b"] = (3, 5)
    assert verify._state_of_files(datasets.Dataset.from_dict(rows), "all") != state


@pytest.mark.parametrize(("items", "tasks"), [(0, 0), (1, 1), (64, 1), (65, 2), (300, 5)])
def test_threads_share_a_task_among_64_items(items: int, tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted, submit = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda pool, *task: submitted.append(task) or submit(pool, *task))
    found = map_in_threads(lambda i: time.sleep(0.002 * (i % 64 == 0)) or i * i, range(0, 2 * items, 2))
    assert [*found] == [4 * i * i for i in range(items)] and len(submitted) == tasks


# ----------------------------------------------------------------------------------------------------------------------
# Splits and mixtures


def contents(rows: datasets.Dataset) -> set[tuple[bytes, str]]:
    return {(Path(row["images"][0]).read_bytes(), row["prompt"][0]["content"]) for row in rows}


def test_evaluation_rows_are_never_training_rows_by_content(folder: Path) -> None:
    for i in range(6):  # the same pictures under other names
        shutil.copy(folder / "images" / f"{i}.png", folder / "images" / f"copy{i}.png")
    rows = [pair(i % 60, image=f"{'copy' if i % 2 else ''}{i % 6}.png", chosen=f"answer {i}") for i in range(240)]
    args = arguments(folder, "plain_dpo", write(folder / "d.json", rows), eval_ratio=0.25)
    train, held, info = load(args)
    assert not contents(train) & contents(held)
    assert len(train) + len(held) == 240 and abs(len(held) - 60) <= 4
    assert (info["train_rows"], info["eval_rows"]) == (len(train), len(held))
    again, other = load(args), load(args, seed=1)
    assert again.eval["where"][:] == held["where"][:] and again.info == info
    assert other.eval["where"][:] != held["where"][:]

    small = load(arguments(folder, "plain_dpo", "d.json", eval_ratio=0.25, data_ratio=0.3))
    assert len(small.train) + len(small.eval) == 72
    assert set(small.eval["where"]) <= set(held["where"]) and set(small.train["where"]) <= set(train["where"])


def test_eval_data_path_takes_its_rows_out_of_training(folder: Path) -> None:
    shutil.copy(folder / "images" / "1.png", folder / "images" / "same_as_1.png")
    write(folder / "d.json", [pair(i) for i in range(6)])
    write(folder / "e.json", [pair(1, image="same_as_1.png", chosen="another answer"), pair(77)])
    splits = load(arguments(folder, "plain_dpo", "d.json", eval_data_path=str(folder / "e.json")))
    assert [row["prompt"][0]["content"] for row in splits.eval] == ["<image>What is 1?", "<image>What is 77?"]
    assert len(splits.train) == 5 and splits.info["sets"][0]["left_out_as_in_eval_data"] == 1
    with pytest.raises(InputError, match="all usable ones are evaluation rows"):
        load(arguments(folder, "plain_dpo", "d.json", eval_data_path=str(folder / "d.json")))
    with pytest.raises(InputError, match="give one of them"):
        load(arguments(folder, "plain_dpo", "d.json", eval_data_path=str(folder / "e.json"), eval_ratio=0.5))


def test_held_out_keeps_groups_whole_for_any_sizes() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        groups = rng.integers(-3, rng.integers(1, 50), size=rng.integers(4, 200))
        if len(np.unique(groups)) < 2:
            continue
        ratio = rng.uniform(0.01, 0.6)
        held = held_out(groups, ratio, seed=trial)
        assert not np.isin(groups[held], groups[~held]).any()
        smallest = np.unique(groups, return_counts=True)[1].min()
        assert 0 < held.sum() <= max(round(ratio * len(groups)), smallest)
        order = rng.permutation(len(groups))
        assert set(groups[order][held_out(groups[order], ratio, seed=trial)]) == set(groups[held])


def test_held_out_rows_stay_when_rows_are_added() -> None:
    groups = np.random.default_rng(0).integers(-(2**62), 2**62, size=2200)
    before = set(groups[:2000][held_out(groups[:2000], 0.1, seed=0)])
    after = set(groups[held_out(groups, 0.1, seed=0)])
    assert len(before & after) > 190 and len(before) == 200 and len(after) == 220
    assert len(set(groups[held_out(groups, 0.1, seed=1)]) & after) < 60  # another seed, other rows


def test_data_ratio_is_nested_and_has_the_right_size() -> None:
    half, tenth = kept(1000, 0.5, seed=3), kept(1000, 0.1, seed=3)
    assert half.sum() == 500 and tenth.sum() == 100 and not (tenth & ~half).any()
    assert kept(3, 0.01, seed=0).sum() == 1 and kept(7, 1.0, seed=0).all()
    assert (half != kept(1000, 0.5, seed=4)).any() and 150 < half[:500].sum() < 350  # from anywhere in the file


def test_interleaving_follows_the_weights_and_is_even() -> None:
    order = interleaved([30, 10], None, seed=0)
    assert sorted(order) == list(range(40))
    assert all((order[i : i + 8] >= 30).sum() == 2 for i in range(0, 40, 8))
    mixed = interleaved([1000, 50], [0.7, 0.3], seed=0)
    assert len(mixed) == 1050 and (mixed >= 1000).sum() == 315
    assert set(mixed[mixed >= 1000]) == set(range(1000, 1050))  # the small set repeats, every row of it is used
    assert len(set(mixed[mixed < 1000])) == 735  # the large one is drawn without repeating
    small = mixed[mixed >= 1000]
    assert (
        sorted(small[:50]) == sorted(small[50:100]) and (small[:50] != small[50:100]).any()
    )  # each time in another order
    assert (mixed == interleaved([1000, 50], [7, 3], seed=0)).all()
    assert (mixed != interleaved([1000, 50], [0.7, 0.3], seed=1)).any()
    for window in range(0, 1000, 100):
        assert abs((mixed[window : window + 100] >= 1000).sum() - 30) <= 1
    assert interleaved([0, 4], None, seed=0).tolist() == [0, 1, 2, 3]


def test_two_sets_one_of_text_one_of_bytes_in_one_run(folder: Path) -> None:
    write(folder / "a.json", [pair(i) for i in range(6)])
    write(folder / "t.json", [pair(i, image=..., margin=1.0) for i in range(3)])
    row = {"image": {"bytes": png((1, 2, 3)), "path": "a.jpg"}, "question": "Q?", "chosen": "good", "rejected": "bad"}
    datasets.Dataset.from_list([row]).to_parquet(folder / "r.parquet")
    args = DataArguments(
        dataset_name="plain_dpo,plain_dpo,rlaifv",
        data_path=f"{folder}/a.json,{folder}/t.json,{folder}/r.parquet",
        image_root=str(folder / "images"),
    )
    train = load(args).train
    assert len(train) == 10 and sorted(set(train["source"])) == ["plain_dpo", "rlaifv"]
    assert sorted(len(images) for images in train["images"]) == [0] * 3 + [1] * 7
    kinds = {(image["bytes"] is None, image["path"] is None) for images in train["images"] for image in images}
    assert kinds == {(True, False), (False, False)}
    assert sorted(m for m in train["margin"] if m is not None) == [1.0] * 3
    args.dataset_weights = ".5,.3,.2"
    weighted = load(args)
    assert [s["drawn_per_epoch"] for s in weighted.info["sets"]] == [5, 3, 2]
    assert load(args).train[:] == weighted.train[:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_weights": "1,2,3"}, "one number above 0 per name"),
        ({"dataset_weights": "1,x"}, "one number above 0 per name"),
        ({"dataset_weights": "1,0"}, "one number above 0 per name"),
        ({"data_path": "a.json"}, "has 1 entries for 2 names"),
        ({"dataset_name": "plain_dpo,,"}, "has 2 entries for 3 names|empty name"),
        ({"data_ratio": 0.0}, "leaves no rows"),
    ],
)
def test_mixtures_that_do_not_add_up(folder: Path, flags: dict, message: str) -> None:
    write(folder / "a.json", [pair(i) for i in range(4)])
    flags = {"dataset_name": "plain_dpo,plain_dpo", "data_path": f"{folder}/a.json,{folder}/a.json"} | flags
    with pytest.raises(InputError, match=message):
        load(DataArguments(image_root=str(folder / "images"), **flags))


def test_processes_read_the_same_rows(folder: Path) -> None:
    rows = [pair(i, rejected="" if i == 1500 else "No.") for i in range(2002)]
    file = write(folder / "d.jsonl", rows)
    alone = load(arguments(folder, "plain_dpo", file, on_bad_row="drop", eval_ratio=0.1))
    two = load(arguments(folder, "plain_dpo", file, on_bad_row="drop", eval_ratio=0.1, dataset_num_proc=2))
    assert alone.info == two.info and alone.train["where"][:] == two.train["where"][:]
    assert len(alone.train) + len(alone.eval) == 2001


def test_resume_does_not_read_what_was_consumed(folder: Path) -> None:
    """Rows are map-style, so that the Trainer's skipping of batches skips row numbers and reads nothing."""
    import torch
    from accelerate import skip_first_batches

    train = load(arguments(folder, "plain_dpo", write(folder / "d.jsonl", [pair(i) for i in range(40)]))).train
    read: list[int] = []

    class Watched(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(train)

        def __getitem__(self, index: int) -> int:
            read.append(index)
            return int(train[index]["where"].split("row ")[1].split()[0])

    def loader() -> torch.utils.data.DataLoader:
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(Watched(), batch_size=4, shuffle=True, generator=generator)

    whole = [batch.tolist() for batch in loader()]
    read.clear()
    rest = [batch.tolist() for batch in skip_first_batches(loader(), 7)]
    assert rest == whole[7:] and len(read) == 12


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_of_ranked_responses() -> None:
    ranks, scores = [1, 0, 1, 2], [3.0, 5.0, 3.0, 1.0]
    assert ordered_pairs(ranks) == [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]
    assert ordered_pairs(ranks, None, score_margin=-1) == [(1, 3)]  # ranks stand in for scores
    assert ordered_pairs(ranks, mode="adjacent") == [(1, 0), (1, 2), (0, 3), (2, 3)]
    assert ordered_pairs(ranks, mode="best_worst") == [(1, 3)]
    assert ordered_pairs(ranks, scores, "score_margin", 3) == [(1, 3)]
    assert ordered_pairs(ranks, scores, "all", 2) == ordered_pairs(ranks)
    assert ordered_pairs(ranks, scores, "adjacent", 2.5) == []
    assert ordered_pairs(ranks, scores, "all", -1) == [(1, 3)]
    assert ordered_pairs([0, 1, 0], [4, 1, 4], "all", -1) == [(0, 1), (2, 1)]  # two largest gaps
    assert ordered_pairs([0, 0, 0], [1, 1, 1], "all", -1) == [] == ordered_pairs([0, 0])
    assert ordered_pairs([0, 1, 2], [5, None, 1], "all", 0) == [(0, 2)]  # a missing score has no gap
    assert ordered_pairs([0, 1], [1, 2], "all", 0) == []  # scores that contradict the ranks
    with pytest.raises(InputError, match="needs --score_margin"):
        ordered_pairs([0, 1], mode="score_margin")
    with pytest.raises(InputError, match="rows with scores"):
        ordered_pairs([0, 1], None, "all", 1.0)


def test_pairs_hold_for_random_rows() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scores = rng.integers(0, 4, size=rng.integers(2, 6)).astype(float).tolist()
        ranks = [-score for score in scores]
        everything = ordered_pairs(ranks, scores)
        assert set(everything) == {(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]}
        for mode in ("adjacent", "best_worst"):
            assert set(ordered_pairs(ranks, scores, mode)) <= set(everything)
            assert bool(ordered_pairs(ranks, scores, mode)) == bool(everything)
        largest = ordered_pairs(ranks, scores, "score_margin", -1)
        gap = max(scores) - min(scores)
        assert largest == [(i, j) for i, j in everything if scores[i] - scores[j] == gap]


@pytest.mark.parametrize("check_images", ["all", "sample", "none"])
def test_images_are_looked_at_as_asked(folder: Path, check_images: str) -> None:
    """`sample` looks at 1,000 rows, that is all of these; `none` leaves a missing file to the batch that needs it."""
    path = write(folder / "d.json", [pair(0), pair(0) | {"image": "gone.png"}])
    found = arguments(folder, "plain_dpo", path, check_images=check_images)
    if check_images == "none":
        assert len(load(found).train) == 2
    else:
        with pytest.raises(InputError, match=r"gone\.png, which does not exist"):
            load(found)


def test_row_counts_as_callers_see_them(folder: Path) -> None:
    loader: Callable = data.DATASET_MAP["plain_dpo"]
    rows = loader(arguments(folder, "plain_dpo", write(folder / "d.json", [pair(0), pair(0), pair(1)])))
    assert {"images", "prompt", "responses", "ranks", "where", "source", "problem", "skipped"} <= set(rows.column_names)
    assert load(arguments(folder, "plain_dpo", "d.json")).info["sets"][0] == {
        "name": "plain_dpo",
        "file": str(folder / "d.json"),
        "rows": 3,
        "bad": 0,
        "skipped": 0,
        "duplicates": 1,
        "train": 3,
        "drawn_per_epoch": 3,
        "columns_read": ["chosen", "image", "prompt", "rejected"],
        "columns_kept": [],
        "columns_left_out": {},
        "without_image": 0,
    }


# ----------------------------------------------------------------------------------------------------------------------
# docs/data.md


ANSWER_KEYS = "Prompts with an answer key"
LABELLED = "Single answers with a label"


def examples() -> dict[str, list[dict]]:
    """The JSON lines under each format's heading."""
    sections = re.split(r"^####? ", (ROOT / "docs" / "data.md").read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        blocks = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
        found[section.split("\n")[0].strip("` ")] = [
            json.loads(line) for block in blocks for line in block.splitlines()
        ]
    return found


def names_in(rows: list[dict]) -> set[str]:
    return {name for row in rows for key in ("image", "images") for name in np.atleast_1d(row.get(key, [])).tolist()}


def test_documentation_has_an_example_of_every_format() -> None:
    assert set(examples()) == {*data.DATASET_MAP, "any other value", ANSWER_KEYS, LABELLED} - {"shapes"} and all(
        examples().values()
    )


@pytest.mark.parametrize("name", sorted(examples()))
def test_example_of_the_documentation_loads(folder: Path, name: str) -> None:
    rows = examples()[name]
    for image in names_in(rows) or {"VG_100K/1.jpg"}:
        (folder / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / "images" / image)
    write(folder / "d.jsonl", rows)
    args = (
        arguments(folder, name, "d.jsonl")
        if name in data.DATASET_MAP
        else arguments(folder, str(folder / "d.jsonl"), None)
    )
    kind = {ANSWER_KEYS: "prompt", LABELLED: "unpaired"}.get(name)
    kind = kind or ("conversation" if "conversations" in rows[0] else "preference")
    train = load(args, kind).train
    assert len(train) == len(rows) and "duplicates" in load(args, kind).info["sets"][0]
    if name in ("vlfeedback_paired", "rlhfv", "rlaifv"):  # the same rows as the hub has them
        images = [{"bytes": (folder / "images" / row["image"]).read_bytes(), "path": None} for row in rows]
        hub = datasets.Dataset.from_list([row | {"image": image} for row, image in zip(rows, images, strict=True)])
        hub.cast_column("image", datasets.Image()).to_parquet(folder / "d.parquet")
        parquet = load(arguments(folder, name, "d.parquet")).train
        assert [row["responses"] for row in parquet] == [row["responses"] for row in train]
        assert [row["prompt"] for row in parquet] == [row["prompt"] for row in train]
        assert parquet[0]["images"] == images[:1]


def test_loader_of_the_documentation_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL).group(1)
    (folder / "a_users_format.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(data.DATASET_MAP, "mine", importlib.import_module("a_users_format").load)
    write(folder / "d.json", [{"image": "0.png", "q": "Q?", "good": "a", "bad": "b"}, {"q": "Q?", "good": "a"}])
    found = load(arguments(folder, "mine", "d.json", on_bad_row="drop"), out=folder)
    assert found.train[0]["responses"] == ["a", "b"] and found.train[0]["prompt"][0]["content"] == "<image>Q?"
    assert "has no `bad` (it has good, q)" in (folder / "bad_rows.jsonl").read_text()
