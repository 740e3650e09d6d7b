"""What PPO logs, under TRL's names."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

import losses
from base.rewards import FunctionReward, Reward
from base.rollout import Advantages
from base.update_loop import PPOState

logger = logging.getLogger(__name__)
ANOTHER_POLICY = 0.1  # mean deviation of probability ratios from 1


def rollout_metrics(
    rollouts: Sequence[Advantages], kl_coef: float, kl_estimator: str, cap: float | None = None
) -> dict[str, Tensor]:
    """One number per answer of an update, (all R,) each; those of log-probs that no pass computed are left out.

    Args:
        cap: --rollout_importance_cap. What compares a server with the policy has one number per token.
    """
    scores = torch.cat([r.scores for r in rollouts])
    scored = ~scores.isnan()  # a reward may not apply to an answer
    metrics = {}
    kl = sequence_kl(rollouts)
    if rollouts[0].logps is not None:
        metrics["objective/entropy"] = torch.cat([-torch.where(r.mask, r.logps, 0).sum(1) for r in rollouts])
    if kl is not None:
        penalty = torch.cat(
            [torch.where(r.mask, losses.kl_per_token(r.logps, r.ref_logps, kl_estimator), 0).sum(1) for r in rollouts]
        )
        metrics |= {
            "objective/kl": kl,
            "objective/non_score_reward": -kl_coef * penalty,
            "objective/rlhf_reward": (scores - kl_coef * penalty)[scored],
            "objective/kl_coef": scores.new_full((1,), kl_coef),  # on the device: it is reduced over all of them
        }
    if rollouts[0].sampler_logps is not None:
        ours, theirs = (torch.cat([getattr(r, name)[r.mask] for r in rollouts]) for name in ("logps", "sampler_logps"))
        metrics["sampling/sampling_logp_difference/mean"] = (ours - theirs).abs()
        metrics["sampling/importance_sampling_ratio/mean"] = losses.truncated_importance_weights(ours, theirs, cap)
    return metrics | {
        "objective/scores": scores[scored],
        "val/response_length": torch.cat([r.mask.sum(1) for r in rollouts]).float(),
        "val/ended": torch.cat([r.ended for r in rollouts]).float(),
    }


def reward_metrics(rollouts: Sequence[Advantages], rewards: Sequence[Reward]) -> dict[str, Tensor]:
    """What each reward gave, one number per answer that it applies to; and of those with an answer key, whether it was right."""
    metrics = {}
    for reward in rewards:
        values = torch.cat([r.parts[reward.name] for r in rollouts])
        metrics[f"reward/{reward.name}"] = values = values[~values.isnan()]
        if isinstance(reward, FunctionReward) and reward.right_from is not None:
            metrics[f"right/{reward.name}"] = (values >= reward.right_from).float()
    return metrics


def group_metrics(rollouts: Sequence[Advantages]) -> dict[str, Tensor]:
    """How far answers to one prompt differ, (all R,) each, by TRL's names: without variance there is nothing to learn."""
    scores, groups = torch.cat([r.scores for r in rollouts]), torch.cat([r.groups for r in rollouts])
    return {
        "reward_std": losses.group_std(scores, groups),
        "frac_reward_zero_std": losses.uniform_groups(scores, groups).float(),
    }


def sequence_kl(rollouts: Sequence[Advantages]) -> Tensor | None:
    """KL of each answer to the reference at sampling time in nats, estimated by its log-ratio (k1), (all R,); None if no pass computed it."""
    if any(r.logps is None or r.ref_logps is None for r in rollouts):
        return None
    return torch.cat([torch.where(r.mask, r.logps - r.ref_logps, 0).sum(1) for r in rollouts])


def token_metrics(
    r: Advantages,
    logps: Tensor,
    entropy: Tensor,
    statistics: dict[str, Tensor],
    first: bool,
) -> dict[str, Tensor]:
    """(sum, number of tokens) of what a micro step computed, (2,) each.

    Args:
        logps, entropy: (R, T).
        statistics: of `policy_and_value_loss`, (R, T) each.
        first: before the first optimizer step of an update policy and sampler are the same: `first/*` are 0 up to
            rounding, of a server up to its other kernels.
    """
    mask = r.loss_mask
    ratio = torch.exp(logps - r.logps)
    sums = {
        "policy/approxkl_avg": losses.approx_kl_per_token(logps, r.logps)[mask].sum(),
        "policy/clipfrac_avg": statistics["policy_clipped"][mask].sum(),
        "policy/entropy_avg": entropy[mask].sum(),
        "val/ratio": ratio[mask].sum(),
        "val/ratio_var": ((ratio[mask] - 1) ** 2).sum(),
    }
    if "kl" in statistics:
        sums["loss/kl_avg"] = statistics["kl"][mask].sum()
    if first:
        sampler = r.logps if r.sampler_logps is None else r.sampler_logps
        sums["first/approxkl"] = losses.approx_kl_per_token(logps, sampler)[mask].sum()
        sums["first/ratio_deviation"] = (torch.exp(logps - sampler)[mask] - 1).abs().sum()
    found = {name: torch.stack([value.detach().float(), mask.sum().float()]) for name, value in sums.items()}
    if "value_clipped" in statistics:  # a value function learns from all tokens
        clipped = statistics["value_clipped"][r.mask].sum().float()
        found["val/clipfrac_avg"] = torch.stack([clipped, r.mask.sum().float()])
    return found


def warn_of_another_policy(state: PPOState, update: int, deviation: float) -> None:
    """Once: an inference server samples from another policy than the one that is trained.

    Args:
        deviation: mean of |1 - probability here / probability there| over tokens; of one policy in bfloat16 it is about .01.
    """
    if deviation > ANOTHER_POLICY and "server" not in state.warned:
        state.warned.append("server")
        logger.warning(
            "Update %d: the server of --rollout_url samples from another policy than the one that is trained: probabilities differ by %.0f %%. It "
            "serves another base, or in another type, or without --logprobs-mode processed_logprobs at a --temperature other than 1.",
            update, 100 * deviation,
        )  # fmt: skip


def warn_of_collapse(state: PPOState, update: int, **now: float) -> None:
    """Once each: entropy below 5 %, or answers below 20 %, of the first update's.

    Args:
        now: `entropy` and `length`, means over the update, the same on all devices.
    """
    for name, limit in (("entropy", 0.05), ("length", 0.2)):
        first = state.first.setdefault(name, now[name])
        if now[name] < limit * first and name not in state.warned:
            state.warned.append(name)
            logger.warning(
                "Update %d: the policy has collapsed, mean %s %.3g is below %.0f %% of the first update's %.3g. "
                "Raise --kl_coef or lower --learning_rate.",
                update, name, now[name], 100 * limit, first,
            )  # fmt: skip
