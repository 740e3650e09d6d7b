"""One prompt and its K responses in one row, exact.

    input_ids    [ prompt ........ | response 1 .. | response 2 .. | ... | pad ]
    segment_ids  [ 0 ............. | 1 ........... | 2 ........... | ... | -1  ]
    attention    causal AND (key is prompt OR key's segment == query's segment)
    positions    prompt 0..P-1; every response restarts at P
    log-prob     a response's first token is predicted at the prompt's last position, the others at the position before

A VLM's prompt is long (576 to 3,000 image tokens) and its responses short, so the prompt is computed once per row instead of once per response.
A row with one response is an ordinary causal row: the plain layout is this layout with K = 1.
"""

from collections.abc import Sequence

import torch


def pack_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
) -> dict[str, torch.Tensor]:
    """Lay out B prompts with their responses, padded on the right.

    Args:
        prompts: B token-id lists.
        responses: for each prompt its K_b token-id lists, each with at least one token.

    Returns:
        input_ids, segment_ids: (B, L) long.
        completion_index: (R, T) long, R = sum of K_b: flat position b * L + t whose hidden state predicts the token; 0 where padded.
        completion_ids: (R, T) long, the tokens of each response; 0 where padded.
        completion_mask: (R, T) bool, True on real tokens.
    """
    lengths = [len(p) + sum(len(r) for r in row) for p, row in zip(prompts, responses, strict=True)]
    B, L = len(prompts), max(lengths)
    flat = [r for row in responses for r in row]
    R, T = len(flat), max(len(r) for r in flat)
    input_ids = torch.full((B, L), pad_token_id, dtype=torch.long)
    segment_ids = torch.full((B, L), -1, dtype=torch.long)
    index = torch.zeros((R, T), dtype=torch.long)
    ids = torch.zeros((R, T), dtype=torch.long)
    mask = torch.zeros((R, T), dtype=torch.bool)
    r = 0
    for b, (prompt, row) in enumerate(zip(prompts, responses, strict=True)):
        P = len(prompt)
        input_ids[b, :P] = torch.as_tensor(prompt)
        segment_ids[b, :P] = 0
        start = P
        for segment, response in enumerate(row, start=1):
            n = len(response)
            input_ids[b, start : start + n] = torch.as_tensor(response)
            segment_ids[b, start : start + n] = segment
            index[r, :n] = b * L + torch.arange(start - 1, start + n - 1)
            index[r, 0] = b * L + P - 1
            ids[r, :n] = torch.as_tensor(response)
            mask[r, :n] = True
            start += n
            r += 1
    return {
        "input_ids": input_ids,
        "segment_ids": segment_ids,
        "completion_index": index,
        "completion_ids": ids,
        "completion_mask": mask,
    }


def packed_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Which key each query sees: (B, L) segments -> (B, 1, L, L) bool, True = attend.

    Padding sees the prompt and earlier padding, so that no row of the mask is empty; nothing real sees padding.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]  # (B, L, 1), (B, 1, L)
    L = segment_ids.shape[1]
    causal = torch.ones((L, L), dtype=torch.bool, device=segment_ids.device).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


def same_span(inside: torch.Tensor) -> torch.Tensor:
    """Pairs of tokens that stand in one unbroken run of `inside`, an image for example: (B, L) bool -> (B, 1, L, L) bool."""
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
    """Positions of a packed row: the prompt counts from 0, every response from the prompt's length P. (B, L) -> (B, L) long."""
    prompt_length = (segment_ids == 0).sum(dim=1, keepdim=True)  # (B, 1)
    return offset_in_segment(segment_ids) + torch.where(segment_ids == 0, 0, prompt_length)


def scatter_to_responses(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put the N per-token values of all responses back into their (R, T) grid, zero where padded. Differentiable."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
