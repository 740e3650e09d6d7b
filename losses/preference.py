"""Preference losses on sequence log-probs, by TRL's names and with TRL 1.16's values, and the predecessor's kto_pair.

Notation: w chosen, l rejected, πθ policy, πref reference, σ logistic function, r(y) = β log πθ(y)/πref(y),
Δ = log πθ(w)/πref(w) - log πθ(l)/πref(l). Numbers such as 2305.18290 are arXiv ids. docs/losses.md compares the losses.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.batch import PreferenceBatch
from losses.registry import loss

# The hyper-parameters that several losses share
Beta = Annotated[float, "strength of the pull to the reference: higher keeps closer to it (IPO's τ)"]
LabelSmoothing = Annotated[
    float, "probability that a preference label is wrong (below 0.5 in robust, above 0 in exo_pair)"
]


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-ε) log σ(z) - ε log σ(-z), any shape: the logistic loss of a preference that is wrong with probability ε."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"--label_smoothing is a probability below 1, not {label_smoothing}.")
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


# ---------------------------------------------------------------------------------------------------------------------
# f-DPO
# ---------------------------------------------------------------------------------------------------------------------


def f_divergence_score(
    logratios: Tensor,
    f_divergence_type: Annotated[
        str, "divergence to the reference: reverse_kl (DPO), forward_kl, js_divergence, alpha_divergence"
    ] = "reverse_kl",
    f_alpha_divergence_coef: Annotated[float, "α of --f_divergence_type alpha_divergence"] = 0.5,
) -> Tensor:
    """The implicit reward of log-ratios log u (any shape) under an f-divergence: f′(u) up to a constant that cancels.

    f-DPO, 2309.16240; reverse_kl is DPO. Raises ValueError for an unknown divergence.
    """
    if f_divergence_type == "reverse_kl":
        return logratios  # log u
    if f_divergence_type == "forward_kl":
        return 1 - torch.exp(-logratios)  # 1 - 1/u
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)  # log 2u/(1+u)
    if f_divergence_type == "alpha_divergence":
        power = f_alpha_divergence_coef - 1
        if abs(power) < 1e-6:
            return logratios  # the limit α → 1
        return torch.expm1((power * logratios).clamp(max=80)) / power  # (u^(α-1) - 1)/(α-1); e^80 still fits float32
    known = "reverse_kl, forward_kl, js_divergence, alpha_divergence"
    raise ValueError(f"Unknown f_divergence_type {f_divergence_type!r}; known are {known}.")


def with_f_divergence(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a loss the hyper-parameters of f_divergence_score, which then maps the log-ratios that the loss reads."""
    own = inspect.signature(function)
    of_score = [*inspect.signature(f_divergence_score).parameters.values()][1:]
    added = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in of_score]

    @functools.wraps(function)
    def under_divergence(batch: PreferenceBatch, **hyperparameters: Any) -> Tensor:
        given = {p.name: hyperparameters.pop(p.name) for p in added if p.name in hyperparameters}
        score = functools.partial(f_divergence_score, **given)
        return function(replace(batch, f_divergence=score), **hyperparameters)

    signature = own.replace(parameters=[*own.parameters.values(), *added])
    under_divergence.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature returns
    return under_divergence


# ---------------------------------------------------------------------------------------------------------------------
# DPO and its relatives
# ---------------------------------------------------------------------------------------------------------------------


@loss(paper="2305.18290", summary="DPO; conservative DPO with label smoothing")
@with_f_divergence
def sigmoid(batch: PreferenceBatch, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> Tensor:
    """DPO, 2305.18290 eq. 7; with label smoothing the conservative DPO of ericmitchell.ai/cdpo.pdf.

    Departure: 1. TRL 1.16 ignores label_smoothing here; we honour it, as TRL 0.8 and the predecessor did.
    """
    ratio = batch.log_ratio  # (M,) each
    return logistic(beta * (ratio.chosen - ratio.rejected), label_smoothing)  # (M,)


@loss(paper="2305.10425", summary="SLiC / RSO hinge on the DPO margin")
@with_f_divergence
def hinge(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """[1 - βΔ]₊, SLiC's calibration loss (2305.10425) on the DPO margin, as RSO (2309.06657) writes it."""
    ratio = batch.log_ratio
    return torch.relu(1 - beta * (ratio.chosen - ratio.rejected))  # (M,)


@loss(paper="2310.12036", summary="squared distance to a fixed margin, length-normalised")
@with_f_divergence
def ipo(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """IPO, 2310.12036 eq. 17, β in the place of τ: (Δ - 1/2β)².

    Departure: 1. each log-ratio is a mean over its answer's tokens, as in TRL on the authors' word (predecessor: sums).
    """
    return (_delta_per_token(batch) - 1 / (2 * beta)) ** 2  # (M,)


@loss(paper="2403.00409", summary="DPO corrected for a known share of flipped labels")
@with_f_divergence
def robust(batch: PreferenceBatch, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> Tensor:
    """Robust DPO, 2403.00409: unbiased when labels are flipped with probability ε < 1/2. May be negative."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"--label_smoothing, the share of flipped pairs, is below 0.5 in robust, not {label_smoothing}."
        )
    ratio = batch.log_ratio
    logits = beta * (ratio.chosen - ratio.rejected)
    clean, flipped = logistic(logits), logistic(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)  # (M,)


@loss(paper="2402.00856", summary="reverse KL to the smoothed label")
@with_f_divergence
def exo_pair(batch: PreferenceBatch, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 1e-3) -> Tensor:
    """EXO-pref for two answers, 2402.00856 eq. 16: KL(policy's preference || label smoothed by ε > 0; paper 1e-3)."""
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo_pair needs --label_smoothing above 0 and below 1 (paper: 1e-3), not {label_smoothing}.")
    ratio = batch.log_ratio
    logits = beta * (ratio.chosen - ratio.rejected)
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing)) + torch.sigmoid(-logits) * (
        F.logsigmoid(-logits) - math.log(label_smoothing)
    )  # (M,)


@loss(paper="2402.05369", summary="noise contrastive: keeps the chosen likelihood up")
def nca_pair(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """NCA for two answers, 2402.05369: raises r(w), lowers both towards 0."""
    ratio = batch.log_ratio
    return (
        -F.logsigmoid(beta * ratio.chosen)
        - 0.5 * F.logsigmoid(-beta * ratio.chosen)
        - 0.5 * F.logsigmoid(-beta * ratio.rejected)
    )  # (M,)


@loss(paper="2404.04656", summary="binary classifier of each answer, no shift")
def bco_pair(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """BCO, 2404.04656, with the reward shift δ = 0, as in TRL 1.16. `mpo` has the running δ."""
    ratio = batch.log_ratio
    return -F.logsigmoid(beta * ratio.chosen) - F.logsigmoid(-beta * ratio.rejected)  # (M,)


@loss(paper="2405.00675", summary="self-play regression to ±1/2β")
def sppo_hard(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """SPPO, 2405.00675 eq. 4.7, with the hard win probabilities 1 and 0."""
    ratio = batch.log_ratio
    return (ratio.chosen - 0.5 / beta) ** 2 + (ratio.rejected + 0.5 / beta) ** 2  # (M,)


@loss(paper="2406.05882", summary="stochastic dominance of sorted margins")
def aot(batch: PreferenceBatch, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> Tensor:
    """AOT, paired, 2406.05882: DPO between sorted margins of policy and reference.

    Element i is about the i-th quantile, not about pair i: the loss depends on the pairs that share a batch. These are
    the pairs of one micro batch on one device: accumulated micro batches are not one larger batch here.
    """
    policy = (batch.policy.chosen - batch.policy.rejected).sort().values  # (M,)
    reference = (batch.ref.chosen - batch.ref.rejected).sort().values
    return logistic(beta * (policy - reference), label_smoothing)


@loss(paper="2406.05882", summary="stochastic dominance of sorted log-ratios")
def aot_unpaired(batch: PreferenceBatch, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> Tensor:
    """AOT, unpaired, 2406.05882: DPO between sorted log-ratios of chosen and rejected.

    Sorts within a micro batch of one device, as aot.
    """
    ratio = batch.log_ratio
    return logistic(beta * (ratio.chosen.sort().values - ratio.rejected.sort().values), label_smoothing)  # (M,)


@loss(paper="2408.06266", summary="anchored: chosen up, rejected down")
def apo_zero(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """APO-zero, 2408.06266 eq. 7: chosen answers are better than what the model says now."""
    ratio = batch.log_ratio
    return 1 - torch.sigmoid(beta * ratio.chosen) + torch.sigmoid(beta * ratio.rejected)  # (M,)


@loss(paper="2408.06266", summary="anchored: both down, rejected more")
def apo_down(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """APO-down, 2408.06266 eq. 8: chosen answers are worse than what the model says now."""
    ratio = batch.log_ratio
    return torch.sigmoid(beta * ratio.chosen) + 1 - torch.sigmoid(beta * (ratio.chosen - ratio.rejected))  # (M,)


@loss(paper="2406.08414", summary="discovered blend of logistic and exponential")
@with_f_divergence
def discopop(
    batch: PreferenceBatch, *, beta: Beta = 0.1, discopop_tau: Annotated[float, "temperature of the blend"] = 0.05
) -> Tensor:
    """DiscoPOP (log-ratio modulated loss), 2406.08414 eq. 5: a blend of logistic and exponential loss."""
    ratio = batch.log_ratio
    logits = beta * (ratio.chosen - ratio.rejected)
    modulation = torch.sigmoid(logits / discopop_tau)
    return (1 - modulation) * logistic(logits) + modulation * torch.exp(-logits)  # (M,)


@loss(paper="2411.15124", summary="DPO on per-token means")
@with_f_divergence
def sigmoid_norm(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """DPO on the mean log-ratio per token (length-normalised DPO of Tülu 3, 2411.15124)."""
    return logistic(beta * _delta_per_token(batch))  # (M,)


@loss(summary="cross-entropy of the chosen answer", reference_free=True)
def sft(batch: PreferenceBatch) -> Tensor:
    """Cross-entropy of the chosen answers, scaled so that the mean over pairs is the mean over all chosen tokens.

    `batch.chosen_tokens_per_pair` makes that all tokens of an optimizer step, of which these pairs may be a part.
    """
    tokens_per_pair = batch.chosen_tokens_per_pair
    if tokens_per_pair is None:
        tokens_per_pair = batch.chosen_lengths.sum().clamp(min=1) / len(batch.chosen_lengths)
    return -batch.policy.chosen / tokens_per_pair  # (M,)


@loss(paper="2405.14734", summary="mean log-prob per token with a margin, no reference", reference_free=True)
def simpo(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    simpo_gamma: Annotated[float, "margin between chosen and rejected rewards (2405.14734's γ)"] = 0.5,
    label_smoothing: LabelSmoothing = 0.0,
) -> Tensor:
    """SimPO, 2405.14734 eq. 6: -log σ(β [log π(w)/|w| - log π(l)/|l|] - γ). TRL's defaults; the paper: β 2 to 2.5, γ 1."""
    chosen, rejected = _per_token(batch)
    return logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)  # (M,)


@loss(paper="2401.08417", summary="DPO without a reference; add sft for the whole of CPO", reference_free=True)
def cpo(batch: PreferenceBatch, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> Tensor:
    """CPO's preference part, 2401.08417 eq. 3: -log σ(β [log π(w) - log π(l)]). The whole is `--loss_type cpo sft`."""
    return logistic(beta * (batch.policy.chosen - batch.policy.rejected), label_smoothing)  # (M,)


@loss(paper="2403.07691", summary="odds ratio, no reference; add sft for the whole of ORPO", reference_free=True)
def orpo(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """ORPO's odds-ratio part, 2403.07691 eq. 7, of mean log-probs per token; β in the place of λ.

    -β log σ(log odds(w) - log odds(l)), odds(y) = p / (1 - p). The whole is `--loss_type sft orpo`.
    """
    chosen, rejected = (side.clamp(max=-1e-7) for side in _per_token(batch))  # odds of certainty are infinite
    log_odds = chosen - rejected - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return -beta * F.logsigmoid(log_odds)  # (M,)


@loss(paper="2402.01306", summary="KTO on pairs, the predecessor's")
def kto_pair(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """KTO on pairs, 2402.01306 eq. 7, as in the predecessor: the KL of one side is estimated from the other.

    The estimate is that of the micro batch, as in the predecessor: accumulated micro batches are not one larger batch.

    Departure: 1. the predecessor returns 2M losses, chosen then rejected; we return the mean of each pair's two, (M,).
    """
    ratio = batch.log_ratio
    chosen_kl = ratio.chosen.mean().clamp(min=0)  # with gradient, as there
    rejected_kl = ratio.rejected.mean().clamp(min=0)
    chosen_losses = 1 - torch.sigmoid(beta * (ratio.chosen - rejected_kl))
    rejected_losses = 1 - torch.sigmoid(beta * (chosen_kl - ratio.rejected))
    return (chosen_losses + rejected_losses) / 2  # (M,)


def _per_token(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Mean log-prob of the policy per token of the chosen and of the rejected answers, (M,) each."""
    policy = batch.policy
    return policy.chosen / batch.chosen_lengths.clamp(min=1), policy.rejected / batch.rejected_lengths.clamp(min=1)


def _delta_per_token(batch: PreferenceBatch) -> Tensor:
    """Δ between the mean log-ratios of both answers' tokens, (M,)."""
    ratio = batch.log_ratio
    return ratio.chosen / batch.chosen_lengths.clamp(min=1) - ratio.rejected / batch.rejected_lengths.clamp(min=1)
