"""From the flags of eval.generate to its answers, and from an answer to its letter."""

import random
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from eval import choice, mathvista
from eval.benchmark_files import read_task, with_image_marks
from eval.generate import Answerer, answer_rows, plan
from eval.ledger import Ledger
from tests.test_eval_generate import CPU, arguments, lines, questions, run  # noqa: F401  (a fixture)
from tests.test_paths_dpo import sft_adapter


def test_the_answers_of_another_adapter_do_not_go_into_the_same_file(llava, questions, tmp_path):  # noqa: F811
    one, other = (sft_adapter(llava, tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    output = tmp_path / "a.jsonl"
    run(arguments(questions, output, llava, limit=2, adapter=one))
    run(arguments(questions, output, llava, limit=2, adapter=one))
    for changed in (
        {"adapter": other},
        {"adapter": None},
        {"limit": 3, "adapter": one},
        {"suffix": "?", "adapter": one},
    ):
        with pytest.raises(InputError, match=f"was written with {next(iter(changed))}|was written with prompt"):
            run(arguments(questions, output, llava, **{"limit": 2} | changed))


KEYS = ("task", "data_sha256", "image_dir", "limit", "checkpoint", "adapter", "weights", "prompt", "generation")


@pytest.mark.parametrize("key", KEYS)
def test_whatever_changes_an_answer_is_one_of_the_settings_of_its_file(tmp_path, key: str):
    settings = dict.fromkeys(KEYS, "one") | {"prompt": {"suffix": "one"}}
    other = {"suffix": "other"} if key == "prompt" else "other"
    ledger = Ledger(tmp_path / "a.jsonl", settings, ["1"])
    ledger.open()
    ledger.write([{"id": "1", "answer": "yes"}])
    ledger.close()
    assert Ledger(tmp_path / "a.jsonl", settings | {"batch_size": 3}, ["1"]).open() == {"1"}
    with pytest.raises(InputError, match=f"was written with {key} .*one.*, now it is .*other"):
        Ledger(tmp_path / "a.jsonl", settings | {key: other}, ["1"]).open()


def test_the_smallest_nucleus_is_the_likeliest_token(llava, questions, tmp_path):  # noqa: F811
    def answers(name: str, **settings: float) -> list[str]:
        run(arguments(questions, tmp_path / name, llava, **settings))
        return [row["answer"] for row in lines(tmp_path / name)]

    greedy = answers("greedy.jsonl")
    assert answers("nucleus.jsonl", temperature=1.0, top_p=1e-6) == greedy
    assert answers("sampled.jsonl", temperature=1.0, seed=4) != greedy
    assert answers("again.jsonl", temperature=1.0, seed=4) == answers("third.jsonl", temperature=1.0, seed=4)
    assert answers("other.jsonl", temperature=1.0, seed=5) != answers("sampled.jsonl", temperature=1.0, seed=4)


def test_a_row_without_an_image_never_joins_one_with(llava):
    def row(number: int, *images: str) -> dict:
        return {"id": number, "images": list(images)}

    def numbers(rows: list[dict], size: int) -> list:
        return [[[r["id"] for r in batch] for batch in batches] for batches in plan(rows, size)]

    assert numbers([row(0, "a"), row(1)], 3) == [[[0]], [[1]]]
    assert numbers([row(1), row(0, "a")], 3) == [[[1]], [[0]]]
    assert numbers([row(0, "a"), row(1, "b"), row(2)], 3) == [[[0, 1]], [[2]]]


def test_max_new_tokens_bounds_every_answer(llava, questions, tmp_path):  # noqa: F811
    answerer = Answerer(llava, None, CPU, bf16=False)
    counted, decode = [], answerer.processor.decode_response
    answerer.processor.decode_response = lambda ids: counted.append(len(ids)) or decode(ids)
    args = arguments(questions, tmp_path / "a.jsonl", llava, limit=4, max_new_tokens=3)
    answer_rows(args, read_task("pope", questions)[:4], answerer, 0, 1)
    assert len(counted) == 4 and max(counted) <= 3


@pytest.mark.parametrize(
    "text, images, expected",
    [
        ("<image 1> or <image 2>?", 2, "<image> or <image>?"),
        # one mark for each image, but not in their order: the images go first, and the text names them
        ("<image 2> or <image 1>?", 2, "<image 2> or <image 1>?"),
        ("<image 1> and <image 1> or <image 2>?", 2, "<image 1> and <image 1> or <image 2>?"),
        ("<image 1>?", 1, "<image 1>?"),
        ("<image>What?", 1, "What?"),
    ],
)
def test_marks_stand_where_the_text_names_images_in_order(text: str, images: int, expected: str):
    assert with_image_marks(text, images) == expected


CHOICES = {"A": "red", "B": "green", "C": "blue"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("(A) or (B)? I say (A)", "A"),
        ("(A)? No: (B)", "B"),
        ("A or C, well C it is, not A", "A"),
        ("it may be red or it may be blue", "C"),
    ],
)
def test_mmmus_last_mention_wins(answer: str, letter: str):
    assert choice.mmmu_letter(answer, CHOICES, random.Random(0)) == letter


@pytest.mark.parametrize("extraction, choice_", [("(A) not (B)", "red"), ("(B) not (A)", "green"), ("C", "blue")])
def test_mathvistas_first_bracketed_letter_wins(extraction: str, choice_: str):
    row = {"question_type": "multi_choice", "choices": list(CHOICES.values())}
    assert mathvista.normalise(extraction, row) == choice_


def test_the_processs_random_state_has_no_part_in_an_answer(llava, questions, tmp_path: Path):  # noqa: F811
    """Sampled answers come from --seed, not from the process's random state."""
    found = []
    for n in range(2):
        torch.manual_seed(n)
        run(arguments(questions, tmp_path / f"{n}.jsonl", llava, limit=3, temperature=1.0, seed=1))
        found.append([row["answer"] for row in lines(tmp_path / f"{n}.jsonl")])
    assert found[0] == found[1]
