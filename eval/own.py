"""Your own questions (--task plain): right or wrong by a rule, or answers of several checkpoints side by side without any.

    python -m eval.generate --task plain --data_path questions.json --model_name_or_path runs/dpo --output runs/dpo/eval/plain.jsonl
    python -m eval.own --data_path questions.json --answers runs/dpo/eval/plain.jsonl
    python -m eval.report runs/sft/eval runs/dpo/eval

A question is {"image", "question"} and may have what is right, `answer`: a text, or a list of texts of which one suffices.
`--rule`, or a question's own `rule`, says what counts:

    exact       the answer is one of them, but for capitals, punctuation and articles
    contains    one of them stands in the answer, as whole words
    choice      the option meant, by its letter; the question has `choices`, {"A": "red", ...} or a list
    yesno       yes or no stands in the answer, and not the other word
    none        nothing is right or wrong: the report shows the answers

By default a question with `choices` goes by choice, one whose answer is yes or no by yesno, others with an answer by contains.
"""

import re
import string
from collections.abc import Sequence

from common.errors import InputError, run
from eval.benchmark_files import Row
from eval.choice import infer_letter
from eval.results import Scores, load, save, scorer_parser
from eval.yesno import hallusion_parse

RULES = ("exact", "contains", "choice", "yesno", "none")


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
    options = row["choices"]
    if not isinstance(options, dict):
        options = dict(zip(string.ascii_uppercase, map(str, options), strict=False))
    letters = {r.strip().upper() for r in right} | {k for k, text in options.items() if text in right}
    said = infer_letter(answer, options) or ""
    return said in letters & set(options), said


def yesno(answer: str, right: Sequence[str], _: Row) -> tuple[bool, str]:
    """Whether the answer says yes, or no, and is right."""
    said = hallusion_parse(answer)
    return said.lower() in [r.lower() for r in right], said


_BY_RULE = {"exact": exact, "contains": contains, "choice": choice, "yesno": yesno}


def rule_of(row: Row, given: str | None) -> str:
    """Which rule a question goes by.

    Raises:
        InputError: the question lacks what the rule reads.
    """
    right = row.get("answer")
    guess = "none" if right in (None, "", []) else "contains"
    if guess != "none":
        one = [right] if isinstance(right, str) else right
        if row.get("choices"):
            guess = "choice"
        elif all(str(r).strip().lower().rstrip(".") in ("yes", "no") for r in one):
            guess = "yesno"
    rule = row.get("rule") or given or guess
    if rule not in RULES:
        raise InputError(f"question {row['id']} has the rule {rule!r}: one of {', '.join(RULES)}.")
    if rule != "none" and guess == "none":
        raise InputError(
            f"question {row['id']} has no `answer`, which the rule {rule} reads: add it, or give --rule none."
        )
    if rule == "choice" and not row.get("choices"):
        raise InputError(
            f'question {row["id"]} has no `choices`, which the rule choice reads: {{"A": "red", "B": "blue"}}.'
        )
    return rule


def score(rows: list[Row], answers: list[str], given: str | None = None) -> tuple[Scores, list[dict]]:
    """`accuracy` over questions with a rule, per category where rows have one (fractions), and words per answer."""
    details, verdicts = [], dict[str, list[bool]]()
    for row, answer in zip(rows, answers, strict=True):
        rule = rule_of(row, given)
        detail = {"id": row["id"], "answer": answer, "correct": None, "category": row.get("category", rule)}
        if rule != "none":
            right = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            detail["correct"], detail["parsed"] = _BY_RULE[rule](answer, [str(r) for r in right], row)
            detail["label"] = row["answer"]
            for group in ("", *([str(row["category"])] if row.get("category") else [])):
                verdicts.setdefault(group, []).append(detail["correct"])
        details.append(detail)
    scores = {f"{group}/accuracy".lstrip("/"): sum(v) / len(v) for group, v in verdicts.items()}
    scores["words"] = sum(len(answer.split()) for answer in answers) / len(answers)
    return scores, details


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("plain",))
    parser.add_argument("--rule", choices=RULES, help="what counts as right, of questions that name no rule themselves")
    args = parser.parse_args(argv)
    rows, answers, meta = load(args)
    scores, details = score(rows, answers, args.rule)
    save(args, "plain", scores, details, meta, rule=args.rule)


if __name__ == "__main__":
    run(main)
