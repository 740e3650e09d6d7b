"""What sampled answers are worth: the scorers of `python -m data.sample`.

A scorer takes rows with `images`, `prompt` (messages), `responses` and the data's own columns, and gives every response a
number, or None where it has nothing to say. The total is their weighted sum.

`Claims` is RLAIF-V's divide and conquer (2405.17220 §3.2): an answer is split into claims, a model is asked about each of
them whether it is true of the picture, and every no costs one point. Departures from the paper:
    1. Splitting and turning claims into questions is one request to the same model, not two to a language model; or a
       function of the user's does both.
    2. The model says yes or no greedily; there the larger of their two probabilities decides. What is neither costs nothing.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from base.reward import score_rows
from base.rewards import FunctionReward, load_function, load_reward_fn
from base.rollout import Row
from common.errors import InputError
from data.rows import IMAGE_MARK
from eval.generate import Answerer, EncodedBatches, chunks, generation_settings
from eval.judge import Judge, as_judges_see, ask_all, judge_template
from eval.judged import fill
from models import core_mapper_for

Scores = list[list[float | None]]  # [row][response]

JUDGE_PROMPT = """You rate an answer to a question{about}.

Question: {question}
What is known to be right (may be empty): {reference}
Answer: {answer}

Say in a sentence or two what is right and what is wrong, then end with one line:
Rating: N
with N from 1 (wrong or useless) to 10 (right, complete, nothing made up)."""

SPLIT_PROMPT = """Here is a question about a picture, and an answer to it.

Question: {question}
Answer: {answer}

Turn every single fact that the answer states about the picture into a question that can be answered with yes or no, where yes means that \
the fact is true. Write one question per line and nothing else."""

YES_OR_NO = "{claim}\nPlease answer yes or no."


class Scorer(Protocol):
    """Gives numbers to responses.

    Attributes:
        name: of its column and its file.
        about: everything that its numbers depend on besides the answers, as JSON holds it.
    """

    name: str
    about: dict[str, Any]

    def score(self, rows: Sequence[Row]) -> Scores:
        """A number for every response of every row."""


def last_question(prompt: Sequence[dict[str, Any]]) -> str:
    """The text that a prompt ends with, without image marks."""
    return str(prompt[-1]["content"]).replace(IMAGE_MARK, "").strip()


class RewardModel:
    """The head's output at each response's end: an output folder of train_rm.py, weights or adapter."""

    def __init__(self, folder: str, device: torch.device, bf16: bool, weights: str | None) -> None:
        family, dtype = core_mapper_for(folder), torch.bfloat16 if bf16 else torch.float32
        self.name, self.about = Path(folder).name, {"reward_model": folder, "weights": weights, "dtype": str(dtype)}
        self.model = family.reward_model.from_pretrained(folder, dtype=dtype).to(device)
        self.processor = family.processor(folder)

    def score(self, rows: Sequence[Row]) -> Scores:
        """See `score_rows`."""
        return [list(of_row) for of_row in score_rows(self.model, self.processor, rows, max(1, len(rows)))]


class Function:
    """A function as train_ppo.py takes it (--reward_fn)."""

    def __init__(self, spec: str, timeout: float, encode: Callable[[str], list[int]]) -> None:
        """
        Args:
            encode: the tokens of a text, for functions that ask for `completion_ids`.
        """
        self.name, self.about = spec.rpartition(":")[2], {"reward_fn": spec}
        self.reward, self.encode = FunctionReward(self.name, 1.0, load_reward_fn(spec), timeout), encode

    def score(self, rows: Sequence[Row]) -> Scores:
        """One call for all responses of the rows."""
        of_answer = [(row, text) for row in rows for text in row["responses"]]
        where = [f"{row['where']} (answer {text[:80]!r})" for row, text in of_answer]
        own = [{k: v for k, v in row.items() if k not in ("id", "responses")} for row, _ in of_answer]
        texts = [text for _, text in of_answer]
        found = iter(self.reward.score_texts(own, texts, where, [self.encode(text) for text in texts]).tolist())
        return [[None if math.isnan(value := next(found)) else value for _ in row["responses"]] for row in rows]


class Rating:
    """A language model's rating from 1 to 10, which sees the pictures (not with --judge_text_only) and the row's `reference`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name, self.judge, self.workers = "judge", Judge.from_args(args), args.judge_workers
        self.template, described = judge_template(args, JUDGE_PROMPT, "question answer")
        self.text_only = args.judge_text_only
        self.about = {"judge": self.judge.describe(), "prompt": described, "text_only": self.text_only}

    def score(self, rows: Sequence[Row]) -> Scores:
        """None where the reply has no rating."""
        replies = iter(ask_all(self._ask, [(row, text) for row in rows for text in row["responses"]], self.workers))
        return [[rating(next(replies)) for _ in row["responses"]] for row in rows]

    def _ask(self, answer: tuple[Row, str]) -> str:
        row, text = answer
        unseen = " about a picture that you do not see" if self.text_only else " about the picture"
        prompt = fill(
            self.template,
            about=unseen if row["images"] else "",
            question=last_question(row["prompt"]),
            reference=row.get("reference") or row.get("solution") or "",
            answer=text,
        )
        return self.judge.ask(prompt, pictures=[] if self.text_only else [as_judges_see(i) for i in row["images"]])


def rating(reply: str) -> float | None:
    """The number behind the last "Rating:" of a reply."""
    found = re.findall(r"rating:\s*\**\s*(\d+(?:\.\d+)?)", reply, re.IGNORECASE)
    return float(found[-1]) if found else None


class Claims:
    """Minus the number of an answer's claims that a model denies when it is asked about the picture."""

    def __init__(
        self, answerer: Answerer, split: Callable[[str], list[str]] | None, batch_size: int, about: dict[str, Any]
    ) -> None:
        """
        Args:
            split: an answer -> questions that can be answered with yes or no, which are asked as they are; None asks the model for them.
            about: which model, and which function.
        """
        self.name, self.about = "claims", about
        self.answerer, self.split, self.batch_size = answerer, split, batch_size

    def score(self, rows: Sequence[Row]) -> Scores:
        """An answer without a claim, such as one that says nothing of the picture, has None."""
        found: Scores = []
        for row in rows:
            claims = self.claims(row)
            distinct = list(dict.fromkeys(question for of_answer in claims for question in of_answer))
            asked = distinct if self.split is not None else [YES_OR_NO.format(claim=claim) for claim in distinct]
            denied = dict(zip(distinct, map(says_no, self._ask(asked, row["images"], 8)), strict=True))
            found.append([-float(sum(denied[q] for q in of_answer)) if of_answer else None for of_answer in claims])
            self.answerer.forget_images()
        return found

    def claims(self, row: Row) -> list[list[str]]:
        """The yes/no questions of every response."""
        if self.split is not None:
            return [_questions_of(self.split, text, row) for text in row["responses"]]
        question = last_question(row["prompt"])
        prompts = [fill(SPLIT_PROMPT, question=question, answer=text) for text in row["responses"]]
        return [questions_in(reply) for reply in self._ask(prompts, [], 256)]

    def _ask(self, prompts: Sequence[str], images: Sequence[Any], max_new_tokens: int) -> list[str]:
        """Greedy replies to prompts about the same pictures."""
        batches, replies = EncodedBatches([], self.answerer.prompt_collator), list[str]()
        greedy = argparse.Namespace(
            checkpoint_settings=False, max_new_tokens=max_new_tokens, num_beams=None, temperature=0.0, top_p=None,
            num_samples=1, seed=0,
        )  # fmt: skip
        settings, _ = generation_settings(greedy, self.answerer)
        for part in chunks(list(prompts), self.batch_size):
            messages = [[{"role": "user", "content": IMAGE_MARK * len(images) + prompt}] for prompt in part]
            replies += self.answerer.answer([batches.encode_messages(m, list(images)) for m in messages], settings, 0)
        return replies


def _questions_of(split: Callable[[str], list[str]], text: str, row: Row) -> list[str]:
    questions = split(text)
    if not isinstance(questions, list) or not all(isinstance(q, str) for q in questions):
        raise InputError(
            f"--claims_fn returned {questions!r:.80} for {row['where']} (answer {text[:80]!r}): return a list of questions."
        )
    return questions


def questions_in(reply: str) -> list[str]:
    """The lines of a reply that are questions, without numbers and dashes before them."""
    lines = (re.sub(r"^[\s\-*•]*(\d+[.)])?\s*", "", line).strip() for line in reply.splitlines())
    return [line for line in lines if line.endswith("?")]


def says_no(reply: str) -> bool:
    """Whether the first word is no."""
    return (re.findall(r"\w+", reply.lower()) or [""])[0] == "no"


def load_split(spec: str | None) -> Callable[[str], list[str]] | None:
    """The function that --claims_fn names. Raises InputError if there is none of that name."""
    return None if spec is None else load_function(spec, "--claims_fn")
