"""Which rows are held out, kept and drawn. Pure functions on numbers, so that every choice can be repeated from the seed."""

from collections.abc import Sequence

import numpy as np


def held_out(groups: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """(N,) bool: rows held out for evaluation. Rows of one group (the same prompt and images) stay together.

    Which groups are taken depends on their content and the seed, not on their place, so that reordering a file or
    adding a data set moves few rows. At most `ratio` of the rows are taken, but one group at least.

    Args:
        groups: (N,) int64 content keys.
    """
    keys, group_of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    wanted = round(ratio * len(groups))
    order = np.argsort(_shuffled(keys, seed), kind="stable")
    order = order[sizes[order] <= max(wanted, sizes.min())]  # a group larger than the share stays in training
    taken = np.zeros(len(keys), dtype=bool)
    count = int(np.searchsorted(np.cumsum(sizes[order]), wanted, side="right"))
    taken[order[: max(count, 1)]] = True
    return taken[group_of_row]


def kept(num_rows: int, ratio: float, seed: int) -> np.ndarray:
    """(N,) bool: the share of rows that `--data_ratio` keeps. A smaller share is part of a larger one."""
    chosen = np.random.default_rng(seed).permutation(num_rows)[: max(1, round(ratio * num_rows))]
    mask = np.zeros(num_rows, dtype=bool)
    mask[chosen] = True
    return mask


def interleaved(sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> np.ndarray:
    """Row numbers of the concatenated data sets, in training order.

    Without weights every row comes once. With weights the order has as many rows as all sets together, of which each
    set gets its share: a set with too few rows repeats, one with more is drawn from in part. Sets alternate evenly.
    """
    total, order, place = sum(sizes), [], []
    quotas = list(sizes) if weights is None else _quotas(weights, total)
    start = 0
    for i, (size, quota) in enumerate(zip(sizes, quotas, strict=True)):
        rows = np.arange(size)
        if quota != size:
            rng = np.random.default_rng([seed, i])
            rows = np.concatenate([rng.permutation(size) for _ in range(-(-quota // size))] or [rows[:0]])[:quota]
        order.append(start + rows)
        place.append((np.arange(quota) + 0.5) / max(quota, 1))
        start += size
    return np.concatenate(order)[np.argsort(np.concatenate(place), kind="stable")]


def _quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the ratio of the weights whose sum is `total`, each at least 1."""
    bounds = np.round(np.cumsum(weights) / np.sum(weights) * total).astype(int)
    return [max(1, int(n)) for n in np.diff(bounds, prepend=0)]


def _shuffled(keys: np.ndarray, seed: int) -> np.ndarray:
    """A fixed pseudo-random number per key and seed (the finaliser of SplitMix64)."""
    x = keys.astype(np.uint64) + np.uint64(seed % 2**63 * 0x9E3779B97F4A7C15 % 2**64)  # array operations wrap around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
