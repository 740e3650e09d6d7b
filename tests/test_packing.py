"""The packed row: layout, mask, positions, worked by hand."""

from types import SimpleNamespace

import torch

from base.model import VLModelMixin
from base.packing import offset_in_segment, pack_rows, packed_mask, packed_positions, same_span, scatter_to_responses


def test_layout_of_two_rows_by_hand():
    packed = pack_rows([[1, 2, 3], [4]], [[[10, 11], [12]], [[13, 14]]], pad_token_id=0)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 10, 11, 12], [4, 13, 14, 0, 0, 0]]
    assert packed["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, -1, -1, -1]]
    # First tokens are predicted at the prompt's last position (2, and 6 + 0), the others at the position before.
    assert packed["completion_index"].tolist() == [[2, 3], [2, 0], [6, 7]]
    assert packed["completion_ids"].tolist() == [[10, 11], [12, 0], [13, 14]]
    assert packed["completion_mask"].tolist() == [[True, True], [True, False], [True, True]]


def test_a_response_sees_the_prompt_and_itself_only():
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_every_response_restarts_behind_the_prompt():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, -1, -1, -1]])
    assert packed_positions(segments)[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed_positions(segments)[1, :5].tolist() == [0, 1, 2, 3, 1]
    assert offset_in_segment(segments)[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_scatter_keeps_gradients():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = scatter_to_responses(values, torch.tensor([[True, True], [True, False]]))
    assert grid.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    grid[1, 0].backward()
    assert values.grad.tolist() == [0.0, 0.0, 1.0]


def test_runs_of_tokens_see_themselves_and_no_other_run():
    """Two images of two tokens and of one: each is seen from its own tokens alone."""
    seen = same_span(torch.tensor([[True, True, False, True, False]]))[0, 0]
    assert seen.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [3, 3]]


def test_a_window_of_two_shows_a_token_itself_and_the_one_before():
    """Measured in positions: both answers stand behind the prompt's last token, whatever lies between. As transformers, q - k < window."""
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    model = SimpleNamespace(_window=2, _by_kind=lambda mask, near: near[0, 0])
    near = VLModelMixin.packed_attention_mask(model, segments, segments, {})
    seen = [row.nonzero()[:, 0].tolist() for row in near]
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [2, 5], [5, 6]]
