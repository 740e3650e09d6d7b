"""Files as other projects publish and write them: each layout of docs/data.md from a file of its own, and the cases of tests/cases."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

import data
from args import DataArguments
from common.errors import InputError
from data.rows import label_of

ROOT = Path(__file__).parent.parent
LAYOUTS = ROOT / "tests" / "cases" / "layouts"
T2 = ROOT / "tests" / "cases" / "t2"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def load(path: Path, kind: str, name: str | None = None, **flags) -> data.DataSplits:
    flags = {"image_root": str(LAYOUTS / "images")} | flags
    args = DataArguments(dataset_name=name or str(path), data_path=str(path) if name else None, **flags)
    return data.load_train_eval(args, kind, 0)


def turns(row: dict) -> list[str]:
    return [f"{m['role']}: {m['content']}" for m in row.get("messages") or row["prompt"]]


def images(row: dict) -> list[str]:
    return [Path(image).name for image in row["images"]]


# ----------------------------------------------------------------------------------------------------------------------
# The table of docs/data.md


def documented() -> list[tuple[str, str, str, str]]:
    """(file, --dataset_name or "", kind, flags) of every line of the table of layouts."""
    text = (ROOT / "docs" / "data.md").read_text().split("## Layouts of other projects")[1].split("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    found = []
    for _, file, kind, flags, *_ in ([cell.strip() for cell in line] for line in lines):
        found.append((file.strip("`"), kind, flags.strip("`")))
    return found


FILES = {str(f.relative_to(LAYOUTS)) for f in LAYOUTS.rglob("*.*") if f.suffix in (".json", ".jsonl", ".csv", ".tsv")}


def test_every_layout_is_in_the_table() -> None:
    assert {file for file, *_ in documented()} == {f for f in FILES if "annotations" not in f}


@pytest.mark.parametrize(("file", "kind", "flags"), documented())
def test_layout_of_the_documentation(file: str, kind: str, flags: str) -> None:
    words = dict(re.findall(r"--(\w+) (\S+)", flags))
    root = LAYOUTS / file.split("/")[0] if "/" in file else LAYOUTS / "images"
    if kind == "refused":
        for want in ("conversation", "preference"):
            with pytest.raises(InputError, match=f"{file}, row 0.*objects|holds conversation rows"):
                load(LAYOUTS / file, want)
        return
    found = load(LAYOUTS / file, kind, words.pop("dataset_name", None), image_root=str(root), **words)
    assert len(found.train) and found.info["sets"][0]["bad"] == 0
    if file != "trl_text.jsonl":
        assert found.info["sets"][0]["without_image"] == 0


# What the rows must be, by hand: (turns, images, responses).
Q = "What is shown?"
EXPECTED = {
    "llama_factory_alpaca.json": (["system: You see well.", "user: Hello", "assistant: Hi", f"user: <image>{Q}\nBe brief.",
                                   "assistant: A red disc."], ["red.png"], None),
    "llama_factory_alpaca_ranking.json": ([f"user: <image>{Q}"], ["red.png"], ["A red disc.", "A dog."]),
    "llama_factory_sharegpt.json": (["system: You see well.", f"user: <image>{Q}", "assistant: A red disc."], ["red.png"], None),
    "llama_factory_sharegpt_ranking.json": ([f"user: <image>{Q}", "assistant: A blue disc.", "user: Its colour?"], ["blue.png"],
                                            ["Blue.", "Grey."]),
    "ms_swift_rejected_response.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A red disc.", "A dog."]),
    "ms_swift_rejected_messages.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A red disc.", "A dog."]),
    "ms_swift_query_rejected.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A red disc.", "A dog."]),
    "ms_swift_sharegpt.jsonl": (["system: You see well.", f"user: <image>{Q}", "assistant: A red disc.", "user: Sure?",
                                 "assistant: Yes."], ["red.png"], None),
    "ms_swift_query_response.jsonl": (["system: You see well.", "user: Hello", "assistant: Hi", f"user: <image>{Q}",
                                       "assistant: A red disc."], ["red.png"], None),
    "qwen2_vl_parts.jsonl": ([f"user: <image>{Q}", "assistant: A red disc."], ["red.png"], None),
    "internvl/shell/meta.json": ([f"user: <image>\n{Q}", "assistant: A red disc."], ["red.png"], None),
    "mmpr/meta.json": ([f"user: <image>\n{Q}"], ["red.png"], ["A red disc.", "A dog."]),
    "bpo.json": ([f"user: {Q}\n<image>"], ["red.png"], ["A red disc.", "A dog."]),
    "spa_vl.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A red disc.", "A dog."]),
    "table.csv": ([f"user: <image>{Q}"], ["red.png"], ["A red disc, I think.", "A dog."]),
    "trl_unpaired.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A red disc."]),
    "llama_factory_alpaca_kto.json": ([f"user: <image>{Q}"], ["red.png"], ["A dog."]),
    "llama_factory_sharegpt_kto.json": ([f"user: <image>{Q}"], ["red.png"], ["A red disc."]),
    "ms_swift_kto.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A dog."]),
    "trl_implicit_prompt.jsonl": ([f"user: <image>{Q}"], ["red.png"], ["A red disc.", "A dog."]),
}  # fmt: skip


@pytest.mark.parametrize("file", EXPECTED)
def test_layout_is_read_as_it_is_meant(file: str) -> None:
    said, pictures, responses = EXPECTED[file]
    root = LAYOUTS / file.split("/")[0] if "/" in file else LAYOUTS / "images"
    flags = (
        {"columns": "prompt=question,chosen=good_answer,rejected=bad_answer,image=file"} if file == "table.csv" else {}
    )
    kind = "unpaired" if "kto" in file or "unpaired" in file else "preference" if responses else "conversation"
    row = load(LAYOUTS / file, kind, image_root=str(root), **flags).train[0]
    assert (turns(row), images(row), row.get("responses")) == (said, pictures, responses)


def test_labels_of_single_answers() -> None:
    assert load(LAYOUTS / "llama_factory_alpaca_kto.json", "unpaired").train["label"][:] == [False]
    assert load(LAYOUTS / "llama_factory_sharegpt_kto.json", "unpaired").train["label"][:] == [True]
    prompts = load(LAYOUTS / "ms_swift_kto.jsonl", "prompt").train
    assert turns(prompts[0]) == [f"user: <image>{Q}"] and not {"label", "responses"} & {*prompts.column_names}
    with pytest.raises(InputError, match=r"holds unpaired rows.*train_dpo.py --loss_type kto.*--columns =label"):
        load(LAYOUTS / "ms_swift_kto.jsonl", "conversation")
    talk = load(LAYOUTS / "ms_swift_kto.jsonl", "conversation", columns="=label").train
    assert turns(talk[0]) == [f"user: <image>{Q}", "assistant: A dog."]
    for good in (True, 1, 1.0, "true", "1", "Yes", "good", " desirable", "chosen"):
        assert label_of(good) is True, good
    for bad in (False, 0, "False", "0", "no", "bad", "Undesirable", "rejected"):
        assert label_of(bad) is False, bad
    assert label_of(0.5) is label_of("fine") is label_of(None) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 0.5}, r"has the `label` 0\.5: write true for a good answer, false for a bad one"),
        ({"label": None}, "has no `label`"),
        ({"kto_tag": True}, "has both `label` and `kto_tag`: keep one of them"),
        ({"completion": " "}, "its answer is empty|its completion is empty"),
        ({"completion": "A <image>."}, "<image> mark"),
        ({"rejected": "A cat."}, "has `rejected` beside the conversation"),
    ],
)
def test_single_answers_that_cannot_be_used(tmp_path: Path, change: dict, reason: str) -> None:
    row = {"prompt": Q, "completion": "A dog.", "label": "good"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | change)}\n")
    with pytest.raises(InputError, match=rf"row 1 .*({reason})"):
        load(tmp_path / "rows.jsonl", "unpaired")


def test_own_columns_reach_the_rows_with_their_types() -> None:
    train = load(LAYOUTS / "ms_swift_grpo.jsonl", "prompt").train
    assert train[0]["solution"] == "A red disc." and train[0]["difficulty"] == 2
    assert turns(train[0]) == [f"user: <image>{Q}"]
    row = load(LAYOUTS / "mmpr" / "meta.json", "preference", image_root=str(LAYOUTS / "mmpr")).train[0]
    assert row["answer_gt"] == "red" and row["image_wh"] == [32, 32]
    scored = load(LAYOUTS / "trl_implicit_prompt.jsonl", "preference").train[0]
    assert scored["scores"] == [4.5, 2.0] and "score_chosen" not in scored
    assert load(LAYOUTS / "bpo.json", "preference").train[0]["scores"] == [1.0, 0.0]


def test_hadpo_descriptions_are_one_row_of_all_answers() -> None:
    row = load(LAYOUTS / "hadpo_desc.json", "preference", "hadpo").train[0]
    assert len(row["responses"]) == 4 and row["ranks"] == [0, 0, 1, 1] and images(row) == ["1.jpg"]
    assert turns(row) == ["user: <image>Take a look at this image and describe what you notice."]  # the second of four
    found = load(LAYOUTS / "hadpo_pope.json", "preference", "hadpo")
    assert len(found.train) == 1 and found.info["sets"][0]["skipped"] == 1  # the model had answered right
    assert found.train[0]["responses"] == ["No, there is a disc.", "Yes."]
    assert turns(found.train[0]) == ["user: <image>Is there a dog?"]


def test_table_keeps_line_breaks_and_quotes() -> None:
    columns = "prompt=question,chosen=good_answer,rejected=bad_answer,image=file"
    second = load(LAYOUTS / "table.csv", "preference", "plain_dpo", columns=columns).train[1]
    assert second["prompt"][0]["content"] == '<image>What "colour"?' and second["responses"] == [
        "Blue.",
        "Grey,\nnot blue.",
    ]
    assert second["level"] == "2" and "row 1 (line 3)" in second["where"]


# ----------------------------------------------------------------------------------------------------------------------
# Cases: layouts that were once read wrongly


def t2(file: str, kind: str, name: str | None = None, **flags) -> data.DataSplits:
    return load(T2 / file, kind, name, **({"image_root": str(T2 / "images")} | flags))


@pytest.mark.parametrize(
    ("file", "name", "kind", "message"),
    [
        ("d1_image_path.json", "plain_dpo", "preference", r"^2 of 2 rows .*has a picture in `image_path` \(red.png\)"),
        ("d6_audio.json", None, "conversation", r"row 0 .*is an audio row \(its `audios` is 'a.wav'\)"),
        ("d3_image_token.json", "plain_dpo", "preference", r"row 0 .*has <\|image_pad\|> in its rejected"),
        ("d7_meta.json", "vlquery_json", "conversation", r"made_up_set.*--data_path.*--image_root"),
    ],
)
def test_case_is_refused_by_name(file: str, name: str | None, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        t2(file, kind, name)


def test_cases_that_are_read() -> None:
    assert turns(t2("d10_system.json", "conversation").train[0])[0] == "system: Talk like a pirate."
    for name in (None, "vlfeedback_paired"):
        row = t2("d13_scored_completions.json", "preference", name).train[0]
        assert row["responses"] == ["A red disc.", "A dog."] and row["scores"] == [1, 0] and images(row) == ["red.png"]
    ranking = t2("d4_sharegpt_ranking.json", "preference").train
    assert len(ranking) == 2 and ranking[1]["responses"] == ["Blue.", "Grey."] and len(ranking[1]["prompt"]) == 3
    assert t2("d5_rejected_response.jsonl", "preference").train[0]["responses"] == ["A red disc.", "A dog."]
    assert len(t2("d8_dataset_dict", "preference", image_root=None).train) == 2
    assert images(t2("d9_part_image.jsonl", "conversation").train[0]) == ["red.png"]
    bugs = ROOT / "tests" / "cases" / "t2-bugs"
    train = load(bugs / "image_in_part.jsonl", "conversation", image_root=str(bugs / "im")).train
    assert [images(row) for row in train] == [["0.png"], ["1.png"], ["2.png"], ["3.png"]]


# ----------------------------------------------------------------------------------------------------------------------
# What a file is, is said by its content


PAIRS = [{"image": f"{c}.png", "prompt": f"Is it {c}?", "chosen": "Yes.", "rejected": "No."} for c in ("red", "blue")]


def contents() -> dict[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
    buffer = io.BytesIO()
    datasets.Dataset.from_list(PAIRS).to_parquet(buffer)
    names = list(PAIRS[0])
    return {
        "list": json.dumps(PAIRS).encode(),
        "pretty list": b"\xef\xbb\xbf" + json.dumps(PAIRS, indent=2).encode(),
        "lines": lines.encode(),
        "pretty objects": "\n".join(json.dumps(row, indent=1) for row in PAIRS).encode(),
        "object with a list": json.dumps({"info": 1, "rows": PAIRS}, indent=1).encode(),
        "object in one line": json.dumps({"rows": PAIRS}).encode(),
        "object by id": json.dumps({str(i): row for i, row in enumerate(PAIRS)}, indent=1).encode(),
        "csv": ("\n".join([",".join(names), *(",".join(row.values()) for row in PAIRS)])).encode(),
        "tsv": ("\n".join(["\t".join(names), *("\t".join(row.values()) for row in PAIRS)])).encode(),
        "semicolons": ("\n".join([";".join(names), *(";".join(row.values()) for row in PAIRS)])).encode(),
        "parquet": buffer.getvalue(),
    }


@pytest.mark.parametrize("content", contents())
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.txt", "d", "d.csv", "d.parquet"])
def test_content_decides_not_the_name(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_bytes(contents()[content])
    train = load(tmp_path / name, "preference", "plain_dpo").train
    assert [(images(row), row["prompt"][0]["content"], row["responses"]) for row in train] == [
        (["red.png"], "<image>Is it red?", ["Yes.", "No."]),
        (["blue.png"], "<image>Is it blue?", ["Yes.", "No."]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08rest", r"compressed \(gzip\)"),
        (b"PK\x03\x04rest", "zip archive or an Excel file"),
        ("[{}]".encode("utf-16"), "UTF-16 text"),
        (b"3", "one JSON value that is not a row"),
        (b"null\n", "one JSON value that is not a row"),
        (b"just a sentence\nand another", "is neither JSON"),
        (
            json.dumps({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}).encode(),
            "columns instead of rows",
        ),
        (json.dumps({"prompt": {"0": "a"}, "chosen": {"0": "b"}}).encode(), "columns instead of rows"),
        (b'{"prompt": "a",\n "chosen" "b"}', "line 2, column 11"),
        (b"image,prompt,chosen,rejected\na,b,c,d,e\n", "row 0 .line 2.: has 5 cells where the first line names 4"),
        (b'image,prompt,chosen,rejected\na,"b,c,d\n', "does not parse as a table after line 1"),
    ],
)
def test_what_is_no_data_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "d.json", "preference", "plain_dpo")


def test_broken_first_line_is_one_bad_row_not_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"image": "red.png", "prom\n' + "".join(json.dumps(r) + "\n" for r in PAIRS))
    found = load(tmp_path / "d.jsonl", "preference", "plain_dpo", on_bad_row="drop")
    assert len(found.train) == 2 and found.info["sets"][0]["bad"] == 1


def test_webdataset_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for color, row in zip(("red", "blue"), PAIRS, strict=True):
            texts = json.dumps({k: v for k, v in row.items() if k != "image"} | {"level": 3}).encode()
            for ending, content in (("png", (LAYOUTS / "images" / f"{color}.png").read_bytes()), ("json", texts)):
                member = tarfile.TarInfo(f"{color}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    train = load(tmp_path / "d.tar", "preference", image_root=None).train
    assert train[1]["responses"] == ["Yes.", "No."] and train[1]["level"] == 3
    assert Image.open(io.BytesIO(train[1]["images"][0]["bytes"])).size == Image.open(LAYOUTS / "images/blue.png").size
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(LAYOUTS / "images" / "red.png", "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: of a tar file, pictures"):
        load(tmp_path / "p.tar", "preference")


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is lost in silence


def one(tmp_path: Path, row: dict, kind: str = "preference", name: str | None = "plain_dpo", **flags) -> dict:
    (tmp_path / "one.json").write_text(json.dumps([row]))
    return load(tmp_path / "one.json", kind, name, **flags).train[0]


PAIR = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}
TALK = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}
PARTS = [{"type": "text", "text": "Q?"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *[(PAIR | {name: value}, f"has a picture in `{name}`") for name, value in {
            "image_path": "red", "img": "red.png", "picture": ["red.png"], "file_name": "a/red.JPG", "Bild": "rot.webp",
            "imageUrl": "http://x/y", "photo": {"path": "red.png", "bytes": None}, "meta": {"files": [{"name": "a.tiff"}]},
            "blob": "iVBORw0KGgo" + "A" * 80, "images_list": ["a", "b"]}.items()],
        (PAIR | {"image": "red.png", "mask": "mask.png"}, "`mask` beside the image of the row"),
        (PAIR | {"video": "a.mp4"}, "names the video .*a.mp4, which does not exist"),
        (PAIR | {"clip": "a.mp4"}, "has a video in `clip`"),
        (PAIR | {"audios": ["a.wav"]}, "is an audio row"),
        (PAIR | {"prompt": "<img>red.png</img>Q?"}, "names <img>red.png in the text of message 0"),
        (PAIR | {"prompt": "![](red.png) Q?"}, r"names !\[\]\(red.png\) in the text"),
        (PAIR | {"prompt": "<video>Q?"}, "names <video> in the text"),
        (PAIR | {"prompt": "<|vision_start|><|image_pad|><|vision_end|>Q?"}, r"has <\|vision_start\|> in message 0"),
        (PAIR | {"chosen": "See <image_soft_token>."}, "has <image_soft_token> in its chosen"),
        (PAIR | {"system": "A", "prompt": [{"role": "system", "content": "B"}, {"role": "user", "content": "Q?"}]}, "another system"),
        (PAIR | {"tools": "[{}]"}, "has `tools`"),
        (TALK | {"rejected": "No."}, "has `rejected` beside the conversation"),
        (TALK | {"scores": [1, 2]}, "has `scores` beside the conversation"),
        (TALK | {"is_good": True}, r"has a `is_good` \(True\).*--columns label=is_good"),
        ({"messages": [TALK["messages"][0] | {"images": ["red.png"]}, TALK["messages"][1]]}, "names a picture in `images`"),
        ({"messages": [TALK["messages"][0], TALK["messages"][1] | {"loss": False}]}, "has loss False"),
        ({"messages": [TALK["messages"][0], TALK["messages"][1] | {"tool_calls": [{}]}]}, "has `tool_calls`"),
        ({"messages": [{"role": "user", "content": [PARTS[0] | {"image": "red.png"}]}, TALK["messages"][1]]}, "text part that names a pict"),
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image", "image": "red.png", "max_pixels": 9}]},
                       TALK["messages"][1]]}, "sets max_pixels"),
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image", "image": "red.png"}]}, TALK["messages"][1]],
          "images": ["blue.png"]}, "names pictures in `images` and others in the image parts"),
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image", "image": "http://x/red.png"}]}, TALK["messages"][1]]},
         "by URL: download"),
    ],
)  # fmt: skip
def test_what_a_row_would_lose_is_named(tmp_path: Path, row: dict, message: str) -> None:
    is_pair = "prompt" in row
    with pytest.raises(InputError, match=rf"one\.json, row 0 \(line 2\): .*{message}|one\.json, row 0.*{message}"):
        one(tmp_path, row, "preference" if is_pair else "conversation", "plain_dpo" if is_pair else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("difficulty", 3), ("weight", 0.5), ("easy", False), ("topic", "shapes"), ("topic", "the file red.png shows what we want"),
        ("boxes", [1, 2, 3]), ("tags", ["a", None]), ("image_id", 12), ("image_caption", "A disc."), ("image_size", [3, 4]),
        ("num_images", 0), ("solution", "\u00e9\n"), ("label", 1), ("score", 4.5), ("id", "x"), ("empty", []),
    ],
)  # fmt: skip
def test_own_columns_are_kept(tmp_path: Path, name: str, value: object) -> None:
    for row, kind in ((PAIR, "preference"), (PAIR, "prompt")):
        assert one(tmp_path, row | {name: value}, kind)[name] == value


def test_own_columns_of_a_conversation_serve_prompts_and_bytes(tmp_path: Path) -> None:
    """Whichever way rows are turned into those of another kind, own columns stay."""
    talk = TALK | {"images": ["red.png"], "solution": "A.", "level": 2}
    row = one(tmp_path, talk, "prompt", None)
    assert (row["solution"], row["level"], row["reference"]) == ("A.", 2, "A.") and images(row) == ["red.png"]
    picture = {"bytes": (LAYOUTS / "images" / "red.png").read_bytes(), "path": None}
    datasets.Dataset.from_list([talk | {"images": [picture]}]).to_parquet(tmp_path / "b.parquet")
    args = DataArguments(f"{tmp_path}/one.json,{tmp_path}/b.parquet", image_root=str(LAYOUTS / "images"))
    both = data.load_train_eval(args, "prompt", 0).train  # file names and bytes in one run
    assert both["solution"][:] == ["A.", "A."] and both["level"][:] == [2, 2]
    assert both[0]["images"][0]["path"].endswith("red.png") and both[1]["images"][0]["bytes"] == picture["bytes"]


def test_image_names_beside_the_image_are_kept(tmp_path: Path) -> None:
    row = PAIR | {"image": "red.png", "image_path": "/data/coco/red.png", "url": "http://x/other.png", "id": "red.png"}
    assert one(tmp_path, row)["image_path"] == "/data/coco/red.png"


def test_types_of_own_columns_hold_for_all_rows(tmp_path: Path) -> None:
    rows = [PAIR | {"n": 1, "m": 1, "l": [1], "s": "x", "o": {"a": 1}, "where": "here"},
            PAIR | {"n": 2.5, "m": "two", "l": [], "b": True},
            PAIR | {"n": None, "l": [0.5], "\ud800": 1, "half": "\ud800"}]  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps(rows))
    found = load(tmp_path / "d.json", "preference", "plain_dpo")
    train = found.train
    assert train["n"][:] == [1.0, 2.5, None] and train["m"][:] == ["1", "two", None]
    assert train["l"][:] == [[1.0], [], [0.5]] and train["b"][:] == [None, True, None]
    assert "d.json, row 0" in train[0]["where"] and "o" not in train.column_names
    about = found.info["sets"][0]
    assert about["columns_kept"] == ["n", "m", "l", "s", "b"] and about["columns_read"] == [
        "chosen",
        "prompt",
        "rejected",
    ]
    assert set(about["columns_left_out"]) == {"o", "where", "\ud800", "half"}


def test_own_columns_of_parquet_and_of_several_sets(tmp_path: Path) -> None:
    rows = [PAIR | {"level": i, "day": [f"{i}"], "when": None} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([PAIR | {"level": "high", "other": 1.5}]))
    assert load(tmp_path / "a.parquet", "preference").train["level"][:] == [0, 1, 2]
    args = DataArguments("plain_dpo,plain_dpo", f"{tmp_path}/a.parquet,{tmp_path}/b.json")
    train = data.load_train_eval(args, "preference", 0).train
    assert sorted(str(v) for v in train["other"]) == ["1.5", "None", "None", "None"]
    assert "level" not in train.column_names  # a number here, a text there: left out, with a warning


def test_no_image_at_all_is_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one(tmp_path, PAIR | {"image_id": 7})
    assert "NOT ONE ROW HAS AN IMAGE" in caplog.text and "image_id" in caplog.text
    caplog.clear()
    one(tmp_path, PAIR | {"image": "red.png"})
    assert "NOT ONE ROW" not in caplog.text
    one(tmp_path, PAIR, image_root=None)
    assert "NOT ONE ROW" not in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "write name=column"), ("prompt=", "write name=column"), ("prompt=a,chosen=a", "twice"), ("prompt=a,prompt=b", "twice"),
        ("prompt=nowhere", r"names nowhere, which .*one\.json does not have \(it has chosen, prompt, rejected, text\)"),
        ("prompt=text", "has a `prompt` beside `text`"),
    ],
)  # fmt: skip
def test_column_maps_that_do_not_fit(tmp_path: Path, columns: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        one(tmp_path, PAIR | {"text": "T?"}, columns=columns)


def test_column_maps_swap_and_leave_out(tmp_path: Path) -> None:
    row = one(tmp_path, PAIR | {"mask": "m.png"}, columns="chosen=rejected,rejected=chosen,=mask")
    assert row["responses"] == ["No.", "Yes."] and "mask" not in row
    (tmp_path / "two.json").write_text(json.dumps([{"q": "Q?", "a": "x", "b": "y"}]))
    args = DataArguments(
        "plain_dpo,plain_dpo", f"{tmp_path}/two.json,{tmp_path}/one.json", columns="prompt=q,chosen=a,rejected=b;=mask"
    )
    assert len(data.load_train_eval(args, "preference", 0).train) == 2


def test_folder_of_files_is_read_by_kind(tmp_path: Path) -> None:
    shutil.copy(LAYOUTS / "table.tsv", tmp_path)
    assert len(load(tmp_path, "preference", "plain_dpo").train) == 1
    (tmp_path / "a.json").write_text(json.dumps(PAIRS))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert len(load(tmp_path, "preference", "plain_dpo").train) == 2


# ----------------------------------------------------------------------------------------------------------------------
# The same rules with other names, nestings and marks

A_PAIR = {"prompt": Q, "chosen": "A red disc.", "rejected": "A dog."}
SAID = [{"role": "user", "content": Q}, {"role": "assistant", "content": "A red disc."}]


def of_part(**keys: object) -> dict:
    return {"messages": [{"role": "user", "content": [keys, {"type": "text", "text": Q}]}, SAID[1]]}


REFUSED_BY_NAME = {
    # pictures that would be lost
    "message photo": ({"messages": [SAID[0] | {"photo": "red.png"}, SAID[1]]}, "names a picture in `photo`"),
    "message file_name": ({"messages": [SAID[0] | {"file_name": "red.png"}, SAID[1]]}, "names a picture in `file_name`"),
    "message videos": ({"messages": [SAID[0] | {"videos": ["a.mp4"]}, SAID[1]]}, "has video in `videos`"),
    "part img": (of_part(type="image", img="red.png"), "an image part with `img`"),
    "part file_name": (of_part(type="image", file_name="red.png"), "an image part with `file_name`"),
    "part source": (of_part(type="image", source={"data": "iVBOR"}), "an image part with `source`"),
    "thumbnail": (A_PAIR | {"thumbnail": "red"}, "a picture in `thumbnail`"),
    "speech": (A_PAIR | {"speech": "clip 1"}, "is an audio row"),
    "base64": (A_PAIR | {"image": "iVBORw0KGgo" + "A" * 80}, "as base64 text"),
    "object without path": (A_PAIR | {"image": {"file_name": "red.png"}}, r"neither bytes nor a path \(it has file_name\)"),
    # marks of other projects, which would stay in the text beside the picture
    "<image_1>": (A_PAIR | {"image": "red.png", "prompt": f"<image_1>{Q}"}, "has <image_1> where an image stands"),
    "<image 1>, no image": (A_PAIR | {"prompt": f"<image 1>{Q}"}, "has <image 1> where"),
    "<Image>": (A_PAIR | {"image": "red.png", "prompt": f"<Image>{Q}"}, "has <Image> where an image stands"),
    "{image}": (A_PAIR | {"image": "red.png", "prompt": f"{{image}}{Q}"}, "has {image} where an image stands"),
    # answers and labels beside a conversation
    "negatives": ({"messages": SAID, "negatives": ["A dog."]}, "has `negatives` beside"),
    "dispreferred_text": ({"messages": SAID, "dispreferred_text": "A dog."}, "has `dispreferred_text` beside"),
    "label false": ({"messages": SAID, "label": "false"}, "holds unpaired rows"),
    "is_good": ({"messages": SAID, "is_good": False}, r"has a `is_good` \(False\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_BY_NAME)
def test_other_names_are_refused_by_name(tmp_path: Path, case: str) -> None:
    record, message = REFUSED_BY_NAME[case]
    (tmp_path / "x.json").write_text(json.dumps([record]))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "x.json", "conversation" if "messages" in record else "preference")


def test_parts_of_a_prompt_name_the_pictures_of_a_pair(tmp_path: Path) -> None:
    """In every place where a prompt may stand, as file names and with file:// before an absolute one."""
    red = {"type": "image", "image": "red.png"}
    asked = [{"role": "user", "content": [red, {"type": "text", "text": Q}]}]
    answers = [[{"role": "assistant", "content": text}] for text in ("A red disc.", "A dog.")]
    blue = f"file://{LAYOUTS / 'images' / 'blue.png'}"
    records = {
        "prompt": {"prompt": asked, "chosen": answers[0], "rejected": answers[1]},
        "conversation": {"messages": asked, "chosen": answers[0], "rejected": answers[1]},
        "implicit": {"chosen": asked + answers[0], "rejected": asked + answers[1]},
        "rejected_response": {"messages": asked + answers[0], "rejected_response": "A dog."},
        "rejected_messages": {"messages": asked + answers[0], "rejected_messages": asked + answers[1]},
        "history": {"query": asked, "history": [], "response": "A red disc.", "rejected_response": "A dog."},
        "ranked": {"prompt": asked, "responses": ["A red disc.", "A dog."], "ranks": [1, 2]},
        "column": A_PAIR | {"image": blue},
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
        row = load(tmp_path / f"{name}.json", "preference").train[0]
        assert (turns(row), images(row), row["responses"]) == (
            [f"user: <image>{Q}"],
            ["blue.png" if name == "column" else "red.png"],
            ["A red disc.", "A dog."],
        ), name


@pytest.mark.parametrize("name", ["sys", "system_message", "systemPrompt", "system_instruction"])
def test_system_prompt_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps([A_PAIR | {"image": "red.png", name: "Be kind.", "system_id": "s1"}]))
    row = load(tmp_path / "x.json", "preference").train[0]
    assert turns(row) == ["system: Be kind.", f"user: <image>{Q}"] and row["system_id"] == "s1"


def test_names_that_only_look_like_labels_answers_or_marks_are_kept(tmp_path: Path) -> None:
    own = {"label_id": 1, "label": "cat", "rejected_score": 2.0, "sound": "", "clip_score": 0.3}
    asked = {"role": "user", "content": "<image_1>: <image> What is shown?"}
    (tmp_path / "x.json").write_text(json.dumps([{"image": "red.png", "messages": [asked, SAID[1]]} | own]))
    row = load(tmp_path / "x.json", "conversation").train[0]
    assert {name: row[name] for name in own} == own and turns(row)[0] == "user: <image_1>: <image> What is shown?"


def test_unknown_keys_of_messages_parts_and_answers_are_listed(tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": [{"type": "text", "text": Q, "lang": "en"}], "id": 3},
        SAID[1] | {"model": "m", "name": None},
    ]
    (tmp_path / "x.json").write_text(json.dumps([{"image": "red.png", "messages": said}]))
    left_out = load(tmp_path / "x.json", "conversation").info["sets"][0]["columns_left_out"]
    assert {*left_out} == {"messages[].id", "messages[].model", "messages[].content[].lang"}
    answers = [{"response": "A disc.", "score": 2, "model": "a"}, {"response": "A dog.", "score": 1, "model": "b"}]
    (tmp_path / "y.json").write_text(json.dumps([{"image": "red.png", "prompt": Q, "completions": answers}]))
    assert {*load(tmp_path / "y.json", "preference").info["sets"][0]["columns_left_out"]} == {"completions[].model"}
    (tmp_path / "z.json").write_text(
        json.dumps([{"image": "red.png", "text": {"question": Q, "chosen": "A", "rejected": "B"}}])
    )
    assert not load(tmp_path / "z.json", "preference", "rlhfv").info["sets"][0]["columns_left_out"]  # it reads them all


def test_scores_written_as_texts_are_scores(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(
        "image\tprompt\tchosen\trejected\tchosen_score\trejected_score\nred.png\tWhat?\tA disc.\tA dog.\t5\t1.5\n"
    )
    assert load(tmp_path / "x.tsv", "preference").train[0]["scores"] == [5.0, 1.5]
    names = (
        ("score_chosen", "score_rejected"),
        ("chosen_rating", "rejected_rating"),
        ("rating_chosen", "rating_rejected"),
    )
    for chosen, rejected in names:  # under the other names of public sets
        (tmp_path / "z.json").write_text(json.dumps([A_PAIR | {chosen: 4, rejected: 2}]))
        assert load(tmp_path / "z.json", "preference").train[0]["scores"] == [4.0, 2.0]
    (tmp_path / "y.json").write_text(json.dumps([A_PAIR | {"chosen_score": "high", "rejected_score": "low"}]))
    row = load(tmp_path / "y.json", "preference").train[0]
    assert row["chosen_score"] == "high" and row.get("scores") is None


def test_object_of_splits_is_its_train_and_a_folder_of_other_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"train": [A_PAIR], "test": [A_PAIR | {"prompt": "Other?"}]}))
    assert [r["prompt"][0]["content"] for r in load(tmp_path / "x.json", "preference").train] == [Q]
    (tmp_path / "y.json").write_text(json.dumps({"data": {"train": [A_PAIR, A_PAIR], "val": [A_PAIR]}}))
    assert len(load(tmp_path / "y.json", "preference").train) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("test", "validation"):
        datasets.Dataset.from_list([A_PAIR]).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(InputError, match="holds the splits test, validation, none of them train"):
        load(folder, "preference")


def test_pictures_that_are_bytes_without_an_object_around_them(tmp_path: Path) -> None:
    data_of = (LAYOUTS / "images" / "red.png").read_bytes()
    datasets.Dataset.from_list([A_PAIR | {"image": data_of}]).to_parquet(str(tmp_path / "x.parquet"))
    assert load(tmp_path / "x.parquet", "preference").train[0]["images"] == [{"bytes": data_of, "path": None}]


@pytest.mark.parametrize(("repeat", "rows"), [(3, 6), (0.5, 1), (1.0, 2)])
def test_repeat_time_of_a_meta_file(tmp_path: Path, repeat: float, rows: int) -> None:
    for name in ("a", "b"):
        lines = [{"image": "red.png", "conversations": [{"from": "human", "value": f"{name}{i}?"}, {"from": "gpt", "value": "Yes."}]}
                 for i in range(2)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {"a": {"root": str(LAYOUTS / "images"), "annotation": "a.jsonl", "repeat_time": repeat},
            "b": {"root": str(LAYOUTS / "images"), "annotation": "b.jsonl"}}  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    train = load(tmp_path / "meta.json", "conversation").train
    asked = [row["messages"][0]["content"].removeprefix("<image>")[:1] for row in train]
    assert asked.count("a") == rows and asked.count("b") == 2
    meta["a"]["repeat_time"] = 1.5
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"repeat_time 1\.5"):
        load(tmp_path / "meta.json", "conversation")
