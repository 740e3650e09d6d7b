"""A loss is per pair or per token, and one of these makes it a number."""

import torch
from torch import Tensor


def sample_mean(per_sample: Tensor, num_samples: Tensor | float | None = None) -> Tensor:
    """Mean over samples, (N,) -> ().

    num_samples: divide by this instead of N. With the mean count of all shards (ranks, accumulation steps), the
    shards' results average to the mean over all samples, however unequal the shards are.
    """
    return per_sample.sum() / (per_sample.numel() if num_samples is None else num_samples)


def row_mean(per_pair: Tensor, pair_rows: Tensor) -> Tensor:
    """Mean over the pairs of each row that has any, in the order of the rows: (M,), row of each pair (M,) -> (rows,).

    With all ordered pairs of K responses this is the 1/(K choose 2) of InstructGPT (2203.02155 eq. 1): a row counts
    once, however many pairs it gives.
    """
    rows, index, counts = torch.unique(pair_rows, return_inverse=True, return_counts=True)
    return per_pair.new_zeros(len(rows)).index_add(0, index, per_pair) / counts


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values that the mask keeps, over all of them or along one dimension."""
    kept = torch.where(mask, values, 0)
    return kept.sum() / mask.sum() if dim is None else kept.sum(dim) / mask.sum(dim)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the values that the mask keeps. Raises ValueError if there are not two and unbiased is asked for."""
    count = mask.sum()
    if unbiased and count < 2:
        raise ValueError("The unbiased variance needs at least two answer tokens in the batch; raise the batch size.")
    biased = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return biased * count / (count - 1) if unbiased else biased


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit variance and, with shift_mean, mean 0 over the mask; same shape, 0 outside the mask."""
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)
