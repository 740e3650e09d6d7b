"""What a processor refuses is found with the rows: before the first step, with file and row, and dropped with the others."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image

import data
from args import DataArguments
from base.images import load_image
from base.row_checks import ProcessorCheck
from base.template import ChatTemplate
from common.errors import InputError
from data import check as data_check
from data.rows import IMAGE_TOKENS
from models import core_mapper_for
from tests import zoo

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "cases"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def processor_of(tmp_path_factory: pytest.TempPathFactory):
    def load(family: str):
        folder = zoo.checkpoint(family)
        return core_mapper_for(str(folder)).processor(str(folder))

    return load


def load(file: Path, image_root: Path, processor, kind: str = "preference", name: str = "plain_dpo", **flags):
    args = DataArguments(name, str(file), str(image_root), **flags)
    return data.load_train_eval(
        args, kind, 0, file.parent if flags.get("on_bad_row") else None, ProcessorCheck(processor)
    )


@pytest.mark.parametrize(
    ("file", "row", "rows"), [("t2/d11_thin.json", 1, 2), ("t2-bugs/wide_in_the_middle.json", None, None)]
)
def test_narrow_pictures_are_named_or_dropped(
    tmp_path: Path, processor_of, file: str, row: int | None, rows: int | None
) -> None:
    images = CASES / Path(file).parent / ("images" if "d11" in file else "im")
    content = json.loads((CASES / file).read_text())
    narrow = [i for i, r in enumerate(content) if r["image"] in ("thin.png", "wide.png")]
    (tmp_path / "d.json").write_text(json.dumps(content))
    processor = processor_of("qwen2_5_vl")
    with pytest.raises(InputError, match=rf"d\.json, row {narrow[0]} .*pixels, which the model's processor refuses"):
        load(tmp_path / "d.json", images, processor)
    found = load(tmp_path / "d.json", images, processor, on_bad_row="drop")
    assert len(found.train) == len(content) - len(narrow) and found.info["sets"][0]["bad"] == len(narrow)
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == len(narrow)


def test_instructblip_takes_one_image(tmp_path: Path, processor_of) -> None:
    row = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}
    rows = [row | {"image": "red.png"}, row | {"image": ["red.png", "blue.png"]}, row]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    root, processor = CASES / "t2" / "images", processor_of("instructblip")
    with pytest.raises(InputError, match=r"2 of 3 rows .*row 1 .*InstructBLIP takes one image per prompt, a row has 2"):
        load(tmp_path / "d.json", root, processor)
    assert len(load(tmp_path / "d.json", root, processor, on_bad_row="drop").train) == 1
    assert len(load(tmp_path / "d.json", root, processor_of("llava")).train) == 3


def test_tokens_of_the_model_itself_are_found(tmp_path: Path, processor_of) -> None:
    processor = processor_of("qwen2_5_vl")
    processor.tokenizer.add_tokens(["<our_img_slot>"])
    row = {"image": "red.png", "prompt": "Q?", "chosen": "Yes.", "rejected": "No."}
    (tmp_path / "d.json").write_text(json.dumps([row, row | {"rejected": "No <our_img_slot>."}]))
    with pytest.raises(InputError, match=r"row 1 .*has <our_img_slot> in its texts"):
        load(tmp_path / "d.json", CASES / "t2" / "images", processor)


def test_turns_that_a_template_refuses_are_found(tmp_path: Path, processor_of) -> None:
    processor = processor_of("qwen2_5_vl")
    processor.processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + processor.processor.chat_template
    )
    processor.template = ChatTemplate(processor.processor, processor.tokenizer)
    talk = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    rows = [{"messages": talk}, {"messages": [{"role": "system", "content": "S"}, *talk]}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"row 1 .*chat template refuses a conversation: no system here"):
        load(tmp_path / "d.json", tmp_path, processor, "conversation", str(tmp_path / "d.json"))


@pytest.mark.parametrize("family", sorted(zoo.BUILDERS))
def test_image_tokens_of_every_family_are_known(processor_of, family: str) -> None:
    """Foreign tokens are refused without the model; the mark `<image>` and XComposer2's, which has no token, aside."""
    processor = processor_of(family)
    assert processor.image_token == "<image>" or IMAGE_TOKENS.fullmatch(processor.image_token)
    check = ProcessorCheck(processor)
    assert not check.tokens().search("A picture of <image> and of a video.")
    assert check.refused_shape([("user", 1, 0)], "preference") is None
    assert check.refused_shape([("user", 1, 0), ("assistant", 0, 0)], "conversation") is None
    assert check.refused_sizes(pa.chunked_array([[[640, 480], None, [64, 64]]])) == {}


def test_data_check_shows_what_the_model_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--dataset_name plain_dpo --data_path {CASES}/t2/d11_thin.json --image_root {CASES}/t2/images --output_dir {tmp_path}"
    assert data_check.main([*flags.split()]) == 0
    assert data_check.main([*flags.split(), "--model_name_or_path", str(zoo.checkpoint("qwen2_5_vl"))]) == 1
    assert "has a picture of N x N pixels" in capsys.readouterr().out
    assert "2000 x 3 pixels" in (tmp_path / "index.html").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_deep_greys_are_scaled(tmp_path: Path) -> None:
    import numpy as np

    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for name, values, dtype in (("unit", ramp, "float32"), ("bytes", ramp * 255, "float32"), ("deep", ramp * 65535, "int32"),
                                ("signed", ramp * 20 - 10, "float32"), ("huge", ramp * 1e9, "float32")):  # fmt: skip
        path = str(tmp_path / f"{name}.tif")
        Image.fromarray(values.astype(dtype)).save(path)
        grey = np.asarray(load_image(path))[..., 0].reshape(-1).astype(int)
        assert grey[0] <= 1 and grey[-1] >= 254 and np.abs(grey - np.arange(256)).max() <= 1, name
    Image.fromarray(np.full((4, 4), np.nan, "float32")).save(tmp_path / "nan.tif")
    with pytest.raises(InputError, match=r"nan\.tif as an image \(it holds values that are not numbers"):
        load_image(str(tmp_path / "nan.tif"))


def test_cases_of_odd_pictures_load_with_what_is_drawn() -> None:
    for case, lowest, highest in (("i1_float_tiff.json", 5, 250), ("i2_transparent.json", 10, 254)):
        flags = {"image_root": str(CASES / "t2" / "images")}
        row = data.load_train_eval(
            DataArguments("plain_dpo", str(CASES / "t2" / case), **flags), "preference", 0
        ).train[0]
        (low, high), *_ = load_image(row["images"][0]).getextrema()
        assert low < lowest and high > highest, case


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    ink = load_image(str(CASES / "t2" / "images" / "ink_on_transparent.png"))
    assert ink.getextrema()[0][0] < 10 and ink.getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert load_image(str(tmp_path / "p.png")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("LA", (1, 1), (7, 255))).getpixel((0, 0)) == (7, 7, 7)
