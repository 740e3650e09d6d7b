"""Multiple choice: MMBench (circular), SEEDBench-Img (letter and likelihood), MMMU.

    python -m eval.choice --task mmbench --data_path MMBench_DEV_EN.tsv --answers runs/dpo/eval/mmbench.jsonl
    python -m eval.choice --task seed --data_path SEED-Bench.json --answers runs/dpo/eval/seed.jsonl
    python -m eval.choice --task seed --likelihood --data_path SEED-Bench.json --answers runs/dpo/eval/seed_likelihood.jsonl

The likelihood variant reads the losses that `eval.generate --likelihood` wrote. All numbers are fractions of 1, except
SEEDBench's own (seed/official, seed_likelihood), which are percent with two decimals as its scripts print them.
"""

import math
import random
import re
from collections import defaultdict

from common.errors import InputError, run
from eval.answer_files import match, read_answer_records, read_answers
from eval.benchmark_files import NOT_AVAILABLE, Row
from eval.flags import add_switch
from eval.results import Scores, load, save, scorer_parser

# ------------------------------------------------------------------------------------- which letter is meant?

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = ".()[],:;!*#{}"
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def infer_letter(answer: str, choices: dict[str, str]) -> str | None:
    """The option meant by a free answer, "Z" for a refusal, None if unclear.

    VLMEvalKit matching_util.py can_infer @ e8e78f05: a lone option letter whose first occurrence is among the last four
    words; else "answer is **X**" with an option's letter; else the one option whose text stands in the answer, if the answer
    is not too long.
    """
    answer = answer if answer else "nan"  # what an empty cell becomes in their table
    return _by_letter(answer, choices) or _by_text(answer, choices)


def _by_letter(answer: str, choices: dict[str, str]) -> str | None:
    if "Failed to obtain answer via API" in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(str.maketrans(_MARKS, " " * len(_MARKS))).split()
    present = [c for c in choices if c in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - 5:
        return present[0]
    if not present and "Z" in words:
        return "Z"
    stated = _STATED.search(answer)
    return stated[1].upper() if stated and stated[1].upper() in choices else None


def _cell(answer: str) -> str:
    """An answer as VLMEvalKit reads it back from its table: "None" or "N/A" is an empty cell there."""
    return "nan" if answer in NOT_AVAILABLE else answer


def _by_text(answer: str, choices: dict[str, str]) -> str | None:
    if len(answer) > 2 * sum(len(text) for text in choices.values()):
        return None
    inside = [c for c, text in choices.items() if text.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else None


# ---------------------------------------------------------------------------------------------------- MMBench

_L2_SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def score_mmbench(rows: list[Row], answers: list[str]) -> tuple[Scores, list[dict]]:
    """Circular evaluation (VLMEvalKit mcq_circular_eval): a question counts if every rotation of its options is right.

    Copies of a question have index + k * 1,000,000. Category and split are those of the original row. `vanilla/` is the
    accuracy on original rows only. Unmatched answers are wrong (VLMEvalKit's exact_matching, no judge).
    """
    groups: dict[int, list[tuple[Row, bool]]] = defaultdict(list)
    details = []
    for row, answer in zip(rows, answers, strict=True):
        if not row["label"]:
            raise InputError(
                f"row '{row['id']}' has no answer: this is the TEST file, which only MMBench's server scores"
            )
        letter = infer_letter(_cell(answer), row["choices"])
        groups[int(str(row["id"])) % 1_000_000].append((row, letter == row["label"]))
        details.append(_detail(row, answer, letter == row["label"], letter, row["category"]))
    originals, hits, vanilla = [], [], []
    for index, members in groups.items():
        first = next(((r, right) for r, right in members if int(str(r["id"])) == index), None)
        if first is None:
            raise InputError(f"MMBench question {index} has only rotated copies; its original row is missing")
        originals.append(first[0])
        vanilla.append(first[1])
        hits.append(all(right for _, right in members))
    return _by_split(originals, hits) | {f"vanilla/{k}": v for k, v in _by_split(originals, vanilla).items()}, details


def _by_split(rows: list[Row], hits: list[bool]) -> Scores:
    cells: dict[str, list[bool]] = defaultdict(list)
    for row, hit in zip(rows, hits, strict=True):
        level2 = _L2_SHORT.get(str(row["l2"]), str(row["l2"]))
        for name in dict.fromkeys(("Overall", level2, str(row["category"]))):
            cells[f"{row['split']}/{name}"].append(hit)
    return {name: sum(values) / len(values) for name, values in sorted(cells.items())}


# --------------------------------------------------------------------------------------------- SEEDBench-Img


def score_seed(rows: list[Row], answers: list[str]) -> tuple[Scores, list[dict]]:
    """Accuracy of generated answers on the image types.

    `overall` and per type: the letter rule of `infer_letter` (VLMEvalKit). `official/`: the text must equal the letter
    (LLaVA's convert_seed_for_submission.py), percent with two decimals; it includes video rows if there are any.
    """
    cells: dict[str, list[bool]] = defaultdict(list)
    equal: dict[str, list[bool]] = defaultdict(list)
    details = []
    for row, answer in zip(rows, answers, strict=True):
        exact = answer == row["label"]
        for name in (row["category"], "total", row["data_type"]):
            equal[f"official/{name}"].append(exact)
        if row["data_type"] != "image":
            continue
        letter = infer_letter(_cell(answer), row["choices"])
        right = letter == row["label"]
        for name in ("overall", row["category"]):
            cells[str(name)].append(right)
        details.append(_detail(row, answer, right, letter, row["category"]))
    official = {name: round(100 * sum(v) / len(v), 2) for name, v in equal.items()}
    return {name: sum(v) / len(v) for name, v in cells.items()} | official, details


def score_seed_likelihood(rows: list[Row], losses: list[list[float]]) -> tuple[Scores, list[dict]]:
    """Accuracy of the choice with the smallest mean token loss (SEED-Bench eval.py), percent with two decimals.

    NaN is larger than every number, as in torch.argsort; the first of equal losses wins.
    """
    cells: dict[str, list[bool]] = defaultdict(list)
    details = []
    for row, row_losses in zip(rows, losses, strict=True):
        letter = "ABCD"[min(range(4), key=lambda i, x=row_losses: (math.isnan(x[i]), x[i]))]
        for name in ("total", row["category"]):
            cells[str(name)].append(letter == row["label"])
        details.append(
            _detail(row, f"{letter}. {row['choices'][letter]}", letter == row["label"], letter, row["category"])
        )
    return {name: round(100 * sum(v) / len(v), 2) for name, v in cells.items()}, details


def read_losses(path: str, rows: list[Row]) -> list[list[float]]:
    """Mean token losses of the choices A-D per row: {id | question_id, losses}.

    SEED-Bench's results.json {q_id, prediction} has the chosen letter only: it counts as the smallest loss.
    """
    out = []
    for row, record in zip(rows, match(read_answer_records(path), rows, path), strict=True):
        values, letter = record.get("losses"), record.get("prediction")
        if values is None and letter in ("A", "B", "C", "D"):
            values = [float(c != letter) for c in "ABCD"]
        numbers = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in values
        )
        if not numbers or len(values) != 4:
            raise InputError(f"{path} has no four losses for '{row['id']}'; write it with eval.generate --likelihood")
        out.append([float(v) for v in values])
    return out


# ------------------------------------------------------------------------------------------------------- MMMU

MMMU_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmmu_letter(answer: str, choices: dict[str, str], guess: random.Random) -> str:
    """The chosen letter (MMMU eval_utils.py parse_multi_choice_response); a random one if there is none.

    "(A)" first, else " A ", else, in answers of more than five words, an option's text; the last mention wins.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    position = {c: text.rfind(f"({c})") for c in choices if f"({c})" in text}
    if not position:
        position = {c: text.rfind(f" {c} ") for c in choices if f" {c} " in text}
    if not position and len(text.split()) > 5:
        lower = text.lower()
        position = {c: lower.rfind(option.lower()) for c, option in choices.items() if option.lower() in lower}
    return max(position, key=position.__getitem__) if position else guess.choice(list(choices))


def mmmu_candidates(answer: str) -> list[str | float]:
    """Normalised candidates of an open answer (parse_open_response): key phrases and every number in them."""
    text = answer.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    phrases = []
    for number, sentence in enumerate(sentences):
        indicators = [*_INDICATORS, "="] if number == len(sentences) - 1 else _INDICATORS
        shortest = ""  # an empty tail counts as none, and gives way to the next one
        for tail in (sentence.split(i)[-1].strip() for i in indicators if i in sentence):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    found = phrases or [text]
    numbers = [n for phrase in found for n in _numbers(phrase)]
    candidates: list[str | float] = []
    for item in [*found, *numbers]:
        candidates += _normalise(item)
    return list(dict.fromkeys(candidates))


def _numbers(text: str) -> list[str]:
    with_commas = re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text)
    scientific = re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)
    simple = re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)
    return with_commas + scientific + simple


def _normalise(item: str) -> list[str | float]:
    item = item.strip()
    try:
        return [round(float(item.replace(",", "")), 2)]
    except ValueError:
        # a single letter is padded so that it does not match inside every word
        return [f" {item.lower()}", f"{item.lower()} "] if len(item) == 1 else [item.lower()]


def mmmu_open_correct(gold: str | list[str], candidates: list[str | float]) -> bool:
    """Whether a candidate holds a normalised gold answer: texts by containment, numbers (two decimals) by equality."""
    golds = [n for g in (gold if isinstance(gold, list) else [gold]) for n in _normalise(g)]
    for candidate in candidates:
        if isinstance(candidate, str) and any(isinstance(g, str) and g in candidate for g in golds):
            return True
        if not isinstance(candidate, str) and candidate in golds:
            return True
    return False


def score_mmmu(rows: list[Row], answers: list[str]) -> tuple[Scores, list[dict]]:
    """Micro accuracy over all rows, per domain and per subject (main_eval_only.py), unrounded.

    A multiple-choice answer without any letter is a guess from random.Random(42), drawn in row order.
    """
    guess = random.Random(42)
    cells: dict[str, list[bool]] = defaultdict(list)
    domain_of = {subject: domain for domain, subjects in MMMU_DOMAINS.items() for subject in subjects.split()}
    details = []
    for row, answer in zip(rows, answers, strict=True):
        if row["multiple_choice"]:
            parsed: object = mmmu_letter(answer, row["choices"], guess)
            right = parsed in row["label"] if isinstance(row["label"], list) else parsed == row["label"]
        else:
            parsed = mmmu_candidates(answer)
            right = mmmu_open_correct(row["label"], parsed)
        subject = str(row["subject"])
        for name in ("overall", f"domain/{domain_of.get(subject, 'Other')}", f"subject/{subject}"):
            cells[name].append(right)
        details.append(_detail(row, answer, right, parsed, subject))
    return {name: sum(v) / len(v) for name, v in cells.items()}, details


# ------------------------------------------------------------------------------------------------------------


def _detail(row: Row, answer: str, right: bool, parsed: object, category: object) -> dict:
    return {"id": row["id"], "answer": answer, "correct": right, "parsed": parsed, "category": category}


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("mmbench", "seed", "mmmu"))
    add_switch(parser, "--likelihood", help="seed: --answers holds the losses of the choices")
    args = parser.parse_args(argv)
    if args.likelihood:
        if args.task != "seed":
            raise InputError("--likelihood is a variant of --task seed only; leave it out")
        rows, losses, meta = load(args, read_losses)
        return save(args, "seed_likelihood", *score_seed_likelihood(rows, losses), meta)
    scorer = {"mmbench": score_mmbench, "seed": score_seed, "mmmu": score_mmmu}[args.task]
    rows, answers, meta = load(args, read_answers)
    save(args, args.task, *scorer(rows, answers), meta)


if __name__ == "__main__":
    run(main)
