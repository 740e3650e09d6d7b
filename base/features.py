"""Image features between vision tower and language model: what is kept of them, and how batches are joined."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput


def pooled_features(inputs: dict[str, Any]) -> dict[str, Any]:
    """What `encode_images` returned without the encoder's inner states, which would live as long as the features do."""
    outputs = inputs.get("mm_encoder_outputs")
    if outputs is None:
        return inputs
    keep = ("pooler_output", "deepstack_features", "visual_indicator_features")  # what language models read
    pooled = {modality: type(o)(**{k: o[k] for k in keep if k in o}) for modality, o in outputs.items()}
    return inputs | {"mm_encoder_outputs": pooled}


def sum_of_tensors(value: Any) -> Any:
    """The sum over all floating-point tensors of nested dicts and lists; 0.0 if there is none."""
    if isinstance(value, torch.Tensor):
        return value.sum() if value.is_floating_point() else 0.0
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(sum_of_tensors(v) for v in values)


def has_images(img_inputs: Mapping[str, Any]) -> bool:
    """Whether image inputs of a collator hold pixels, of pictures or of videos."""
    return any(img_inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))


def join_rows(rows: Sequence[dict[str, Any]], lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Image inputs of one row each as those of a batch; what a row without images or videos lacks is not there.

    Args:
        lengths: for each name of entries per token the tokens of the rows; rows without such entries get zeros.
    """
    joined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in lengths:
            joined[name] = [
                row[name][0] if name in row else [0] * n for row, n in zip(rows, lengths[name], strict=True)
            ]
            continue
        values = [row[name] for row in rows if row.get(name) is not None]
        clips = name == "pixel_values_videos" and values[0].ndim == 5  # (videos, frames, channels, height, width)
        if clips and len({value.shape[1] for value in values}) > 1:
            joined[name] = [clip for value in values for clip in value]
        else:
            joined[name] = _joined(name, values)
    return joined


def join_image_inputs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Image inputs (pixels, or what `encode_images` returns) of several batches as those of one, image after image."""
    return _joined("", list(parts)) if len(parts) > 1 else dict(*parts)


def _joined(name: str, values: list[Any]) -> Any:
    first = values[0]
    if first is None:  # no images
        return None
    if isinstance(first, Tensor):
        wide = [max(v.shape[d] for v in values) for d in range(1, first.ndim)]
        # Tokens of InstructBLIP's Q-Former: padded to the longest, as its processor does
        gaps = [[g for d in range(v.ndim - 1, 0, -1) for g in (0, wide[d - 1] - v.shape[d])] for v in values]
        return torch.cat([F.pad(v, gap) if any(gap) else v for v, gap in zip(values, gaps, strict=True)])
    if isinstance(first, ModelOutput):
        return type(first)(**{k: _joined(k, [v[k] for v in values]) for k in first})
    if isinstance(first, dict):
        return {k: _joined(k, [v[k] for v in values]) for k in first}
    if name == "deepstack_features":  # one entry per layer: all images in one tensor, or one tensor per image
        return [_joined_layer(list(layer)) for layer in zip(*values, strict=True)]
    if isinstance(first, list | tuple):  # one tensor per image
        return [tensor for v in values for tensor in v]
    raise TypeError(f"{name} of type {type(first).__name__} cannot be joined.")


def _joined_layer(values: list[Any]) -> Any:
    """Features for one decoder layer; some classes give them as (number of the layer, features)."""
    if isinstance(values[0], tuple) and isinstance(values[0][0], int):
        return values[0][0], _joined("", [features for _, features in values])
    return _joined("", values)
