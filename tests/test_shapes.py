"""The embedded data: captions are true of the pixels, wrong ones are wrong, scores equal those by hand."""

import io
import itertools
import json
import random
import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from args import DataArguments
from common.errors import InputError
from data import load_train_eval, scenes, shapes
from data.scenes import CELL, COLOURS, PLACES, Thing
from eval import shapes_report
from eval.shapes import marked, mentions, read_scenes, score_answers, score_captions
from tests.processes import ROOT

SCENE = (Thing("red", "circle", 0), Thing("blue", "star", 7))  # top left, bottom


def drawn(count: int, seed: int = 0, held_out: bool = False) -> list[scenes.Scene]:
    return list(itertools.islice(scenes.scenes(seed, held_out), count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 40 training and 12 held-out scenes."""
    path = tmp_path_factory.mktemp("shapes")
    scenes.write(path, num_train=40, num_eval=12, seed=0)
    return path


def data_args(name: str, path: Path | None = None) -> DataArguments:
    return DataArguments(dataset_name=name, data_path=str(path) if path else None)


# ---- Scenes ---------------------------------------------------------------------------------------------------------


def test_files_are_a_function_of_the_seed(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        scenes.write(tmp_path / name, num_train=40, num_eval=12, seed=seed)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(files) == 5 + 40 + 12
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    assert (folder / "sft.json").read_text() != (tmp_path / "other" / "sft.json").read_text()


def test_no_scene_is_on_both_sides_whatever_the_seeds() -> None:
    held_out = set(drawn(300, seed=0, held_out=True))
    assert len(held_out) == 300
    for seed in range(3):
        assert not held_out & set(drawn(1000, seed=seed))


def test_scenes_have_one_to_four_shapes_at_different_places_with_different_names() -> None:
    scenes = drawn(500)
    assert {len(scene) for scene in scenes} == {1, 2, 3, 4}
    for scene in scenes:
        assert len({t.place for t in scene}) == len({t.name for t in scene}) == len(scene)
        assert [t.place for t in scene] == sorted(t.place for t in scene)


def nearest_colour(pixel: tuple[int, ...]) -> str | None:
    """The colour that a pixel shows, None for the background."""
    known = {**COLOURS, None: (237, 237, 237)}
    return min(known, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, known[name], strict=True)))


def test_truth_agrees_with_the_pixels() -> None:
    rng = random.Random(0)
    for scene in drawn(200):
        image = scenes.picture(scene, rng)
        seen = {}
        for place in range(len(PLACES)):
            row, column = divmod(place, 3)
            colour = nearest_colour(image.getpixel((column * CELL + CELL // 2, row * CELL + CELL // 2)))
            if colour is not None:
                seen[place] = colour
        assert seen == {thing.place: thing.colour for thing in scene}


def test_shapes_look_different() -> None:
    """Each pair of shapes of one size differs in a twentieth of the cell's pixels at least."""

    class Middle(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return (a + b) / 2

        def randint(self, a: int, b: int) -> int:
            return (a + b) // 2

    masks = []
    for shape in scenes.SHAPES:
        cell = scenes.picture((Thing("black", shape, 4),), Middle()).crop((CELL, CELL, 2 * CELL, 2 * CELL)).convert("L")
        masks.append([value < 128 for value in cell.tobytes()])
    for one, other in itertools.combinations(masks, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) > 0.05 * CELL**2


# ---- What is said of them -------------------------------------------------------------------------------------------


def test_caption_and_its_inverse() -> None:
    assert scenes.caption(SCENE) == "Top left a red circle, bottom a blue star."
    for scene in drawn(200):
        assert tuple(scenes.read_caption(scenes.caption(scene))) == scene
    for broken in ("", "A red circle.", "Top left a red circle, top a star.", "Top a pink circle."):
        assert scenes.read_caption(broken) is None


def test_three_captions_in_ten_name_something_that_is_not_there() -> None:
    rng = random.Random(0)
    noisy = 0
    for scene in drawn(3000):
        said = scenes.read_caption(scenes.noisy_caption(scene, rng))
        added = [thing for thing in said if thing not in scene]
        assert set(scene) <= set(said) and len(added) <= 1
        for thing in added:
            assert thing.name == "purple circle" not in {t.name for t in scene}
            assert thing.place not in {t.place for t in scene} and any(t.shape == "star" for t in scene)
        noisy += bool(added)
    assert 0.27 < noisy / 3000 < 0.33


def test_rejected_captions_hold_exactly_the_error_that_they_claim() -> None:
    rng = random.Random(0)
    kinds = set()
    for scene in drawn(1000):
        chosen, rejected, error = scenes.preference(scene, rng)
        assert tuple(scenes.read_caption(chosen)) == scene
        said = scenes.read_caption(rejected)
        wrong, missing = [t for t in said if t not in scene], [t for t in scene if t not in said]
        names = {t.name for t in scene}
        match error:
            case "object":
                assert len(wrong) == 1 and not missing and wrong[0].name not in names
            case "colour":
                assert len(wrong) == len(missing) == 1 and wrong[0].name not in names
                assert wrong[0] == missing[0]._replace(colour=wrong[0].colour)
            case "position":
                assert len(wrong) == len(missing) == 1
                assert wrong[0] == missing[0]._replace(place=wrong[0].place)
                assert wrong[0].place not in {t.place for t in scene}
            case "omission":
                assert not wrong and len(missing) == 1 and said
        kinds.add(error)
    assert kinds == set(scenes.ERRORS)
    with pytest.raises(ValueError, match="omission"):
        scenes.wrong_caption(SCENE[:1], "omission", rng)


def test_questions_are_answered_from_the_scene() -> None:
    rng = random.Random(0)
    yes = no = 0
    for scene in drawn(1000):
        asked = scenes.questions(scene, 6, rng)
        assert len({q.text for q in asked}) == 6
        for question in asked:
            words = question.text.removesuffix("?").split()
            if words[0] == "Is":
                present = " ".join(words[3:]) in {t.name for t in scene}
                assert question.answer == ("Yes." if present else "No.")
                yes, no = yes + present, no + (not present)
            else:
                what = words[2]
                count = sum(what == "shapes" or what in (f"{t.shape}s", f"{t.shape}es") for t in scene)
                assert question.answer == f"{count}."
    assert 0.4 < yes / (yes + no) < 0.6


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_files_are_in_the_public_formats(folder: Path) -> None:
    """They pass the loaders that users' files pass, without a refused row."""
    sft = load_train_eval(data_args("vlquery_json", folder / "sft.json"), "conversation", 0)
    assert len(sft.train) == 80 and not sft.info["sets"][0]["bad"]
    pairs = load_train_eval(data_args("plain_dpo", folder / "pairs.json"), "preference", 0)
    assert len(pairs.train) == 40 and not pairs.info["sets"][0]["bad"]
    prompts = load_train_eval(data_args(str(folder / "prompts.json")), "prompt", 0)
    assert len(prompts.train) == 40 and prompts.train[0]["reference"]
    record = json.loads((folder / "pairs.json").read_text())[0]
    assert {"image", "prompt", "chosen", "rejected"} <= set(record)
    assert Image.open(folder / record["image"]).size == (scenes.SIZE, scenes.SIZE)


def test_held_out_pairs_are_of_held_out_scenes(folder: Path) -> None:
    for name, held_out in (("pairs", False), ("eval_pairs", True)):
        for row in json.loads((folder / f"{name}.json").read_text()):
            assert scenes.is_held_out(tuple(scenes.read_caption(row["chosen"]))) == held_out
    for row in read_scenes(folder / "eval.json"):
        assert scenes.is_held_out(tuple(row["scene"])) and scenes.caption(row["scene"]) == row["caption"]


def test_embedded_set_serves_all_three_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "NUM_SCENES", 30)
    columns = {"conversation": "messages", "preference": "responses", "prompt": "reference"}
    for kind, column in columns.items():
        rows = load_train_eval(data_args("shapes"), kind, 0).train
        assert len(rows) == 30 and rows[0][column]
        assert Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])).size == (scenes.SIZE, scenes.SIZE)
    with pytest.raises(InputError, match="drawn, not read"):
        load_train_eval(data_args("shapes", Path("x.json")), "prompt", 0)


def test_initial_model_is_a_plain_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from models import core_mapper_for

    shapes.save_initial_model(tmp_path, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.config.architectures == ["LlavaForConditionalGeneration"] and 0.8e6 < model.num_parameters() < 2.5e6
    hub = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.")
    names = load_file(tmp_path / "model.safetensors")  # as in llava-hf/llava-1.5-7b-hf, which inference servers expect
    assert all(name.startswith(hub) for name in names) and all(any(n.startswith(part) for n in names) for part in hub)
    processor = core_mapper_for(str(tmp_path)).processor(str(tmp_path))
    image = scenes.picture(SCENE, random.Random(0))
    messages = [
        {"role": "user", "content": scenes.CAPTION_PROMPT},
        {"role": "assistant", "content": scenes.caption(SCENE)},
    ]
    encoded = processor(convs=[messages], images=[[image]])
    trained = encoded["labels"][0][encoded["labels"][0] >= 0]
    assert processor.tokenizer.decode(trained) == f" {scenes.caption(SCENE)}</s>"
    assert (encoded["input_ids"] == processor.tokenizer.image_token_id).sum() == 9
    # one token per word, comma, full stop and end
    assert len(trained) == len(scenes.caption(SCENE).split()) + 3
    assert model(**encoded).loss.isfinite()


# ---- Scores ---------------------------------------------------------------------------------------------------------


def test_chair_by_hand() -> None:
    captions = [
        "Top left a red circle, bottom a blue star.",  # right
        "Bottom a blue star, top left a red circle.",  # right, in another order
        "Top a red circle, bottom a blue star.",  # a wrong place is not a hallucination
        "Top left a red circle, left a purple circle, right a green cross.",  # two false, one missing
        "nothing",
    ]
    scores = score_captions([SCENE] * 5, captions)
    assert scores["chair_i"] == pytest.approx(2 / (2 + 2 + 2 + 3 + 0))
    assert scores["chair_s"] == pytest.approx(1 / 5)
    assert scores["coverage"] == pytest.approx((2 + 2 + 2 + 1 + 0) / 10)
    assert scores["exact_captions"] == pytest.approx(2 / 5)
    assert score_captions([SCENE], [""])["chair_i"] == 0


def test_an_object_named_twice_counts_twice() -> None:
    scores = score_captions([SCENE], ["Top a green cross, left a green cross, top left a red circle."])
    assert scores["chair_i"] == pytest.approx(2 / 3) and scores["coverage"] == pytest.approx(1 / 2)
    assert mentions("A Red circle, a red  circle and a reddish circle") == ["red circle"]


def test_answers_by_hand() -> None:
    scores = score_answers(["Yes.", "No.", "Yes.", "No.", "3.", "1."], ["yes", "Yes.", "Yes, it is.", "", "3.", "2."])
    assert scores == {"yesno_accuracy": 2 / 4, "yes_share": 3 / 4, "counting_accuracy": 1 / 2}


def test_wrong_words_are_marked() -> None:
    text = "Top a red circle, left a purple circle, bottom a blue star."
    pieces = marked(text, SCENE)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, wrong in pieces if wrong] == ["Top", "left a purple circle"]
    assert not any(wrong for _, wrong in marked(scenes.caption(SCENE), SCENE))
    html = shapes_report.marked_html("A red star <b>", SCENE)
    assert html == "A <mark>red star</mark> &lt;b&gt; <del>red circle, blue star</del>"


# ---- Report ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo(folder: Path, tmp_path: Path) -> Path:
    """What the stages of the demo leave, by hand."""
    (tmp_path / "data").symlink_to(folder)
    rows = read_scenes(folder / "eval.json")
    scores = dict.fromkeys(shapes_report.SCORES, 0.25)
    for stage in ("sft", "dpo"):
        out = tmp_path / "eval" / stage
        out.mkdir(parents=True)
        (out / "scores.json").write_text(json.dumps({"model": "m"} | scores))
        said = [row["caption"] if stage == "dpo" else "Top a purple circle." for row in rows]
        (out / "answers.jsonl").write_text("".join(json.dumps({"answer": text}) + "\n" for text in said))
        (tmp_path / stage).mkdir()
        history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
        (tmp_path / stage / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "rm").mkdir()
    log = [{"step": 1, "eval_accuracy": 0.5}, {"step": 2, "eval_accuracy": 0.75}]
    (tmp_path / "rm" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (tmp_path / "seconds.tsv").write_text("data\t2.0\nsft\t60.5\nsft\t1.0\nrm\t20\n")
    return tmp_path


def test_report(demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["shapes_report", str(demo)])
    shapes_report.main()
    report = json.loads((demo / "report.json").read_text())
    assert list(report) == ["sft", "rm", "dpo"]
    assert report["rm"] == {"accuracy": 0.75, "seconds": 20}
    assert report["sft"]["seconds"] == 61.5 and report["dpo"]["chair_i"] == 0.25
    page = (demo / "report.html").read_text()
    assert page.count("<polyline") == 2 and page.count("data:image/png;base64,") == 12 and "http" not in page
    assert page.count("<mark>") == 1 + 12 and "0.750" in page
    assert "CHAIR_i" in capsys.readouterr().out


def test_the_notebook(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, as it stands, on the folder of a demo; only `make demo` itself is not run."""
    shown: list[str] = []
    display = types.ModuleType("IPython.display")
    for name in ("HTML", "Image", "Markdown"):
        setattr(display, name, lambda data, name=name, **_: f"{name}: {data}")
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    ran: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    monkeypatch.setattr("sys.argv", ["shapes_report", str(demo)])
    shapes_report.main()
    (demo / "dpo" / "curves.png").write_bytes(b"")
    monkeypatch.chdir(demo / "eval" / "sft")
    (demo / "train_dpo.py").touch()
    (demo / "runs").mkdir()
    (demo / "runs" / "demo").symlink_to(demo)
    cells = json.loads((ROOT / "docs/demo.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # our own file
    assert ran == [["make", "demo"]]
    assert "| sft | 0.25 | 0.25 | 0.25 |" in shown[0] and "| rm |  |  |  | 0.75 |" in shown[0]
    assert shown[1] == "Image: runs/demo/dpo/curves.png"
    assert len(shown) == 2 + 2 * 6 and "<td>sft<td>Top a purple circle." in shown[3]


def test_report_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make demo"):
        shapes_report.report_of(tmp_path)


def test_wrong_evaluation_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output_dir"):
        read_scenes(tmp_path / "eval.json")
    (tmp_path / "eval.json").write_text('[{"image": "x.png"}]')
    with pytest.raises(InputError, match="objects"):
        read_scenes(tmp_path / "eval.json")
