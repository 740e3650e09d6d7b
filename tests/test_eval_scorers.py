"""Every scorer prints the official number: fake answers with all awkward forms, expected numbers from the official code."""

import json
import random
from pathlib import Path

import pytest

from eval import choice, data, yesno
from eval.data import DataError, read_answers, read_task

GOLDENS = Path(__file__).parent / "goldens" / "eval"


def golden(benchmark: str, name: str = "expected.json"):
    return json.loads((GOLDENS / benchmark / name).read_text(encoding="utf-8"))


def load(task: str, folder: str, file: str, answers: str):
    rows = read_task(task, GOLDENS / folder / file)
    return rows, read_answers(GOLDENS / folder / answers, rows)


def assert_scores(scores: dict, expected: dict, prefix: str = "", digits: int | None = None) -> None:
    for name, value in expected.items():
        got = scores[f"{prefix}{name}"]
        assert (got if digits is None else round(got, digits)) == pytest.approx(value, abs=1e-12), f"{prefix}{name}"


# ------------------------------------------------------------------------------------------------- yes / no


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_is_official(split):
    rows, answers = load("pope", "pope", f"coco_pope_{split}.json", f"answers_{split}.jsonl")
    scores, details = yesno.score_pope(rows, answers)
    assert [d["parsed"] for d in details] == golden("pope")["parsed"][split]
    assert_scores(scores, golden("pope")["metrics"][split], f"{split}/")


def test_pope_folder_is_all_splits_and_their_mean():
    rows = read_task("pope", GOLDENS / "pope")
    answers = {}
    for split in ("random", "popular", "adversarial"):
        part, texts = load("pope", "pope", f"coco_pope_{split}.json", f"answers_{split}.jsonl")
        answers.update({r["id"]: t for r, t in zip(part, texts, strict=True)})
    scores, _ = yesno.score_pope(rows, [answers[r["id"]] for r in rows])
    metrics = golden("pope")["metrics"]
    assert scores["mean/f1"] == pytest.approx(sum(m["f1"] for m in metrics.values()) / 3)
    all_no, _ = yesno.score_pope(rows, ["No"] * len(rows))
    assert all_no["mean/yes_ratio"] == 0  # a share of predictions, not of labels
    all_right, _ = yesno.score_pope(rows, [r["label"] for r in rows])
    assert all_right["mean/f1"] == 1


def test_mme_is_official():
    rows, answers = load("mme", "mme", "MME.tsv", "predictions.jsonl")
    scores, details = yesno.score_mme(rows, answers)
    expected = golden("mme")
    assert [d["parsed"] for d in details] == expected["parsed"]
    assert_scores(scores, expected["metrics"])
    assert_scores(scores, {f"{task}/score": v for task, v in expected["task_score"].items()})
    for task, detail in expected["task_detail"].items():
        detail["other"] = detail.pop("other_num")
        assert_scores(scores, detail, f"{task}/")
    perfect, _ = yesno.score_mme(rows, [r["label"] for r in rows])
    assert (perfect["perception"], perfect["cognition"]) == (2000, 800)


def test_mme_refuses_an_image_without_its_second_question():
    rows, answers = load("mme", "mme", "MME.tsv", "predictions.jsonl")
    with pytest.raises(DataError, match=r"existence: image existence/0000.png has 1 questions"):
        yesno.score_mme(rows[1:], answers[1:])


def test_hallusionbench_rule_is_official():
    rows, answers = load("hallusion", "hallusion", "HallusionBench.tsv", "predictions.jsonl")
    scores, details = yesno.score_hallusion(rows, answers)
    expected = golden("hallusion")
    assert {d["id"]: d["parsed"] for d in details} == expected["vlmevalkit"]["extracted"]
    for group, metrics in expected["vlmevalkit"]["metrics"].items():
        assert_scores(scores, metrics, "" if group == "Overall" else f"{group}/")


def test_hallusionbench_json_gives_both_aggregations():
    rows, answers = load("hallusion", "hallusion", "HallusionBench.json", "predictions.jsonl")
    scores, _ = yesno.score_hallusion(rows, answers)
    expected = golden("hallusion")
    assert_scores(scores, expected["vlmevalkit"]["metrics"]["Overall"])  # image rows only
    for group, metrics in expected["repository"]["metrics"].items():
        shares = {k: v for k, v in metrics.items() if not k.startswith("n_")}
        assert_scores(scores, shares, f"repository/{group}/", digits=4)


def test_amber_discriminative_is_official():
    rows, answers = load("amber", "amber", "query_all.json", "responses.json")
    truth = yesno.read_amber_truth(GOLDENS / "amber/annotations.json", rows)
    scores, _ = yesno.score_amber_discriminative(rows, answers, truth)
    metrics = golden("amber")["metrics"]
    for official, ours in {"Descriminative Task": "", "Exsitence": "existence/"}.items():
        assert_scores(scores, {k.lower(): v for k, v in metrics[official].items()}, ours)
    for kind in ("Attribute", "State", "Number", "Action", "Relation"):
        assert_scores(scores, {k.lower(): v for k, v in metrics[kind].items()}, f"{kind.lower()}/")


# ------------------------------------------------------------------------------------------- multiple choice


def test_mmbench_circular_is_official():
    rows, answers = load("mmbench", "mmbench", "MMBench_DEV_EN.tsv", "predictions.jsonl")
    scores, details = choice.score_mmbench(rows, answers)
    expected = golden("mmbench")
    assert {d["id"]: d["parsed"] for d in details} == expected["inferred"]
    for split, metrics in expected["metrics"].items():
        assert_scores(scores, metrics, f"{split}/")
        assert_scores(scores, expected["vanilla"][f"vanilla_0_{split}"], f"vanilla/{split}/")


def test_mmbench_one_wrong_rotation_loses_the_question_and_order_does_not_matter():
    rows = read_task("mmbench", GOLDENS / "mmbench/MMBench_DEV_EN.tsv")
    answers = [r["label"] for r in rows]
    assert choice.score_mmbench(rows, answers)[0]["dev/Overall"] == 1
    dev = [i for i, r in enumerate(rows) if r["split"] == "dev"]
    answers[dev[1]] = "none"
    scores, _ = choice.score_mmbench(rows, answers)
    groups = len({int(rows[i]["id"]) % 1_000_000 for i in dev})
    assert scores["dev/Overall"] == pytest.approx(1 - 1 / groups)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    assert choice.score_mmbench([rows[i] for i in order], [answers[i] for i in order])[0] == scores


def test_seed_letter_is_official():
    rows = data._seed(GOLDENS / "seed/SEED-Bench.json", None, video=True)
    answers = read_answers(GOLDENS / "seed/predictions.jsonl", rows)
    scores, details = choice.score_seed(rows, answers)
    expected = golden("seed")["generate"]
    assert {d["id"]: d["parsed"] for d in details} == expected["vlmevalkit"]["inferred"]
    vlmevalkit = expected["vlmevalkit"]["metrics"]
    vlmevalkit["overall"] = vlmevalkit.pop("Overall")
    assert_scores(scores, vlmevalkit)
    official = expected["letter_equal"]["metrics"]
    official["total"] = official.pop("Total")
    assert_scores(scores, official, "official/")


def test_seed_likelihood_is_official():
    every = data._seed(GOLDENS / "seed/SEED-Bench.json", None, video=True)
    image = read_task("seed", GOLDENS / "seed/SEED-Bench.json")
    names = {str(r["type_id"]): r["category"] for r in every}
    subsets = {"all": every, "image": image, "5": [r for r in every if r["type_id"] == 5]}
    for task, rows in subsets.items():
        losses = choice.read_losses(GOLDENS / "seed/choice_losses.jsonl", rows)
        scores, details = choice.score_seed_likelihood(rows, losses)
        expected = golden("seed")["ppl"]
        assert_scores(scores, {names[t]: v for t, v in expected["metrics"][task]["per_type"].items()})
        assert scores["total"] == expected["metrics"][task]["total"]
        assert all(d["parsed"] == expected["predictions"][d["id"]] for d in details)


def test_mmmu_is_official():
    rows, answers = load("mmmu", "mmmu", "validation-00000-of-00001.parquet", "responses.jsonl")
    scores, details = choice.score_mmmu(rows, answers)
    expected, truth = golden("mmmu"), golden("mmmu", "answer_dict_val.json")
    for row, detail in zip(rows, details, strict=True):
        parsed = expected["parsed"][row["id"]]
        assert row["label"] == truth[row["id"]]["ground_truth"]
        assert detail["correct"] == (expected["judge"][row["id"]] == "Correct")
        if isinstance(parsed, str):
            assert detail["parsed"] == parsed
        else:
            assert sorted(map(str, detail["parsed"])) == sorted(map(str, parsed))
    assert_scores(scores, {f"subject/{k}": v["acc"] for k, v in expected["per_subject_exact"].items()})
    for name, value in expected["metrics"].items():
        ours = "overall" if name == "Overall" else name.replace("Overall-", "domain/")
        assert round(scores.get(ours, scores.get(f"subject/{ours}")), 3) == value["acc"]
