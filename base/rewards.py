"""The terms of PPO's score: adapters on the policy's base, reward models with a base of their own, users' functions."""

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
from base.adapters import Role
from base.batch import ImageInputs
from base.heads import check_same_base, head_metadata
from base.loading import core_mapper_for
from base.processor import VLProcessor
from base.reward import VLRewardModel, score_rows
from base.rollout import Sampled
from base.value import VLModelWithValueHead
from common.errors import InputError

RewardFunction = Callable[..., Sequence[float]]


@dataclass
class Reward:
    """One term of the score; see the three kinds below."""

    name: str
    weight: float


@dataclass
class AdapterReward(Reward):
    """A reward model that is an adapter on the policy's base."""

    role: Role


@dataclass
class ModelReward(Reward):
    """A reward model with a base of its own, which answers are tokenised anew for."""

    model: VLRewardModel
    processor: VLProcessor

    @functools.cached_property
    def dummy_images(self) -> ImageInputs:
        """Image inputs of one grey picture, as this model's processor makes them."""
        return self.processor.dummy_images()

    def score(self, sampled: Sampled, share_prefix: bool, dummy_images: ImageInputs | None) -> Tensor:
        """(R,). For the arguments see `score_rows`."""
        texts = sampled.by_prompt(sampled.texts)
        rows = [row | {"responses": of_row} for row, of_row in zip(sampled.rows, texts, strict=True)]
        scores = score_rows(self.model, self.processor, rows, len(rows), share_prefix, dummy_images)
        return torch.tensor([scores[b][k] for b, k in sampled.order])


@dataclass
class FunctionReward(Reward):
    """A function in a user's file."""

    function: RewardFunction

    def score(self, sampled: Sequence[Sampled]) -> list[Tensor]:
        """Call the function once for all answers of an update on this device; (R,) per micro batch.

        It gets the keyword arguments images, prompts, responses (one entry per answer: the row's image list, its
        messages, the answer's text) and, as far as it takes them, the data's other columns.

        Raises:
            InputError: it does not return one number for each answer.
        """
        rows = [(r.rows[p], text) for r in sampled for p, text in zip(r.prompt_of, r.texts, strict=True)]
        arguments = {
            "images": [row["images"] for row, _ in rows],
            "prompts": [row["prompt"] for row, _ in rows],
            "responses": [text for _, text in rows],
        }
        parameters = inspect.signature(self.function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        others = (c for c in rows[0][0] if c not in ("images", "prompt", "responses"))
        columns = [c for c in others if takes_all or c in parameters]
        values = list(self.function(**arguments, **{c: [row.get(c) for row, _ in rows] for c in columns}))
        if len(values) != len(rows):
            raise InputError(
                f"Reward {self.name} returned {len(values)} numbers for {len(rows)} answers: return one each."
            )
        try:
            scores = torch.tensor([float(v) for v in values])
        except (TypeError, ValueError) as error:
            raise InputError(f"Reward {self.name} must return numbers: {error}.") from error
        return list(scores.split([len(r.texts) for r in sampled]))


def load_reward_fn(spec: str) -> RewardFunction:
    """`file.py:name` -> the function.

    Raises:
        InputError: the file or the function does not exist, or the file does not run.
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
    rewards: list[Reward] = []

    def add(kind: type[Reward], name: str, **what: Any) -> None:
        n = len(rewards)
        weight = args.reward_weights[n] if args.reward_weights else 1.0
        taken = any(name == other.name for other in rewards)
        rewards.append(kind(name=f"{name}_{n}" if taken else name, weight=weight, **what))

    for folder in args.reward_adapter:
        add(AdapterReward, Path(folder).name, role=model.add_reward_adapter(folder, base))
    for path in args.reward_model_name_or_path:
        family = core_mapper_for(path)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        reward_model = family.reward_model.from_pretrained(path, dtype=dtype)
        add(ModelReward, Path(path).name, model=reward_model, processor=family.processor(path))
    for spec in args.reward_fn:
        add(FunctionReward, spec.rpartition(":")[2], function=load_reward_fn(spec))
    return rewards
