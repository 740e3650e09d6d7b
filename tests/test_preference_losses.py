"""What losses need besides log-probs, provided by collator and trainer: every loss through the real trainer."""

import copy
import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import args
import losses
import train_dpo
from args.dpo import with_loss_flags
from base.callbacks import RunningDelta
from base.corruption import corrupt_picture, diffuse
from base.preference_inputs import ModelPass, preference_batch
from base.self_check import SelfCheck
from common.errors import InputError
from data import DataSplits
from models import core_mapper_for
from tests import zoo
from tests.test_dpo import LORA


@pytest.fixture(scope="module")
def rows(preference_rows, image_dir) -> list[dict]:
    return [
        row
        | {"severity": [0.0, 1.0 + i % 3], "margin": 0.5 * i, "image_rejected": str(image_dir / f"{(i + 1) % 8}.png")}
        for i, row in enumerate(preference_rows)
    ]


def trainer_for(checkpoint: str, rows: list[dict], out, flags: str):
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        args.DPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {out} --max_steps 2 --per_device_train_batch_size 4 --seed 0 "
        f"--learning_rate 1e-3 --lr_scheduler_type constant --save_strategy no --disable_tqdm True {flags}".split(),
    )
    return train_dpo.build(*parsed, data=DataSplits(Dataset.from_list(rows), None, {}))[0]


def first_losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", [name for name, loss in losses.LOSSES.items() if not loss.unpaired])
def test_every_loss_trains_and_layouts_agree(llava, rows, tmp_path, name: str):
    found = []
    for share in (True, False):
        trainer = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type {name} --share_prefix {share}")
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        found.append(first_losses(trainer))
        assert all(math.isfinite(value) for value in found[-1])
        assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    if losses.LOSSES[name].corruption != "diffusion":  # the noise's shape, and so its draw, depends on the layout
        assert found[0] == pytest.approx(found[1], abs=1e-4)


# Policy == reference, so every log-ratio is 0 at the first step.
AT_START = {
    "mdpo": 3 * math.log(2),
    "ddpo": math.log(2),
    "rdpo": 2 * math.log(2),
    "hsa": math.log(2),
    "povid": math.log(2),
    "kto_pair": 0.5,
}


@pytest.mark.parametrize("name", AT_START)
def test_losses_at_the_reference(llava, rows, tmp_path, name: str):
    value = first_losses(trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type {name} --max_steps 1"))[0]
    assert value == pytest.approx(AT_START[name], abs=1e-5)


def test_corrupted_image_is_one_more_row_and_one_more_picture(llava, rows, tmp_path):
    """The corrupted image costs a row and a vision pass, not a second batch; the tower still runs once per step."""
    plain = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type sigmoid")
    mdpo = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type mdpo --max_steps 1")
    before, after = plain.data_collator(rows[:3]), mdpo.data_collator(rows[:3])
    assert len(before["input_ids"]) == 3 and len(after["input_ids"]) == 6
    assert len(before["completion_ids"]) == 6 and len(after["completion_ids"]) == 9  # three chosen answers again
    assert after["corrupted_of"].tolist() == [6, -1, 7, -1, 8, -1, -1, -1, -1]
    assert torch.equal(after["completion_ids"][6], after["completion_ids"][0])
    assert not torch.equal(after["img_input_dict"]["pixel_values"][0], after["img_input_dict"]["pixel_values"][3])
    mdpo.remove_callback(SelfCheck)  # which runs the tower before the first step
    calls = []
    mdpo.base_model(mdpo.model).get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    mdpo.train()
    assert len(calls) == 1


@pytest.mark.parametrize("corruption", ["crop", "diffusion", "black", "patch", "swap"])
def test_the_draw_depends_on_seed_epoch_and_row_alone(llava, rows, corruption: str):
    adapter = core_mapper_for(llava)

    def pixels(seed: int = 0, epoch: int = 0) -> torch.Tensor:
        collator = adapter.dpo_collator(
            adapter.processor(llava), needs={"corrupted_image"}, corruption=corruption, seed=seed
        )
        collator.epoch = epoch
        return collator(rows[:2])["img_input_dict"]["pixel_values"]

    again = pixels()
    assert torch.equal(again, pixels())
    clean = adapter.dpo_collator(adapter.processor(llava))(rows[:2])["img_input_dict"]["pixel_values"]
    assert torch.equal(again[:2], clean) and not torch.equal(again[2:], clean)
    if corruption in ("crop", "diffusion", "patch"):
        assert not torch.equal(again, pixels(seed=1)) and not torch.equal(again, pixels(epoch=1))
    if corruption == "swap":
        assert torch.equal(again[2], clean[1]) and torch.equal(again[3], clean[0])


def test_corruptions_by_hand():
    """The noise of VCD's schedule; a crop of 1 to 20 % of the area; half of the squares grey."""
    kept = 1.0
    for n in range(501):  # steps 0 to 500
        kept *= 1 - (1e-5 + (0.5e-2 - 1e-5) / (1 + math.exp(6 - 12 * n / 999)))
    nothing, ones = diffuse(torch.zeros(3, 40, 40), 500, seed=1), diffuse(torch.ones(3, 40, 40), 500, seed=1)
    assert (ones - nothing).flatten().tolist() == pytest.approx([math.sqrt(kept)] * 4800, abs=1e-5)
    assert nothing.std().item() == pytest.approx(math.sqrt(1 - kept), rel=0.03)

    across = np.arange(256, dtype=np.uint8)  # red says which column a pixel is from, green which row
    picture = Image.fromarray(np.stack([*np.meshgrid(across, across), np.zeros((256, 256), np.uint8)], axis=2))
    areas = []
    for seed in range(60):
        (red, green, _) = corrupt_picture(picture, "crop", np.random.default_rng(seed)).getextrema()
        areas.append((red[1] - red[0] + 1) * (green[1] - green[0] + 1) / 256**2)
    assert 0.005 < min(areas) < 0.04 and 0.17 < max(areas) < 0.22
    patched = np.asarray(corrupt_picture(picture, "patch", np.random.default_rng(0)))
    assert (patched == 128).all(axis=2).mean() == 0.5


def test_text_only_rows_have_no_image(llava, rows, tmp_path):
    trainer = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type vdpo")
    batch = trainer.data_collator(rows[:2])
    assert "pixel_values" not in batch["text_only"]["img_input_dict"]
    assert (batch["text_only"]["input_ids"] != trainer.model.config.image_token_id).all()
    assert torch.equal(batch["text_only"]["completion_ids"], batch["completion_ids"])


def test_negatives_are_the_policys_own_tokens(llava, rows, tmp_path):
    trainer = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type povid --corruption black")
    batch = trainer.data_collator(rows[:2])
    filled = trainer._with_policy_negatives(trainer.model, batch)
    model, processor = trainer.base_model(trainer.model), core_mapper_for(llava).processor(llava)
    for b, row in enumerate(rows[:2]):
        ids = processor.encode_prompts([processor.render(row["prompt"], True, 1)], [row["images"]])[0][0]
        response = processor.encode_response(row["responses"][0])
        black = torch.zeros_like(batch["probe"]["img_input_dict"]["pixel_values"][:1])
        black[:] = batch["probe"]["img_input_dict"]["pixel_values"][:, :, :1, :1][:1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + response]), pixel_values=black).logits[0]
        expected = logits[len(ids) - 1 : -1].argmax(-1)
        negative = int(filled["negative_of"][2 * b + b])
        assert filled["completion_ids"][negative, : len(response)].tolist() == expected.tolist()
        assert filled["input_ids"][b][filled["segment_ids"][b] == 3].tolist() == expected.tolist()
    adapter, pixels = core_mapper_for(llava), []
    for step in (0, 800):  # the paper's own way, noise
        flags = {"needs": {"policy_negative"}, "corruption": "diffusion", "diffusion_step": step}
        noisy = adapter.dpo_collator(adapter.processor(llava), **flags)(rows[:2])
        away = noisy["probe"]["img_input_dict"]["pixel_values"] - noisy["img_input_dict"]["pixel_values"]
        pixels.append(away.std().item())
    assert 0 < pixels[0] < 0.05 < 0.5 < pixels[1]


def test_token_kl_and_logit_shift_against_full_logits(llava, rows, tmp_path):
    trainer = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type chip tpo_token")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = trainer.data_collator(rows[:2])
    batch["image_inputs"] = trainer.image_inputs(trainer.model, batch)
    reference = trainer.reference_logps(batch)
    policy = trainer.response_logps(trainer.model, batch)
    pairs = preference_batch(policy, reference, batch, trainer.needs)
    model = trainer.base_model(trainer.model)
    packed = model.packed_inputs(batch["input_ids"], batch["segment_ids"], batch["image_inputs"])
    with torch.no_grad():
        own = model(**packed).logits.flatten(0, 1)
        with trainer.reference_context():
            ref = model(**packed).logits.flatten(0, 1)
    mask, index, ids = batch["completion_mask"], batch["completion_index"], batch["completion_ids"]
    kl = (ref.softmax(-1) * (ref.log_softmax(-1) - own.log_softmax(-1))).sum(-1)[index].masked_fill(~mask, 0).sum(1)
    torch.testing.assert_close(pairs.chosen_token_kl, kl[batch["chosen"]], atol=1e-4, rtol=1e-4)
    assert pairs.chosen_token_kl.min() > 1e-3 and pairs.chosen_token_kl.requires_grad
    raw = own[index].gather(-1, ids[..., None])[..., 0].masked_fill(~mask, 0)
    shift = raw - raw[batch["corrupted_of"].clamp(min=0)]
    torch.testing.assert_close(pairs.policy.rejected_logit_shift, shift[batch["rejected"]], atol=1e-4, rtol=1e-4)
    assert shift[batch["rejected"]].abs().max() > 1e-3


def test_every_number_stands_at_its_answer():
    """Two pairs, then copies of the chosen answers on v', on a second image, and the policy's own; states are logits of three tokens."""
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], *[[1, 1]] * 6]).bool()
    places = mask.flatten().nonzero()[:, 0]
    none = [-1] * 10
    batch = {
        "chosen": torch.tensor([0, 2]), "rejected": torch.tensor([1, 3]),
        "completion_mask": mask, "completion_places": places, "completion_ids": torch.arange(20).view(10, 2) % 3,
        "corrupted_of": torch.tensor([4, 6, 5, 7, *none[4:]]), "image_rejected_of": torch.tensor([6, -1, 7, *none[3:]]),
        "negative_of": torch.tensor([8, -1, 9, *none[3:]]), "severity": torch.arange(10.0) / 10,
        "chosen_changed": mask[[0, 2]], "rejected_changed": mask[[1, 3]], "margin": torch.tensor([0.3, 0.7]),
    }  # fmt: skip

    bias = torch.tensor([0.5, -1.0, 0.0])

    class Head:  # whose states are its logits, but for the bias
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

        def get_output_embeddings(self) -> torch.nn.Linear:
            lm_head = torch.nn.Linear(3, 3)
            lm_head.weight.data, lm_head.bias.data = torch.eye(3), bias
            return lm_head

    states = torch.randn(2, len(places), 3, generator=torch.Generator().manual_seed(0))
    made = []
    for n, of_model in enumerate(states):
        logps = torch.where(mask, -torch.arange(1, 21.0).view(10, 2) - n * torch.arange(10.0)[:, None], 0)
        made.append(ModelPass(logps, of_model, Head(), text_only=logps / 2))
    pairs = preference_batch(
        *made, batch, losses.NEEDS.keys() - {"running_delta", "mismatched"}, {"severity", "margin"}
    )
    sums = [[sum(row) for row in of_model.logps.tolist()] for of_model in made]
    for found, total, of_model in ((pairs.policy, sums[0], made[0]), (pairs.ref, sums[1], made[1])):
        for name, (of_first, of_second) in {
            "chosen": (0, 2), "rejected": (1, 3), "corrupted": (4, 5), "image_rejected": (6, 7), "negative": (8, 9),
        }.items():  # fmt: skip
            assert getattr(found, name).tolist() == [total[of_first], total[of_second]], name
            if hasattr(found, f"{name}_per_token"):
                per_token = getattr(found, f"{name}_per_token")
                assert torch.equal(per_token, of_model.logps[[of_first, of_second]]), name
    assert pairs.text_only_chosen.tolist() == [sums[0][0] / 2, sums[0][2] / 2]
    assert pairs.text_only_rejected.tolist() == [sums[0][1] / 2, sums[0][3] / 2]
    assert pairs.chosen_lengths.tolist() == [2, 2] and pairs.rejected_lengths.tolist() == [1, 2]
    assert pairs.chosen_mask.tolist() == pairs.chosen_changed.tolist() == [[True, True], [True, True]]
    assert pairs.rejected_mask.tolist() == pairs.rejected_changed.tolist() == [[True, False], [True, True]]
    severity, margin = pairs.response_columns["severity"], pairs.row_columns["margin"]
    assert severity.chosen.tolist() == pytest.approx([0, 0.2]) and severity.rejected.tolist() == pytest.approx(
        [0.1, 0.3]
    )
    assert margin.tolist() == pytest.approx([0.3, 0.7])

    first = [int(n) for n in torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)])]  # place of an answer's first state
    logits = states + bias
    for side, answers in (("chosen", (0, 2)), ("rejected", (1, 3))):
        kls, shifts = getattr(pairs, f"{side}_token_kl"), getattr(pairs.policy, f"{side}_logit_shift")
        for pair, r in enumerate(answers):
            policy, reference = (of_model[first[r] : first[r + 1]].softmax(-1).tolist() for of_model in logits)
            by_hand = sum(
                q * math.log(q / p)
                for ps, qs in zip(policy, reference, strict=True)
                for p, q in zip(ps, qs, strict=True)
            )
            assert kls[pair].item() == pytest.approx(by_hand, abs=1e-5)
            copy_of = int(batch["corrupted_of"][r])
            for t in range(int(mask[r].sum())):
                seen, unseen = (logits[0, first[k] + t, batch["completion_ids"][k, t]] for k in (r, copy_of))
                assert shifts[pair, t].item() == pytest.approx(float(seen - unseen), abs=1e-5)


def test_running_delta_is_the_mean_reward_of_training_batches(llava, rows, tmp_path):
    """Mean of beta * log-ratio over both sides of all batches so far, this one included; evaluation does not count."""
    trainer = trainer_for(llava, rows, tmp_path, f"{LORA} --loss_type mpo --beta 0.3")
    state = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunningDelta))
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    rewards, deltas = [], []
    for mode, part in ((True, rows[:2]), (True, rows[2:5]), (False, rows[5:7])):
        trainer.model.train(mode)
        batch = trainer.data_collator(part)
        batch["image_inputs"] = trainer.image_inputs(trainer.model, batch)
        policy, reference = trainer.response_logps(trainer.model, batch), trainer.reference_logps(batch)
        trainer.preference_loss(policy, reference, batch)
        rewards.append(0.3 * (policy.logps - reference.logps).detach().sum(1))  # two responses, one pair a row
        deltas.append(state.mean)
    assert torch.cat(rewards).abs().min() > 1e-3
    expected = [rewards[0].mean(), torch.cat(rewards[:2]).mean(), torch.cat(rewards[:2]).mean()]
    torch.testing.assert_close(torch.stack(deltas), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert state.count == 10


def test_running_delta_survives_a_resume(command, tmp_path):
    flags = "--use_lora True --lora_dropout 0 --loss_type mpo --max_steps 4 --save_strategy steps --save_steps 2"

    def curve(out):
        return [e["loss"] for e in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in e]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_dpo.main(command("dpo", flags, out=whole))
    train_dpo.main(command("dpo", flags, out=parts))
    before = curve(parts)
    for leftover in ("checkpoint-4", "trainer_state.json"):
        path = parts / leftover
        path.rename(tmp_path / leftover)
    train_dpo.main(command("dpo", flags + " --resume_from_checkpoint True", out=parts))
    assert curve(parts) == before == curve(whole)


@pytest.fixture
def unregister() -> Iterator[None]:
    """Forgets the losses that a test registers."""
    before = dict(losses.LOSSES)
    yield
    losses.LOSSES.clear()
    losses.LOSSES.update(before)


def test_the_loss_of_the_documentation(unregister):
    """As it stands: chosen 1 above the reference, rejected 2 below; -log σ(.1 (1 + 2 · 2)) and a flag of its own."""
    text = (Path(train_dpo.__file__).parent / "docs" / "losses.md").read_text().split("## Adding a loss")[1]
    exec(text.split("```python\n")[1].split("```")[0], {})
    flags = {field.name for field in dataclasses.fields(with_loss_flags(args.DPOConfig))}
    assert {"my_gamma", "beta"} <= flags
    policy, ref = (
        losses.PairLogps(chosen=torch.tensor([c]), rejected=torch.tensor([r])) for c, r in [(1.0, -2.0), (0.0, 0.0)]
    )
    batch = losses.PreferenceBatch(policy=policy, ref=ref, chosen_lengths=torch.ones(1), rejected_lengths=torch.ones(1))
    assert losses.LOSSES["my_loss"](batch).item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)


LOSS_OF_A_SCRIPT = """
from typing import Annotated
from losses import Beta, logistic, loss

@loss(summary="DPO with a wish", columns={"margin"})
def wishful(batch, *, beta: Beta = 0.1, wish: Annotated[float, "added to the margin"] = 2.0):
    if wish < 0:
        raise ValueError(f"--wish is not negative, unlike {wish}.")
    ratio = batch.log_ratio
    return logistic(beta * (ratio.chosen - ratio.rejected) + wish * batch.row_columns["margin"])
"""


def test_a_copied_script_adds_a_loss_and_its_flag(command, tmp_path, pairs_json, capsys, unregister):
    """After its imports: the hyper-parameter has a flag, a help, a check and a line of run.json; the column is read."""
    source = Path(train_dpo.__file__).read_text()
    script = tmp_path / "train_wishful.py"
    script.write_text(source.replace("\ndef build(", f"{LOSS_OF_A_SCRIPT}\ndef build(", 1))
    spec = importlib.util.spec_from_file_location("train_wishful", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pairs = [row | {"margin": 0.25} for row in json.loads(pairs_json.read_text())]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    flags = f"--use_lora True --max_steps 1 --data_path {tmp_path / 'pairs.json'} --loss_type wishful"
    module.main(command("dpo", f"{flags} --wish 3"))
    out = tmp_path / "dpo"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(math.log1p(math.exp(-0.75)), abs=1e-6)  # policy == reference
    run = json.loads((out / "run.json").read_text())
    assert run["losses"] == {"wishful": {"beta": 0.1, "wish": 3.0}} and run["arguments"]["DPOConfig"]["wish"] == 3.0
    with pytest.raises(InputError, match=r"--wish is not negative, unlike -1\.0"):
        module.main(command("dpo", f"{flags} --wish -1"))
    with pytest.raises(InputError, match="--wish does nothing with --loss_type sigmoid: it belongs to wishful"):
        module.main(command("dpo", "--loss_type sigmoid --wish 3"))
    with pytest.raises(InputError, match="reads the column 'margin'"):
        module.main(command("dpo", "--loss_type wishful", out=tmp_path / "without"))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "wishful: added to the margin (default: 2.0)" in said and "wishful: DPO with a wish" in said


def test_a_loss_reads_columns_of_the_users_own(command, tmp_path, pairs_json, unregister):
    """Under any name, one number per row or per response; what is none is refused with its row."""
    own = LOSS_OF_A_SCRIPT.replace('{"margin"}', '{"my_margin", "care"}').replace(
        'batch.row_columns["margin"]',
        'batch.row_columns["my_margin"] + 2 * batch.response_columns["care"].rejected - batch.response_columns["care"].chosen',
    )
    exec(own, {})
    rows = json.loads(pairs_json.read_text())

    def losses_of(**columns: object) -> list[float]:
        (tmp_path / "pairs.json").write_text(json.dumps([row | columns for row in rows]))
        flags = f"--use_lora True --max_steps 1 --data_path {tmp_path / 'pairs.json'} --loss_type wishful --overwrite_output_dir True"
        train_dpo.main(command("dpo", flags))
        return [
            entry["loss"]
            for entry in json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())["log_history"][:1]
        ]

    margin = 2.0 * 0.25 + 2 * 0.5 - 7  # policy == reference; the columns reach it as they stand in the file
    assert losses_of(my_margin=0.25, care=[7, 0.5]) == [pytest.approx(math.log1p(math.exp(-margin)), abs=1e-5)]
    with pytest.raises(InputError, match=r"row \d+.* has the care \[1\.0\], which the loss reads: it is one number"):
        losses_of(my_margin=0.25, care=[1.0])
    with pytest.raises(InputError, match=r"has the my_margin 'high', which the loss reads"):
        losses_of(my_margin="high", care=[7, 0.5])
    with pytest.raises(InputError, match="reads the column 'care'"):
        losses_of(my_margin=0.25)


def test_a_hyperparameter_that_is_a_flag_already_is_refused(command, unregister):
    @losses.loss(summary="a loss")
    def wishful(batch, *, seed: int = 2):
        return batch.policy.chosen

    with pytest.raises(ValueError, match="--seed is a flag already: give the hyper-parameter"):
        parsed(command("dpo"))


def parsed(argv: list[str]) -> args.DPOConfig:
    return args.parse(args.ModelArguments, args.DataArguments, args.LoraArguments, args.DPOConfig, argv=argv)[-1]


def test_hyperparameters_are_attributes_with_the_losss_own_defaults(command, tmp_path):
    config = parsed(command("dpo", "--loss_type exo_pair"))
    assert isinstance(config, args.DPOConfig) and type(config).__name__ == "DPOConfig"
    assert (config.beta, config.label_smoothing, config.ddpo_average) == (0.1, 1e-3, True)
    assert config.to_dict()["label_smoothing"] == 1e-3
    assert parsed(command("dpo", "--loss_type sigmoid")).label_smoothing == 0
    assert parsed(command("dpo", "--loss_type sigmoid exo_pair")).label_smoothing is None  # each its own
    assert parsed(command("dpo", "--loss_type ddpo --no_ddpo_average")).ddpo_average is False
    torch.save(config, tmp_path / "training_args.bin")  # as Trainer does
    again = copy.copy(config)  # made by what pickle calls
    assert type(again) is args.DPOConfig and again.label_smoothing == 1e-3


MISFITS = {
    "--loss_type hsa": r"reads the column 'severity'",
    "--loss_type mdpo --precompute_ref_log_probs True": r"--precompute_ref_log_probs cannot serve --loss_type mdpo",
    "--loss_type sigmoid --ddpo_gamma 3": r"--ddpo_gamma does nothing with --loss_type sigmoid",
    "--loss_type sigmoid --corruption crop": r"no image is corrupted",
    "--loss_type mdpo povid": r"corrupt images in different ways",
}


@pytest.mark.parametrize("flags, message", MISFITS.items())
def test_what_does_not_fit_is_said_at_the_start(command, flags: str, message: str):
    with pytest.raises(InputError, match=message):
        train_dpo.main(command("dpo", flags))


def test_a_row_without_the_losss_column_is_named(llava, rows):
    adapter = core_mapper_for(llava)
    for column in ("severity", "margin", "image_rejected"):
        asked = "needs" if column == "image_rejected" else "columns"
        collator = adapter.dpo_collator(adapter.processor(llava), **{asked: {column}})
        with pytest.raises(InputError, match=rf"pairs\.json, row 1 has no {column}"):
            collator([rows[0], rows[1] | {column: None, "where": "pairs.json, row 1"}])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "mllama"])
def test_corrupted_rows_on_other_layouts_of_pixels(rows, tmp_path, family: str):
    """Pixels by patch, by row and by tile: packed and plain agree, and the corruption reaches the right rows."""
    found = [
        first_losses(
            trainer_for(zoo.checkpoint(family), rows, tmp_path, f"{LORA} --loss_type mdpo --share_prefix {share}")
        )
        for share in (True, False)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    trainer_for(zoo.checkpoint(family), rows, tmp_path, f"{LORA} --loss_type povid tpo_token").train()
