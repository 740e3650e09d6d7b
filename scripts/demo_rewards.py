"""Rules of the demo: --reward_fn scripts/demo_rewards.py:caption_f1 of its GRPO stage, and the claims of a caption."""

from collections.abc import Sequence

from eval.shapes import mentions


def caption_f1(responses: Sequence[str], reference: Sequence[str], **_: object) -> list[float]:
    """F1 of the objects that a caption names against those of the true caption, the data's column `reference`."""
    return [f1(set(mentions(said)), set(mentions(true))) for said, true in zip(responses, reference, strict=True)]


def f1(said: set[str], there: set[str]) -> float:
    """2 · right / (said + there); 0 where nothing is said."""
    return 2 * len(said & there) / max(len(said) + len(there), 1)


def object_questions(answer: str) -> list[str]:
    """The objects that a caption names, as questions: --claims_fn scripts/demo_rewards.py:object_questions of data.sample."""
    return [f"Is there a {name}?" for name in dict.fromkeys(mentions(answer))]
