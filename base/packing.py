"""One prompt and its K responses in one row, exact.

    input_ids    [ prompt ........ | response 1 .. | response 2 .. | ... | pad ]
    segment_ids  [ 0 ............. | 1 ........... | 2 ........... | ... | -1  ]
    attention    causal AND (key is prompt OR key's segment == query's segment)
    positions    prompt 0..P-1; every response restarts at P
    log-prob     a response's first token is predicted at the prompt's last position, the others at the position before

A VLM's prompt is long (576 to 3,000 image tokens) and its responses short, so the prompt is computed once per row
instead of once per response.
A row with one response is an ordinary causal row: the plain layout is this layout with K = 1.

Segment 0 is what all responses of the row share: the prompt and, where they begin alike (RLHF-V's edited answers),
their common beginning too.
Its tokens then belong to every response, at one and the same position.
"""

import itertools
from collections.abc import Sequence

import torch

from base.batch import PackedBatch
from base.segments import Layout


def common_beginning(responses: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all K >= 2 responses begin; 0 for K = 1.

    Every response keeps at least one token that is not shared.
    """
    if len(responses) < 2:
        return 0
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*responses, strict=False))
    return min(sum(1 for _ in same), min(map(len, responses)) - 1)


def pack_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    shared: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay out B prompts with their responses, padded on the right.

    Args:
        prompts: B token-id lists.
        responses: for each prompt its K_b token-id lists, each with at least one token.
        shared: for each row how many first tokens its responses have in common, to be laid out once; none by default.

    Returns:
        The fields of base.batch.PackedBatch; `scored` and `scored_as` with shared tokens only.
    """
    shared = shared if shared is not None else [0] * len(prompts)
    B, L = len(prompts), max(map(packed_length, prompts, responses, shared))
    flat = [r for row in responses for r in row]
    R, T = len(flat), max(len(r) for r in flat)
    input_ids = torch.full((B, L), pad_token_id, dtype=torch.long)
    segment_ids = torch.full((B, L), -1, dtype=torch.long)
    index = torch.zeros((R, T), dtype=torch.long)
    ids = torch.zeros((R, T), dtype=torch.long)
    mask = torch.zeros((R, T), dtype=torch.bool)
    r = 0
    for b, (prompt, row, S) in enumerate(zip(prompts, responses, shared, strict=True)):
        P = len(prompt)
        start = P + S
        input_ids[b, :start] = torch.as_tensor([*prompt, *row[0][:S]])
        segment_ids[b, :start] = 0
        for segment, response in enumerate(row, start=1):
            n = len(response)
            own = n - S
            input_ids[b, start : start + own] = torch.as_tensor(response[S:])
            segment_ids[b, start : start + own] = segment
            index[r, : S + 1] = b * L + torch.arange(P - 1, P + S)  # the shared tokens and the first behind them
            index[r, S + 1 : n] = b * L + torch.arange(start, start + own - 1)
            ids[r, :n] = torch.as_tensor(response)
            mask[r, :n] = True
            start += own
            r += 1
    packed: PackedBatch = {
        "input_ids": input_ids,
        "segment_ids": segment_ids,
        "completion_index": index,
        "completion_ids": ids,
        "completion_mask": mask,
        "completion_places": mask.flatten().nonzero()[:, 0],
        "last_tokens": last_token_positions(segment_ids),
        "packed": any(len(row) > 1 for row in responses),
        "layout": Layout(segment_ids),
    }
    if any(shared):
        packed["scored"], packed["scored_as"] = _scored_once(responses, shared)
    return packed


def _scored_once(
    responses: Sequence[Sequence[Sequence[int]]], shared: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scored` and `scored_as` of PackedBatch: what responses share is scored with the first of their row."""
    scored: list[int] = []
    scored_as: list[int] = []
    count = token = 0
    for row, S in zip(responses, shared, strict=True):
        first = count
        for k, response in enumerate(row):
            again = S if k else 0
            fresh = len(response) - again
            scored += range(token + again, token + len(response))
            scored_as += [*range(first, first + again), *range(count, count + fresh)]
            count += fresh
            token += len(response)
    return torch.tensor(scored), torch.tensor(scored_as)


def packed_length(prompt: Sequence[int], responses: Sequence[Sequence[int]], shared: int = 0) -> int:
    """Tokens that a row takes: prompt, common beginning once, and what is left of each response."""
    return len(prompt) + shared + sum(len(response) - shared for response in responses)


def packed_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Which key each query sees: (B, L) segments -> (B, 1, L, L) bool, True = attend.

    Padding sees the prompt and earlier padding, so that no row of the mask is empty; nothing real sees padding.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]  # (B, L, 1), (B, 1, L)
    L = segment_ids.shape[1]
    causal = torch.ones((L, L), dtype=torch.bool, device=segment_ids.device).tril()
    mask = (causal & ((key == 0) | (key == query)))[:, None]
    # What attention by segments computes (base/packed_attention.py); a mask that a family derives from this one is not.
    mask.by_segments = True  # type: ignore[attr-defined]
    return mask


def same_span(inside: torch.Tensor) -> torch.Tensor:
    """Pairs of tokens in one unbroken run of `inside`, an image for example: (B, L) bool -> (B, 1, L, L) bool."""
    first = inside & ~torch.nn.functional.pad(inside, (1, -1))
    number = first.cumsum(dim=1) * inside  # (B, L): 1, 2, ... in the runs, 0 between them
    return (inside[:, :, None] & (number[:, :, None] == number[:, None, :]))[:, None]


def offset_in_segment(segment_ids: torch.Tensor) -> torch.Tensor:
    """Distance of each token from the first token of its segment: (B, L) -> (B, L) long."""
    L = segment_ids.shape[1]
    t = torch.arange(L, device=segment_ids.device).expand_as(segment_ids)
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return t - torch.where(first, t, 0).cummax(dim=1).values


def packed_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """Positions of a packed row: segment 0 counts from 0, every response from its length. (B, L) -> (B, L) long."""
    shared_length = (segment_ids == 0).sum(dim=1, keepdim=True)  # (B, 1)
    return offset_in_segment(segment_ids) + torch.where(segment_ids == 0, 0, shared_length)


def scatter_to_responses(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put the N per-token values of all responses back into their (R, T) grid, zero where padded. Differentiable."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def last_token_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """Flat position b * L + t of the last real token of each response, never of padding: (B, L) -> (R,) long.

    For packed and plain rows alike; responses are counted row by row, as in `packing.pack_rows`.
    """
    following = torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1)
    return ((segment_ids > 0) & (following != segment_ids)).flatten().nonzero()[:, 0]
