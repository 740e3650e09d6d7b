"""Your own questions (--task plain): right or wrong by a rule, or answers of several checkpoints side by side without any.

    python -m eval.generate --task plain --data_path questions.json --model_name_or_path runs/dpo --output runs/dpo/eval/plain.jsonl
    python -m eval.own --data_path questions.json --answers runs/dpo/eval/plain.jsonl
    python -m eval.own --data_path questions.json --answers A --rule judge --rubric rubric.txt --judge URL --judge_model M
    python -m eval.report runs/sft/eval runs/dpo/eval

A question is {"image", "question"} and may have what is right, `answer`: a text, or a list of texts of which one suffices.
`--rule`, or a question's own `rule`, says what counts:

    exact       the answer is one of them, but for capitals, punctuation and articles
    contains    one of them stands in the answer, as whole words
    choice      the option meant, by its letter; the question has `choices`, {"A": "red", ...} or a list
    yesno       yes or no stands in the answer, and not the other word
    judge       a language model that sees the picture gives 0 to 10 points by a rubric of yours
    none        nothing is right or wrong: the report shows the answers

By default a question with `choices` goes by choice, one whose answer is yes or no by yesno, others with an answer by contains.
"""

import argparse
import re
import string
from collections.abc import Mapping, Sequence

from common.errors import InputError, run
from eval.benchmark_files import Row
from eval.choice import infer_letter
from eval.files import read_text
from eval.judge import Ask, Judge, add_judge_arguments, as_judges_see, ask_all, fill, judge_template
from eval.results import Scores, load, save, scorer_parser
from eval.yesno import hallusion_parse

RULES = ("exact", "contains", "choice", "yesno", "judge", "none")
ATTEMPTS = 5
Grade = tuple[float, str]  # points and the judge's words

RUBRIC_PROMPT = """You grade a model's answer to a question about the picture, by this rubric and nothing else.

Rubric: {rubric}

Question: {question}
Right answer, as far as one is known: {gt_answer}
The model's answer: {answer}

Explain in a few sentences, then end with the line "Score: N", where N is a number from 0 (worst) to 10 (best)."""


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words (as SQuAD's evaluation)."""
    bare = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or text.strip().lower()  # "A" is an answer, too


def exact(answer: str, right: Sequence[str], _: Row) -> tuple[bool, str]:
    """Whether the whole answer is one of the right ones; and what was read of it."""
    said = normalised(answer)
    return said in map(normalised, right), said


def contains(answer: str, right: Sequence[str], _: Row) -> tuple[bool, str]:
    """Whether one of the right ones stands in the answer, as whole words."""
    said = f" {normalised(answer)} "
    found = next((r for r in right if f" {normalised(r)} " in said), "")
    return bool(found), found


def choice(answer: str, right: Sequence[str], row: Row) -> tuple[bool, str]:
    """Whether the option meant is a right one; `right` are letters, or texts of options."""
    said = infer_letter(answer, _options(row)) or ""
    return said in _right_letters(right, _options(row)), said


def _options(row: Row) -> dict[str, str]:
    """Letter -> text."""
    options = row["choices"]
    return options if isinstance(options, dict) else dict(zip(string.ascii_uppercase, map(str, options), strict=False))


def _right_letters(right: Sequence[str], options: Mapping[str, str]) -> set[str]:
    """Of the options that `right` names by letter ("B", "b", "(B)", "B.") or by text."""
    letters = {r.strip(string.punctuation + " ").upper() for r in right} & set(options)
    return letters | {k for k, text in options.items() if normalised(str(text)) in map(normalised, right)}


def yesno(answer: str, right: Sequence[str], _: Row) -> tuple[bool, str]:
    """Whether the answer says yes, or no, and is right."""
    said = hallusion_parse(answer)
    return said.lower() in map(normalised, right), said


_BY_RULE = {"exact": exact, "contains": contains, "choice": choice, "yesno": yesno}


def rule_of(row: Row, given: str | None) -> str:
    """Which rule a question goes by.

    Raises:
        InputError: the question lacks what the rule reads.
    """
    right = row.get("answer")
    guess = "none" if right in (None, "", []) else "contains"
    one = right if isinstance(right, list) else [right]
    if guess != "none":
        if row.get("choices"):
            guess = "choice"
        elif all(normalised(str(r)) in ("yes", "no") for r in one):
            guess = "yesno"
    rule = row.get("rule") or given or guess
    if rule not in RULES:
        raise InputError(f"question {row['id']} has the rule {rule!r}: one of {', '.join(RULES)}.")
    if rule not in ("none", "judge") and guess == "none":
        raise InputError(
            f"question {row['id']} has no `answer`, which the rule {rule} reads: add it, or give --rule none."
        )
    if rule == "choice" and not row.get("choices"):
        raise InputError(
            f'question {row["id"]} has no `choices`, which the rule choice reads: {{"A": "red", "B": "blue"}}.'
        )
    if rule == "choice" and not _right_letters([str(r) for r in one], _options(row)):
        raise InputError(
            f"question {row['id']} has the answer {right!r}, which is none of its choices {', '.join(_options(row))}."
        )
    if rule == "yesno" and not all(normalised(str(r)) in ("yes", "no") for r in one):
        raise InputError(
            f"question {row['id']} has the answer {right!r}, which the rule yesno cannot find: yes or no, or another rule."
        )
    return rule


def points(reply: str) -> float | None:
    """The number behind the last "Score:" if it lies between 0 and 10, else None."""
    found = re.findall(r"score\W*?(-?\d+(?:\.\d+)?)", reply.lower())
    return float(found[-1]) if found and 0 <= float(found[-1]) <= 10 else None


def grade(row: Row, answer: str, rubric: str, template: str, ask: Ask, pictures: Sequence[str]) -> Grade:
    """A judge's points for an answer.

    Raises:
        InputError: ATTEMPTS replies without points.
    """
    right = row.get("answer") or "not given"
    prompt = fill(template, rubric=rubric, question=row["question"], gt_answer=right, answer=answer)
    for attempt in range(ATTEMPTS):
        reply = ask(prompt, temperature=0.0 if attempt == 0 else 0.5, sample=attempt, pictures=pictures)
        found = points(reply)
        if found is not None:
            return found, reply
    raise InputError(
        f'the judge gave question {row["id"]} no "Score: N" from 0 to 10 in {ATTEMPTS} replies, the last was {reply[:80]!r}; '
        "use a stronger --judge_model"
    )


def judged(
    rows: list[Row], answers: list[str], given: str | None, args: argparse.Namespace
) -> tuple[dict[int, Grade], dict]:
    """Grades of the questions whose rule is `judge`, by their place; and what is stored of the judge.

    Raises:
        InputError: no judge or no rubric is named, or see `grade`.
    """
    places = [i for i, row in enumerate(rows) if rule_of(row, given) == "judge"]
    if not places:
        return {}, {}
    rubric = read_text(args.rubric) if args.rubric else None
    bare = next((rows[i] for i in places if not rows[i].get("rubric")), None)
    if rubric is None and bare is not None:
        raise InputError(
            f"question {bare['id']} has the rule judge and no `rubric`: give --rubric FILE, a text that says what is worth how much."
        )
    judge = Judge.from_args(args)
    template, about = judge_template(args, RUBRIC_PROMPT, "rubric question answer")

    def ask(place: int) -> Grade:
        row = rows[place]
        pictures = [] if args.judge_text_only else [as_judges_see(image) for image in row["images"]]
        return grade(row, answers[place], row.get("rubric") or rubric or "", template, judge.ask, pictures)

    grades = dict(zip(places, ask_all(ask, places, args.judge_workers), strict=True))
    text_only = {"text_only": True} if args.judge_text_only else {}
    return grades, judge.describe() | about | {"rubric": rubric} | text_only


def score(
    rows: list[Row], answers: list[str], given: str | None = None, grades: Mapping[int, Grade] | None = None
) -> tuple[Scores, list[dict]]:
    """`accuracy` over questions with a rule (fractions), `judge_score` over judged ones (0 to 10), both also per category where rows
    have one, and words per answer.

    Args:
        grades: of the judged questions, by their place.
    """
    details, verdicts = [], dict[str, list[float]]()
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        rule = rule_of(row, given)
        detail = {"id": row["id"], "answer": answer, "correct": None, "category": row.get("category", rule)}
        metric, value = "accuracy", 0.0
        if rule == "judge":
            metric = "judge_score"
            value, detail["review"] = (grades or {})[place]
            detail["parsed"] = f"{value:g} of 10"
        elif rule != "none":
            right = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            detail["correct"], detail["parsed"] = _BY_RULE[rule](answer, [str(r) for r in right], row)
            detail["label"], value = row["answer"], detail["correct"]
        if rule != "none":
            for group in ("", *([f"{row['category']}/"] if row.get("category") else [])):
                verdicts.setdefault(group + metric, []).append(value)
        details.append(detail)
    scores = {name: sum(v) / len(v) for name, v in verdicts.items()}
    scores["words"] = sum(len(answer.split()) for answer in answers) / len(answers)
    return scores, details


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("plain",))
    parser.add_argument("--rule", choices=RULES, help="what counts as right, of questions that name no rule themselves")
    add_judge_arguments(parser)
    parser.add_argument(
        "--rubric", help="file that says what a good answer is, for the rule judge; a question's `rubric` goes first"
    )
    parser.add_argument("--judge_text_only", action="store_true", help="the judge sees no pictures, because it cannot")
    args = parser.parse_args(argv)
    rows, answers, meta = load(args)
    grades, judge = judged(rows, answers, args.rule, args)
    scores, details = score(rows, answers, args.rule, grades)
    save(args, "plain", scores, details, meta, judge or None, rule=args.rule)


if __name__ == "__main__":
    run(main)
