"""Nested tensors."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

Nested = TypeVar("Nested")  # a tensor, or dicts, lists and tuples of such


def to_device(value: Nested, device: torch.device, dtype: torch.dtype | None = None) -> Nested:
    """Move the tensors of nested dicts and lists; those of floating point become `dtype`, if it is given.

    The way to a GPU is not waited for: what is computed there next comes behind it.
    """
    if isinstance(value, torch.Tensor):
        to_gpu = value.device.type == "cpu" and torch.device(device).type != "cpu"
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=to_gpu)
    if isinstance(value, ModelOutput):
        return type(value)(**{k: to_device(v, device, dtype) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: to_device(v, device, dtype) for k, v in value.items()}
    return type(value)(to_device(v, device, dtype) for v in value) if isinstance(value, list | tuple) else value


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a weight lies on this process, without gradient: a part of it under ZeRO-3 and FSDP."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None. Waits for the device once."""
    names, flags = [], []
    for name, tensor in named:
        tensor = local_part(tensor)
        floating = tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        if floating and tensor.numel() and tensor.device.type != "meta":
            names.append(name)
            flags.append(torch.stack(torch.aminmax(tensor)).isfinite().all())  # both carry a NaN on
    if not flags:
        return None
    found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return next((name for name, finite in zip(names, found, strict=True) if not finite), None)
