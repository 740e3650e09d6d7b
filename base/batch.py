"""What collators hand to trainers: the fields of every kind of batch, with their shapes.

A batch is a plain dict, so that a family's collator can replace a field:
`padded_batch["img_input_dict"] = dict(pixel_values=...)`. The classes below say which keys it has and what they hold;
`total=False`, because some fields are there only when a loss or the data asks for them.

    B rows of at most L tokens      R responses of at most T tokens      M pairs      N tokens that are scored
"""

from io import BytesIO
from typing import Any, TypedDict

from torch import Tensor

from base.segments import Layout

# Keyword arguments of the model: pixel_values and what else the family's processor returns
ImageInputs = dict[str, Any]


class ImageBatch(TypedDict, total=False):
    """The images of a batch."""

    img_path: list[str | BytesIO]  # of all rows in order, as PIL.Image.open takes them
    img_input_dict: ImageInputs  # the same, ready for the model; entries per token are (B, L, ...) as input_ids
    where: list[str]  # (B,), file and row number, for messages


class SFTBatch(ImageBatch, total=False):
    """Conversations, padded on the right."""

    input_ids: Tensor  # (B, L) long
    attention_mask: Tensor  # (B, L) long
    layout: Layout  # one segment a row
    labels: Tensor  # (B, L) long, -100 where nothing is trained
    completion_index: Tensor  # (N,) long, flat position b * L + t whose hidden state predicts a trained token
    completion_ids: Tensor  # (N,) long, the trained tokens


class PackedBatch(TypedDict, total=False):
    """Prompts with their responses as base/packing.py lays them out."""

    input_ids: Tensor  # (B, L) long
    segment_ids: Tensor  # (B, L) long: 0 what all responses of the row share, 1.. its responses, -1 padding
    completion_index: (
        Tensor  # (R, T) long, flat position b * L + t whose hidden state predicts the token; 0 where padded
    )
    completion_ids: Tensor  # (R, T) long, the tokens of each response; 0 where padded
    completion_mask: Tensor  # (R, T) bool, True on real tokens, of which there are N
    completion_places: Tensor  # (N,) long, flat positions r * T + t of the real tokens, response after response
    last_tokens: Tensor  # (R,) long, flat position b * L + t of each response's last token
    # Where responses begin alike, so that what they share goes through lm_head once
    scored: Tensor  # (S,) long, which of the N tokens come first among equal ones
    scored_as: Tensor  # (N,) long, which of the S each token is
    packed: bool  # whether any row holds several responses
    layout: Layout  # where the segments lie, as numbers of Python: whoever reads them does not wait for the device


class ResponseBatch(PackedBatch, ImageBatch, total=False):
    """Packed rows with their images."""

    rows: Tensor  # (R,) long, which row given to the collator each response belongs to


class DPOBatch(ResponseBatch, total=False):
    """Ranked responses as pairs (or single answers), and what losses ask for (losses.NEEDS)."""

    chosen: Tensor  # (M,) long, the better response of each pair, 0..R-1
    rejected: Tensor  # (M,) long, the worse one
    # Columns of the rows
    margin: Tensor  # (M,)
    scores: Tensor  # (R,), nan for responses of further rows
    severity: Tensor  # (R,), nan for responses of further rows
    own_of_row: dict[str, Tensor]  # (M,) each, columns of the user's own that a loss reads
    own_of_response: dict[str, Tensor]  # (R,) each, nan for responses of further rows
    reference_logps: Tensor  # (R, T), cached log-probs of the reference; 0 where padded
    # Responses that stand in the batch again: which response repeats each one, -1 where none does
    corrupted_of: Tensor  # (R,) long, on the corrupted image
    image_rejected_of: Tensor  # (R,) long, on the row's second image
    negative_of: Tensor  # (R,) long, on the same image, to be replaced by the policy's tokens
    # Instead of pairs, from rows with single answers
    answers: Tensor  # (N,) long, the answers that count
    desirable: Tensor  # (N,) bool, whether they are good
    mismatched: Tensor  # (J,) long, other rows' answers to their prompts
    # Segments in which the two answers of a pair differ
    chosen_changed: Tensor  # (M, T) bool
    rejected_changed: Tensor  # (M, T) bool
    # Batches for passes without gradient
    text_only: ResponseBatch  # all responses without images
    probe: ResponseBatch  # the chosen responses on corrupted images, from which the policy's tokens are read


class RMBatch(DPOBatch, total=False):
    """The same for a reward model."""

    source: list[str | None]  # (rows,), the data set of each row
    counted: Tensor  # (R,) bool, False for the responses of a row that fills up the last batch of an evaluation


class PPOBatch(ImageBatch, total=False):
    """Prompts, not padded: there are no responses yet. Entries of `img_input_dict` per token are a list per prompt."""

    rows: list[dict[str, Any]]  # (B,), the rows of the data set
    prompts: list[list[int]]  # (B,) token ids, image tokens included


Batch = SFTBatch | DPOBatch | RMBatch
