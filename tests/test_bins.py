"""--packing: conversations put together up to --max_length train as they do apart, in fewer steps."""

import re
from pathlib import Path

import pytest
import torch

import train_sft
from common.errors import InputError
from data.bins import Bins, best_fit
from tests import zoo
from tests.test_equivalence import metrics_of, ragged_rows, trainer_of

FLAGS = "--freeze_vision_tower True --packing True"


def test_best_fit_by_hand():
    """7 alone leaves 3, 6 alone leaves 4; 4 fits the 4 exactly, 3 the 3; 2 opens a third bin, which the last 2 joins."""
    assert best_fit([2, 3, 7, 4, 6, 2], capacity=10) == [[0, 5], [1, 2], [3, 4]]
    assert best_fit([5, 5, 5], capacity=5) == [[0], [1], [2]] and best_fit([], 5) == []
    # into the fullest bin with room, not the first: 3 joins the 6 (room 4), not the 5 (room 5)
    assert best_fit([6, 5, 3], capacity=10) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="6 tokens does not fit a bin of 5"):
        best_fit([6], 5)


def test_bins_hold_every_row_once_and_no_bin_is_too_full():
    lengths = torch.randint(1, 101, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit(lengths, 128)
    assert sorted(i for row in bins for i in row) == [*range(5000)]
    assert max(sum(lengths[i] for i in row) for row in bins) <= 128
    assert len(bins) <= 11 / 9 * sum(lengths) / 128 + 1  # the bound of best fit decreasing


def test_a_loader_draws_bins_and_collates_their_rows():
    loader = torch.utils.data.DataLoader(Bins("abcdef", [[0, 5], [1], [2, 3, 4]]), batch_size=2, collate_fn="".join)
    assert [*loader] == ["afb", "cde"] and len(loader) == 2


def _step(checkpoint: str, rows: list[dict], out: Path, flags: str) -> tuple[dict, torch.Tensor, list[tuple], int]:
    """Logged numbers, moved weights and shapes of what the decoder got in one step, and the batches of an epoch."""
    trainer = trainer_of("sft", checkpoint, rows, out, f"{flags} --logging_steps 1 --num_sample_generations 0")
    shapes = []
    trainer.base_model(trainer.model).get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    trainer.train()
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    return metrics_of(trainer.state.log_history[0]), moved, shapes, len(trainer.get_train_dataloader())


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        pytest.param("llava", "", marks=pytest.mark.slow),
        ("qwen2_5_vl", "--use_lora True --lora_dropout 0 --gradient_checkpointing True"),
        pytest.param("gemma3", "", marks=pytest.mark.slow),
    ],
)
def test_packed_rows_train_as_rows_apart(image_dir, tmp_path, family: str, flags: str):
    """All rows in one step of few bins: loss and gradient of the same rows, each a batch of its own."""
    rows, checkpoint, longest = ragged_rows(image_dir), zoo.checkpoint(family), 120
    flags += f" --freeze_vision_tower True --max_length {longest} --per_device_train_batch_size 1"
    flags += f" --gradient_accumulation_steps {len(rows)}"  # more than there are bins: all of them are one step
    apart, moved_apart, _, batches = _step(checkpoint, rows, tmp_path, flags)
    packed, moved, shapes, bins = _step(checkpoint, rows, tmp_path, f"{flags} --packing True")
    assert batches == len(rows) > bins > 1
    # end to end: one row each, behind what the check before the first step reads
    assert all(rows == 1 and tokens <= longest for rows, tokens in shapes[-bins:])
    assert sum(tokens for _, tokens in shapes[-bins:]) > longest
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert (moved - moved_apart).norm() <= 1e-5 * moved_apart.norm() > 0


def test_an_epoch_of_bins_sees_every_row_once(llava, image_dir, tmp_path, caplog):
    rows = ragged_rows(image_dir, 7)
    trainer = trainer_of(
        "sft",
        llava,
        rows,
        tmp_path,
        f"{FLAGS} --max_length 90 --per_device_train_batch_size 2 --train_sampling_strategy random",
    )
    texts = [
        text
        for batch in trainer.get_train_dataloader()
        for text in trainer.processing_class.tokenizer.batch_decode(batch["input_ids"])
    ]
    answers = [row["responses"][0] for row in rows]
    assert sorted(next(a for a in sorted(answers, key=len)[::-1] if a in text) for text in texts) == sorted(answers)
    (said,) = [r.message for r in caplog.records if r.message.startswith("Packing")]
    assert re.fullmatch(r"Packing: 7 conversations in \d rows of at most 90 tokens, which are \d\d% full\.", said)


@pytest.mark.parametrize(
    ("family", "flags", "why"),
    [
        ("llava", "", "fills rows up to --max_length"),
        ("qwen3_5", "--max_length 200", "cannot here: leave it out"),
        ("llava", "--max_length 200 --train_sampling_strategy group_by_length", "leave --train_sampling_strategy"),
    ],
)
def test_what_cannot_be_packed_is_refused(image_dir, tmp_path, family: str, flags: str, why: str):
    with pytest.raises(InputError, match=f"^--packing .*{why}"):
        trainer_of("sft", zoo.checkpoint(family), ragged_rows(image_dir, 2), tmp_path, f"{FLAGS} {flags}")


def test_streamed_rows_are_not_packed(llava, tmp_path):
    flags = f"--model_name_or_path {llava} --dataset_name x --data_path x --output_dir {tmp_path} --max_length 90 --max_steps 1"
    with pytest.raises(InputError, match=r"^--packing puts rows from anywhere in the data together, which --streaming"):
        train_sft.main(f"{flags} --streaming True {FLAGS}".split())
