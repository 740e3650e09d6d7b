"""Length limits: the rule alone; and on every family, prompts and their image tokens stay complete."""

import random
from pathlib import Path

import datasets
import pytest

from common.errors import InputError
from data.lengths import LengthCounts, LengthLimits, fit, fit_row
from models import MODEL_NICKNAME_MAP, core_mapper_for
from tests import zoo


def test_responses_are_cut_and_prompts_are_not() -> None:
    responses = [[1, 2, 3, 4], [5, 6]]
    assert fit(10, responses, LengthLimits()).responses == responses
    assert fit(10, responses, LengthLimits(max_length=13)).responses == [[1, 2, 3], [5, 6]]
    assert fit(10, responses, LengthLimits(max_target_length=1)).responses == [[1], [5]]
    assert fit(10, responses, LengthLimits(max_length=14, max_target_length=2)).responses == [[1, 2], [5, 6]]
    assert fit(10, responses, LengthLimits(max_length=11, max_prompt_length=10)).responses == [[1], [5]]
    long = fit(10, responses, LengthLimits(max_length=10))  # no room for a single token
    assert (
        long.responses is None
        and "its prompt of 10 tokens" in str(long.reason)
        and "--max_length 10" in str(long.reason)
    )
    long = fit(10, responses, LengthLimits(max_length=90, max_prompt_length=9))
    assert long.kind == "long_prompt" and "--max_prompt_length 9" in str(long.reason)
    same = fit(3, [[1, 2, 3], [1, 2, 4]], LengthLimits(max_length=5))
    assert same.kind == "same_after_cut"  # chosen and rejected differ only in what was cut: nothing to prefer


def test_rows_are_counted_and_errors_name_the_row() -> None:
    counts, limits = LengthCounts(), LengthLimits(max_length=12)
    long = [[1, 2, 3], [2, 3, 4, 5]]
    for prompt, responses in (
        (10, [[1, 2, 3], [4]]),
        (10, [[1], [2]]),
        (12, [[1], [2]]),
        (11, [[1, 2], [1, 3]]),
        (10, long),
    ):
        fit_row(prompt, responses, limits, counts)
    assert counts == LengthCounts(
        5, dropped_long_prompt=1, dropped_same_after_cut=1, shortened_rows=2, shortened_responses=3, cut_tokens=4
    )
    assert (counts + counts).as_dict("length/")["length/rows"] == 10
    with pytest.raises(InputError, match=r"^d\.json, row 7: its prompt of 12 tokens .* --overlong drop"):
        fit_row(12, [[1]], LengthLimits(max_length=12, overlong="error"), counts, "d.json, row 7")


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="above 0"):
        LengthLimits(max_length=0)
    with pytest.raises(InputError, match="leaves no token for a response"):
        LengthLimits(max_length=10, max_prompt_length=10)


def test_rule_holds_for_random_rows() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        limits = LengthLimits(
            *(rng.choice([None, rng.randint(20, 60)]) for _ in "l"),
            *(rng.choice([None, rng.randint(1, 19)]) for _ in "pt"),
        )
        prompt = rng.randint(1, 40)
        responses = [[rng.randint(0, 3) for _ in range(rng.randint(1, 40))] for _ in range(rng.randint(1, 4))]
        fitted = fit(prompt, responses, limits)
        if fitted.responses is None:
            too_long = prompt > (limits.max_prompt_length or prompt) or prompt >= (limits.max_length or prompt + 1)
            assert too_long == (fitted.kind == "long_prompt")
            continue
        for before, after in zip(responses, fitted.responses, strict=True):
            assert after == before[: len(after)] and len(after) >= 1
            assert len(after) <= (limits.max_target_length or 99) and prompt + len(after) <= (limits.max_length or 999)
            full = (
                len(after) == len(before)
                or len(after) == limits.max_target_length
                or prompt + len(after) == limits.max_length
            )
            assert full  # nothing is cut unnecessarily


def rows_of(kind: str, folder: Path, rng: random.Random) -> datasets.Dataset:
    rows = []
    for i in range(6):
        path = folder / f"{kind}{i}.png"
        zoo.image(i, width=rng.randint(20, 120), height=rng.randint(20, 120)).save(path)
        words = [
            " ".join(rng.choices(["red", "square", "the", "photo", "star"], k=rng.randint(1, n))) for n in (30, 20, 20)
        ]
        user = {"role": "user", "content": f"<image>{words[0]}"}
        row = {"images": [str(path)], "where": f"row {i}"}
        if kind == "preference":
            row |= {"prompt": [user], "responses": [f"a {words[1]}", f"two {words[2]}"], "ranks": [0.0, 1.0]}
        else:
            row |= {"messages": [user, {"role": "assistant", "content": words[1]}]}
        rows.append(row)
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("family", sorted(set(MODEL_NICKNAME_MAP.values())))
def test_no_family_loses_a_prompt_or_image_token(family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    checkpoint = zoo.checkpoint(family)
    adapter = core_mapper_for(checkpoint)
    processor = adapter.processor(checkpoint)
    placeholder = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    data = rows_of("preference", tmp_path, rng)
    whole = [adapter.dpo_collator(processor)([row]) for row in data]
    prompts = [batch["input_ids"][0][batch["segment_ids"][0] == 0].tolist() for batch in whole]
    talks = rows_of("conversation", tmp_path, rng)
    full = [adapter.sft_collator(processor)([row]) for row in talks]
    longest = max(map(len, prompts))
    dropped = 0
    for _ in range(3):
        limits = LengthLimits(
            max_length=rng.choice([None, rng.randint(min(map(len, prompts)) + 1, longest + 25)]),
            max_target_length=rng.choice([None, rng.randint(1, 20)]),
        )
        try:
            kept, counts = adapter.dpo_collator(processor, limits).drop_overlong(data)
        except InputError:  # no row fits
            continue
        if counts:
            assert counts["rows"] == 6 == len(kept) + counts["dropped_long_prompt"] + counts["dropped_same_after_cut"]
            dropped += 6 - len(kept)
        for row in kept:
            batch = adapter.dpo_collator(processor, limits)([row])
            i = int(row["where"].split()[1])
            ids = batch["input_ids"][0][batch["segment_ids"][0] == 0].tolist()
            assert ids == prompts[i] and ids.count(placeholder) == prompts[i].count(placeholder)
            for mask, tokens, before in zip(
                batch["completion_mask"], batch["completion_ids"], whole[i]["completion_ids"], strict=True
            ):
                length = int(mask.sum())
                assert tokens[:length].tolist() == before[:length].tolist()
                assert 1 <= length <= (limits.max_target_length or 999) and len(ids) + length <= (
                    limits.max_length or 9999
                )
            pixels, before = batch["img_input_dict"].get("pixel_values"), whole[i]["img_input_dict"].get("pixel_values")
            assert pixels is None or pixels.equal(before)
    limits = LengthLimits(max_length=max(len(batch["input_ids"][0]) for batch in full) - 5)
    kept, _ = adapter.sft_collator(processor, limits).drop_overlong(talks)
    for row in kept:
        batch, before = adapter.sft_collator(processor, limits)([row]), full[int(row["where"].split()[1])]
        ids = batch["input_ids"][0].tolist()
        assert ids == before["input_ids"][0][: len(ids)].tolist() and len(ids) <= (limits.max_length or 0)
        assert ids.count(placeholder) == before["input_ids"][0].tolist().count(placeholder)
