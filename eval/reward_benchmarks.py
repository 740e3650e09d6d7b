"""Reward benchmarks: VL-RewardBench, Multimodal RewardBench, MM-RLHF-RewardBench. Run by `python -m eval.reward`."""

import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from common.errors import InputError
from common.flags import FlagParser
from eval.answer_files import match, read_answer_records
from eval.benchmark_files import Row, read_task, vlrewardbench_key
from eval.files import need, read_any, read_records
from eval.flags import add_data_flags, add_model_flags, add_switch
from eval.results import Scores, meta_path, save, sha256
from eval.score import write_scores

Pair = tuple[float, float]

# --------------------------------------------------------------------------------------------- VL-RewardBench

# cal.py goes by the folder of an image; ids show the same source
_HALLUCINATION, _REASONING = ("RLAIF", "RLHF", "hallucination"), ("mathverse", "mmmu")
_BETTER = re.compile(
    r"(?:Overall Judgment|Therefore)\s*.*\s*-*\s*Answer\s*(\d+)\s*is\s*(?:the\s*)?(?:slightly\s*)?better", re.IGNORECASE
)


def vlrewardbench_group(row_id: str) -> str:
    """general, hallucination or reasoning: the id up to its first _ or -."""
    source = re.split(r"[_-]", row_id)[0]
    return "hallucination" if source in _HALLUCINATION else "reasoning" if source in _REASONING else "general"


def score_vlrewardbench(rows: list[Row], pairs: list[Pair]) -> tuple[Scores, list[dict]]:
    """Percent with two decimals; right = the preferred response has the strictly larger score, a tie is wrong."""
    verdicts = [
        "agree" if p[int(r["better"])] > p[1 - int(r["better"])] else "reject" for r, p in zip(rows, pairs, strict=True)
    ]
    details = [_detail(r, p, v == "agree", vlrewardbench_group(str(r["id"])))
               for r, p, v in zip(rows, pairs, verdicts, strict=True)]  # fmt: skip
    return _vlrewardbench(rows, verdicts), details


def vlrewardbench_vote(reply: str, swapped: bool, better: int) -> str:
    """agree, reject or doesntMatch. `swapped`: the two answers were shown in reverse order."""
    found = _BETTER.search(reply.replace("\n", "").replace("*", ""))
    if not found:
        return "doesntMatch"
    rejected = 1 + (better if swapped else 1 - better)  # its number as shown
    return "reject" if int(found.group(1)) == rejected else "agree"


def score_vlrewardbench_votes(
    rows: list[Row], replies: list[dict], votes: int | None = None
) -> tuple[Scores, list[dict]]:
    """Generative judge: a question counts as agree or reject with more than half of its votes, unparsed ones included.

    Args: `replies` of {id, random_number (1 = shown swapped), reply}, and query and response where ids repeat in the data;
        `votes` keeps that many per question, drawn as cal.py does (seed 1234). Questions without a majority for agree or
        reject leave all percentages.
    """
    better = {str(r["id"]): int(r["better"]) for r in rows}
    if votes:
        replies = list(replies)
        draw = random.Random(1234)
        for i in range(len(replies)):
            j = draw.randint(0, len(replies) - 1)
            replies[i], replies[j] = replies[j], replies[i]
    counts: dict[str, list[str]] = {str(r["id"]): [] for r in rows}
    known = _vlrewardbench_names(rows)
    for reply in replies:
        name = known.get(_vlrewardbench_reply_key(reply))
        if name is None:
            raise InputError(
                f"the replies hold the id '{reply['id']}', which is not in the data, or there more than once"
            )
        if votes is None or len(counts[name]) < votes:
            counts[name].append(vlrewardbench_vote(reply["reply"], bool(reply["random_number"]), better[name]))
    verdicts = []
    for row in rows:
        cast = counts[str(row["id"])]
        majority = (v for v in ("agree", "reject", "doesntMatch") if cast.count(v) > len(cast) / 2)
        verdicts.append(next(majority, "other"))
    details = [{"id": r["id"], "answer": v, "correct": v == "agree", "parsed": v,
                "category": vlrewardbench_group(str(r["id"]))} for r, v in zip(rows, verdicts, strict=True)]  # fmt: skip
    return _vlrewardbench(rows, verdicts), details


def _vlrewardbench_names(rows: list[Row]) -> dict[object, str]:
    """Row id by the full key of a question, and by its public id where that is there once."""
    public = Counter(r.get("public_id", r["id"]) for r in rows)
    names: dict[object, str] = {
        r.get("public_id", r["id"]): str(r["id"]) for r in rows if public[r.get("public_id", r["id"])] == 1
    }
    full = {
        (r.get("public_id", r["id"]), r["question"], *sorted(r["responses"])): str(r["id"])
        for r in rows
        if "responses" in r
    }
    return names | full


def _vlrewardbench_reply_key(reply: dict) -> object:
    if "query" in reply and "response" in reply:
        return vlrewardbench_key(reply)
    return str(reply["id"])


def _vlrewardbench(rows: list[Row], verdicts: list[str]) -> Scores:
    groups: dict[str, list[bool]] = {"general": [], "hallucination": [], "reasoning": []}
    for row, verdict in zip(rows, verdicts, strict=True):
        if verdict in ("agree", "reject"):
            groups[vlrewardbench_group(str(row["id"]))].append(verdict == "agree")
    shares = {name: sum(v) / len(v) if v else 0.0 for name, v in groups.items()}
    pooled = [right for v in groups.values() for right in v]
    shares |= {"overall": sum(pooled) / max(1, len(pooled)), "macro": sum(shares.values()) / 3}
    return {name: round(100 * share, 2) for name, share in shares.items()}


# ------------------------------------------------------------------------------------ Multimodal RewardBench


def score_mmrb(rows: list[Row], pairs: list[Pair]) -> tuple[Scores, list[dict]]:
    """Accuracy (fraction) over all and per category; A if the first score is strictly larger, else B."""
    return _mmrb(rows, ["A" if a > b else "B" for a, b in pairs], [f"{a:.4f} / {b:.4f}" for a, b in pairs])


def score_mmrb_replies(
    rows: list[Row], replies: list[str], order: list[int] | None = None
) -> tuple[Scores, list[dict]]:
    """Generative judge: [[A]] anywhere is A, else [[B]] is B, else a coin (random.seed(123), in the order of the replies' file).

    Args: `order`: the rows in the order of the file; default: the order of the data.
    """
    coin = random.Random(123)
    verdicts = [""] * len(rows)
    for n in range(len(rows)) if order is None else order:
        shown = next((v for v in "AB" if f"[[{v}]]" in replies[n]), None)
        verdicts[n] = shown or ("A" if coin.random() < 0.5 else "B")
    return _mmrb(rows, verdicts, replies)


def _mmrb(rows: list[Row], verdicts: list[str], shown: list[str]) -> tuple[Scores, list[dict]]:
    """facebookresearch/multimodal_rewardbench 2_get_accuracy.py: safety and reasoning are reported by their parts."""
    cells: dict[str, list[bool]] = defaultdict(list)
    details = []
    for row, verdict, text in zip(rows, verdicts, shown, strict=True):
        category, name = str(row["category"]), str(row["id"]).lower()
        if category == "safety":
            category = "safety/bias" if name.startswith("pairs") else "safety/toxicity"
        elif category == "reasoning":
            category = "reasoning/math" if name.startswith("math") else "reasoning/coding"
        right = verdict == "AB"[int(row["better"])]
        cells["all"].append(right)
        cells[category].append(right)
        details.append({"id": row["id"], "answer": text, "correct": right, "parsed": verdict, "category": category})
    return {name: sum(v) / len(v) for name, v in cells.items()}, details


# --------------------------------------------------------------------------------------- MM-RLHF-RewardBench

MMRLHF_CATEGORIES = ("mcq", "long", "short", "safety", "video")


def score_mmrlhf(rows: list[Row], pairs: list[Pair]) -> tuple[Scores, list[dict]]:
    """accuracy = chosen strictly above rejected; acc_plus = ids all of whose pairs are right; fractions.

    Kwai-YuanQi/MM-RLHF cal_performance_mmreweard_bench.py. A pair's category is the first keyword in its image's or video's
    path; pairs without one count in the overall numbers only. Of an id all pairs must be right, whatever their category: then
    it counts for the first keyword that any of its paths holds. The divisor of a category are the ids with the keyword in any
    path, whether it is the first one there or not.
    """
    cells: dict[str, list[bool]] = defaultdict(list)
    groups: dict[str, list[tuple[str, bool]]] = defaultdict(list)  # id -> (path, right) of its pairs
    details = []
    for row, (chosen, rejected) in zip(rows, pairs, strict=True):
        source, right = str(row["source"]), chosen > rejected
        category = next((c for c in MMRLHF_CATEGORIES if c in source), None)
        for name in ["overall"] + ([category] if category else []):
            cells[name].append(right)
        groups[str(row["group"])].append((source, right))
        details.append(_detail(row, (chosen, rejected), right, category or "other"))
    whole = [[source for source, _ in members] for members in groups.values() if all(right for _, right in members)]
    first = Counter(next((c for c in MMRLHF_CATEGORIES if any(c in s for s in sources)), None) for sources in whole)
    scores: Scores = {}
    for name, rights in cells.items():
        with_keyword = [g for g in groups.values() if name == "overall" or any(name in source for source, _ in g)]
        scores[f"{name}/accuracy"] = sum(rights) / len(rights)
        scores[f"{name}/acc_plus"] = (len(whole) if name == "overall" else first[name]) / len(with_keyword)
    return scores, details


SCORERS = {"vlrewardbench": score_vlrewardbench, "mmrb": score_mmrb, "mmrlhf": score_mmrlhf}


def read_scores(path: str | Path, rows: list[Row]) -> list[Pair]:
    """One pair of scores per row, in the order of the two responses: rows {id | ID | line, scores | rewards}.

    Rows without such a column, or whose ids repeat, are matched in their order if the questions agree.
    """
    out = []
    for row, record in zip(rows, match(read_answer_records(path), rows, path), strict=True):
        values = record.get("scores", record.get("rewards"))
        if not isinstance(values, list) or len(values) != 2:
            raise InputError(f"{path} has no two scores for '{row['id']}'; run the command again without --scores")
        if any(isinstance(v, bool) or not isinstance(v, int | float) or math.isnan(v) for v in values):
            raise InputError(f"{path}: the scores of '{row['id']}' are {values}, two numbers are expected")
        out.append((float(values[0]), float(values[1])))
    return out


def read_judge_replies(path: str | Path, rows: list[Row]) -> tuple[list[str], list[int]]:
    """The judge's reply to every row {ID | id, output | reply}, and the rows in the order of the file."""
    records = read_answer_records(path)
    matched = match(records, rows, path)
    replies = [record.get("output", record.get("reply")) for record in matched]
    missing = next((row["id"] for row, reply in zip(rows, replies, strict=True) if not isinstance(reply, str)), None)
    if missing is not None:
        raise InputError(f"{path} has no reply for '{missing}': a text named output or reply is expected")
    place = {id(record): n for n, record in enumerate(records)}
    return replies, sorted(range(len(rows)), key=lambda n: place[id(matched[n])])


def _detail(row: Row, pair: Pair, right: bool, category: str) -> dict:
    first, second = (f"{score:.4f}: {text}" for score, text in zip(pair, row["responses"], strict=True))
    return {
        "id": row["id"],
        "answer": f"{first}\n\n{second}",
        "correct": right,
        "parsed": list(pair),
        "category": category,
    }


# ------------------------------------------------------------------------------------------------------------


def main(argv: list[str], description: str | None = None) -> None:
    """Score one benchmark, with a model or from a file of scores or replies."""
    parser = FlagParser(description=description)
    parser.add_argument("--task", required=True, choices=list(SCORERS))
    add_data_flags(parser)
    parser.add_argument("--limit", type=int, help="the first N rows only; marked in every table")
    parser.add_argument(
        "--output", help="folder of results.json; default: beside --scores or --replies, else --model_name_or_path"
    )
    parser.add_argument("--scores", help="score this file {id, scores: [a, b]} instead of running a model")
    parser.add_argument("--replies", help="score a generative judge's replies instead (vlrewardbench, mmrb)")
    parser.add_argument("--votes", type=int, help="vlrewardbench --replies: votes per id (default: all)")
    parser.add_argument("--results_db", help="also append the scores here: any SQLAlchemy URL")
    model = parser.add_argument_group("model")
    add_model_flags(model, required=False)
    add_switch(model, "--implicit", help="DPO's implicit reward of a policy, in place of a reward model's")
    model.add_argument("--ref", help="--implicit: reference checkpoint; default: the base under the adapter")
    model.add_argument("--beta", type=float, default=0.1, help="--implicit: scales the reward, moves no accuracy")
    model.add_argument("--batch_size", type=int, default=4, help="rows (pairs) per forward")
    add_switch(model, "--bf16", help="weights and activations in bfloat16 (default float32)")
    add_switch(model, "--skip_video", help="mmrlhf: leave the video rows out (recorded)")
    args = parser.parse_args(argv)
    source = args.scores or args.replies
    if bool(source) == bool(args.model_name_or_path) or (args.scores and args.replies):
        raise InputError("pass exactly one of --model_name_or_path, --scores and --replies")
    if not source:
        source = str(Path(args.output or args.model_name_or_path) / f"scores_{args.task}.jsonl")
        write_scores(args, source)
    meta = read_any(meta_path(source)) if meta_path(source).exists() else {}
    if meta and meta["data_sha256"] != sha256(args.data_path):
        raise InputError(
            f"{source} was computed from another {Path(args.data_path).name}; pass --data_path {meta['data']}"
        )
    rows = read_task(
        args.task, args.data_path, args.image_root or meta.get("image_dir"), args.limit or meta.get("limit")
    )
    if (meta.get("generation") or {}).get("skip_video"):
        rows = [r for r in rows if r["images"] or not r.get("video")]
    args.answers = source
    if not args.replies:
        return save(args, args.task, *SCORERS[args.task](rows, read_scores(source, rows)), meta)
    if args.task == "vlrewardbench":
        replies = read_records(source)
        need(replies, "id random_number reply", source)
        scored = score_vlrewardbench_votes(rows, replies, args.votes)
    elif args.task == "mmrb":
        scored = score_mmrb_replies(rows, *read_judge_replies(source, rows))
    else:
        raise InputError("MM-RLHF-RewardBench takes scores, not replies")
    save(args, f"{args.task}_generative", *scored, meta)
