"""The losses by name: what each reads, its hyper-parameters, and weighted sums of several.

A loss declares itself where it is written; nothing else has to know of it:

    @loss(paper="2406.11839", summary="DPO + image preference + anchor", needs={"corrupted_image"}, corruption="crop")
    def mdpo(batch: PreferenceBatch, *, beta: Beta = 0.1, mdpo_delta: Annotated[float, "help"] = 0.0) -> Tensor:
        ...

Its keyword-only arguments are its hyper-parameters: type and help from the annotation, the default from the signature.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

import torch
from torch import Tensor

from losses.batch import CORRUPTING_NEEDS, NEEDS, LossBatch, example_answer, example_pair, unfilled

Function = TypeVar("Function", bound=Callable[..., Tensor])


class Hyperparameter(NamedTuple):
    """A keyword-only argument of a loss, or the command-line flag that it becomes."""

    type: Any
    default: Any
    help: str


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what the trainer must know about it before the first step."""

    function: Callable[..., Tensor]
    summary: str
    paper: str  # arXiv id; empty if there is none
    needs: frozenset[str]  # keys of NEEDS
    columns: frozenset[str]  # of numbers in the data
    corruption: str | None  # how the paper makes v′: "crop" or "diffusion"
    reference_free: bool  # does not read batch.ref
    unpaired: bool  # reads single answers, an UnpairedBatch
    hyperparameters: Mapping[str, Hyperparameter]

    @property
    def cacheable(self) -> bool:
        """Whether it asks the reference the same at every step, so that --precompute_ref_log_probs works."""
        return self.corruption is None  # v′ is drawn anew in every epoch

    @property
    def required(self) -> tuple[frozenset[str], frozenset[str]]:
        """Needs, the reference among them, and columns of numbers: what the batch must hold."""
        return self.needs | (frozenset() if self.reference_free else {"reference"}), self.columns

    @property
    def data_columns(self) -> frozenset[str]:
        """All columns that a row of the data must have."""
        return self.columns | (self.needs & {"image_rejected"})

    def __call__(self, batch: LossBatch, **hyperparameters: object) -> Tensor:
        """Loss of each pair or single answer, (M,). Raises ValueError if the batch lacks something that the loss reads."""
        if missing := unfilled(batch, *self.required):
            raise ValueError(f"Loss {self.function.__name__} reads {', '.join(missing)}, not in the batch.")
        return self.function(batch, **hyperparameters)


LOSSES: dict[str, PreferenceLoss] = {}


def loss(
    *,
    summary: str,
    paper: str = "",
    needs: Collection[str] = (),
    columns: Collection[str] = (),
    corruption: str | None = None,
    reference_free: bool = False,
    unpaired: bool = False,
) -> Callable[[Function], Function]:
    """Register a function as the `--loss_type` of its name, and its keyword-only arguments as flags of train_dpo.py.

    Args:
        summary, paper: one line and an arXiv id, for `train_dpo.py --help`.
        needs: what it reads beyond the log-probs of both answers, keys of NEEDS.
        columns: columns of numbers that it reads from the data, one per row or one per response, whatever their names.
        corruption: how v′ is made if `--corruption` is not given; for losses whose needs have a corrupted image.
        reference_free: it does not read `batch.ref`.
        unpaired: its batch is an `UnpairedBatch`, of rows with single answers.

    Raises:
        ValueError: for a need that does not exist, or a hyper-parameter without a type or a default.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        if unknown := set(needs) - NEEDS.keys():
            raise ValueError(f"Loss {name} needs {', '.join(sorted(unknown))}; known are {', '.join(NEEDS)}.")
        if (corruption is not None) != bool(CORRUPTING_NEEDS & set(needs)):
            raise ValueError(f"Loss {name}: a corruption goes with {', '.join(sorted(CORRUPTING_NEEDS))}, and only so.")
        LOSSES[name] = PreferenceLoss(
            function,
            summary,
            paper,
            frozenset(needs),
            frozenset(columns),
            corruption,
            reference_free,
            unpaired,
            _hyperparameters(function),
        )
        return function

    return register


def _hyperparameters(function: Callable[..., Tensor]) -> dict[str, Hyperparameter]:
    """The keyword-only arguments of a loss."""
    found = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.annotation is parameter.empty or parameter.default is parameter.empty:
            raise ValueError(f"Loss {function.__name__}: its hyper-parameter {name} has no type or no default.")
        kind, help_text = parameter.annotation, ""
        if get_origin(kind) is Annotated:
            kind, help_text = get_args(kind)[:2]
        found[name] = Hyperparameter(kind, parameter.default, help_text)
    return found


def get_loss(name: str) -> PreferenceLoss:
    """The loss of that name. Raises ValueError, naming the known ones."""
    if name not in LOSSES:
        raise ValueError(f"Unknown loss_type {name!r}; known are {', '.join(LOSSES)}.")
    return LOSSES[name]


def needs_of(loss_types: Sequence[str]) -> frozenset[str]:
    """Everything that a mixture reads beyond plain log-probs: keys of NEEDS."""
    return frozenset().union(*(get_loss(name).needs for name in loss_types))


def reads_pairs(loss_types: Sequence[str]) -> bool:
    """Whether the losses of a mixture compare answers of a row; else they read single ones. Raises ValueError for both."""
    unpaired = [name for name in loss_types if get_loss(name).unpaired]
    if unpaired and len(unpaired) < len(loss_types):
        others = " ".join(name for name in loss_types if name not in unpaired)
        raise ValueError(
            f"--loss_type {' '.join(unpaired)} reads single answers and {others} pairs: take one kind alone."
        )
    return not unpaired


def columns_of(loss_types: Sequence[str]) -> frozenset[str]:
    """The columns of numbers that a mixture reads from the data."""
    return frozenset().union(*(get_loss(name).columns for name in loss_types))


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-parameters
# ---------------------------------------------------------------------------------------------------------------------


def flags() -> dict[str, Hyperparameter]:
    """Every hyper-parameter of the losses registered so far, as a flag.

    The default is that of the losses; where they differ it is None, which stands for each loss's own.

    Raises:
        ValueError: if two losses give one name to arguments of different types.
    """
    return {name: _flag(name) for name in dict.fromkeys(n for item in LOSSES.values() for n in item.hyperparameters)}


def _flag(name: str) -> Hyperparameter:
    readers = {key: item.hyperparameters[name] for key, item in LOSSES.items() if name in item.hyperparameters}
    first = next(iter(readers.values()))
    if any(reader.type != first.type for reader in readers.values()):
        raise ValueError(f"Losses {', '.join(readers)} give --{name} different types: rename the hyper-parameter.")
    help_text = next((reader.help for reader in readers.values() if reader.help), "")
    by_default: dict[Any, list[str]] = {}
    for key, reader in readers.items():
        by_default.setdefault(reader.default, []).append(key)
    if len(by_default) == 1:
        of_few = len(readers) < len(LOSSES) / 2
        return Hyperparameter(first.type, first.default, f"{', '.join(readers)}: {help_text}" if of_few else help_text)
    defaults = "; ".join(f"{default} for {', '.join(keys)}" for default, keys in by_default.items())
    return Hyperparameter(first.type | None, None, f"{help_text}. By default {defaults}")


def hyperparameters_of(loss_types: Sequence[str], given: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The values with which each loss runs: what is given by name and is not None, else the loss's own default."""
    return {
        name: {
            key: own.default if given.get(key) is None else given[key]
            for key, own in get_loss(name).hyperparameters.items()
        }
        for name in loss_types
    }


def common_hyperparameters(loss_types: Sequence[str], given: Mapping[str, object]) -> dict[str, Any]:
    """Those of `hyperparameters_of` that have one value in the whole mixture."""
    values: dict[str, set[object]] = {}
    for own in hyperparameters_of(loss_types, given).values():
        for key, value in own.items():
            values.setdefault(key, set()).add(value)
    return {key: next(iter(found)) for key, found in values.items() if len(found) == 1}


def check_losses(
    loss_types: Sequence[str],
    loss_weights: Sequence[float] | None,
    hyperparameters: Mapping[str, object],
    columns: Collection[str] | None = None,
    precompute_ref_log_probs: bool = False,
) -> None:
    """Raise ValueError, in one sentence, for a mixture that cannot run or a flag that would do nothing.

    Args:
        hyperparameters: flags by name; others than those of `flags()` are ignored.
        columns: the data set's columns; None checks all the rest, so that it can be done before the data is read.
    """
    losses = {name: get_loss(name) for name in loss_types}
    if len(losses) < max(1, len(loss_types)):
        raise ValueError(f"loss_type must name each loss once and at least one, not {' '.join(loss_types) or 'none'}.")
    if loss_weights is not None and len(loss_weights) != len(losses):
        raise ValueError(
            f"loss_weights has {len(loss_weights)} values for {len(losses)} losses; give one for each loss."
        )
    reads_pairs(loss_types)
    for name, flag in flags().items():
        unread = not any(name in item.hyperparameters for item in losses.values())
        if unread and hyperparameters.get(name) not in (None, flag.default):
            users = ", ".join(key for key, item in LOSSES.items() if name in item.hyperparameters)
            raise ValueError(f"--{name} does nothing with --loss_type {' '.join(losses)}: it belongs to {users}.")
    values = hyperparameters_of(loss_types, hyperparameters)
    betas = {own["beta"] for own in values.values() if "beta" in own}
    if len(betas) > 1:
        raise ValueError(f"The losses {' '.join(losses)} have different defaults of --beta: give one for all.")
    for name, item in losses.items():
        example = example_answer(item.required[0]) if item.unpaired else example_pair(*item.required)
        item(example, **values[name])  # a loss refuses values that it cannot use
        if precompute_ref_log_probs and not item.cacheable:
            raise ValueError(
                f"--precompute_ref_log_probs cannot serve --loss_type {name}: what it asks of the reference changes "
                "from step to step. Leave the flag out."
            )
        for column in sorted(item.data_columns):
            if columns is not None and column not in columns:
                raise ValueError(
                    f"--loss_type {name} reads the column {column!r}; the data has {', '.join(sorted(columns))}."
                )


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------------------------------


def combine(losses: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Weighted sum of losses of one shape. Without weights each counts 1, TRL's convention: they need not sum to 1."""
    weights = [1.0] * len(losses) if weights is None else weights
    if len(weights) != len(losses):
        raise ValueError(f"loss_weights has {len(weights)} values for {len(losses)} losses; give one for each loss.")
    total = torch.zeros_like(losses[0])
    for weight, per_pair in zip(weights, losses, strict=True):
        total = total + weight * per_pair
    return total


def preference_loss(
    batch: LossBatch,
    loss_types: Sequence[str],
    loss_weights: Sequence[float] | None = None,
    hyperparameters: Mapping[str, object] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture (M,) and its unweighted parts {name: (M,)}. Each loss picks its hyper-parameters by name."""
    values = hyperparameters_of(loss_types, hyperparameters or {})
    parts = {name: get_loss(name)(batch, **values[name]) for name in loss_types}
    return combine(list(parts.values()), loss_weights), parts
