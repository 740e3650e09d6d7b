"""Rewards with an answer key, named by --reward_fn (`--reward_fn exact_answer think_format --reward_weights 1 0.5`).

Each takes the texts of the answers and columns of the data, one entry per answer, and returns one number per answer. `solution` is the answer key: a
text, or <answer>text</answer>. What is compared is what an answer says between its last <answer> tags, else in its last \\boxed{}, else all of it.
"""

import re
import threading
from collections.abc import Callable, Sequence

from common.errors import InputError

Texts = Sequence[str]
RewardFunction = Callable[..., Sequence[float | None]]

BUILT_IN: dict[str, RewardFunction] = {}
# From which value on an answer is right: the share of these is logged as right/NAME.
RIGHT_FROM: dict[str, float] = {}


def _built_in(right_from: float | None = None) -> Callable[[RewardFunction], RewardFunction]:
    def declare(function: RewardFunction) -> RewardFunction:
        name = function.__name__
        BUILT_IN[name] = function
        if right_from is not None:
            RIGHT_FROM[name] = right_from
        return function

    return declare


# ---------------------------------------------------------------------------------------------------------------------
# What an answer says
# ---------------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|(?<![\w.])[-+]?\.\d+", re.IGNORECASE
)
_BOX = re.compile(r"\[\s*([-+]?[\d.]+)\s*,\s*([-+]?[\d.]+)\s*,\s*([-+]?[\d.]+)\s*,\s*([-+]?[\d.]+)\s*\]")


def final_answer(text: str) -> str:
    """What stands between the last <answer> tags, else in the last \\boxed{}, else after </think>, else the whole text."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    if tagged:
        return tagged[-1].strip()
    boxed = _last_boxed(text)
    return text.rpartition("</think>")[2].strip() if boxed is None else boxed.strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _letter(text: str) -> str | None:
    """The option that a text names: B, (B), B., B) text, or the answer is B."""
    text = text.strip()
    match = re.match(r"[(\[]?([A-Za-z])(?:[)\].:]|$)", text) or re.match(r"([A-Z])\s+\S", text)
    match = match if match and not re.match(r"(A|I)\s+[a-z]", text) else None
    match = match or next(
        reversed([*re.finditer(r"(?:answer|option|choice)\s*(?:is|:)?\s*[(\[]?([A-Za-z])\b(?!\w)", text, re.I)]), None
    )
    match = match or next(reversed([*re.finditer(r"[(\[]([A-Z])[)\]]", text)]), None)
    return match[1].upper() if match else None


def _box(text: str) -> tuple[float, ...] | None:
    found = _BOX.findall(text)
    try:
        return tuple(float(x) for x in found[-1]) if found else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Answer keys
# ---------------------------------------------------------------------------------------------------------------------


@_built_in(right_from=1)
def exact_answer(responses: Texts, solution: Texts, **_: object) -> list[float]:
    """1 for the key's text, without case, spaces and final full stops. R1-V's accuracy reward without its symbolic part."""
    return [float(_plain(final_answer(r)) == _plain(final_answer(s))) for r, s in zip(responses, solution, strict=True)]


@_built_in(right_from=1)
def multiple_choice(responses: Texts, solution: Texts, **_: object) -> list[float]:
    """1 for the key's letter. Read as in MMMU's evaluation (2311.16502): `B`, `(B)`, `B. text`, `The answer is B`."""
    said = [(_letter(final_answer(r)), _letter(final_answer(s))) for r, s in zip(responses, solution, strict=True)]
    return [float(letter is not None and letter == right) for letter, right in said]


@_built_in(right_from=1)
def number(
    responses: Texts, solution: Texts, tolerance: Sequence[float | None] | None = None, **_: object
) -> list[float]:
    """1 if the last number is within `tolerance` of the key's, relative to it: ChartQA's relaxed accuracy (2203.10244 §5.1).

    The column `tolerance` is 0.05 where it is missing, as there; 0 asks for the number itself (counting).
    """
    found = []
    for i, (response, key) in enumerate(zip(responses, solution, strict=True)):
        said, right = _last_number(final_answer(response)), _last_number(final_answer(key))
        allowed = tolerance[i] if tolerance is not None and tolerance[i] is not None else 0.05
        found.append(float(said is not None and right is not None and abs(said - right) <= allowed * abs(right) + 1e-9))
    return found


@_built_in(right_from=1)
def yes_no(responses: Texts, solution: Texts, **_: object) -> list[float]:
    """1 if the first yes or no is the key's. POPE, 2305.10355 §5."""
    return [
        float(_yes(final_answer(r)) == _yes(final_answer(s)) is not None)
        for r, s in zip(responses, solution, strict=True)
    ]


def _yes(text: str) -> str | None:
    match = re.search(r"\b(yes|no)\b", text.lower())
    return match[1] if match else None


@_built_in(right_from=0.5)
def box_iou(responses: Texts, solution: Texts, **_: object) -> list[float]:
    """Intersection over union of the last box [x1, y1, x2, y2] with the key's. VLM-R1, 2504.07615 §3.2.

    Right from 0.5 on. Departure from VLM-R1's code: boxes are not one pixel smaller than they say.
    """
    pairs = [(_box(final_answer(r)), _box(final_answer(s))) for r, s in zip(responses, solution, strict=True)]
    return [0.0 if said is None or right is None else intersection_over_union(said, right) for said, right in pairs]


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two boxes (x1, y1, x2, y2); 0 where one has no area."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    inter = max(sides[0], 0) * max(sides[1], 0)
    union = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (a, b)) - inter
    return inter / union if union > 0 else 0.0


@_built_in(right_from=1)
def math_verify(responses: Texts, solution: Texts, **_: object) -> list[float | None]:
    """1 for a term that is mathematically the key's; no score where the key is not a term. github.com/huggingface/Math-Verify, as in TRL."""
    parse, verify = _math_verify()
    # Its limits of time are alarms, which belong to the main thread.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    found: list[float | None] = []
    for response, key in zip(responses, solution, strict=True):
        right = parse(f"${final_answer(key)}$", parsing_timeout=seconds) or parse(key, parsing_timeout=seconds)
        said = parse(f"${final_answer(response)}$", parsing_timeout=seconds) or parse(response, parsing_timeout=seconds)
        found.append(float(verify(right, said, timeout_seconds=seconds)) if right else None)
    return found


def _math_verify() -> tuple[Callable, Callable]:
    try:
        from math_verify import parse, verify  # optional
    except ImportError as error:
        raise InputError(
            "--reward_fn math_verify needs a package that is not installed: pip install -r requirements-rl.txt"
        ) from error
    return parse, verify


# ---------------------------------------------------------------------------------------------------------------------
# Form
# ---------------------------------------------------------------------------------------------------------------------


@_built_in()
def think_format(responses: Texts, **_: object) -> list[float]:
    """1 for <think>...</think><answer>...</answer> and nothing else. DeepSeek-R1, 2501.12948 §2.2.2; R1-V's format reward."""
    pattern = re.compile(r"\s*<think>((?!<think>).)*?</think>\s*<answer>((?!<answer>).)*?</answer>\s*", re.DOTALL)
    return [float(pattern.fullmatch(r) is not None) for r in responses]


@_built_in()
def length_penalty(completion_ids: Sequence[Sequence[int]], target_length: Sequence[float], **_: object) -> list[float]:
    """-0.0003 for every token above or below the column `target_length`. L1, 2503.04697 eq. 1."""
    return [-0.0003 * abs(len(ids) - n) for ids, n in zip(completion_ids, target_length, strict=True)]


@_built_in()
def repetition_penalty(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """Minus the share of 3-grams of tokens that were there before. 2502.03373 appendix C.2, as in TRL."""
    found = []
    for ids in completion_ids:
        grams = [*zip(ids, ids[1:], ids[2:], strict=False)]
        found.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
    return found


def built_in(name: str) -> RewardFunction:
    """A reward by its name.

    Raises:
        InputError: there is none of that name, or it needs a package that is not installed.
    """
    if name not in BUILT_IN:
        raise InputError(f"--reward_fn {name}: give file.py:name, or one of {', '.join(sorted(BUILT_IN))}.")
    if name == "math_verify":
        _math_verify()
    return BUILT_IN[name]
