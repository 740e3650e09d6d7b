"""Every objective as a pure function of log-probs, rewards and values: tensors in, one loss per pair out, no reduction.

    per_pair = get_loss("sigmoid")(PreferenceBatch(...), beta=0.1)  # (M,)
    total, parts = preference_loss(batch, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], vars(args))  # (M,), {...}

To add a loss: write `def my_loss(batch, *, beta=0.1, my_gamma=2.0)`, register it in LOSSES with what it needs, and
describe `my_gamma` in FLAGS. Its keyword-only arguments are its hyper-parameters and, by name, flags of train_dpo.py.

Notation of the comments: v image, q prompt, w chosen, l rejected, πθ policy, πref reference, σ logistic,
r(y) = β log πθ(y)/πref(y), Δ = log πθ(w)/πref(w) - log πθ(l)/πref(l). Shapes: M pairs, T answer tokens, B rollouts.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- what a preference loss reads


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """M pairs, seen by the policy and by the reference. The first block is always there, others if a loss needs them.

    Log-probs are natural logarithms, summed over the answer's tokens (its end token included) unless named per_token.
    Gradients flow through what has no `ref_` in front. The reference fields may stay None for reference-free losses.
    """

    chosen_logps: Tensor  # (M,) log πθ(w|v,q)
    rejected_logps: Tensor  # (M,) log πθ(l|v,q)
    chosen_lengths: Tensor  # (M,) answer tokens
    rejected_lengths: Tensor  # (M,)
    ref_chosen_logps: Tensor | None = None  # (M,) log πref(w|v,q)
    ref_rejected_logps: Tensor | None = None  # (M,)


class Need(NamedTuple):
    """Something a loss reads beyond the first block of PreferenceBatch."""

    fields: tuple[str, ...]  # of PreferenceBatch
    help: str  # what the trainer must run or read for it
    column: str | None = None  # the data column that it comes from


NEEDS: dict[str, Need] = {}


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what the trainer must know about it before the first step."""

    function: Callable[..., Tensor]
    summary: str
    needs: frozenset[str] = frozenset()  # keys of NEEDS
    reference_free: bool = False  # reads no ref_ field
    cacheable: bool = True  # what it asks of the reference is the same at every step (--precompute_ref_log_probs)

    @property
    def hyperparameters(self) -> dict[str, object]:
        """Name and default of each: the keyword-only arguments of the function."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def required_fields(self) -> tuple[str, ...]:
        """The fields of PreferenceBatch that must not be None."""
        reference = () if self.reference_free else ("ref_chosen_logps", "ref_rejected_logps")
        return (*reference, *(field for need in sorted(self.needs) for field in NEEDS[need].fields))

    def __call__(self, batch: PreferenceBatch, **hyperparameters: object) -> Tensor:
        """Loss of each pair, (M,). Raises ValueError if the batch lacks something that the loss reads."""
        missing = [name for name in self.required_fields if getattr(batch, name) is None]
        if missing:
            raise ValueError(f"Loss {self.function.__name__!r} reads {', '.join(missing)}, which the batch lacks.")
        return self.function(batch, **hyperparameters)


# ---------------------------------------------------------------- losses on sequence log-probs (TRL's names and values)


def f_divergence_score(logratios: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float) -> Tensor:
    """f'(u) at u = πθ/πref up to a constant that cancels in a pair: the implicit reward under an f-divergence.

    Same shape as logratios = log u. f-DPO, 2309.16240, table 1. reverse_kl is DPO.
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
    """DPO, 2305.18290 eq. 7; with label smoothing the conservative DPO of Mitchell's note (ericmitchell.ai/cdpo.pdf).

    Departure: 1. TRL 1.16 ignores label_smoothing here; we honour it, as TRL 0.8 and the predecessor did.
    """
    chosen, rejected = _scores(batch, f_divergence_type, f_alpha_divergence_coef)  # (M,), (M,)
    return logistic(beta * (chosen - rejected), label_smoothing)  # (M,)


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


# ---------------------------------------------------------------- the registry

LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, "DPO, conservative with label smoothing"),
    "hinge": PreferenceLoss(hinge, "SLiC / RSO hinge on the DPO margin"),
    "ipo": PreferenceLoss(ipo, "IPO, squared distance to a fixed margin, length-normalised"),
}


class Flag(NamedTuple):
    """A hyper-parameter as a command-line flag."""

    type: type
    default: object
    help: str


FLAGS: dict[str, Flag] = {
    "beta": Flag(float, 0.1, "strength of the pull to the reference: higher keeps closer to it (IPO's τ)"),
    "label_smoothing": Flag(
        float, 0.0, "probability that a preference label is wrong: sigmoid (conservative DPO), robust, exo_pair, aot"
    ),
    "f_divergence_type": Flag(
        str, "reverse_kl", "divergence to the reference: reverse_kl (DPO), forward_kl, js_divergence, alpha_divergence"
    ),
    "f_alpha_divergence_coef": Flag(float, 0.5, "α of f_divergence_type alpha_divergence"),
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
