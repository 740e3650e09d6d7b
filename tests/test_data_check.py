"""`python -m data.check`, as a user calls it; and the scripts' way from a file to a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import data
from args import DataArguments, SFTConfig, parse
from common.errors import InputError
from data import check
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
        timeout=300,
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
    from PIL import Image

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


def test_shapes_serves_all_three_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = pytest.importorskip("data.shapes")
    monkeypatch.setattr(shapes, "NUM_SCENES", 40)
    for kind, column in (("conversation", "messages"), ("preference", "responses"), ("prompt", "reference")):
        train, held, info = data.load_train_eval(DataArguments(dataset_name="shapes", eval_ratio=0.2), kind, 0)
        assert len(train) + len(held) == 40 and train[0][column] and info["sets"][0]["bad"] == 0
        assert train[0]["images"][0]["bytes"] and ("responses" in train.column_names) == (kind == "preference")
