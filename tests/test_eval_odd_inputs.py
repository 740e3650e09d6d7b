"""Scorers on odd inputs. Expected values: what the official code does with them, worked out by hand from it."""

import json
import random
from pathlib import Path

import pytest

from common.errors import InputError
from eval import chair, choice, judged, reward_benchmarks
from eval.benchmark_files import read_task

GOLDENS = Path(__file__).parent / "goldens" / "eval"

# ------------------------------------------------------------------------------------------------------- letters

ANIMALS = {"A": "dog", "B": "cat", "C": "fish", "D": "bird"}
LETTERS = [
    ("The answer is\nB and not the others, as one can see in the picture", "B"),
    ("The correct  answer   is  C, as one can see in the picture here", "C"),
    ("The answer is ***B*** because of what one can see in this picture", "B"),
    ("Failed to obtain answer via API", None),
    ("Failed to obtain answer via API B", None),
    ("Failed to obtain answer via API: dog", "A"),  # the option's text still counts
    ("Cannot determine the answer", "Z"),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize("answer, letter", LETTERS)
def test_letters(answer: str, letter: str | None) -> None:
    long = {k: v + "." if k == "Z" else v for k, v in ANIMALS.items()}
    assert choice.infer_letter(answer, long | {"D": "bird" * 20}) == letter


def test_a_stated_letter_that_is_no_option_gives_way_to_the_text() -> None:
    assert (
        choice.infer_letter("The answer is dog", {"A": "dog", "B": "cat, a large one"}) == "A"
    )  # not D, which is no option
    assert choice.infer_letter("The answer is dog", ANIMALS) == "D"  # the first letter of dog, as officially


HEADER = "index\tquestion\tA\tB\tC\tD\tanswer\timage\tcategory\thint\n"


def table(tmp_path: Path, *rows: str) -> list[dict]:
    cell = (GOLDENS / "mme/MME.tsv").read_text().split("\n")[1].split("\t")[1]
    (tmp_path / "t.tsv").write_text(
        HEADER + "".join(f"{n}\tQ?\t{r.replace('IMAGE', cell)}\n" for n, r in enumerate(rows))
    )
    return read_task("mmbench", tmp_path / "t.tsv")


def test_cells_that_pandas_takes_for_empty_are_no_options(tmp_path: Path) -> None:
    rows = table(tmp_path, "dog\tNone\tNA\tcat\tA\tIMAGE\tx\tnan", "N/A\ttwo\tnone\t\tB\tIMAGE\tx\tlook")
    assert rows[0]["choices"] == {"A": "dog", "D": "cat"} and rows[1]["choices"] == {"B": "two", "C": "none"}
    assert rows[0]["question"] == "Question: Q?\nOptions:\nA. dog\nD. cat\n"
    assert rows[1]["question"].startswith("Hint: look\n")


def test_a_column_of_numbers_is_read_as_numbers(tmp_path: Path) -> None:
    rows = table(tmp_path, "1\t2\t3\tx\tA\tIMAGE\tx\t", "007\t2.50\t\ty\tA\tIMAGE\tx\t")
    assert [r["choices"] for r in rows] == [
        {"A": "1", "B": "2.0", "C": "3.0", "D": "x"},
        {"A": "7", "B": "2.5", "D": "y"},
    ]


def test_an_answer_that_is_an_empty_cell_there(tmp_path: Path) -> None:
    rows = table(tmp_path, "no\tof course\tyes\tx\tA\tIMAGE\tx\t")
    assert choice.score_mmbench(rows, ["no"])[0]["all/Overall"] == 1
    assert (
        choice.score_mmbench(rows, ["None"])[0]["all/Overall"] == 0
    )  # "no" stands in "none", but the cell is read as empty


# ------------------------------------------------------------------------------------------------- MMMU, SEEDBench

OPEN = [
    ("It is \n5", "5", True),  # nothing behind "is ": no key phrase, the whole answer counts
    ("The answer is \nso \nresult 7", "7", True),
    ("so is ", "is", True),
    ("final answer ", "5", False),
    ("x = ", "x", True),
    ("It is so \nIt is 3.5 m", "3.5", True),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold, right", OPEN)
def test_open_answers(answer: str, gold: str, right: bool) -> None:
    assert choice.mmmu_open_correct(gold, choice.mmmu_candidates(answer)) == right


NAN = float("nan")


@pytest.mark.parametrize(
    "losses, letter",
    [([NAN, 2.0, 1.0, 3.0], "C"), ([1.0, NAN, NAN, NAN], "A"), ([NAN] * 4, "A"), ([2.0, 1.0, 1.0, NAN], "B"),
     ([float("inf"), NAN, 9.0, float("inf")], "C")],
)  # fmt: skip
def test_losses_that_are_not_numbers_are_the_largest(losses: list[float], letter: str) -> None:
    row = {"id": "1", "category": "x", "label": "A", "choices": ANIMALS}
    assert choice.score_seed_likelihood([row], [losses])[1][0]["parsed"] == letter


@pytest.mark.parametrize("losses", [None, [1, 2, 3], [1, 2, None, 4], ["1", "2", "3", "4"], 5, [True] * 4])
def test_losses_of_another_shape_are_one_sentence(losses: object, tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(json.dumps({"id": "1", "losses": losses}) + "\n")
    with pytest.raises(InputError, match="has no four losses for '1'"):
        choice.read_losses(str(tmp_path / "l.jsonl"), [{"id": "1"}])


# -------------------------------------------------------------------------------------------- CHAIR, Object HalBench


def test_synonyms_keep_their_spaces_in_chair_only(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("  person, man , kid \ndog,puppy, cat\n\n")
    assert chair.ObjectTable(tmp_path / "s.txt", all_pairs=False).node == {
        "person": "person", "man ": "person", "kid": "person", "dog,puppy": "dog,puppy", "cat": "dog,puppy",
    }  # fmt: skip
    assert set(chair.ObjectTable(tmp_path / "s.txt", all_pairs=True).node) == {
        "person",
        "man",
        "kid",
        "dog,puppy",
        "cat",
    }


REPLIES = [
    ('Here they are:\n["dog", "cat"]', ["dog", "cat"]), ('Here they are:\n["dog"]\n\n', ["dog"]), (' ["dog"] ', ["dog"]),
    ('```json\n["dog"]\n```', ["dog"]), ("[]", []), ('Objects: ["dog"]', None), ("dog, cat", None), ("5", None),
    ('["dog"]\nThat is all.', None), ("null", None),
]  # fmt: skip


@pytest.mark.parametrize("reply, objects", REPLIES)
def test_lists_in_a_judge_s_reply(reply: str, objects: list[str] | None) -> None:
    assert chair._json_list(reply) == objects


def test_a_toilet_s_seat_is_no_chair_for_the_judge_either(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("toilet\nchair, seat\n")
    table = chair.ObjectTable(tmp_path / "s.txt", all_pairs=True)
    find = chair.judged_mentions(
        table, lambda *_, **__: '["toilet", "seat"]', lambda text: [(w, "NN") for w in text.split()[1:]]
    )
    assert [m.node for m in find("There is a toilet and a seat.")] == ["toilet"]


# -------------------------------------------------------------------------------------------------------- MM-Vet


def test_mmvet_adds_grade_after_grade_and_rounds_like_numpy() -> None:
    grades = [
        0.1,
        0.8,
        0.0,
        0.2,
        0.6,
        0.0,
        0.6,
        0.6,
    ]  # 2.9000000000000004 one after the other, 2.9 in one sum: 36.25 is a tie
    rows = [{"id": str(n), "capability": ["ocr", "rec"], "label": ""} for n in range(len(grades))]
    scores, _ = judged.score_mmvet(rows, [""] * len(rows), [[g] for g in grades])
    assert scores["total"] == scores["rec"] == 36.3
    half, _ = judged.score_mmvet(
        rows[:1], [""], [[0.5745]]
    )  # 57.45 lies above its decimal; numpy goes to the even digit
    assert half["total"] == 57.4 and half["ocr"] == half["set/ocr_rec"] == 57.4


# ------------------------------------------------------------------------------------------------ reward benchmarks


def test_acc_plus_by_category() -> None:
    # id, path, right: an id counts where its first keyword is, is divided by all ids with the keyword, and is whole only if all are right
    pairs = [("a", "long/1", True), ("a", "short/2", True), ("b", "short/3", True), ("c", "safety_video", True), ("d", "video", False),
             ("e", "short", True), ("e", "other", False)]  # fmt: skip
    rows = [{"id": str(n), "group": g, "source": s, "responses": ["x", "y"]} for n, (g, s, _) in enumerate(pairs)]
    scores, _ = reward_benchmarks.score_mmrlhf(rows, [(1.0, 0.0) if right else (0.0, 0.0) for *_, right in pairs])
    assert {k: v for k, v in scores.items() if k.endswith("acc_plus")} == {
        "overall/acc_plus": 3 / 5,  # a, b, c
        "long/acc_plus": 1,  # a
        "short/acc_plus": 1 / 3,  # b of a, b, e: a counts for long
        "safety/acc_plus": 1,  # c
        "video/acc_plus": 0,  # c counts for safety, and is divided here, too
    }
    assert scores["short/accuracy"] == 1 and scores["video/accuracy"] == 0


def test_the_coin_follows_the_file_of_replies(tmp_path: Path) -> None:
    rows = [{"id": f"x{n}", "category": "c", "better": 0} for n in range(6)]
    order = [3, 0, 5, 1, 2, 4]
    lines = [{"ID": f"x{n}", "output": "[[B]]" if n == 0 else "?"} for n in order]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    replies, found = reward_benchmarks.read_judge_replies(tmp_path / "r.jsonl", rows)
    assert found == order
    coin = random.Random(123)
    expected = {n: "B" if n == 0 else "A" if coin.random() < 0.5 else "B" for n in order}
    _, details = reward_benchmarks.score_mmrb_replies(rows, replies, found)
    assert [d["parsed"] for d in details] == [expected[n] for n in range(6)]


@pytest.mark.parametrize("scores", [None, [1.0], [1.0, None], ["1", "2"], [NAN, 1.0], 3, [1, 2, 3], [True, False]])
def test_scores_that_are_not_two_numbers_are_one_sentence(scores: object, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps({"id": "a", "scores": scores}) + "\n")
    with pytest.raises(
        InputError, match=r"has no two scores for 'a'|the scores of 'a' are .*, two numbers are expected"
    ):
        reward_benchmarks.read_scores(tmp_path / "s.jsonl", [{"id": "a"}])


def vl(name: str, query: str, first: str, ranking: list[int]) -> dict:
    return {"id": name, "query": query, "response": [first, "other"], "human_ranking": ranking, "image": "x.png"}


def test_repeated_ids_of_vl_rewardbench_are_questions_of_their_own(tmp_path: Path) -> None:
    records = [vl("RLAIF-1", "q", "one", [0, 1]), vl("RLAIF-1", "q2", "one", [0, 1]), vl("RLAIF-1", "q", "two", [1, 0]),
               vl("mmmu_2", "q", "one", [0, 1]), vl("RLAIF-1", "q", "one", [0, 1])]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = read_task("vlrewardbench", data)
    assert [r["id"] for r in rows] == ["RLAIF-1", "RLAIF-1#2", "RLAIF-1#3", "mmmu_2"]  # the last one is the first again
    scores, _ = reward_benchmarks.score_vlrewardbench(rows, [(1, 0), (0, 1), (0, 1), (1, 0)])
    assert (scores["hallucination"], scores["reasoning"], scores["overall"]) == (66.67, 100.0, 75.0)

    def votes(*indices: int) -> list[dict]:
        told = [{k: records[n][k] for k in ("id", "query", "response")} for n in indices]
        return [r | {"random_number": 0, "reply": "Therefore, Answer 1 is better"} for r in told]

    found, details = reward_benchmarks.score_vlrewardbench_votes(rows, votes(0, 1, 2, 3))
    assert [d["parsed"] for d in details] == ["agree", "agree", "reject", "agree"] and found["hallucination"] == 66.67
    with pytest.raises(InputError, match="the id 'RLAIF-1', which is not in the data, or there more than once"):
        reward_benchmarks.score_vlrewardbench_votes(rows, [{"id": "RLAIF-1", "random_number": 0, "reply": ""}])


def test_scores_of_rows_whose_ids_repeat_follow_their_order(tmp_path: Path) -> None:
    rows = [{"id": str(n), "group": "a", "question": f"Question {n}?", "responses": ["x", "y"]} for n in range(3)]
    lines = [{"id": "a", "prompt": f"Question {n}?", "rewards": [n, 1]} for n in range(3)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert reward_benchmarks.read_scores(tmp_path / "s.jsonl", rows) == [(0, 1), (1, 1), (2, 1)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines[::-1]))
    with pytest.raises(InputError, match="name no row of the data"):
        reward_benchmarks.read_scores(tmp_path / "s.jsonl", rows)
