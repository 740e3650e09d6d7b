"""Every objective as a pure function of log-probs, rewards and values: tensors in, one loss per pair out, no reduction.

    per_pair = get_loss("sigmoid")(PreferenceBatch(...), beta=0.1)  # (M,)
    total, parts = preference_loss(batch, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], vars(args))  # (M,), {...}

To add a loss: write `def my_loss(batch, *, beta=0.1, my_gamma=2.0)`, register it in LOSSES with what it needs, and
describe `my_gamma` in FLAGS. Its keyword-only arguments are its hyper-parameters and, by name, flags of train_dpo.py.

Notation of the comments: v image, q prompt, w chosen, l rejected, πθ policy, πref reference, σ logistic,
r(y) = β log πθ(y)/πref(y), Δ = log πθ(w)/πref(w) - log πθ(l)/πref(l). Shapes: M pairs, T answer tokens, B rollouts.
Numbers such as 2305.18290 are arXiv ids. docs/losses.md compares the losses.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# What a preference loss reads
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """M pairs as policy and reference see them. The first block is always there, the others only if a loss needs them.

    Log-probs are natural logarithms, summed over the answer's tokens (its end token included) unless named per_token.
    Gradients flow through what has no `ref_` in front. Reference fields stay None if all losses are reference-free.
    """

    chosen_logps: Tensor  # (M,) log πθ(w|v,q)
    rejected_logps: Tensor  # (M,) log πθ(l|v,q)
    chosen_lengths: Tensor  # (M,) answer tokens
    rejected_lengths: Tensor  # (M,)
    ref_chosen_logps: Tensor | None = None  # (M,) log πref(w|v,q)
    ref_rejected_logps: Tensor | None = None  # (M,)

    # per_token: the same before summation; anything may stand where the mask is False
    chosen_per_token_logps: Tensor | None = None  # (M, T)
    rejected_per_token_logps: Tensor | None = None  # (M, T')
    ref_chosen_per_token_logps: Tensor | None = None  # (M, T)
    ref_rejected_per_token_logps: Tensor | None = None  # (M, T')
    chosen_mask: Tensor | None = None  # (M, T) bool, True on answer tokens
    rejected_mask: Tensor | None = None  # (M, T')

    # changed_tokens: what differs between the two answers, see changed_tokens()
    chosen_changed: Tensor | None = None  # (M, T) bool
    rejected_changed: Tensor | None = None  # (M, T')

    # corrupted_image: v′, one and the same draw for policy and reference
    corrupted_chosen_logps: Tensor | None = None  # (M,) log πθ(w|v′,q)
    ref_corrupted_chosen_logps: Tensor | None = None  # (M,)

    # corrupted_image_per_token
    corrupted_chosen_per_token_logps: Tensor | None = None  # (M, T)
    ref_corrupted_chosen_per_token_logps: Tensor | None = None  # (M, T)

    # logit_shift: s = logit(y_t|v) - logit(y_t|v′), raw logits of the answer's own tokens
    chosen_logit_shift: Tensor | None = None  # (M, T) policy, with gradient
    rejected_logit_shift: Tensor | None = None  # (M, T')
    ref_chosen_logit_shift: Tensor | None = None  # (M, T)
    ref_rejected_logit_shift: Tensor | None = None  # (M, T')

    # text_only: the image left out; never carries a gradient
    text_only_chosen_logps: Tensor | None = None  # (M,) log π(w|q)
    text_only_rejected_logps: Tensor | None = None  # (M,)

    # token_kl: sum over answer tokens of KL(πref || πθ) over the whole vocabulary, see token_kl()
    chosen_token_kl: Tensor | None = None  # (M,)
    rejected_token_kl: Tensor | None = None  # (M,)

    # image_rejected: a second, similar image from the data
    image_rejected_chosen_logps: Tensor | None = None  # (M,) log πθ(w|v_r,q)
    ref_image_rejected_chosen_logps: Tensor | None = None  # (M,)

    # policy_negative: ŷ = argmax tokens of the policy on v′ under the chosen answer's teacher forcing, scored on v
    negative_logps: Tensor | None = None  # (M,) log πθ(ŷ|v,q,w)
    ref_negative_logps: Tensor | None = None  # (M,)

    # columns
    rejected_severity: Tensor | None = None  # (M,) how bad the rejected answer's errors are
    margin: Tensor | None = None  # (M,) reward(w) - reward(l) of an outside judge

    # running_delta: mean reward so far, kept by the trainer, see update_running_mean()
    running_delta: Tensor | None = None  # ()


class Need(NamedTuple):
    """Something a loss reads beyond the first block of PreferenceBatch."""

    fields: tuple[str, ...]  # of PreferenceBatch
    help: str  # what the trainer runs or reads for it
    column: str | None = None  # the data column that it comes from


NEEDS: dict[str, Need] = {
    "per_token": Need(
        (
            "chosen_per_token_logps",
            "rejected_per_token_logps",
            "ref_chosen_per_token_logps",
            "ref_rejected_per_token_logps",
            "chosen_mask",
            "rejected_mask",
        ),
        "log-probs per token, of the reference too",
    ),
    "changed_tokens": Need(("chosen_changed", "rejected_changed"), "a diff of the two answers' token ids"),
    "corrupted_image": Need(
        ("corrupted_chosen_logps", "ref_corrupted_chosen_logps"), "the chosen answer on a corrupted image"
    ),
    "corrupted_image_per_token": Need(
        ("corrupted_chosen_per_token_logps", "ref_corrupted_chosen_per_token_logps"), "the same per token"
    ),
    "logit_shift": Need(
        ("chosen_logit_shift", "rejected_logit_shift", "ref_chosen_logit_shift", "ref_rejected_logit_shift"),
        "the raw logit of every answer token on the image and on a corrupted one",
    ),
    "text_only": Need(
        ("text_only_chosen_logps", "text_only_rejected_logps"), "both answers without the image, without gradient"
    ),
    "token_kl": Need(("chosen_token_kl", "rejected_token_kl"), "both models' logits over the whole vocabulary"),
    "image_rejected": Need(
        ("image_rejected_chosen_logps", "ref_image_rejected_chosen_logps"),
        "the chosen answer on a second image of the row",
        column="image_rejected",
    ),
    "policy_negative": Need(
        ("negative_logps", "ref_negative_logps"), "the policy's own argmax tokens on a corrupted image"
    ),
    "severity": Need(("rejected_severity",), "a number per response", column="severity"),
    "margin": Need(("margin",), "a number per pair", column="margin"),
    "running_delta": Need(("running_delta",), "the running mean of the rewards of both answers"),
}


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what the trainer must know about it before the first step."""

    function: Callable[..., Tensor]
    summary: str
    needs: frozenset[str] = frozenset()  # keys of NEEDS
    corruption: str | None = None  # how the paper makes v′: "crop" or "diffusion"
    reference_free: bool = False  # reads no ref_ field
    cacheable: bool = True  # asks the reference the same at every step, so --precompute_ref_log_probs works

    @property
    def hyperparameters(self) -> dict[str, object]:
        """Name and default of each: the keyword-only arguments of the function."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def required_fields(self) -> tuple[str, ...]:
        """The optional fields of PreferenceBatch that this loss reads."""
        reference = () if self.reference_free else ("ref_chosen_logps", "ref_rejected_logps")
        return (*reference, *(field for need in sorted(self.needs) for field in NEEDS[need].fields))

    def __call__(self, batch: PreferenceBatch, **hyperparameters: object) -> Tensor:
        """Loss of each pair, (M,). Raises ValueError if the batch lacks something that the loss reads."""
        missing = [name for name in self.required_fields if getattr(batch, name) is None]
        if missing:
            raise ValueError(f"Loss {self.function.__name__} reads {', '.join(missing)}, not in the batch.")
        return self.function(batch, **hyperparameters)


# ---------------------------------------------------------------------------------------------------------------------
# Reductions: a loss is per pair or per token, and one of these makes it a number
# ---------------------------------------------------------------------------------------------------------------------


def sample_mean(per_sample: Tensor, num_samples: Tensor | float | None = None) -> Tensor:
    """Mean over samples, (N,) -> ().

    num_samples: divide by this instead of N. With the mean count of all shards (ranks, accumulation steps), the
    shards' results average to the mean over all samples, however unequal the shards are.
    """
    return per_sample.sum() / (per_sample.numel() if num_samples is None else num_samples)


def token_mean(per_token: Tensor, mask: Tensor, num_tokens: Tensor | float | None = None) -> Tensor:
    """Mean over the tokens that the mask keeps, (..., T) and bool mask -> (). num_tokens: as in sample_mean."""
    return torch.where(mask, per_token, 0).sum() / (mask.sum() if num_tokens is None else num_tokens)


def row_mean(per_pair: Tensor, pair_rows: Tensor) -> Tensor:
    """Mean over the pairs of each row that has any, in the order of the rows: (M,), row of each pair (M,) -> (rows,).

    With all ordered pairs of K responses this is the 1/(K choose 2) of InstructGPT (2203.02155 eq. 1): a row counts
    once, however many pairs it gives.
    """
    rows, index, counts = torch.unique(pair_rows, return_inverse=True, return_counts=True)
    return per_pair.new_zeros(len(rows)).index_add(0, index, per_pair) / counts


# ---------------------------------------------------------------------------------------------------------------------
# Preference losses on sequence log-probs, by TRL's names and with TRL 1.16's values
# ---------------------------------------------------------------------------------------------------------------------


def f_divergence_score(logratios: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float) -> Tensor:
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


def _logratios(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """log πθ/πref of chosen and rejected, (M,) each."""
    return batch.chosen_logps - batch.ref_chosen_logps, batch.rejected_logps - batch.ref_rejected_logps


def _scores(batch: PreferenceBatch, f_divergence_type: str, f_alpha_divergence_coef: float) -> tuple[Tensor, Tensor]:
    """The same under an f-divergence, (M,) each."""
    chosen, rejected = _logratios(batch)
    return (
        f_divergence_score(chosen, f_divergence_type, f_alpha_divergence_coef),
        f_divergence_score(rejected, f_divergence_type, f_alpha_divergence_coef),
    )


def implicit_rewards(batch: PreferenceBatch, beta: float) -> tuple[Tensor, Tensor]:
    """r(w) and r(l), (M,) each, without gradient: what `rewards/chosen` and `rewards/rejected` log."""
    chosen, rejected = _logratios(batch)
    return (beta * chosen).detach(), (beta * rejected).detach()


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-ε) log σ(z) - ε log σ(-z), any shape: the logistic loss of a preference that is wrong with probability ε."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """DPO, 2305.18290 eq. 7; with label smoothing the conservative DPO of ericmitchell.ai/cdpo.pdf.

    Departure: 1. TRL 1.16 ignores label_smoothing here; we honour it, as TRL 0.8 and the predecessor did.
    """
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)  # (M,), (M,)
    return logistic(beta * (chosen - rejected), label_smoothing)  # (M,)


def sigmoid_norm(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """DPO on the mean log-ratio per token (length-normalised DPO of Tülu 3, 2411.15124)."""
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)
    delta = chosen / batch.chosen_lengths.clamp(min=1) - rejected / batch.rejected_lengths.clamp(min=1)  # (M,)
    return logistic(beta * delta)


def hinge(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """[1 - βΔ]₊, SLiC's calibration loss (2305.10425) on the DPO margin, as RSO (2309.06657) writes it."""
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)
    return torch.relu(1 - beta * (chosen - rejected))  # (M,)


def ipo(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """IPO, 2310.12036 eq. 17, β in the place of τ: (Δ - 1/2β)².

    Departure: 1. each log-ratio is a mean over its answer's tokens, as in TRL on the authors' word (predecessor: sums).
    """
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)
    delta = chosen / batch.chosen_lengths.clamp(min=1) - rejected / batch.rejected_lengths.clamp(min=1)  # (M,)
    return (delta - 1 / (2 * beta)) ** 2  # (M,)


def robust(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """Robust DPO, 2403.00409: unbiased when labels are flipped with probability ε < 1/2. May be negative."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"Loss robust needs 0 <= label_smoothing < 0.5, the share of flipped pairs, not {label_smoothing}."
        )
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)
    logits = beta * (chosen - rejected)
    clean, flipped = logistic(logits), logistic(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)  # (M,)


def exo_pair(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """EXO-pref for two answers, 2402.00856 eq. 16: KL(policy's preference || label smoothed by ε > 0; paper 1e-3)."""
    if not 0 < label_smoothing < 1:
        raise ValueError(f"Loss exo_pair needs 0 < label_smoothing < 1 (paper: 1e-3), not {label_smoothing}.")
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)
    logits = beta * (chosen - rejected)
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing)) + torch.sigmoid(-logits) * (
        F.logsigmoid(-logits) - math.log(label_smoothing)
    )  # (M,)


def nca_pair(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """NCA for two answers, 2402.05369: raises r(w), lowers both towards 0."""
    chosen, rejected = _logratios(batch)
    return (
        -F.logsigmoid(beta * chosen) - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)
    )  # (M,)


def bco_pair(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """BCO, 2404.04656, with the reward shift δ = 0, as in TRL 1.16. `mpo` has the running δ."""
    chosen, rejected = _logratios(batch)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)  # (M,)


def sppo_hard(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """SPPO, 2405.00675 eq. 4.7, with the hard win probabilities 1 and 0."""
    chosen, rejected = _logratios(batch)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2  # (M,)


def aot(batch: PreferenceBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired, 2406.05882: DPO between sorted margins of policy and reference.

    Element i is about the i-th quantile, not about pair i: the loss depends on the pairs that share a batch.
    """
    policy = (batch.chosen_logps - batch.rejected_logps).sort().values  # (M,)
    reference = (batch.ref_chosen_logps - batch.ref_rejected_logps).sort().values
    return logistic(beta * (policy - reference), label_smoothing)


def aot_unpaired(batch: PreferenceBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired, 2406.05882: DPO between sorted log-ratios of chosen and rejected. Depends on the batch, as aot."""
    chosen, rejected = _logratios(batch)
    return logistic(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)  # (M,)


def apo_zero(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """APO-zero, 2408.06266 eq. 7: chosen answers are better than what the model says now."""
    chosen, rejected = _logratios(batch)
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)  # (M,)


def apo_down(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """APO-down, 2408.06266 eq. 8: chosen answers are worse than what the model says now."""
    chosen, rejected = _logratios(batch)
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))  # (M,)


def discopop(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """DiscoPOP (log-ratio modulated loss), 2406.08414 eq. 5: a blend of logistic and exponential loss."""
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)
    logits = beta * (chosen - rejected)
    modulation = torch.sigmoid(logits / discopop_tau)
    return (1 - modulation) * logistic(logits) + modulation * torch.exp(-logits)  # (M,)


def sft(batch: PreferenceBatch) -> Tensor:
    """Cross-entropy of the chosen answers, scaled so that the mean over pairs is the mean over all chosen tokens."""
    tokens_per_pair = batch.chosen_lengths.sum().clamp(min=1) / len(batch.chosen_lengths)
    return -batch.chosen_logps / tokens_per_pair  # (M,)


def kto_pair(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """KTO on pairs, 2402.01306 eq. 7, as in the predecessor: the KL of one side is estimated from the other.

    Departure: 1. the predecessor returns 2M losses, chosen then rejected; we return the mean of each pair's two, (M,).
    """
    chosen, rejected = _logratios(batch)
    chosen_kl, rejected_kl = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)  # with gradient, as there
    chosen_losses = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    rejected_losses = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return (chosen_losses + rejected_losses) / 2  # (M,)


# ---------------------------------------------------------------------------------------------------------------------
# Preference losses for vision-language models
# ---------------------------------------------------------------------------------------------------------------------


def changed_tokens(
    chosen_ids: Sequence[int], rejected_ids: Sequence[int], context: Sequence[int] = (), min_match: int = 3
) -> tuple[list[bool], list[bool]]:
    """Which tokens of two answers differ, for DDPO: (len(chosen),) and (len(rejected),) flags.

    As RLHF-V's code: difflib's matching blocks of at least min_match tokens are unchanged, a stretch between them is
    changed if it is non-empty on both sides. So pure insertions and deletions, and equal answers, mark nothing.

    context: ids that stand before both answers. RLHF-V diffs prompt + answer, where the prompt's end can complete a
        match of min_match tokens with the answer's first ones; without context the answers stand on their own.
    """
    skip = len(context)
    # difflib is not symmetric: RLHF-V asks for rejected against chosen.
    matcher = SequenceMatcher(None, [*context, *rejected_ids], [*context, *chosen_ids])
    chosen_changed, rejected_changed = [False] * len(chosen_ids), [False] * len(rejected_ids)
    rejected_at = chosen_at = 0  # end of the last match
    for block in matcher.get_matching_blocks():  # ends with an empty block at the end of both
        at_end = block.size == 0
        if block.size < min_match and not at_end:
            continue
        if block.a > rejected_at and block.b > chosen_at:
            for i in range(max(rejected_at, skip), block.a):
                rejected_changed[i - skip] = True
            for i in range(max(chosen_at, skip), block.b):
                chosen_changed[i - skip] = True
        rejected_at, chosen_at = block.a + block.size, block.b + block.size
    return chosen_changed, rejected_changed


def segment_weights(
    mask: Tensor, changed: Tensor, gamma: float, changed_only: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """DDPO's weight of each token, (M, T) bool masks -> (M, T): γ where changed, 1 (or 0) elsewhere, 0 on padding."""
    weights = torch.where(changed, gamma, 0.0 if changed_only else 1.0).to(dtype or torch.get_default_dtype())
    return weights * mask


def weighted_logps(per_token_logps: Tensor, weights: Tensor, average: bool) -> Tensor:
    """Σ_t weight_t log p_t, divided by Σ_t weight_t if average: (M, T), (M, T) -> (M,). All weights 0 give 0."""
    score = torch.where(weights > 0, per_token_logps * weights, 0).sum(-1)
    total = weights.sum(-1)
    return score / torch.where(total > 0, total, 1) if average else score


def ddpo(
    batch: PreferenceBatch,
    *,
    beta: float = 0.1,
    ddpo_gamma: float = 5.0,
    ddpo_average: bool = True,
    ddpo_changed_only: bool = False,
) -> Tensor:
    """Dense DPO of RLHF-V, 2312.00849 eq. 5: DPO on sequence scores that weigh changed tokens by γ.

    Presets (gamma, average, changed_only): the paper 5, True, False with β 0.5; its authors' code 3, False, False;
    the predecessor 1, False, True.
    """
    scores = []
    for policy, reference, mask, changed in (
        (batch.chosen_per_token_logps, batch.ref_chosen_per_token_logps, batch.chosen_mask, batch.chosen_changed),
        (
            batch.rejected_per_token_logps,
            batch.ref_rejected_per_token_logps,
            batch.rejected_mask,
            batch.rejected_changed,
        ),
    ):
        weights = segment_weights(mask, changed, ddpo_gamma, ddpo_changed_only, policy.dtype)  # (M, T)
        scores.append(weighted_logps(policy, weights, ddpo_average) - weighted_logps(reference, weights, ddpo_average))
    return logistic(beta * (scores[0] - scores[1]))  # (M,)


def mdpo(batch: PreferenceBatch, *, beta: float = 0.1, mdpo_delta: float = 0.0) -> Tensor:
    """mDPO, 2406.11839: DPO + the chosen answer preferred on its image over a cropped one + r(w) anchored above δ.

    Departure: 1. v′ is one crop for policy and reference; the authors' code crops anew in every forward.
    """
    chosen, rejected = _logratios(batch)
    corrupted = batch.corrupted_chosen_logps - batch.ref_corrupted_chosen_logps  # (M,)
    return (
        logistic(beta * (chosen - rejected))  # response preference
        + logistic(beta * (chosen - corrupted))  # image preference
        + logistic(beta * chosen - mdpo_delta)  # anchor
    )  # (M,)


def mpo(
    batch: PreferenceBatch, *, beta: float = 0.1, mpo_wp: float = 0.8, mpo_wq: float = 0.2, mpo_wg: float = 1.0
) -> Tensor:
    """MPO of InternVL, 2411.10442: w_p preference (DPO) + w_q quality (BCO with running δ) + w_g SFT.

    With δ = 0 it is TRL's mixture `--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0`.
    """
    chosen, rejected = _logratios(batch)
    delta = batch.running_delta
    quality = -F.logsigmoid(beta * chosen - delta) - F.logsigmoid(-(beta * rejected - delta))
    return mpo_wp * logistic(beta * (chosen - rejected)) + mpo_wq * quality + mpo_wg * sft(batch)  # (M,)


def update_running_mean(mean: Tensor, count: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and count of all values so far after some more: (), (), any shape -> (), (). Starts from zeros.

    MPO's δ: feed the implicit rewards of both sides of the batch (of all ranks) before the loss, so δ includes them.
    """
    new_count = count + values.numel()
    return mean + (values.detach().mean() - mean) * values.numel() / new_count, new_count


def token_kl(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(πref || πθ) of the next token over the whole vocabulary: (N, V), (N, V) -> (N,). TDPO, 2404.11999."""
    ref_logps = ref_logits.log_softmax(-1)
    return (ref_logps.exp() * (ref_logps - logits.log_softmax(-1))).sum(-1)


def chip(batch: PreferenceBatch, *, beta: float = 0.1, chip_gamma: float = 4.0, chip_alpha: float = 0.1) -> Tensor:
    """CHiP, 2501.16629, as its code: one sigmoid over segment-weighted, visual and token-level preference.

    -log σ(β{Δ_γ + [w on v over w on v′]_γ - α(KL_l - stopgrad KL_w)}), sums (not means) of log-probs with weight γ on
    changed tokens; γ is 4 in the authors' script for LLaVA-1.6, 2 in the one for Muffin.

    Departures: 1. the paper adds up the four levels as losses of their own. 2. The authors' code weighs the reference's
    log-prob on v′ after summing it over tokens, which shifts the logit by a constant; we weigh it per token.
    """
    chosen_weights = segment_weights(
        batch.chosen_mask, batch.chosen_changed, chip_gamma, False, batch.chosen_per_token_logps.dtype
    )  # (M, T)
    rejected_weights = segment_weights(
        batch.rejected_mask, batch.rejected_changed, chip_gamma, False, batch.rejected_per_token_logps.dtype
    )

    def logratio(policy: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
        return weighted_logps(policy, weights, False) - weighted_logps(reference, weights, False)  # (M,)

    chosen = logratio(batch.chosen_per_token_logps, batch.ref_chosen_per_token_logps, chosen_weights)
    rejected = logratio(batch.rejected_per_token_logps, batch.ref_rejected_per_token_logps, rejected_weights)
    corrupted = logratio(
        batch.corrupted_chosen_per_token_logps, batch.ref_corrupted_chosen_per_token_logps, chosen_weights
    )
    token_level = batch.rejected_token_kl - batch.chosen_token_kl.detach()  # TDPO2, 2404.11999
    return logistic(beta * ((chosen - rejected) + (chosen - corrupted) - chip_alpha * token_level))  # (M,)


def vdpo(batch: PreferenceBatch, *, beta: float = 0.1, vdpo_gamma: float = 2.0) -> Tensor:
    """V-DPO, 2411.02712: DPO on guided scores ŝ(y) = γ log πθ(y|v) - (γ-1) log π(y|no image), γ > 1 guides.

    Departures: 1. γ = 2 is our choice: the published script's 0 leaves no gradient, 1 is DPO. 2. The text-only term has
    no gradient, as in the code; it is a pass without the image, where the code blackens the pixels.
    """
    chosen = vdpo_gamma * batch.chosen_logps - (vdpo_gamma - 1) * batch.text_only_chosen_logps.detach()
    rejected = vdpo_gamma * batch.rejected_logps - (vdpo_gamma - 1) * batch.text_only_rejected_logps.detach()
    return logistic(beta * ((chosen - batch.ref_chosen_logps) - (rejected - batch.ref_rejected_logps)))  # (M,)


def hsa(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """HSA-DPO, 2404.14233: DPO whose rejected log-ratio is scaled by the severity of its hallucinations."""
    chosen, rejected = _logratios(batch)
    return logistic(beta * (chosen - batch.rejected_severity * rejected))  # (M,)


def rdpo(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """rDPO of Re-Align, 2502.13146: DPO + the chosen answer preferred on its image over a retrieved similar one.

    Departure: 1. both terms score the given answers, as the paper says; the code scores argmax tokens in their place.
    """
    chosen, rejected = _logratios(batch)
    other_image = batch.image_rejected_chosen_logps - batch.ref_image_rejected_chosen_logps  # (M,)
    return logistic(beta * (chosen - rejected)) + logistic(beta * (chosen - other_image))  # (M,)


def mmdpo(
    batch: PreferenceBatch, *, beta: float = 0.1, mmdpo_w: float = 0.1, mmdpo_k: float = 0.5, mmdpo_gamma: float = 0.25
) -> Tensor:
    """MM-DPO of MM-RLHF, 2502.10391: DPO with β(δ) = β(1 + w(1 - exp(-kδ))), δ the reward margin, plus γ SFT.

    β(δ) is kept above 1e-3, as in the code, which matters only for pairs that the judge ranks the other way round.
    """
    chosen, rejected = _logratios(batch)
    scaled_beta = (beta * (1 + mmdpo_w * -torch.expm1(-mmdpo_k * batch.margin))).clamp(min=1e-3)  # (M,)
    return logistic(scaled_beta * (chosen - rejected)) + mmdpo_gamma * sft(batch)  # (M,)


def tpo_token(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """Token preference optimisation with visual-anchored rewards, 2412.14487 (alibaba/TPO; not TRL's "tpo").

    p_t is multiplied by c_t: σ(s_t) + 1/2 in the chosen, 3/2 - σ(s_t) in the rejected answer, where s_t is how much the
    image raises the token's logit. Policy and reference have their own s, and the policy's carries a gradient.
    """

    def score(logps: Tensor, calibration: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, logps + calibration.log(), 0).sum(-1)  # (M,)

    chosen = score(
        batch.chosen_per_token_logps, torch.sigmoid(batch.chosen_logit_shift) + 0.5, batch.chosen_mask
    ) - score(batch.ref_chosen_per_token_logps, torch.sigmoid(batch.ref_chosen_logit_shift) + 0.5, batch.chosen_mask)
    rejected = score(
        batch.rejected_per_token_logps, 1.5 - torch.sigmoid(batch.rejected_logit_shift), batch.rejected_mask
    ) - score(
        batch.ref_rejected_per_token_logps, 1.5 - torch.sigmoid(batch.ref_rejected_logit_shift), batch.rejected_mask
    )
    return logistic(beta * (chosen - rejected))  # (M,)


def povid(batch: PreferenceBatch, *, beta: float = 0.1) -> Tensor:
    """POVID, second stage, 2402.11411: ½ DPO(w over l) + ½ DPO(w over ŷ), ŷ what the policy says to noise.

    Departure: 1. policy and reference score the same ŷ; in the code the reference draws its own.
    """
    chosen, rejected = _logratios(batch)
    negative = batch.negative_logps - batch.ref_negative_logps  # (M,)
    return 0.5 * logistic(beta * (chosen - rejected)) + 0.5 * logistic(beta * (chosen - negative))  # (M,)


# ---------------------------------------------------------------------------------------------------------------------
# The registry: --loss_type, --loss_weights and the hyper-parameters
# ---------------------------------------------------------------------------------------------------------------------


def _needs(*names: str) -> frozenset[str]:
    return frozenset(names)


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, "DPO; conservative DPO with label smoothing"),
    "hinge": PreferenceLoss(hinge, "SLiC / RSO hinge on the DPO margin"),
    "ipo": PreferenceLoss(ipo, "squared distance to a fixed margin, length-normalised"),
    "robust": PreferenceLoss(robust, "DPO corrected for a known share of flipped labels"),
    "exo_pair": PreferenceLoss(exo_pair, "reverse KL to the smoothed label"),
    "nca_pair": PreferenceLoss(nca_pair, "noise contrastive: keeps the chosen likelihood up"),
    "bco_pair": PreferenceLoss(bco_pair, "binary classifier of each answer, no shift"),
    "sppo_hard": PreferenceLoss(sppo_hard, "self-play regression to ±1/2β"),
    "aot": PreferenceLoss(aot, "stochastic dominance of sorted margins"),
    "aot_unpaired": PreferenceLoss(aot_unpaired, "stochastic dominance of sorted log-ratios"),
    "apo_zero": PreferenceLoss(apo_zero, "anchored: chosen up, rejected down"),
    "apo_down": PreferenceLoss(apo_down, "anchored: both down, rejected more"),
    "discopop": PreferenceLoss(discopop, "discovered blend of logistic and exponential"),
    "sigmoid_norm": PreferenceLoss(sigmoid_norm, "DPO on per-token means"),
    "sft": PreferenceLoss(sft, "cross-entropy of the chosen answer", reference_free=True),
    "kto_pair": PreferenceLoss(kto_pair, "KTO on pairs, the predecessor's"),
    "ddpo": PreferenceLoss(ddpo, "DPO that weighs changed segments (RLHF-V)", _needs("per_token", "changed_tokens")),
    "mdpo": PreferenceLoss(
        mdpo, "DPO + image preference + anchor", _needs("corrupted_image"), corruption="crop", cacheable=False
    ),
    "mpo": PreferenceLoss(mpo, "DPO + BCO with running shift + SFT (InternVL)", _needs("running_delta")),
    "chip": PreferenceLoss(
        chip,
        "segment, image and token levels in one sigmoid",
        _needs("per_token", "changed_tokens", "corrupted_image_per_token", "token_kl"),
        corruption="diffusion",
        cacheable=False,
    ),
    "vdpo": PreferenceLoss(vdpo, "DPO on scores guided away from the text-only model", _needs("text_only")),
    "hsa": PreferenceLoss(hsa, "DPO scaled by the rejected answer's severity", _needs("severity")),
    "rdpo": PreferenceLoss(rdpo, "DPO + preference over a retrieved image", _needs("image_rejected")),
    "mmdpo": PreferenceLoss(mmdpo, "DPO with β by reward margin, + SFT", _needs("margin")),
    "tpo_token": PreferenceLoss(
        tpo_token,
        "DPO with tokens weighed by what the image does for them",
        _needs("per_token", "logit_shift"),
        corruption="diffusion",
        cacheable=False,
    ),
    "povid": PreferenceLoss(
        povid,
        "DPO + preference over what the policy says on noise",
        _needs("policy_negative"),
        corruption="diffusion",
        cacheable=False,
    ),
}


class Flag(NamedTuple):
    """A hyper-parameter as a command-line flag."""

    type: type
    default: object
    help: str


FLAGS: dict[str, Flag] = {
    "beta": Flag(float, 0.1, "strength of the pull to the reference: higher keeps closer to it (IPO's τ)"),
    "label_smoothing": Flag(
        float, 0.0, "probability that a preference label is wrong: sigmoid, robust (< 0.5), exo_pair (> 0), aot"
    ),
    "f_divergence_type": Flag(
        str, "reverse_kl", "divergence to the reference: reverse_kl (DPO), forward_kl, js_divergence, alpha_divergence"
    ),
    "f_alpha_divergence_coef": Flag(float, 0.5, "α of --f_divergence_type alpha_divergence"),
    "discopop_tau": Flag(float, 0.05, "discopop: temperature of the blend"),
    "ddpo_gamma": Flag(float, 5.0, "ddpo: weight of changed tokens (paper 5, its code 3, predecessor 1)"),
    "ddpo_average": Flag(bool, True, "ddpo: divide by the sum of weights (paper) or not (its code, predecessor)"),
    "ddpo_changed_only": Flag(bool, False, "ddpo: leave unchanged tokens out altogether (predecessor)"),
    "mdpo_delta": Flag(float, 0.0, "mdpo: reward that the chosen answer is anchored above"),
    "mpo_wp": Flag(float, 0.8, "mpo: weight of the preference loss"),
    "mpo_wq": Flag(float, 0.2, "mpo: weight of the quality loss"),
    "mpo_wg": Flag(float, 1.0, "mpo: weight of the generation loss"),
    "chip_gamma": Flag(float, 4.0, "chip: weight of changed tokens (authors: 4 for LLaVA-1.6, 2 for Muffin)"),
    "chip_alpha": Flag(float, 0.1, "chip: weight of the token-level KL difference"),
    "vdpo_gamma": Flag(float, 2.0, "vdpo: guidance towards the image; 1 is DPO"),
    "mmdpo_w": Flag(float, 0.1, "mmdpo: how much the reward margin may raise β"),
    "mmdpo_k": Flag(float, 0.5, "mmdpo: how fast it does so"),
    "mmdpo_gamma": Flag(float, 0.25, "mmdpo: weight of the SFT term"),
}


def get_loss(name: str) -> PreferenceLoss:
    """The loss of that name. Raises ValueError, naming the known ones."""
    if name not in LOSSES:
        raise ValueError(f"Unknown loss_type {name!r}; known are {', '.join(LOSSES)}.")
    return LOSSES[name]


def combine(losses: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Weighted sum of losses of one shape. Without weights each counts 1, TRL's convention: they need not sum to 1."""
    weights = [1.0] * len(losses) if weights is None else weights
    if len(weights) != len(losses):
        raise ValueError(f"loss_weights has {len(weights)} values for {len(losses)} losses; give one for each loss.")
    return sum((weight * loss for weight, loss in zip(weights, losses, strict=True)), torch.zeros_like(losses[0]))


def preference_loss(
    batch: PreferenceBatch,
    loss_types: Sequence[str],
    loss_weights: Sequence[float] | None = None,
    hyperparameters: Mapping[str, object] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture (M,) and its unweighted parts {name: (M,)}. Each loss picks its hyper-parameters by name."""
    given = hyperparameters or {}
    parts = {}
    for name in loss_types:
        loss = get_loss(name)
        parts[name] = loss(batch, **{key: given[key] for key in loss.hyperparameters if key in given})
    return combine(list(parts.values()), loss_weights), parts


def needs_of(loss_types: Sequence[str]) -> frozenset[str]:
    """Everything that a mixture reads beyond plain log-probs: keys of NEEDS."""
    return frozenset().union(*(get_loss(name).needs for name in loss_types))


def check_losses(
    loss_types: Sequence[str],
    loss_weights: Sequence[float] | None,
    hyperparameters: Mapping[str, object],
    columns: Collection[str] | None = None,
    precompute_ref_log_probs: bool = False,
) -> None:
    """Raise ValueError, in one sentence, for a mixture that cannot run or a flag that would do nothing.

    Args:
        hyperparameters: flags by name; others than those of FLAGS are ignored.
        columns: the data set's columns; None checks all the rest, so that it can be done before the data is read.
    """
    losses = {name: get_loss(name) for name in loss_types}
    if len(losses) < max(1, len(loss_types)):
        raise ValueError(f"loss_type must name each loss once and at least one, not {' '.join(loss_types) or 'none'}.")
    if loss_weights is not None and len(loss_weights) != len(losses):
        raise ValueError(
            f"loss_weights has {len(loss_weights)} values for {len(losses)} losses; give one for each loss."
        )
    for name, flag in FLAGS.items():
        readers = [key for key, loss in losses.items() if name in loss.hyperparameters]
        if hyperparameters.get(name, flag.default) != flag.default and not readers:
            users = ", ".join(key for key, loss in LOSSES.items() if name in loss.hyperparameters)
            raise ValueError(f"--{name} does nothing with --loss_type {' '.join(losses)}: it belongs to {users}.")
    smoothing = hyperparameters.get("label_smoothing", 0.0)
    if not 0 <= smoothing < (0.5 if "robust" in losses else 1):
        raise ValueError(f"--label_smoothing is a probability (below 0.5 for robust), not {smoothing}.")
    if "exo_pair" in losses and smoothing == 0:
        raise ValueError("--loss_type exo_pair needs --label_smoothing above 0 (paper: 1e-3).")
    f_divergence_score(torch.zeros(()), hyperparameters.get("f_divergence_type", "reverse_kl"), 0.5)
    for name, loss in losses.items():
        if precompute_ref_log_probs and not loss.cacheable:
            raise ValueError(
                f"--precompute_ref_log_probs cannot serve --loss_type {name}: what it asks of the reference changes "
                "from step to step. Leave the flag out."
            )
        for need in sorted(loss.needs):
            column = NEEDS[need].column
            if columns is not None and column is not None and column not in columns:
                raise ValueError(
                    f"--loss_type {name} reads the column {column!r}; the data has {', '.join(sorted(columns))}."
                )


# ---------------------------------------------------------------------------------------------------------------------
# Reward models
# ---------------------------------------------------------------------------------------------------------------------


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


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """TRL's names: accuracy (ties are wrong), margin, min/mean/max_reward of both sides; (M,), (M,) -> scalars."""
    both = torch.cat([chosen_rewards, rejected_rewards]).detach()
    return {
        "accuracy": (chosen_rewards > rejected_rewards).float().mean(),
        "margin": (chosen_rewards - rejected_rewards).detach().mean(),
        "min_reward": both.min(),
        "mean_reward": both.mean(),
        "max_reward": both.max(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# PPO
#
# B rollouts of T answer tokens; mask (B, T) bool is True up to and with the end token.
# Departures: 1. the score sits on the last answer token, as in TRL 0.8.1 (1.10: on the first pad, if there is one), so
# values and rewards live on the answer's tokens and not on one more. 2. KL, approx_kl, entropy and ratio are means over
# answer tokens, as in 0.8.1 (1.10: over padding too, which counts as 0, 0, its entropy and 1). 3. Whitened rewards are 0
# on padding, as in 1.10 (0.8.1: mean - mean/std, which GAE carries into the answer).
# ---------------------------------------------------------------------------------------------------------------------


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


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Unit variance and, with shift_mean, mean 0 over the mask; same shape, 0 outside the mask.

    moments: mean and variance to use instead of this batch's own, from pool_moments where ranks share a batch.
    """
    mean, var = (masked_mean(values, mask), masked_var(values, mask)) if moments is None else moments
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of the kept values, (3,): what a rank gathers for pool_moments."""
    count = mask.sum().to(values.dtype)
    mean = torch.where(mask, values, 0).sum() / count.clamp(min=1)
    return torch.stack([count, mean, torch.where(mask, (values - mean) ** 2, 0).sum()])


def pool_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over all shards, from one masked_moments row per shard: (S, 3) -> (), ()."""
    counts, means, squares = moments.unbind(-1)
    mean = (counts * means).sum() / counts.sum()
    return mean, (squares + counts * (means - mean) ** 2).sum() / (counts.sum() - 1)


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
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, 1707.06347 eq. 7, and where the clip decided it: (B, T) each -> (B, T), (B, T) bool."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


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


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution, (..., V) -> (...)."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def adaptive_kl_coef(kl_coef: float, kl: float, target_kl: float, horizon: float, num_samples: int) -> float:
    """The KL coefficient after num_samples rollouts whose mean sequence KL was kl. Ziegler et al., 1909.08593 §2.2.

    A proportional controller: at most ±20 % error counts, and one horizon of samples moves the coefficient by it.
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
