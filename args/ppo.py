"""Flags of train_ppo.py alone."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from args.rollouts import RolloutFlags
from args.training import REFUSED, REFUSED_IN_COMPARISONS, VLConfig
from common.errors import InputError

REFUSED_IN_PPO: dict[str, str] = {
    "fsdp": "is not supported in PPO, whose rollouts would gather all weights for every token: --deepspeed ds_configs/zero3.json gathers them once",
    "fsdp_config": "is not supported in PPO: --deepspeed ds_configs/zero3.json shares the weights out",
    "per_device_eval_batch_size": "does nothing in PPO: evaluation samples --per_device_train_batch_size answers at a time",
    "dataloader_drop_last": "does nothing in PPO: an update always takes whole micro batches",
    "train_sampling_strategy": "does nothing in PPO: prompts are shuffled with --seed",
    "data_seed": "does nothing in PPO: prompts are shuffled with --seed",
    "ignore_data_skip": "does nothing in PPO: a resumed run goes on with the next prompts",
    "torch_empty_cache_steps": "does nothing in PPO",
    "auto_find_batch_size": "cannot work in PPO: an update has a fixed number of rollouts",
    "include_num_input_tokens_seen": "does nothing in PPO: episode counts rollouts",
}


# Flags of PPOConfig whose default depends on --advantage_estimator: (gae, the others). None: the flag has no part in it and is refused.
BY_ESTIMATOR: dict[str, tuple[Any, Any]] = {
    "num_ppo_epochs": (4, 1),
    "rollouts_per_prompt": (1, 8),
    "kl_coef": (0.05, 0.0),
    "temperature": (0.7, 1.0),
    "cliprange_value": (0.2, None),
    "vf_coef": (0.1, None),
    "lam": (0.95, None),
    "whiten_rewards": (False, None),
    "value_adapter": ("separate", None),
    "init_value_from_reward": (False, None),
}


@dataclass
class PPOConfig(RolloutFlags, VLConfig):
    """Policy optimisation against rewards (base/ppo_trainer.py), with a value function or without. Batch sizes are counted in rollouts."""

    title: ClassVar[str] = "PPO and other policy gradients"
    default_metric: ClassVar[str] = "eval_objective/scores"  # evaluation has no loss
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = field(
        default="gae",
        metadata={
            "help": "gae is PPO with a value function. The others need none (docs/rl.md): rloo and grpo compare an answer with its prompt's others, "
            "reinforce_plus_plus with the whole batch, reinforce_plus_plus_baseline with both."
        },
    )

    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_COMPARISONS | REFUSED_IN_PPO
    learning_rate: float = field(
        default=3e-6, metadata={"help": "Peak learning rate; with LoRA 10 times this is usual."}
    )
    num_ppo_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Passes over the rollouts of an update; 4 with gae, else 1.",
            "aliases": ["--num_iterations"],
        },
    )
    num_mini_batches: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps per pass. An update takes per_device_train_batch_size x gradient_accumulation_steps x this x devices rollouts."
        },
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Stop after this many rollouts, instead of --num_train_epochs or --max_steps."}
    )
    kl_coef: float | None = field(
        default=None,
        metadata={
            "help": "Penalty in the reward per nat of KL to the reference, at every token; .05 with gae, else 0."
        },
    )
    kl_in_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL to the reference (k3) in the loss, as in GRPO.", "aliases": ["--beta"]},
    )
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={"help": "Multiply the KL in the loss by the probability ratio, so that its gradient is unbiased."},
    )
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1", metadata={"help": "k1 is unbiased and may be negative; k3 is not negative, with less variance."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Move --kl_coef so that an answer's KL stays near this many nats (1909.08593 §2.2)."},
    )
    kl_horizon: int = field(
        default=10000, metadata={"help": "With --target_kl: rollouts in which the coefficient can move by a fifth."}
    )
    cliprange: float = field(
        default=0.2,
        metadata={"help": "Clip of the probability ratio (1707.06347 eq. 7).", "aliases": ["--epsilon"]},
    )
    cliprange_high: float | None = field(
        default=None,
        metadata={
            "help": "Upper clip, if it is another than --cliprange (2503.14476: .28).",
            "aliases": ["--epsilon_high"],
        },
    )
    delta: float | None = field(
        default=None,
        metadata={"help": "Largest ratio where the advantage is negative, above 1 + the upper clip (2505.07291)."},
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = field(
        default="dapo",
        metadata={
            "help": "Mean over the tokens of a mini batch (dapo) or of a micro batch (bnpo), over answers of token means (grpo), or over answers of "
            "sums by --response_length (dr_grpo)."
        },
    )
    importance_sampling_level: Literal["token", "sequence"] = field(
        default="token",
        metadata={
            "help": "token: a probability ratio per token. sequence: one per answer, the mean over its tokens (GSPO, 2507.18071)."
        },
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={
            "help": "With grpo: deviation that advantages are divided by, of the group or of the batch; none is Dr. GRPO (2503.20783)."
        },
    )
    drop_uniform_groups: bool = field(
        default=False,
        metadata={"help": "Leave out of the loss's mean groups whose answers all have the same score."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace groups whose answers all have the same score by new prompts (2503.14476)."},
    )
    max_num_gen_batches: int | None = field(
        default=None,
        metadata={"help": "With --dynamic_sampling: how often an update draws prompts at most; 10 by default."},
    )
    cliprange_value: float | None = field(
        default=None, metadata={"help": "Clip of the value's move within an update; .2 by default."}
    )
    vf_coef: float | None = field(default=None, metadata={"help": "Weight of the value loss; .1 by default."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float | None = field(
        default=None, metadata={"help": "GAE's lambda: bias against variance (1506.02438); .95 by default."}
    )
    whiten_rewards: bool | None = field(
        default=None,
        metadata={"help": "Scale token rewards to unit variance per update.", "nargs": "?", "const": True},
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Answers that do not end within --response_length do not enter the loss."}
    )
    rollout_url: str | None = field(
        default=None,
        metadata={
            "help": "Let an inference server sample, http://host:8000/v1 (docs/serving.md): where rollouts take most of the time. Needs --use_lora."
        },
    )
    rollout_timeout: float = field(
        default=600,
        metadata={
            "help": "With --rollout_url: seconds for a request, its time in the server's queue included, before it is tried again."
        },
    )
    rollout_importance_cap: float | None = field(
        default=None,
        metadata={
            "help": "With --rollout_url: largest importance weight of a token, its probability here over that on the server; 3 by default, 0 leaves "
            "weights out."
        },
    )
    value_adapter: Literal["separate", "shared"] | None = field(
        default=None,
        metadata={
            "help": "Weights of the value function: its own (separate, the default: an adapter; with full fine-tuning a second model), or the "
            "policy's, with a head (shared)."
        },
    )
    init_value_from_reward: bool | None = field(
        default=None,
        metadata={
            "help": "Start the value function, head included, as the first reward model.",
            "nargs": "?",
            "const": True,
        },
    )

    @property
    def has_value_function(self) -> bool:
        """Whether there is a critic."""
        return self.advantage_estimator == "gae"

    @property
    def compares_answers(self) -> bool:
        """Whether an advantage depends on the other answers to the prompt."""
        return self.advantage_estimator in ("rloo", "grpo", "reinforce_plus_plus_baseline")

    @property
    def reads_reference(self) -> bool:
        """Whether anything depends on the reference's log-probs."""
        return self.has_value_function or self.kl_coef != 0 or self.kl_in_loss != 0

    @property
    def reads_old_logps(self) -> bool:
        """Whether anything depends on log-probs before the first optimizer step; else those of that step serve."""
        several_steps = self.num_ppo_epochs > 1 or self.num_mini_batches > 1
        return self.has_value_function or self.kl_coef != 0 or several_steps or self.rollout_url is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fill_in_for_estimator()
        self._check_loss_flags()
        self._check_rollout_flags()
        self.check_rollouts("PPO")
        if self.init_value_from_reward and self.value_adapter != "separate":
            raise InputError(
                "--init_value_from_reward needs --value_adapter separate: the shared trunk is the policy's."
            )
        if self.init_value_from_reward and not (self.reward_adapter or self.reward_model_name_or_path):
            raise InputError("--init_value_from_reward needs a reward model: a function has no weights.")
        if self.per_device_train_batch_size % self.rollouts_per_prompt:
            raise InputError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size} counts rollouts and must be a multiple of "
                f"--rollouts_per_prompt {self.rollouts_per_prompt}: the answers to a prompt stay together."
            )
        if self.log_image_sensitivity:
            raise InputError("--log_image_sensitivity reads answers in the data; in PPO there are none: leave it out.")
        if self.total_episodes is not None:
            size = (
                self.per_device_train_batch_size
                * self.gradient_accumulation_steps
                * self.num_mini_batches
                * self.world_size
            )
            if self.total_episodes % size:
                raise InputError(
                    f"--total_episodes {self.total_episodes} is not a multiple of the {size} rollouts of an update."
                )
            self.max_steps = self.total_episodes // size

    def _fill_in_for_estimator(self) -> None:
        estimator = self.advantage_estimator
        for name, (with_critic, without) in BY_ESTIMATOR.items():
            if not self.has_value_function and without is None and getattr(self, name) is not None:
                raise InputError(f"--{name} has no part in --advantage_estimator {estimator}: leave it out.")
            if getattr(self, name) is None:
                setattr(self, name, with_critic if self.has_value_function else without)
        if self.dynamic_sampling and self.max_num_gen_batches is None:
            self.max_num_gen_batches = 10
        if self.scale_rewards != "group" and estimator != "grpo":
            raise InputError(f"--scale_rewards belongs to grpo, not to {estimator}: leave it out.")
        if self.gamma != 1 and estimator not in ("gae", "reinforce_plus_plus"):
            raise InputError(f"--gamma has no part in --advantage_estimator {estimator}: leave it out.")
        if self.compares_answers and self.rollouts_per_prompt < 2:
            raise InputError(f"--advantage_estimator {estimator} compares answers: --rollouts_per_prompt 2 at least.")
        if (self.drop_uniform_groups or self.dynamic_sampling) and not self.compares_answers:
            raise InputError(
                f"{estimator} compares no answers: leave out --drop_uniform_groups and --dynamic_sampling."
            )
        if self.max_num_gen_batches is not None and (not self.dynamic_sampling or self.max_num_gen_batches < 1):
            raise InputError("--max_num_gen_batches is 1 or more, and needs --dynamic_sampling True.")

    def _check_rollout_flags(self) -> None:
        if self.rollout_url is None:
            if self.rollout_importance_cap is not None or self.rollout_timeout != 600:
                raise InputError(
                    "--rollout_importance_cap and --rollout_timeout need --rollout_url, the server's address."
                )
            return
        if self.rollout_importance_cap is None:
            self.rollout_importance_cap = 3.0
        if self.rollout_importance_cap < 0 or 0 < self.rollout_importance_cap < 1 or self.rollout_timeout <= 0:
            raise InputError(
                "--rollout_importance_cap is 1 or more, or 0 for no weights, and --rollout_timeout is above 0."
            )
        # Two requests may take all of it, with pauses between them
        longest = 2 * self.rollout_timeout + 150
        if self.world_size > 1 and longest > self.ddp_timeout:
            raise InputError(
                f"--rollout_timeout {self.rollout_timeout:g} lets one process wait for the server longer than the others wait for it: add "
                f"--ddp_timeout {math.ceil(longest)}."
            )

    def _check_loss_flags(self) -> None:
        high = self.cliprange if self.cliprange_high is None else self.cliprange_high
        if self.delta is not None and self.delta <= 1 + high:
            raise InputError(
                f"--delta {self.delta} must be above {1 + high}, 1 + the upper clip: below it the clip has no part."
            )
        if self.target_kl is not None and not self.kl_coef:
            raise InputError("--target_kl moves --kl_coef, which is 0: give a coefficient to start from.")
        if not self.use_bias_correction_kl and not self.kl_in_loss:
            raise InputError("--use_bias_correction_kl needs --kl_in_loss.")
