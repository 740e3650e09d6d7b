"""Critic-free RL through train_ppo.py: what each estimator teaches, what is not built or run, groups without variance, resume, wrong input."""

import dataclasses
import json
import math
import shutil
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import args
import losses
import train_ppo
import train_sft
from base.dynamic_sampling import Group, choose, groups_of, micro_batch_of
from base.ppo_batches import BatchSizes, PromptBatches
from base.rewards import FunctionReward
from base.rollout import Prompts, Sampled, Scored
from base.self_check import SelfCheck
from base.value import VLModelWithValueHead
from common.errors import InputError
from common.seeds import stable_seed
from tests import zoo
from tests.test_ppo import LORA, comparable, history, launch, ppo_command, ppo_trainer, prompt_rows, same_weights

ESTIMATORS = ["rloo", "grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "mllama"]


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(
        "import zlib\n"
        "def length(responses, **_):\n    return [-abs(len(r) - 10) / 10 for r in responses]\n"
        "def coin(responses, **_):\n    return [zlib.crc32(r.encode()) % 2 for r in responses]\n"
        "def rare(responses, **_):\n    return [float(zlib.crc32(r.encode()) % 8 == 0) for r in responses]\n"
        "def same(responses, **_):\n    return [1.0] * len(responses)\n"
        "def yes(responses, **_):\n    return [float(r == 'yes') for r in responses]\n"
    )
    return file


def sampled_part(r) -> Sampled:
    return Sampled(**{name: getattr(r, name) for name in Sampled.__dataclass_fields__})


def steps_of(trainer) -> list[dict]:
    return [e for e in trainer.state.log_history if "objective/scores" in e]


# ------------------------------------------------------------------------------------------------ advantages in an update


def advantages_of(trainer, rows: list[dict], size: int = 2) -> tuple[torch.Tensor, ...]:
    """Scores, groups, masks and advantages of one update's rollouts, outside of training, in the order of places and answers."""
    places = [[*range(s, s + size)] for s in range(0, len(rows), size)]
    sampled = trainer.rollout([trainer.data_collator([rows[i] for i in p]) for p in places], seed=7, places=places)
    found = {}
    for r in trainer.estimate_advantages(trainer.evaluate_tokens(trainer.score(sampled))):
        for i, (b, k) in enumerate(r.order):
            n = int(r.mask[i].sum())
            found[r.places[b], k] = (r.scores[i].item(), r.advantages[i, :n].tolist(), r.texts[i])
    return found


@pytest.mark.parametrize("share", ["True", "False"])
def test_answers_are_compared_with_those_to_their_own_prompt(share: str, llava, image_dir, tmp_path, reward_file):
    """By hand, in both layouts: with --share_prefix False a micro batch holds the first answer to each prompt, then the second."""
    rows = prompt_rows(image_dir, 4)
    flags = f"{LORA} --reward_fn {reward_file}:length --advantage_estimator rloo --share_prefix {share}"
    found = advantages_of(ppo_trainer(llava, rows, tmp_path, flags), rows)
    assert len(found) == 8 and len({score for score, _, _ in found.values()}) > 2
    for (place, k), (score, advantages, _) in found.items():
        other = found[place, 1 - k][0]
        assert advantages == pytest.approx([score - other] * len(advantages), abs=1e-6)


def test_kl_is_taken_off_the_score_before_the_baseline(llava, image_dir, tmp_path, reward_file):
    rows = prompt_rows(image_dir, 2)
    flags = f"{LORA} --reward_fn {reward_file}:length --advantage_estimator rloo --kl_coef 0.5"
    trainer = ppo_trainer(llava, rows, tmp_path, flags)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    sampled = trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1]])
    (r,) = trainer.estimate_advantages(trainer.evaluate_tokens(trainer.score(sampled)))
    kl = torch.where(r.mask, r.logps - r.ref_logps, 0).sum(1)
    net = (r.scores - 0.5 * kl).tolist()
    assert kl.abs().min() > 1e-3
    expected = [net[0] - net[1], net[1] - net[0], net[2] - net[3], net[3] - net[2]]
    assert r.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------ what is not built or run


@pytest.mark.parametrize("mode", [LORA, ""])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_policy_without_kl_runs_the_policy_once(family: str, mode: str, image_dir, tmp_path, reward_file):
    """No value function, no reference, no scoring pass; one forward per micro batch, the tower once, and something is learnt."""
    path = zoo.checkpoint(family)
    flags = f"{mode} --reward_fn {reward_file}:length --advantage_estimator grpo --num_generations 2 --gradient_accumulation_steps 2"
    trainer = ppo_trainer(path, prompt_rows(image_dir), tmp_path, flags)
    model = trainer.model
    assert model.head is None and not model.separate_value and trainer.ref_model is None
    assert not any("value" in name or name.startswith("head") for name, _ in model.named_parameters())
    trainer.remove_callback(SelfCheck)  # which runs policy and tower before the first step
    passes, towers = [], []
    forward = type(model).forward
    model.forward = lambda *a, **k: (passes.append(1), forward(model, *a, **k))[1]
    trainer.base_model(model).get_vision_tower().register_forward_hook(lambda *_: towers.append(1))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(passes) == 2 and len(towers) == 2  # two micro batches of one update
    (step,) = steps_of(trainer)
    assert not {"objective/kl", "first/ratio_deviation", "loss/value_avg", "objective/entropy"} & set(step)
    assert step["val/ratio"] == 1 and step["policy/entropy_avg"] > 0 and 0 <= step["frac_reward_zero_std"] < 1
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_passes_that_are_read_are_run(llava, image_dir, tmp_path, reward_file):
    flags = f"{LORA} --reward_fn {reward_file}:length --advantage_estimator grpo --num_generations 2"
    for name, extra, logged in (
        ("old", "--num_ppo_epochs 2", {"first/ratio_deviation", "objective/entropy"}),
        ("steps", "--num_mini_batches 2", {"first/ratio_deviation", "objective/entropy"}),
        ("reference", "--kl_in_loss 0.04", {"loss/kl_avg"}),
        ("reward", "--kl_coef 0.1", {"objective/kl", "first/ratio_deviation"}),
    ):
        trainer = ppo_trainer(llava, prompt_rows(image_dir), tmp_path / name, f"{flags} {extra}")
        trainer.train()
        (step,) = steps_of(trainer)
        assert logged <= set(step), name
        assert step.get("first/ratio_deviation", 0) == pytest.approx(0, abs=1e-5)
        assert step.get("objective/kl", 0) == pytest.approx(0, abs=1e-5)


def test_output_is_a_checkpoint_without_a_value_function(command, reward_file, tmp_path):
    flags = f"{LORA} --advantage_estimator grpo --save_strategy steps --save_steps 2"
    train_ppo.main(ppo_command(command, reward_file, tmp_path / "grpo", flags))
    names = {f.name for f in (tmp_path / "grpo").rglob("*")}
    assert "adapter_model.safetensors" in names and not {"value_head.safetensors", "value_function"} & names
    with pytest.raises(InputError, match=r"has no value_head\.safetensors"):
        VLModelWithValueHead.from_pretrained(str(tmp_path / "grpo"))


# ------------------------------------------------------------------------------------------------ loss


def test_the_gradient_does_not_depend_on_how_an_update_is_split(llava, image_dir, tmp_path, reward_file):
    """One micro batch of 8 answers or four of 2: the same step, for every loss that is a mean over the mini batch."""
    rows = prompt_rows(image_dir, 4)
    for loss_type, level in (("dapo", "token"), ("grpo", "sequence"), ("dr_grpo", "token")):
        gradients = []
        for size, steps in ((8, 1), (2, 4)):
            flags = (
                f"{LORA} --reward_fn {reward_file}:length --advantage_estimator grpo --num_generations 2 --loss_type {loss_type} "
                f"--importance_sampling_level {level} --per_device_train_batch_size {size} --gradient_accumulation_steps {steps} "
                "--max_grad_norm 0 --mask_truncated_completions False"
            )
            trainer = ppo_trainer(llava, rows, tmp_path / f"{loss_type}{level}{size}", flags)
            kept = {}
            trainer.optimizer_step = lambda model, kept=kept: kept.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
            trainer._grad_norm = None
            trainer.train()
            gradients.append(kept)
        assert gradients[0].keys() == gradients[1].keys()
        largest = max(g.abs().max() for g in gradients[0].values())
        assert largest > 0
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-4 * largest), (loss_type, level, name)


def test_truncated_answers_and_overlong_penalty(llava, image_dir, tmp_path, reward_file):
    rows = prompt_rows(image_dir, 4)
    flags = (
        f"{LORA} --reward_fn {reward_file}:same --advantage_estimator grpo --mask_truncated_completions True --overlong_buffer 4 "
        "--overlong_penalty 2"
    )
    trainer = ppo_trainer(llava, rows, tmp_path, flags)
    sampled = trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1, 2, 3]])
    (r,) = trainer.estimate_advantages(trainer.evaluate_tokens(trainer.score(sampled)))
    lengths = r.mask.sum(1)
    assert not r.ended.all()
    assert r.scores.tolist() == pytest.approx([1 - 2 * max(0, n - 2) / 4 for n in lengths.tolist()])
    assert torch.equal(r.loss_mask.any(1), r.ended) and r.counted.all()


# ------------------------------------------------------------------------------------------------ groups without variance


def test_uniform_groups_are_counted_and_dropped(llava, image_dir, tmp_path, reward_file):
    rows = prompt_rows(image_dir, 4)
    flags = f"{LORA} --reward_fn {reward_file}:coin --advantage_estimator grpo --num_generations 2 --drop_uniform_groups True"
    trainer = ppo_trainer(llava, rows, tmp_path, f"{flags} --per_device_train_batch_size 8")
    sampled = trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1, 2, 3]])
    (r,) = trainer.estimate_advantages(trainer.evaluate_tokens(trainer.score(sampled)))
    differs = [a != b for a, b in r.by_prompt(r.scores.tolist())]
    assert True in differs and False in differs
    assert r.by_prompt(r.counted.tolist()) == [[d, d] for d in differs]
    trainer.train()
    (step,) = steps_of(trainer)
    assert 0 < step["frac_reward_zero_std"] < 1


def test_an_update_without_any_variance_moves_nothing_and_says_so(llava, image_dir, tmp_path, reward_file):
    for dropped in ("True", "False"):
        flags = f"{LORA} --reward_fn {reward_file}:same --advantage_estimator grpo --num_generations 2 --drop_uniform_groups {dropped}"
        trainer = ppo_trainer(llava, prompt_rows(image_dir), tmp_path / dropped, flags)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        (step,) = steps_of(trainer)
        assert step["frac_reward_zero_std"] == 1 and step["reward_std"] == 0
        assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize("layout", ["", "--share_prefix False"])
def test_dynamic_sampling_fills_an_update_with_groups_that_differ(layout, llava, image_dir, tmp_path, reward_file):
    """Every group of the update differs; new prompts come from outside of it, with their own image and their own answers' scores."""
    rows = prompt_rows(image_dir, 24)
    flags = (
        f"{LORA} --reward_fn {reward_file}:rare --advantage_estimator grpo --num_generations 2 --dynamic_sampling True "
        f"--gradient_accumulation_steps 2 --max_num_gen_batches 30 {layout}"
    )
    trainer = ppo_trainer(llava, rows, tmp_path, flags)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    kept, evaluate = [], trainer.evaluate_tokens
    trainer.evaluate_tokens = lambda scored: (kept.extend(scored), evaluate(scored))[1]
    trainer.train()
    (step,) = steps_of(trainer)
    assert step["frac_reward_zero_std"] == 0 and 1 < step["val/generation_rounds"] <= 30
    assert len(kept) == 2 and all(sorted(r.by_prompt(r.scores.tolist())[b]) == [0, 1] for r in kept for b in (0, 1))
    places = [place for r in kept for place in r.places]
    assert len(set(places)) == 4 and max(places) >= 4
    for r in kept:  # every answer stands with the prompt that it was sampled to
        assert torch.equal(trainer.score([sampled_part(r)])[0].scores, r.scores)
        for row, place, texts in zip(r.rows, r.places, r.by_prompt(r.texts), strict=True):
            trainer.model.load_state_dict(before)
            seed = stable_seed(trainer.args.seed, "rollout", 0)
            (alone,) = trainer.rollout([trainer.data_collator([row])], seed, [[place]])
            assert alone.texts == texts


def test_dynamic_sampling_is_bounded(llava, image_dir, tmp_path, reward_file):
    flags = f"{LORA} --reward_fn {reward_file}:same --advantage_estimator grpo --num_generations 2 --dynamic_sampling True --max_num_gen_batches 3"
    trainer = ppo_trainer(llava, prompt_rows(image_dir), tmp_path, flags)
    trainer.train()
    (step,) = steps_of(trainer)
    assert step["val/generation_rounds"] == 3 and step["frac_reward_zero_std"] == 1


def test_further_prompts_by_their_place():
    """An update's own places are those that it iterates over; behind them come all other prompts, again and again."""
    sizes = BatchSizes(micro_prompts=2, micro_batches=2, mini_batches=1, update_prompts=4, update_rollouts=8)
    orders = set()
    for step in range(6):  # two epochs of three updates
        batches = PromptBatches(10, sizes, 0, seed=3)
        batches.epoch, update = divmod(step, batches.updates)
        own = [i for batch in [*batches][2 * update : 2 * update + 2] for i in batch]
        index_of = PromptBatches(10, sizes, 0, seed=3).by_place(step)
        assert [index_of(place) for place in range(4)] == own
        others = [index_of(place) for place in range(4, 16)]
        assert others[:6] == others[6:] and sorted([*own, *others[:6]]) == [*range(10)]
        orders.update(combinations(others[:6], 2))
    assert any((j, i) in orders for i, j in orders)  # every update has an order of its own
    few = PromptBatches(3, sizes, 0, seed=3).by_place(0)  # the update takes all there are
    assert sorted(few(place) for place in range(4, 7)) == [0, 1, 2]


@pytest.mark.parametrize("share", ["True", "False"])
def test_what_is_known_of_an_answer_stands_at_it(share: str, llava, image_dir, tmp_path, reward_file):
    """In both layouts, also once groups have moved to another micro batch: log-probs of a server, scores, parts."""
    rows = prompt_rows(image_dir, 2)
    trainer = ppo_trainer(llava, rows, tmp_path, f"{LORA} --reward_fn {reward_file}:same --share_prefix {share}")

    def prompts(places: list[int]) -> Prompts:
        return trainer._prompts(trainer.data_collator([rows[place] for place in places]), places)

    answers = [[[5, 6], [7]], [[8], [9, 10, 11]]]
    laid_out = trainer._lay_out(prompts([0, 1]), answers, [[[-t / 8 for t in a] for a in of] for of in answers])
    told: list[list[int]] = []
    FunctionReward("told", 1.0, lambda completion_ids, **_: told.extend(completion_ids) or [0.0] * 4).score([laid_out])
    assert sorted(told) == [[5, 6], [7], [8], [9, 10, 11]]  # without padding
    first = laid_out.batch["completion_ids"][:, 0].float()
    scored = Scored(**vars(laid_out), parts={"half": first / 2}, scores=first)
    moved = micro_batch_of(groups_of(scored)[::-1], prompts, trainer._lay_out)
    assert moved.places == [1, 0] and moved.by_prompt(moved.scores.tolist()) == [[8, 9], [5, 7]]
    for r in (scored, moved):
        ids = r.batch["completion_ids"]
        assert torch.equal(r.sampler_logps[r.mask], -ids[r.mask] / 8)
        assert torch.equal(r.scores, ids[:, 0].float()) and torch.equal(r.parts["half"], r.scores / 2)


def test_the_first_groups_that_differ_are_taken():
    groups = [Group(place, [], None, {}, [], uniform=place % 3 == 0) for place in (4, 0, 6, 1, 5, 3, 2)]
    assert [g.place for g in choose(groups, 3)] == [1, 2, 4]
    assert [g.place for g in choose(groups, 6)] == [1, 2, 4, 5, 0, 3]


# ------------------------------------------------------------------------------------------------ rewards


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.py"
    file.write_text(
        "def trl(prompts, completions, completion_ids, solution, log_extra=None, **kwargs):\n"
        "    assert all(len(c) == 1 and c[0]['role'] == 'assistant' for c in completions)\n"
        "    assert prompts[0][0]['role'] == 'user' and 'where' in kwargs and 'responses' not in kwargs\n"
        "    return [len(c[0]['content']) + len(s) + len(i) / 100 for c, s, i in zip(completions, solution, completion_ids)]\n"
        "def ours(responses, solution):\n    return [len(r) * 10.0 + len(s) for r, s in zip(responses, solution)]\n"
        "def some(responses, solution):\n    return [None if s == 'no' else 1.0 for s in solution]\n"
        "def wants(responses, solution, difficulty):\n    return [0.0] * len(responses)\n"
    )
    return file


def keyed_rows(image_dir: Path, count: int = 4) -> list[dict]:
    return [row | {"solution": ["yes", "no"][i % 2]} for i, row in enumerate(prompt_rows(image_dir, count))]


def test_functions_get_the_columns_in_both_signatures(llava, image_dir, tmp_path, key_file):
    rows = keyed_rows(image_dir)
    flags = (
        f"{LORA} --reward_fn {key_file}:trl {key_file}:ours yes_no --reward_weights 1 0.5 2 --advantage_estimator grpo"
    )
    trainer = ppo_trainer(llava, rows, tmp_path, flags)
    sampled = trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1, 2, 3]])
    (r,) = trainer.score(sampled)
    assert list(r.parts) == ["trl", "ours", "yes_no"]
    for i, b in enumerate(r.prompt_of):
        text, key, tokens = len(r.texts[i]), len(rows[b]["solution"]), int(r.mask[i].sum())
        assert r.parts["trl"][i].item() == pytest.approx(text + key + tokens / 100)
        assert r.parts["ours"][i].item() == pytest.approx(10 * text + key)
        parts = [r.parts[name][i].item() for name in r.parts]
        assert r.scores[i].item() == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2])
    trainer.train()
    (step,) = steps_of(trainer)
    assert {"reward/trl", "reward/ours", "reward/yes_no", "right/yes_no"} <= set(step) and "right/ours" not in step
    assert step["right/yes_no"] == step["reward/yes_no"]


def test_a_reward_may_say_that_it_does_not_apply(llava, image_dir, tmp_path, key_file):
    """None: the answer has no part in the group's mean and no advantage; beside another reward only that one counts."""
    rows = keyed_rows(image_dir)
    trainer = ppo_trainer(llava, rows, tmp_path / "a", f"{LORA} --reward_fn {key_file}:some --advantage_estimator grpo")
    found = advantages_of(trainer, rows)
    assert all((score != score) == bool(place % 2) for (place, _), (score, _, _) in found.items())
    assert all(set(advantages) == {0.0} for _, advantages, _ in found.values())
    trainer.train()
    assert steps_of(trainer)[0]["reward/some"] == 1  # of those that it applies to
    flags = f"{LORA} --reward_fn {key_file}:some {key_file}:ours --advantage_estimator grpo"
    trainer = ppo_trainer(llava, rows, tmp_path / "b", flags)
    (r,) = trainer.score(trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1, 2, 3]]))
    expected = r.parts["ours"] + torch.tensor([1.0 - b % 2 for b in r.prompt_of])
    assert torch.equal(r.scores, expected)
    with pytest.raises(InputError, match=r"Every reward function returned None.*row 1"):
        ppo_trainer(llava, rows, tmp_path / "c", f"{LORA} --reward_fn {key_file}:some").train()


def test_arguments_are_checked_before_the_first_rollout(llava, image_dir, tmp_path, key_file):
    rows, flags = keyed_rows(image_dir), f"{LORA} --advantage_estimator grpo --reward_fn"
    with pytest.raises(InputError, match=r"Reward wants takes an argument difficulty, .* columns are .*solution"):
        ppo_trainer(llava, rows, tmp_path, f"{flags} {key_file}:wants")
    with pytest.raises(InputError, match=r"Reward number takes an argument solution, which the data does not have"):
        ppo_trainer(llava, prompt_rows(image_dir), tmp_path, f"{flags} number")
    rows[3]["solution"] = None
    with pytest.raises(InputError, match=r"row 3 has no solution, which the reward exact_answer reads"):
        ppo_trainer(llava, rows, tmp_path, f"{flags} exact_answer")


FORMS = """
import functools
from dataclasses import dataclass

import numpy as np
import torch


def plain(responses):
    return [len(r) for r in responses]


def trl(*, completions, **kwargs):
    assert "responses" not in kwargs and "prompt" not in kwargs
    return [len(c[0]["content"]) for c in completions]


def both(completions, responses):
    return [len(c[0]["content"]) for c, r in zip(completions, responses, strict=True) if c[0]["content"] == r]


def tensor(responses, *args):
    return torch.tensor(plain(responses), requires_grad=False)


def column(responses):
    return torch.tensor(plain(responses))[:, None].double()


def array(responses):
    return np.array(plain(responses), dtype=np.float16)


def generator(responses):
    for r in responses:
        yield np.int64(len(r))


def empty_column(responses, prompts, hint, images=None):
    assert hint == [None if "photo" in p[0]["content"] else "x" for p in prompts]
    return plain(responses)


@dataclass
class Length:
    factor: "float" = 1.0

    def __call__(self, responses, **_):
        return [self.factor * len(r) for r in responses]


an_object = Length()
partial = functools.partial(lambda responses, factor: [factor * len(r) for r in responses], factor=1)
"""
GOOD_FORMS = ("plain", "trl", "both", "tensor", "column", "array", "generator", "empty_column", "an_object", "partial")


def test_whatever_a_function_looks_like(llava, image_dir, tmp_path):
    """TRL's signature by name alone, tensors, arrays, generators, objects; a column that some rows do not have."""
    file = tmp_path / "forms.py"
    file.write_text(FORMS)
    rows = [
        row | {"hint": None if "photo" in row["prompt"][0]["content"] else "x"} for row in prompt_rows(image_dir, 4)
    ]
    assert {row["hint"] for row in rows} == {None, "x"}
    specs = " ".join(f"{file}:{name}" for name in GOOD_FORMS)
    flags = (
        f"{LORA} --advantage_estimator grpo --reward_fn {specs} --reward_weights {' '.join(['0.5'] * len(GOOD_FORMS))}"
    )
    trainer = ppo_trainer(llava, rows, tmp_path, flags)
    (r,) = trainer.score(trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1, 2, 3]]))
    lengths = [float(len(text)) for text in r.texts]
    assert len(set(lengths)) > 1
    for name in GOOD_FORMS:
        assert r.parts[name].tolist() == lengths, name
    assert r.scores.tolist() == [len(GOOD_FORMS) * n / 2 for n in lengths]


BAD_FORMS = {
    "async def f(completions): return [0.0 for _ in completions]": r"Reward f is asynchronous",
    "class F:\n    async def __call__(self, responses): return [0.0]\nf = F()": r"Reward f is asynchronous",
    "def f(*answers): return [0.0 for _ in answers]": r"Reward f takes no argument by its name",
    "def f(responses, /): return [0.0 for _ in responses]": r"Reward f takes no argument by its name",
    "def f(completions, trainer_state): return [0.0 for _ in completions]": r"argument trainer_state, which TRL passes",
    "def f(completions, difficulty): return [0.0 for _ in completions]": r"argument difficulty, which the data does not have",
    "class f:\n    def __init__(self, responses): pass": r"forms\.py defines no function f",
    "import does_not_exist\ndef f(responses): return [0.0]": r"does not run \(ModuleNotFoundError: No module named 'does_not_exist'\)",
    "def f(responses): return [str(len(r)) for r in responses]": r"Reward f must return numbers: '\d+' is a text",
    "def f(responses): return '1' * len(responses)": r"Reward f returned str: return a list",
    "def f(responses): return {r: 1.0 for r in responses}": r"Reward f returned dict: return a list",
    "import torch\ndef f(responses): return torch.tensor(1.0)": r"Reward f returned Tensor: return a list",
    "import torch\ndef f(responses): return torch.zeros(len(responses), 2)": r"Reward f must return numbers",
    "def f(responses):\n    for r in responses: yield 1 / 0": r"Reward f raised ZeroDivisionError.*forms\.py, line 2.*for .*row 0",
    "class F:\n    def __call__(self, responses): return 1 / 0\nf = F()": r"Reward f raised ZeroDivisionError.*forms\.py, line 2.*for",
}  # fmt: skip


@pytest.mark.parametrize("source", BAD_FORMS)
def test_a_function_that_cannot_be_used_is_one_sentence(source: str, llava, image_dir, tmp_path):
    file = tmp_path / "forms.py"
    file.write_text(source + "\n")
    rows = prompt_rows(image_dir, 2)
    with pytest.raises(InputError, match=BAD_FORMS[source]) as caught:
        trainer = ppo_trainer(llava, rows, tmp_path, f"{LORA} --advantage_estimator grpo --reward_fn {file}:f")
        trainer.score(trainer.rollout([trainer.data_collator(rows)], seed=7, places=[[0, 1]]))
    assert "\n" not in str(caught.value)


def test_rows_with_a_key_in_a_file(llava, image_dir, tmp_path):
    """images, prompt, solution: what geometry3k, CLEVR and VQA data look like."""
    rows = [
        {"images": [f"{i}.png"], "prompt": "<image>How many?", "solution": str(i), "tolerance": 0.0} for i in range(8)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train_ppo.main(
        f"--model_name_or_path {llava} --dataset_name {tmp_path}/rows.json --image_root {image_dir} --output_dir {tmp_path}/run {LORA} "
        "--advantage_estimator grpo --num_generations 4 --per_device_train_batch_size 8 --response_length 4 --max_steps 2 --use_cpu True "
        "--save_strategy no --disable_tqdm True --reward_fn number think_format repetition_penalty".split()
    )
    step = logged(tmp_path / "run")[0]
    assert {"reward/number", "right/number", "reward/think_format", "reward/repetition_penalty"} <= set(step)


# ------------------------------------------------------------------------------------------------ whole runs

RUNS = {
    "on policy": "--advantage_estimator grpo --num_mini_batches 1 --num_ppo_epochs 1",
    "kl in the loss": "--advantage_estimator grpo --kl_in_loss 0.04 --loss_type dr_grpo --scale_rewards none",
    "dynamic": "--advantage_estimator rloo --dynamic_sampling True --num_mini_batches 1 --num_ppo_epochs 1",
    "adaptive": "--advantage_estimator reinforce_plus_plus --kl_coef 0.1 --target_kl 0.01 --kl_horizon 20",
}


@pytest.mark.parametrize("run", RUNS)
def test_resume_is_bit_for_bit(run: str, command, reward_file, tmp_path):
    flags = f"{LORA} {RUNS[run]} --save_strategy steps --save_steps 1"
    argv = lambda out: ppo_command(command, reward_file, out, flags, reward="coin")  # noqa: E731
    train_ppo.main(argv(tmp_path / "whole"))
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", half / "checkpoint-2")
    train_ppo.main([*argv(half), "--resume_from_checkpoint", "True"])
    assert logged(half) == logged(tmp_path / "whole") and len(logged(half)) == 4
    assert same_weights(tmp_path / "whole", half)
    assert "What is in this image?" in next((tmp_path / "whole" / "samples").iterdir()).read_text()


def logged(out: Path) -> list[dict]:
    return comparable(history(out))


@pytest.mark.parametrize(
    "estimator",
    ["grpo --scale_rewards batch", pytest.param("reinforce_plus_plus_baseline", marks=pytest.mark.slow)],
)
def test_two_devices_give_the_result_of_one(estimator: str, command, reward_file, tmp_path):
    flags = f"{LORA} --advantage_estimator {estimator} --kl_coef 0.05 --loss_type grpo"
    train_ppo.main(ppo_command(command, reward_file, tmp_path / "one", f"{flags} --gradient_accumulation_steps 2"))
    argv = ppo_command(command, reward_file, tmp_path / "two", flags)
    process = launch(argv, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.terminate()  # torchrun takes its workers with it
    assert process.returncode == 0, output[-3000:]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"first/ratio_deviation"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name


def test_updates_of_which_nothing_is_left(llava, image_dir, tmp_path, reward_file):
    """All answers truncated and masked: for every loss the step is 0, the log has numbers, and the next update goes on."""
    for loss_type, estimator in (
        ("dapo", "grpo"),
        ("grpo", "rloo"),
        ("dr_grpo", "reinforce_plus_plus"),
        ("bnpo", "gae"),
    ):
        flags = (
            f"{LORA} --reward_fn {reward_file}:length --advantage_estimator {estimator} --loss_type {loss_type} --rollouts_per_prompt 2 "
            "--mask_truncated_completions True --response_length 1 --max_steps 2"
        )
        trainer = ppo_trainer(llava, prompt_rows(image_dir), tmp_path / estimator, flags)
        trainer.sampler = dataclasses.replace(trainer.sampler, end_ids=[-1])  # nothing ends an answer
        before = {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if estimator != "gae" or "policy" in n
        }
        trainer.train()
        steps = steps_of(trainer)
        assert len(steps) == 2 and all(math.isfinite(v) for step in steps for v in step.values()), steps
        assert steps[0].get("loss/policy_avg", 0) == 0 and steps[0]["val/ended"] == 0
        assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_one_group_has_one_deviation(llava, image_dir, tmp_path, reward_file):
    """An update of one group: `batch` divides by what `group` divides by."""
    rows, found = prompt_rows(image_dir, 1), []
    for scale in ("batch", "group"):
        flags = f"{LORA} --reward_fn {reward_file}:length --advantage_estimator grpo --num_generations 4 --scale_rewards {scale}"
        found.append(advantages_of(ppo_trainer(llava, rows, tmp_path / scale, flags), rows, size=1))
    assert found[0] == found[1] and len({a[0] for _, a, _ in found[0].values()}) > 1


def test_evaluation_leaves_out_what_no_reward_applies_to(llava, image_dir, tmp_path, key_file):
    rows = keyed_rows(image_dir)
    trainer = ppo_trainer(llava, rows, tmp_path, f"{LORA} --reward_fn {key_file}:some --advantage_estimator grpo")
    assert trainer.evaluate(Dataset.from_list(rows))["eval_objective/scores"] == 1  # None for every other row


def test_evaluation_without_a_reference(command, reward_file, tmp_path):
    flags = f"{LORA} --advantage_estimator grpo --eval_ratio 0.25 --eval_strategy steps --eval_steps 2"
    train_ppo.main([*ppo_command(command, reward_file, tmp_path / "run", flags)])
    entries = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    evaluations = [e for e in entries if "eval_objective/scores" in e]
    assert len(evaluations) == 2 and "eval_objective/kl" not in evaluations[0]


@pytest.fixture(scope="module")
def yes_or_no(tmp_path_factory: pytest.TempPathFactory, image_dir: Path) -> tuple[str, str]:
    """A policy that says yes or no, each half of the time, and flags of its data."""
    folder = tmp_path_factory.mktemp("yesno")
    rows = [
        {
            "image": f"{i // 2}.png",
            "conversations": [{"from": "user", "value": "<image>\nIs it?"}, {"from": "assistant", "value": ["yes", "no"][i % 2]}],
        }
        for i in range(16)
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    common = (
        f"--dataset_name vlquery_json --data_path {folder}/rows.json --image_root {image_dir} --disable_tqdm True --save_strategy no "
        "--use_cpu True --seed 0"
    )
    train_sft.main(
        f"{common} --model_name_or_path {zoo.checkpoint('llava')} --output_dir {folder}/sft --max_steps 60 --per_device_train_batch_size 16 "
        "--learning_rate 1e-2".split()
    )
    return f"{folder}/sft", common


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reaches_a_known_optimum(estimator: str, yes_or_no, tmp_path, reward_file):
    """The reward is 1 for yes: every estimator ends at yes."""
    sft, common = yes_or_no
    train_ppo.main(
        f"{common} --model_name_or_path {sft} --output_dir {tmp_path}/rl --max_steps 16 --per_device_train_batch_size 32 "
        f"--gradient_accumulation_steps 2 --rollouts_per_prompt 4 --response_length 6 --learning_rate 3e-3 --lr_scheduler_type constant "
        f"--reward_fn {reward_file}:yes {LORA} --modules_to_save lm_head --advantage_estimator {estimator}".split()
    )
    scores = [e["objective/scores"] for e in logged(tmp_path / "rl")]
    assert scores[0] < 0.7 and sum(scores[-3:]) / 3 > 0.93, scores


# ------------------------------------------------------------------------------------------------ wrong input

GRPO = f"{LORA} --reward_fn {{file}}:length --advantage_estimator grpo"
BAD = {
    "value flag": (f"{GRPO} --vf_coef 0.1", r"--vf_coef has no part in --advantage_estimator grpo"),
    "value adapter": (f"{GRPO} --value_adapter shared", r"--value_adapter has no part"),
    "value from reward": (f"{GRPO} --init_value_from_reward True", r"--init_value_from_reward has no part"),
    "lambda": (f"{GRPO} --lam 0.95", r"--lam has no part"),
    "discount": (f"{GRPO} --gamma 0.9", r"--gamma has no part"),
    "one answer": (f"{GRPO} --num_generations 1", r"compares answers: --rollouts_per_prompt 2"),
    "scale": (f"{LORA} --reward_fn {{file}}:length --advantage_estimator rloo --scale_rewards none", r"--scale_rewards belongs to grpo"),
    "drop in PPO": (f"{LORA} --reward_fn {{file}}:length --drop_uniform_groups True", r"gae compares no answers"),
    "rounds": (f"{GRPO} --max_num_gen_batches 3", r"needs --dynamic_sampling True"),
    "delta": (f"{GRPO} --delta 1.1", r"--delta 1\.1 must be above 1\.2"),
    "target": (f"{GRPO} --target_kl 1", r"--kl_coef, which is 0"),
    "correction": (f"{GRPO} --use_bias_correction_kl False", r"needs --kl_in_loss"),
    "buffer": (f"{GRPO} --overlong_buffer 7", r"--overlong_buffer 7 must be within"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_gets_one_sentence(case: str, command, reward_file):
    flags, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        train_ppo.main(command("ppo", flags.format(file=reward_file) + " --response_length 6"))
    assert "\n" not in str(caught.value)


def test_switches_may_stand_alone(command, reward_file):
    flags = f"{LORA} --reward_fn {reward_file}:length --whiten_rewards --response_length 6"
    kinds = (train_ppo.ModelArguments, train_ppo.DataArguments, train_ppo.LoraArguments, train_ppo.PPOConfig)
    assert train_ppo.parse(*kinds, argv=command("ppo", flags))[-1].whiten_rewards is True
    off = command("ppo", flags.replace("--whiten_rewards", "--whiten_rewards False"))
    assert train_ppo.parse(*kinds, argv=off)[-1].whiten_rewards is False


@pytest.mark.parametrize("place", ["command line", "config file"])
def test_names_of_trl_are_understood(place: str, command, reward_file, tmp_path):
    names = "num_generations 2 num_iterations 3 epsilon 0.1 epsilon_high 0.3 beta 0.01 max_completion_length 6".split()
    names = dict(zip(names[::2], names[1::2], strict=True))
    if place == "config file":
        (tmp_path / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in names.items()))
        flags = f"--config {tmp_path}/config.yaml"
    else:
        flags = " ".join(f"--{name} {value}" for name, value in names.items())
    flags = f"{GRPO.format(file=reward_file)} {flags}"
    config = train_ppo.parse(
        train_ppo.ModelArguments, train_ppo.DataArguments, train_ppo.LoraArguments, train_ppo.PPOConfig,
        argv=command("ppo", flags),
    )[-1]  # fmt: skip
    assert (config.rollouts_per_prompt, config.num_ppo_epochs, config.response_length) == (2, 3, 6)
    assert (config.cliprange, config.cliprange_high, config.kl_in_loss, config.temperature) == (0.1, 0.3, 0.01, 1.0)
    assert losses.LOSS_TYPES[0] == config.loss_type == "dapo" and config.vf_coef is None


def test_a_config_file_gives_a_flag_once(command, reward_file, tmp_path):
    (tmp_path / "config.yaml").write_text("num_generations: 2\nrollouts_per_prompt: 4\n")
    with pytest.raises(InputError, match=r"config file gives rollouts_per_prompt twice"):
        train_ppo.main(command("ppo", f"{GRPO.format(file=reward_file)} --config {tmp_path}/config.yaml"))


def test_defaults_of_estimators():
    """Of PPO the papers' and TRL's former values, of the others TRL's GRPO: whoever moves one moves every run."""
    expected = {
        "gae": (4, 1, 0.05, 0.7, 0.2, 0.1, 0.95, False, "separate", False),
        "grpo": (1, 8, 0.0, 1.0, None, None, None, None, None, None),
    }
    names = (
        "num_ppo_epochs rollouts_per_prompt kl_coef temperature cliprange_value vf_coef lam whiten_rewards value_adapter "
        "init_value_from_reward"
    )
    for estimator, values in expected.items():
        flags = args.PPOConfig(output_dir="x", reward_fn=["exact_answer"], advantage_estimator=estimator)
        assert {name: getattr(flags, name) for name in names.split()} == dict(zip(names.split(), values, strict=True))
        assert (flags.gamma, flags.cliprange, flags.kl_in_loss, flags.loss_type) == (1.0, 0.2, 0.0, "dapo")
    strategies = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    best = args.PPOConfig(output_dir="x", reward_fn=["exact_answer"], load_best_model_at_end=True, **strategies)
    assert best.metric_for_best_model == "eval_objective/scores" and best.greater_is_better  # evaluation has no loss
