"""DPO's whole path from rows to numbers, against values worked out by hand: metrics, views of rows, the cache's key."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedConfig

import args
import train_dpo
from base import reference_cache
from base.collator import VLDPODataCollatorWithPadding
from base.preference_inputs import ModelPass
from base.reference_cache import ReferenceCache, row_key
from base.reference_pass import about_reference
from data.lengths import LengthCounts, LengthLimits
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy
from tests import zoo
from tests.test_dpo import LORA, dpo_trainer

EDITED = ["A red square on the table and a blue circle.", "A red square on the table and two green triangles."]


def move_adapters(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)


def collator(family: str = "llava", **kwargs) -> VLDPODataCollatorWithPadding:
    adapter = core_mapper_for(zoo.checkpoint(family))
    return adapter.dpo_collator(adapter.processor(zoo.checkpoint(family)), **kwargs)


# -- metrics


def logged(trainer, policy: list[float], reference: list[float], rows: list[dict]) -> dict[str, float]:
    """What the trainer logs when the log-probs of the responses are these."""
    batch = trainer.data_collator(rows)
    mask = batch["completion_mask"]

    def model_pass(logps: list[float]) -> ModelPass:
        return ModelPass(torch.where(mask, torch.tensor(logps)[:, None] / mask.sum(1, keepdim=True), 0))

    policy_pass, reference_pass = model_pass(policy), model_pass(reference)
    trainer.model.train()
    _, parts = trainer.preference_loss(policy_pass, reference_pass, batch)
    trainer.log_metrics(policy_pass, reference_pass, parts, batch)
    trainer.log({})
    return trainer.state.log_history[-1]


def test_metrics_by_hand(llava, preference_rows, tmp_path):
    """Two pairs with beta 0.5: log-ratios 2 and -1, then -3 and 1."""
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows[:2]), tmp_path, f"{LORA} --beta 0.5")
    found = logged(trainer, [-3.0, -7.0, -9.0, -4.0], [-5.0, -6.0, -6.0, -5.0], preference_rows[:2])
    assert found["rewards/chosen"] == pytest.approx(0.5 * (2 - 3) / 2)
    assert found["rewards/rejected"] == pytest.approx(0.5 * (-1 + 1) / 2)
    assert found["rewards/margins"] == pytest.approx(0.5 * (3 - 4) / 2)
    assert found["rewards/accuracies"] == 0.5
    assert found["logps/chosen"] == pytest.approx(-6) and found["logps/rejected"] == pytest.approx(-5.5)
    found = logged(trainer, [-3.0, -9.0], [-5.0, -6.0], preference_rows[:1])
    assert found["rewards/rejected"] == pytest.approx(-1.5) and found["rewards/accuracies"] == 1
    assert found["rewards/margins"] == pytest.approx(2.5)


def test_equal_rewards_are_not_right(llava, preference_rows, tmp_path):
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows[:1]), tmp_path, LORA)
    assert logged(trainer, [-3.0, -4.0], [-3.0, -4.0], preference_rows[:1])["rewards/accuracies"] == 0


def test_parts_of_a_mixture_are_each_ones_own_loss(llava, preference_rows, tmp_path):
    flags = f"{LORA} --beta 0.5 --loss_type sigmoid ipo hinge --loss_weights 1 0.5 2"
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows[:1]), tmp_path, flags)
    found = logged(trainer, [-3.0, -7.0], [-5.0, -6.0], preference_rows[:1])
    assert found["loss/sigmoid"] == pytest.approx(math.log1p(math.exp(-0.5 * 3)))
    chosen, rejected = (len(trainer.processing_class.encode_response(r)) for r in preference_rows[0]["responses"])
    assert found["loss/ipo"] == pytest.approx((2 / chosen + 1 / rejected - 1 / (2 * 0.5)) ** 2)  # of means per token
    assert found["loss/hinge"] == 0


def test_the_first_loss_is_ln2_whatever_dropout_the_checkpoint_has(llava, preference_data, tmp_path):
    """Dropout in the policy's attention would make it another model than its reference."""
    folder = tmp_path / "dropout"
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["attention_dropout"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    for flags in (LORA, "--freeze_vision_tower False"):
        trainer = dpo_trainer(str(folder), preference_data, tmp_path, f"{flags} --max_steps 1")
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    row = preference_data[0]
    batch = trainer.data_collator([row])
    trainer._tokens_seen = 0
    trainer.training_step(trainer.model, batch)
    prompt = len(trainer.data_collator.encode_prompts([row])[0][0])
    answers = trainer.data_collator._responses(row)
    assert trainer.tokens_seen == prompt + sum(map(len, answers))  # the prompt once for both


# -- what losses need beyond the pairs


def test_every_epoch_corrupts_anew(llava, preference_rows, tmp_path):
    """Through the trainer: the clean images of the two epochs are equal, the corrupted ones are not."""
    flags = f"{LORA} --loss_type mdpo --max_steps -1 --num_train_epochs 2 --train_sampling_strategy sequential"
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows[:2]), tmp_path, flags)
    pixels, compute_loss = [], trainer.compute_loss

    def recorded(model, inputs, *rest, **kwargs):
        pixels.append(inputs["img_input_dict"]["pixel_values"])
        return compute_loss(model, inputs, *rest, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    first, second = pixels
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[2], second[2]) and not torch.equal(first[3], second[3])


def test_the_policys_negatives_share_nothing_with_other_answers(llava, preference_rows, tmp_path):
    """Answers that begin alike share their beginning, but not where the policy's own tokens take the place of one."""
    rows = [row | {"responses": EDITED} for row in preference_rows[:2]]
    trainer = dpo_trainer(llava, Dataset.from_list(rows), tmp_path, f"{LORA} --loss_type povid")
    batch = trainer.data_collator(rows)
    filled = trainer._with_policy_negatives(trainer.model, batch)
    processor = trainer.processing_class
    answers = [processor.encode_response(text) for text in EDITED]
    for b in range(2):
        for k, answer in enumerate(answers):
            r = 3 * b + k
            assert filled["completion_ids"][r, : len(answer)].tolist() == answer
            place = filled["completion_index"][r, : len(answer)]
            # the token that each position predicts stands behind it in the row, or begins the response's segment
            ids = filled["input_ids"].flatten()
            assert ids[place[1:]].tolist() == answer[:-1]
            segment = filled["input_ids"][b][filled["segment_ids"][b] == k + 1].tolist()
            assert segment == answer


def test_numbers_of_responses_stand_at_their_responses(preference_rows):
    """Two, three and two responses; copies that losses ask for have none."""
    rows = [
        preference_rows[0] | {"severity": [0.0, 3.0]},
        preference_rows[1] | {"responses": ["a", "b", "c"], "ranks": [0, 1, 2], "severity": [0.0, 1.0, 2.0]},
        preference_rows[2] | {"severity": [0.0, 5.0]},
    ]
    batch = collator()(rows)
    assert batch["severity"].tolist() == [0, 3, 0, 1, 2, 0, 5]
    batch = collator(needs={"policy_negative"}, corruption="black")(rows)
    given = [v for v in batch["severity"].tolist() if not math.isnan(v)]
    assert given == [0, 3, 0, 1, 2, 0, 5] and torch.isnan(batch["severity"]).sum() == 1 + 2 + 1
    at = [0, 1, 3, 4, 5, 8, 9]  # behind each row's responses: one, two, one copy
    assert batch["severity"][at].tolist() == given
    assert batch["severity"][batch["rejected"]].tolist() == [3, 1, 2, 2, 5]


def test_the_rejected_image_replaces_the_first_of_several(image_dir, preference_rows):
    images = [str(image_dir / f"{i}.png") for i in range(3)]
    row = preference_rows[0] | {
        "images": images[:2],
        "prompt": [{"role": "user", "content": "<image> or <image>?"}],
        "image_rejected": images[2],
    }
    batch = collator(needs={"image_rejected"})([row])
    alone = [
        collator()([row | {"images": pair}])["img_input_dict"]["pixel_values"] for pair in (images[:2], images[2:0:-1])
    ]
    assert torch.equal(batch["img_input_dict"]["pixel_values"], torch.cat(alone))


def test_the_text_only_batch_has_no_marks_of_images(llava, pairs_json, image_dir, tmp_path):
    """From a file, whose prompts the loaders give marks."""
    argv = (
        f"--model_name_or_path {llava} --dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} "
        f"--output_dir {tmp_path} --loss_type vdpo {LORA}"
    )
    parsed = args.parse(args.ModelArguments, args.DataArguments, args.LoraArguments, args.DPOConfig, argv=argv.split())
    trainer, _ = train_dpo.build(*parsed)
    rows = trainer.train_dataset.to_list()
    assert all("<image>" in row["prompt"][0]["content"] for row in rows)
    batch = trainer.data_collator(rows)["text_only"]
    question = trainer.processing_class.tokenizer.decode(batch["input_ids"][0][batch["segment_ids"][0] == 0])
    asked = rows[0]["prompt"][0]["content"].replace("<image>", "").strip()
    assert asked in question and "<image>" not in question and "image>" not in question


def test_a_larger_image_is_counted_anew(tmp_path):
    """The number of image tokens depends on the picture, which may change under its name. `datasets` keeps what it has
    computed beside rows that lie on disk, as those of a file do."""
    path = tmp_path / "picture.png"
    Dataset.from_list(
        [
            {
                "images": [str(path)],
                "prompt": [{"role": "user", "content": "What?"}],
                "responses": ["a", "b"],
                "ranks": [0, 1],
            }
        ]
    ).save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    of = collator("llava_next")
    lengths = []
    for size in ((20, 20), (56, 56)):
        Image.new("RGB", size, "red").save(path)
        lengths.append(of.with_lengths(rows, "length")["length"][0])
        assert lengths[-1] == int((of(rows.to_list())["segment_ids"] >= 0).sum())
    assert lengths[0] < lengths[1]


def test_lengths_are_limited_as_the_flags_say(preference_rows):
    batch = collator(limits=LengthLimits(max_target_length=3))(preference_rows[:2])
    assert batch["completion_mask"].sum(1).tolist() == [3, 3, 3, 3]
    of, counts = collator(limits=LengthLimits(max_target_length=1)), LengthCounts()
    same = preference_rows[0] | {"responses": ["a red square", "a blue one"]}
    assert [of.fit(row, counts, "a row") for row in (same, preference_rows[0])] == [False, True]
    assert (counts.rows, counts.dropped_same_after_cut) == (2, 1)


# -- the reference's log-probs on disk


def rows_asked(trainer) -> int:
    """Run the reference pass; the number of rows that the reference was asked about."""
    rows, compute = [], trainer.reference_logps
    trainer.reference_logps = lambda batch: rows.append(len(batch["chosen"])) or compute(batch)  # a pair a row
    trainer.precompute_reference_logps()
    trainer.reference_logps = compute
    return sum(rows)


@pytest.fixture
def asked(llava, preference_rows, tmp_path):
    """asked(flags, rows=..., checkpoint=..., change=...) -> rows that the cache in one folder lacked."""

    def run(flags: str = LORA, rows: list[dict] = preference_rows[:2], checkpoint: str = llava, change=None) -> int:
        cache = f"--precompute_ref_log_probs True --ref_log_probs_dir {tmp_path}/cache"
        trainer = dpo_trainer(checkpoint, Dataset.from_list(rows), tmp_path / "out", f"{flags} {cache}")
        if change:
            change(trainer)
        return rows_asked(trainer)

    return run


def sft_adapter(base: str, folder: Path, seed: int) -> str:
    flags = f"--model_name_or_path {base} --dataset_name x --output_dir {folder} {LORA}"
    model_args, _, lora_args, training_args = args.parse(
        args.ModelArguments, args.DataArguments, args.LoraArguments, args.SFTConfig, argv=flags.split()
    )
    model = load_policy(LoadPlan.of(model_args, lora_args, training_args), lora_args, training_args)
    move_adapters(model, seed)
    model.save_pretrained(folder)
    core_mapper_for(base).processor(base).save_pretrained(folder)
    return str(folder)


def test_two_adapters_on_one_base_share_no_log_probs(asked, llava, tmp_path):
    one, other = (sft_adapter(llava, tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    assert asked(checkpoint=one) == 2
    assert asked(checkpoint=one) == 0
    assert asked(checkpoint=other) == 2
    assert asked() == 2  # the bare base


def test_the_key_covers_the_processors_files(asked):
    def other_colours(trainer) -> None:
        trainer.processing_class.processor.image_processor.image_mean = [0.1, 0.2, 0.3]

    assert asked() == 2
    assert asked(change=other_colours) == 2
    assert asked() == 0


def test_the_key_covers_the_precision_of_the_computation(asked):
    """Weights in float32 both times, computed under autocast the second time."""
    assert asked("--torch_dtype float32") == 2
    assert asked("--torch_dtype float32 --bf16 True") == 2
    assert asked("--torch_dtype float32") == 0


def test_the_key_covers_the_layout(asked):
    assert asked() == 2
    assert asked(f"{LORA} --share_prefix False") == 2


def test_the_key_of_a_second_image_covers_the_ranks(asked, preference_rows):
    """The reference is asked about the chosen answer on the second image, and the ranks say which one that is."""
    rows = [row | {"image_rejected": preference_rows[5]["images"][0]} for row in preference_rows[:2]]
    flags = f"{LORA} --loss_type rdpo"
    assert asked(flags, rows) == 2
    assert asked(flags, [row | {"ranks": [1.0, 0.0]} for row in rows]) == 2
    assert asked(flags, [row | {"image_rejected": row["images"][0]} for row in rows]) == 2
    assert asked(flags, rows) == 0


def test_what_the_keys_cover_by_hand(llava):
    """Each change makes another key: buffers and configuration of the model, the pairs of a second image; of a row what was said before."""
    processor = core_mapper_for(llava).processor(llava)
    plain = torch.nn.BatchNorm1d(2)
    collator = VLDPODataCollatorWithPadding(processor)

    def about(model=plain, config=None, second_image=True, **of_collator) -> str:
        other = copy.copy(collator)
        vars(other).update(of_collator)
        given = {"is_policy": False, "precision": "no", "second_image": second_image}
        return str(about_reference(model, config or PreTrainedConfig(), processor, other, **given))

    other = copy.deepcopy(plain)
    other.running_mean += 1
    keys = [
        about(),
        about(other),
        about(config=PreTrainedConfig(final_logit_softcapping=30.0)),
        about(second_image=False),
    ]
    keys += [about(pairs="adjacent"), about(score_margin=1.0), about(limits=LengthLimits(max_length=9))]
    assert len({*keys}) == len(keys) and about() == keys[0]
    assert about(second_image=False, pairs="adjacent") == about(
        second_image=False
    )  # which nothing asks the reference about

    asked = {"role": "user", "content": "And now?"}
    rows = []
    for before in ("What?", "Who?"):
        talk = [{"role": "user", "content": before}, {"role": "assistant", "content": "A dog."}, asked]
        rows.append({"prompt": talk, "responses": ["one", "two"], "images": []})
    rows += [rows[0] | {"prompt": [asked]}, rows[0] | {"responses": ["two", "one"]}]
    assert len({row_key(row, [], processor) for row in [*rows, rows[0]]}) == 4


def test_a_file_of_the_cache_is_whole_or_not_there(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, {"of": "a test"})
    cache.add("row", torch.tensor([-1.0, -2.0]))

    def killed(tensors, path, metadata=None) -> None:
        save_file(tensors, path, metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference_cache, "save_file", killed)
        cache.flush()
    assert not list(cache.folder.glob("*.safetensors"))  # another process may read the folder now
    assert ReferenceCache(tmp_path, {"of": "a test"}).keys() == set()
    cache.add("row", torch.tensor([-1.0, -2.0]))
    cache.flush()
    assert ReferenceCache(tmp_path, {"of": "a test"}).read(["row"]) == {"row": [-1.0, -2.0]}
