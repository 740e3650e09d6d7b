"""A device that does not exist: tensors on it are computed on the CPU, and what a GPU would refuse or wait for is seen.

    with PretendDevice() as device:
        trainer = ...          # built as always: its weights and batches move to `device.device`
        trainer.train()
    device.waits               # where the host waited for the device, by whom

Which tensors are on the device is written down beside their storages; a tensor itself is an ordinary one on the CPU, so autograd, optimizers and
kernels are the real ones. Two modes of torch see every call:

    Calls (TorchFunctionMode)      what Python asks for: `.device`, `.to`, `.cpu`, `device=...`
    Operators (TorchDispatchMode)  what is computed: results are where their inputs are

Raised as DeviceError:
    operators that mix devices; a tensor of the CPU without dimensions is let through where CUDA lets it through
    tensors of the CPU in collectives
Recorded in `waits`, with the line that asked: `.item()`, `.tolist()`, `bool()`, `.cpu()`, `.numpy()`, printing, and operators whose result has as
many elements as the values say (nonzero, boolean indexing, unique, ...).
Recorded in `uploads`: pageable memory that is copied to the device, for which CUDA waits, too.

Not seen: the insides of compiled functions, and devices inside of Python functions of torch itself.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

import accelerate
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
aten = torch.ops.aten


class DeviceError(RuntimeError):
    """What CUDA or NCCL would raise."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the device.

    Attributes:
        kind: the call or operator.
        line: file and line of the project, nearest to the call.
        inside: file of the library that made the call, below that line; None where the line made it itself.
        in_vision: whether a model of transformers computes image features at the time.
    """

    kind: str
    line: str
    inside: str | None
    in_vision: bool

    def __str__(self) -> str:
        return f"{self.kind} at {self.line}" + (f", inside {self.inside}" if self.inside else "")


# Operators whose result has as many elements as the values say, or that look at values
BY_VALUE = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.unique_dim_consecutive, aten.equal, aten.bincount, aten.multinomial,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
MAY_MIX = {aten.copy_, aten._to_copy, aten.set_}
# A number of the CPU is no number for these
NO_NUMBERS = {aten.cat, aten.stack, aten.mm, aten.bmm, aten.addmm, aten.embedding, aten.gather, aten.index_select,
              aten.masked_scatter, aten.scatter}  # fmt: skip
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "reduce",
    "all_to_all",
)


class PretendDevice:
    """See the module. Its modes are on between `__enter__` and `__exit__`."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.uploads: list[Wait] = []
        self._here: dict[int, StorageWeakRef] = {}  # a storage that is referred to weakly keeps its address
        self._depth = 0  # of calls of torch that were made with tensors of the device
        self._quiet = 0

    # -- where tensors are ---------------------------------------------------------------------------------------------

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device."""
        try:
            return tensor.untyped_storage()._cdata in self._here
        except NotImplementedError:  # a tensor without storage
            return False

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write down that a tensor is on the device."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._here:
            self._here[storage._cdata] = StorageWeakRef(storage)
            if len(self._here) % 4096 == 0:
                self._here = {address: ref for address, ref in self._here.items() if not ref.expired()}
        return tensor

    def forget(self, tensor: torch.Tensor) -> None:
        """A copy on the CPU."""
        self._here.pop(tensor.untyped_storage()._cdata, None)

    # -- what is seen --------------------------------------------------------------------------------------------------

    def waited(self, kind: str, where: list[Wait] | None = None) -> None:
        """Record who makes the host wait."""
        if self._quiet:
            return
        inside, in_vision, frame = None, False, sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if ROOT in file.parents and file != Path(__file__) and ".venv" not in file.parts:
                break
            if inside is None and "site-packages" in file.parts and "torch" not in file.parts:
                inside = f"{'/'.join(file.parts[file.parts.index('site-packages') + 1 :])}:{frame.f_lineno}"
            in_vision |= frame.f_code.co_name == "get_image_features"
            frame = frame.f_back
        line = f"{file.relative_to(ROOT)}:{frame.f_lineno}" if frame is not None else "?"
        (self.waits if where is None else where).append(Wait(kind, line, inside, in_vision))

    def check_collective(self, name: str, value: Any) -> None:
        """Raise DeviceError for tensors of the CPU."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and not self.holds(leaf):
                raise DeviceError(f"{name}: a tensor {tuple(leaf.shape)} of the CPU in a collective")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Record nothing."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    # -- on and off ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for patch in self._patches():
            self._stack.enter_context(patch)
        self._stack.enter_context(Operators(self))
        self.calls = self._stack.enter_context(Calls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _patches(self) -> Iterator[Any]:
        """The names under which transformers and accelerate know the device, and the collectives."""
        start = accelerate.PartialState.__init__

        def on_device(state: accelerate.PartialState, *args: Any, **kwargs: Any) -> None:
            start(state, *args, **kwargs)
            state.device = self.device

        yield mock.patch.object(accelerate.PartialState, "__init__", on_device)

        def of_arguments(args: transformers.TrainingArguments) -> torch.device:
            _ = args._setup_devices  # which sets more than the device
            return self.device

        yield mock.patch.object(transformers.TrainingArguments, "device", property(of_arguments))

        yield mock.patch.object(torch.cuda, "Event", Event)
        yield mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0))

        def checked(call: Callable[..., Any], name: str, at: int) -> Callable[..., Any]:
            @functools.wraps(call)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self.check_collective(name, args[at : at + 2])
                return call(*args, **kwargs)

            return wrapper

        for name in ("reduce", "gather", "gather_for_metrics"):
            yield mock.patch.object(
                accelerate.Accelerator, name, checked(getattr(accelerate.Accelerator, name), name, 1)
            )
        for name in COLLECTIVES:
            yield mock.patch.object(torch.distributed, name, checked(getattr(torch.distributed, name), name, 0))


class Event:
    """In place of torch.cuda.Event, for copies that do not block: whoever waits for one waits for a copy that was done long ago."""

    def record(self) -> None:
        """Nothing: everything is done already."""

    def synchronize(self) -> None:
        """Nothing."""


class Operators(TorchDispatchMode):
    """What is computed: results are where their inputs are."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        device, kwargs = self.device, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [device.holds(t) for t in tensors]
        packet = func.overloadpacket
        if any(there):
            self._check(func, args, tensors, there)
            if packet in BY_VALUE or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
                device.waited(packet.__name__)
            elif packet in INDEXING:
                self._see_indices(packet, args)
        result = func(*args, **kwargs)
        if packet is aten.copy_:
            if there[0] != there[1]:
                non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
                if not there[0] and not non_blocking:
                    device.waited("copy to the CPU")
                elif there[0] and tensors[1].dim() and not non_blocking:
                    device.waited("copy", device.uploads)
            return result
        # A factory called by the autograd engine, or by an operator with tensors of the device, has its device
        if (any(there) and packet is not aten.set_) or (not tensors and device._depth > 0):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    device.mark(leaf)
        return result

    def _check(self, func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor], there: list[bool]) -> None:
        packet = func.overloadpacket
        if all(there) or packet in MAY_MIX:
            return
        if packet in INDEXING and there[0]:  # indices of the CPU are let through, and copied
            values = args[2] if len(args) > 2 else None
            if not isinstance(values, torch.Tensor) or self.device.holds(values) or not values.dim():
                return
        in_place = func._schema.name.endswith("_") and not there[0]
        strict = packet in NO_NUMBERS or in_place
        wrong = [t for t, on in zip(tensors, there, strict=True) if not on and (t.dim() or strict)]
        if wrong:
            shapes = ", ".join(str(tuple(t.shape)) for t in wrong)
            raise DeviceError(f"{func}: tensors of the device, and of the CPU: {shapes}")

    def _see_indices(self, packet: Any, args: tuple[Any, ...]) -> None:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            fills = "put" in packet.__name__ and args[2].numel() == 1  # then it is masked_fill
            if not fills:
                self.device.waited("boolean indexing")
        if any(i.dim() and not self.device.holds(i) for i in indices):
            self.device.waited("indices", self.device.uploads)


def _reads_on_cpu_only(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """one_hot looks at the values for the number of classes, and on the CPU for their range."""
    return func is torch.nn.functional.one_hot and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) > 0


class Calls(TorchFunctionMode):
    """What Python asks for."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device
        self.moves: dict[Any, Callable[..., Any]] = {
            torch.Tensor.to: self._to,
            torch.Tensor.cpu: lambda t, *a, **k: self._to(t, CPU),
            torch.Tensor.cuda: lambda t, device=None, non_blocking=False, **k: self._to(
                t, self.device.device, non_blocking=non_blocking
            ),
            torch.Tensor.device.__get__: lambda t: self.device.device if self.device.holds(t) else t.device,
            torch.Tensor.is_cuda.__get__: self.device.holds,
            torch.Tensor.is_cpu.__get__: lambda t: t.is_cpu and not self.device.holds(t),
            torch.Tensor.get_device: lambda t: 0 if self.device.holds(t) else -1,
            torch.Tensor.backward: self._backward,
        }
        self.reads = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__repr__}
        self.makes = {torch.tensor, torch.as_tensor, torch.asarray}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        device, kwargs = self.device, dict(kwargs or {})
        if func in self.moves:
            return self.moves[func](*args, **kwargs)
        held = any(device.holds(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if held and func in self.reads:
            device.waited(func.__name__)
        if held and (func in self.reads or func is torch.Tensor.__deepcopy__ or _reads_on_cpu_only(func, args, kwargs)):
            with device.silent(), self._in_call(True):
                result = func(*args, **kwargs)
            return result if func in self.reads else device.mark(result)
        if func in self.makes:
            if isinstance(args[0], torch.Tensor):
                return self._to(args[0], kwargs.get("device"), kwargs.get("dtype"))
            if held:  # in a list: they are read one by one
                device.waited(func.__name__)
        there, asked = held and func not in self.makes, kwargs.get("device")
        if asked is not None and torch.device(asked).type != "meta":
            there = torch.device(asked).type == device.device.type
            kwargs["device"] = CPU
        if func is torch.histc and not args[0].is_floating_point():  # the CPU has no kernel for integers
            args = (args[0].float(), *args[1:])
        with self._in_call(there):
            result = func(*args, **kwargs)
        from_data = func in self.makes or func is torch.Tensor.new_tensor
        if there and (asked is not None or from_data):
            self._mark_all(result, from_data)
        return result

    def _mark_all(self, result: Any, from_data: bool) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.device.mark(leaf)
        if from_data:
            self.device.waited("data", self.device.uploads)

    @contextmanager
    def _in_call(self, there: bool) -> Iterator[None]:
        before, self.device._depth = self.device._depth, int(there)
        try:
            yield
        finally:
            self.device._depth = before

    def _backward(self, loss: torch.Tensor, gradient: torch.Tensor | None = None, **kwargs: Any) -> None:
        """With both modes on, for what Python does in it; the engine's own factories have the device of the loss."""
        with self._in_call(self.device.holds(loss)), self:
            torch.autograd.backward(loss, gradient, **kwargs)

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to in all its forms."""
        device = self.device
        place, values = kwargs.pop("device", None), list(args)
        for i, value in enumerate(args):
            if isinstance(value, torch.Tensor):
                place, values[i] = (device.device if device.holds(value) else CPU), value.dtype
            elif isinstance(value, torch.device | str | int) and not isinstance(value, bool) and i == 0:
                place, values[i] = value, None
        other = kwargs.pop("other", None)
        if other is not None:
            place, kwargs["dtype"] = (device.device if device.holds(other) else CPU), other.dtype
        dtype = next((v for v in values if isinstance(v, torch.dtype)), kwargs.get("dtype"))
        flags = [v for v in values if isinstance(v, bool)]
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        memory = {"memory_format": kwargs["memory_format"]} if kwargs.get("memory_format") is not None else {}
        here = device.holds(tensor)
        there = here if place is None else torch.device(place).type == device.device.type
        if here and not there and not non_blocking:
            device.waited("copy to the CPU")
        if there and not here and not non_blocking:
            device.waited("copy", device.uploads)
        with self._in_call(there):
            result = torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy or here != there, **memory)
        if there and not here:
            device.mark(result)
        elif here and not there:
            device.forget(result)
        return result
