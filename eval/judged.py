"""Benchmarks that a language model judges: MMHal-Bench, MM-Vet, RefoMB, HallusionBench.

    python -m eval.judged --task mmhal --data_path mmhal-bench_answer_template.json --answers A \
        --judge http://localhost:8000/v1 --judge_model M
    python -m eval.judged --task refomb --data_path RefoMB_dev.jsonl --reference gpt4v_RefoMB_dev.jsonl --answers A --judge ...

What is official here is how replies are parsed and counted. The built-in prompts were written for this project: for a number beside a
published one, pass the benchmark's prompt as a file (--judge_prompt) and its judge (--judge_model); both are stored with the score.
"""

import functools
import re
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np

from common.errors import InputError, run
from eval.benchmark_files import Row
from eval.files import need, read_records, read_text
from eval.judge import Ask, Judge, add_judge_arguments, ask_all, fill, judge_template
from eval.results import Scores, load, save, scorer_parser
from eval.yesno import hallusion_scores

# ------------------------------------------------------------------------------------------------ MMHal-Bench

MMHAL_PROMPT = """You rate how informative a model's answer about an image is and whether it hallucinates. You do not see the image;
its contents and a good answer are given. A hallucination is a claim that conflicts with them, or that they do not support although
the question is about it. Omissions and general knowledge that does not concern this image are not hallucinations.

Image contents: {image_content}
Question: {question}
Good answer: {gt_answer}
Model's answer: {answer}

Explain in a few sentences, then end with one of these lines:
Rating: 6 (very informative with good analysis or reasoning, no hallucination)
Rating: 5 (very informative, no hallucination)
Rating: 4 (somewhat informative, no hallucination)
Rating: 3 (not informative, no hallucination)
Rating: 2 (very informative, with hallucination)
Rating: 1 (somewhat informative, with hallucination)
Rating: 0 (not informative, with hallucination)"""


def mmhal_rating(review: str) -> int:
    """0-6: the only "rating: s" in the review, any case; 0 if there is none or there are several different ones."""
    found = [s for s in range(7) if f"rating: {s}" in review.lower()]
    return found[0] if len(found) == 1 else 0


def score_mmhal(rows: list[Row], answers: list[str], reviews: list[str]) -> tuple[Scores, list[dict]]:
    """RLHF-V/RLAIF-V summarize_gpt_mmhal_review.py. A row's type is its position modulo 8.

    hallucination_rate = share of ratings below 3 (a fraction); informativeness counts s - 3 for s >= 3, in percent of 3.
    """
    if len(rows) != 96:
        raise InputError(f"MMHal-Bench has 96 rows in a fixed order, {len(rows)} were given; score a whole run")
    ratings = [mmhal_rating(review) for review in reviews]
    per_type = {f"type_{t}": statistics.fmean(ratings[t::8]) for t in range(8)}
    details = [
        {"id": r["id"], "answer": a, "correct": s >= 3, "category": r["category"], "parsed": s, "label": r["label"],
         "review": v}
        for r, a, s, v in zip(rows, answers, ratings, reviews, strict=True)
    ]  # fmt: skip
    return {
        "average_score": statistics.fmean(ratings),
        "hallucination_rate": statistics.fmean(s < 3 for s in ratings),
        "informativeness": 100 * statistics.fmean(s - 3 if s >= 3 else s for s in ratings) / 3,
        **per_type,
    }, details


def review_mmhal(rows: list[Row], answers: list[str], ask: Ask, template: str, workers: int) -> list[str]:
    """A review of each answer by the official prompt of MMHal-Bench."""
    prompts = [
        fill(
            template,
            image_content=", ".join(r["image_content"]),
            question=r["question"],
            gt_answer=r["label"],
            answer=a,
        )
        for r, a in zip(rows, answers, strict=True)
    ]
    return ask_all(ask, prompts, workers)


# ----------------------------------------------------------------------------------------------------- MM-Vet

MMVET_PROMPT = """Grade the prediction against the ground truth with one number between 0.0 (wrong) and 1.0 (right). In the ground truth
<AND> joins parts that are all needed for 1.0, <OR> joins alternatives of which one is enough. Reply with the number alone.

Question: What is the price of the soup? | Ground truth: 4.50 | Prediction: It costs 4.5 dollars. | Correctness: 1.0
Question: Which animals are there? | Ground truth: dog <AND> cat | Prediction: A dog on a sofa. | Correctness: 0.5
Question: What is the man doing? | Ground truth: fishing <OR> angling | Prediction: He swims. | Correctness: 0.0
Question: {question} | Ground truth: {gt_answer} | Prediction: {answer} | Correctness:"""
MMVET_AGAIN = "\nReply with one number between 0.0 and 1.0 and nothing else. Correctness:"


def mmvet_score(reply: str) -> float | None:
    """The number before the first space if it lies in [0, 1], else None."""
    try:
        value = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def grade_mmvet(prompt: str, run_number: int, ask: Ask, attempts: int = 5) -> float:
    """One grade: a reply that does not parse is asked again, hotter and with a reminder; 0.0 after five failures."""
    for attempt in range(attempts):
        text = prompt if attempt == 0 else prompt + MMVET_AGAIN
        score = mmvet_score(ask(text, temperature=0.5 * attempt, sample=run_number))
        if score is not None:
            return score
    return 0.0


def score_mmvet(rows: list[Row], answers: list[str], grades: list[list[float]]) -> tuple[Scores, list[dict]]:
    """Percent with one decimal per capability and per capability set (yuweihao/MM-Vet mm-vet_evaluator.py).

    Args: `grades[i]` are row i's grades, one per run. total = mean over rows per run, then mean over runs; std is the population
        standard deviation of the run totals.
    """
    members: dict[str, list[list[float]]] = defaultdict(list)
    for row, row_grades in zip(rows, grades, strict=True):
        capabilities = set(row["capability"])
        for name in ["total", *capabilities, "set/" + "_".join(sorted(capabilities))]:
            members[str(name)].append(row_grades)
    # grade after grade, as in the script: sum() and fmean() would round once, at the end, and turn over the digit of a tie
    per_run = {name: functools.reduce(np.add, np.array(m, dtype=float)) / len(m) * 100 for name, m in members.items()}
    scores = {name: float(round(runs.mean(), 1)) for name, runs in per_run.items()}
    details = [
        {"id": r["id"], "answer": a, "correct": statistics.fmean(g) >= 0.5, "category": "_".join(sorted(r["capability"])),
         "parsed": g, "label": r["label"]}
        for r, a, g in zip(rows, answers, grades, strict=True)
    ]  # fmt: skip
    return scores | {"std": float(round(per_run["total"].std(), 1))}, details


def review_mmvet(
    rows: list[Row], answers: list[str], ask: Ask, template: str, runs: int, workers: int
) -> list[list[float]]:
    """Scores of each answer by the official prompt of MM-Vet."""
    prompts = [
        fill(template, question=r["question"], gt_answer=r["label"], answer=a)
        for r, a in zip(rows, answers, strict=True)
    ]
    jobs = [(prompt, number) for prompt in prompts for number in range(runs)]
    grades = ask_all(lambda job: grade_mmvet(*job, ask), jobs, workers)
    return [grades[i * runs : (i + 1) * runs] for i in range(len(rows))]


# ----------------------------------------------------------------------------------------------------- RefoMB

REFOMB_PROMPT = """Two models answered a question about an image. Judge them by the description of the image, which is complete.
Trustworthiness comes first: count in each answer the claims that conflict with the description or are not in it (creative tasks may
invent). Then helpfulness: how well the answer serves the user.

Description: {description}
Question: {question}
Answer of model A: {reference}
Answer of model B: {answer}

List each answer's hallucinations, compare helpfulness, and end with [[A]] if model A is better, [[B]] if model B is better, [[C]] if
they are equally good."""

REFOMB_TRUST_PROMPT = """This review compares two answers, of model A and model B. Say, from the review alone, which answer has fewer
hallucinations. End with [[A]], [[B]], or [[C]] if both have equally many.

Review: {review}"""


def refomb_verdict(reply: str) -> str | None:
    """A, B or C: the first [[X]] of the reply."""
    found = re.search(r"\[\[(A|B|C)\]\]", reply)
    return found.group(1) if found else None


def verdict_of(prompt: str, ask: Ask, attempts: int = 5) -> tuple[str, str]:
    """Verdict and reply; asks again until a reply holds a verdict, and gives up with an error as the official loop never does."""
    for attempt in range(attempts):
        reply = ask(prompt, temperature=0.0 if attempt == 0 else 0.5, sample=attempt)
        verdict = refomb_verdict(reply)
        if verdict is not None:
            return verdict, reply
    raise InputError(f"the judge gave no [[A]], [[B]] or [[C]] in {attempts} replies; use a stronger --judge_model")


def score_refomb(
    rows: list[Row], answers: list[str], overall: list[tuple[str, str]], trust: list[tuple[str, str]]
) -> tuple[Scores, list[dict]]:
    """Win rates against the reference answers, (wins + ties / 2) / n: overall, trustworthiness, and overall per type.

    RLHF-V/RLAIF-V eval_RefoMB_p0.py, eval_hallucination.py, json_to_excel.py: the model is B, [[B]] is a win.
    """
    points = {"A": 0.0, "B": 1.0, "C": 0.5}
    cells: dict[str, list[float]] = defaultdict(list)
    details = []
    for row, answer, (verdict, review), (fewer, _) in zip(rows, answers, overall, trust, strict=True):
        cells["win_rate"].append(points[verdict])
        cells["trustworthiness"].append(points[fewer])
        cells[f"type/{row['category']}"].append(points[verdict])
        details.append({"id": row["id"], "answer": answer, "correct": verdict != "A", "category": row["category"],
                        "parsed": f"{verdict} (fewer hallucinations: {fewer})", "review": review})  # fmt: skip
    counts = {
        name: sum(v == letter for v, _ in overall) for name, letter in (("win", "B"), ("tie", "C"), ("loss", "A"))
    }
    return {name: statistics.fmean(v) for name, v in cells.items()} | counts, details


def review_refomb(
    rows: list[Row], answers: list[str], references: list[str], ask: Ask, templates: tuple[str, str], workers: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """A review of each answer by the official prompt of RefoMB."""
    prompts = [
        fill(templates[0], description=r["description"], question=r["question"], reference=ref, answer=a)
        for r, a, ref in zip(rows, answers, references, strict=True)
    ]
    overall = ask_all(lambda p: verdict_of(p, ask), prompts, workers)
    trust = ask_all(lambda v: verdict_of(fill(templates[1], review=v[1]), ask), overall, workers)
    return overall, trust


def read_references(path: str | Path | None, rows: list[Row]) -> list[str]:
    """GPT-4V's answers: those of `path`, matched by image and question as officially, or the `answer` of the data file."""
    if path is None:
        if not all(r["reference"] for r in rows):
            raise InputError("RefoMB compares with reference answers: pass --reference gpt4v_RefoMB_dev.jsonl")
        return [str(r["reference"]) for r in rows]
    records = read_records(path)
    need(records, "image_url question answer", path)
    found = {(Path(r["image_url"]).name, r["question"]): r["answer"] for r in records}
    keys = [(Path(str(r["images"][0])).name, r["question"]) for r in rows]
    missing = next((k for k in keys if k not in found), None)
    if missing:
        raise InputError(f"{path} has no answer to {missing[1]!r} about {missing[0]}; use the file of the same split")
    return [found[k] for k in keys]


# --------------------------------------------------------------------------------------------- HallusionBench

HALLUSION_PROMPT = """Does the prediction answer the question in agreement with the reference? It may say more than the reference as long as
nothing contradicts it. Reply with one word: correct, incorrect, or unclear if the prediction takes no side.

Question: {question}
Reference: {gt_answer}
Prediction: {answer}"""


def hallusion_verdict(reply: str) -> int:
    """1 correct, 0 incorrect, 2 unclear."""
    text = reply.lower()
    return 0 if "incorrect" in text else 1 if "correct" in text else 2


def score_hallusion_judged(rows: list[Row], answers: list[str], replies: list[str]) -> tuple[Scores, list[dict]]:
    """aAcc, fAcc, qAcc of the judge's labels; the repository's aggregation (the official one) stands under repository/."""
    labels = [hallusion_verdict(reply) for reply in replies]
    details = [
        {"id": r["id"], "answer": a, "correct": c == 1, "category": f"{r['category']} {r['subcategory']}",
         "parsed": ("incorrect", "correct", "unclear")[c], "label": r["label"]}
        for r, a, c in zip(rows, answers, labels, strict=True)
    ]  # fmt: skip
    return hallusion_scores(rows, labels), details


# ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("mmhal", "mmvet", "refomb", "hallusion"))
    parser.add_argument("--num_run", type=int, default=1, help="MM-Vet: judge runs to average (the paper has 5)")
    parser.add_argument("--reference", help="RefoMB: GPT-4V's answers (gpt4v_RefoMB_dev.jsonl)")
    parser.add_argument("--trust_prompt", help="RefoMB: file with the second prompt; field {review}")
    add_judge_arguments(parser)
    args = parser.parse_args(argv)
    rows, answers, meta = load(args)
    judge = Judge.from_args(args)
    if args.task == "mmhal":
        template, prompt = judge_template(args, MMHAL_PROMPT, "question gt_answer answer")
        reviews = review_mmhal(rows, answers, judge.ask, template, args.judge_workers)
        scored = score_mmhal(rows, answers, reviews)
    elif args.task == "mmvet":
        template, prompt = judge_template(args, MMVET_PROMPT, "question gt_answer answer")
        grades = review_mmvet(rows, answers, judge.ask, template, args.num_run, args.judge_workers)
        scored = score_mmvet(rows, answers, grades)
    elif args.task == "refomb":
        template, prompt = judge_template(args, REFOMB_PROMPT, "description question reference answer")
        trust = read_text(args.trust_prompt) if args.trust_prompt else REFOMB_TRUST_PROMPT
        references = read_references(args.reference, rows)
        scored = score_refomb(
            rows, answers, *review_refomb(rows, answers, references, judge.ask, (template, trust), args.judge_workers)
        )
    else:
        template, prompt = judge_template(args, HALLUSION_PROMPT, "question gt_answer answer")
        prompts = [
            fill(template, question=r["question"], gt_answer=r.get("details") or r["label"], answer=a)
            for r, a in zip(rows, answers, strict=True)
        ]
        scored = score_hallusion_judged(rows, answers, ask_all(judge.ask, prompts, args.judge_workers))
    name = "hallusion_judged" if args.task == "hallusion" else args.task
    save(args, name, *scored, meta, judge.describe() | prompt)


if __name__ == "__main__":
    run(main)
