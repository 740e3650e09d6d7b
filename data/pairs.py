"""Which ordered pairs of a row's K ranked responses enter a pairwise loss (`--pairs`, `--score_margin`)."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Literal

from common.errors import InputError

PairMode = Literal["best_worst", "all", "adjacent", "score_margin"]


def ordered_pairs(
    ranks: Sequence[float],
    scores: Sequence[float | None] | None = None,
    mode: PairMode = "all",
    score_margin: float | None = None,
) -> list[tuple[int, int]]:
    """Pairs (better, worse) of response indices, best first. Equal ranks make no pair.

    Modes: `all` every pair of different rank; `best_worst` the first of the best against the first of the worst;
    `adjacent` every response against those of the next lower rank; `score_margin` all pairs whose scores differ by at
    least the margin. With a margin the other modes are filtered by it too. A negative margin keeps the pair or pairs of
    the largest gap, as VLFeedback's recipes do; ranks stand in for scores that are missing altogether.

    Args:
        ranks: (K,), smaller is better.
        scores: (K,), larger is better; needed with a margin. A pair with a missing score has no gap and is left out.

    Raises:
        InputError: an unknown mode, or a margin without scores.
    """
    levels = [[i for i, r in enumerate(ranks) if r == rank] for rank in sorted(set(ranks))]  # indices, best level first
    match mode:
        case "all" | "score_margin":
            pairs = [p for i, better in enumerate(levels) for worse in levels[i + 1 :] for p in product(better, worse)]
        case "adjacent":
            pairs = [p for better, worse in pairwise(levels) for p in product(better, worse)]
        case "best_worst":
            pairs = [(levels[0][0], levels[-1][0])] if len(levels) > 1 else []
        case _:
            raise InputError(f"--pairs {mode} is unknown: choose best_worst, all, adjacent or score_margin.")
    if score_margin is None:
        if mode == "score_margin":
            raise InputError("--pairs score_margin needs --score_margin.")
        return pairs
    if scores is None and score_margin < 0:
        scores = [-rank for rank in ranks]
    if scores is None:
        raise InputError("--score_margin needs rows with scores; these have ranks only: leave it out.")
    gaps = {
        (i, j): better - worse
        for i, j in pairs
        if (better := scores[i]) is not None and (worse := scores[j]) is not None
    }
    # A pair of scores that contradicts its ranks has a negative gap and is never kept.
    least = score_margin if score_margin >= 0 else max((g for g in gaps.values() if g > 0), default=0)
    return [pair for pair in pairs if gaps.get(pair, -1) >= least]
