"""Readers of the public benchmark files: one function per format, all of them return the same kind of row.

A row is a plain dictionary:
    id        str, unique in its file
    images    list of paths or {"bytes": b"..."}; decoded by whoever needs pixels
    question  the benchmark's question; `prompt` adds the task's instruction to it
    ...       everything else that the scorer needs (label, category, choices, ...), JSON values only

`read_task(task, path, image_root)` is the door. A wrong file is one sentence: file, row, fix.
"""

import ast
import base64
import hashlib
import io
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError
from data.rows import BadRow
from data.videos import video_column
from eval.files import REFERENCE_LENGTH, need, read_any, read_parquet, read_records

Row = dict[str, object]

LETTERS = "ABCDEFGHI"


def _picture(value: object, image_root: str | Path | None, data: str | Path, number: int) -> str | dict[str, bytes]:
    """An image as a path or as bytes: whether the cell holds bytes, base64 or a file's name. Existence is checked when it is opened.

    Names are looked up in `image_root`, or in the data file's folder.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict) and value.get("bytes"):
        return {"bytes": value["bytes"]}
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise InputError(f"{data}: row {number} has no image; download the file again")
    text = value.partition(";base64,")[2] if value.startswith("data:") else value
    if len(text) <= REFERENCE_LENGTH or "." in text:
        return _file(value, image_root, data)
    try:
        return {"bytes": base64.b64decode(text, validate=True)}
    except ValueError:
        raise InputError(f"{data}: the image of row {number} is not base64; download the file again") from None


def _file(name: object, image_root: str | Path | None, data: str | Path) -> str:
    return str(Path(image_root or Path(data).parent) / str(name))


def _columns(rows: list[dict]) -> set[str]:
    return set(rows[0]) if rows else set()


# ------------------------------------------------------------------------------------------- one per benchmark


def _mme(path: str | Path, image_root: str | None) -> list[Row]:
    """VLMEvalKit's tsv, or rows with `question_id` in the place of `index` and `image_path` (the hub's parquet)."""
    rows = read_records(path)
    need(rows, "image question answer category", path)
    need(rows, "index" if "index" in _columns(rows) else "question_id", path)
    out: list[Row] = []
    for n, r in enumerate(rows):
        shown = r.get("image_path") or (r["question_id"] if "index" not in r else None)
        cell = r["image"] if isinstance(r["image"], str) else str(shown)
        out.append({"id": str(r.get("index", n)), "images": [_picture(r["image"], image_root, path, n)],
                    "question": r["question"], "label": r["answer"], "category": r["category"],
                    "bare_question": str(r["question"]).replace(" Please answer yes or no.", ""),
                    "image_id": shown or hashlib.sha1(cell.encode()).hexdigest()})  # fmt: skip
    return out


def _pope(path: str | Path, image_root: str | None) -> list[Row]:
    """One split (a file) or a folder with coco_pope_{random,popular,adversarial}.json."""
    files = sorted(Path(path).glob("*pope*.json*")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise InputError(f"{path} holds no *pope*.json file; pass the folder of coco_pope_random.json and the others")
    out: list[Row] = []
    for file in files:
        split = next((s for s in ("random", "popular", "adversarial") if s in file.name), file.stem)
        rows = [{"text": r.get("question"), "label": r.get("answer"), **r} for r in read_records(file)]  # as on the hub
        need(rows, "question_id image text label", file)
        for n, r in enumerate(rows):
            if r["label"] not in ("yes", "no"):
                raise InputError(f"{file}: row {n} has the label {r['label']!r}; 'yes' or 'no' is expected")
            split = r.get("category") or split
            out.append({"id": f"{split}/{r['question_id']}", "images": [_picture(r["image"], image_root, path, n)],
                        "question": r["text"], "label": r["label"], "split": split})  # fmt: skip
    return out


HALLUSION_KEY = "category subcategory visual_input set_id figure_id question_id".split()


def _hallusion(path: str | Path, image_root: str | None) -> list[Row]:
    """The repository's HallusionBench.json (with the rows without an image) or VLMEvalKit's tsv (image rows)."""
    rows = read_records(path)
    if "l2-category" in _columns(rows):
        need(rows, "index image question answer category l2-category", path)
        out = []
        for n, r in enumerate(rows):
            key = r["index"].split("_")  # category_subcategory_visualinput_set_figure_question
            if len(key) < 6:
                raise InputError(f"{path}: row {n} has the index '{r['index']}', six parts joined by _ are expected")
            out.append({"id": r["index"], "images": [_picture(r["image"], image_root, path, n)],
                        "question": r["question"], "label": r["answer"], "category": r["category"],
                        "subcategory": r["l2-category"], "visual_input": key[-4], "set_id": key[-3],
                        "figure_id": key[-2], "question_id": key[-1]})  # fmt: skip
        return out
    need(rows, " ".join(HALLUSION_KEY) + " question gt_answer", path)
    return [
        {"id": "_".join(str(r[f]) for f in HALLUSION_KEY), "question": r["question"],
         "images": [_picture(r["filename"], image_root, path, n)] if r.get("filename") else [],
         "label": {"1": "Yes", "0": "No"}.get(str(r["gt_answer"]), str(r["gt_answer"])),
         "details": r.get("gt_answer_details", ""), **{f: str(r[f]) for f in HALLUSION_KEY}}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _amber(path: str | Path, image_root: str | None) -> list[Row]:
    """query_all.json (or query_generative.json, ...). The truth stands in annotations.json, read by the scorers."""
    rows = read_records(path)
    need(rows, "id image query", path)
    return [
        {"id": str(r["id"]), "images": [_picture(r["image"], image_root, path, n)], "question": r["query"]}
        for n, r in enumerate(rows)
    ]


def _mmbench(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    need(rows, "index question A B image", path)
    out: list[Row] = []
    for n, (r, choices) in enumerate(zip(rows, _options(rows), strict=True)):
        hint = f"Hint: {r['hint']}\n" if _available(r.get("hint")) else ""
        options = "".join(f"{c}. {text}\n" for c, text in choices.items())
        out.append({"id": str(r["index"]), "images": [_picture(r["image"], image_root, path, n)], "choices": choices,
                    "question": f"{hint}Question: {r['question']}\nOptions:\n{options}", "label": r.get("answer", ""),
                    "bare_question": r["question"], "category": r.get("category", ""), "l2": r.get("l2-category", ""),
                    "split": r.get("split") or "all"})  # fmt: skip
    return out


# what pandas, and with it VLMEvalKit, takes for an empty cell: an option called None does not exist there
NOT_AVAILABLE = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN",
     "None", "n/a", "nan", "null"]
)  # fmt: skip


def _available(cell: object) -> bool:
    return cell is not None and str(cell) not in NOT_AVAILABLE


def _options(rows: list[dict]) -> list[dict[str, str]]:
    """The options A, B, ... of every row of VLMEvalKit's table, empty cells left out.

    A column of numbers only is read as numbers there: with an empty cell among them 3 becomes 3.0.
    """
    letters = [c for c in string.ascii_uppercase if c in _columns(rows)]
    columns = {c: _numbers_of_pandas([r.get(c) for r in rows]) for c in letters}
    return [{c: columns[c][n] for c in letters if _available(rows[n].get(c))} for n in range(len(rows))]


def _numbers_of_pandas(cells: list) -> list[str]:
    """The cells as texts, in the way in which pandas shows a column of numbers if they are all numbers."""
    import pandas

    present = [str(c) for c in cells if _available(c)]
    if not all(re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", c) for c in present):
        return [str(c) for c in cells]
    table = io.StringIO("x\n" + "\n".join(str(c) if _available(c) else "NaN" for c in cells))
    return [str(value) for value in pandas.read_csv(table, skip_blank_lines=False)["x"]]


def _seed(path: str | Path, image_root: str | None, video: bool = False) -> list[Row]:
    """SEED-Bench.json, the image questions (SEEDBench-Img, types 1-9), the others only with `video`; or SEEDBench_IMG.tsv."""
    data = read_any(path)
    rows = data.get("questions") if isinstance(data, dict) else data
    if isinstance(rows, list) and rows and isinstance(rows[0], dict) and {"A", "index"} <= set(rows[0]):
        need(rows, "index question A B C D answer image", path)  # VLMEvalKit's table
        return [
            _seed_row(r | {"question_id": r["index"], "data_type": "image"}, choices, _picture(r["image"], image_root, path, n),
                      r.get("category", "all"))
            for n, (r, choices) in enumerate(zip(rows, _options(rows), strict=True))
        ]  # fmt: skip
    if not isinstance(rows, list):
        raise InputError(f"{path} has no 'questions'; pass SEED-Bench.json")
    need(rows, "question_id question choice_a choice_b choice_c choice_d answer data_id question_type_id", path)
    names = {v: k for k, v in data.get("question_type", {}).items()} if isinstance(data, dict) else {}
    return [
        _seed_row(r, {c: str(r[f"choice_{c.lower()}"]) for c in "ABCD"},
                  _picture(r.get("image") or r["data_id"], image_root, path, n),
                  names.get(r["question_type_id"], str(r["question_type_id"])))
        for n, r in enumerate(rows)
        if video or r.get("data_type", "image") == "image"
    ]  # fmt: skip


def _seed_row(r: dict, choices: dict[str, str], image: str | dict, category: str) -> Row:
    options = "".join(f"{c}. {text}\n" for c, text in choices.items())
    return {"id": str(r["question_id"]), "images": [image], "choices": choices, "label": r["answer"],
            "question": f"{r['question']}\n{options}", "bare_question": r["question"], "category": category,
            "type_id": r.get("question_type_id"), "data_type": r.get("data_type", "image")}  # fmt: skip


def _mmmu(path: str | Path, image_root: str | None) -> list[Row]:
    """The validation parquet (a file or the folder of all subjects) with `<image n>` marks in question and options.

    Subjects in alphabetical order, which is the official one: guesses at unparsed answers are drawn in row order.
    """
    rows = read_parquet(path, "validation-*.parquet") if Path(path).is_dir() else read_records(path)
    need(rows, "id question options answer question_type", path)
    out: list[Row] = []
    for n, r in enumerate(rows):
        try:
            listed = r["options"] if isinstance(r["options"], list) else ast.literal_eval(r["options"])
            options = [str(o) for o in listed]
        except (ValueError, SyntaxError, TypeError):
            raise InputError(f"{path}: the options of row {n} are not a list; download the file again") from None
        if len(options) > len(LETTERS):
            raise InputError(f"{path}: row {n} has {len(options)} options, at most {len(LETTERS)} are known")
        answer = r["answer"]  # an open answer may be a list in a string: "['24/7', '3.429']"
        if r["question_type"] != "multiple-choice" and isinstance(answer, str) and answer.startswith("["):
            answer = [str(a) for a in ast.literal_eval(answer)]
        choices = dict(zip(LETTERS, options, strict=False))
        lines = "".join(f"({c}) {text}\n" for c, text in choices.items())
        images = [_picture(r[f"image_{i}"], image_root, path, n) for i in range(1, 8) if r.get(f"image_{i}")]
        out.append({"id": r["id"], "images": images, "question": f"{r['question']}\n{lines}", "choices": choices,
                    "bare_question": r["question"], "label": answer,
                    "multiple_choice": r["question_type"] == "multiple-choice",
                    "subject": "_".join(r["id"].split("_")[1:-1])})  # fmt: skip
    return out


def _mathvista(path: str | Path, image_root: str | None) -> list[Row]:
    """testmini.json {pid: problem} of the repository, or the rows of the hub's parquet."""
    data = read_any(path)
    if isinstance(data, dict) and "question" not in data:
        data = [{"pid": pid, **r} if isinstance(r, dict) else r for pid, r in data.items()]
    rows = [data] if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise InputError(f"{path} is not {{pid: problem}}; pass MathVista's testmini.json or its parquet")
    need(rows, "pid question question_type answer_type metadata", path)
    keep = "choices unit precision answer question_type answer_type metadata".split()
    out: list[Row] = []
    for n, r in enumerate(rows):
        image = _picture(r.get("decoded_image") or r.get("image"), image_root, path, n)
        out.append({"id": str(r["pid"]), "images": [image], "question": r.get("query") or mathvista_query(r, path, n),
                    "bare_question": r["question"], **{k: r.get(k) for k in keep}})  # fmt: skip
    return out


_HINT = "Hint: Please answer the question {}, at the end."
MATHVISTA_HINTS = {
    "letter": _HINT.format("and provide the correct option letter, e.g., A, B, C, D"),
    "integer": _HINT.format("requiring an integer answer and provide the final value, e.g., 1, 2, 3"),
    "float 1": _HINT.format(
        "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4"
    ),
    "float 2": _HINT.format(
        "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45"
    ),
    "list": _HINT.format(
        "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]"
    ),
}


def mathvista_query(problem: dict, path: str | Path, number: int) -> str:
    """The `query` of the hub, which testmini.json lacks: a hint, the question with its unit, the choices.

    lupantech/MathVista evaluation/build_query.py, shot_num 0, in the order of the published data/query.json.
    """
    kind = "letter" if problem["question_type"] == "multi_choice" else str(problem["answer_type"])
    if kind == "float":
        kind = f"float {float(problem.get('precision') or 0):g}"
    if kind not in MATHVISTA_HINTS:
        raise InputError(f"{path}: row {number} asks for '{kind}', for which MathVista has no hint; add its `query`")
    unit = f" (Unit: {problem['unit']})" if problem.get("unit") else ""
    lines = [MATHVISTA_HINTS[kind], f"Question: {problem['question']}{unit}"]
    choices = problem.get("choices")
    if choices is not None and len(choices):
        lines += ["Choices:", *(f"({chr(ord('A') + i)}) {text}" for i, text in enumerate(choices))]
    return "\n".join(lines)


def _mmvet(path: str | Path, image_root: str | None) -> list[Row]:
    data = read_any(path)
    if not isinstance(data, dict):
        raise InputError(f"{path} is not {{v1_0: {{...}}, ...}}; pass mm-vet.json")
    need(data.values(), "imagename question answer capability", path)
    images = image_root or Path(path).parent / "images"
    return [
        {"id": key, "images": [_file(r["imagename"], images, path)], "question": r["question"], "label": r["answer"],
         "capability": r["capability"]}
        for key, r in data.items()
    ]  # fmt: skip


def _mmhal(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    need(rows, "question_type image_id image_src image_content question gt_answer", path)
    if len(rows) != 96:  # the type of a row is its position modulo 8: nothing may be missing or moved
        raise InputError(f"{path} has {len(rows)} rows, MMHal-Bench has 96 in a fixed order; use the published file")
    return [
        {"id": str(n), "question": r["question"], "label": r["gt_answer"], "image_content": r["image_content"],
         "images": [_picture(r["image"], image_root, path, n) if r.get("image")  # RLAIF-V's mmhal-bench_with_image.jsonl
                    else _file(Path(str(r["image_src"])).name, image_root, path)], "category": r["question_type"]}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _refomb(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    need(rows, "question description", path)
    return [
        {"id": str(r.get("id", r.get("question_id", n))), "question": r["question"],
         "images": [_file(Path(str(r.get("image_url") or r.get("image"))).name, image_root, path)],
         "description": r["description"], "category": str(r.get("type", "")), "reference": r.get("answer", "")}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _objhal(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    need(rows, "image_id question image", path)
    return [
        {"id": str(n), "images": [_picture(r["image"], image_root, path, n)], "question": r["question"],
         "image_id": _integer(r["image_id"], path, n)}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _chair(path: str | Path, image_root: str | None) -> list[Row]:
    """The images to caption: a COCO annotation file (its `images`), or rows {image_id, image}."""
    data = read_any(path)
    if isinstance(data, dict) and "image_id" not in data:
        listed = data.get("images")
        if not listed:
            raise InputError(f"{path} has no 'images'; pass a COCO 2014 annotation file or JSON lines image_id, image")
        need(listed, "id file_name", path)
        rows = [{"image_id": r["id"], "image": r["file_name"]} for r in listed]
    else:
        rows = read_records(path)
        need(rows, "image_id image", path)
    return [
        {"id": str(r["image_id"]), "images": [_picture(r["image"], image_root, path, n)],
         "image_id": _integer(r["image_id"], path, n), "question": "Please describe this image in detail."}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _integer(value: object, path: str | Path, number: int) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise InputError(f"{path}: row {number} has the image_id {value!r}, COCO's number is expected") from None


def _vlrewardbench(path: str | Path, image_root: str | None) -> list[Row]:
    """The hub's parquet, or rows with the same columns. A row is known by id, query and responses: ids alone repeat.

    The second row of an id is called id#2, and so on; a row that is there twice counts once, as in the official script.
    """
    rows = read_records(path)
    need(rows, "id query response human_ranking", path)
    out: list[Row] = []
    seen: set[tuple] = set()
    count: Counter[str] = Counter()
    for n, r in enumerate(rows):
        if len(r["response"]) != 2 or sorted(r["human_ranking"]) != [0, 1]:
            raise InputError(f"{path}: row {n} needs two responses and the ranking [0, 1] or [1, 0]")
        key = vlrewardbench_key(r)
        if key in seen:
            continue
        seen.add(key)
        count[str(r["id"])] += 1
        name = str(r["id"]) if count[str(r["id"])] == 1 else f"{r['id']}#{count[str(r['id'])]}"
        image = _picture(r.get("image") or r.get("image_path"), image_root, path, n)
        out.append({"id": name, "public_id": str(r["id"]), "images": [image], "question": r["query"],
                    "responses": list(r["response"]), "better": list(r["human_ranking"]).index(0)})  # fmt: skip
    return out


def vlrewardbench_key(row: dict) -> tuple:
    """What VL-RewardBench's cal.py takes for one question: id, query, and the two responses in any order."""
    return str(row["id"]), row["query"], *sorted(row["response"])


def _mmrb(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    out: list[Row] = []
    need(rows, "ID Text Output1 Output2 Better", path)
    for n, r in enumerate(rows):
        category = r.get("Category") or (r.get("Meta") or {}).get("Category")
        if category is None:
            raise InputError(f"{path}: row {n} has no 'Category'; use all_data.json of the benchmark's scripts")
        images = [_picture(r["Image"], image_root, path, n)] if r.get("Image") else []
        out.append({"id": r["ID"], "images": images, "question": r["Text"], "category": category,
                    "responses": [r["Output1"], r["Output2"]], "better": int(r["Better"] == "Output2")})  # fmt: skip
    return out


def _mmrlhf(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    need(rows, "id prompt chosen rejected", path)
    return [
        {"id": f"{n}", "group": str(r["id"]),
         "images": [_picture(r["image"], image_root, path, n)] if r.get("image") else [],
         "video": r.get("video"), "source": r.get("image") or r.get("video") or "", "question": r["prompt"],
         "responses": [r["chosen"], r["rejected"]], "better": 0}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _videos(record: dict, image_root: str | None, path: str | Path, number: int) -> dict[str, list[list[str]]]:
    """`videos` of a record that has some, as data/videos.py reads them, with the files' paths."""
    try:
        videos = video_column(record)
    except BadRow as error:
        raise InputError(f"{path}: row {number} {error}") from error
    found = [[str(_file(name, image_root, path)) for name in files] for files in videos]
    return {"videos": found} if found else {}


def _plain(path: str | Path, image_root: str | None) -> list[Row]:
    """The user's questions: a list of {id?, image | images, question | prompt}; `image` a path or base64 bytes in parquet; `video`,
    `videos` as in training."""
    out: list[Row] = []
    for n, r in enumerate(read_records(path)):
        images = r.get("images") or ([r["image"]] if r.get("image") else [])
        question = r.get("question") or r.get("prompt")
        if not isinstance(question, str):
            raise InputError(f"{path}: row {n} has no 'question' or 'prompt' text")
        paths = [_picture(i, image_root, path, n) for i in ([images] if isinstance(images, str | dict) else images)]
        rest = {k: v for k, v in r.items() if k not in ("images", "image", "videos", "video", "question", "prompt")}
        videos = _videos(r, image_root, path, n)
        out.append({**rest, "id": str(r.get("id", n)), "images": paths, "question": question, **videos})
    return out


_LETTER = "Answer with the option's letter from the given choices directly."

# task: (reader, instruction appended to the question). The instruction can be replaced with --suffix and is recorded.
TASKS = {
    "mme": (_mme, ""),
    "pope": (_pope, ""),
    "hallusion": (_hallusion, "\nPlease answer yes or no."),
    "amber": (_amber, ""),
    "mmbench": (_mmbench, "Please select the correct answer from the options above. \n"),
    "seed": (_seed, _LETTER),
    "mmmu": (_mmmu, None),  # one line for choices, another for open questions: see prompt()
    "mathvista": (_mathvista, ""),
    "mmvet": (_mmvet, ""),
    "mmhal": (_mmhal, ""),
    "refomb": (_refomb, ""),
    "objhal": (_objhal, ""),
    "chair": (_chair, ""),
    "vlrewardbench": (_vlrewardbench, ""),
    "mmrb": (_mmrb, ""),
    "mmrlhf": (_mmrlhf, ""),
    "plain": (_plain, ""),
}


def read_task(task: str, path: str | Path, image_root: str | None = None, limit: int | None = None) -> list[Row]:
    """Return the rows of a benchmark file.

    Args: `image_root` is where file names of images are looked up (default: beside the data file); `limit` keeps the
        first rows only. Raises InputError for an unknown task, a wrong file, or ids that occur twice.
    """
    if task not in TASKS:
        raise InputError(f"unknown task '{task}'; known are {', '.join(TASKS)}")
    try:
        rows = TASKS[task][0](path, image_root)
        rows = [{**row, "id": str(row["id"])} for row in rows]
    except (TypeError, AttributeError, KeyError, ValueError) as error:  # a cell of another type than the benchmark's
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read as {task} ({type(error).__name__}: {error}); is this the right benchmark's file, and whole?"
        ) from error
    if not rows:
        raise InputError(f"{path} holds no row that --task {task} can use; is this the right benchmark's file?")
    seen: set[object] = set()
    for n, row in enumerate(rows):
        if row["id"] in seen:
            raise InputError(f"{path}: row {n} repeats the id '{row['id']}'; every row needs its own")
        seen.add(row["id"])
    return rows[:limit] if limit else rows


def check_images(rows: Iterable[Row]) -> None:
    """Raise InputError for the first image file that is not there, before hours of work reach it."""
    seen: set[str] = set()
    for row in rows:
        frames = [file for files in row.get("videos") or () for file in files]
        for image in (*row["images"], *frames):
            if isinstance(image, str) and image not in seen:
                seen.add(image)
                if not Path(image).is_file():
                    what = "video" if image in frames else "image"
                    raise InputError(f"row '{row['id']}': the {what} {image} does not exist; pass --image_root")


def prompt(task: str, row: Row, suffix: str | None = None) -> str:
    """The text that the model sees: the question and the task's instruction (or `suffix` in its place)."""
    if suffix is None:
        suffix = TASKS[task][1]
    if suffix is None:  # mmmu, as in LLaVA's evaluation
        suffix = _LETTER if row["multiple_choice"] else "Answer the question using a single word or phrase."
    return f"{row['question']}{suffix}".rstrip("\n")


def with_image_marks(text: str, images: int) -> str:
    """MMMU's `<image 1>` become image marks where they stand, if each image is named exactly once; else images go first."""
    named = re.findall(r"<image (\d)>", text)
    if images > 1 and sorted(named) == [str(i + 1) for i in range(images)] == named:
        return re.sub(r"<image \d>", "<image>", text)
    return text.replace("<image>", "")
