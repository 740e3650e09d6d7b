"""Readers of the public formats, and what they say about a wrong file: one sentence with file, row and fix."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from common.errors import InputError, run
from eval import chair, language, yesno
from eval.answer_files import read_answers
from eval.benchmark_files import TASKS, prompt, read_task

GOLDENS = Path(__file__).parent / "goldens" / "eval"
PNG = b"\x89PNG"

# task, file, rows, id of the first row, what its prompt starts and ends with
FORMATS = [
    ("mme", "mme/MME.tsv", 168, "0", "Is the pillow", "Please answer yes or no."),
    ("pope", "pope/coco_pope_random.json", 72, "random/1", "Is there a bottle", "in the image?"),
    (
        "hallusion",
        "hallusion/HallusionBench.tsv",
        59,
        "VD_illusion_1_0_0_0",
        "Is statement 0",
        "Please answer yes or no.",
    ),
    ("hallusion", "hallusion/HallusionBench.json", 75, "VD_illusion_1_0_0_0", "Is statement 0", "yes or no."),
    ("amber", "amber/query_all.json", 79, "1", "Please say", "the picture shows."),
    ("mmbench", "mmbench/MMBench_DEV_EN.tsv", 137, "3", "Question: What do you see", "from the options above. "),
    ("seed", "seed/SEED-Bench.json", 54, "589937", "What is seen", "from the given choices directly."),
    ("mmmu", "mmmu/validation-00000-of-00001.parquet", 72, "validation_Art_1", "", "choices directly."),
    ("mathvista", "mathvista/testmini.json", 72, "1", "Hint: answer with a list.", "about the picture?"),
    ("mmvet", "mmvet/mm-vet.json", 27, "v1_0", "What is shown?", "#v1_0"),
    ("mmhal", "mmhal/mmhal-bench_answer_template.json", 96, "0", "Question 0", "about the carrot?"),
    ("objhal", "objhal/obj_halbench.jsonl", 30, "0", "What would you say", "many words."),
    ("vlrewardbench", "vl_rewardbench/test-00000-of-00001.parquet", 78, "RLAIF-V-9970", "", ""),
    ("mmrb", "multimodal_rewardbench/all_data.json", 90, "nocaps_0", "What is it? 0", "0"),
    ("mmrlhf", "mmrlhf_rewardbench/mm_reward_bench.jsonl", 79, "0", "Prompt 7?", "Prompt 7?"),
]


@pytest.mark.parametrize("task, file, count, first, starts, ends", FORMATS)
def test_public_formats_are_read(task: str, file: str, count: int, first: str, starts: str, ends: str) -> None:
    rows = read_task(task, GOLDENS / file)
    assert (len(rows), rows[0]["id"]) == (count, first)
    text = prompt(task, rows[0])
    assert text.startswith(starts) and text.endswith(ends)
    assert prompt(task, rows[0], " Now.").endswith(" Now.")
    for row in rows:
        assert all(isinstance(i, str) or i["bytes"].startswith(PNG) for i in row["images"])
    assert any(row["images"] for row in rows)


def test_image_references_of_a_tsv_point_at_the_same_image() -> None:
    rows = read_task("mme", GOLDENS / "mme/MME.tsv")
    assert rows[1]["images"] == rows[0]["images"] != rows[2]["images"]
    circular = {int(r["id"]): r for r in read_task("mmbench", GOLDENS / "mmbench/MMBench_DEV_EN.tsv")}
    assert circular[1_000_003]["images"] == circular[3]["images"]


def test_rows_without_an_image_have_none() -> None:
    rows = read_task("hallusion", GOLDENS / "hallusion/HallusionBench.json")
    assert all(not r["images"] for r in rows if r["category"] == "VS" and r["figure_id"] == "0")


def test_mmmu_folder_takes_validation_only_in_order_of_subjects(tmp_path: Path) -> None:
    source = GOLDENS / "mmmu/validation-00000-of-00001.parquet"
    for name in ("Math/validation-0.parquet", "Math/dev-0.parquet", "Art/test-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / name)
    assert len(read_task("mmmu", tmp_path)) == 72


def test_seed_tsv_and_image_folder(tmp_path: Path) -> None:
    cell = (GOLDENS / "mme/MME.tsv").read_text().split("\n")[1].split("\t")[1]
    (tmp_path / "s.tsv").write_text(
        f"index\tquestion\tA\tB\tC\tD\tanswer\timage\tcategory\n7\tQ?\ta\tb\tc\td\tB\t{cell}\tScene\n"
    )
    row = read_task("seed", tmp_path / "s.tsv")[0]
    assert (row["label"], row["category"], row["choices"]["D"]) == ("B", "Scene", "d")
    assert read_task("pope", GOLDENS / "pope/coco_pope_random.json", image_root="/images")[0]["images"][0].startswith(
        "/images/"
    )


def test_own_questions(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"image": "0.png", "question": "What?", "kind": "x"}\n{"prompt": "Hello"}\n')
    rows = read_task("plain", file)
    assert rows[0] == {"kind": "x", "id": "0", "images": [str(tmp_path / "0.png")], "question": "What?"}
    assert rows[1]["images"] == []


WRONG = [
    ("pope", '{"question_id": 1, "image": "a", "text": "t"}', r"f\.json: row 0 has no 'label'"),
    ("pope", '{"question_id": 1, "image": "a", "text": "t", "label": "maybe"}', r"row 0 has the label 'maybe'"),
    ("pope", '{"question_id": 1, "image": "a", "text": "t", "label": "yes"}\n{"question_id"', r"line 2 is not JSON"),
    ("pope", "", "holds no rows"),
    ("pope", '{"question_id": 1, "image": "a", "text": "t", "label": "yes"}\n' * 2, r"row 1 repeats the id 'f/1'"),
    ("pope", "[1]", "row 0 is a JSON number, an object is expected"),
    ("pope", "[1]\n[2]", "line 1 is not a JSON object"),
    ("pope", "7", "holds one JSON number; a list of objects, or one object per line, is expected"),
    ("pope", '{"question_id": 1,\n "image"', "line 2 is not JSON"),
    ("amber", '{"id": 1}', "row 0 has no 'image'"),
    ("mmvet", "[]", r"pass mm-vet\.json"),
    ("seed", "{}", r"pass SEED-Bench\.json"),
    ("mmhal", '[{"question_type": "a", "image_id": 1, "image_src": "x", "image_content": [], "question": "q", "gt_answer": "a"}]',
     "has 1 rows, MMHal-Bench has 96 in a fixed order"),
    ("mme", "index\timage\tquestion\tanswer\tcategory\n0\t5\tq\tYes\tOCR\n", "row 0 refers to the image of row '5'"),
    ("mme", "index\timage\tquestion\tanswer\tcategory\n0\tabc\n", "row 0 has more or fewer cells than the header"),
    ("mme", "just text", "holds no tab-separated rows"),
    ("mme", "index\timage\tquestion\tanswer\tcategory\n0\t" + "*" * 80 + "\tq\tYes\tOCR\n", "image of row 0 is not base64"),
    ("hallusion", "[{}]", "row 0 has no 'category'"),
    ("chair", "{}", "has no 'images'; pass a COCO 2014 annotation file"),
    ("mmmu", "text", "is not JSON, and it holds no tab-separated rows"),
    ("plain", "[{}]", "row 0 has no 'question' or 'prompt'"),
    ("mmrb", '[{"ID": "a", "Text": "t", "Output1": "x", "Output2": "y", "Better": "Output1"}]', "row 0 has no 'Category'"),
    ("vlrewardbench", "text", "is not JSON, and it holds no tab-separated rows"),
]  # fmt: skip


@pytest.mark.parametrize("task, content, sentence", WRONG)
def test_wrong_files_are_one_sentence(task: str, content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / ("f.tsv" if "\t" in content or task == "mme" else "f.json")
    file.write_text(content)
    with pytest.raises(InputError, match=sentence) as error:
        read_task(task, file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; docs/evaluation\.md says where to get it"):
        read_task("mme", tmp_path / "MME.tsv")
    with pytest.raises(InputError, match="unknown task 'mm'"):
        read_task("mm", tmp_path)
    for start, sentence in {b"PAR1\xff\xfe": "is not a parquet file", b"\xff\xd8JFIF": "is not a UTF-8 text file",
                            b"PK\x03\x04": "is a zip archive; unpack it", b"\x1f\x8b\x08": "is a gzip archive"}.items():  # fmt: skip
        (tmp_path / "x.json").write_bytes(start)
        with pytest.raises(InputError, match=sentence):
            read_task("amber", tmp_path / "x.json")


ROWS = [{"id": "a"}, {"id": "b"}]


@pytest.mark.parametrize(
    "content",
    ['{"id": "b", "answer": "2"}\n{"id": "a", "answer": "1"}', '{"index": "a", "prediction": "1"}\n{"index": "b", "prediction": "2"}',
     '{"answer": "1"}\n{"answer": "2"}'],
)  # fmt: skip
def test_answers_of_other_tools(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert read_answers(tmp_path / "a.jsonl", ROWS) == ["1", "2"]
    (tmp_path / "a.json").write_text('{"a": "1", "b": "2", "c": "left over"}')
    assert read_answers(tmp_path / "a.json", ROWS) == ["1", "2"]


@pytest.mark.parametrize(
    "content, sentence",
    [('{"id": "a", "answer": "1"}', r"has no answer to 'b' \(1 of 2 are missing\); run eval\.generate again"),
     ('{"id": "a", "answer": "1"}\n{"id": "a", "answer": "1"}', "row 1 answers 'a' a second time"),
     ('{"id": "a", "answer": 1}\n{"id": "b", "answer": "1"}', "the answer of row a is int, a string is expected"),
     ('{"answer": "1"}', "1 answers without ids for 2 questions"), ('{"id": "a"}\n{"id": "b"}', "row 0 has no answer"),
     ('{"answer": "1"}\n{"id": "b", "answer": "1"}', "row 0 has no 'id', which names the question")],
)  # fmt: skip
def test_wrong_answers_are_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_answers(tmp_path / "a.jsonl", ROWS)


def test_amber_annotations_must_hold_every_id(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps([{"id": 1, "type": "generative", "truth": []}]))
    with pytest.raises(InputError, match="has no annotation with the id 2"):
        yesno.read_amber_truth(tmp_path / "annotations.json", [{"id": "1"}, {"id": "2"}])


def test_coco_categories_must_be_in_the_synonyms(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("zebra\n")
    table = chair.ObjectTable(tmp_path / "s.txt", all_pairs=False)
    with pytest.raises(InputError, match=r"the synonyms hold no '.*', a COCO category"):
        chair.coco_truth(GOLDENS / "chair/annotations", set(range(600_000)), table, lambda text: ([], []))


def test_errors_end_a_command_with_status_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run(lambda: yesno.main(["--task", "pope", "--data_path", "no/file", "--answers", "x"]))
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "no/file does not exist" in shown and "Traceback" not in shown


def test_missing_language_data_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def nothing(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", nothing)
    for make, command in (
        (language.tokenizer, "nltk has no punkt_tab: python -m nltk.downloader punkt_tab"),
        (language.noun_lemmatizer, "nltk has no wordnet: python -m nltk.downloader wordnet"),
        (language.noun_tagger, "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng"),
        (language.singularizer, "python -m nltk.downloader wordnet"),
    ):
        with pytest.raises(InputError, match=command):
            make()
    monkeypatch.setitem(sys.modules, "spacy", None)
    for make, model in ((language.word_similarity, "en_core_web_lg"), (language.phrase_tagger, "en_core_web_trf")):
        with pytest.raises(
            InputError, match=rf"pip install -r requirements-eval\.txt && python -m spacy download {model}"
        ):
            make()


def test_amber_command_stops_where_a_model_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    folder = GOLDENS / "amber"
    argv = [
        "--task",
        "amber",
        "--data_path",
        str(folder / "query_all.json"),
        "--answers",
        str(folder / "responses.json"),
    ]
    with pytest.raises(InputError, match=r"nltk\.downloader|spacy download"):
        chair.main([*argv, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # nothing half done


def test_documented_commands_use_flags_that_exist() -> None:
    root = Path(__file__).parents[1]
    source = "".join(p.read_text() for p in (root / "eval").glob("*.py"))
    page = re.sub(r"\\\n\s*", "", (root / "docs/evaluation.md").read_text())  # one command, one line
    commands = re.findall(r"^python -m eval\.(\w+) (.*)$", page, re.M)
    assert len(commands) > 25
    for module, line in commands:
        assert (root / "eval" / f"{module}.py").is_file()
        task = re.search(r"--task (\w+)", line)
        assert task is None or task[1] in TASKS
        for flag in re.findall(r"--\w+", line):
            assert f'"{flag}"' in source, f"{module} {flag}"


def test_what_a_model_is_asked_by_hand(tmp_path: Path) -> None:
    """MMBench with its hint, MathVista with its unit, MMMU with all images, HallusionBench's 1 as Yes."""
    table = "index\tquestion\thint\tA\tB\timage\n1\tWhich?\tLook up.\tone\ttwo\ta.png\n"
    (tmp_path / "mmbench.tsv").write_text(table)
    (row,) = read_task("mmbench", tmp_path / "mmbench.tsv")
    assert row["question"] == "Hint: Look up.\nQuestion: Which?\nOptions:\nA. one\nB. two\n"

    asked = {
        "question_type": "free_form",
        "answer_type": "integer",
        "question": "How long?",
        "unit": "cm",
        "metadata": {},
    }
    (tmp_path / "mathvista.json").write_text(json.dumps({"1": asked | {"image": "a.png", "answer": "3"}}))
    (row,) = read_task("mathvista", tmp_path / "mathvista.json")
    assert (
        row["question"].splitlines()[1:] == ["Question: How long? (Unit: cm)"]
        and "an integer answer" in row["question"]
    )

    many = {
        "id": "validation_Art_Theory_1",
        "question": "<image 1> or <image 2>?",
        "options": "['a', 'b']",
        "answer": "A",
    }
    many |= {"question_type": "multiple-choice", "image_1": "1.png", "image_2": "2.png"}
    (tmp_path / "mmmu.jsonl").write_text(json.dumps(many))
    (row,) = read_task("mmmu", tmp_path / "mmmu.jsonl")
    assert [Path(str(image)).name for image in row["images"]] == ["1.png", "2.png"] and row["subject"] == "Art_Theory"

    key = dict.fromkeys("category subcategory visual_input set_id figure_id question_id".split(), "1")
    lines = [key | {"question": "Q?", "gt_answer": answer, "filename": "a.png"} for answer in ("1", "0")]
    (tmp_path / "HallusionBench.json").write_text(json.dumps([lines[0], lines[1] | {"question_id": "2"}]))
    assert [row["label"] for row in read_task("hallusion", tmp_path / "HallusionBench.json")] == ["Yes", "No"]
