"""Several LoRA adapters on one base: the roles they have, and which of them computes now."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@dataclass(frozen=True)
class Role:
    """Who computes in a pass: Role.POLICY, Role.VALUE, Role.REFERENCE, or Role.reward(n), the n-th reward adapter.

    Attributes:
        adapter: name of the role's adapter in peft, and of the folder of its weights below a checkpoint (the policy's
            are the checkpoint itself).
    """

    adapter: str

    POLICY: ClassVar["Role"]
    VALUE: ClassVar["Role"]
    REFERENCE: ClassVar["Role"]

    @classmethod
    def reward(cls, n: int) -> Self:
        """The n-th reward adapter."""
        return cls(f"reward_{n}")


Role.POLICY = Role("default")  # peft's name of a first adapter
# Not "value": peft matches by name, and BERT has a layer of that name.
Role.VALUE = Role("value_function")
# Only where training continues an adapter, of which this is a frozen copy (TRL's name); else the reference is the base.
Role.REFERENCE = Role("ref")
REFERENCE_ADAPTER = Role.REFERENCE.adapter


# The adapted layers of a model, found by walking its whole tree once for each set of adapters: gradient checkpointing asks for every layer of
# every pass.
_layers: WeakKeyDictionary[nn.Module, tuple[list[str], list[nn.Module]]] = WeakKeyDictionary()


def _switches(model: nn.Module) -> list[nn.Module]:
    adapters = [*getattr(model, "peft_config", ())]
    known = _layers.get(model)
    if known is None or known[0] != adapters:
        known = (adapters, [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)])
        _layers[model] = known
    return known[1]


@contextlib.contextmanager
def adapter_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with one adapter of a peft model, or with none.

    peft's own set_adapter and disable_adapter also switch `requires_grad`, which would freeze the adapters that train
    beside, and walk the module tree several times: 45 to 108 ms a step on that of a 7B model.
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


def recompute_with_same_adapter(model: nn.Module) -> tuple[Any, Any]:
    """`context_fn` of gradient checkpointing: layers run again under the adapter that was active in their forward."""
    return contextlib.nullcontext(), adapter_active(model, adapter_now(model))
