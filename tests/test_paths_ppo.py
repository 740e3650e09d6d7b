"""PPO's whole path from rows to numbers, against values worked out by hand: signs, flags, seeds, roles."""

import math
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import args
import train_ppo
from base.adapters import Role, adapter_active
from base.ppo_batches import BatchSizes, mini_batches
from base.ppo_metrics import group_metrics, reward_metrics, rollout_metrics, token_metrics
from base.reward import VLRewardModel
from base.reward_calls import UnscoredAnswers
from base.rewards import FunctionReward, built_in
from base.rollout import Advantages, Sampled
from base.sampling import Sampler, end_token_ids
from common.seeds import stable_seed
from data import DataSplits
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy
from tests import zoo
from tests.test_ppo import (  # noqa: F401  (a fixture)
    LORA,
    history,
    ppo_command,
    ppo_trainer,
    prompt_rows,
    reward_file,
    rolled_out,
    to_alone,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])
LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.5, 0.0]])
REF_LOGPS = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, -1.0, 0.0]])


@pytest.fixture(scope="module")
def built(tmp_path_factory, image_dir, reward_file):  # noqa: F811
    """built(flags) -> trainer on four prompts, with a reward of the answers' length unless the flags name another."""

    def build(flags: str = "", checkpoint: str | None = None, rows: list[dict] | None = None, reward: str = "length"):
        reward = f"--reward_fn {reward_file}:{reward}" if reward else ""
        return ppo_trainer(
            checkpoint or zoo.checkpoint("llava"),
            rows or prompt_rows(image_dir, 4),
            tmp_path_factory.mktemp("run"),
            f"{reward} {flags}" if "--use_lora" in flags else f"{LORA} {reward} {flags}",
        )

    return build


def move_adapters(model: torch.nn.Module, std: float = 0.1) -> None:
    """Give every adapter an effect: B is zero at first."""
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)


def whitened(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / math.sqrt(variance) for v in values]


# -- 4. token rewards, 5. advantages


def test_the_penalty_grows_where_the_policy_leaves_the_reference(built):
    """-0.1 * (log policy - log reference) at every token, the score at the last one."""
    trainer = built("--kl_coef 0.1")
    rewards = trainer.token_rewards(torch.tensor([1.0, -2.0]), LOGPS, REF_LOGPS, MASK)
    expected = [[-0.1 * 0.5, 0.0, 0.1 * 1.0 + 1.0], [-0.1 * 2.0, 0.1 * 0.5 - 2.0, 0.0]]
    assert rewards.tolist() == [pytest.approx(row) for row in expected]
    trainer.ppo_state.kl_coef = 0.2  # where the controller has moved it
    rewards = trainer.token_rewards(torch.tensor([1.0, -2.0]), LOGPS, REF_LOGPS, MASK)
    assert rewards[0].tolist() == pytest.approx([-0.2 * 0.5, 0.0, 0.2 * 1.0 + 1.0])


def test_the_penalty_grows_with_k3_on_both_sides(built):
    """r - 1 - log r, r = reference / policy"""
    trainer = built("--kl_coef 0.1 --kl_estimator k3")
    rewards = trainer.token_rewards(torch.tensor([1.0, -2.0]), LOGPS, REF_LOGPS, MASK)
    low, high = math.exp(-0.5) - 0.5, math.exp(1.0) - 2.0
    assert rewards[0].tolist() == pytest.approx([-0.1 * low, 0.0, 1.0 - 0.1 * high])


def test_whitened_rewards_have_unit_variance_and_keep_their_mean(built):
    trainer = built("--kl_coef 0.1 --whiten_rewards True")
    rewards = trainer.token_rewards(torch.tensor([1.0, -2.0]), LOGPS, REF_LOGPS, MASK)
    plain = [-0.05, 0.0, 1.1, -0.2, -1.95]
    mean = sum(plain) / 5
    assert rewards[MASK].tolist() == pytest.approx([v + mean for v in whitened(plain)], abs=1e-5)
    assert rewards[1, 2] == 0


def test_advantages_are_gae_by_hand_and_whitened(built):
    trainer = built("--gamma 0.9 --lam 0.8")
    rewards = torch.tensor([[0.0, 0.5, 1.0], [0.2, -1.0, 9.0]])
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    advantages, returns = trainer.advantages(rewards, values, MASK, torch.tensor([0, 1]))
    third = 1.0 - 0.3
    second = 0.5 + 0.9 * 0.3 - 0.2 + 0.72 * third
    first = 0.0 + 0.9 * 0.2 - 0.1 + 0.72 * second
    last = -1.0 - 0.5
    start = 0.2 + 0.9 * 0.5 - 0.4 + 0.72 * last
    plain = [first, second, third, start, last]
    assert returns[MASK].tolist() == pytest.approx([a + v for a, v in zip(plain, values[MASK].tolist(), strict=True)])
    assert advantages[MASK].tolist() == pytest.approx(whitened(plain), abs=1e-5)


SCORES, GROUPS = [1.0, 0.0, 3.0, 4.0], torch.tensor([5, 2, 5, 2])  # two prompts, whose answers do not stand together
PAIRS = torch.tensor([[True, True], [True, False], [True, True], [True, True]])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("rloo", [1.0 - 3, 0.0 - 4, 3.0 - 1, 4.0 - 0]),
        ("grpo", [-1 / (2**0.5 + 1e-4), -2 / (8**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)]),
        ("grpo --scale_rewards none", [-1.0, -2.0, 1.0, 2.0]),
        ("grpo --scale_rewards batch", [a / ((10 / 3) ** 0.5 + 1e-4) for a in (-1, -2, 1, 2)]),
        ("reinforce_plus_plus_baseline", [-1.0, -2.0, 1.0, 2.0]),
        ("reinforce_plus_plus --gamma 0.5", [[0.5 * 1, 1], [0], [0.5 * 3, 3], [0.5 * 4, 4]]),
    ],
)
def test_advantages_without_a_critic_are_scaled_as_the_flags_say(built, flags: str, expected: list):
    """By hand, from scores at the last tokens; those of REINFORCE++ are whitened over all tokens."""
    trainer = built(f"--advantage_estimator {flags}")
    rewards = torch.zeros(4, 2)
    for row, score in enumerate(SCORES):
        rewards[row, int(PAIRS[row].sum()) - 1] = score
    advantages, returns = trainer.advantages(rewards, None, PAIRS, GROUPS)
    tokens = [of if isinstance(of, list) else [of] * int(n) for of, n in zip(expected, PAIRS.sum(1), strict=True)]
    tokens = [value for of_answer in tokens for value in of_answer]
    if "plus" in flags:
        tokens = whitened(tokens)
    assert advantages[PAIRS].tolist() == pytest.approx(tokens, abs=1e-5) and returns is None
    assert advantages[1, 1] == 0


# -- 6. optimise


def test_both_clips_are_those_of_the_flags(built):
    trainer = built("--cliprange 0.1 --cliprange_value 0.3")
    r = rolled_out(trainer, trainer.train_dataset.to_list())[0]
    shape = r.mask.shape
    old = {"logps": torch.zeros(shape), "values": torch.zeros(shape)}
    given = {f.name: getattr(r, f.name) for f in fields(Advantages)} | old
    rollouts = Advantages(**given | {"advantages": torch.ones(shape), "returns": torch.full(shape, 2.0)})
    logps, values = torch.full(shape, math.log(1.5)), torch.full(shape, 1.0)
    policy, value, _ = trainer.policy_and_value_loss(logps, values, rollouts)
    assert policy.flatten().tolist() == pytest.approx([-1.1] * policy.numel())  # the ratio 1.5 counts as 1.1
    assert value.flatten().tolist() == pytest.approx([0.5 * (0.3 - 2) ** 2] * value.numel())  # the value 1 as 0.3
    _, value, _ = trainer.policy_and_value_loss(logps, torch.full(shape, 0.2), rollouts)
    assert value.flatten().tolist() == pytest.approx([0.5 * (0.2 - 2) ** 2] * value.numel())  # near the old one


def test_the_value_loss_is_weighted_by_vf_coef(built):
    """With plain SGD the head's step is proportional to the weight, and the logged loss is policy + weight * value."""
    steps = {}
    for weight in (0.1, 0.7):
        flags = (
            f"--vf_coef {weight} --optim sgd --max_grad_norm 0 --num_ppo_epochs 1 --num_mini_batches 1 --loss_type grpo"
        )
        trainer = built(f"{flags} --gradient_accumulation_steps 2")
        before = trainer.model.head.weight.detach().clone()
        trainer.train()
        steps[weight] = trainer.model.head.weight.detach() - before
        entry = next(e for e in trainer.state.log_history if "loss" in e)
        assert entry["loss"] == pytest.approx(entry["loss/policy_avg"] + weight * entry["loss/value_avg"], abs=1e-5)
        assert entry["loss/value_avg"] > 1e-4
        assert all(p.grad is None for p in trainer.model.parameters())  # nothing is added to the next mini batch
    assert steps[0.1].abs().max() > 1e-6
    torch.testing.assert_close(steps[0.7], 7 * steps[0.1], rtol=1e-3, atol=1e-7)


NOW = LOGPS  # of the policy; REF_LOGPS stand for the sampler's
FROZEN = torch.tensor([[-1.2, -2.5, -3.0], [-2.0, -1.0, 0.0]])  # the reference's
CUT_OFF = torch.tensor([[True, True, True], [False, False, False]])  # loss mask: the second answer did not end
ENTROPY = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])


def test_an_answer_that_did_not_end_teaches_the_value_alone(built):
    """Policy: a mean over the answers that count, by the token means of those that ended. Value: a mean over all tokens."""
    trainer = built("--loss_type grpo --mask_truncated_completions True --vf_coef 0.5 --cliprange_value 9")
    returns, values = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 7.0]])
    r = SimpleNamespace(
        logps=LOGPS, values=values, returns=returns, advantages=torch.tensor([[1.0, 2.0, 6.0], [8.0, 8.0, 0.0]]),
        mask=MASK, loss_mask=CUT_OFF, counted=torch.tensor([True, True]), sampler_logps=None,
    )  # fmt: skip
    counts = trainer._mini_batch_counts([r, SimpleNamespace(**vars(r) | {"counted": torch.tensor([True, False])})])
    assert counts.tolist() == [3, 10]  # answers, tokens
    losses = []
    trainer.policy_pass, trainer.backward = lambda model, r: (LOGPS, values, ENTROPY), losses.append
    sums = trainer._micro_step(trainer.model, r, counts, first=False)
    policy, value = -(1 + 2 + 6) / 3, 0.5 * (1 + 0 + 1 + 4 + 1)  # the ratio is 1
    assert losses[0].item() == pytest.approx(policy / 3 + 0.5 * value / 10)
    assert sums["loss/policy_avg"].tolist() == pytest.approx([policy, 2])
    assert sums["loss/value_avg"].tolist() == pytest.approx([value, 5])


@pytest.mark.parametrize(
    "flags, high, delta, level, kl, corrected",
    [
        ("", 1.2, None, "token", 0, False),
        ("--cliprange_high 0.5", 1.5, None, "token", 0, False),
        ("--delta 1.6", 1.2, 1.6, "token", 0, False),
        ("--importance_sampling_level sequence", 1.2, None, "sequence", 0, False),
        ("--kl_in_loss 0.5 --use_bias_correction_kl False", 1.2, None, "token", 0.5, False),
        ("--kl_in_loss 0.5", 1.2, None, "token", 0.5, True),
        ("--kl_in_loss 0.5 --importance_sampling_level sequence", 1.2, None, "sequence", 0.5, True),
    ],
)
def test_the_loss_of_answers_is_that_of_the_flags(built, flags: str, high, delta, level: str, kl: float, corrected):
    trainer = built(f"--advantage_estimator grpo --cliprange 0.2 --num_ppo_epochs 2 {flags}")
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    r = SimpleNamespace(logps=REF_LOGPS, ref_logps=FROZEN, mask=MASK, advantages=advantages, sampler_logps=None)
    found, value_loss, _ = trainer.policy_and_value_loss(NOW, None, r)
    assert value_loss is None
    for row, column in MASK.nonzero().tolist():
        log_ratio = float(NOW[row, column] - REF_LOGPS[row, column])
        if level == "sequence":
            log_ratio = float((NOW - REF_LOGPS)[row][MASK[row]].mean())
        ratio, advantage = math.exp(log_ratio), float(advantages[row, column])
        bounded = min(ratio, delta) if delta else ratio
        expected = max(-advantage * bounded, -advantage * min(max(ratio, 0.8), high))
        away = float(FROZEN[row, column] - NOW[row, column])
        expected += kl * (math.exp(away) - 1 - away) * (ratio if corrected else 1)
        assert float(found[row, column]) == pytest.approx(expected, abs=1e-5), (row, column)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_the_loss_type_is_that_of_the_flags(built, loss_type: str):
    """Before the first step every ratio is 1, and a token's loss its negative advantage."""
    flags = "--num_ppo_epochs 1 --num_mini_batches 1 --gradient_accumulation_steps 2 --response_length 40"
    trainer = built(f"--advantage_estimator rloo --loss_type {loss_type} --kl_coef 0 {flags}")
    kept, optimise = [], trainer.optimise
    trainer.optimise = lambda rollouts: kept.extend(rollouts) or optimise(rollouts)
    core = trainer.base_model(trainer.model)
    trainer.sampler.end_ids.extend(range(3, core.config.text_config.vocab_size, 9))  # answers of different lengths
    trainer.train()
    lengths = torch.cat([r.mask.sum(1) for r in kept])
    assert len(kept) == 2 and lengths.unique().numel() > 1 and lengths.max() < 40
    assert all(r.ended.all() for r in kept)  # whichever of the end tokens it was
    prompts = [len(tokens) for r in kept for tokens in trainer.data_collator(r.rows)["prompts"]]
    assert trainer.tokens_seen == sum(prompts) + int(lengths.sum())  # a prompt that its answers share is read once
    losses = [[-r.advantages[i][m] for i, m in enumerate(r.mask)] for r in kept]  # micro batch, answer, token
    answers = [of_answer for of_batch in losses for of_answer in of_batch]
    expected = {
        "dapo": torch.cat(answers).mean(),
        "grpo": torch.stack([a.mean() for a in answers]).mean(),
        "dr_grpo": torch.cat(answers).sum() / (40 * len(answers)),
        "bnpo": torch.stack([torch.cat(of_batch).mean() for of_batch in losses]).mean(),
    }
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert len({round(float(v), 4) for v in expected.values()}) == 4
    assert entry["loss"] == entry["loss/policy_avg"] == pytest.approx(float(expected[loss_type]), abs=1e-5)


def test_a_seed_is_the_same_in_every_process():
    """Worked out by b2sum: -l 64 of "(1, 'rollout', 2.5)", halved."""
    assert stable_seed(1, "rollout", 2.5) == 4291181375783533740


def test_metrics_not_yet_logged_outlive_a_checkpoint(command, reward_file, tmp_path):  # noqa: F811
    """The entry of a log is the mean of both updates, also when the run was stopped between them."""
    flags = f"{LORA} --max_steps 2 --save_strategy steps --save_steps 1 --logging_steps"
    entries = {}
    for name, every in (("each", 1), ("both", 2), ("resumed", 2)):
        argv = ppo_command(command, reward_file, tmp_path / name, f"{flags} {every}")
        if name == "resumed":
            (tmp_path / name).mkdir()
            shutil.copytree(tmp_path / "both" / "checkpoint-1", tmp_path / name / "checkpoint-1")
            argv += ["--resume_from_checkpoint", "True"]
        train_ppo.main(argv)
        entries[name] = history(tmp_path / name)
    first, second = entries["each"]
    for key in ("objective/scores", "objective/kl", "loss/value_avg", "val/response_length"):
        mean = (first[key] + second[key]) / 2
        assert entries["both"][0][key] == pytest.approx(mean, rel=1e-4, abs=1e-6), key
        assert entries["resumed"][0][key] == pytest.approx(mean, rel=1e-4, abs=1e-6), key
    assert first["objective/scores"] != second["objective/scores"]


def test_mini_batches_are_drawn_anew_in_every_update_and_epoch():
    sizes = BatchSizes(1, 8, 2, 8, 8)
    assert len({tuple(mini_batches(sizes, 0, 5, update, 0)[0]) for update in range(20)}) > 1
    assert len({tuple(mini_batches(sizes, 0, 5, 0, epoch)[0]) for epoch in range(20)}) > 1
    assert len({tuple(mini_batches(sizes, 0, seed, 0, 0)[0]) for seed in range(20)}) > 1
    assert len({tuple(mini_batches(sizes, rank, 5, 0, 0)[0]) for rank in range(20)}) > 1


# -- seeds


def test_every_update_samples_with_random_numbers_of_its_own(built, image_dir):
    """Equal prompts, a policy that stands still: were the random numbers those of the first update, so were the answers."""
    rows = prompt_rows(image_dir, 1) * 4
    trainer = built("--max_steps 3 --learning_rate 0 --gradient_accumulation_steps 2 --num_mini_batches 1", rows=rows)
    answers, score = [], trainer.score
    trainer.score = lambda sampled: answers.append(sorted(t for r in sampled for t in r.texts)) or score(sampled)
    trainer.train()
    assert len(answers) == 3 and len({tuple(a) for a in answers}) == 3
    assert [e["epoch"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3]  # an update takes all rows


@pytest.mark.parametrize("flags, equal", [("", False), ("--temperature 1e-3", True), ("--top_p 1e-6", True)])
def test_sampling_is_that_of_the_flags(built, flags: str, equal: bool):
    """Next to no temperature, or the smallest nucleus, leaves the likeliest token: all answers to a prompt are one."""
    trainer = built(flags)
    (r,) = trainer.rollout([trainer.data_collator(trainer.train_dataset.to_list()[:2])], 7, [[0, 1]])
    assert all((first == second) == equal for first, second in r.by_prompt(r.batch["completion_ids"].tolist()))


def test_evaluation_repeats_itself_and_reports_means(built, tmp_path, image_dir, reward_file):  # noqa: F811
    rows = prompt_rows(image_dir, 5)
    argv = (
        f"--model_name_or_path {zoo.checkpoint('llava')} --dataset_name x --output_dir {tmp_path} {LORA} --max_steps 1 "
        f"--per_device_train_batch_size 4 --rollouts_per_prompt 2 --response_length 6 --reward_fn {reward_file}:place "
        "--disable_tqdm True --save_strategy no"
    )
    parsed = args.parse(args.ModelArguments, args.DataArguments, args.LoraArguments, args.PPOConfig, argv=argv.split())
    data = Dataset.from_list(rows)
    trainer = train_ppo.build(*parsed, data=DataSplits(data, data, {}))[0]
    seen, score = [], trainer.score
    trainer.score = lambda sampled: seen.extend(sampled) or score(sampled)
    first, second = trainer.evaluate(), trainer.evaluate()
    texts = [text for r in seen for text in r.texts]
    assert first == second and texts[:10] == texts[10:] and len(set(texts)) > 5
    lengths = [int(n) for r in seen[: len(seen) // 2] for n in r.mask.sum(1)]
    assert len(lengths) == 10  # two answers to each of five prompts
    assert first["eval_val/response_length"] == pytest.approx(sum(lengths) / 10)
    assert first["eval_objective/scores"] == pytest.approx(2.0)  # the mean of 0, 1, 2, 3, 4
    assert first["eval_objective/kl"] == pytest.approx(0, abs=1e-5)


def test_the_length_of_a_run(built):
    trainer = built("--max_steps -1 --total_episodes 36 --num_mini_batches 3")
    assert trainer.args.max_steps == 3  # of 3 mini batches of 4 answers
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(updates=3))
    epochs, _, prompts, rollouts, per_update, _, updates = trainer.set_initial_training_values(
        SimpleNamespace(max_steps=-1, num_train_epochs=1.5), loader
    )
    assert (epochs, prompts, rollouts, per_update, updates) == (2, 4, 60, 12, 5)  # half an update is a whole one


# -- 2. score


@pytest.mark.parametrize("weight, expected", [(-1.0, [0.0, -1.0, -1.5, -1.5]), (1.0, [0.0, 1.0, 1.5, 1.5])])
def test_scores_are_clipped_on_both_sides(built, weight: float, expected: list[float]):
    trainer = built(f"--reward_weights {weight} --reward_clip 1.5", reward="place")
    rollouts = rolled_out(trainer, trainer.train_dataset.to_list())
    scores = {r.rows[p]["where"]: s for r in rollouts for p, s in zip(r.prompt_of, r.scores.tolist(), strict=True)}
    assert [scores[f"row {i}"] for i in range(4)] == pytest.approx(expected)


def test_a_score_is_its_parts_less_penalties_clipped_at_last(built):
    """By hand, of answers with 3 and 2 of 4 tokens, the second without an end."""
    flags = "--missing_eos_penalty 0.7 --response_length 4 --overlong_buffer 2 --overlong_penalty 3 --reward_clip 1.5"
    trainer = built(f"{flags} --reward_weights 2")
    r = SimpleNamespace(mask=MASK, ended=torch.tensor([True, False]), texts=["a", "b"])
    scores = trainer._total(r, {"length": torch.tensor([0.5, 1.5])})
    assert scores.tolist() == pytest.approx([2 * 0.5 - 3 * (3 - 2) / 2, 1.5])  # 2 * 1.5 - 0.7, cut to 1.5
    scores = trainer._total(r, {"length": torch.tensor([0.5, 0.1])})
    assert scores.tolist() == pytest.approx([-0.5, 2 * 0.1 - 0.7])


def test_answers_that_were_kept_are_those_of_the_same_sampling(built, monkeypatch):
    trainer = built("")
    batch, args = trainer.data_collator(trainer.train_dataset.to_list()[:2]), trainer.args
    calls, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *given: calls.append(1) or sample(*given))

    def sampled_anew() -> bool:
        calls.clear()
        trainer.unscored = UnscoredAnswers(args.output_dir, 0)  # as a run that resumes makes it
        trainer.rollout([batch], 7, [[0, 1]])
        return bool(calls)

    assert sampled_anew()
    trainer.unscored.write()
    assert not sampled_anew()
    for name, other in (("temperature", 0.9), ("top_p", 0.8), ("response_length", 5)):
        before = getattr(args, name)
        setattr(args, name, other)
        assert sampled_anew(), name
        setattr(args, name, before)


def test_an_answer_ends_with_the_templates_token_and_with_the_checkpoints(llava):
    processor = core_mapper_for(llava).processor(llava)
    core = core_mapper_for(llava).model.from_pretrained(llava)
    end = processor.tokenizer.eos_token_id
    assert processor.encode_response("yes")[-1] == end
    for of_checkpoint, expected in (
        (end + 5, {end, end + 5}),
        ([end + 5, end + 6], {end, end + 5, end + 6}),
        (None, {end}),
    ):
        core.generation_config.eos_token_id = of_checkpoint
        assert set(end_token_ids(processor, core)) == expected


# -- 7. metrics


def test_the_controller_reads_the_kl_of_whole_answers(built):
    trainer = built("--kl_coef 0.2 --target_kl 1 --kl_horizon 100")
    vocabulary = trainer.base_model(trainer.model).config.text_config.vocab_size
    trainer.sampler.end_ids.extend(range(3, vocabulary, 9))  # answers of different lengths
    rollouts = rolled_out(trainer, trainer.train_dataset.to_list())
    rollouts = [
        Advantages(**vars(r) | {"ref_logps": r.logps - 0.3, "entropy": torch.where(r.mask, 2.0, 9.0)}) for r in rollouts
    ]
    lengths = [int(n) for r in rollouts for n in r.mask.sum(1)]
    assert min(lengths) < max(lengths)
    assert len(lengths) == 8
    mean = 0.3 * sum(lengths) / 8
    trainer.ppo_state.kl_coef = 0.4  # where it has moved it before
    trainer.args.target_kl = mean / 1.1  # a tenth too high: within the 20 % that count
    trainer.add_loss = lambda loss: None  # training has not started
    zero = torch.tensor([0.0, 1.0])
    trainer.log_metrics(rollouts, {"loss/policy_avg": zero, "loss/value_avg": zero})
    assert trainer.ppo_state.kl_coef == pytest.approx(0.4 * (1 + 0.1 * 8 / 100), rel=1e-5)
    assert trainer.ppo_state.first == {"entropy": pytest.approx(2.0), "length": pytest.approx(sum(lengths) / 8)}


def test_metrics_of_answers_by_hand():
    """Two answers of 3 and 2 tokens. The second has no score, and no part in what is a mean over scores."""
    r = SimpleNamespace(
        logps=LOGPS, ref_logps=REF_LOGPS, sampler_logps=FROZEN, mask=MASK, scores=torch.tensor([0.5, math.nan]),
        ended=torch.tensor([True, False]), groups=torch.tensor([0, 1]),
        parts={"exact_answer": torch.tensor([1.0, 0.0])},
    )  # fmt: skip
    found = rollout_metrics([r], 0.3, "k3", cap=1.5)
    away = [REF_LOGPS[i, t].item() - LOGPS[i, t].item() for i, t in MASK.nonzero().tolist()]
    k3 = [math.exp(x) - 1 - x for x in away]
    assert found["objective/entropy"].tolist() == pytest.approx([6.0, 2.5])
    assert found["objective/kl"].tolist() == pytest.approx([-sum(away[:3]), -sum(away[3:])])
    assert found["objective/non_score_reward"].tolist() == pytest.approx([-0.3 * sum(k3[:3]), -0.3 * sum(k3[3:])])
    assert found["objective/rlhf_reward"].tolist() == pytest.approx([0.5 - 0.3 * sum(k3[:3])])
    assert found["objective/scores"].tolist() == [0.5] and found["objective/kl_coef"].tolist() == pytest.approx([0.3])
    above = [0.2, 0.5, 0.0, 1.0, -0.5]  # log-probs here above those of the server
    differences, weights = (found[f"sampling/{name}/mean"].tolist() for name in (
        "sampling_logp_difference", "importance_sampling_ratio"
    ))  # fmt: skip
    assert differences == pytest.approx([abs(x) for x in above])
    assert weights == pytest.approx([min(math.exp(x), 1.5) for x in above])
    rewards = [FunctionReward("exact_answer", 1.0, built_in("exact_answer"))]
    assert reward_metrics([r], rewards)["right/exact_answer"].tolist() == [1, 0]  # 1 is right


def test_metrics_of_groups_by_hand():
    """Three prompts, whose answers do not stand together: what differs within one, be it little, not between them."""
    r = SimpleNamespace(scores=torch.tensor([1.0, 0.0, 3.0, 0.0, 0.5, 0.502]), groups=torch.tensor([5, 2, 5, 2, 7, 7]))
    found = group_metrics([r])
    assert found["reward_std"].tolist() == pytest.approx([2**0.5, 0, 2**0.5, 0, *[0.002 / 2**0.5] * 2], rel=1e-3)
    assert found["frac_reward_zero_std"].tolist() == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("server", [None, FROZEN])
def test_metrics_of_tokens_by_hand(server: Tensor | None):
    """(sum, number): of the answer that ended; of the value, which learns from all, of both."""
    r = SimpleNamespace(logps=REF_LOGPS, sampler_logps=server, mask=MASK, loss_mask=CUT_OFF)
    statistics = {
        "policy_clipped": torch.tensor([[True, False, True], [True, True, True]]),
        "value_clipped": torch.tensor([[True, False, False], [True, True, True]]),
        "kl": torch.tensor([[0.1, 0.2, 0.3], [9.0, 9.0, 9.0]]),
    }
    found = {name: sums.tolist() for name, sums in token_metrics(r, LOGPS, ENTROPY, statistics, first=True).items()}
    above = [0.5, 0.0, -1.0]  # now, above the log-probs at sampling time
    ratios = [math.exp(x) for x in above]
    since = above if server is None else [0.2, 0.5, 0.0]  # above those of who sampled
    expected = {
        "policy/approxkl_avg": sum(x * x / 2 for x in above),
        "policy/clipfrac_avg": 2,
        "policy/entropy_avg": 6,
        "val/ratio": sum(ratios),
        "val/ratio_var": sum((ratio - 1) ** 2 for ratio in ratios),
        "loss/kl_avg": 0.6,
        "first/approxkl": sum(x * x / 2 for x in since),
        "first/ratio_deviation": sum(abs(math.exp(x) - 1) for x in since),
    }
    assert found.pop("val/clipfrac_avg") == [3, 5]
    assert found == {name: pytest.approx([value, 3]) for name, value in expected.items()}


def test_rlhf_reward_is_the_score_minus_the_penalty(built):
    trainer = built("")
    move_adapters(trainer.model)
    rollouts = rolled_out(trainer, trainer.train_dataset.to_list())
    metrics = rollout_metrics(rollouts, 0.3, "k1")
    kl = torch.cat([((r.logps - r.ref_logps) * r.mask).sum(1) for r in rollouts])
    scores = torch.cat([r.scores for r in rollouts])
    assert kl.abs().max() > 1e-2
    torch.testing.assert_close(metrics["objective/kl"], kl)
    torch.testing.assert_close(metrics["objective/non_score_reward"], -0.3 * kl)
    torch.testing.assert_close(metrics["objective/rlhf_reward"], scores - 0.3 * kl)
    assert metrics["val/response_length"].tolist() == [int(n) for r in rollouts for n in r.mask.sum(1)]


# -- roles


def adapter_folder(kind: type | None, targets: str, folder: Path, base: str) -> str:
    """A LoRA adapter with random weights on a checkpoint: of a policy, or of a reward model."""
    model_args, _, lora_args, training_args = args.parse(
        args.ModelArguments, args.DataArguments, args.LoraArguments, args.RMConfig,
        argv=[*f"--model_name_or_path {base} --dataset_name x --output_dir {folder} {LORA}".split(), *targets.split()],
    )  # fmt: skip
    model = load_policy(LoadPlan.of(model_args, lora_args, training_args), lora_args, training_args)
    model = kind(model) if kind else model
    move_adapters(model)
    model.save_pretrained(folder)
    core_mapper_for(base).processor(base).save_pretrained(folder)
    return str(folder)


def test_the_reference_of_a_continued_adapter_is_that_adapter(built, llava, tmp_path):
    folder = adapter_folder(None, "", tmp_path / "sft", llava)
    trainer = built("--num_ppo_epochs 1", checkpoint=folder)
    rollouts = rolled_out(trainer, trainer.train_dataset.to_list())
    for r in rollouts:
        assert (r.logps - r.ref_logps).abs().max() < 1e-5
        with torch.no_grad(), adapter_active(trainer.model.backbone, None):
            base = trainer.model.backbone(**trainer._inputs(r, Role.POLICY), **trainer._tokens(r)).logps
        assert (base - r.ref_logps[r.mask]).abs().max() > 1e-2  # the bare base is another model
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora_" in name}
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "objective/kl" in e)
    assert entry["objective/kl"] == pytest.approx(0, abs=1e-5)
    moved = {
        name: not torch.equal(weight, before[name])
        for name, weight in trainer.model.named_parameters()
        if name in before
    }
    for role, moves in ((Role.POLICY, True), (Role.REFERENCE, False)):
        of_role = [m for name, m in moved.items() if f".{role.adapter}." in name]
        assert of_role and set(of_role) == {moves}, role


def alone(trainer, r: Sampled, i: int) -> tuple[dict, int, list[int]]:
    """The plain inputs of answer i with pixels, where it starts, and its tokens."""
    answer = r.batch["completion_ids"][i, : int(r.mask[i].sum())].tolist()
    batch, start = to_alone(trainer, r)(i, answer)
    return batch, start, answer


def test_a_reward_adapter_in_the_tower_sees_images_with_its_weights(built, llava, tmp_path):
    targets = r"--lora_target_modules .*(vision_tower|language_model).*(q_proj|v_proj)"
    folder = adapter_folder(VLRewardModel, targets, tmp_path / "rm", llava)
    trainer = built(f"--reward_adapter {folder}", reward="")
    backbone = trainer.model.backbone
    head: Tensor = trainer.model.reward_heads["reward_0"].weight
    for r in rolled_out(trainer, trainer.train_dataset.to_list()):
        for i, score in enumerate(r.scores.tolist()):
            batch, start, answer = alone(trainer, r, i)
            last = torch.tensor([start + len(answer) - 1])
            with torch.no_grad(), adapter_active(backbone, "reward_0"):
                assert score == pytest.approx(
                    (backbone(**batch, completion_index=last).hidden @ head.T).item(), abs=2e-4
                )
                # ... and with the images as the policy sees them the score would be another one
                with adapter_active(backbone, None):
                    features = trainer.base_model(trainer.model).encode_images(batch)
                blind = backbone(**features, completion_index=last).hidden @ head.T
                assert abs(score - blind.item()) > 1e-3


def test_a_value_model_with_another_tower_sees_images_with_it(built, llava, tmp_path):
    other = zoo.checkpoint("llava", seed=1)
    torch.manual_seed(0)
    reward_model = VLRewardModel(core_mapper_for(other).model.from_pretrained(other, dtype=torch.float32))
    reward_model.save_pretrained(tmp_path / "rm")
    core_mapper_for(other).processor(other).save_pretrained(tmp_path / "rm")
    flags = f"--use_lora False --reward_model_name_or_path {tmp_path}/rm --init_value_from_reward True"
    trainer = built(flags, reward="", checkpoint=llava)
    model = trainer.model
    for r in rolled_out(trainer, trainer.train_dataset.to_list()):
        for i in range(len(r.texts)):
            batch, start, answer = alone(trainer, r, i)
            index = torch.arange(start - 1, start + len(answer) - 1)
            with torch.no_grad():
                value = model.value_backbone(**batch, completion_index=index).hidden @ model.head.weight.T
            assert r.values[i, : len(answer)].tolist() == pytest.approx(value[:, 0].tolist(), abs=2e-4)
