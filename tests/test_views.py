"""Further rows of a batch, worked by hand: which responses they repeat, on which images."""

import pytest
from PIL import Image

from base.corruption import corrupt_pictures
from base.views import Places, better_responses, image_rejected_view, paired_responses, with_copies, without_images
from common.errors import InputError
from models import core_mapper_for

ROWS = [
    {"images": ["a.png", "b.png"], "image_rejected": "c.png", "responses": ["r0", "r1", "r2"]},
    {"images": ["d.png"], "image_rejected": "e.png", "responses": ["s0", "s1"]},
]
PAIRS = [[(1, 0), (1, 2)], [(0, 1)]]


def test_a_view_repeats_some_responses_on_other_images():
    view = image_rejected_view(ROWS, [better_responses(pairs) for pairs in PAIRS])
    assert [row["images"] for row in view.rows] == [["c.png", "b.png"], ["e.png"]]
    assert [row["responses"] for row in view.rows] == [["r1"], ["s0"]]
    assert len(view) == 2
    # The batch: r0 r1 r2 s0 s1, then the view's r1 s0
    places = Places(ROWS, 7)
    assert places.of([[1, 1], [0]]).tolist() == [1, 1, 3]
    assert places.repeats(view.repeated, range(places.end, 7)).tolist() == [-1, 5, -1, 6, -1, -1, -1]


def test_a_row_without_a_pair_keeps_one_response_in_its_view():
    assert better_responses([]) == paired_responses([]) == [0]
    assert paired_responses(PAIRS[0]) == [0, 1, 2] and better_responses([(2, 0), (1, 0)]) == [1, 2]


def test_copies_stand_behind_the_responses_of_their_row():
    rows = [with_copies(row, better_responses(pairs)) for row, pairs in zip(ROWS, PAIRS, strict=True)]
    assert [row["responses"] for row in rows] == [["r0", "r1", "r2", "r1"], ["s0", "s1", "s0"]]
    places = Places(rows, 7)
    assert places.repeats([[1], [0]], places.of([[3], [2]])).tolist() == [-1, 3, -1, -1, 6, -1, -1]


def test_text_only_rows_lose_marks_and_image_parts():
    row = {
        "images": ["a.png"],
        "prompt": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]},
        ],
    }
    stripped = without_images(row, lambda text: text.replace("<image>", ""))
    assert stripped["images"] == [] and row["images"]
    assert [m["content"] for m in stripped["prompt"]] == ["What?", [{"type": "text", "text": "And?"}]]


def test_swapped_pictures_come_from_the_next_row_that_has_some():
    red, blue, grey = (
        Image.new("RGB", size, name) for size, name in (((4, 2), "red"), ((3, 3), "blue"), ((2, 5), "grey"))
    )
    swapped = corrupt_pictures([[red, blue], [], [grey]], "swap", [0, 1, 2])
    assert [[p.size for p in row] for row in swapped] == [[(4, 2), (3, 3)], [], [(2, 5)]]
    colours = [[p.getpixel((0, 0)) for p in row] for row in swapped]
    assert colours == [[(128, 128, 128)] * 2, [], [(255, 0, 0)]]
    with pytest.raises(InputError, match="two rows or more"):
        corrupt_pictures([[red]], "swap", [0])


def test_probe_and_negatives_agree_on_rows_without_a_pair(llava, preference_rows):
    """The policy's tokens are read from the probe's responses and put into the negatives, one after the other."""
    adapter = core_mapper_for(llava)
    collator = adapter.dpo_collator(adapter.processor(llava), needs={"policy_negative"}, corruption="black")
    batch = collator([preference_rows[0], preference_rows[1] | {"ranks": [0.0, 0.0]}])
    assert batch["chosen"].tolist() == [0] and batch["negative_of"].tolist() == [2, -1, -1, 5, -1, -1]
    assert len(batch["probe"]["completion_ids"]) == 2
