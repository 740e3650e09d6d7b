"""Attention of packed rows without their L x L mask: less than half the work, and kernels that know causality.

A mask of K responses hides most of the square: responses from each other, and the future. `scaled_dot_product_attention` computes it all the
same. Segment 0 attends causally to itself, and each response to segment 0 and itself; put together that is exactly the masked attention, on
the pairs that the mask lets through (but half of each response's own small square).

transformers hands a 4-D mask to its attention function unchanged, so `packing.packed_mask` attaches the layout to the mask it builds, and
`packed_sdpa` looks for it. A mask that a family changed (windows, bidirectional spans) is another tensor, and is used as it is.

`packed_sdpa` takes the place of transformers' "sdpa", for the whole process, when the first row is packed (`VLModelMixin.packed_inputs`): never with
`--share_prefix False`. Masks without a layout (other models, vision towers, generation) go on to transformers' function with unchanged arguments. It
has no name of its own because transformers compares the name: under another one Gemma 4's layers with shared keys, for instance, attend to
the empty part of a static cache in generation, without an error.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from base.packing import Layout

logger = logging.getLogger(__name__)


def attend_by_segments() -> None:
    """Let transformers' "sdpa" compute packed rows by segments, in this process from now on. Called again it does nothing."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not packed_sdpa:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", packed_sdpa)
        logger.info('Packed rows: "sdpa" of transformers is now base.packed_attention.packed_sdpa.')


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", and the same by segments where the mask carries a layout.

    Args:
        query: (B, H, L, D). key, value: (B, H or fewer, L, D).

    Returns:
        (B, L, H, D), zero at padding, and no attention weights.
    """
    layout: Layout | None = getattr(attention_mask, "packed_layout", None)
    if layout is None or dropout or key.shape[2] != layout.length or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    outputs = []
    rows = zip(query.unbind(0), repeat_kv(key, groups).unbind(0), repeat_kv(value, groups).unbind(0), strict=True)
    for sizes, (q, k, v) in zip(layout.sizes, rows, strict=True):
        # split, not slices: its gradient is one concatenation
        qs, ks, vs = (t.unsqueeze(0).split(sizes, dim=2) for t in (q, k, v))
        parts = [scaled_dot_product_attention(qs[0], ks[0], vs[0], is_causal=True, scale=scaling)]
        for own_q, own_k, own_v in zip(qs[1:-1], ks[1:-1], vs[1:-1], strict=True):
            mask = layout.response_mask(sizes[0], own_q.shape[2], query.device)
            keys, values = torch.cat([ks[0], own_k], dim=2), torch.cat([vs[0], own_v], dim=2)
            parts.append(scaled_dot_product_attention(own_q, keys, values, attn_mask=mask, scale=scaling))
        parts.append(torch.zeros_like(qs[-1]))
        outputs.append(torch.cat(parts, dim=2))
    return torch.cat(outputs).transpose(1, 2).contiguous(), None
