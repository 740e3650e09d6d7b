"""The terms of PPO's score: reward adapters on the policy's base, reward models of their own, and functions in a user's file."""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from args import PPOConfig
from base.heads import check_same_base, head_metadata
from base.loading import core_mapper_for
from base.reward import VLRewardModel
from base.rollout import Rollouts
from base.value import VLModelWithValueHead
from common.errors import InputError

RewardFunction = Callable[..., Sequence[float]]


@dataclass
class Reward:
    """One term of the score: an adapter on the policy's base (`hat`), a model of its own, or a function."""

    name: str
    weight: float = 1.0
    hat: str | None = None
    model: VLRewardModel | None = None
    processor: Any = None
    function: RewardFunction | None = None

    @functools.cached_property
    def dummy_images(self) -> dict[str, Any]:
        """Image inputs of one grey picture, as this model's processor makes them."""
        return self.processor.dummy_images()


def load_reward_fn(spec: str) -> RewardFunction:
    """`file.py:name` -> the function.

    Raises:
        InputError: no such file or function, or the file does not run.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not Path(file).is_file():
        raise InputError(f"--reward_fn {spec}: give file.py:name, with a Python file that exists.")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"--reward_fn {spec}: {file} is not valid Python ({error}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward_fn {spec}: {file} defines no function {name}.")
    return function


def load_rewards(model: VLModelWithValueHead, base: str, freeze_vision_tower: bool, args: PPOConfig) -> list[Reward]:
    """All rewards of the command line, and the value function that may start from the first of them.

    Args:
        model: the policy, which reward adapters and a value adapter are added to.
        base: the checkpoint under the policy's adapter.

    Raises:
        InputError: a head is missing, an adapter was trained on another base, a function cannot be found.
    """
    if freeze_vision_tower:
        model.freeze_vision_side()
    if args.value_adapter == "separate":
        folders = [*args.reward_adapter, *args.reward_model_name_or_path]
        if args.init_value_from_reward and args.reward_adapter:
            check_same_base(folders[0], head_metadata(folders[0]), base)
        model.add_value_function(folders[0] if args.init_value_from_reward else None)
        if freeze_vision_tower:
            model.freeze_vision_side()
    rewards = []
    for folder in args.reward_adapter:
        rewards.append(Reward(Path(folder).name, hat=model.add_reward_adapter(folder, base)))
    for path in args.reward_model_name_or_path:
        own = core_mapper_for(path)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        rewards.append(
            Reward(
                Path(path).name,
                model=own.reward_model.from_pretrained(path, dtype=dtype),
                processor=own.processor(path),
            )
        )
    for spec in args.reward_fn:
        rewards.append(Reward(spec.rpartition(":")[2], function=load_reward_fn(spec)))
    for n, reward in enumerate(rewards):
        if any(reward.name == other.name for other in rewards[:n]):
            reward.name = f"{reward.name}_{n}"
        reward.weight = args.reward_weights[n] if args.reward_weights else 1.0
    return rewards


def call_reward_fn(name: str, function: RewardFunction, rollouts: Sequence[Rollouts]) -> list[Tensor]:
    """Call a user's function once for all answers of an update on this device; (R,) per micro batch.

    It gets the keyword arguments images, prompts, responses (one entry per answer: the row's image list, its messages, the answer's text) and, as
    far as it takes them, the data's other columns.

    Raises:
        InputError: another number of rewards than answers, or one that is no finite number.
    """
    rows = [(r.rows[p], text) for r in rollouts for p, text in zip(r.prompt_of, r.texts, strict=True)]
    arguments = {
        "images": [row["images"] for row, _ in rows],
        "prompts": [row["prompt"] for row, _ in rows],
        "responses": [text for _, text in rows],
    }
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    columns = [c for c in rows[0][0] if c not in ("images", "prompt", "responses") and (takes_all or c in parameters)]
    values = list(function(**arguments, **{c: [row.get(c) for row, _ in rows] for c in columns}))
    if len(values) != len(rows):
        raise InputError(f"Reward {name} returned {len(values)} numbers for {len(rows)} answers: return one each.")
    try:
        scores = torch.tensor([float(v) for v in values])
    except (TypeError, ValueError) as error:
        raise InputError(f"Reward {name} must return numbers: {error}.") from error
    return list(scores.split([len(r.texts) for r in rollouts]))
