"""What saves time changes no number: shared beginnings of answers, cached references, batches of equal length."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch

from base.loading import load_model
from base.packing import common_beginning, pack_rows, packed_mask, packed_positions
from base.segments import Layout
from models import core_mapper_for
from tests import zoo
from tests.test_dpo import LORA, dpo_trainer

EDITED = [
    "A red square on the table and a blue circle left of a yellow star.",
    "A red square on the table and two green triangles.",
]


# -- a common beginning of the responses ---------------------------------------------------------------------------------


def test_common_beginning_leaves_every_response_a_token():
    assert common_beginning([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_beginning([[1, 2], [1, 2, 3]]) == 1  # one begins with all of the other
    assert common_beginning([[7], [7]]) == 0
    assert common_beginning([[1, 2, 3], [1, 2, 4], [1, 9]]) == 1
    assert common_beginning([[1, 2, 3]]) == 0


def test_layout_of_a_shared_beginning_by_hand():
    packed = pack_rows([[1, 2], [3]], [[[10, 11, 12, 13], [10, 11, 14]], [[20], [21]]], pad_token_id=0, shared=[2, 0])
    assert packed["input_ids"].tolist() == [[1, 2, 10, 11, 12, 13, 14], [3, 20, 21, 0, 0, 0, 0]]
    assert packed["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 2], [0, 1, 2, -1, -1, -1, -1]]
    assert packed["completion_index"].tolist() == [[1, 2, 3, 4], [1, 2, 3, 0], [7, 0, 0, 0], [7, 0, 0, 0]]
    assert packed["completion_ids"].tolist() == [[10, 11, 12, 13], [10, 11, 14, 0], [20, 0, 0, 0], [21, 0, 0, 0]]
    assert packed_positions(packed["segment_ids"])[0].tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert packed_mask(packed["segment_ids"])[0, 0, 6].tolist() == [True, True, True, True, False, False, True]
    # Ten response tokens, of which the second response's first two are the first's
    assert packed["scored"].tolist() == [0, 1, 2, 3, 6, 7, 8]
    assert packed["scored_as"].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]


@pytest.mark.parametrize("family", sorted(zoo.BUILDERS.keys() - zoo.ONE_ROW_PER_RESPONSE))
def test_edited_answers_on_every_family(family: str):
    """Log-probs of a shared beginning equal those of separate rows: masks and positions of every family stay right."""
    path = zoo.checkpoint(family)
    adapter = core_mapper_for(path)
    processor = adapter.processor(path)
    model = load_model(path, dtype=torch.float32).eval()
    rows = [
        {
            "images": [zoo.image(seed)],
            "prompt": [{"role": "user", "content": question}],
            "responses": [*EDITED, EDITED[0] + " no"][: 2 + seed],
            "ranks": [0.0, 1.0, 2.0][: 2 + seed],
        }
        for seed, question in enumerate(("What is in this image?", "Describe the photo, yes or no"))
    ]
    found, shapes = [], []
    for share in (True, False):
        batch = adapter.dpo_collator(processor, share_prefix=share)(rows)
        mask = batch["completion_mask"]
        with torch.no_grad():
            images = model.encode_images(batch["img_input_dict"])
            logps = model(
                **model.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"]),
                completion_index=batch["completion_index"][mask],
                completion_ids=batch["completion_ids"][mask],
            ).logps
        found.append(logps)
        shapes.append(batch)
    shared = common_beginning(
        [
            r[: n.sum()].tolist()
            for r, n in zip(shapes[1]["completion_ids"][:2], shapes[1]["completion_mask"], strict=False)
        ]
    )
    assert shared > 3 and "scored" in shapes[0] and "scored" not in shapes[1]
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=0)


def test_an_image_sees_itself_in_rows_shorter_than_the_window():
    """Gemma 4: bidirectional images in layers with a window, where the window hides nothing of the row."""
    path = zoo.checkpoint("gemma4")
    adapter = core_mapper_for(path)
    model = load_model(path, dtype=torch.float32).eval()
    text = model.config.get_text_config()
    assert text.use_bidirectional_attention == "vision"
    text.sliding_window = 4096
    row = {
        "images": [zoo.image(0)],
        "prompt": [{"role": "user", "content": "What?"}],
        "responses": ["yes it is", "no"],
        "ranks": [0.0, 1.0],
    }
    found = []
    for share in (True, False):
        batch = adapter.dpo_collator(adapter.processor(path), share_prefix=share)([row])
        mask = batch["completion_mask"]
        with torch.no_grad():
            images = model.encode_images(batch["img_input_dict"])
            outputs = model(
                **model.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"]),
                completion_index=batch["completion_index"][mask],
                completion_ids=batch["completion_ids"][mask],
            )
        found.append(outputs.logps)
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("flags", [LORA, LORA + " --gradient_checkpointing True", ""])
def test_edited_answers_give_the_same_gradients(llava, preference_rows, tmp_path, flags: str):
    rows = [row | {"responses": EDITED} for row in preference_rows[:2]] + [preference_rows[2]]
    found = {}
    for share in (True, False):
        trainer = dpo_trainer(llava, _dataset(rows), tmp_path, f"{flags} --share_prefix {share}")
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        assert ("scored" in batch) == share
        seen = []
        trainer.base_model(trainer.model).lm_head.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0].shape[0])
        )
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        tokens = int(batch["completion_mask"].sum())
        assert seen[-1] == len(batch["scored"]) < tokens if share else seen[-1] == tokens
        found[share] = loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=0)
    for name, gradient in found[False][1].items():
        assert (gradient - found[True][1][name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def _dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


# -- the reference's log-probs on disk -----------------------------------------------------------------------------------


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def _cached(llava, data, tmp_path, cache_dir, flags="", **kwargs):
    return dpo_trainer(
        llava, data, tmp_path, f"{flags} --precompute_ref_log_probs True --ref_log_probs_dir {cache_dir}", **kwargs
    )


def _first_losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("flags", [LORA, "", LORA + " --share_prefix False", LORA + " --loss_type sigmoid_norm"])
def test_cached_reference_gives_the_same_losses(llava, preference_data, tmp_path, cache_dir, flags: str):
    online = _first_losses(dpo_trainer(llava, preference_data, tmp_path, flags))
    trainer = _cached(llava, preference_data, tmp_path, cache_dir, flags)
    assert trainer.ref_model is None
    assert _first_losses(trainer) == pytest.approx(online, abs=1e-5)
    again = _cached(llava, preference_data, tmp_path, cache_dir, flags)
    assert _rows_asked(again) == 0
    assert _first_losses(again) == pytest.approx(online, abs=1e-5)


def _rows_asked(trainer) -> int:
    """Run the reference pass; the number of rows that the reference was asked about."""
    rows, compute = [], trainer.reference_logps
    trainer.reference_logps = lambda batch: rows.append(int(batch["rows"].max()) + 1) or compute(batch)
    trainer.precompute_reference_logps()
    trainer.reference_logps = compute
    return sum(rows)


def test_the_reference_is_never_asked_in_training(llava, preference_data, tmp_path, cache_dir):
    trainer = _cached(llava, preference_data, tmp_path, cache_dir, LORA)
    trainer.precompute_reference_logps()
    trainer.reference_context = None  # a call would fail
    assert len(_first_losses(trainer)) == 3


def test_a_killed_pass_goes_on(llava, preference_data, tmp_path, cache_dir):
    from base.reference_cache import ReferenceCache

    first = _cached(llava, preference_data, tmp_path, cache_dir, LORA)
    calls = []

    def killed(batch, compute=first.reference_logps):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return compute(batch)

    first.reference_logps = killed
    flush, ReferenceCache_add = ReferenceCache.flush, ReferenceCache.add
    try:
        ReferenceCache.add = lambda self, key, logps: (ReferenceCache_add(self, key, logps), flush(self))
        with pytest.raises(KeyboardInterrupt):
            first.train()
    finally:
        ReferenceCache.add = ReferenceCache_add
    second = _cached(llava, preference_data, tmp_path, cache_dir, LORA)
    assert _rows_asked(second) == len(preference_data) - 6  # three batches of two were on disk


def test_whatever_matters_changes_the_key(llava, preference_rows, tmp_path, cache_dir):
    import shutil

    from PIL import Image

    def computed(rows, flags=LORA, checkpoint=llava, change=None) -> int:
        trainer = _cached(checkpoint, _dataset(rows), tmp_path, cache_dir, flags)
        if change:
            change(trainer)
        return _rows_asked(trainer)

    def another_template(trainer):
        processor = trainer.processing_class.processor
        processor.chat_template = processor.chat_template.replace("ASSISTANT", "Assistant")

    def other_weights(trainer):
        with torch.no_grad():
            next(trainer.model.get_vision_tower().parameters()).view(-1)[0] += 1e-3

    def shorter(trainer):
        from data.lengths import LengthLimits

        trainer.data_collator.limits = LengthLimits(max_target_length=3)

    picture = tmp_path / "picture.png"
    shutil.copy(preference_rows[0]["images"][0], picture)
    rows = [row | {"images": [str(picture)]} for row in preference_rows[:2]]
    assert computed(rows) == 2
    assert computed(rows) == computed(rows, LORA + " --seed 5") == computed(rows[:1]) == 0
    assert computed([rows[0], rows[1] | {"responses": ["a", "b"]}]) == 1
    assert computed([rows[0], rows[1] | {"prompt": [{"role": "user", "content": "Why?"}]}]) == 1
    Image.new("RGB", (30, 30), "red").save(picture)  # the same path, another picture
    assert computed(rows) == 2
    assert computed(rows, change=another_template) == 2
    assert computed(rows, change=other_weights) == 2
    assert computed(rows, change=shorter) == 2
    assert computed(rows, change=lambda trainer: trainer.model.bfloat16()) == 2
    assert computed(rows) == 0


def test_a_second_image_of_the_row_is_cached_too(llava, preference_rows, tmp_path, cache_dir):
    rows = [
        row | {"image_rejected": other["images"][0]}
        for row, other in zip(preference_rows, reversed(preference_rows), strict=True)
    ]
    from tests.test_preference_losses import trainer_for

    found = [
        _first_losses(trainer_for(llava, _dataset(rows), tmp_path, f"{LORA} --loss_type rdpo {flags}"))
        for flags in ("", f"--precompute_ref_log_probs True --ref_log_probs_dir {cache_dir}")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_rows_come_back_in_any_batch(llava, preference_rows, tmp_path, cache_dir):
    """Four responses, edited answers, evaluation rows: each row gets the log-probs that the reference gives it."""
    rows = [
        preference_rows[0] | {"responses": ["a", "b c", "d e f", "g h i j"], "ranks": [0.0, 1.0, 1.0, 2.0]},
        preference_rows[1] | {"responses": EDITED},
        *preference_rows[2:4],
    ]
    trainer = _cached(llava, _dataset(rows), tmp_path, cache_dir, LORA, eval_data=_dataset(rows[1:]))
    trainer.precompute_reference_logps()
    for dataset, order in ((trainer.train_dataset, [2, 0, 1]), (trainer.eval_dataset, [1, 0])):
        batch = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in order]))
        cached = batch.pop("reference_logps")
        batch["image_inputs"] = trainer.image_inputs(trainer.model, batch)
        torch.testing.assert_close(cached, trainer.reference_logps(batch).logps, atol=1e-5, rtol=0)


# -- batches of equal length ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prefix", [True, False])
def test_batches_are_grouped_by_packed_length(llava, preference_rows, tmp_path, share_prefix: bool):
    rows = [
        row | {"prompt": [{"role": "user", "content": "What is this?" + " photo" * (7 * i % 8) * 20}]}
        for i, row in enumerate(preference_rows)
    ]
    flags = f"{LORA} --train_sampling_strategy group_by_length --share_prefix {share_prefix}"
    trainer = dpo_trainer(llava, _dataset(rows), tmp_path, flags)
    lengths = trainer.train_dataset["length"][:]
    packed = [trainer.data_collator([row])["segment_ids"] for row in rows]
    assert lengths == [int((segments >= 0).sum()) for segments in packed] and len(set(lengths)) == 8
    assert list(trainer._get_train_sampler(trainer.train_dataset).lengths) == lengths
    assert len(_first_losses(trainer)) == 3


# -- attention by segments -----------------------------------------------------------------------------------------------


SEGMENTS = torch.tensor(
    [[0] * 5 + [1] * 3 + [2] * 4, [0] * 4 + [1] * 2 + [2] + [3] * 2 + [-1] * 3, [0] * 3 + [1] * 2 + [-1] * 7]
)


def test_attention_by_segments_equals_the_masked_one(monkeypatch):
    """Outputs and gradients; rows of different layout, padding, fewer key heads than query heads; what a CUDA kernel is asked for."""
    from types import SimpleNamespace

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from base import packed_attention
    from base.packed_attention import packed_sdpa, segment_mask, with_layout

    layout = Layout(SEGMENTS)
    module, found = SimpleNamespace(num_key_value_groups=2), {}
    real = (SEGMENTS >= 0)[:, :, None, None]
    torch.manual_seed(0)
    values = [torch.randn(3, heads, 12, 8) for heads in (4, 2, 2)]
    weights = torch.randn(3, 12, 4, 8)

    def attention(function: Callable, mask: torch.Tensor, end_to_end: bool = False) -> list[torch.Tensor]:
        """Output and gradients, (B, L, ...) each."""
        q, k, v = leaves = [x.clone().requires_grad_() for x in values]
        if end_to_end:
            q, k, v = (layout.end_to_end(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        out = function(module, q, k, v, mask, scaling=0.3)[0]
        if end_to_end:
            out = (
                torch.zeros(36, 4, 8).index_copy(0, (SEGMENTS.flatten() >= 0).nonzero()[:, 0], out[0]).view(3, 12, 4, 8)
            )
        out = out * real
        (out * weights).sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    masked = attention(sdpa_attention_forward, packed_mask(SEGMENTS))
    own = with_layout(packed_mask(SEGMENTS).clone(), layout)  # as a family's own
    found = {
        "padded": attention(packed_sdpa, segment_mask(layout, SEGMENTS.device)),
        "end to end": attention(packed_sdpa, segment_mask(layout, SEGMENTS.device), end_to_end=True),
        "own mask": attention(packed_sdpa, own),
        "own mask, end to end": attention(packed_sdpa, own, end_to_end=True),
    }
    monkeypatch.setattr(packed_attention, "takes_kernel", lambda *_: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", plain_varlen_attention)
    found["kernel"] = attention(packed_sdpa, segment_mask(layout, SEGMENTS.device), end_to_end=True)
    for name, tensors in found.items():
        for one, other in zip(tensors, masked, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def plain_varlen_attention(
    query, key, value, starts, key_starts, longest, longest_keys, *, scale, window_size, enable_gqa
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, sequence by sequence: a causal mask that ends with the last query and key."""
    assert window_size == (-1, 0) and enable_gqa and query.shape[1] == 2 * key.shape[1]
    assert starts.dtype == key_starts.dtype == torch.int32
    assert longest == starts.diff().max() and longest_keys == key_starts.diff().max()
    out = []
    for i in range(len(starts) - 1):
        q, k, v = (
            t[a[i] : a[i + 1]].transpose(0, 1) for t, a in ((query, starts), (key, key_starts), (value, key_starts))
        )
        scores = scale * q @ k.repeat_interleave(2, 0).transpose(1, 2)  # (H, queries, keys)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        out.append((scores.masked_fill(future, -math.inf).softmax(-1) @ v.repeat_interleave(2, 0)).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_answers_apart_is_plain_attention(heads: int, scaling: float | None, padded: bool):
    """Every query of K = 3 answers by itself over its prompt's keys and its own; values wider than keys."""
    from base.packed_attention import attend_apart

    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 10)
    own_key, own_value = torch.randn(2, heads, 3, 7, 8)[:, :, :, :6], torch.randn(2, heads, 3, 6, 10)
    hidden = torch.tensor([[True, True, False, False, False], [False] * 5])[:, None, None, :] if padded else None
    found = attend_apart(query, key, value, own_key, own_value, hidden, scaling)
    assert found.shape == (2, 3, 4, 10)
    for b, h, k in product(range(2), range(4), range(3)):
        of = h // (4 // heads)  # the head of the keys
        first = 2 if padded and b == 0 else 0
        keys = torch.cat([key[b, of, first:], own_key[b, of, k]])
        values = torch.cat([value[b, of, first:], own_value[b, of, k]])
        weights = (query[b, h, k] @ keys.T * (8**-0.5 if scaling is None else scaling)).softmax(-1)
        torch.testing.assert_close(found[b, k, h], weights @ values, atol=1e-6, rtol=1e-5)


def test_layout_of_segments_by_hand():
    layout = Layout(torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 1, -1], [0, -1, -1, -1, -1]]))
    assert layout.rows == [[2, 1, 2], [3, 1], [1]]
    assert (layout.tokens, layout.padded, layout.several) == (10, True, True)
    tokens = torch.arange(15).view(3, 5)
    assert layout.end_to_end(tokens).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 10]]
    assert layout.end_to_end(torch.stack([tokens, -tokens]), 1)[1].tolist() == [
        [0, -1, -2, -3, -4, -5, -6, -7, -8, -10]
    ]
    assert layout.places(torch.tensor([0, 8, 10])).tolist() == [0, 8, 9]
    starts, key_starts, keys, longest, longest_keys = layout.sequences(torch.device("cpu"))
    assert starts.tolist() == [0, 3, 5, 9, 10]  # what is shared and a response, another response, two ordinary rows
    assert key_starts.tolist() == [0, 3, 7, 11, 12]
    assert keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert (longest, longest_keys) == (4, 4)


def test_sdpa_of_transformers_is_replaced_by_the_first_packed_row_alone():
    """Loading, plain rows without padding and generation leave transformers as it is; masks without a layout reach its own function."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from base.packed_attention import packed_sdpa

    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)  # as in a fresh process
    model = load_model(zoo.checkpoint("llava"), dtype=torch.float32).eval()
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    model.packed_inputs(ids, torch.zeros_like(ids), {}, packed=False)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    model.packed_inputs(ids, torch.tensor([[0] * 6 + [1] * 2 + [2] * 2]), {}, packed=True)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].func is packed_sdpa
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "mistral3"])
def test_attention_by_segments_is_what_runs(family: str, monkeypatch):
    """In every layer of these families, and without a mask that could be used instead."""
    from base import packed_attention

    path = zoo.checkpoint(family)
    adapter = core_mapper_for(path)
    model = load_model(path, dtype=torch.float32).eval()
    batch = adapter.dpo_collator(adapter.processor(path))(
        [
            {
                "images": [zoo.image(0)],
                "prompt": [{"role": "user", "content": "What?"}],
                "responses": ["yes", "no"],
                "ranks": [0.0, 1.0],
            }
        ]
    )
    images = model.encode_images(batch["img_input_dict"])  # the tower has no packed rows
    layers, compute = [], packed_attention._by_segments
    monkeypatch.setattr(packed_attention, "_by_segments", lambda *args: layers.append(1) or compute(*args))
    inputs = model.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"])
    masks = inputs["attention_mask"]
    assert all(mask.numel() == 0 for mask in (masks.values() if isinstance(masks, dict) else [masks]))
    with torch.no_grad():
        model(**inputs, completion_index=batch["completion_index"][batch["completion_mask"]])
    assert len(layers) == model.config.get_text_config().num_hidden_layers


# -- rows end to end -----------------------------------------------------------------------------------------------------


def ragged_rows(family: str) -> list[dict]:
    """Rows of different lengths, two or three answers, with two images in one of them where the family takes several."""
    several = family not in ("blip_2", "instructblip")
    return [
        {
            "images": [zoo.image(seed + i) for i in range(1 + (seed == 1 and several))],
            "prompt": [{"role": "user", "content": question}],
            "responses": [*EDITED, EDITED[0] + " no"][: 2 + seed % 2],
            "ranks": [0.0, 1.0, 2.0][: 2 + seed % 2],
        }
        for seed, question in enumerate(("What is in this image?", "Describe the photo, yes or no. " * 3, "What"))
    ]


@pytest.mark.parametrize("family", sorted(zoo.BUILDERS))
def test_rows_end_to_end_are_the_padded_ones_on_every_family(family: str, monkeypatch):
    """Log-probs and gradients of packed and of plain rows; the model sees one row without padding."""
    path = zoo.checkpoint(family)
    adapter = core_mapper_for(path)
    collator, model = adapter.dpo_collator(adapter.processor(path)), load_model(path, dtype=torch.float32).eval()
    for share in (True, False) if model.packs else (False,):
        collator.share_prefix, found = share, []
        for end_to_end in (True, False):
            monkeypatch.setattr(type(model), "end_to_end", end_to_end and type(model).end_to_end)
            batch = collator(ragged_rows(family))
            model.zero_grad()
            shapes = []
            seen = model.get_decoder().register_forward_pre_hook(
                lambda _, args, kwargs, shapes=shapes: shapes.append(_shape(args, kwargs)), with_kwargs=True
            )
            places = batch["completion_places"]
            logps = model(
                **model.packed_inputs(
                    batch["input_ids"], batch["segment_ids"], batch["img_input_dict"], batch["packed"], batch["layout"]
                ),
                completion_index=batch["completion_index"].flatten()[places],
                completion_ids=batch["completion_ids"].flatten()[places],
            ).logps
            seen.remove()
            (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.get_decoder().parameters() if p.grad is not None])
            found.append((logps.detach(), gradient))
            layout = batch["layout"]
            assert layout.padded
            assert shapes == [(1, layout.tokens) if model.lays_end_to_end else layout.shape]
        monkeypatch.undo()
        assert model.lays_end_to_end == (family not in ("mllama", "qwen_vl", "qwen3_5", "lfm2_vl"))
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
        assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[1][1].norm()


def _shape(args: tuple, kwargs: dict) -> tuple[int, ...]:
    given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
    return tuple(next(x for x in given if x is not None).shape[:2])
