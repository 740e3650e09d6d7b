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
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError
from eval.files import need, read_json, read_jsonl, read_parquet, read_records, read_tsv

Row = dict[str, object]

LETTERS = "ABCDEFGHI"


def _decode(text: str, path: str | Path, number: int) -> dict[str, bytes]:
    try:
        return {"bytes": base64.b64decode(text, validate=True)}
    except ValueError:
        raise InputError(f"{path}: the image of row {number} is not base64; download the file again") from None


def _file(name: object, image_root: str | Path | None, data: str | Path) -> str:
    """An image's path: below `image_root`, or below the data file's folder. Existence is checked when it is opened."""
    return str(Path(image_root or Path(data).parent) / str(name))


# ------------------------------------------------------------------------------------------- one per benchmark


def _mme(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_tsv(path)
    need(rows, "index image question answer category", path)
    return [
        {"id": r["index"], "images": [_decode(r["image"], path, n)], "question": r["question"], "label": r["answer"],
         "category": r["category"], "image_id": r.get("image_path") or hashlib.sha1(r["image"].encode()).hexdigest()}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _pope(path: str | Path, image_root: str | None) -> list[Row]:
    """One split (a file) or a folder with coco_pope_{random,popular,adversarial}.json."""
    files = sorted(Path(path).glob("*pope*.json")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise InputError(f"{path} holds no *pope*.json file; pass the folder of coco_pope_random.json and the others")
    out: list[Row] = []
    for file in files:
        split = next((s for s in ("random", "popular", "adversarial") if s in file.name), file.stem)
        rows = read_jsonl(file)
        need(rows, "question_id image text label", file)
        for n, r in enumerate(rows):
            if r["label"] not in ("yes", "no"):
                raise InputError(f"{file}: row {n} has the label {r['label']!r}; 'yes' or 'no' is expected")
            out.append({"id": f"{split}/{r['question_id']}", "images": [_file(r["image"], image_root, path)],
                        "question": r["text"], "label": r["label"], "split": split})  # fmt: skip
    return out


def _hallusion(path: str | Path, image_root: str | None) -> list[Row]:
    """The repository's HallusionBench.json (with the rows without an image) or VLMEvalKit's tsv (image rows)."""
    if str(path).endswith(".tsv"):
        rows = read_tsv(path)
        need(rows, "index image question answer category l2-category", path)
        out = []
        for n, r in enumerate(rows):
            key = r["index"].split("_")  # category_subcategory_visualinput_set_figure_question
            if len(key) < 6:
                raise InputError(f"{path}: row {n} has the index '{r['index']}', six parts joined by _ are expected")
            out.append({"id": r["index"], "images": [_decode(r["image"], path, n)], "question": r["question"],
                        "label": r["answer"], "category": r["category"], "subcategory": r["l2-category"],
                        "visual_input": key[-4], "set_id": key[-3], "figure_id": key[-2],
                        "question_id": key[-1]})  # fmt: skip
        return out
    rows = read_records(path)
    fields = "category subcategory visual_input set_id figure_id question_id".split()
    need(rows, " ".join(fields) + " question gt_answer", path)
    return [
        {"id": "_".join(str(r[f]) for f in fields), "question": r["question"],
         "images": [_file(r["filename"], image_root, path)] if r.get("filename") else [],
         "label": {"1": "Yes", "0": "No"}.get(str(r["gt_answer"]), str(r["gt_answer"])),
         "details": r.get("gt_answer_details", ""), **{f: str(r[f]) for f in fields}}
        for r in rows
    ]  # fmt: skip


def _amber(path: str | Path, image_root: str | None) -> list[Row]:
    """query_all.json (or query_generative.json, ...). The truth stands in annotations.json, read by the scorers."""
    rows = read_records(path)
    need(rows, "id image query", path)
    return [{"id": str(r["id"]), "images": [_file(r["image"], image_root, path)], "question": r["query"]} for r in rows]


def _mmbench(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_tsv(path)
    need(rows, "index question A B image", path)
    out: list[Row] = []
    for n, r in enumerate(rows):
        choices = {c: r[c] for c in "ABCD" if r.get(c)}
        hint = f"Hint: {r['hint']}\n" if r.get("hint") else ""
        options = "".join(f"{c}. {text}\n" for c, text in choices.items())
        out.append({"id": r["index"], "images": [_decode(r["image"], path, n)], "choices": choices,
                    "question": f"{hint}Question: {r['question']}\nOptions:\n{options}", "label": r.get("answer", ""),
                    "category": r.get("category", ""), "l2": r.get("l2-category", ""),
                    "split": r.get("split") or "all"})  # fmt: skip
    return out


def _seed(path: str | Path, image_root: str | None, video: bool = False) -> list[Row]:
    """SEED-Bench.json, the image questions (SEEDBench-Img, types 1-9), the others only with `video`; or SEEDBench_IMG.tsv."""
    if str(path).endswith(".tsv"):
        return [_seed_row(r | {"data_type": "image"}, _decode(r["image"], path, n), r.get("category", "all"))
                for n, r in enumerate(_seed_tsv(path))]  # fmt: skip
    data = read_json(path)
    rows = data.get("questions") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path} has no 'questions'; pass SEED-Bench.json")
    need(rows, "question_id question choice_a choice_b choice_c choice_d answer data_id question_type_id", path)
    names = {v: k for k, v in data.get("question_type", {}).items()}
    return [
        _seed_row(
            r, _file(r["data_id"], image_root, path), names.get(r["question_type_id"], str(r["question_type_id"]))
        )
        for r in rows
        if video or r.get("data_type", "image") == "image"
    ]


def _seed_tsv(path: str | Path) -> list[dict]:
    """VLMEvalKit's table with the names of SEED-Bench.json."""
    rows = read_tsv(path)
    need(rows, "index question A B C D answer image", path)
    return [r | {"question_id": r["index"], **{f"choice_{c.lower()}": r[c] for c in "ABCD"}} for r in rows]


def _seed_row(r: dict, image: str | dict, category: str) -> Row:
    choices = {c: str(r[f"choice_{c.lower()}"]) for c in "ABCD"}
    options = "".join(f"{c}. {text}\n" for c, text in choices.items())
    return {"id": str(r["question_id"]), "images": [image], "choices": choices, "label": r["answer"],
            "question": f"{r['question']}\n{options}", "bare_question": r["question"], "category": category,
            "type_id": r.get("question_type_id"), "data_type": r.get("data_type", "image")}  # fmt: skip


def _mmmu(path: str | Path, image_root: str | None) -> list[Row]:
    """The validation parquet (a file or the folder of all subjects) with `<image n>` marks in question and options.

    Subjects in alphabetical order, which is the official one: guesses at unparsed answers are drawn in row order.
    """
    rows = read_parquet(path, "validation-*.parquet")
    need(rows, "id question options answer question_type", path)
    out: list[Row] = []
    for n, r in enumerate(rows):
        try:
            options = [str(o) for o in ast.literal_eval(r["options"])]
        except (ValueError, SyntaxError):
            raise InputError(f"{path}: the options of row {n} are not a list; download the file again") from None
        if len(options) > len(LETTERS):
            raise InputError(f"{path}: row {n} has {len(options)} options, at most {len(LETTERS)} are known")
        answer = r["answer"]  # an open answer may be a list in a string: "['24/7', '3.429']"
        if r["question_type"] != "multiple-choice" and answer.startswith("["):
            answer = [str(a) for a in ast.literal_eval(answer)]
        choices = dict(zip(LETTERS, options, strict=False))
        lines = "".join(f"({c}) {text}\n" for c, text in choices.items())
        images = [{"bytes": r[f"image_{i}"]["bytes"]} for i in range(1, 8) if r.get(f"image_{i}")]
        out.append({"id": r["id"], "images": images, "question": f"{r['question']}\n{lines}", "choices": choices,
                    "label": answer, "multiple_choice": r["question_type"] == "multiple-choice",
                    "subject": "_".join(r["id"].split("_")[1:-1])})  # fmt: skip
    return out


def _mathvista(path: str | Path, image_root: str | None) -> list[Row]:
    """testmini.json {pid: problem} of the repository, or the parquet of the hub."""
    if Path(path).suffix == ".parquet":
        rows = read_parquet(path)
    else:
        data = read_json(path)
        rows = list(data.values()) if isinstance(data, dict) else data
    need(rows, "pid question question_type answer_type metadata", path)
    keep = "choices unit precision answer question_type answer_type metadata".split()
    out: list[Row] = []
    for r in rows:
        pixels = r.get("decoded_image") or {}
        image = {"bytes": pixels["bytes"]} if pixels.get("bytes") else _file(r["image"], image_root, path)
        out.append({"id": str(r["pid"]), "images": [image], "question": r.get("query") or r["question"],
                    "bare_question": r["question"], **{k: r.get(k) for k in keep}})  # fmt: skip
    return out


def _mmvet(path: str | Path, image_root: str | None) -> list[Row]:
    data = read_json(path)
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
         "images": [_decode(r["image"], path, n) if r.get("image")  # RLAIF-V's mmhal-bench_with_image.jsonl
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
    rows = read_jsonl(path)
    need(rows, "image_id question image", path)
    return [
        {"id": str(n), "images": [_decode(r["image"], path, n)], "question": r["question"],
         "image_id": int(r["image_id"])}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _chair(path: str | Path, image_root: str | None) -> list[Row]:
    """The images to caption: a COCO annotation file (its `images`), or JSON lines {image_id, image}."""
    if Path(path).suffix == ".jsonl":
        rows = read_jsonl(path)
        need(rows, "image_id image", path)
    else:
        data = read_json(path)
        listed = data.get("images") if isinstance(data, dict) else None
        if not listed:
            raise InputError(f"{path} has no 'images'; pass a COCO 2014 annotation file or JSON lines image_id, image")
        need(listed, "id file_name", path)
        rows = [{"image_id": r["id"], "image": r["file_name"]} for r in listed]
    return [
        {"id": str(r["image_id"]), "images": [_file(r["image"], image_root, path)], "image_id": int(r["image_id"]),
         "question": "Please describe this image in detail."}
        for r in rows
    ]  # fmt: skip


def _vlrewardbench(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_parquet(path) if not str(path).endswith(".jsonl") else read_jsonl(path)
    need(rows, "id query response human_ranking", path)
    out: list[Row] = []
    for n, r in enumerate(rows):
        if len(r["response"]) != 2 or sorted(r["human_ranking"]) != [0, 1]:
            raise InputError(f"{path}: row {n} needs two responses and the ranking [0, 1] or [1, 0]")
        image = (
            {"bytes": r["image"]["bytes"]} if isinstance(r.get("image"), dict) else _file(r["image"], image_root, path)
        )
        out.append({"id": r["id"], "images": [image], "question": r["query"], "responses": list(r["response"]),
                    "better": r["human_ranking"].index(0)})  # fmt: skip
    return out


def _mmrb(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_records(path)
    out: list[Row] = []
    need(rows, "ID Text Output1 Output2 Better", path)
    for n, r in enumerate(rows):
        category = r.get("Category") or (r.get("Meta") or {}).get("Category")
        if category is None:
            raise InputError(f"{path}: row {n} has no 'Category'; use all_data.json of the benchmark's scripts")
        images = [_file(r["Image"], image_root, path)] if r.get("Image") else []
        out.append({"id": r["ID"], "images": images, "question": r["Text"], "category": category,
                    "responses": [r["Output1"], r["Output2"]], "better": int(r["Better"] == "Output2")})  # fmt: skip
    return out


def _mmrlhf(path: str | Path, image_root: str | None) -> list[Row]:
    rows = read_jsonl(path)
    need(rows, "id prompt chosen rejected", path)
    return [
        {"id": f"{n}", "group": str(r["id"]), "images": [_file(r["image"], image_root, path)] if r.get("image") else [],
         "video": r.get("video"), "source": r.get("image") or r.get("video") or "", "question": r["prompt"],
         "responses": [r["chosen"], r["rejected"]], "better": 0}
        for n, r in enumerate(rows)
    ]  # fmt: skip


def _plain(path: str | Path, image_root: str | None) -> list[Row]:
    """The user's questions: a list of {id?, image | images, question | prompt}; `image` a path or base64 bytes in parquet."""
    out: list[Row] = []
    for n, r in enumerate(read_records(path)):
        images = r.get("images") or ([r["image"]] if r.get("image") else [])
        question = r.get("question") or r.get("prompt")
        if not isinstance(question, str):
            raise InputError(f"{path}: row {n} has no 'question' or 'prompt' text")
        paths = [i if isinstance(i, dict) else _file(i, image_root, path) for i in images]
        rest = {k: v for k, v in r.items() if k not in ("images", "image", "question", "prompt")}
        out.append({**rest, "id": str(r.get("id", n)), "images": paths, "question": question})
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
    rows = TASKS[task][0](path, image_root)
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
        for image in row["images"]:
            if isinstance(image, str) and image not in seen:
                seen.add(image)
                if not Path(image).is_file():
                    raise InputError(f"row '{row['id']}': the image {image} does not exist; pass --image_root")


def prompt(task: str, row: Row, suffix: str | None = None) -> str:
    """The text that the model sees: the question and the task's instruction (or `suffix` in its place)."""
    if suffix is None:
        suffix = TASKS[task][1]
    if suffix is None:  # mmmu, as in LLaVA's evaluation
        suffix = _LETTER if row["multiple_choice"] else "Answer the question using a single word or phrase."
    return f"{row['question']}{suffix}".rstrip("\n")
