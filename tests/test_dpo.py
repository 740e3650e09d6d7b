"""DPO: exact against TRL, against the plain layout, and against its own invariants."""

import contextlib
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

import args
import train_dpo
from base.loading import load_model
from base.packing import scatter_to_responses
from base.self_check import SelfCheck
from common.errors import InputError
from data import DataSplits
from models import core_mapper_for
from tests import zoo

LORA = "--use_lora True --lora_dropout 0 --lora_r 4 --lora_alpha 8"


def dpo_trainer(checkpoint: str, data: Dataset, out: Path, flags: str = "", eval_data: Dataset | None = None):
    """The trainer that train_dpo.py builds, for rows in memory."""
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        args.DPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {out} --max_steps 3 --per_device_train_batch_size 2 "
        f"--learning_rate 1e-3 --lr_scheduler_type constant --save_strategy no --disable_tqdm True {flags}".split(),
    )
    return train_dpo.build(*parsed, data=DataSplits(data, eval_data, {}))[0]


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trl_llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA whose prompts TRL tokenises as we do.

    TRL does not add BOS and encodes answers separately from their prompt, which splits SentencePiece words differently:
    use a template with BOS and EOS, and a byte-level tokenizer.
    """
    folder = tmp_path_factory.mktemp("trl_llava")
    tokenizer = zoo.byte_tokenizer(["<image>"], {"image_token": "<image>"})
    template = (
        "{{ '<s>' }}{% for m in messages %}{{ m['role'].upper() + ':' }}"
        "{% for part in m['content'] %}{{ '<image>\n' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
        "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**zoo.VISION, projection_dim=32, initializer_range=0.2),
        text_config=transformers.LlamaConfig(**zoo.TEXT, **zoo.token_ids(tokenizer), initializer_range=0.2),
        image_token_index=tokenizer.image_token_id,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=zoo.SQUARE),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_five_losses_agree_with_trl(trl_llava, preference_rows, tmp_path, checkpointing: bool, share_prefix: bool):
    data = Dataset.from_list(preference_rows * 2).select(range(10))
    flags = f"{LORA} --max_steps 5 --train_sampling_strategy sequential --share_prefix {share_prefix} --gradient_checkpointing {checkpointing}"
    ours = dpo_trainer(trl_llava, data, tmp_path / "ours", flags)
    initial = {n: p.detach().clone() for n, p in ours.model.named_parameters() if p.requires_grad}

    theirs = trl.DPOTrainer(
        model=transformers.LlavaForConditionalGeneration.from_pretrained(trl_llava),
        processing_class=transformers.AutoProcessor.from_pretrained(trl_llava),
        train_dataset=Dataset.from_list(
            [
                {
                    "images": [Image.open(row["images"][0]).convert("RGB")],
                    "prompt": row["prompt"],
                    "chosen": [{"role": "assistant", "content": row["responses"][0]}],
                    "rejected": [{"role": "assistant", "content": row["responses"][1]}],
                }
                for row in data
            ]
        ),
        peft_config=peft.LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0,
            target_modules=ours.model.peft_config["default"].target_modules,
            task_type="CAUSAL_LM",
        ),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=5,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=checkpointing,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
    )
    with torch.no_grad():  # both adapters start from the same random A
        for name, parameter in theirs.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial[name])
    expected = losses(theirs)
    assert len(expected) == 5 and expected[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(expected[4] - expected[0]) > 0.01  # it trains, so agreement means something
    assert losses(ours) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("flags", [LORA, LORA + " --gradient_checkpointing True", "", "--freeze_vision_tower False"])
def test_packed_equals_plain(llava, preference_rows, tmp_path, flags: str):
    """Log-probs to 1e-5, gradients to 1e-4 relative: two, three and four responses, rows of different length in one batch."""
    rows = [
        preference_rows[0],
        preference_rows[1] | {"responses": ["yes", "A red square", "no"], "ranks": [0, 1, 2]},
        preference_rows[2] | {"responses": ["a", "b c", "d e f", "g h i j"], "ranks": [0, 1, 1, 2]},
    ]
    found = {}
    for share in (True, False):
        trainer = dpo_trainer(llava, Dataset.from_list(rows), tmp_path, f"{flags} --share_prefix {share}")
        if "lora" in flags:  # B is zero at first: then A's gradient would be zero
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        assert batch["input_ids"].shape[0] == (3 if share else 9)
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        logps = trainer.response_logps(
            trainer.model, batch | {"image_inputs": trainer.image_inputs(trainer.model, batch)}
        ).logps
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        found[share] = (logps.detach(), gradients)
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-5, rtol=0)
    assert found[True][1].keys() == found[False][1].keys() and found[True][1]
    for name, gradient in found[False][1].items():
        assert (gradient - found[True][1][name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("flags", [LORA, ""])
def test_policy_equal_to_reference_gives_ln2_and_no_reward(llava, preference_data, tmp_path, flags: str):
    trainer = dpo_trainer(llava, preference_data, tmp_path, flags + " --max_steps 1")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0


def test_trained_biases_need_a_reference_that_does_not_move(llava, preference_data, tmp_path):
    """They belong to the base: with the adapter switched off the reference would have them too."""
    flags = f"{LORA} --lora_bias all"
    with pytest.raises(InputError, match=r"--lora_bias none.*--precompute_ref_log_probs True"):
        dpo_trainer(llava, preference_data, tmp_path, flags)
    for further in (f"--precompute_ref_log_probs True --ref_log_probs_dir {tmp_path}", "--loss_type sft"):
        assert len(losses(dpo_trainer(llava, preference_data, tmp_path, f"{flags} {further}"))) == 3


def test_frozen_stays_bit_equal_and_the_rest_moves(llava, preference_data, tmp_path):
    trainer = dpo_trainer(llava, preference_data, tmp_path)
    tower = {id(p) for p in trainer.model.get_vision_tower().parameters()}
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    reference = dict(trainer.ref_model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], reference[name]), f"the reference moved: {name}"
        assert torch.equal(before[name], parameter) == (id(parameter) in tower), name


@pytest.mark.parametrize("flags", [LORA, ""])
def test_the_image_matters(llava, preference_rows, tmp_path, flags: str):
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, flags)
    logps = []
    for images in (preference_rows[0]["images"], preference_rows[1]["images"]):
        batch = trainer.data_collator([preference_rows[0] | {"images": images}])
        logps.append(
            trainer.response_logps(
                trainer.model, batch | {"image_inputs": trainer.image_inputs(trainer.model, batch)}
            ).logps.sum(1)
        )
    assert (logps[0] - logps[1]).abs().min() > 1e-3


def test_the_tower_runs_once_per_step_for_policy_and_reference(llava, preference_data, tmp_path):
    for flags, expected in (
        (LORA, 1),
        ("--freeze_vision_tower True", 2),
    ):  # full: the projector trains, each pass has its own features
        trainer = dpo_trainer(llava, preference_data, tmp_path, flags + " --max_steps 1")
        trainer.remove_callback(SelfCheck)  # which runs the tower before the first step
        calls = []
        towers = [trainer.base_model(trainer.model).get_vision_tower()] + (
            [trainer.ref_model.get_vision_tower()] if trainer.ref_model else []
        )
        for tower in towers:
            tower.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        assert len(calls) == expected


def test_batch_of_two_equals_two_accumulated_batches_of_one(llava, preference_data, tmp_path):
    flags = LORA + " --train_sampling_strategy sequential"
    one = losses(dpo_trainer(llava, preference_data, tmp_path, flags))
    two = losses(
        dpo_trainer(
            llava, preference_data, tmp_path, flags + " --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
        )
    )
    assert one == pytest.approx(two, abs=1e-5)


def test_only_response_positions_reach_lm_head(llava, preference_rows, tmp_path):
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, LORA)
    batch = trainer.data_collator(preference_rows[:2])
    seen = []
    trainer.base_model(trainer.model).lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[0])
    )
    trainer.compute_loss(trainer.model, batch)
    assert seen == [int(batch["completion_mask"].sum())] * 2  # policy and reference


def test_chunked_logps_equal_the_plain_ones(llava, preference_rows, tmp_path, monkeypatch):
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path)
    model, batch = trainer.model, trainer.data_collator(preference_rows[:2])
    mask = batch["completion_mask"]

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        outputs = model(
            **model.packed_inputs(batch["input_ids"], batch["segment_ids"], batch["img_input_dict"], batch["packed"]),
            completion_index=batch["completion_index"][mask],
            completion_ids=batch["completion_ids"][mask],
            with_entropy=True,
        )
        scatter_to_responses(outputs.logps, mask).sum().backward()
        return outputs.logps.detach(), outputs.entropy.detach(), model.lm_head.weight.grad.clone()

    plain = gradient()
    monkeypatch.setattr("base.logps.MAX_LOGITS", 1)
    monkeypatch.setattr("base.logps.VOCAB_CHUNK", 64)
    for one, other in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_logps_equal_those_of_the_native_model(llava, preference_rows):
    """The whole path, packed row included, against transformers' class on one plain sequence per response."""
    processor = core_mapper_for(llava).processor(llava)
    batch = core_mapper_for(llava).dpo_collator(processor)(preference_rows[:1])
    ours, native = (
        load_model(llava, dtype=torch.float32),
        transformers.LlavaForConditionalGeneration.from_pretrained(llava),
    )
    mask = batch["completion_mask"]
    with torch.no_grad():
        got = ours(
            **ours.packed_inputs(batch["input_ids"], batch["segment_ids"], ours.encode_images(batch["img_input_dict"])),
            completion_index=batch["completion_index"][mask],
            completion_ids=batch["completion_ids"][mask],
        ).logps
        prompt = batch["input_ids"][batch["segment_ids"] == 0]
        expected = []
        for k in (1, 2):
            response = batch["input_ids"][batch["segment_ids"] == k]
            ids = torch.cat([prompt, response])[None]
            logits = native(input_ids=ids, pixel_values=batch["img_input_dict"]["pixel_values"]).logits[0, :-1]
            expected.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(response) :, 0])
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=0)


def test_evaluation_between_steps_changes_nothing(llava, preference_data, tmp_path):
    flags = LORA + " --train_sampling_strategy sequential"
    plain = losses(dpo_trainer(llava, preference_data, tmp_path, flags))
    trainer = dpo_trainer(
        llava, preference_data, tmp_path, flags + " --eval_strategy steps --eval_steps 1", eval_data=preference_data
    )
    with contextlib.redirect_stdout(None):
        assert losses(trainer) == plain
    assert any("eval_rewards/accuracies" in entry for entry in trainer.state.log_history)


def test_hinge_and_ipo_and_mixtures_train(llava, preference_data, tmp_path):
    first = {}
    for name in ("sigmoid", "hinge", "ipo"):
        first[name] = losses(dpo_trainer(llava, preference_data, tmp_path, f"{LORA} --loss_type {name} --max_steps 1"))[
            0
        ]
    assert first["hinge"] == 1 and first["ipo"] == pytest.approx(25)  # (1 / 2β)² at Δ = 0
    mixed = losses(
        dpo_trainer(
            llava, preference_data, tmp_path, f"{LORA} --loss_type sigmoid ipo --loss_weights 2 0.5 --max_steps 1"
        )
    )
    assert mixed[0] == pytest.approx(2 * math.log(2) + 0.5 * 25)


def test_texts_of_equal_tokens_are_named(llava, preference_rows, tmp_path):
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, LORA)
    alike = ["\u2767", "\u2766"]  # two characters that the tokenizer does not know
    encode = trainer.data_collator.processor.encode_response
    assert encode(alike[0]) == encode(alike[1])
    row = preference_rows[0] | {"responses": alike, "where": "pairs.json, row 3"}
    for share in (True, False):
        trainer.data_collator.share_prefix = share
        with pytest.raises(InputError, match=r"^pairs\.json, row 3: its 2 responses are the same tokens"):
            trainer.data_collator([row])
    third = row | {"responses": [*alike, "no"], "ranks": [0, 0, 1]}
    assert len(trainer.data_collator([third])["chosen"]) == 2


def test_of_a_frozen_tower_only_the_features_are_kept(llava, preference_rows, tmp_path):
    """Not the hidden states of all its layers, which would live as long as the step."""
    trainer = dpo_trainer(llava, Dataset.from_list(preference_rows), tmp_path, LORA)
    batch = trainer._prepare_inputs(trainer.data_collator(preference_rows[:2]))
    features = trainer.image_inputs(trainer.model, batch)["mm_encoder_outputs"]["image"]
    assert list(features.keys()) == ["pooler_output"]
    assert trainer.model.get_base_model().encode_images(batch["img_input_dict"])["mm_encoder_outputs"][
        "image"
    ].keys() > {"pooler_output"}


@pytest.mark.parametrize("loss", ["simpo", "cpo sft", "sft orpo"])
def test_losses_without_a_reference_train_without_one(command, tmp_path, loss: str):
    """No second model is loaded for full training, and the loss falls."""
    argv = command("dpo", f"--loss_type {loss} --max_steps 10 --learning_rate 1e-2")
    flags = args.parse(args.ModelArguments, args.DataArguments, args.LoraArguments, args.DPOConfig, argv=argv)
    trainer, _ = train_dpo.build(*flags)
    assert trainer.ref_model is None
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(steps[-2:]) < sum(steps[:2])  # two steps see all rows
