"""losses/policy_gradient.py against the numbers and gradients of TRL's, verl's and OpenRLHF's own functions (tests/goldens/rl)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close as close

import losses

GOLDENS = Path(__file__).parent / "goldens" / "rl"
ARRAYS = {name: torch.tensor(value) for name, value in np.load(GOLDENS / "tensors.npz").items()}
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
GROUPS, MASK, SCORES = ARRAYS["groups"], ARRAYS["mask"], ARRAYS["scores"]
T = MASK.shape[1]


def assert_close(found: Tensor, expected: Tensor | float) -> None:
    close(found, torch.as_tensor(expected, dtype=found.dtype), atol=1e-7, rtol=0)


def with_missing() -> Tensor:
    """Scores where functions returned None: the weighted sum of those that did not, NaN where none did."""
    parts = ARRAYS["rewards_with_nan"]
    total = (parts * ARRAYS["weights"]).nansum(1)
    return torch.where(parts.isnan().all(1), float("nan"), total)


# ---------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_is_trl(scale: str) -> None:
    assert_close(losses.grpo_advantages(SCORES, GROUPS, scale), ARRAYS[f"trl_grpo.adv.{scale}"])
    assert_close(losses.grpo_advantages(with_missing(), GROUPS, scale), ARRAYS[f"trl_grpo.adv_nan.{scale}"])
    assert losses.uniform_groups(SCORES, GROUPS).tolist() == ARRAYS["trl_grpo.std_zero"].tolist()


def test_groups_may_come_in_any_order() -> None:
    order = ARRAYS["perm"]
    found = losses.grpo_advantages(SCORES[order], GROUPS[order] * 7 + 3)
    assert_close(found, ARRAYS["trl_grpo.adv.group"][order])
    assert_close(losses.rloo_advantages(SCORES[order], GROUPS[order]), ARRAYS["trl_rloo.adv.plain"][order])


def test_rloo_is_trl_and_verl() -> None:
    assert_close(losses.rloo_advantages(SCORES, GROUPS), ARRAYS["trl_rloo.adv.plain"])
    assert_close(losses.rloo_advantages(with_missing(), GROUPS), ARRAYS["trl_rloo.adv_nan"])
    assert_close(losses.over_tokens(losses.rloo_advantages(SCORES, GROUPS), MASK), ARRAYS["verl.adv.rloo"] * MASK)
    kl = losses.kl_per_token(ARRAYS["old_logps"], ARRAYS["ref_logps"])
    penalised = losses.token_rewards(SCORES, kl, MASK, 0.05).sum(1)
    assert_close(losses.rloo_advantages(penalised, GROUPS), ARRAYS["trl_rloo.adv.kl"])


def test_verl_grpo_differs_by_its_epsilon_alone() -> None:
    by_hand = losses.grpo_advantages(SCORES, GROUPS, "none") / (losses.group_std(SCORES, GROUPS) + 1e-6)
    assert_close(losses.over_tokens(by_hand, MASK), ARRAYS["verl.adv.grpo"])
    found = losses.over_tokens(losses.grpo_advantages(SCORES, GROUPS, "none"), MASK)
    assert_close(found, ARRAYS["verl.adv.grpo_no_std"])


@pytest.mark.parametrize("gamma, name", [(1.0, "rfpp"), (0.97, "rfpp_gamma97")])
def test_reinforce_plus_plus_is_verl(gamma: float, name: str) -> None:
    kl = losses.kl_per_token(ARRAYS["old_logps"], ARRAYS["ref_logps"])
    rewards = losses.token_rewards(SCORES, kl, MASK, 0.05)
    assert_close(rewards, ARRAYS["verl.token_rewards_kl"])
    returns = losses.discounted_returns(rewards, MASK, gamma)
    assert_close(losses.masked_whiten(returns, MASK), ARRAYS[f"verl.adv.{name}"] * MASK)
    if gamma == 1:
        assert_close(returns, ARRAYS["verl.ret.rfpp"] * MASK)


def test_reinforce_plus_plus_baseline_is_verl() -> None:
    found = losses.reinforce_plus_plus_baseline_advantages(SCORES, GROUPS, MASK)
    assert_close(found, ARRAYS["verl.adv.rfpp_baseline"])


def test_a_group_of_one_teaches_nothing() -> None:
    scores, groups = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 1])
    assert losses.grpo_advantages(scores, groups)[0] == 0 and losses.rloo_advantages(scores, groups)[0] == 0
    assert losses.rloo_advantages(scores, groups)[1:].tolist() == [-1.0, 1.0]
    assert losses.uniform_groups(scores, groups).tolist() == [True, False, False]


# ---------------------------------------------------------------------------------------------------------------- loss


def loss_and_gradient(config: dict, mask: Tensor = MASK, micro_batches: int = 1) -> tuple[Tensor, Tensor]:
    """The loss as the trainer puts it together: micro batches one after another, divided by the sum of their counts."""
    logps = ARRAYS["logps"].clone().requires_grad_()
    kind, total, count = config.get("loss_type", "dapo"), 0.0, 0
    for rows in torch.arange(len(logps)).chunk(micro_batches):
        new, old, ref, kept = (x[rows] for x in (logps, ARRAYS["old_logps"], ARRAYS["ref_logps"], mask))
        log_ratio = new - old
        if config.get("importance_sampling_level") == "sequence":
            log_ratio = losses.sequence_log_ratio(new, old, kept)
        per_token, _ = losses.clipped_policy_loss(
            new,
            old,
            ARRAYS["loss.adv"][rows, None],
            config.get("epsilon_low", 0.2),
            config.get("epsilon_high"),
            config.get("delta"),
            log_ratio,
        )
        if "beta" in config:
            kl = losses.kl_per_token(new, ref, "k3")
            corrected = config.get("use_bias_correction_kl", True)
            per_token = per_token + config["beta"] * (kl * log_ratio.exp() if corrected else kl)
        total = total + losses.loss_sum(per_token.expand_as(kept), kept, kind)
        count = count + losses.loss_count(kept, kind, T)
    (total / count).backward()
    return (total / count).detach(), logps.grad


# bnpo is a mean of micro batches; the others are the same however the answers are split.
TRL = [n for n in EXPECTED["trl_loss"] if n.split(".")[0] not in ("cispo", "sapo", "vespo", "luspo", "top_entropy", "off_policy_mask")]  # fmt: skip


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_trl(name: str) -> None:
    case = EXPECTED["trl_loss"][name]
    mask = MASK & ARRAYS["ended"][:, None] if "m" in case["config"] else MASK
    for micro_batches in (1,) if "bnpo" in name else (1, 4, 5):
        loss, gradient = loss_and_gradient(case["config"], mask, micro_batches)
        assert_close(loss, case["loss"])
        assert_close(gradient, ARRAYS[f"trl_loss.grad.{name}"])
    assert gradient.abs().max() > 1e-4


VERL = {
    "vanilla_no_dual_clip.token-mean": {},
    "vanilla_no_dual_clip.seq-mean-token-mean": {"loss_type": "grpo"},
    "clip_higher": {"epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo_paper": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4
    },
    "truncated.token-mean": {"truncated": True},
}  # fmt: skip


@pytest.mark.parametrize("name", VERL)
def test_losses_and_gradients_are_verl(name: str) -> None:
    mask = MASK & ARRAYS["ended"][:, None] if VERL[name].get("truncated") else MASK
    loss, gradient = loss_and_gradient(VERL[name], mask)
    assert_close(loss, EXPECTED["verl_loss"][name]["loss"])
    assert_close(gradient, ARRAYS[f"verl_loss.grad.{name}"])


def test_dr_grpo_of_verl_is_a_sum_over_answers() -> None:
    loss, _ = loss_and_gradient({"loss_type": "dr_grpo"})
    name = "vanilla_no_dual_clip.seq-mean-token-sum-norm"
    assert_close(len(MASK) * loss, EXPECTED["verl_loss"][name]["loss"])


@pytest.mark.parametrize("name, config", [("ppo", {}), ("ppo_seq", {"loss_type": "grpo"}), ("clip_higher", {"epsilon_high": 0.28})])  # fmt: skip
def test_losses_and_gradients_are_openrlhf(name: str, config: dict) -> None:
    loss, gradient = loss_and_gradient(config)
    assert_close(loss, EXPECTED["openrlhf_loss"][name]["loss"])
    assert_close(gradient, ARRAYS[f"openrlhf_loss.grad.{name}"])


def test_answers_that_are_left_out_leave_the_denominator_too() -> None:
    mask = MASK.clone()
    mask[4:] = False
    assert losses.loss_count(mask, "grpo", T, num_answers=4) == 4
    assert losses.loss_count(mask, "dr_grpo", T, num_answers=4) == 4 * T
    assert losses.loss_count(mask, "dapo", T) == MASK[:4].sum()


@pytest.mark.parametrize("call", ["grpo_advantages", "loss_count"])
def test_unknown_names(call: str) -> None:
    with pytest.raises(ValueError, match="known are"):
        if call == "loss_count":
            losses.loss_count(MASK, "mean", T)
        else:
            losses.grpo_advantages(SCORES, GROUPS, "std")


# ----------------------------------------------------------------------------------------------------------------- rest


def test_kl_estimators_are_verl() -> None:
    for name in ("k1", "k3"):
        found = losses.kl_per_token(ARRAYS["logps"], ARRAYS["ref_logps"], name)
        assert_close(found, ARRAYS[f"verl.kl.{name}"])


def test_overlong_penalty_is_verl() -> None:
    for case in EXPECTED["dapo_overlong"]:
        found = losses.overlong_penalty(
            torch.tensor([float(case["length"])]), case["max_length"], case["buffer"], case["factor"]
        )
        assert found.item() == pytest.approx(case["penalty"])
