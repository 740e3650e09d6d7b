"""MathVista: extract the answer from free text, normalise it, compare strings.

    python -m eval.mathvista --data_path testmini.json --answers A --judge http://localhost:8000/v1 --judge_model M
    python -m eval.mathvista --data_path testmini.json --answers A            # rules only, stored as mathvista_rule

Published numbers use a language model for the extraction (`mathvista`); the rule part alone is another, lower metric.
All numbers are fractions of 1. lupantech/MathVista evaluation/extract_answer.py and calculate_score.py.
"""

import re
from collections import defaultdict
from collections.abc import Callable

from common.errors import run
from eval.benchmark_files import Row
from eval.flags import add_switch
from eval.judge import Judge, add_judge_arguments, ask_all, judge_template
from eval.results import Scores, load, save, scorer_parser

EXTRACTION_PROMPT = """Below are a question and a model's reply. Copy the final answer out of the reply, in the form that the
hint in the question asks for: an option's letter, an integer, a number with its decimals, or a list. Write the answer alone.
Write nothing if the reply gives none.

Question: {question}
Reply: {answer}
Final answer:"""


def extract(answer: str, row: Row, ask: Callable[[Row, str], str] | None, quick: bool = False) -> str:
    """The answer within a reply: by rule where the rule is sure, else by asking; "" without anybody to ask.

    Sure are: a choice's exact text, int(text), float(text) and, with `quick`, The answer is "..". A lone letter is not.
    """
    if not answer:
        return ""
    if row["question_type"] == "multi_choice" and answer in row["choices"]:
        return answer
    cast = {"integer": int, "float": float}.get(str(row["answer_type"]))
    if cast is not None:
        try:
            return str(cast(answer))
        except ValueError:
            pass
    if quick and (stated := re.search(r'The answer is "(.*)"\.', answer)):
        return stated.group(1)
    return ask(row, answer) if ask else ""


def normalise(extraction: str, row: Row, ignore_empty: bool = False) -> str | None:
    """The extraction as the answer would be written; None if it cannot be.

    multi_choice: "(B)" or "B" is that choice, anything else (even "", unless `ignore_empty`) the nearest choice by
    Levenshtein distance, the first one on ties. Numbers are rounded to the question's precision.
    """
    if row["question_type"] == "multi_choice":
        from nltk.metrics.distance import edit_distance

        choices: list[str] = row["choices"]
        text = extraction.strip()
        if ignore_empty and not text:
            return None
        bracketed = re.findall(r"\(([a-zA-Z])\)", text)
        letter = bracketed[0].upper() if bracketed else text
        if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(choices):
            return choices[ord(letter) - ord("A")]
        return min(choices, key=lambda choice: edit_distance(letter, choice))
    try:
        if row["answer_type"] == "integer":
            return str(int(float(extraction)))
        if row["answer_type"] == "float":
            return str(round(float(extraction), int(row["precision"])))
    except (ValueError, OverflowError, TypeError):
        return None
    return extraction


def score_mathvista(
    rows: list[Row],
    answers: list[str],
    ask: Callable[[Row, str], str] | None = None,
    quick: bool = False,
    ignore_empty: bool = False,
) -> tuple[Scores, list[dict]]:
    """Accuracy over all rows and per question type, answer type, language, source, category, task, context, grade, skill."""
    cells: dict[str, list[bool]] = defaultdict(list)
    details = []
    for row, answer in zip(rows, answers, strict=True):
        extraction = extract(answer, row, ask, quick)
        prediction = normalise(extraction, row, ignore_empty)
        right = prediction == row["answer"]
        cells["average"].append(right)
        for kind in ("question_type", "answer_type"):
            cells[f"{kind}/{row[kind]}"].append(right)
        for kind in "language source category task context grade skills".split():
            values = row["metadata"].get(kind, [])
            for value in values if isinstance(values, list) else [values]:
                cells[f"{kind}/{value}"].append(right)
        details.append({"id": row["id"], "answer": answer, "correct": right, "category": row["metadata"].get("task", ""),
                        "extraction": extraction, "parsed": prediction, "label": row["answer"]})  # fmt: skip
    return {name: sum(v) / len(v) for name, v in cells.items()}, details


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("mathvista",))
    add_switch(parser, "--quick_extract", help='believe The answer is "..". without asking')
    add_switch(parser, "--ignore_empty_extractions", help="an empty extraction is wrong")
    add_judge_arguments(parser)
    args = parser.parse_args(argv)
    rows, answers, meta = load(args)
    options = {"quick": args.quick_extract, "ignore_empty": args.ignore_empty_extractions}
    if not args.judge:
        return save(args, "mathvista_rule", *score_mathvista(rows, answers, **options), meta, options=options)
    judge = Judge.from_args(args)
    template, described = judge_template(args, EXTRACTION_PROMPT, "question answer")

    def ask(row: Row, answer: str) -> str:
        return judge.ask(template.replace("{question}", str(row["question"])).replace("{answer}", answer))

    asked: list[
        tuple[Row, str]
    ] = []  # first collect the questions, then ask them at the same time, then score from the cache
    score_mathvista(rows, answers, lambda row, answer: asked.append((row, answer)) or "", **options)
    ask_all(lambda item: ask(*item), asked, args.judge_workers)
    scores, details = score_mathvista(rows, answers, ask, **options)
    save(args, "mathvista", scores, details, meta, judge.describe() | described, options=options)


if __name__ == "__main__":
    run(main)
