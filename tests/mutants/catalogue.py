"""The faults that the suite must see. One that no longer applies is an error: follow the code, or take the fault out.

Each is a slip that somebody could make, whose result looks healthy: the loss falls, the run ends. To add one, write the
function, the code in it (once there; layout does not count) and what stands there instead, and name the quickest tests that
should fail. `python -m tests.mutants --only "words of the fault"` tries it.
"""

from tests.mutants.mutant import Mutant

MUTANTS: list[Mutant] = []


def faults(file: str, tests: str, **of: dict[str, tuple[str, ...]]) -> None:
    """Add the faults of a file: `words_in_the_names_of_its_tests={fault: (function, code, what stands there instead)}`."""
    for words, changes in of.items():
        for fault, (function, old, new) in changes.items():
            MUTANTS.append(Mutant(fault, file, function, old, new, tests, words.replace("__or__", " or ")))


# ---------------------------------------------------------------------------------------------------------------- PPO

faults(
    "base/ppo_trainer.py",
    "tests/test_paths_ppo.py",
    penalty_grows={
        "KL penalty of the wrong sign": (
            "VLPPOTrainer.token_rewards",
            "losses.kl_per_token(logps, ref_logps, self.args.kl_estimator)",
            "losses.kl_per_token(ref_logps, logps, self.args.kl_estimator)",
        ),
        "KL penalty with another coefficient than that of the flags": (
            "VLPPOTrainer.token_rewards",
            "losses.token_rewards(scores, kl, mask, self.ppo_state.kl_coef)",
            "losses.token_rewards(scores, kl, mask, 0.05)",
        ),
    },
    whitened={
        "whiten_rewards ignored": ("VLPPOTrainer.token_rewards", "self.args.whiten_rewards", "False"),
        "whitened rewards lose their mean": (
            "VLPPOTrainer.token_rewards",
            "self._whiten(rewards, mask, shift_mean=False)",
            "self._whiten(rewards, mask)",
        ),
        "advantages not whitened": ("VLPPOTrainer.advantages", "self._whiten(advantages, mask)", "advantages"),
        "advantages not centred": (
            "VLPPOTrainer.advantages",
            "self._whiten(advantages, mask)",
            "self._whiten(advantages, mask, shift_mean=False)",
        ),
        "gamma ignored": ("VLPPOTrainer.advantages", "self.args.gamma", "1.0"),
        "lam ignored": ("VLPPOTrainer.advantages", "self.args.lam", "0.95"),
        "returns whitened": (
            "VLPPOTrainer.advantages",
            "(self._whiten(advantages, mask), returns)",
            "(self._whiten(advantages, mask), self._whiten(returns, mask))",
        ),
    },
    both_clips={
        "cliprange ignored": ("VLPPOTrainer.policy_and_value_loss", "args.cliprange", "0.2"),
        "cliprange_value ignored": ("VLPPOTrainer.policy_and_value_loss", "args.cliprange_value", "0.2"),
        "value loss clipped around the returns": (
            "VLPPOTrainer.policy_and_value_loss",
            "losses.clipped_value_loss(values, r.values, r.returns, args.cliprange_value)",
            "losses.clipped_value_loss(values, r.returns, r.values, args.cliprange_value)",
        ),
    },
    vf_coef={
        "vf_coef ignored in the gradient": ("VLPPOTrainer._micro_step", "self.args.vf_coef", "0.1"),
        "vf_coef ignored in the logged loss": ("VLPPOTrainer.log_metrics", "args.vf_coef", "0.1"),
    },
    controller={
        "controller fed with the KL per token": (
            "VLPPOTrainer.log_metrics",
            'self._mean_everywhere(metrics["objective/kl"])',
            'self._mean_everywhere(metrics["objective/kl"] / metrics["val/response_length"])',
        ),
    },
    clipped_on_both_sides={
        "reward clip without a lower bound": (
            "VLPPOTrainer._total",
            "total.clamp(-clip, clip)",
            "total.clamp(max=clip)",
        ),
        "reward clip without an upper bound": ("VLPPOTrainer._total", "total.clamp(-clip, clip)", "total.clamp(-clip)"),
        "weights of rewards ignored": (
            "VLPPOTrainer._total",
            "reward.weight * parts[reward.name]",
            "parts[reward.name]",
        ),
    },
    tower={
        "vision weights of a role ignored": (
            "VLPPOTrainer.__init__",
            "self._on_any_process(model.has_own_vision(role))",
            "False",
        ),
        "value model's images encoded by the policy": (
            "VLPPOTrainer._encode",
            "self._encode_with(model.value_backbone, img_inputs)",
            "self._encode_with(model, img_inputs)",
        ),
        "reward adapter's images encoded by the policy": (
            "VLPPOTrainer._encode",
            "adapter_active(model.backbone, role.adapter)",
            "adapter_active(model.backbone, Role.POLICY.adapter)",
        ),
        "value function reads the policy's images": (
            "VLPPOTrainer.policy_pass",
            "self._inputs(r, Role.VALUE) if Role.VALUE in r.images else None",
            "None",
        ),
    },
    evaluation_repeats={
        "evaluation draws anew every time": (
            "VLPPOTrainer.evaluate",
            'stable_seed(self.args.seed, "eval")',
            'stable_seed(self.args.seed, "eval", torch.rand(1).item())',
        ),
        "evaluation's length is a sum": ("VLPPOTrainer.evaluate", "length / count", "length"),
        "evaluation leaves out the prompts of a short last batch": (
            "VLPPOTrainer.evaluate",
            "n < math.ceil(len(data) / size)",
            "n < len(data) // size",
        ),
        "evaluation gives every micro batch the same places": (
            "VLPPOTrainer.evaluate",
            "[*range(starts[n], min(starts[n] + size, len(data)))]",
            "[*range(0, min(size, len(data)))]",
        ),
    },
)
faults(
    "base/update_loop.py",
    "tests/test_paths_ppo.py",
    random_numbers={
        "every update samples with the same random numbers": (
            "UpdateLoop._run_epoch",
            'stable_seed(args.seed, "rollout", self.state.global_step)',
            'stable_seed(args.seed, "rollout")',
        ),
    },
)
faults(
    "base/ppo_batches.py",
    "tests/test_paths_ppo.py",
    mini_batches={
        "mini batches equal in every update": (
            "mini_batches",
            'stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block)',
            'stable_seed(seed, "mini", ppo_epoch, rank * blocks + block)',
        ),
        "mini batches do not depend on the seed": (
            "mini_batches",
            'stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block)',
            'stable_seed("mini", update, ppo_epoch, rank * blocks + block)',
        ),
    },
)
faults(
    "base/ppo_metrics.py",
    "tests/test_paths_ppo.py",
    rlhf_reward={
        "rlhf_reward adds the penalty": ("rollout_metrics", "scores - kl_coef * penalty", "scores + kl_coef * penalty"),
        "non_score_reward of the wrong sign": ("rollout_metrics", "-kl_coef * penalty", "kl_coef * penalty"),
        "KL of an answer is a mean": (
            "sequence_kl",
            "torch.where(r.mask, r.logps - r.ref_logps, 0).sum(1)",
            "torch.where(r.mask, r.logps - r.ref_logps, 0).mean(1)",
        ),
    },
)
faults(
    "base/sampling.py",
    "tests/test_paths_ppo.py",
    answer_ends={
        "the template's end of turn is no end": (
            "end_token_ids",
            "sorted({of_template, *of_checkpoint})",
            "sorted({*of_checkpoint})",
        ),
        "the checkpoint's end tokens are no ends": (
            "end_token_ids",
            "sorted({of_template, *of_checkpoint})",
            "[of_template]",
        ),
    },
)
faults(
    "models/assemble.py",
    "tests/test_paths_ppo.py",
    continued={"the reference of a continued adapter is the bare base": ("load_reference", "plan.is_adapter", "False")},
)
