"""Attention of packed rows without their L x L mask: less than half the work, and kernels that know causality.

A mask of K responses hides most of the square: responses from each other, and the future. `scaled_dot_product_attention` computes it all the
same. Segment 0 and the first response are an ordinary causal row; each other response attends to segment 0 and itself, for which their keys
are copied side by side. Put together that is exactly the masked attention, on the pairs that the mask lets through (but half of each other
response's own small square).

Rows of a batch lie end to end, one (1, N) row without padding, as long as a pass goes through the model (`VLModelMixin.packed_inputs`); each
still attends to itself alone.

transformers hands a 4-D mask to its attention function unchanged, so packed rows bring a mask with two attributes:

    packed_layout   base.segments.Layout, of which the mask is made. Masks without it (other models, vision towers, generation) go on to
                    transformers' own function with unchanged arguments.
    by_segments     True: the mask is empty, and the layout says all. False: a family's own mask (windows, spans in both directions),
                    (B, 1, L, L), read row by row.

While K answers to a prompt are sampled in one row, the mask has `apart` instead, and `attend_apart` computes them.

`packed_sdpa` takes the place of transformers' "sdpa" and "flash_attention_2", for the whole process, when the first row is packed or laid end to
end. It has no name of its own because transformers compares the name: under another one Gemma 4's layers with shared keys, for instance, attend
to the empty part of a static cache in generation, without an error.
"""

import functools
import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from base.segments import Layout, causal_first

logger = logging.getLogger(__name__)

REPLACED = ("sdpa", "flash_attention_2")


def attend_by_segments() -> None:
    """Let transformers' attention compute packed rows by segments, in this process from now on. Called again it does nothing."""
    for name in REPLACED:
        own = ALL_ATTENTION_FUNCTIONS[name]
        if getattr(own, "func", None) is not packed_sdpa:
            ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(packed_sdpa, own=own))
            logger.info('Packed rows: "%s" of transformers is now base.packed_attention.packed_sdpa.', name)


def segment_mask(layout: Layout, device: torch.device) -> Tensor:
    """The mask that says: attend by segments. It has no entries, so that nobody computes with it by mistake."""
    mask = torch.zeros((1, 1, 0, 0), dtype=torch.bool, device=device)
    mask.by_segments = True  # type: ignore[attr-defined]
    return with_layout(mask, layout)


def with_layout(mask: Tensor, layout: Layout) -> Tensor:
    """The mask, with the attributes that `packed_sdpa` looks for; `by_segments` as it is, else False."""
    mask.packed_layout, mask.by_segments = layout, getattr(mask, "by_segments", False)  # type: ignore[attr-defined]
    return mask


def apart_mask(cache: Cache, hidden: Tensor | None, device: torch.device) -> Tensor:
    """The mask that says: K answers to each prompt, a token of each, attend to the prompt and to themselves by `attend_apart`. It has no entries.

    Args:
        cache: a PackedRolloutCache.
        hidden: (B, 1, 1, P) bool, the padding of prompts; None if there is none.
    """
    mask = torch.zeros((1, 1, 0, 0), dtype=torch.bool, device=device)
    mask.apart = cache, hidden  # type: ignore[attr-defined]
    return mask


def layout_of(mask: Any) -> Layout | None:
    """The layout of a mask, or of a dict of masks by kind of layer; None if it has none."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return getattr(mask, "packed_layout", None)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    own: Callable[..., Any] = sdpa_attention_forward,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention, and the same by segments where the mask carries a layout.

    Args:
        query: (B, H, L, D) of padded rows, or (1, H, N, D) of rows end to end. key, value: the same with H or fewer heads.
        own: transformers' function of this name.

    Returns:
        (B, L, H, D) or (1, N, H, D), zero at padding, and no attention weights.
    """
    layout = layout_of(attention_mask)
    if hasattr(attention_mask, "apart"):
        cache, hidden = attention_mask.apart
        layer = cache.layers[module.layer_idx]
        return attend_apart(query, key, value, layer.own_keys, layer.own_values, hidden, scaling), None
    if layout is None:
        return own(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    one_row = query.shape[0] == 1 and query.shape[2] == layout.tokens
    by_segments = attention_mask.by_segments
    if by_segments and one_row and not dropout and takes_kernel(query, key, value):
        return _by_kernel(query, key, value, layout, scaling), None
    heads = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    if heads and not query.is_cpu:  # on CUDA no kernel takes fewer heads and a mask
        groups = query.shape[1] // key.shape[1]
        key, value, heads = repeat_kv(key, groups), repeat_kv(value, groups), {}
    kernel = functools.partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling, **heads)
    if not by_segments:
        out = (
            _by_rows(query, key, value, layout, attention_mask, kernel)
            if one_row
            else kernel(query, key, value, attention_mask)
        )
    elif one_row:
        out = _by_segments(query, key, value, layout, layout.rows, kernel)
    else:
        rows = zip(query.split(1), key.split(1), value.split(1), layout.rows, strict=True)
        out = torch.cat([_by_segments(q, k, v, layout, [row], kernel) for q, k, v, row in rows])
    return out.transpose(1, 2).contiguous(), None


def attend_apart(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    hidden: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """The newest tokens of K answers attend to their prompt together, and to their own answer apart: no mask, nothing copied.

    Answer k's scores are [q_k Kᵀ | q_k K_kᵀ] and its output softmax(scores) [V; V_k]. All queries with the same keys, of K answers and H / h heads,
    are one product: keys are not repeated for the heads that share them, nor multiplied by queries that they are hidden from. Scores are in the
    type of keys, their softmax in float32, as in transformers' "eager". (On a GPU that is some ten launches, counted, not measured. A kernel with a
    mask needs seven there: it repeats keys and values for all heads, and turns a mask K times as wide as an answer into a bias, for every token.)

    Args:
        query: (B, H, K, D).
        key, value: (B, h, P, D) of prompts, h heads that divide H.
        own_key, own_value: (B, h, K, t, D).
        hidden: (B, 1, 1, P) bool.

    Returns:
        (B, K, H, D).
    """
    h, P = key.shape[1:3]
    query = query * (query.shape[3] ** -0.5 if scaling is None else scaling)
    query = query.to(key.dtype).unflatten(1, (h, -1)).transpose(2, 3)  # (B, h, K, G, D)
    answers_and_heads = query.shape[2:4]
    shared = query.flatten(2, 3) @ key.mT  # (B, h, K G, P)
    if hidden is not None:
        shared = shared.masked_fill(hidden, -math.inf)
    scores = torch.cat([shared.unflatten(2, answers_and_heads), query @ own_key.mT], dim=-1)  # (B, h, K, G, P + t)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    of_prompt = weights[..., :P].flatten(2, 3) @ value  # (B, h, K G, D)
    out = of_prompt.unflatten(2, answers_and_heads) + weights[..., P:] @ own_value
    return out.transpose(1, 2).flatten(2, 3)


def _by_segments(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rows: list[list[int]], kernel: Callable[..., Tensor]
) -> Tensor:
    """These rows of the layout, which lie end to end in (1, H, S, D), maybe with padding behind them; the same shape."""
    sizes = [*chain(*map(causal_first, rows))]
    sizes.append(query.shape[2] - sum(sizes))
    # split, not slices: its gradient is one concatenation
    segments = zip(*(t.split(sizes, dim=2) for t in (query, key, value)), strict=True)
    parts = []
    for shared, *own in rows:
        q, first_k, first_v = next(segments)
        parts.append(kernel(q, first_k, first_v, is_causal=True))
        if len(own) > 1:
            shared_k, shared_v = first_k[:, :, :shared], first_v[:, :, :shared]
        for _ in own[1:]:
            q, k, v = next(segments)
            mask = layout.response_mask(shared, q.shape[2], q.device)
            keys, values = torch.cat([shared_k, k], dim=2), torch.cat([shared_v, v], dim=2)
            parts.append(kernel(q, keys, values, attn_mask=mask))
    padding, _, _ = next(segments)
    return torch.cat([*parts, torch.zeros_like(padding)], dim=2)


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, mask: Tensor, kernel: Callable[..., Tensor]
) -> Tensor:
    """Rows end to end, each under its part of a family's mask (B, 1, L, L)."""
    sizes = [sum(row) for row in layout.rows]
    rows = zip(*(t.split(sizes, dim=2) for t in (query, key, value)), sizes, strict=True)
    return torch.cat(
        [kernel(q, k, v, attn_mask=mask[b, None, :, :n, :n]) for b, (q, k, v, n) in enumerate(rows)], dim=2
    )


def takes_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention's kernel for sequences of any length, which torch brings, can take these."""
    half = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    return (
        half
        and query.is_cuda
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 256
        and value.shape[3] == query.shape[3]
    )


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """All segments of all rows in one call, (1, H, N, D) -> (1, N, H, D).

    Every response is a sequence of queries whose keys are what is shared and its own. The kernel aligns the causal mask to the last query
    and the last key, which is just what a response sees.
    """
    s = layout.sequences(query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, H, D)
    out = varlen_attn(
        q,
        k.index_select(0, s.keys),
        v.index_select(0, s.keys),
        s.starts,
        s.key_starts,
        s.longest,
        s.longest_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None]
