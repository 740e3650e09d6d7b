"""Reward models."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    """-log σ(r_w - r_l - margin) + c (r_w + r_l)²: (M,) each -> (M,).

    InstructGPT, 2203.02155 eq. 1 (with row_mean for K answers); margin: Llama 2, 2307.09288 eq. 2; centring: 2312.09244
    eq. 2. Margins must be (M,) too: a wider shape would silently broadcast.
    """
    if margin is not None and margin.shape != chosen_rewards.shape:
        raise ValueError(f"margin has shape {tuple(margin.shape)}, the rewards {tuple(chosen_rewards.shape)}.")
    difference = chosen_rewards - rejected_rewards
    loss = -F.logsigmoid(difference if margin is None else difference - margin)
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2
    return loss  # (M,)
