"""Built-in rewards: what an answer says, the key, the form. Expected values by hand, and by TRL's own functions."""

import sys

import pytest
from trl.rewards import get_repetition_penalty_reward

from base import reward_functions as r
from common.errors import InputError

CASES = {
    "exact_answer": [
        ("Paris.", "paris", 1), ("<think>Rome?</think><answer> Paris </answer>", "<answer>Paris</answer>", 1),
        ("It is Paris", "Paris", 0), (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1), ("", "Paris", 0),
        ("<answer>Rome</answer> no, <answer>Paris</answer>", "Paris", 1), ("<think>Paris</think> Rome", "Rome", 1),
    ],
    "multiple_choice": [
        ("B", "B", 1), ("(b)", "B", 1), ("B. a cat", "(B)", 1), ("B) a cat", "b", 1), ("The answer is B.", "B", 1), ("B a cat", "B", 1),
        ("A", "B", 0), ("A dog and a cat", "A", 0), ("I see a cat (B)", "B", 1), ("none", "B", 0), ("<answer>C</answer>", "C: a cat", 1),
        ("Because of its ears", "B", 0),
    ],
    "number": [
        ("4", "4", 1), ("There are 4 cats and 3 dogs", "3", 1), ("1,234.5", "1234.5", 1), ("-2", "2", 0), ("104", "100", 1), ("106", "100", 0),
        (".5", "0.5", 1), ("1e3", "1000", 1), ("none", "4", 0), ("A4", "4", 0), ("0", "0", 1), ("12%", "12", 1), ("3.", "3", 1), ("$4", "4", 1),
    ],
    "yes_no": [
        ("Yes, there is.", "yes", 1), ("There is no dog", "No", 1), ("Nothing", "no", 0), ("no", "yes", 0), ("maybe", "perhaps", 0),
    ],
    "box_iou": [
        ("[0, 0, 2, 2]", "[0, 0, 2, 2]", 1), ("<answer>[1, 0, 3, 2]</answer>", "[0, 0, 2, 2]", 1 / 3), ("[5, 5, 6, 6]", "[0, 0, 2, 2]", 0),
        ("no box", "[0, 0, 2, 2]", 0), ('{"bbox_2d": [0,0,1.0,2.0]}', "[0, 0, 2, 2]", 0.5), ("[2, 2, 0, 0]", "[0, 0, 2, 2]", 0),
        ("[1.2.3, 0, 1, 1]", "[0, 0, 1, 1]", 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_keys(name: str) -> None:
    responses, solutions, expected = zip(*CASES[name], strict=True)
    found = r.built_in(name)(responses=responses, solution=solutions, images=None, prompts=None)
    assert found == pytest.approx(list(expected)), [c for c, f in zip(CASES[name], found, strict=True) if c[2] != f]


def test_number_with_a_tolerance_of_its_own() -> None:
    found = r.number(["104", "104", "100", "120"], ["100"] * 4, tolerance=[0, None, 0, 0.2])
    assert found == [0, 1, 1, 1]


def test_form() -> None:
    good = "<think>\na\nb\n</think>\n<answer>c</answer>"
    bad = ["<answer>c</answer>", good + " more", "<think>a<answer>c</answer>", good + good, "x" + good]
    assert r.think_format([good, *bad]) == [1, 0, 0, 0, 0, 0]


def test_penalties() -> None:
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], [], [1, 2, 3, 1, 2, 3]]
    assert r.repetition_penalty(ids) == pytest.approx(get_repetition_penalty_reward()(completion_ids=ids))
    assert r.repetition_penalty(ids) == pytest.approx([0, -2 / 3, 0, 0, -1 / 4])
    assert r.length_penalty(ids, target_length=[4, 10, 1, 0, 5]) == pytest.approx([0, -0.0015, 0, 0, -0.0003])


def test_every_key_says_from_where_an_answer_is_right() -> None:
    assert set(r.RIGHT_FROM) == {"exact_answer", "multiple_choice", "number", "yes_no", "box_iou", "math_verify"}


def test_math_verify() -> None:
    pytest.importorskip("math_verify")
    found = r.built_in("math_verify")(
        [r"<answer>\frac{1}{2}</answer>", "0.5", r"\boxed{2}", "4"], ["0.5", r"\frac{2}{4}", "3", "two words"]
    )
    assert found[:3] == [1, 1, 0]


def test_unknown_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"give file\.py:name, or one of box_iou, exact_answer"):
        r.built_in("exact")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-rl\.txt"):
        r.built_in("math_verify")
