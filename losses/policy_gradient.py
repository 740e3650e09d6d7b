"""Policy gradients without a critic: the advantage of an answer comes from the other answers to its prompt.

R answers of at most T tokens; groups (R,) long says which answers have a prompt in common, in any order; mask (R, T) bool is True up to and
with the end token. A score of NaN is an answer that no reward applies to: it enters neither mean nor deviation, and its advantage is 0.

Where implementations disagree (TRL 1.16, verl b178a3cd, OpenRLHF 3c3be623), this is what is done here:
    1. Deviations are Bessel's, plus 1e-4, as in TRL (verl 1e-6, OpenRLHF 1e-9).
    2. A group of one has advantage 0 (verl: its raw score).
    3. KL in the reward is summed over an answer and taken off its score before the baseline, as in TRL's RLOO (OpenRLHF: per token, after it).
    4. `dr_grpo` is a mean over answers, as in TRL (verl's seq-mean-token-sum-norm: a sum, R times as large).
    5. `grpo` and `dr_grpo` count answers whose tokens are all masked (--mask_truncated_completions), as in TRL (verl, OpenRLHF: not).
    6. The ratio of a whole answer is the mean over its tokens (GSPO) with any loss_type, as in TRL's GRPO; TRL's RLOOTrainer takes the sum.
    7. Whitening takes the unbiased variance + 1e-8, as in verl (OpenRLHF: the biased one, at least 1e-8).
    8. `delta` bounds the ratio, as in TRL; verl's dual clip, which bounds the loss and is on there by default, is left out.
"""

import torch
from torch import Tensor

from losses.reductions import masked_whiten

SCALE_REWARDS = ("group", "batch", "none")
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo")
EPSILON = 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


def _sum_by_group(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values of each answer's group, NaN left out: (R,), (R,) -> (R,), (R,)."""
    there = ~values.isnan()
    _, index = groups.unique(return_inverse=True)  # (R,) 0 ... number of groups
    zeros = values.new_zeros(int(index.max()) + 1)
    sums = zeros.index_add(0, index, torch.where(there, values, 0))
    counts = zeros.index_add(0, index, there.to(values.dtype))
    return sums[index], counts[index]


def group_mean(scores: Tensor, groups: Tensor) -> Tensor:
    """Mean score of each answer's group, (R,), (R,) -> (R,); NaN where no score is."""
    sums, counts = _sum_by_group(scores, groups)
    return sums / counts


def group_std(scores: Tensor, groups: Tensor) -> Tensor:
    """Standard deviation of each answer's group, with Bessel's correction, (R,), (R,) -> (R,); 0 where a group has one score."""
    squares, counts = _sum_by_group((scores - group_mean(scores, groups)) ** 2, groups)
    return (squares / (counts - 1).clamp(min=1)).sqrt()


def uniform_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Whether all answers of a group have the same score: no advantage, nothing to learn. (R,), (R,) -> (R,) bool."""
    return group_std(scores, groups) < 1e-8


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------


def grpo_advantages(scores: Tensor, groups: Tensor, scale_rewards: str = "group") -> Tensor:
    """Scores minus their group's mean, over a deviation: (R,), (R,) -> (R,).

    scale_rewards: `group` divides by the group's deviation (GRPO, 2402.03300 §4.1.2), `batch` by that of all answers (2508.08221), `none` by
    nothing (Dr. GRPO, 2503.20783). Raises ValueError for another.
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"Unknown scale_rewards {scale_rewards!r}; known are {', '.join(SCALE_REWARDS)}.")
    advantages = scores - group_mean(scores, groups)
    if scale_rewards == "group":
        advantages = advantages / (group_std(scores, groups) + EPSILON)
    elif scale_rewards == "batch":
        advantages = advantages / (group_std(scores, torch.zeros_like(groups)) + EPSILON)
    return advantages.nan_to_num(nan=0.0)


def rloo_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """Each score minus the mean of the others of its group: (R,), (R,) -> (R,). RLOO, 2402.14740; with one score 0."""
    sums, counts = _sum_by_group(scores, groups)
    baseline = (sums - scores) / (counts - 1)
    return torch.where(counts > 1, scores - baseline, 0).nan_to_num(nan=0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum of the rewards from each token on, (R, T), (R, T) -> (R, T), 0 outside the mask.

    Whitened over all tokens of the update they are the advantages of REINFORCE++ (2501.03262).
    """
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # (R,)
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    return torch.where(mask, returns, 0)


def over_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """An answer's advantage at each of its tokens, (R,), (R, T) -> (R, T), 0 outside the mask."""
    return torch.where(mask, advantages[:, None], 0)


def reinforce_plus_plus_baseline_advantages(scores: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
    """Scores minus their group's mean, whitened over all tokens: (R,), (R,), (R, T) -> (R, T). 2501.03262."""
    return masked_whiten(over_tokens(grpo_advantages(scores, groups, "none"), mask), mask)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def loss_sum(per_token: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """What a micro batch adds to the loss, (R, T), (R, T) -> (). Divided by the sum of all `loss_count` it is the mini batch's loss."""
    kept = torch.where(mask, per_token, 0)
    if loss_type == "grpo":
        return (kept.sum(1) / mask.sum(1).clamp(min=1)).sum()
    if loss_type == "bnpo":
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum()


def loss_count(mask: Tensor, loss_type: str, max_length: int, num_answers: int | None = None) -> Tensor:
    """What a micro batch adds to the loss's denominator, (R, T) -> ().

    `dapo` tokens (2503.14476), `grpo` answers (2402.03300), `dr_grpo` answers times `max_length` (2503.20783), `bnpo` 1: a mean of micro batches.
    num_answers: how many of the R answers count, if not all. Raises ValueError for another loss_type.
    """
    answers = mask.new_tensor(mask.shape[0] if num_answers is None else num_answers, dtype=torch.long)
    counts = {
        "dapo": mask.sum(),
        "grpo": answers,
        "dr_grpo": answers * max_length,
        "bnpo": torch.ones_like(answers),
    }
    if loss_type not in counts:
        raise ValueError(f"Unknown loss_type {loss_type!r}; known are {', '.join(LOSS_TYPES)}.")
    return counts[loss_type]


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean log-ratio of each answer's tokens, (R, T) each -> (R, 1). GSPO, 2507.18071 eq. 7."""
    return torch.where(mask, logprobs - old_logprobs, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """0 up to max_length - buffer tokens, then falling in a line to -factor at max_length: (R,) -> (R,). DAPO, 2503.14476 eq. 13."""
    return -factor * ((lengths - (max_length - buffer)) / buffer).clamp(min=0)
