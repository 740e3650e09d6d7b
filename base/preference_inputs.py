"""What preference losses read (losses/batch.py), put together from the passes of policy and reference over a packed batch.

R responses of T tokens, N response tokens in all, M pairs; `batch` is what the DPO collator makes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base.logps import TOKEN_CHUNK, all_logits, token_logits, vocabulary_kl
from base.packing import scatter_to_responses
from data.rows import NUMBER_COLUMNS
from losses import PairLogps, PreferenceBatch, Sides, UnpairedBatch

Batch = dict[str, Any]


@dataclass(frozen=True)
class ModelPass:
    """What one model, policy or reference, says of the responses of a batch."""

    logps: Tensor  # (R, T) float32 log-prob of every response token, zero where padded
    # Where a loss reads logits, the states that predict the tokens, and the model whose lm_head makes logits of them
    hidden: Tensor | None = None  # (N, D)
    head: nn.Module | None = None
    text_only: Tensor | None = None  # (R, T) the policy's log-probs without the image, without gradient
    entropy: Tensor | None = (
        None  # (R, T) of the policy's next-token distributions in nats, if the trainer's with_entropy asks for it
    )


def preference_batch(
    policy: ModelPass,
    reference: ModelPass | None,
    batch: Batch,
    needs: Collection[str] = (),
    columns: Collection[str] = (),
) -> PreferenceBatch:
    """The M pairs of a batch as losses read them; all but `running_delta`, which outlives the batch.

    Args:
        reference: None if no loss reads it.
        needs: keys of losses.NEEDS.
        columns: columns of numbers, as the data names them.
    """
    chosen, rejected = batch["chosen"], batch["rejected"]  # (M,), (M,)
    mask = batch["completion_mask"]
    lengths = mask.sum(1)  # (R,)
    fields: dict[str, Any] = {}
    if "per_token" in needs:
        fields |= {"chosen_mask": mask[chosen], "rejected_mask": mask[rejected]}
    if "changed_tokens" in needs:
        fields |= {"chosen_changed": batch["chosen_changed"], "rejected_changed": batch["rejected_changed"]}
    if "text_only" in needs:
        text_only = policy.text_only.sum(1)
        fields |= {"text_only_chosen": text_only[chosen], "text_only_rejected": text_only[rejected]}
    if "token_kl" in needs:
        kl = scatter_to_responses(
            vocabulary_kl(reference.head, reference.hidden, policy.head, policy.hidden), mask
        ).sum(1)  # (R,)
        fields |= {"chosen_token_kl": kl[chosen], "rejected_token_kl": kl[rejected]}
    of_row = {name: batch[name] for name in columns if NUMBER_COLUMNS.get(name) == "row"} | batch.get("own_of_row", {})
    of_response = {name: batch[name] for name in columns if NUMBER_COLUMNS.get(name) == "response"}
    of_response |= batch.get("own_of_response", {})
    return PreferenceBatch(
        policy=_pair_logps(policy, batch, needs),
        ref=None if reference is None else _pair_logps(reference, batch, needs),
        chosen_lengths=lengths[chosen],
        rejected_lengths=lengths[rejected],
        chosen_tokens_per_pair=batch.get("chosen_tokens_per_pair"),
        row_columns=of_row,
        response_columns={name: Sides(values[chosen], values[rejected]) for name, values in of_response.items()},
        **fields,
    )


def unpaired_batch(policy: ModelPass, reference: ModelPass | None, batch: Batch) -> UnpairedBatch:
    """The N single answers of a batch as losses read them.

    Args:
        reference: None if no loss reads it.
        batch: with `kl`, (), where a loss needs it.
    """
    answers = batch["answers"]
    return UnpairedBatch(
        policy=policy.logps.sum(1)[answers],
        ref=None if reference is None else reference.logps.sum(1)[answers],
        desirable=batch["desirable"],
        kl=batch.get("kl"),
    )


def mismatched_log_ratios(policy: ModelPass, reference: ModelPass, batch: Batch) -> Tensor:
    """log πθ/πref of answers to other rows' prompts, (J,), without gradient: their mean estimates the KL to the reference."""
    return (policy.logps.detach() - reference.logps).sum(1)[batch["mismatched"]]


def pairs_and_chosen_tokens(batch: Batch) -> Tensor:
    """Number of pairs, and of the tokens of their chosen answers, (2,) long; of unpaired rows all answers and their tokens."""
    counted = batch["answers"] if "answers" in batch else batch["chosen"]
    tokens = batch["completion_mask"].sum(1)[counted].sum()
    return torch.stack([tokens.new_full((), len(counted)), tokens])


def _pair_logps(model: ModelPass, batch: Batch, needs: Collection[str]) -> PairLogps:
    """One model's side of the pairs."""
    chosen, rejected = batch["chosen"], batch["rejected"]
    logps = model.logps.sum(1)  # (R,)
    fields = {}
    if "per_token" in needs:
        fields |= {"chosen_per_token": model.logps[chosen], "rejected_per_token": model.logps[rejected]}
    if "corrupted_image" in needs:
        fields["corrupted"] = logps[batch["corrupted_of"][chosen]]
    if "corrupted_image_per_token" in needs:
        fields["corrupted_per_token"] = model.logps[batch["corrupted_of"][chosen]]
    if "image_rejected" in needs:
        fields["image_rejected"] = logps[batch["image_rejected_of"][chosen]]
    if "policy_negative" in needs:
        fields["negative"] = logps[batch["negative_of"][chosen]]
    if "logit_shift" in needs:
        shift = _logit_shift(model, batch)
        fields |= {"chosen_logit_shift": shift[chosen], "rejected_logit_shift": shift[rejected]}
    return PairLogps(chosen=logps[chosen], rejected=logps[rejected], **fields)


def _logit_shift(model: ModelPass, batch: Batch) -> Tensor:
    """logit(y_t|v) - logit(y_t|v′) of each response's own tokens, (R, T); zero for responses that v′ does not repeat."""
    mask, corrupted = batch["completion_mask"], batch["corrupted_of"]
    logits = token_logits(model.head, model.hidden, batch["completion_ids"].flatten()[batch["completion_places"]])
    logits = scatter_to_responses(logits, mask)  # (R, T)
    return torch.where((corrupted >= 0)[:, None], logits - logits[corrupted.clamp(min=0)], 0)


def most_likely_tokens(head: nn.Module, hidden: Tensor) -> Tensor:
    """The token that the model would say at each place, (N, D) -> (N,), with the logits of TOKEN_CHUNK places at a time."""
    return torch.cat([all_logits(head, states).argmax(-1) for states in hidden.split(TOKEN_CHUNK)])


def with_negatives(batch: Batch, tokens: Tensor) -> Batch:
    """The batch with the policy's own tokens in the responses that stand ready for them (`negative_of`).

    Args:
        tokens: what the policy says on v′ after the chosen answers' first tokens, for every token of `batch["probe"]`.
    """
    mask = batch["probe"]["completion_mask"]  # (R′, T′)
    said = scatter_to_responses(tokens, mask)
    negatives = batch["negative_of"][batch["negative_of"] >= 0]  # (R′,) in the order of the probe's responses
    ids = batch["completion_ids"].clone()
    ids[negatives, : said.shape[1]] = torch.where(mask, said, ids[negatives, : said.shape[1]])
    # Response tokens stand in a row, and rows in the batch, in the order of the responses.
    input_ids = batch["input_ids"].masked_scatter(batch["segment_ids"] > 0, ids.flatten()[batch["completion_places"]])
    return batch | {"completion_ids": ids, "input_ids": input_ids}
