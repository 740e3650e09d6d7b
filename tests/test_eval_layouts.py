"""Published layouts of answer files: each is scored by what the model said, or refused in one sentence; never the truth, in silence."""

import csv
import io
import itertools
import json
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import InputError
from eval import choice, judged, mathvista, yesno
from eval.answer_files import read_answers
from eval.benchmark_files import prompt, read_task
from eval.files import read_any, read_records

TESTS = Path(__file__).parent
LAYOUTS, GOLDENS = TESTS / "goldens" / "layouts", TESTS / "goldens" / "eval"


def score(main, task: str, data: Path, answers: Path, output: Path, *more: str) -> dict:
    argv = ["--data_path", str(data), "--answers", str(answers), "--output", str(output), *more]
    main((["--task", task] if main is not mathvista.main else []) + argv)
    (entry,) = json.loads((output / "results.json").read_text()).values()
    return entry["scores"]


# answers, as docs/evaluation.md names them | scorer, task, data | a score and its value, counted by hand
TABLE = [
    ("layouts/mme/results", yesno.main, "mme", "layouts/mme/MME.tsv", "perception", 25),  # 1 of 4 right, no pair
    ("layouts/mme/results/color.txt", yesno.main, "mme", "layouts/mme/MME.tsv", "perception", 25),
    ("layouts/mme/predictions.json", yesno.main, "mme", "layouts/mme/MME.tsv", "perception", 25),
    ("layouts/mme/predictions.tsv", yesno.main, "mme", "layouts/mme/MME.tsv", "perception", 25),
    ("layouts/mme/lmms_samples.jsonl", yesno.main, "mme", "layouts/mme/MME.tsv", "perception", 25),
    ("layouts/pope/lines.json", yesno.main, "pope", "layouts/pope/coco_pope_random.json", "random/accuracy", 2 / 3),
    ("layouts/pope/llava.jsonl", yesno.main, "pope", "layouts/pope/coco_pope_random.json", "random/accuracy", 2 / 3),
    ("layouts/pope/lmms_samples.jsonl", yesno.main, "pope", "layouts/pope/coco_pope_random.json", "random/accuracy", 2 / 3),
    ("layouts/pope/llava_three_splits.jsonl", yesno.main, "pope", "layouts/pope", "random/accuracy", 2 / 3),
    ("layouts/pope/llava_three_splits.jsonl", yesno.main, "pope", "layouts/pope", "popular/accuracy", 1),
    ("layouts/pope/llava_three_splits.jsonl", yesno.main, "pope", "layouts/pope", "adversarial/accuracy", 0),
    ("layouts/pope/three_splits.jsonl", yesno.main, "pope", "layouts/pope", "popular/accuracy", 1),
    ("layouts/pope/three_splits.jsonl", yesno.main, "pope", "layouts/pope/coco_pope_popular.json", "popular/accuracy", 1),
    ("layouts/pope/by_split", yesno.main, "pope", "layouts/pope", "adversarial/accuracy", 0),
    ("layouts/pope/by_split", yesno.main, "pope", "layouts/pope", "popular/accuracy", 1),
    ("layouts/amber/answers.json", yesno.main, "amber", "layouts/amber/query/query_all.json", "accuracy", 99.9),  # 1 / 1.001
    ("layouts/hallusion/results.json", yesno.main, "hallusion", "eval/hallusion/HallusionBench.json", "repository/overall/aAcc", None),
    ("layouts/hallusion/results.json", yesno.main, "hallusion", "eval/hallusion/HallusionBench.tsv", "aAcc", None),
    ("layouts/seed/results.json", choice.main, "seed", "eval/seed/SEED-Bench.json", "official/total", 24.07),  # 13 of 54
    ("layouts/mmmu/output.json", choice.main, "mmmu", "layouts/mmmu", "overall", 1 / 3),
    ("layouts/mmmu/outputs", choice.main, "mmmu", "layouts/mmmu", "overall", 1 / 3),
    ("layouts/mathvista/output.json", mathvista.main, "mathvista", "layouts/mathvista/testmini.json", "average", 0.5),
]  # fmt: skip


@pytest.mark.parametrize("answers, main, task, data, metric, value", TABLE)
def test_published_layouts_are_scored(answers, main, task, data, metric, value, tmp_path) -> None:
    if (
        task == "hallusion"
    ):  # the repository's aggregation of the same replies by index, which other tests hold to the official one
        same = GOLDENS / "hallusion/predictions.jsonl"
        value = score(main, task, TESTS / "goldens" / data, same, tmp_path / "by_index")[metric]
    scores = score(main, task, TESTS / "goldens" / data, TESTS / "goldens" / answers, tmp_path / "x")
    assert scores[metric] == pytest.approx(value)


def test_seed_results_are_the_likelihood_variant_too(tmp_path: Path) -> None:
    argv = (
        choice.main,
        "seed",
        GOLDENS / "seed/SEED-Bench.json",
        LAYOUTS / "seed/results.json",
        tmp_path,
        "--likelihood",
    )
    assert score(*argv)["total"] == 24.07


def test_captions_in_cocos_format_are_those_of_the_lines() -> None:
    captions = read_records(GOLDENS / "chair/captions.jsonl")
    rows = [{"id": str(r["image_id"]), "image_id": r["image_id"]} for r in captions]
    found = read_answers(LAYOUTS / "chair/cap_file.json", rows)
    assert found == read_answers(GOLDENS / "chair/captions.jsonl", rows) == [r["caption"] for r in captions]


def test_names_of_coco_images_are_their_numbers(tmp_path: Path) -> None:
    rows = [{"id": "139", "image_id": 139}, {"id": "7", "image_id": 7}]
    lines = [{"image": f"COCO_val2014_{n:012d}.jpg", "caption": f"c{n}"} for n in (7, 139)]
    (tmp_path / "a").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert read_answers(tmp_path / "a", rows) == ["c139", "c7"]


def test_mmhal_template_is_read_for_the_model_and_refused_empty(tmp_path: Path) -> None:
    file = LAYOUTS / "mmhal/filled_template.json"
    rows = read_task("mmhal", file)
    assert read_answers(file, rows) == [f"Answer {n}." for n in range(96)]
    empty = tmp_path / "template.json"
    empty.write_text(re.sub(r'"Answer \d+\."', '""', file.read_text()))
    with pytest.raises(InputError, match="every 'model_answer' is empty; is it the template"):
        read_answers(empty, rows)
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    with pytest.raises(InputError, match="'image_id'"):
        read_answers(shuffled, rows)
    # the answers were read: a judge is asked, and is not there
    with pytest.raises(InputError, match=r"judge http://127\.0\.0\.1:9/v1 failed 8 times"):
        judge = ["--judge", "http://127.0.0.1:9/v1", "--judge_model", "x", "--judge_timeout", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.openai_client._random.uniform", lambda low, high: 0.0)  # no pauses
            score(judged.main, "mmhal", file, file, tmp_path, *judge)


def test_queries_of_mathvista_are_built_where_the_file_has_none() -> None:
    texts = [prompt("mathvista", r) for r in read_task("mathvista", LAYOUTS / "mathvista/testmini.json")]
    assert texts == [
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Which colour has the disc?\nChoices:\n(A) green\n(B) red\n(C) blue",
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, "
        "e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How wide is the disc? (Unit: cm)",
    ]


@pytest.mark.parametrize(
    "change, words",
    [({"answer_type": "integer"}, "an integer answer and provide the final value, e.g., 1, 2, 3, at"),
     ({"answer_type": "list"}, "a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at"),
     ({"precision": 2.0}, "with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at"),
     ({"query": "As published."}, "As published."), ({"precision": 3}, None), ({"answer_type": "text"}, None)],
)  # fmt: skip
def test_hints_of_mathvista(change: dict, words: str | None, tmp_path: Path) -> None:
    problem = json.loads((LAYOUTS / "mathvista/testmini.json").read_text())["2"] | change
    (tmp_path / "testmini.json").write_text(json.dumps({"2": problem}))
    if words is None:
        with pytest.raises(InputError, match=r"row 0 asks for .*, for which MathVista has no hint"):
            read_task("mathvista", tmp_path / "testmini.json")
    else:
        assert words in read_task("mathvista", tmp_path / "testmini.json")[0]["question"]


def test_amber_annotations_lie_beside_or_one_folder_up(tmp_path: Path) -> None:
    shutil.copytree(LAYOUTS / "amber", tmp_path / "amber")
    data = tmp_path / "amber/query/query_all.json"
    assert yesno.amber_annotations(None, data) == tmp_path / "amber/annotations.json"
    assert yesno.amber_annotations(str(tmp_path / "amber"), data) == tmp_path / "amber/annotations.json"
    (tmp_path / "amber/annotations.json").rename(tmp_path / "amber/query/annotations.json")
    assert yesno.amber_annotations(None, data) == tmp_path / "amber/query/annotations.json"
    (tmp_path / "amber/query/annotations.json").unlink()
    with pytest.raises(InputError, match="does not exist, nor does it one folder up; pass --annotations"):
        yesno.amber_annotations(None, data)


# -------------------------------------------------------------------------------- names of columns x kinds of file

TRUTH = ["Yes", "No", "Yes", "No"]
REPLIES = ["No, it is not.", "No.", "No.", "Yes."]
MME = read_task("mme", LAYOUTS / "mme/MME.tsv")
REPLY_NAMES = (
    "prediction model_prediction response model_response model_answer model_output text output reply caption pred Prediction "
    "predicted_answer generated_text llava_output gpt4v_response model-prediction my_answer predictions Model_Response answer"
).split()
TRUTH_NAMES = [
    "answer",
    "gt_answer",
    "gt",
    "ground_truth",
    "label",
    "target",
    "expected_answer",
    "reference_response",
    None,
]
ID_NAMES = ["id", "index", "question_id", "q_id", "ID", "pid", "item_id", "Question-ID", "sample idx"]


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def table(separator: str, quoting: int):
    def write(records: list[dict]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]), delimiter=separator, quoting=quoting, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()

    return write


def parquet(records: list[dict]) -> bytes:
    buffer, columns = io.BytesIO(), dict.fromkeys(name for r in records for name in r)
    filled = [{name: r.get(name) for name in columns} for r in records]  # pyarrow looks at the first row's columns only
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), buffer)
    return buffer.getvalue()


def keyed(records: list[dict]) -> bytes:
    """{id: record without its id}."""
    name = next(iter(records[0]))
    return json.dumps({str(r[name]): {k: v for k, v in r.items() if k != name} for r in records}).encode()


KINDS = {
    "list": lambda records: json.dumps(records).encode(),
    "indented": lambda records: json.dumps(records, indent=1).encode(),
    "lines": lines,
    "lines, blank ones between": lambda records: lines(records).replace(b"\n", b"\n\n"),
    "byte order mark": lambda records: b"\xef\xbb\xbf" + lines(records),
    "Windows": lambda records: lines(records).replace(b"\n", b"\r\n"),
    "object of records": keyed,
    "within an object": lambda records: json.dumps({"model": "m", "results": records}).encode(),
    "columns": lambda records: json.dumps({k: [r[k] for r in records] for k in records[0]}).encode(),
    "columns by row": lambda records: json.dumps(
        {k: {str(n): r[k] for n, r in enumerate(records)} for k in records[0]}
    ).encode(),
    "tsv": table("\t", csv.QUOTE_MINIMAL),
    "tsv, all quoted": table("\t", csv.QUOTE_ALL),
    "csv": table(",", csv.QUOTE_MINIMAL),
    "parquet": parquet,
}


def records_of(reply: str, truth: str | None, name: str, seed: int) -> list[dict]:
    """The four records with their columns and themselves in any order, the id first."""
    shuffle = random.Random(seed)
    columns = [reply] + ([truth] if truth else []) + ["question", "category"]
    shuffle.shuffle(columns)
    records = []
    for n, row in enumerate(MME):
        values = {"question": row["question"], "category": row["category"], truth: TRUTH[n]} | {reply: REPLIES[n]}
        records.append({name: n} | {c: values[c] for c in columns})
    shuffle.shuffle(records)
    return records


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_file_with_any_names_is_read_for_the_reply(kind: str, tmp_path: Path) -> None:
    cases = [c for c in itertools.product(REPLY_NAMES, TRUTH_NAMES, ID_NAMES) if c[0] != c[1]]
    for seed, (reply, truth, name) in enumerate(random.Random(kind).sample(cases, 80)):
        file = tmp_path / ("answers" + random.Random(seed).choice([".json", ".jsonl", ".tsv", ".txt", ".csv", ""]))
        file.write_bytes(KINDS[kind](records_of(reply, truth, name, seed)))
        assert read_answers(file, MME) == REPLIES, (reply, truth, name)


SCALARS = {
    "{id: text}": lambda: {str(n): text for n, text in enumerate(REPLIES)},
    "{id: [text]}": lambda: {str(n): [text] for n, text in enumerate(REPLIES)},
    "{id: {response: text}}": lambda: {str(n): {"answer": TRUTH[n], "response": text} for n, text in enumerate(REPLIES)},
    "samples, nested once": lambda: [{"index": n, "target": TRUTH[n], "filtered_resps": [t]} for n, t in enumerate(REPLIES)],
    "samples, nested twice": lambda: [
        {"index": n, "target": TRUTH[n], "resps": [[t + " "]], "filtered_resps": t} for n, t in enumerate(REPLIES)
    ],
    "numbers as floats": lambda: [{"index": float(n), "prediction": t} for n, t in enumerate(REPLIES)],
    "within an object, by id": lambda: {"run": {"model": "m"}, "predictions": {str(n): text for n, text in enumerate(REPLIES)}},
    "beside a truth by another name": lambda: [
        {"index": n, "key_answer": TRUTH[n], "my_answer": t, "extracted_answer": "A"} for n, t in enumerate(REPLIES)
    ],
    "LLaMA-Factory's predictions": lambda: [
        {"prompt": QUESTIONS[n], "predict": t, "label": TRUTH[n]} for n, t in enumerate(REPLIES)
    ],
    "extra records": lambda: [{"index": n, "prediction": t} for n, t in enumerate([*REPLIES, "more"])],
}  # fmt: skip


@pytest.mark.parametrize("name", SCALARS)
def test_objects_and_samples(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(SCALARS[name]()))
    assert read_answers(tmp_path / "a.jsonl", MME) == REPLIES


def rows_with(**columns: list) -> list[dict]:
    return [{"index": n} | {k: v[n] for k, v in columns.items()} for n in range(4)]


QUESTIONS = [row["question"] for row in MME]
REFUSED = [
    (rows_with(prediction=REPLIES, response=TRUTH), "'prediction' and 'response' may both be the model's reply"),
    (rows_with(text=REPLIES, output=TRUTH, answer=TRUTH), "'text' and 'output' may both be the model's reply"),
    (rows_with(llava_output=REPLIES, gpt4_output=TRUTH), "'llava_output' and 'gpt4_output' may both be the model's reply"),
    (rows_with(answer=TRUTH, llava=REPLIES), "'answer' is the truth in every row, so 'llava' may be the model's reply"),
    (rows_with(answer=TRUTH, gt=TRUTH, llava=REPLIES), "'answer' is the truth in every row, so 'llava' may be the model's reply"),
    (rows_with(answer=TRUTH, prompt=QUESTIONS, llava=REPLIES), "'answer' is the truth in every row, so 'llava' may be"),
    (rows_with(my_answer=TRUTH, verbatim=REPLIES), "'my_answer' and 'verbatim' may both be the model's reply"),
    (rows_with(answer=REPLIES, gt=TRUTH, other_response=TRUTH[::-1]), "'other_response' and 'answer' may both be the model's reply"),
    (rows_with(extracted_answer=REPLIES), "row 0 has no answer"),
    (rows_with(question=QUESTIONS, answer=TRUTH, A=["x"] * 4, B=["y"] * 4), "'answer' stands beside the question's columns"),
    (rows_with(question=QUESTIONS, label=TRUTH), "row 0 has no answer"),
    (rows_with(prediction=[None, *REPLIES[1:]]), "the answer of row 0 is NoneType, a string is expected"),
    (rows_with(prediction=[1.5, *REPLIES[1:]]), "the answer of row 0 is float, a string is expected"),
    (rows_with(prediction=[["a", "b"], *REPLIES[1:]]), "row '0' has 2 replies; one is expected"),
    (rows_with(prediction=[""] * 4), "every 'prediction' is empty"),
    ([{"prediction": t} for t in REPLIES[:3]], "has 3 answers without ids for 4 questions"),
    ([{"question": QUESTIONS[n - 1], "answer": t} for n, t in enumerate(REPLIES)], "questions are not those of the data"),
    ([{"uid": f"x{n}", "prediction": t} for n, t in enumerate(REPLIES)], "its 'uid' (e.g. 'x0') name no row of the data"),
    (rows_with(prediction=REPLIES)[1:], "has no answer to '0' (1 of 4 are missing)"),
    ([*rows_with(prediction=REPLIES), {"index": 2, "prediction": "again"}], "row 4 answers '2' a second time"),
    ([{"prediction": REPLIES[0]}, *rows_with(prediction=REPLIES)[1:]], "row 0 has no 'index', which names the question"),
    ([*rows_with(prediction=REPLIES), {"prediction": "left over"}], "row 4 has no 'index', which names the question"),
    (rows_with(id=[3, 2, 1, 0], prediction=REPLIES), "'id' and 'index' name different rows"),
    (rows_with(question=["Is this another benchmark?"] * 4, prediction=REPLIES), "questions in it are not those of the data"),
    (["Yes", "No", "Yes", "No"], "is not a list of answers"), ([], "holds no rows"), (None, "is not a list of answers"),
    (5, "is not a list of answers"), ({}, "holds no rows"), ("Yes", "is not a list of answers"),
]  # fmt: skip


@pytest.mark.parametrize("content, sentence", REFUSED)
def test_what_stays_unclear_is_one_sentence(content: object, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        read_answers(tmp_path / "a.json", MME)
    assert str(tmp_path / "a.json") in str(error.value) and "\n" not in str(error.value)


def test_where_the_data_tell_no_truth_an_answer_beside_another_text_is_unclear(tmp_path: Path) -> None:
    rows = read_task("amber", LAYOUTS / "amber/query/query_all.json")
    records = [{"id": row["id"], "answer": "yes", "verbatim": f"No {n}."} for n, row in enumerate(rows)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="'answer' and 'verbatim' may both be the model's reply"):
        read_answers(tmp_path / "a.json", rows)
    (tmp_path / "b.json").write_text(json.dumps([{k: r[k] for k in ("id", "answer")} for r in records]))
    assert read_answers(tmp_path / "b.json", rows) == ["yes"] * len(rows)


def test_of_two_ids_the_one_counts_whose_questions_agree(tmp_path: Path) -> None:
    records = rows_with(id=[1, 0, 3, 2], question=QUESTIONS, prediction=REPLIES)
    (tmp_path / "a").write_bytes(lines(records))
    assert read_answers(tmp_path / "a", MME) == REPLIES


def test_answers_of_earlier_lmms_eval(tmp_path: Path) -> None:
    rows = read_task("pope", LAYOUTS / "pope/coco_pope_random.json")
    logs = [{"doc_id": n, "target": r["label"], "doc": {"question_id": str(n + 1), "question": r["question"], "answer": r["label"]},
             "resps": [["Yes" if n else "No"]], "filtered_resps": ["Yes" if n else "No"]} for n, r in enumerate(rows)]  # fmt: skip
    (tmp_path / "pope.json").write_text(json.dumps({"args": {"model": "m"}, "logs": logs[::-1]}))
    assert read_answers(tmp_path / "pope.json", rows) == ["No", "Yes", "Yes"]


def test_the_questions_themselves_are_no_answers(tmp_path: Path) -> None:
    for task, file in (("mme", LAYOUTS / "mme/MME.tsv"), ("pope", LAYOUTS / "pope/coco_pope_random.json"),
                       ("seed", GOLDENS / "seed/SEED-Bench.json"), ("mmvet", GOLDENS / "mmvet/mm-vet.json"),
                       ("mathvista", LAYOUTS / "mathvista/testmini.json"), ("mmbench", GOLDENS / "mmbench/MMBench_DEV_EN.tsv"),
                       ("mmhal", GOLDENS / "mmhal/mmhal-bench_answer_template.json"),
                       ("hallusion", GOLDENS / "hallusion/HallusionBench.json")):  # fmt: skip
        rows = read_task(task, file)
        with pytest.raises(InputError, match=r"is the truth|has no answer|is empty"):
            read_answers(file, rows)


def test_a_question_file_with_the_model_s_answers_in_it(tmp_path: Path) -> None:
    rows = read_task("pope", LAYOUTS / "pope/coco_pope_random.json")
    questions = read_records(LAYOUTS / "pope/coco_pope_random.json")  # question_id, image, text (the question), label
    (tmp_path / "a").write_bytes(lines([q | {"answer": a} for q, a in zip(questions, ["a", "b", "c"], strict=True)]))
    assert read_answers(tmp_path / "a", rows) == ["a", "b", "c"]


def test_splits_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    rows = read_task("pope", LAYOUTS / "pope")
    repeated = [{"question_id": n % 3 + 1, "text": "Yes."} for n in range(9)]
    unnamed = [{"answer": "Yes."} for _ in range(9)]
    for records in (repeated, unnamed, [{"question_id": n, "text": "No."} for n in range(9)]):
        (tmp_path / "a.jsonl").write_bytes(lines(records))
        with pytest.raises(InputError, match="do not tell the 3 splits of the data apart; score one split at a time"):
            read_answers(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl").write_bytes(lines(repeated))
    with pytest.raises(
        InputError, match="answers 'random/1' more than once, and its records do not tell the splits apart"
    ):
        read_answers(tmp_path / "a.jsonl", read_task("pope", LAYOUTS / "pope/coco_pope_random.json"))


def test_hallusionbench_codes_are_words(tmp_path: Path) -> None:
    rows = read_task("hallusion", GOLDENS / "hallusion/HallusionBench.json")
    codes = [str(n % 3) for n in range(len(rows))]
    (tmp_path / "a").write_bytes(
        lines([{"index": r["id"], "model_prediction": c} for r, c in zip(rows, codes, strict=True)])
    )
    assert read_answers(tmp_path / "a", rows)[:3] == ["No", "Yes", "Uncertain"]


def test_folders_without_answers_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match="is a folder without an answer file"):
        read_answers(tmp_path, MME)
    (tmp_path / "color.txt").write_text("0.png\tIs it red?\tYes\tNo\n0.png\tIs it blue?\n")
    with pytest.raises(InputError, match=r"color\.txt: line 2 has 2 of the four cells"):
        read_answers(tmp_path, MME)


# -------------------------------------------------------------------------------------------------------- workbooks


def workbook(rows: list[list[str | int]]) -> bytes:
    """A minimal .xlsx of one sheet."""
    cell = lambda v: f"<c><v>{v}</v></c>" if isinstance(v, int) else f'<c t="inlineStr"><is><t>{v}</t></is></c>'  # noqa: E731
    sheet = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    kind, types = (
        "http://schemas.openxmlformats.org/officeDocument/2006/relationships",
        "application/vnd.openxmlformats-",
    )
    package = "http://schemas.openxmlformats.org/package/2006"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="xml" ContentType="application/xml"/>'
        f'<Default Extension="rels" ContentType="{types}package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{types}officedocument.spreadsheetml.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{types}officedocument.spreadsheetml.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" Type="{kind}/officeDocument" '
        'Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{kind}"><sheets><sheet name="s" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{kind}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{sheet}</sheetData></worksheet>',
    }  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>' + text)
    return buffer.getvalue()


BOOK = workbook([["index", "answer", "prediction"], *([n, TRUTH[n], REPLIES[n]] for n in range(4))])


def test_a_workbook_without_openpyxl_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.json").write_bytes(BOOK)
    with pytest.raises(InputError, match=r"is an Excel workbook: pip install openpyxl, or save it as \.tsv"):
        read_answers(tmp_path / "a.json", MME)


def test_a_workbook_is_read_like_a_table(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    (tmp_path / "a.xlsx").write_bytes(BOOK)
    assert read_any(tmp_path / "a.xlsx")[0] == {"index": "0", "answer": "Yes", "prediction": "No, it is not."}
    assert read_answers(tmp_path / "a.xlsx", MME) == REPLIES


# ---------------------------------------------------------------------------------------------------- question files

QUESTION_FILES = [
    ("pope", LAYOUTS / "pope/coco_pope_random.json"), ("amber", LAYOUTS / "amber/query/query_all.json"),
    ("hallusion", GOLDENS / "hallusion/HallusionBench.json"), ("mmrlhf", GOLDENS / "mmrlhf_rewardbench/mm_reward_bench.jsonl"),
    ("mmrb", GOLDENS / "multimodal_rewardbench/all_data.json"), ("objhal", GOLDENS / "objhal/obj_halbench.jsonl"),
    ("mme", LAYOUTS / "mme/MME.tsv"), ("mmbench", GOLDENS / "mmbench/MMBench_DEV_EN.tsv"),
    ("vlrewardbench", GOLDENS / "vl_rewardbench/test-00000-of-00001.parquet"),
]  # fmt: skip


@pytest.mark.parametrize("task, file", QUESTION_FILES)
def test_question_files_are_read_whatever_their_ending_and_kind(task: str, file: Path, tmp_path: Path) -> None:
    rows, records = read_task(task, file), read_records(file)
    kinds = {"list": "list", "lines": "lines", "indented": "indented", "parquet": "parquet"}
    for kind, ending in itertools.product(kinds, (".json", ".jsonl", ".tsv", ".parquet")):
        if (
            any(isinstance(v, bytes) for r in records for d in r.values() if isinstance(d, dict) for v in d.values())
            and kind != "parquet"
        ):
            continue  # JSON holds no bytes
        other = tmp_path / (file.name.split(".")[0] + ending)
        other.write_bytes(KINDS[kind](records))
        found = read_task(task, other, str(file.parent))
        assert [{k: v for k, v in r.items() if k != "images"} for r in found] == [
            {k: v for k, v in r.items() if k != "images"} for r in rows
        ]
        assert all(len(a["images"]) == len(b["images"]) for a, b in zip(found, rows, strict=True))


def test_a_question_file_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    video = {
        "question_id": "1",
        "question": "q",
        "answer": "A",
        "data_id": "v.mp4",
        "question_type_id": 10,
        "data_type": "video",
    }
    video |= {f"choice_{c}": c for c in "abcd"}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [video], "question_type": {}}))
    with pytest.raises(InputError, match="holds no row that --task seed can use"):
        read_task("seed", tmp_path / "SEED-Bench.json")


# ------------------------------------------------------------------------------------------------------------- docs


def test_the_table_of_layouts_names_tested_files() -> None:
    text = (TESTS.parent / "docs/evaluation.md").read_text()
    named = set(re.findall(r"`tests/goldens/((?:layouts|eval)/[^`]+)`", text))
    tested = {answers for answers, *_ in TABLE} | {"layouts/mmhal/filled_template.json", "layouts/chair/cap_file.json"}
    tested |= {
        "eval/mmvet/answers.json",
        "eval/objhal/answers.jsonl",
        "eval/mmbench/predictions.jsonl",
    }  # in test_eval_scorers.py
    assert named == tested
    assert all((TESTS / "goldens" / name).exists() for name in named)


@pytest.mark.parametrize("task, change", [
    ("vlrewardbench", {"response": 1.5}), ("vlrewardbench", {"query": {"a": 1}}), ("mmrb", {"Image": 3}), ("mmmu", {"id": []}),
    ("mmmu", {"options": 7}), ("seed", {"question_type_id": {"a": 1}}),
])  # fmt: skip
def test_cells_of_another_type_in_the_questions_are_one_sentence(task: str, change: dict, tmp_path: Path) -> None:
    row = {
        "vlrewardbench": {"id": 1, "query": "Q?", "response": ["a", "b"], "human_ranking": [0, 1], "image": "x.png"},
        "mmrb": {"ID": "1", "Text": "Q?", "Output1": "a", "Output2": "b", "Better": "Output1", "Category": "c"},
        "mmmu": {"id": "validation_Art_1", "question": "Q?", "options": "['a']", "answer": "A", "question_type": "multiple-choice"},
        "seed": {"question_id": 1, "question": "Q?", **{f"choice_{c}": c for c in "abcd"}, "answer": "A", "data_id": "x.png",
                 "question_type_id": 1},
    }[task]  # fmt: skip
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([row]))
    assert len(read_task(task, file)) == 1
    file.write_text(json.dumps([row | change]))
    with pytest.raises(InputError, match=r"questions\.json.*(cannot be read as|has no image|are not a list)") as error:
        read_task(task, file)
    assert "\n" not in str(error.value)
