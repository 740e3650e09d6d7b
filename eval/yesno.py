"""Yes/no benchmarks: MME, POPE, HallusionBench (rule), AMBER's discriminative part.

    python -m eval.yesno --task pope --data_path coco_pope/ --answers runs/dpo/eval/pope.jsonl
    python -m eval.yesno --task amber --data_path AMBER/query_all.json --answers runs/dpo/eval/amber.jsonl

Each scorer is the official one with its quirks, because published tables hold those numbers; a function's docstring
names its source. Fractions for POPE, points for MME, percent for HallusionBench and AMBER, as the papers print them.
"""

import re
from collections import defaultdict
from pathlib import Path

from common.errors import InputError, run
from eval.benchmark_files import Row
from eval.files import need, read_records
from eval.results import Scores, load, save, scorer_parser

# ------------------------------------------------------------------------------------------------------- POPE


def pope_parse(answer: str) -> str:
    """yes or no (RUCAIBox/POPE evaluate.py): "no" only if No, no or not is a word of the first sentence."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(rows: list[Row], answers: list[str]) -> tuple[Scores, list[dict]]:
    """Accuracy, precision, recall, F1 (positive = yes) and the share of predicted yes, per split and their mean.

    `unclear` counts answers that hold neither word. The official rule takes them as yes, which alone gives an F1 of 66.7.
    """
    counts: dict[str, dict[str, int]] = {}
    details = []
    for row, answer in zip(rows, answers, strict=True):
        said = pope_parse(answer)
        cell = ("T" if said == row["label"] else "F") + ("P" if said == "yes" else "N")
        counts.setdefault(str(row["split"]), dict.fromkeys(("TP", "FP", "TN", "FN"), 0))[cell] += 1
        details.append(_detail(row, answer, said == row["label"], said, row["split"]))
    per_split = {split: _binary(c["TP"], c["FP"], c["TN"], c["FN"]) for split, c in counts.items()}
    scores = {f"{split}/{k}": v for split, m in per_split.items() for k, v in m.items()}
    for k in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        scores[f"mean/{k}"] = sum(m[k] for m in per_split.values()) / len(per_split)
    scores["unclear"] = sum(not re.search(r"\b(yes|no|not)\b", answer, re.IGNORECASE) for answer in answers)
    return scores, details


def _binary(tp: int, fp: int, tn: int, fn: int) -> Scores:
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    total = tp + fp + tn + fn
    counts = {"TP": tp, "FP": fp, "TN": tn, "FN": fn}
    return {**counts, "accuracy": (tp + tn) / total, "precision": precision, "recall": recall, "f1": f1,
            "yes_ratio": (tp + fp) / total}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- MME

MME_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
MME_COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def mme_parse(answer: str) -> str:
    """yes, no or other (Awesome-MLLM calculation.py): "yes", else "no", within the first four characters."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme(rows: list[Row], answers: list[str]) -> tuple[Scores, list[dict]]:
    """Per task 100 * acc + 100 * acc_plus (both questions of an image right); perception <= 2000, cognition <= 800.

    Precision and recall leave "other" answers out, accuracy counts them as wrong.
    """
    pairs: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("TP", "FN", "TN", "FP", "other"), 0))
    details = []
    for row, answer in zip(rows, answers, strict=True):
        task, label, said = str(row["category"]), str(row["label"]).lower(), mme_parse(answer)
        right = said == label
        pairs[task][str(row["image_id"])].append(right)
        cell = "other" if said == "other" else ("T" if right else "F") + ("P" if said == "yes" else "N")
        counts[task][cell] += 1
        details.append(_detail(row, answer, right, said, task))
    scores: Scores = {}
    for task, images in pairs.items():
        odd = next((i for i, rights in images.items() if len(rights) != 2), None)
        if odd is not None:
            raise InputError(f"MME task {task}: image {odd} has {len(images[odd])} questions, two are needed for acc+")
        c = counts[task]
        acc = sum(map(sum, images.values())) / (2 * len(images))
        acc_plus = sum(map(all, images.values())) / len(images)
        scores[f"{task}/score"] = 100 * acc + 100 * acc_plus
        scores[f"{task}/acc"], scores[f"{task}/acc_plus"] = acc, acc_plus
        scores[f"{task}/precision"] = c["TP"] / (c["TP"] + c["FP"]) if c["TP"] + c["FP"] else 0.0
        scores[f"{task}/recall"] = c["TP"] / (c["TP"] + c["FN"]) if c["TP"] + c["FN"] else 0.0
        scores.update({f"{task}/{k}": v for k, v in c.items()})
    perception = sum(scores[f"{t}/score"] for t in MME_PERCEPTION if t in pairs)
    cognition = sum(scores[f"{t}/score"] for t in MME_COGNITION if t in pairs)
    return {"perception": perception, "cognition": cognition, "total": perception + cognition, **scores}, details


# --------------------------------------------------------------------------------------------- HallusionBench

_SIGNS = r""";/[]"{}()=+\_-><@`,?!"""


def hallusion_parse(answer: str) -> str:
    """Yes, No or Unknown (VLMEvalKit YOrN_Extraction): one of the words yes and no, and not the other."""
    words = set(_without_punctuation(answer.lower()).split())
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def _without_punctuation(text: str) -> str:
    """VQA-style punctuation rule: a sign vanishes if it touches a space anywhere, else it becomes a space.

    A full stop that touches no digit vanishes; upstream passes re.UNICODE as the count, so only the first 32 do.
    """
    glue = re.search(r"\d,\d", text) is not None
    out = text
    for sign in _SIGNS:
        joined = f"{sign} " in text or f" {sign}" in text or glue
        out = out.replace(sign, "" if joined else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", out, count=int(re.UNICODE))


def score_hallusion(rows: list[Row], answers: list[str]) -> tuple[Scores, list[dict]]:
    """aAcc, fAcc, qAcc in percent: VLMEvalKit's numbers on the image rows and, under repository/, the repository's."""
    said = [hallusion_parse(a) for a in answers]
    labels = [1 if s == r["label"] else 2 if s == "Unknown" else 0 for s, r in zip(said, rows, strict=True)]
    details = [
        _detail(r, a, c == 1, s, f"{r['category']} {r['subcategory']}")
        for r, a, c, s in zip(rows, answers, labels, said, strict=True)
    ]
    return hallusion_scores(rows, labels), details


def hallusion_scores(rows: list[Row], labels: list[int]) -> Scores:
    """Both aggregations of the labels 1 correct, 0 incorrect, 2 unclear; also used with a judge's labels."""
    pairs = list(zip(rows, labels, strict=True))
    with_image = [(r, c == 1) for r, c in pairs if r["images"]]
    scores: Scores = {}
    groups = {"": with_image}
    for field in ("category", "subcategory"):
        for value in dict.fromkeys(str(r[field]) for r, _ in with_image):
            groups[f"{value}/"] = [(r, c) for r, c in with_image if r[field] == value]
    for prefix, members in groups.items():
        # VLMEvalKit's keys leave the category out: VD ocr and VS ocr share one group
        scores[f"{prefix}aAcc"] = 100 * _mean(c for _, c in members)
        scores[f"{prefix}fAcc"] = 100 * _all_right(members, "subcategory set_id figure_id")
        scores[f"{prefix}qAcc"] = 100 * _all_right(members, "subcategory set_id question_id")
    for name in ("overall", "VD", "VS"):
        members = [(r, c) for r, c in pairs if name in ("overall", r["category"])]
        if members:
            scores.update({f"repository/{name}/{k}": v for k, v in _hallusion_repository(members).items()})
    return scores


def _hallusion_repository(members: list[tuple[Row, int]]) -> Scores:
    """tianyi-lab/HallusionBench utils.py: keys include the category; rows without an image count as questions."""
    question = "category subcategory set_id question_id"
    # VS figure 0 shows no image: "unclear" is a right answer there, and it does not count as a figure
    blind = [r["category"] == "VS" and r["figure_id"] == "0" for r, _ in members]
    right = [(r, c == 1 or (c == 2 and b)) for (r, c), b in zip(members, blind, strict=True)]
    hard = [(r, c) for r, c in right if r["visual_input"] == "2"]
    easy = [(r, c) for r, c in right if r["visual_input"] != "2"]
    figures: dict[tuple, list[bool]] = defaultdict(list)
    for (r, c), b in zip(right, blind, strict=True):
        if not b:
            figures[tuple(r[k] for k in "category subcategory set_id figure_id".split())].append(c)
    return {
        "aAcc": 100 * _mean(c for _, c in right),
        "qAcc": 100 * _all_right(right, question),
        "fAcc": 100 * _mean(all(f) for f in figures.values()),
        "easy": 100 * _all_right(easy, question),
        "hard": 100 * _all_right(hard, question),
        "figure_score": _mean(_mean(f) for f in figures.values()),
    }


def _all_right(members: list[tuple[Row, bool]], fields: str) -> float:
    """Share of the groups (rows that agree in all fields) in which every row is right."""
    groups: dict[tuple, bool] = {}
    for row, right in members:
        key = tuple(row[f] for f in fields.split())
        groups[key] = groups.get(key, True) and right
    return _mean(groups.values())


def _mean(values: object) -> float:
    items = [float(v) for v in values]  # type: ignore[attr-defined]
    return sum(items) / len(items) if items else 0.0


# ------------------------------------------------------------------------------------------------------ AMBER

AMBER_TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
}


def amber_annotations(given: str | None, data: str | Path) -> Path:
    """annotations.json: as given (the file, or its folder), else beside the questions or, as in AMBER's repository, one folder up."""
    if given:
        return Path(given) / "annotations.json" if Path(given).is_dir() else Path(given)
    places = [
        Path(data).absolute().parent / "annotations.json",
        Path(data).absolute().parent.parent / "annotations.json",
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"{places[0]} does not exist, nor does it one folder up; pass --annotations")
    return found


def read_amber_truth(path: str | Path, rows: list[Row]) -> list[dict]:
    """The annotation of every row, by id. Official code takes position id - 1, which is the same in the public file."""
    annotations = read_records(path)
    need(annotations, "id type truth", path)
    by_id = {str(a["id"]): a for a in annotations}
    missing = next((r["id"] for r in rows if r["id"] not in by_id), None)
    if missing is not None:
        raise InputError(f"{path} has no annotation with the id {missing}; use AMBER's data/annotations.json")
    return [by_id[str(r["id"])] for r in rows]


def score_amber_discriminative(rows: list[Row], answers: list[str], truth: list[dict]) -> tuple[Scores, list[dict]]:
    """Percent with one decimal, as junyangwang0410/AMBER inference.py prints them. Positive class = No.

    Only the exact words Yes and No count. Denominators start at 0.001 (0.003 for attribute, a sum of three), and F1 is
    taken from the rounded precision and recall with 0.0001 (existence: 0.001) added to the denominator.
    """
    totals: dict[str, dict[str, float]] = {}
    details = []
    for row, answer, note in zip(rows, answers, truth, strict=True):
        if note["type"] == "generative":
            continue
        kind = AMBER_TYPES.get(note["type"], "relation")
        right = answer == ("Yes" if note["truth"] == "yes" else "No")
        for group in ("all", kind):
            t = totals.setdefault(group, {"right": 0, "n": 0.001, "hit": 0, "said_no": 0.001, "is_no": 0.001})
            t["right"] += right
            t["n"] += 1
            t["hit"] += right and note["truth"] == "no"
            t["said_no"] += answer == "No"
            t["is_no"] += note["truth"] == "no"
        details.append(_detail(row, answer, right, answer if answer in ("Yes", "No") else "other", kind))
    if not details:
        raise InputError("there is no yes/no question among the rows; pass AMBER's query_all.json")
    parts = [totals[k] for k in ("state", "number", "action") if k in totals]
    if parts:
        totals["attribute"] = {k: sum(p[k] for p in parts) for k in parts[0]}
    scores: Scores = {}
    for group, t in totals.items():
        precision = round(100 * t["hit"] / t["said_no"], 1)
        recall = round(100 * t["hit"] / t["is_no"], 1)
        p, r = precision / 100, recall / 100
        prefix = "" if group == "all" else f"{group}/"
        scores[f"{prefix}accuracy"] = round(100 * t["right"] / t["n"], 1)
        scores[f"{prefix}precision"], scores[f"{prefix}recall"] = precision, recall
        scores[f"{prefix}f1"] = round(100 * 2 * p * r / (p + r + (0.001 if group == "existence" else 0.0001)), 1)
    return scores, details


# ------------------------------------------------------------------------------------------------------------


def _detail(row: Row, answer: str, right: bool, parsed: str, category: object) -> dict:
    return {"id": row["id"], "answer": answer, "correct": right, "parsed": parsed, "category": category}


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("pope", "mme", "hallusion", "amber"))
    parser.add_argument("--annotations", help="AMBER's annotations.json; default: beside --data_path, or one folder up")
    args = parser.parse_args(argv)
    rows, answers, meta = load(args)
    if args.task == "amber":
        truth = read_amber_truth(amber_annotations(args.annotations, args.data_path), rows)
        scores, details = score_amber_discriminative(rows, answers, truth)
        return save(args, "amber_discriminative", scores, details, meta)
    scorer = {"pope": score_pope, "mme": score_mme, "hallusion": score_hallusion}[args.task]
    scores, details = scorer(rows, answers)
    save(args, args.task, scores, details, meta)


if __name__ == "__main__":
    run(main)
