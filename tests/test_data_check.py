"""`python -m data.check`, as a user calls it; and the scripts' way from a file to a batch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

import data
from args import DataArguments, SFTConfig, parse
from common.errors import InputError
from data import check, scenes
from models import core_mapper_for

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def test_page_and_table_as_a_user_gets_them(tmp_path: Path, pairs_json: Path, image_dir: Path, llava: str) -> None:
    rows = json.loads(pairs_json.read_text())
    rows[1]["prompt"] = "<script>alert(1)</script> & what?"
    rows += [rows[0] | {"image": "gone.png"}, rows[0] | {"image": "gone2.png"}, rows[0] | {"chosen": ""}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    flags = (
        f"--dataset_name plain_dpo --data_path {tmp_path}/d.json --image_root {image_dir} --output_dir {tmp_path}/out"
    )
    model = f"--model_name_or_path {llava} --max_length 500 --max_target_length 3"
    done = subprocess.run(
        [sys.executable, "-m", "data.check", *flags.split(), *model.split()],
        cwd=ROOT,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Checking images: 100%" in done.stderr  # the progress bar
    table = {
        line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1] for line in done.stdout.splitlines() if "  " in line
    }
    assert table["plain_dpo (preference rows)"] == "11" and table["usable"] == "8" and table["cannot be used"] == "3"
    assert table["names the image ..., which does not exist"] == "2" and table["its chosen is empty"] == "1"
    assert table["length limits: rows"] == "8" and int(table["length limits: cut tokens"]) > 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<article>") == 8 and page.count("<img ") == 8
    assert "<script>" not in page and "&lt;script&gt;" in page
    processor = core_mapper_for(llava).processor(llava)
    row = {"prompt": [{"role": "user", "content": "<image>" + rows[0]["prompt"]}]}
    text = processor.render(row["prompt"], add_generation_prompt=True, images=1)
    ids = processor.encode_prompts([text], [[str(image_dir / rows[0]["image"])]])[0][0]
    images = ids.count(processor.tokenizer.convert_tokens_to_ids("<image>"))
    assert f"&lt;image&gt; × {images}</span>" in page
    assert f"{len(ids)} tokens, {images} of them for images" in page
    assert f"rank 0, {len(processor.encode_response(rows[0]['chosen']))} tokens" in page
    assert "row 8" in page and "gone.png, which does not exist" in page
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 3


def test_conversations_show_what_is_trained(
    tmp_path: Path, conversations_json: Path, image_dir: Path, llava: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        f"--dataset_name vlquery_json --data_path {conversations_json} --image_root {image_dir} --output_dir {tmp_path}"
    )
    assert check.main([*flags.split(), "--model_name_or_path", llava, "--train_on", "last"]) == 0
    page = (tmp_path / "index.html").read_text()
    answers = [c["conversations"][-1]["value"] for c in json.loads(conversations_json.read_text())]
    assert all(f"<span class=trained>{answer}</span>" in page for answer in answers)
    assert page.count("<span class=trained>") == 1 + 2 * len(answers)  # legend; answer and end token of the last turn
    assert "turns of the assistant" in capsys.readouterr().out


def test_without_a_model_and_as_prompts(tmp_path: Path, pairs_json: Path, image_dir: Path) -> None:
    flags = f"--dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --output_dir {tmp_path}"
    assert check.main([*flags.split(), "--kind", "prompt", "--show_rows", "2", "--decode_images", "True"]) == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("<article>") == 2 and "<span class=special>&lt;image&gt;</span>" in page
    with pytest.raises(InputError, match="holds preference rows"):
        check.main([*flags.split(), "--kind", "conversation"])


def test_decoding_finds_damage_that_the_load_does_not(tmp_path: Path) -> None:
    Image.effect_noise((300, 300), 80).save(tmp_path / "a.gif")
    content = bytearray((tmp_path / "a.gif").read_bytes())
    content[3000:5560] = bytes(range(256)) * 10
    (tmp_path / "a.gif").write_bytes(content)
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.gif", "prompt": "Q?", "chosen": "a", "rejected": "b"}]))
    args = DataArguments(dataset_name="plain_dpo", data_path=str(tmp_path / "d.json"))
    rows = data.load_rows(args)[0]
    quick, full = (
        data.verify(rows, "preference", str(tmp_path), False, decode=decode).problem[0] for decode in (False, True)
    )
    assert quick is None and "a.gif, which is broken or cut off" in str(full)


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_labels_of_several_turns_with_a_system_prompt(
    tmp_path: Path, image_dir: Path, llava: str, train_on: str
) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "<image>\nWhat?"),
        ("assistant", "A red square"),
        ("user", "And?"),
        ("assistant", "a blue circle"),
    ]
    row = {"image": "0.png", "conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "d.json").write_text(json.dumps([row]))
    flags = (
        f"--dataset_name vlquery_json --data_path {tmp_path}/d.json --image_root {image_dir} --output_dir {tmp_path}"
    )
    data_args, training_args = parse(
        DataArguments, SFTConfig, argv=[*flags.split(), "--train_on", train_on, "--use_cpu", "True"]
    )
    train = data.load_train_eval(data_args, "conversation", training_args.seed, tmp_path).train
    adapter = core_mapper_for(llava)
    processor = adapter.processor(llava)
    batch = adapter.sft_collator(processor, train_on=data_args.train_on)([train[0]])
    trained = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    end = processor.tokenizer.eos_token
    assert trained.replace(" ", "") == ("Aredsquare" + end if train_on == "all" else "") + "abluecircle" + end
    assert "Be brief." in processor.tokenizer.decode(batch["input_ids"][0])


def test_a_set_without_a_usable_row_is_not_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that hold no preference are no mistakes, but a set of nothing else trains nothing."""
    same = {"response": "a", "score": 1}
    (tmp_path / "d.json").write_text(json.dumps([{"prompt": "Q?", "completions": [same, same | {"response": "b"}]}]))
    flags = f"--dataset_name {tmp_path}/d.json --output_dir {tmp_path}/out"
    assert check.main(flags.split()) == 1
    assert "NOT ONE ROW CAN BE USED" in capsys.readouterr().out


def test_page_says_what_was_understood(
    tmp_path: Path, image_dir: Path, llava: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "image": "0.png",
        "prompt": "Is it red?",
        "chosen": "Yes.",
        "rejected": "No.",
        "topic": "colour",
        "box": {"x": 1},
    }
    (tmp_path / "d.json").write_text(json.dumps([row, row | {"image": "plain.png"}]))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (30, 30), "black").save(pictures / "plain.png")
    Image.radial_gradient("L").save(pictures / "0.png")
    flags = (
        f"--dataset_name plain_dpo --data_path {tmp_path}/d.json --image_root {pictures} --output_dir {tmp_path}/out"
    )
    assert check.main([*flags.split(), "--model_name_or_path", llava]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    table = {line[0]: line[1] for line in lines if len(line) == 2}
    assert table["columns read"] == "chosen, image, prompt, rejected"
    assert table["columns kept as your own"] == "topic (string)" and table["columns not kept"].startswith(
        "box: neither"
    )
    assert table["pictures of a single colour, of 2"] == "1" and table["usable rows without an image"] == "0"
    assert table["characters of the last question"].startswith("10 to 10,")
    processor = core_mapper_for(llava).processor(llava)
    text = processor.render([{"role": "user", "content": "<image>Is it red?"}], add_generation_prompt=True, images=1)
    tokens = len(processor.encode_prompts([text], [[str(pictures / "0.png")]])[0][0])
    assert table["tokens of a prompt, images included"].startswith(f"{tokens} to {tokens},")
    longest = max(len(processor.encode_response(answer)) for answer in ("Yes.", "No."))
    assert table["tokens of a row (with its longest response)"].startswith(f"{tokens + longest} to {tokens + longest},")
    assert "your columns: topic: colour" in (tmp_path / "out" / "index.html").read_text()
    (tmp_path / "t.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "image"}]))
    assert check.main([flag.replace("d.json", "t.json") for flag in flags.split()]) == 0
    assert "NOT ONE ROW HAS AN IMAGE" in capsys.readouterr().out


FIXED = {
    "plain_dpo": [
        {
            "image": "red.png",
            "prompt": "Q?",
            "chosen": "a",
            "rejected": "b",
            "margin": 0.5,
            "scores": [2, 1],
            "level": 3,
        },
        {
            "image": ["red.png", "blue.png"],
            "prompt": "<image> or <image>?",
            "chosen": "a",
            "rejected": "b",
            "tags": ["x"],
        },
        {"prompt": "Q?", "chosen": "a", "rejected": "b", "image_rejected": "blue.png"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ],
    "mmrlhf": [{"image": "red.png", "question": "Q?", "responses": ["a", "b", "c"], "ranks": [1, 3, 2], "why": None}],
    "vlquery_json": [
        {
            "image": "red.png",
            "conversations": [{"from": "user", "value": "Q?"}, {"from": "gpt", "value": "\u00e9"}],
            "n": 1.5,
        },
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "user", "value": "Q?"},
                {"from": "gpt", "value": "A"},
            ]
        },
    ],
    "prompts": [{"image": "red.png", "prompt": "Q?", "reference": "A", "good": True}],
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_fixed_rows_load_to_equal_rows(tmp_path: Path, name: str, as_bytes: bool) -> None:
    images = ROOT / "tests" / "cases" / "layouts" / "images"
    rows, args = FIXED[name], DataArguments(name, str(tmp_path / "d.jsonl"), str(images))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if as_bytes:  # as a parquet file holds them
        picture = {n: {"bytes": (images / n).read_bytes(), "path": n} for n in ("red.png", "blue.png")}
        keys = ["image", "image_rejected"]
        rows = [
            {k: picture.get(v, v) if k in keys and isinstance(v, str) else v for k, v in row.items()} for row in rows
        ]
        rows = [row for row in rows if not isinstance(row.get("image"), list)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.jsonl")
    if name == "prompts":
        args.dataset_name, args.data_path = str(tmp_path / "d.jsonl"), None
    flags = f"--dataset_name {args.dataset_name} --image_root {images} --output_dir {tmp_path}/out --fix {tmp_path}/new/fixed.jsonl"
    check.main([*flags.split(), *(["--data_path", args.data_path] if args.data_path else [])])

    before, verdicts, kind = data.checked_rows(args, None)
    before = before.select([i for i, problem in enumerate(verdicts.problem) if problem is None])
    root = None if as_bytes else str(images)
    after, verdicts, again = data.checked_rows(DataArguments(f"{tmp_path}/new/fixed.jsonl", image_root=root), None)
    assert again == kind and len(after) == len(before) > 0 and not any(verdicts.problem)

    def comparable(row: dict) -> dict:
        for key in ("images", "image_rejected"):
            values = row[key] if isinstance(row.get(key), list) else [row[key]] if row.get(key) else []
            row[key] = [v["bytes"] if isinstance(v, dict) and v["bytes"] else Path(v).read_bytes() for v in values]
        return {k: v for k, v in row.items() if k not in ("source", "where", "columns") and v is not None}

    assert [comparable(row) for row in after] == [comparable(row) for row in before]


def test_shapes_serves_all_three_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "NUM_SCENES", 40)
    for kind, column in (("conversation", "messages"), ("preference", "responses"), ("prompt", "reference")):
        train, held, info = data.load_train_eval(DataArguments(dataset_name="shapes", eval_ratio=0.2), kind, 0)
        assert len(train) + len(held) == 40 and train[0][column] and info["sets"][0]["bad"] == 0
        assert train[0]["images"][0]["bytes"] and ("responses" in train.column_names) == (kind == "preference")
