"""Several LoRA adapters on one base: which of them computes now."""

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

REFERENCE_ADAPTER = "ref"  # name of the frozen copy of an adapter that training continues (TRL's name)


def _switches(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextlib.contextmanager
def adapter_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with one adapter of a peft model, or with none.

    peft's own set_adapter and disable_adapter also switch `requires_grad`, which would freeze the adapters that train beside.
    """
    layers = _switches(model)
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    try:
        for m in layers:
            m._active_adapter, m._disable_adapters = [name] if name is not None else m._active_adapter, name is None
        yield
    finally:
        for m, (active, disabled) in zip(layers, before, strict=True):
            m._active_adapter, m._disable_adapters = active, disabled


def adapter_now(model: nn.Module) -> str | None:
    """The adapter that is active, or None."""
    layer = next(iter(_switches(model)), None)
    return None if layer is None or layer._disable_adapters else layer.active_adapters[0]


def _recompute_with_same_adapter(model: nn.Module) -> tuple[Any, Any]:
    # Gradient checkpointing runs layers again during backward, when another adapter is active than in their forward.
    return contextlib.nullcontext(), adapter_active(model, adapter_now(model))
