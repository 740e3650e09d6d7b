"""Preference losses made for vision-language models. Notation: losses/preference.py; v image, q prompt, v′ corrupted image."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.batch import PairLogps, PreferenceBatch
from losses.preference import Beta, logistic, sft
from losses.registry import loss

# ---------------------------------------------------------------------------------------------------------------------
# Dense DPO: tokens in which the two answers differ count more
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


def _weighted_log_ratio(policy: Tensor, ref: Tensor, weights: Tensor, average: bool = False) -> Tensor:
    """Log-ratio of weighted log-probs, (M, T) each -> (M,)."""
    return weighted_logps(policy, weights, average) - weighted_logps(ref, weights, average)


@loss(paper="2312.00849", summary="DPO that weighs changed segments (RLHF-V)", needs={"per_token", "changed_tokens"})
def ddpo(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    ddpo_gamma: Annotated[float, "weight of changed tokens (paper 5, its code 3)"] = 5.0,
    ddpo_average: Annotated[bool, "divide by the sum of weights (paper) or not (its code)"] = True,
    ddpo_changed_only: Annotated[bool, "leave unchanged tokens out altogether"] = False,
) -> Tensor:
    """Dense DPO of RLHF-V, 2312.00849 eq. 5: DPO on sequence scores that weigh changed tokens by γ.

    Presets (gamma, average, changed_only): the paper 5, True, False with β 0.5; its authors' code 3, False, False.
    Changed tokens alone are 1, False, True: near this project's predecessor, whose marks depend on the batch (docs/losses.md).
    """
    policy, ref = batch.policy, batch.ref
    dtype = policy.chosen_per_token.dtype
    chosen_weights = segment_weights(batch.chosen_mask, batch.chosen_changed, ddpo_gamma, ddpo_changed_only, dtype)
    rejected_weights = segment_weights(
        batch.rejected_mask, batch.rejected_changed, ddpo_gamma, ddpo_changed_only, dtype
    )  # (M, T')
    chosen = _weighted_log_ratio(policy.chosen_per_token, ref.chosen_per_token, chosen_weights, ddpo_average)
    rejected = _weighted_log_ratio(policy.rejected_per_token, ref.rejected_per_token, rejected_weights, ddpo_average)
    return logistic(beta * (chosen - rejected))  # (M,)


# ---------------------------------------------------------------------------------------------------------------------
# What the image does for the answer
# ---------------------------------------------------------------------------------------------------------------------


@loss(paper="2406.11839", summary="DPO + image preference + anchor", needs={"corrupted_image"}, corruption="crop")
def mdpo(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    mdpo_delta: Annotated[float, "reward that the chosen answer is anchored above"] = 0.0,
) -> Tensor:
    """mDPO, 2406.11839: DPO + the chosen answer preferred on its image over a cropped one + r(w) anchored above δ.

    Departure: 1. v′ is one crop for policy and reference; the authors' code crops anew in every forward.
    """
    ratio = batch.log_ratio  # (M,) each
    return (
        logistic(beta * (ratio.chosen - ratio.rejected))  # response preference
        + logistic(beta * (ratio.chosen - ratio.corrupted))  # image preference
        + logistic(beta * ratio.chosen - mdpo_delta)  # anchor
    )  # (M,)


@loss(paper="2411.10442", summary="DPO + BCO with running shift + SFT (InternVL)", needs={"running_delta"})
def mpo(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    mpo_wp: Annotated[float, "weight of the preference loss"] = 0.8,
    mpo_wq: Annotated[float, "weight of the quality loss"] = 0.2,
    mpo_wg: Annotated[float, "weight of the generation loss"] = 1.0,
) -> Tensor:
    """MPO of InternVL, 2411.10442: w_p preference (DPO) + w_q quality (BCO with running δ) + w_g SFT.

    With δ = 0 it is TRL's mixture `--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0`. δ moves with every
    micro batch, of all devices: later micro batches of an optimizer step see it further on.
    """
    ratio, delta = batch.log_ratio, batch.running_delta
    preference = logistic(beta * (ratio.chosen - ratio.rejected))
    quality = -F.logsigmoid(beta * ratio.chosen - delta) - F.logsigmoid(-(beta * ratio.rejected - delta))
    return mpo_wp * preference + mpo_wq * quality + mpo_wg * sft(batch)  # (M,)


def update_running_mean(mean: Tensor, count: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and count of all values so far after some more: (), (), any shape -> (), (). Starts from zeros.

    MPO's δ: feed the implicit rewards of both sides of the batch (of all ranks) before the loss, so δ includes them.
    """
    if not values.numel():
        return mean, count
    new_count = count + values.numel()
    return mean + (values.detach().mean() - mean) * values.numel() / new_count, new_count


def token_kl(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(πref || πθ) of the next token over the whole vocabulary: (N, V), (N, V) -> (N,). TDPO, 2404.11999."""
    ref_logps = ref_logits.log_softmax(-1)
    return (ref_logps.exp() * (ref_logps - logits.log_softmax(-1))).sum(-1)


@loss(
    paper="2501.16629",
    summary="segment, image and token levels in one sigmoid",
    needs={"per_token", "changed_tokens", "corrupted_image_per_token", "token_kl"},
    corruption="diffusion",
)
def chip(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    chip_gamma: Annotated[float, "weight of changed tokens (authors: 4 for LLaVA-1.6, 2 for Muffin)"] = 4.0,
    chip_alpha: Annotated[float, "weight of the token-level KL difference"] = 0.1,
) -> Tensor:
    """CHiP, 2501.16629, as its code: one sigmoid over segment-weighted, visual and token-level preference.

    -log σ(β{Δ_γ + [w on v over w on v′]_γ - α(KL_l - stopgrad KL_w)}), sums (not means) of log-probs with weight γ on
    changed tokens; γ is 4 in the authors' script for LLaVA-1.6, 2 in the one for Muffin.

    Departures: 1. the paper adds up the four levels as losses of their own. 2. The authors' code weighs the reference's
    log-prob on v′ after summing it over tokens, which shifts the logit by a constant; we weigh it per token.
    """
    policy, ref = batch.policy, batch.ref
    dtype = policy.chosen_per_token.dtype
    chosen_weights = segment_weights(batch.chosen_mask, batch.chosen_changed, chip_gamma, False, dtype)  # (M, T)
    rejected_weights = segment_weights(batch.rejected_mask, batch.rejected_changed, chip_gamma, False, dtype)
    chosen = _weighted_log_ratio(policy.chosen_per_token, ref.chosen_per_token, chosen_weights)  # (M,)
    rejected = _weighted_log_ratio(policy.rejected_per_token, ref.rejected_per_token, rejected_weights)
    corrupted = _weighted_log_ratio(policy.corrupted_per_token, ref.corrupted_per_token, chosen_weights)
    token_level = batch.rejected_token_kl - batch.chosen_token_kl.detach()  # TDPO2, 2404.11999
    return logistic(beta * ((chosen - rejected) + (chosen - corrupted) - chip_alpha * token_level))  # (M,)


@loss(paper="2411.02712", summary="DPO on scores guided away from the text-only model", needs={"text_only"})
def vdpo(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    vdpo_gamma: Annotated[float, "guidance towards the image; 1 is DPO"] = 2.0,
) -> Tensor:
    """V-DPO, 2411.02712: DPO on guided scores ŝ(y) = γ log πθ(y|v) - (γ-1) log π(y|no image), γ > 1 guides.

    Departures: 1. γ = 2 is our choice: the published script's 0 leaves no gradient, 1 is DPO. 2. The text-only term has
    no gradient, as in the code; it is a pass without the image, where the code blackens the pixels.
    """
    chosen = vdpo_gamma * batch.policy.chosen - (vdpo_gamma - 1) * batch.text_only_chosen.detach()  # (M,)
    rejected = vdpo_gamma * batch.policy.rejected - (vdpo_gamma - 1) * batch.text_only_rejected.detach()
    return logistic(beta * ((chosen - batch.ref.chosen) - (rejected - batch.ref.rejected)))  # (M,)


@loss(paper="2404.14233", summary="DPO scaled by the rejected answer's severity", columns={"severity"})
def hsa(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """HSA-DPO, 2404.14233: DPO whose rejected log-ratio is scaled by the severity of its hallucinations."""
    ratio, severity = batch.log_ratio, batch.response_columns["severity"].rejected  # (M,)
    return logistic(beta * (ratio.chosen - severity * ratio.rejected))  # (M,)


@loss(paper="2502.13146", summary="DPO + preference over a retrieved image", needs={"image_rejected"})
def rdpo(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """rDPO of Re-Align, 2502.13146: DPO + the chosen answer preferred on its image over a retrieved similar one.

    Departure: 1. both terms score the given answers, as the paper says; the code scores argmax tokens in their place.
    """
    ratio = batch.log_ratio
    return logistic(beta * (ratio.chosen - ratio.rejected)) + logistic(beta * (ratio.chosen - ratio.image_rejected))


@loss(paper="2502.10391", summary="DPO with β by reward margin, + SFT", columns={"margin"})
def mmdpo(
    batch: PreferenceBatch,
    *,
    beta: Beta = 0.1,
    mmdpo_w: Annotated[float, "how much the reward margin may raise β"] = 0.1,
    mmdpo_k: Annotated[float, "how fast it does so"] = 0.5,
    mmdpo_gamma: Annotated[float, "weight of the SFT term"] = 0.25,
) -> Tensor:
    """MM-DPO of MM-RLHF, 2502.10391: DPO with β(δ) = β(1 + w(1 - exp(-kδ))), δ the reward margin, plus γ SFT.

    β(δ) is kept above 1e-3, as in the code, which matters only for pairs that the judge ranks the other way round.
    """
    ratio, margin = batch.log_ratio, batch.row_columns["margin"]
    scaled_beta = (beta * (1 + mmdpo_w * -torch.expm1(-mmdpo_k * margin))).clamp(min=1e-3)  # (M,)
    return logistic(scaled_beta * (ratio.chosen - ratio.rejected)) + mmdpo_gamma * sft(batch)  # (M,)


@loss(
    paper="2412.14487",
    summary="DPO with tokens weighed by what the image does for them",
    needs={"per_token", "logit_shift"},
    corruption="diffusion",
)
def tpo_token(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """Token preference optimisation with visual-anchored rewards, 2412.14487 (alibaba/TPO; not TRL's "tpo").

    p_t is multiplied by c_t: σ(s_t) + 1/2 in the chosen, 3/2 - σ(s_t) in the rejected answer, where s_t is how much the
    image raises the token's logit. Policy and reference have their own s, and the policy's carries a gradient.
    """

    def chosen_score(model: PairLogps) -> Tensor:
        calibration = torch.sigmoid(model.chosen_logit_shift) + 0.5  # (M, T)
        return torch.where(batch.chosen_mask, model.chosen_per_token + calibration.log(), 0).sum(-1)  # (M,)

    def rejected_score(model: PairLogps) -> Tensor:
        calibration = 1.5 - torch.sigmoid(model.rejected_logit_shift)  # (M, T')
        return torch.where(batch.rejected_mask, model.rejected_per_token + calibration.log(), 0).sum(-1)  # (M,)

    chosen = chosen_score(batch.policy) - chosen_score(batch.ref)
    rejected = rejected_score(batch.policy) - rejected_score(batch.ref)
    return logistic(beta * (chosen - rejected))  # (M,)


@loss(
    paper="2402.11411",
    summary="DPO + preference over what the policy says on noise",
    needs={"policy_negative"},
    corruption="diffusion",
)
def povid(batch: PreferenceBatch, *, beta: Beta = 0.1) -> Tensor:
    """POVID, second stage, 2402.11411: ½ DPO(w over l) + ½ DPO(w over ŷ), ŷ what the policy says to noise.

    Departure: 1. policy and reference score the same ŷ; in the code the reference draws its own.
    """
    ratio = batch.log_ratio
    return 0.5 * logistic(beta * (ratio.chosen - ratio.rejected)) + 0.5 * logistic(
        beta * (ratio.chosen - ratio.negative)
    )  # (M,)
