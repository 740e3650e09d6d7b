"""What a preference loss reads: M pairs, or N single answers, as the policy and the reference see them."""

# ruff: noqa: RUF009  (filled_for makes a dataclasses.field)
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What a loss may ask for beyond the log-probs and lengths of both answers, and what that costs or reads. A loss names
# its needs where it is declared; the fields below name the need that fills them.
NEEDS: dict[str, str] = {
    "per_token": "log-probs per token, of the reference too",
    "changed_tokens": "a diff of the two answers' token ids",
    "corrupted_image": "the chosen answer on a corrupted image",
    "corrupted_image_per_token": "the same per token",
    "logit_shift": "the raw logit of every answer token on the image and on a corrupted one",
    "text_only": "both answers without the image, without gradient",
    "token_kl": "both models' logits over the whole vocabulary",
    "image_rejected": "the chosen answer on a second image, the data column `image_rejected`",
    "policy_negative": "the policy's own argmax tokens on a corrupted image",
    "running_delta": "the running mean of the rewards of both answers",
    "mismatched": "another row's answer to each prompt, from which the KL to the reference is estimated",
}
CORRUPTING_NEEDS = frozenset({"corrupted_image", "corrupted_image_per_token", "logit_shift", "policy_negative"})


def filled_for(need: str, dims: int = 1, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401  a dataclass field, typed by its annotation
    """A field that stays None unless a loss has this need; `dims` of (M, T)."""
    return field(default=None, metadata={"need": need, "dims": dims, "dtype": dtype})


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """What one model, policy or reference, says of M pairs: natural logarithms, end tokens included."""

    chosen: Tensor  # (M,) log π(w|v,q), summed over the answer's tokens
    rejected: Tensor  # (M,) log π(l|v,q)

    # before summation; anything may stand where the mask is False
    chosen_per_token: Tensor = filled_for("per_token", dims=2)  # (M, T)
    rejected_per_token: Tensor = filled_for("per_token", dims=2)  # (M, T')

    # v′ is one and the same draw for policy and reference
    corrupted: Tensor = filled_for("corrupted_image")  # (M,) log π(w|v′,q)
    corrupted_per_token: Tensor = filled_for("corrupted_image_per_token", dims=2)  # (M, T)

    # s = logit(y_t|v) - logit(y_t|v′), raw logits of the answer's own tokens
    chosen_logit_shift: Tensor = filled_for("logit_shift", dims=2)  # (M, T)
    rejected_logit_shift: Tensor = filled_for("logit_shift", dims=2)  # (M, T')

    image_rejected: Tensor = filled_for("image_rejected")  # (M,) log π(w|v_r,q), v_r a similar image from the data

    # ŷ = argmax tokens of the policy on v′ under the chosen answer's teacher forcing, scored on v
    negative: Tensor = filled_for("policy_negative")  # (M,) log π(ŷ|v,q)


class Sides(NamedTuple):
    """A number for each answer of M pairs."""

    chosen: Tensor  # (M,)
    rejected: Tensor  # (M,)


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """M pairs. Gradients flow through `policy`, and through `token_kl` to the policy."""

    policy: PairLogps  # log πθ
    ref: PairLogps = filled_for("reference", dims=0)  # log πref; None if all losses are reference-free

    chosen_lengths: Tensor  # (M,) answer tokens
    rejected_lengths: Tensor  # (M,)
    # () chosen tokens per pair of everything that one optimizer step averages over; None stands for these M pairs alone
    chosen_tokens_per_pair: Tensor | None = None
    chosen_mask: Tensor = filled_for("per_token", dims=2, dtype=torch.bool)  # (M, T) True on answer tokens
    rejected_mask: Tensor = filled_for("per_token", dims=2, dtype=torch.bool)  # (M, T')
    # what differs between the two answers, see changed_tokens()
    chosen_changed: Tensor = filled_for("changed_tokens", dims=2, dtype=torch.bool)  # (M, T)
    rejected_changed: Tensor = filled_for("changed_tokens", dims=2, dtype=torch.bool)  # (M, T')

    # log π(y|q) of the policy: the image left out, never with a gradient
    text_only_chosen: Tensor = filled_for("text_only")  # (M,)
    text_only_rejected: Tensor = filled_for("text_only")  # (M,)

    # sum over answer tokens of KL(πref || πθ) over the whole vocabulary, see token_kl()
    chosen_token_kl: Tensor = filled_for("token_kl")  # (M,)
    rejected_token_kl: Tensor = filled_for("token_kl")  # (M,)

    # mean reward so far, kept by the trainer, see update_running_mean()
    running_delta: Tensor = filled_for("running_delta", dims=0)  # ()

    # numbers from the data, by the name of their column
    row_columns: Mapping[str, Tensor] = field(default_factory=dict)  # (M,) one number per row
    response_columns: Mapping[str, Sides] = field(default_factory=dict)  # one number per response

    # f′ of f-DPO, what log_ratio becomes: see with_f_divergence()
    f_divergence: Callable[[Tensor], Tensor] | None = None

    @property
    def log_ratio(self) -> PairLogps:
        """log πθ/πref of every sequence, (M,) each: `.chosen`, `.rejected` and, where filled, the other (M,) fields."""
        f = self.f_divergence or (lambda log_u: log_u)
        return PairLogps(
            **{
                item.name: f(getattr(self.policy, item.name) - getattr(self.ref, item.name))
                for item in fields(PairLogps)
                if item.metadata.get("dims", 1) == 1 and getattr(self.policy, item.name) is not None
            }
        )


@dataclass(frozen=True, kw_only=True)
class UnpairedBatch:
    """N answers to prompts of their own, each labelled good or bad. Gradients flow through `policy`."""

    policy: Tensor  # (N,) log πθ(y|v,q), summed over the answer's tokens
    ref: Tensor = filled_for("reference")  # (N,) log πref(y|v,q)
    desirable: Tensor  # (N,) bool
    # () KL(πθ || πref), estimated on answers to other prompts, at least 0, without gradient
    kl: Tensor = filled_for("mismatched", dims=0)

    @property
    def log_ratio(self) -> Tensor:
        """log πθ/πref of every answer, (N,)."""
        return self.policy - self.ref


LossBatch = PreferenceBatch | UnpairedBatch


def implicit_rewards(batch: PreferenceBatch, beta: float) -> tuple[Tensor, Tensor]:
    """r(w) and r(l), (M,) each, without gradient: what `rewards/chosen` and `rewards/rejected` log."""
    ratio = batch.log_ratio
    return (beta * ratio.chosen).detach(), (beta * ratio.rejected).detach()


def unfilled(batch: LossBatch, needs: Collection[str], columns: Collection[str]) -> list[str]:
    """What these needs and columns ask for and the batch lacks, by the names of the fields."""
    parts: list[tuple[str, LossBatch | PairLogps]] = [("", batch)]
    for name in ("policy", "ref") if "reference" in needs else ("policy",):
        if isinstance(part := getattr(batch, name), PairLogps):
            parts.append((f"{name}.", part))
    missing = [
        prefix + item.name
        for prefix, part in parts
        for item in fields(part)
        if item.metadata.get("need") in needs and getattr(part, item.name) is None
    ]
    if isinstance(batch, UnpairedBatch):
        return missing
    return missing + [c for c in columns if c not in batch.row_columns and c not in batch.response_columns]


def example_answer(needs: Collection[str]) -> UnpairedBatch:
    """One answer with all numbers 0, filled for these needs: losses check their flags on it."""
    zero = torch.zeros(1)
    filled: dict[str, Any] = {"ref": zero} if "reference" in needs else {}
    filled |= {"kl": torch.zeros(())} if "mismatched" in needs else {}
    return UnpairedBatch(policy=zero, desirable=torch.ones(1, dtype=torch.bool), **filled)


def example_pair(needs: Collection[str], columns: Collection[str]) -> PreferenceBatch:
    """One pair of one-token answers with all numbers 0, filled for these needs: losses check their flags on it."""

    def filled(kind: type) -> dict[str, Any]:
        return {
            item.name: torch.zeros((1,) * item.metadata["dims"], dtype=item.metadata["dtype"])
            for item in fields(kind)
            if item.metadata.get("need") in needs
        }

    zero, one = torch.zeros(1), torch.ones(1)
    logps = PairLogps(chosen=zero, rejected=zero, **filled(PairLogps))
    return PreferenceBatch(
        **filled(PreferenceBatch) | {"policy": logps, "ref": logps if "reference" in needs else None},
        chosen_lengths=one,
        rejected_lengths=one,
        row_columns=dict.fromkeys(columns, zero),
        response_columns=dict.fromkeys(columns, Sides(zero, zero)),
    )
