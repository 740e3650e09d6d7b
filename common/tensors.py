"""Nested tensors."""

from typing import Any

import torch
from transformers.utils import ModelOutput


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, ModelOutput):
        return type(value)(**{k: to_device(v, device) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return type(value)(to_device(v, device) for v in value) if isinstance(value, list | tuple) else value
