"""PPO: order and sampling, invariants of the first step, one vision pass, resume, devices, a known optimum, wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import args
import train_ppo
import train_sft
from base.adapters import Role, adapter_active, adapter_now
from base.loading import load_model
from base.ppo_batches import BatchSizes, PromptBatches, mini_batches
from base.ppo_metrics import warn_of_collapse
from base.reward import VLRewardModel, score_rows
from base.rollout import Prompts, Sampled, prompt_by_prompt, round_by_round
from base.sampling import SeededSampling, cut_after_end
from base.self_check import SelfCheck
from base.update_loop import PPOState
from base.value import VLModelWithValueHead
from common.errors import InputError
from data import DataSplits
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy
from tests import zoo

ROOT = Path(__file__).parents[1]
FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "instructblip", "mllama"]
LORA = "--use_lora True --lora_r 4"


# ------------------------------------------------------------------------------------------------ order and sampling


def sizes(micro_prompts: int, micro_batches: int, mini: int, world: int) -> BatchSizes:
    prompts = micro_prompts * micro_batches * world
    return BatchSizes(micro_prompts, micro_batches, mini, prompts, prompts)


def test_every_prompt_comes_once_per_epoch_and_devices_share_one_order():
    one = list(PromptBatches(10, sizes(2, 4, 2, 1), rank=0, seed=3))
    flat = [i for batch in one for i in batch]
    assert len(flat) == 16 and sorted(flat[:10]) == list(range(10)) and flat[10:] == flat[:6]
    ranks = [list(PromptBatches(10, sizes(2, 2, 2, 2), rank=r, seed=3)) for r in (0, 1)]
    assert ranks[0][:2] + ranks[1][:2] == one[:4] and ranks[0][2:] + ranks[1][2:] == one[4:]
    later = PromptBatches(10, sizes(2, 4, 2, 1), rank=0, seed=3)
    later.first_update = 1
    assert list(later) == one[4:]
    later.epoch = 1
    assert list(later) != one[4:]


def test_mini_batches_are_the_same_for_any_number_of_devices():
    one = mini_batches(sizes(1, 8, 2, 1), 0, seed=5, update=2, ppo_epoch=1)
    two = [mini_batches(sizes(1, 4, 2, 2), rank, seed=5, update=2, ppo_epoch=1) for rank in (0, 1)]
    for m in range(2):
        assert sorted(one[m]) == sorted(two[0][m] + [4 + i for i in two[1][m]])
    assert sorted(one[0] + one[1]) == list(range(8))
    drawn = {tuple(mini_batches(sizes(1, 8, 2, 1), 0, 5, 2, e)[0]) for e in range(20)}
    assert len(drawn) > 1


def test_sampling_follows_the_distribution():
    scores = torch.tensor([0.5, 0.3, 0.2, 0.0]).log() * 0.7  # temperature 0.7 gives the probabilities back
    count = 20_000
    uniforms = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    sample = SeededSampling(uniforms, temperature=0.7)
    tokens = sample(torch.zeros(count, 3, dtype=torch.long), scores.expand(count, -1)).argmax(-1)
    shares = tokens.bincount(minlength=4) / count
    assert shares[:3].tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.012) and shares[3] == 0
    nucleus = SeededSampling(uniforms, temperature=0.7, top_p=0.6)
    tokens = nucleus(torch.zeros(count, 3, dtype=torch.long), scores.expand(count, -1)).argmax(-1)
    assert (tokens.bincount(minlength=4) / count)[:2].tolist() == pytest.approx([0.625, 0.375], abs=0.012)
    nucleus = SeededSampling(uniforms, temperature=0.7, top_p=0.48)  # at temperature 1 the first token has 0.45
    assert not nucleus(torch.zeros(count, 3, dtype=torch.long), scores.expand(count, -1)).argmax(-1).any()
    edge = SeededSampling(torch.tensor([[0.0], [1 - 2**-24]]), temperature=1.0)
    ends = edge(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)).argmax(-1)
    assert ends.tolist() == [1, 2]  # a token of probability 0 is never hit


def test_the_two_orders_of_answers():
    assert prompt_by_prompt(2, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert round_by_round(2, 3) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_answers_end_with_their_first_end_token():
    assert cut_after_end([5, 2, 7, 2], [2, 9]) == [5, 2]
    assert cut_after_end([5, 7], [2]) == [5, 7]


# ------------------------------------------------------------------------------------------------ the trainer


def prompt_rows(image_dir: Path, count: int = 8) -> list[dict]:
    return [
        {
            "images": [str(image_dir / f"{i % 8}.png")],
            "prompt": [{"role": "user", "content": "What is this?" + " photo" * (i % 3)}],
            "where": f"row {i}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(
        "def length(images, prompts, responses):\n    return [-abs(len(r) - 10) / 10 for r in responses]\n"
        "def yes(responses, **_):\n    return [float(r == 'yes') for r in responses]\n"
        "def few(images, prompts, responses):\n    return [1.0]\n"
        "def nan(images, prompts, responses):\n    return [float('nan')] + [0.0] * (len(responses) - 1)\n"
        "def words(images, prompts, responses):\n    return ['good'] * len(responses)\n"
        "def place(where, responses, **_):\n    return [float(w.split()[-1]) for w in where]\n"
    )
    return file


@pytest.fixture(scope="module")
def reward_adapters(tmp_path_factory: pytest.TempPathFactory):
    """reward_adapters("llava") -> folder of a reward adapter with random LoRA weights on that family's tiny checkpoint."""
    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in made:
            path, folder = zoo.checkpoint(family), str(tmp_path_factory.mktemp(f"rm_{family}"))
            model_args, _, lora_args, training_args = args.parse(
                args.ModelArguments, args.DataArguments, args.LoraArguments, args.RMConfig,
                argv=f"--model_name_or_path {path} --dataset_name x --output_dir {folder} {LORA}".split(),
            )  # fmt: skip
            torch.manual_seed(1)
            model = VLRewardModel(
                load_policy(LoadPlan.of(model_args, lora_args, training_args), lora_args, training_args)
            )
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.1)
            model.save_pretrained(folder)
            core_mapper_for(path).processor(path).save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


def ppo_trainer(checkpoint: str, rows: list[dict], out: Path, flags: str):
    """What train_ppo.py builds, for rows in memory."""
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        args.PPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {out} --max_steps 1 --per_device_train_batch_size 4 "
        "--rollouts_per_prompt 2 --response_length 6 --learning_rate 1e-2 --lr_scheduler_type constant --save_strategy no --seed 0 "
        f"--disable_tqdm True --num_sample_generations 0 {flags}".split(),
    )
    return train_ppo.build(*parsed, data=DataSplits(Dataset.from_list(rows), None, {}))[0]


def rolled_out(trainer, rows: list[dict], size: int = 2):
    """Rollouts of `rows` with everything that the optimiser reads, outside of training."""
    places = [[*range(s, s + size)] for s in range(0, len(rows), size)]
    sampled = trainer.rollout([trainer.data_collator([rows[i] for i in p]) for p in places], seed=7, places=places)
    return trainer.estimate_advantages(trainer.evaluate_tokens(trainer.score(sampled)))


def history(out: Path) -> list[dict]:
    return [e for e in json.loads((out / "trainer_state.json").read_text())["log_history"] if "objective/scores" in e]


@pytest.mark.parametrize("setup", ["lora", "shared", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_step_and_one_vision_pass(
    family: str, setup: str, image_dir: Path, tmp_path: Path, reward_adapters, reward_file
):
    """KL 0, ratio 1, approx_kl 0; the tower runs once per image for generation, all roles and all epochs; the base stays."""
    path = zoo.checkpoint(family)
    flags = {
        "lora": f"{LORA} --reward_adapter {reward_adapters(family)}",
        "shared": f"{LORA} --value_adapter shared --reward_fn {reward_file}:length",
        "full": f"--reward_fn {reward_file}:length",
    }[setup]
    trainer = ppo_trainer(path, prompt_rows(image_dir), tmp_path, f"{flags} --num_mini_batches 2 --num_ppo_epochs 3")
    trainer.remove_callback(SelfCheck)  # which runs the tower before the first step
    calls = []
    for model in {
        id(m): m for m in (trainer.base_model(trainer.model), trainer.ref_model, trainer.model.value_backbone)
    }.values():
        if model is not None:
            model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    # Zero-initialised adapter halves would make policy and base the same model for the wrong reason: nothing to move here, B starts at 0.
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    step = next(e for e in trainer.state.log_history if "objective/kl" in e)
    assert step["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert step["first/approxkl"] == pytest.approx(0, abs=1e-10) and step["first/ratio_deviation"] == pytest.approx(
        0, abs=1e-5
    )
    assert step["policy/approxkl_avg"] > 1e-6  # later mini batches have moved
    assert len(calls) == 2  # micro batches of the one update
    for name, parameter in trainer.model.named_parameters():
        trains = parameter.requires_grad and "lora_A" not in name  # B starts at 0, so A moves a step later
        assert torch.equal(parameter, before[name]) != trains or not trains, name
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("head") for n in moved)
    if setup == "lora":
        assert any(".value_function." in n for n in moved) and any(".default." in n for n in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_passes_are_those_of_each_answer_alone(family: str, image_dir: Path, tmp_path: Path, reward_adapters):
    """Log-probs, values and rewards of packed rollouts against one plain forward per answer in each role; and with another image."""
    path = zoo.checkpoint(family)
    rows = prompt_rows(image_dir, 4)
    flags = f"{LORA} --reward_adapter {reward_adapters(family)} --temperature 1.3"
    trainer = ppo_trainer(path, rows, tmp_path, flags)
    model = trainer.model
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # policy and value differ from the base and from each other
            torch.nn.init.normal_(weight, std=0.1)
    rollouts = rolled_out(trainer, rows)
    for r in rollouts:
        images = to_alone(trainer, r)
        for i in range(len(r.texts)):
            n = int(r.mask[i].sum())
            answer = r.batch["completion_ids"][i, :n].tolist()
            batch, start = images(i, answer)
            index = torch.arange(start - 1, start + n - 1)
            with torch.no_grad():
                policy = model.backbone(
                    **batch, completion_index=index, completion_ids=torch.tensor(answer), temperature=1.3
                )
                with adapter_active(model.backbone, None):
                    base = model.backbone(
                        **batch, completion_index=index, completion_ids=torch.tensor(answer), temperature=1.3
                    )
                with adapter_active(model.backbone, Role.VALUE.adapter):
                    value = model.backbone(**batch, completion_index=index).hidden @ model.head.weight.T
                with adapter_active(model.backbone, Role.reward(0).adapter):
                    hidden = model.backbone(**batch, completion_index=torch.tensor([start + n - 1])).hidden
                    reward = hidden @ model.reward_heads["reward_0"].weight.T
            assert r.logps[i, :n].tolist() == pytest.approx(policy.logps.tolist(), abs=2e-4)
            assert r.ref_logps[i, :n].tolist() == pytest.approx(base.logps.tolist(), abs=2e-4)
            assert r.values[i, :n].tolist() == pytest.approx(value[:, 0].tolist(), abs=2e-4)
            assert r.scores[i].item() == pytest.approx(reward.item(), abs=2e-4)
            assert (policy.logps - base.logps).abs().max() > 1e-3  # the roles differ
    # Another image under the same tokens moves everything.
    r = rollouts[0]
    other = trainer.data_collator([row | {"images": [str(image_dir / "7.png")]} for row in r.rows])
    sampled = {f.name: getattr(r, f.name) for f in fields(Sampled)}
    moved = Sampled(**sampled | {"images": trainer._encode(other["img_input_dict"])})
    (moved,) = trainer.evaluate_tokens(trainer.score([moved]))
    for name in ("logps", "values", "scores"):
        assert (getattr(r, name) - getattr(moved, name)).abs().max() > 1e-6


def to_alone(trainer, r):
    """A function (answer index, ids) -> inputs of one unpadded row that holds prompt and answer, and where the answer starts."""
    processor, collator = trainer.data_collator.processor, trainer.data_collator

    def build(i: int, answer: list[int]):
        row = r.rows[r.prompt_of[i]]
        prompts, img_inputs = collator.encode_prompts([row])
        source = [[*range(len(prompts[0])), *[-1] * len(answer)]]
        inputs = processor.pad_img_inputs(processor.follow_tokens(img_inputs, source))
        ids = torch.tensor([prompts[0] + answer])
        segments = torch.tensor([[0] * len(prompts[0]) + [1] * len(answer)])
        return trainer.base_model(trainer.model).packed_inputs(ids, segments, inputs, packed=False), len(prompts[0])

    return build


def test_plain_layout_samples_and_scores_the_same(llava, image_dir, tmp_path, reward_adapters):
    rows = prompt_rows(image_dir, 4)
    flags = f"{LORA} --reward_adapter {reward_adapters('llava')}"
    found = []
    for share in ("True", "False"):
        trainer = ppo_trainer(llava, rows, tmp_path / share, f"{flags} --share_prefix {share}")
        found.append(
            {
                (r.places[p], text): (r.logps[i].sum().item(), r.values[i].sum().item(), r.scores[i].item())
                for r in rolled_out(trainer, rows)
                for i, (p, text) in enumerate(zip(r.prompt_of, r.texts, strict=True))
            }
        )
    assert len(found[0]) == 8 and found[0].keys() == found[1].keys()
    for key, values in found[0].items():
        assert values == pytest.approx(found[1][key], abs=1e-4)


def test_sampling_does_not_depend_on_how_many_are_generated_at_once(llava, image_dir, tmp_path, reward_file):
    rows = prompt_rows(image_dir)
    texts = []
    for size in (1, 64):
        flags = f"{LORA} --reward_fn {reward_file}:length --local_rollout_forward_batch_size {size}"
        texts.append([r.texts for r in rolled_out(ppo_trainer(llava, rows, tmp_path / str(size), flags), rows)])
    assert texts[0] == texts[1]
    assert len({t for of_batch in texts[0] for t in of_batch}) > 8  # and the answers to one prompt differ


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl", "qwen3_vl_moe"])
def test_sampling_does_not_depend_on_how_prompts_are_batched(family: str, image_dir, tmp_path, reward_file):
    """Two prompts with K answers in one micro batch read their own images: pooled and, in Qwen3-VL, at every layer of deepstack."""
    rows = prompt_rows(image_dir, 4)
    flags = f"{LORA} --reward_fn {reward_file}:length --response_length 24"
    trainer = ppo_trainer(zoo.checkpoint(family), rows, tmp_path, flags)
    together, alone = rolled_out(trainer, rows, size=2), rolled_out(trainer, rows, size=1)
    assert [text for r in together for text in r.texts] == [text for r in alone for text in r.texts]
    assert len({text for r in together for text in r.texts}) == 8


def test_image_placeholders_are_never_sampled(llava, image_dir, tmp_path, reward_file):
    trainer = ppo_trainer(llava, prompt_rows(image_dir, 2), tmp_path, f"{LORA} --reward_fn {reward_file}:length")
    core = trainer.base_model(trainer.model)
    placeholder = core.image_placeholder_ids[0]
    with torch.no_grad():  # make the placeholder by far the likeliest token
        embedding = core.get_output_embeddings()
        embedding.weight[placeholder] = 100 * embedding.weight.abs().max()
        embedding.weight[placeholder + 1] = -embedding.weight[placeholder]
    rollouts = rolled_out(trainer, prompt_rows(image_dir, 2))
    assert not any((r.batch["completion_ids"][r.mask] == placeholder).any() for r in rollouts)


def test_gradient_checkpointing_recomputes_under_the_right_adapter(llava, image_dir, tmp_path, reward_file):
    """Policy and value adapters run in one forward; a recomputation under the wrong one would change the gradients."""
    gradients = []
    for checkpointing in ("False", "True"):
        flags = f"{LORA} --reward_fn {reward_file}:length --gradient_checkpointing {checkpointing}"
        trainer = ppo_trainer(llava, prompt_rows(image_dir, 4), tmp_path / checkpointing, flags)
        torch.manual_seed(3)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        if trainer.args.gradient_checkpointing:
            trainer.model.activation_checkpointing_enable()
        (r, *_) = rolled_out(trainer, prompt_rows(image_dir, 4))
        trainer.model.train()
        logps, values, _ = trainer.policy_pass(trainer.model, r)
        (logps.sum() + values.sum()).backward()
        assert adapter_now(trainer.model.backbone) == "default"
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".value_function." in n for n in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name
        if "lora" in name:
            assert gradient.abs().max() > 0, name


def test_value_function_starts_as_the_reward_model(llava, image_dir, tmp_path, reward_adapters):
    folder = reward_adapters("llava")
    flags = f"{LORA} --reward_adapter {folder} --init_value_from_reward True"
    trainer = ppo_trainer(llava, prompt_rows(image_dir, 2), tmp_path, flags)
    weights = dict(trainer.model.named_parameters())
    pairs = [(n, n.replace(".value_function.", ".reward_0.")) for n in weights if ".value_function." in n]
    assert pairs and all(torch.equal(weights[a], weights[b]) for a, b in pairs)
    assert all(weights[a].requires_grad and not weights[b].requires_grad for a, b in pairs)
    assert torch.equal(weights["head.weight"], weights["reward_heads.reward_0.weight"])


def test_rewards_are_summed_with_weights_penalty_and_clip(llava, image_dir, tmp_path, reward_file, reward_adapters):
    """An adapter on the base, the same reward model with a base of its own, one of another family, and a function of a column."""
    rows = prompt_rows(image_dir, 4)
    folder, other = reward_adapters("llava"), reward_adapters("gemma3")
    flags = (
        f"{LORA} --reward_adapter {folder} --reward_model_name_or_path {folder} {other} --reward_fn {reward_file}:place "
        "--reward_weights 2 -1 0.5 3 --missing_eos_penalty 0.25"
    )
    trainer = ppo_trainer(llava, rows, tmp_path, flags)
    for r in rolled_out(trainer, rows):
        adapter, own, foreign, place = r.parts.values()
        text_rows = [r.rows[p] | {"responses": [t]} for p, t in zip(r.prompt_of, r.texts, strict=True)]
        gemma = trainer.rewards[2]
        for row, ended in zip(text_rows, r.ended.tolist(), strict=True):
            row["responses_ended"] = [ended]
        expected = [s[0] for s in score_rows(gemma.model, gemma.processor, text_rows)]
        assert foreign.tolist() == pytest.approx(expected, abs=1e-4)
        assert place.tolist() == [float(r.rows[p]["where"].split()[-1]) for p in r.prompt_of]
        again = [
            trainer.data_collator.processor.encode_response(*a) for a in zip(r.texts, r.ended.tolist(), strict=True)
        ]
        same = torch.tensor([ids == r.batch["completion_ids"][i][r.mask[i]].tolist() for i, ids in enumerate(again)])
        assert adapter.shape == own.shape  # equal where the text gives the sampled tokens again
        assert adapter[same].tolist() == pytest.approx(own[same].tolist(), abs=1e-4)
        total = 2 * adapter - own + 0.5 * foreign + 3 * place - 0.25 * (~r.ended).float()
        assert r.scores.tolist() == pytest.approx(total.tolist(), abs=1e-4)
    trainer.args.reward_clip = 0.1
    (clipped,) = trainer.score([Sampled(**{f.name: getattr(r, f.name) for f in fields(Sampled)})])
    assert clipped.scores.abs().max() <= 0.1


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_answer_is_worth_the_same_to_adapter_and_model(
    family: str, share_prefix: bool, image_dir, tmp_path, reward_adapters
):
    """One reward model as an adapter on the policy's base and with a base of its own: it reads the end token if it was sampled."""
    rows = prompt_rows(image_dir, 2)
    folder = reward_adapters(family)
    flags = f"{LORA} --reward_adapter {folder} --reward_model_name_or_path {folder} --share_prefix {share_prefix}"
    trainer = ppo_trainer(zoo.checkpoint(family), rows, tmp_path, flags)
    processor, batch = trainer.data_collator.processor, trainer.data_collator(rows)
    whole = processor.encode_response("A red square")
    cut = processor.encode_response("A red square", ended=False)
    assert whole[: len(cut)] == cut and len(cut) < len(whole)
    prompts = Prompts(
        batch["rows"], batch["prompts"], batch["img_input_dict"], trainer._encode(batch["img_input_dict"]), [0, 1]
    )
    answers = [[whole, cut], [cut, whole]]
    sampled = Sampled.of(prompts, answers, trainer.data_collator, trainer.sampler.end_ids, torch.device("cpu"))
    (scored,) = trainer.score([sampled])
    adapter, own = scored.parts.values()
    assert adapter.tolist() == pytest.approx(own.tolist(), abs=1e-5)
    of_prompts = scored.by_prompt(own.tolist())
    assert all(abs(of_row[0] - of_row[1]) > 1e-3 for of_row in of_prompts)  # the end makes a difference


# ------------------------------------------------------------------------------------------------ whole runs


def ppo_command(command, reward_file, out: Path, extra: str = "", reward: str = "length") -> list[str]:
    return command(
        "ppo",
        f"--max_steps 4 --rollouts_per_prompt 2 --num_mini_batches 2 --response_length 6 --num_ppo_epochs 2 --seed 1 "
        f"--reward_fn {reward_file}:{reward} --num_sample_generations 2 {extra}",
        out=out,
    )


def same_weights(a: Path, b: Path) -> bool:
    files = sorted(f.relative_to(a) for f in a.rglob("*.safetensors") if not any("checkpoint" in p for p in f.parts))
    return bool(files) and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def comparable(entries: list[dict]) -> list[dict]:
    return [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in entries]


@pytest.mark.parametrize(
    "mode", [f"{LORA} --target_kl 0.01 --kl_horizon 20 --logging_steps 2", "--whiten_rewards True"]
)
def test_resume_after_any_update_is_bit_for_bit(command, reward_file, tmp_path, mode: str):
    saving = f"{mode} --save_strategy steps --save_steps 1"
    train_ppo.main(ppo_command(command, reward_file, tmp_path / "whole", saving))
    if "target_kl" in mode:
        coefficients = {e["objective/kl_coef"] for e in history(tmp_path / "whole")}
        assert len(coefficients) > 1  # the controller is at work, and is restored
    for update in (1, 3):
        half = tmp_path / f"half{update}"
        half.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{update}", half / f"checkpoint-{update}")
        train_ppo.main(ppo_command(command, reward_file, half, saving + " --resume_from_checkpoint True"))
        assert comparable(history(half)) == comparable(history(tmp_path / "whole"))
        assert same_weights(tmp_path / "whole", half)
    pages = sorted((tmp_path / "whole" / "samples").iterdir())
    assert [p.name for p in pages] == ["step-000001.html", "step-000003.html"]
    page = pages[0].read_text()
    assert "data:image/jpeg;base64" in page and "What is in this image?" in page


def launch(argv: list[str], *launcher: str, **kwargs) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*(launcher or (sys.executable,)), "train_ppo.py", *argv, "--use_cpu", "True"],
        cwd=ROOT, env=environment, stderr=subprocess.STDOUT, text=True, **{"stdout": subprocess.PIPE} | kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "estimator",
    ["gae", "grpo --dynamic_sampling True --num_ppo_epochs 1 --num_mini_batches 1 --num_generations 2"],
    ids=["gae", "grpo"],
)
def test_resume_after_kill_9(estimator: str, command, reward_file, tmp_path):
    flags = f"{LORA} --advantage_estimator {estimator} --save_strategy steps --save_steps 1 --max_steps 6"
    train_ppo.main(ppo_command(command, reward_file, tmp_path / "whole", flags))
    argv = ppo_command(command, reward_file, tmp_path / "killed", flags)
    with open(tmp_path / "log", "w") as log:
        process = launch(argv, stdout=log)
        try:
            while not (tmp_path / "killed" / "checkpoint-2").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]  # it must not end by itself
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    train_ppo.main([*argv, "--resume_from_checkpoint", "True"])
    assert comparable(history(tmp_path / "killed")) == comparable(history(tmp_path / "whole"))
    assert len(history(tmp_path / "whole")) == 6
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


def test_two_devices_give_the_result_of_one(command, reward_file, tmp_path):
    flags = f"{LORA} --whiten_rewards True --target_kl 0.05"
    train_ppo.main(ppo_command(command, reward_file, tmp_path / "one", f"{flags} --gradient_accumulation_steps 2"))
    argv = ppo_command(command, reward_file, tmp_path / "two", flags)
    process = launch(argv, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    try:
        output, _ = process.communicate(timeout=1800)  # it ends by itself, however slow the machine is
    finally:
        process.terminate()  # torchrun takes its workers with it
    assert process.returncode == 0, output[-3000:]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"first/ratio_deviation"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("mode", [f"{LORA} --modules_to_save lm_head", "--value_adapter shared"])
def test_reaches_a_known_optimum(mode: str, image_dir, tmp_path, llava, reward_file):
    """A policy that says yes or no, each half of the time; the reward is 1 for yes: PPO ends at yes."""
    rows = [
        {
            "image": f"{i // 2}.png",
            "conversations": [{"from": "user", "value": "<image>\nIs it?"}, {"from": "assistant", "value": ["yes", "no"][i % 2]}],
        }
        for i in range(16)
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = (
        f"--dataset_name vlquery_json --data_path {tmp_path}/rows.json --image_root {image_dir} --disable_tqdm True --save_strategy no "
        "--use_cpu True --seed 0"
    )
    sft = tmp_path / "sft"
    train_sft.main(
        f"{common} --model_name_or_path {llava} --output_dir {sft} --max_steps 60 --per_device_train_batch_size 16 --learning_rate 1e-2".split()
    )
    train_ppo.main(
        f"{common} --model_name_or_path {sft} --output_dir {tmp_path}/ppo --max_steps 14 --per_device_train_batch_size 32 --num_mini_batches 2 "
        f"--rollouts_per_prompt 4 --response_length 6 --learning_rate 1e-3 --temperature 1 --lr_scheduler_type constant "
        f"--reward_fn {reward_file}:yes {mode}".split()
    )
    scores = [e["objective/scores"] for e in history(tmp_path / "ppo")]
    assert scores[0] < 0.7 and sum(scores[-3:]) / 3 > 0.93, scores


@pytest.mark.parametrize("mode", [LORA, ""])
def test_output_reloads_with_its_value_function(command, reward_file, tmp_path, mode: str):
    train_ppo.main(ppo_command(command, reward_file, tmp_path / "ppo", mode))
    model = VLModelWithValueHead.from_pretrained(str(tmp_path / "ppo"))
    assert model.separate_value
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        out = model(input_ids=ids, completion_index=torch.tensor([1, 2]), completion_ids=ids[0, 2:])
        policy = load_model(str(tmp_path / "ppo"), dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1)
    assert out.logps.tolist() == pytest.approx(policy[0, [1, 2]].gather(-1, ids[0, 2:, None])[:, 0].tolist(), abs=1e-5)
    assert out.state_values.shape == (2,) and not (tmp_path / "ppo" / "ref").exists()


def test_collapse_is_warned_of_with_the_step(caplog):
    state = PPOState()
    warn_of_collapse(state, 1, entropy=2.0, length=10.0)
    warn_of_collapse(state, 9, entropy=0.05, length=9.0)
    warn_of_collapse(state, 9, entropy=0.04, length=1.0)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and "Update 9" in messages[0] and "entropy" in messages[0] and "length" in messages[1]
    resumed = PPOState()
    resumed.restore(json.loads(json.dumps(state.state())))
    assert vars(resumed) == vars(state) and resumed.first == {"entropy": 2.0, "length": 10.0}


# ------------------------------------------------------------------------------------------------ wrong input

BAD = {
    "no reward": ("", r"give --reward_adapter"),
    "too few numbers": ("{LORA} --reward_fn {file}:few", r"Reward few returned 1 numbers for 4 answers"),
    "a NaN": ("{LORA} --reward_fn {file}:nan", r"Reward nan is not finite for .*pairs\.json, row \d+.*answer"),
    "words": ("{LORA} --reward_fn {file}:words", r"Reward words must return numbers"),
    "no such function": ("{LORA} --reward_fn {file}:missing", r"defines no function missing"),
    "no such file": ("{LORA} --reward_fn nowhere.py:f", r"with a Python file that exists"),
    "rollouts do not divide": ("{LORA} --reward_fn {file}:length --rollouts_per_prompt 3", r"must be a multiple of --rollouts_per_prompt 3"),
    "episodes do not divide": ("{LORA} --reward_fn {file}:length --total_episodes 10", r"not a multiple of the 4 rollouts of an update"),
    "weights for other rewards": ("{LORA} --reward_fn {file}:length --reward_weights 1 2", r"has 2 numbers for 1 reward"),
    "adapter without LoRA": ("--reward_adapter {rm}", r"--reward_adapter needs --use_lora True"),
    "no adapter there": ("{LORA} --reward_adapter {llava}", r"has no adapter_config\.json"),
    "value from a function": ("{LORA} --reward_fn {file}:length --init_value_from_reward True", r"a function has no weights"),
    "value shared and separate": (
        "{LORA} --reward_adapter {rm} --init_value_from_reward True --value_adapter shared", r"needs --value_adapter separate"
    ),
    "greedy": ("{LORA} --reward_fn {file}:length --temperature 0", r"--temperature must be above 0"),
    "noise in the embeddings": ("{LORA} --reward_fn {file}:length --neftune_noise_alpha 5", r"--neftune_noise_alpha adds noise"),
    "one token in all": (
        "{LORA} --reward_fn {file}:length --response_length 1 --per_device_train_batch_size 1", r"have one token in all"
    ),
    "biases": ("{LORA} --lora_bias all --reward_fn {file}:length", r"--lora_bias must be none"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_gets_one_sentence(case: str, command, reward_file, reward_adapters, llava):
    flags, message = BAD[case]
    flags = flags.format(LORA=LORA, file=reward_file, rm=reward_adapters("llava"), llava=llava)
    with pytest.raises(InputError, match=message) as caught:
        train_ppo.main(command("ppo", "--response_length 6 " + flags))
    assert "\n" not in str(caught.value)


def test_wrong_reward_folders_get_one_sentence(command, reward_adapters, tmp_path):
    folder = tmp_path / "rm"
    shutil.copytree(reward_adapters("llava"), folder)
    flags = f"{LORA} --reward_adapter {folder}"
    with pytest.raises(InputError, match="was trained on other weights"):
        train_ppo.main(command("ppo", flags, model=zoo.checkpoint("llava", seed=1)))
    (folder / "reward_head.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no reward_head\.safetensors"):
        train_ppo.main(command("ppo", flags))
