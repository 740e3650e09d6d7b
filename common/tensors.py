"""Nested tensors."""

from typing import TypeVar

import torch
from transformers.utils import ModelOutput

Nested = TypeVar("Nested")  # a tensor, or dicts, lists and tuples of such


def to_device(value: Nested, device: torch.device, dtype: torch.dtype | None = None) -> Nested:
    """Move the tensors of nested dicts and lists; those of floating point become `dtype`, if it is given."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, ModelOutput):
        return type(value)(**{k: to_device(v, device, dtype) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: to_device(v, device, dtype) for k, v in value.items()}
    return type(value)(to_device(v, device, dtype) for v in value) if isinstance(value, list | tuple) else value
