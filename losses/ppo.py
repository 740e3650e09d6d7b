"""PPO: B rollouts of T answer tokens; mask (B, T) bool is True up to and with the end token.

Departures from TRL:
    1. The score sits on the last answer token, as in TRL 0.8.1 (1.10: on the first pad, if there is one), so values and
       rewards live on the answer's tokens and not on one more.
    2. KL, approx_kl, entropy and ratio are means over answer tokens, as in 0.8.1 (1.10: over padding too, which counts
       as 0, 0, its entropy and 1).
    3. Whitened rewards are 0 on padding, as in 1.10 (0.8.1: mean - mean/std, which GAE carries into the answer).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate of KL(πθ || πref) at each sampled token, same shape: k1 = -log r, k3 = r - 1 - log r with r = πref/πθ.

    joschu.net/blog/kl-approx.html. k1 may be negative, k3 is not. Raises ValueError for another estimator.
    """
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k3":
        return torch.expm1(log_r) - log_r
    raise ValueError(f"Unknown kl_estimator {estimator!r}; known are k1, k3.")


def last_token_index(mask: Tensor) -> Tensor:
    """Index of the last token that the mask keeps, (B, T) bool -> (B,). Raises ValueError if a row keeps none."""
    if not bool(mask.any(-1).all()):
        raise ValueError(
            f"Rollout {int((~mask.any(-1)).nonzero()[0])} of the batch is empty: it has no token to reward."
        )
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, -1).max(-1).values


def penalize_missing_eos(scores: Tensor, contains_eos: Tensor, penalty: float | None) -> Tensor:
    """Take the penalty off the scores of answers without an end token: (B,), (B,) bool -> (B,)."""
    return scores if penalty is None else torch.where(contains_eos, scores, scores - penalty)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef · KL at every answer token, plus the score at the last one: (B,), (B, T), (B, T) -> (B, T).

    Ziegler et al., 1909.08593 eq. 2.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0)
    return rewards.scatter_add(-1, last_token_index(mask)[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, T) each, 0 outside the mask; not whitened. GAE, 1506.02438 eq. 16.

    Â_t = δ_t + γλ Â_{t+1}, δ_t = R_t + γ V_{t+1} - V_t, with V = 0 after the last answer token. Returns are Â + V.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    next_values = F.pad(values[:, 1:], (0, 1))  # (B, T)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])  # (B,)
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    delta: float | None = None,
    log_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, 1707.06347 eq. 7, and where the clip decided it: (B, T) each -> (B, T), (B, T) bool.

    Args:
        cliprange_high: the upper clip, if it is another (DAPO's clip-higher, 2503.14476).
        delta: largest ratio of the unclipped term, which bounds the loss where the advantage is negative (2505.07291 eq. 6).
        log_ratio: instead of the tokens' own, (B, T) or (B, 1), see sequence_log_ratio.
    """
    ratio = torch.exp(logprobs - old_logprobs if log_ratio is None else log_ratio)
    clipped_ratio = ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high))
    unclipped = -advantages * (ratio if delta is None else ratio.clamp(max=delta))
    clipped = -advantages * clipped_ratio
    return torch.maximum(unclipped, clipped), clipped > unclipped


def truncated_importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(πθ / πsampler, cap) of every sampled token, no gradient: (B, T), (B, T) -> (B, T).

    They weigh the loss of tokens that another program sampled, whose numerics are not ours: truncated importance sampling,
    fengyao.notion.site/off-policy-rl; TRL's `token_truncate`.
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap).detach()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """½ max of squared errors with and without the value kept near its old one, and where it decided: (B, T) each.

    Not in the PPO paper; from OpenAI's baselines, as in TRL.
    """
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def approx_kl_per_token(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """½ (log πθ - log πold)², any shape: `policy/approxkl_avg` after masked_mean (the k2 of kl-approx.html)."""
    return 0.5 * (logprobs - old_logprobs) ** 2


def adaptive_kl_coef(kl_coef: float, kl: float, target_kl: float, horizon: float, num_samples: int) -> float:
    """The KL coefficient after num_samples rollouts whose mean sequence KL was kl. Ziegler et al., 1909.08593 §2.2.

    A proportional controller: at most ±20 % error counts, and one horizon of samples moves the coefficient by it.
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
