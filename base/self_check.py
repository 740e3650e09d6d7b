"""Before the first step: the log-probs that training uses are those of the class's own forward.

Training takes hidden states to `lm_head` itself, with images encoded beforehand and the responses of a prompt in one
row. A class whose forward does more (scales its logits, reads further inputs) would train on other numbers than it
generates with, and nothing else would show it.
"""

import functools
import inspect
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from base.batch import ResponseBatch
from base.collator import VLDPODataCollatorWithPadding
from base.fsdp import in_root
from base.loading import core_mapper_for
from base.model import VLModelMixin
from base.processor import VLProcessor
from common.errors import InputError

# Mean absolute difference of a token's log-prob, in nats: rounding (TF32 on GPUs) stays far below, a missing scale far above.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.2}


class SelfCheck(TrainerCallback):
    """Runs `check_log_probs` when model, devices and DeepSpeed are ready. All devices do the same."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a VLTrainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check, and stop the run if log-probs differ."""
        trainer = self.trainer
        share_prefix = getattr(trainer.data_collator, "share_prefix", False)
        with torch.no_grad(), trainer.accelerator.autocast():
            check = functools.partial(
                check_log_probs,
                trainer.base_model(trainer.model),
                trainer.processing_class,
                share_prefix,
                trainer._prepare_inputs,
            )
            in_root(trainer.model, check)


def check_log_probs(model: VLModelMixin, processor: VLProcessor, share_prefix: bool, prepare: Any = dict) -> None:
    """Compare log-probs of two rows with images as training computes them with those of the class's own forward.

    Args:
        model: a family's model, without wrappers.
        processor: in training mode.
        share_prefix: whether training lays out the responses of a prompt in one row.
        prepare: moves a batch to the model's device.

    Raises:
        InputError: they differ; names the method that the family has to override.
    """
    try:
        collator = core_mapper_for(model.config.name_or_path).dpo_collator
    except InputError:  # the base of an adapter has moved, for example
        collator = VLDPODataCollatorWithPadding
    padded = prepare(collator(processor, share_prefix=False).responses_only(_rows()))
    training = model.training
    model.eval()
    try:
        expected = _native_logps(model, padded)

        def difference(batch: ResponseBatch, images: dict[str, Any], plain: bool = False) -> float:
            return (_logps(model, batch, images, plain) - expected).abs().mean().item()

        tolerance = TOLERANCE[_precision(model)]
        batch = prepare(collator(processor, share_prefix=True).responses_only(_rows())) if share_prefix else padded
        found = difference(batch, model.encode_images(batch["img_input_dict"]))
        if found <= tolerance:
            return
        if not difference(padded, padded["img_input_dict"], plain=True) <= tolerance:
            hook = (
                "last_hidden_state (or get_output_embeddings), so that the head makes the logits of forward out of it"
            )
        elif not difference(padded, model.encode_images(padded["img_input_dict"]), plain=True) <= tolerance:
            hook = "encode_images, whose features must stand for the pixels"
        else:
            hook = "packed_attention_mask or packed_position_ids (or set end_to_end or packs = False)"
    finally:
        model.train(training)
    raise InputError(
        f"Log-probs of a padded batch with images differ from the own forward of {type(model).__name__} by {found:.2g} nats "
        f"a token, which would train another model than the one that generates: override {hook} in the family's model "
        "class (docs/CustomizedModel.md)."
    )


def _rows() -> list[dict[str, Any]]:
    """Two rows of different lengths, with pictures of different shapes and answers that begin alike."""
    questions = {"What is this?": (64, 64), "Describe the picture in one short sentence.": (96, 64)}
    return [
        {
            "images": [Image.linear_gradient("L").resize(size).convert("RGB")],
            "prompt": [{"role": "user", "content": question}],
            "responses": ["A red square.", "A red circle on a table."],
        }
        for question, size in questions.items()
    ]


def _precision(model: VLModelMixin) -> torch.dtype:
    """What the forward rounds to: the coarsest type of weights, or autocast's."""
    types = {p.dtype for p in model.parameters()}
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        device = next(model.parameters()).device.type
        types |= {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
    if getattr(model, "is_quantized", False) or torch.bfloat16 in types:
        return torch.bfloat16
    return torch.float16 if torch.float16 in types else torch.float32


def _logps(model: VLModelMixin, batch: ResponseBatch, images: dict[str, Any], plain: bool = False) -> Tensor:
    """Log-probs (N,) of all response tokens, response after response, as the trainers compute them; `plain`: in padded rows."""
    mask, ids, segments = batch["completion_mask"], batch["input_ids"], batch["segment_ids"]
    if plain:
        inputs = {"input_ids": ids, "attention_mask": (segments >= 0).long(), "use_cache": False, **images}
    else:
        inputs = model.packed_inputs(ids, segments, images, batch["packed"], batch["layout"])
    return model(
        **inputs,
        completion_index=batch["completion_index"][mask],
        completion_ids=batch["completion_ids"][mask],
    ).logps


def _native_logps(model: VLModelMixin, batch: ResponseBatch) -> Tensor:
    """The same tokens' log-probs from the logits of the class's own forward, given pixels and a padded batch."""
    mask = batch["completion_mask"]
    length = batch["input_ids"].shape[1]
    index = batch["completion_index"][mask]
    row, column = torch.div(index, length, rounding_mode="floor"), index % length
    first = int(column.min())
    keep = {"logits_to_keep": length - first} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=(batch["segment_ids"] >= 0).long(),
        use_cache=False,
        **batch["img_input_dict"],
        **keep,
    )
    logits = output[0] if isinstance(output, tuple) else output.logits
    column = column - (length - logits.shape[1])
    return logits[row, column].float().log_softmax(-1).gather(1, batch["completion_ids"][mask][:, None])[:, 0]
