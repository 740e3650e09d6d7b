"""Flags of answers that are sampled while training: of train_ppo.py, and of train_dpo.py with --online."""

from dataclasses import dataclass, field
from typing import ClassVar

from common.errors import InputError


@dataclass
class RolloutFlags:
    """How answers are sampled, and what they are worth: of PPO and its relatives, and of DPO with --online."""

    title: ClassVar[str] = "Rollouts and rewards"
    rollouts_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Answers sampled to each prompt; they share its tokens in every pass. 1 with gae, 2 in DPO, else 8.",
            "aliases": ["--num_generations"],
        },
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Rollouts generated at once on a device."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Of sampling, and of the log-probs that train the policy (in DPO of sampling alone); .7 with gae, else 1."
        },
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Nucleus of sampling; log-probs stay those of the whole vocabulary."}
    )
    response_length: int = field(
        default=53, metadata={"help": "Longest answer, in tokens.", "aliases": ["--max_completion_length"]}
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Within this many tokens of --response_length the score falls in a line (2503.14476 eq. 13)."
        },
    )
    overlong_penalty: float = field(default=1.0, metadata={"help": "With --overlong_buffer: what it falls by."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of an answer that does not end within --response_length."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Clip scores to [-x, x]."})
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "ZeRO-3: gather all weights once per rollout. False needs less memory and is slower: layer by layer, for every token."
        },
    )
    reward_adapter: list[str] = field(
        default_factory=list, metadata={"help": "Output folders of train_rm.py, LoRA on the policy's base."}
    )
    reward_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Reward models of their own, of any family."}
    )
    reward_timeout: float = field(
        default=1800,
        metadata={"help": "Seconds that a call of a reward function may take before the run stops; 0: without limit."},
    )
    reward_fn: list[str] = field(
        default_factory=list,
        metadata={
            "help": "file.py:name of functions (images, prompts, responses, columns of the data) -> one number per response; or names of "
            "base/reward_functions.py (exact_answer, ...)."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of adapters, models and functions, in this order; 1 by default."}
    )

    def check_rollouts(self, what: str) -> None:
        """Raise InputError for flags that cannot sample or score answers; `what` names the algorithm."""
        sources = len(self.reward_adapter) + len(self.reward_model_name_or_path) + len(self.reward_fn)
        if not sources:
            raise InputError(
                f"{what} needs a reward: give --reward_adapter, --reward_model_name_or_path or --reward_fn."
            )
        if self.reward_weights is not None and len(self.reward_weights) != sources:
            raise InputError(
                f"--reward_weights has {len(self.reward_weights)} numbers for {sources} reward(s): give one each."
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"--temperature must be above 0 and --top_p within (0, 1]: {what} learns from what it samples."
            )
        if self.overlong_buffer is not None and not 0 < self.overlong_buffer <= self.response_length:
            raise InputError(f"--overlong_buffer {self.overlong_buffer} must be within 1 ... --response_length.")
        if self.overlong_penalty != 1 and self.overlong_buffer is None:
            raise InputError("--overlong_penalty needs --overlong_buffer.")
