"""Every scorer gives the official number: awkward made-up answers, expected numbers from the official code."""

import json
import random
from pathlib import Path

import pytest

from common.errors import InputError
from eval import benchmark_files, chair, choice, judged, mathvista, reward_benchmarks, yesno
from eval.answer_files import read_answers
from eval.benchmark_files import read_task
from eval.files import read_records

GOLDENS = Path(__file__).parent / "goldens" / "eval"


def golden(benchmark: str, name: str = "expected.json"):
    return json.loads((GOLDENS / benchmark / name).read_text(encoding="utf-8"))


def load(task: str, folder: str, file: str, answers: str):
    rows = read_task(task, GOLDENS / folder / file)
    return rows, read_answers(GOLDENS / folder / answers, rows)


def assert_scores(scores: dict, expected: dict, prefix: str = "", digits: int | None = None) -> None:
    for name, value in expected.items():
        got = scores[f"{prefix}{name}"]
        assert (got if digits is None else round(got, digits)) == pytest.approx(value, abs=1e-9), f"{prefix}{name}"


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
    with pytest.raises(InputError, match=r"existence: image existence/0000.png has 1 questions"):
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


def test_amber_existence_has_its_own_epsilon():
    """P = 100.0 and R = 50.0: 1 / 1.501 is 66.6, with the 0.0001 of the other kinds it would be 66.7."""
    answers = ["No"] * 500 + ["Yes"] * 500
    rows = [{"id": str(i)} for i in range(1000)]
    for kind, f1 in (("hallucination", 66.6), ("relation", 66.7)):
        truth = [{"type": f"discriminative-{kind}", "truth": "no"}] * 1000
        scores, _ = yesno.score_amber_discriminative(rows, answers, truth)
        group = "existence" if kind == "hallucination" else kind
        assert [scores[f"{group}/{k}"] for k in ("precision", "recall", "f1")] == [100.0, 50.0, f1]


# ------------------------------------------------------------------------------------------- multiple choice


def test_letter_must_stand_among_the_last_four_words():
    choices = {"A": "a red square", "B": "a blue circle"}
    assert choice.infer_letter("B see there now", choices) == "B"
    assert choice.infer_letter("B I see there now", choices) is None
    assert choice.infer_letter("A or B", choices) is None


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
    rows = benchmark_files._seed(GOLDENS / "seed/SEED-Bench.json", None, video=True)
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
    every = benchmark_files._seed(GOLDENS / "seed/SEED-Bench.json", None, video=True)
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


# ------------------------------------------------------------------------------------------ objects in free text


def recorded_words(benchmark: str, file: str, singular: str):
    """Recorded outputs of the language tools, in place of nltk and pattern."""
    record = golden(benchmark, file)
    return lambda text: (record["tokens"][text], [record[singular][w] for w in record["tokens"][text]])


def test_chair_is_official():
    rows = [
        {"id": str(r["image_id"]), "image_id": r["image_id"]} for r in read_records(GOLDENS / "chair/captions.jsonl")
    ]
    answers = read_answers(GOLDENS / "chair/captions.jsonl", rows)
    words_of = recorded_words("chair", "nltk_pattern_outputs.json", "singular")
    table = chair.ObjectTable(GOLDENS / "chair/synonyms.txt", all_pairs=False)
    truth = chair.coco_truth(GOLDENS / "chair/annotations", {r["image_id"] for r in rows}, table, words_of)
    scores, details = chair.score_chair(rows, answers, truth, chair.rule_mentions(table, words_of))
    expected = golden("chair")
    assert scores == pytest.approx(expected["metrics"], abs=1e-12)
    for detail, sentence in zip(details, expected["sentences"], strict=True):
        assert detail["truth"] == sentence["gt"]
        assert [node for _, node in detail["objects"]] == sentence["generated"]
        assert detail["hallucinated"] == sentence["hallucinated"]
    assert details[0]["marks"] == ["bikes", "table", "wine glasses"]  # as written, for the report page


@pytest.fixture(scope="module")
def objhal():
    rows, answers = load("objhal", "objhal", "obj_halbench.jsonl", "answers.jsonl")
    words_of = recorded_words("objhal", "nltk_outputs.json", "lemmas")
    table = chair.ObjectTable(GOLDENS / "objhal/synonyms.txt", all_pairs=True)
    truth = chair.coco_truth(GOLDENS / "objhal/annotations", {r["image_id"] for r in rows}, table, words_of)
    return rows, answers, truth, table, words_of


@pytest.mark.parametrize("mode", ["rule", "judged"])
def test_object_halbench_is_official(objhal, mode):
    rows, answers, truth, table, words_of = objhal
    find = chair.rule_mentions(table, words_of)
    if mode == "judged":
        tags = golden("objhal", "spacy_tokens.json")
        queue = iter(read_records(GOLDENS / "objhal/judge_replies.jsonl"))

        def find(answer: str):
            replies = next(queue)["replies"]  # of this row, in the order asked
            return chair.judged_mentions(table, lambda prompt, sample: replies[sample], tags.__getitem__)(answer)

    scores, details = chair.score_objhal(rows, answers, truth, find)
    expected = golden("objhal")[mode]
    assert_scores(scores, expected["metrics"])
    for detail, sentence in zip(details, expected["sentences"], strict=True):
        assert (detail["truth"], detail["objects"]) == (sentence["gt"], sentence["generated"])
        assert [word for word, _ in detail["hallucinated"]] == [word for word, _ in sentence["hallucinated"]]


def test_object_halbench_judge_without_a_list_is_an_error(objhal):
    find = chair.judged_mentions(objhal[3], lambda prompt, sample: "I see a dog.", lambda text: [])
    with pytest.raises(InputError, match="no JSON list of objects in 5 replies"):
        find("There is a dog and a cat here.")
    assert find("A dog.") == []  # three words at most: the judge is not asked


@pytest.fixture(scope="module")
def amber():
    rows, answers = load("amber", "amber", "query_all.json", "responses.json")
    truth = yesno.read_amber_truth(GOLDENS / "amber/annotations.json", rows)
    record, similar = golden("amber", "nltk_outputs.json"), golden("amber", "similarity.json")["pairs"]
    tags = {a: record["tagged"][r["id"]] for r, a in zip(rows, answers, strict=True) if r["id"] in record["tagged"]}

    def score(rows, answers, truth):
        return chair.score_amber_generative(
            rows,
            answers,
            truth,
            golden("amber", "relation.json"),
            (GOLDENS / "amber/safe_words.txt").read_text().split("\n"),
            lambda text: chair.amber_nouns(text, tags.__getitem__, record["lemmas"].__getitem__),
            lambda a, b: 1.0 if a == b else similar.get(f"{a}|{b}", similar.get(f"{b}|{a}", 0.0)),
        )

    return rows, answers, truth, score


def test_amber_generative_is_official(amber):
    rows, answers, truth, score = amber
    expected = golden("amber")
    assert score(rows, answers, truth)[0] == expected["metrics"]["Generative Task"]
    for row, answer, note in zip(rows, answers, truth, strict=True):
        if note["type"] == "generative":
            assert score([row], [answer], [note])[0] == expected["generative_row_alone"][row["id"]]


# -------------------------------------------------------------------------------------------- judged benchmarks


@pytest.mark.parametrize("name", list(golden("mathvista")["runs"]))
def test_mathvista_is_official(name):
    rows, answers = load("mathvista", "mathvista", "testmini.json", "responses.json")
    canned = golden("mathvista", "llm_extractions.json") if "canned" in name else {}
    asked = []

    def ask(row, answer):
        asked.append(row["id"])
        return canned.get(row["id"], "")

    scores, details = mathvista.score_mathvista(
        rows, answers, ask, quick="quick" in name, ignore_empty="ignore" in name
    )
    expected = golden("mathvista")["runs"][name]
    assert asked == expected["llm_asked"]
    assert {d["id"]: [d["extraction"], d["parsed"], d["correct"]] for d in details} == expected["items"]
    assert scores["average"] == expected["scores"].pop("average")["accuracy"]
    for kind, values in expected["scores"].items():
        assert_scores(scores, {f"{kind}/{k}": v["accuracy"] for k, v in values.items()})


def test_mmhal_is_official():
    rows, answers = load("mmhal", "mmhal", "mmhal-bench_answer_template.json", "answers.jsonl")
    reviews = [r["review"] for r in read_records(GOLDENS / "mmhal/judge_replies.jsonl")]
    scores, details = judged.score_mmhal(rows, answers, reviews)
    expected = golden("mmhal")
    assert [d["parsed"] for d in details] == expected["scores"]
    per_type = expected["metrics"].pop("per_type")
    assert_scores(scores, expected["metrics"] | {f"type_{t}": v for t, v in enumerate(per_type)})
    with pytest.raises(InputError, match="96 rows in a fixed order, 95"):
        judged.score_mmhal(rows[:-1], answers[:-1], reviews[:-1])


@pytest.mark.parametrize("runs", [1, 5])
def test_mmvet_is_official(runs):
    rows, answers = load("mmvet", "mmvet", "mm-vet.json", "answers.json")
    replies = golden("mmvet", "judge_replies.json")

    def grade(row, number):
        queue = iter(replies[row["id"]][number])
        return judged.grade_mmvet("prompt", number, lambda prompt, temperature, sample: next(queue))

    scores, _ = judged.score_mmvet(rows, answers, [[grade(r, n) for n in range(runs)] for r in rows])
    expected = golden("mmvet")[f"num_run_{runs}"]
    assert_scores(scores, expected["capability"] | {"std": expected["std"]})
    expected["capability_set"].pop("total")
    assert_scores(scores, expected["capability_set"], "set/")


def test_refomb_counts_wins_and_half_ties():
    rows = [{"id": str(i), "category": "OCR" if i else "Coarse"} for i in range(4)]
    overall = [(judged.refomb_verdict(r), r) for r in ("[[B]]", "so [[A]], not [[B]]", "[[C]]", "x [[C]]")]
    scores, details = judged.score_refomb(rows, ["a"] * 4, overall, [("B", ""), ("B", ""), ("C", ""), ("A", "")])
    assert scores == {
        "win_rate": 0.5, "trustworthiness": 0.625, "type/Coarse": 1.0, "type/OCR": pytest.approx(1 / 3),
        "win": 1, "tie": 2, "loss": 1,
    }  # fmt: skip
    assert [d["correct"] for d in details] == [True, False, True, True]
    assert judged.refomb_verdict("[A] is better") is None


def test_hallusionbench_judged_uses_the_same_aggregation():
    rows, answers = load("hallusion", "hallusion", "HallusionBench.json", "predictions.jsonl")
    words = {0: "This is Incorrect.", 1: "Correct", 2: "unclear"}
    replies = [words[int(c)] for c in golden("hallusion")["repository"]["correctness"].values()]
    scores, _ = judged.score_hallusion_judged(rows, answers, replies)
    for group, metrics in golden("hallusion")["repository"]["metrics"].items():
        shares = {k: v for k, v in metrics.items() if not k.startswith("n_")}
        assert_scores(scores, shares, f"repository/{group}/", digits=4)


# -------------------------------------------------------------------------------------------- reward benchmarks


def test_vl_rewardbench_is_official():
    rows = read_task("vlrewardbench", GOLDENS / "vl_rewardbench/test-00000-of-00001.parquet")
    pairs = reward_benchmarks.read_scores(GOLDENS / "vl_rewardbench/scores.jsonl", rows)
    expected = golden("vl_rewardbench")
    scores, _ = reward_benchmarks.score_vlrewardbench(rows, pairs)
    assert scores == expected["scalar"]["metrics"]
    replies = read_records(GOLDENS / "vl_rewardbench/judge_replies.jsonl")
    votes, details = reward_benchmarks.score_vlrewardbench_votes(rows, replies)
    assert votes == expected["generative_k5"]["metrics"]
    assert {d["id"]: d["parsed"] for d in details} == expected["generative_k5"]["classify"]
    assert (
        reward_benchmarks.score_vlrewardbench_votes(rows, replies, votes=3)[0]
        == expected["generative_k3_shuffled"]["metrics"]
    )


def test_multimodal_rewardbench_is_official():
    rows = read_task("mmrb", GOLDENS / "multimodal_rewardbench/all_data.json")
    scores, _ = reward_benchmarks.score_mmrb(
        rows, reward_benchmarks.read_scores(GOLDENS / "multimodal_rewardbench/scores.jsonl", rows)
    )
    expected = golden("multimodal_rewardbench")
    assert scores == {k: pytest.approx(v["acc"]) for k, v in expected["scalar"]["metrics"].items()}
    replies = [r["output"] for r in read_records(GOLDENS / "multimodal_rewardbench/judge_replies.jsonl")]
    scores, _ = reward_benchmarks.score_mmrb_replies(rows, replies)
    assert scores == {k: pytest.approx(v["acc"]) for k, v in expected["judge"]["metrics"].items()}


def test_mm_rlhf_rewardbench_is_official():
    rows = read_task("mmrlhf", GOLDENS / "mmrlhf_rewardbench/mm_reward_bench.jsonl")
    pairs = reward_benchmarks.read_scores(GOLDENS / "mmrlhf_rewardbench/scores.jsonl", rows)
    scores, _ = reward_benchmarks.score_mmrlhf(rows, pairs)
    for name, metrics in golden("mmrlhf_rewardbench")["metrics"].items():
        assert_scores(scores, {k: v for k, v in metrics.items() if k != "total"}, f"{name}/")


def test_swapped_rewards_turn_the_accuracy_over_and_ties_are_wrong():
    rows = read_task("mmrlhf", GOLDENS / "mmrlhf_rewardbench/mm_reward_bench.jsonl")
    pairs = [(float(i % 3), 0.5) for i in range(len(rows))]
    accuracy = reward_benchmarks.score_mmrlhf(rows, pairs)[0]["overall/accuracy"]
    swapped = reward_benchmarks.score_mmrlhf(rows, [(b, a) for a, b in pairs])[0]["overall/accuracy"]
    assert accuracy + swapped == pytest.approx(1)
    for task, file in (("mmrlhf", "mmrlhf_rewardbench/mm_reward_bench.jsonl"),
                       ("vlrewardbench", "vl_rewardbench/test-00000-of-00001.parquet")):  # fmt: skip
        rows = read_task(task, GOLDENS / file)
        _, details = reward_benchmarks.SCORERS[task](rows, [(1.0, 1.0)] * len(rows))
        assert not any(d["correct"] for d in details)
