"""Losses of single answers that are labelled good or bad, with no second answer to the prompt beside them; TRL's names and values.

The log-ratio of an answer is log πθ(y)/πref(y); KL is that of answers to other prompts (`UnpairedBatch.kl`).
"""

from typing import Annotated

import torch
from torch import Tensor

from losses.batch import UnpairedBatch
from losses.preference import Beta
from losses.registry import loss

DesirableWeight = Annotated[
    float, "weight of good answers; with the other it balances unequal numbers of both (2402.01306 eq. 8)"
]
UndesirableWeight = Annotated[float, "weight of bad answers"]


@loss(paper="2402.01306", summary="KTO on single answers, good or bad", needs={"mismatched"}, unpaired=True)
def kto(
    batch: UnpairedBatch,
    *,
    beta: Beta = 0.1,
    desirable_weight: DesirableWeight = 1.0,
    undesirable_weight: UndesirableWeight = 1.0,
) -> Tensor:
    """KTO, 2402.01306 eq. 7: 1 - σ(β [log-ratio - KL]) of good answers, 1 - σ(β [KL - log-ratio]) of bad ones.

    Departure: 1. KL is the mean over a micro batch on all devices, as in TRL; the paper's is over its whole batch.
    """
    above = beta * (batch.log_ratio - batch.kl)  # (N,)
    good, bad = 1 - torch.sigmoid(above), 1 - torch.sigmoid(-above)
    return _weighted(batch, good, bad, desirable_weight, undesirable_weight)


@loss(paper="2408.06266", summary="APO-zero on single answers, good or bad", unpaired=True)
def apo_zero_unpaired(
    batch: UnpairedBatch,
    *,
    beta: Beta = 0.1,
    desirable_weight: DesirableWeight = 1.0,
    undesirable_weight: UndesirableWeight = 1.0,
) -> Tensor:
    """APO-zero, 2408.06266 eq. 7, answer by answer: good ones are better than what the model says now, bad ones worse."""
    reward = beta * batch.log_ratio  # (N,)
    return _weighted(batch, 1 - torch.sigmoid(reward), torch.sigmoid(reward), desirable_weight, undesirable_weight)


def _weighted(batch: UnpairedBatch, good: Tensor, bad: Tensor, of_good: float, of_bad: float) -> Tensor:
    """Each answer's loss, (N,), of the two that it would have."""
    if of_good < 0 or of_bad < 0:
        raise ValueError(
            f"--desirable_weight {of_good} and --undesirable_weight {of_bad} weigh losses: neither is below 0."
        )
    return torch.where(batch.desirable, of_good * good, of_bad * bad)
