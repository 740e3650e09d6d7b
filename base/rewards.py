"""The terms of PPO's score: adapters on the policy's base, reward models with a base of their own, users' functions."""

import datetime
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from args import PPOConfig, RolloutFlags
from base.adapters import Role
from base.batch import ImageInputs
from base.heads import check_same_base, head_metadata
from base.loading import core_mapper_for
from base.processor import VLProcessor
from base.reward import VLRewardModel, score_rows
from base.reward_calls import call_in_time
from base.reward_functions import BUILT_IN, RIGHT_FROM, RewardFunction, built_in
from base.rollout import Row, Sampled
from base.value import VLModelWithValueHead
from common.errors import InputError
from data.stream import StreamedRows, without_column

# Names of arguments that come with every answer; a column of the data does not take their place.
_OF_ANSWERS = ("images", "prompts", "responses", "completions", "completion_ids")
_OF_TRL = ("trainer_state", "log_extra", "log_metric")


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
        texts, ended = sampled.by_prompt(sampled.texts), sampled.by_prompt(sampled.ended.tolist())
        rows = [row | {"responses": texts[b], "responses_ended": ended[b]} for b, row in enumerate(sampled.rows)]
        scores = score_rows(self.model, self.processor, rows, len(rows), share_prefix, dummy_images)
        return torch.tensor([scores[b][k] for b, k in sampled.order])


@dataclass
class FunctionReward(Reward):
    """A function of reward_functions.py, or in a user's file.

    It takes what it names (with ** everything) of `images`, `prompts` (messages), `responses` (texts), `completion_ids`
    and the data's other columns, one entry per answer each. A function with an argument `completions` is one written
    for TRL: that argument holds a list of one message for each answer.
    """

    function: RewardFunction
    timeout: float = 0  # seconds; 0: without limit

    @property
    def right_from(self) -> float | None:
        """From which value on an answer is right, if that can be said."""
        return RIGHT_FROM.get(self.function.__name__) if self.function in BUILT_IN.values() else None

    def check_columns(self, data: Dataset) -> None:
        """Before the first rollout: the function can be called, and everything that it asks for is there.

        Raises:
            InputError: an argument is neither a column of the data nor one of those above, or cannot be given by name;
                the function is asynchronous; or a built-in reward's column is empty in a row.
        """
        if any(map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__))):
            raise InputError(
                f"Reward {self.name} is asynchronous, and nothing awaits it here: make it a plain function."
            )
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters.values()):
            raise InputError(
                f"Reward {self.name} takes no argument by its name: give it responses, or completions as in TRL."
            )
        asked = [
            n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        columns = [c for c in data.column_names if c not in (*_OF_ANSWERS, "prompt")]
        missing = [name for name in asked if name not in (*_OF_ANSWERS, *columns)]
        if set(missing) & set(_OF_TRL):
            raise InputError(
                f"Reward {self.name} takes an argument {missing[0]}, which TRL passes and train_ppo.py does not: give it a default."
            )
        if missing:
            raise InputError(
                f"Reward {self.name} takes an argument {missing[0]}, which the data does not have: its columns are "
                f"{', '.join(columns)} (--columns {missing[0]}=NAME gives a column another name)."
            )
        if self.function not in BUILT_IN.values():
            return
        for name in sorted(set(asked) & set(columns)):
            if isinstance(data, StreamedRows):
                data.only(without_column(name, f"the reward {self.name}"))
                continue
            for i, value in enumerate(data[name]):
                if value is None:
                    where = data[i].get("where") or f"Row {i}"
                    raise InputError(f"{where} has no {name}, which the reward {self.name} reads: add it to the row.")

    def score(self, sampled: Sequence[Sampled]) -> list[Tensor]:
        """Call the function once for all answers of an update on this device; (R,) per micro batch. Raises as `score_texts`."""
        answers = [(r, i) for r in sampled for i in range(len(r.texts))]
        scores = self.score_texts(
            [r.rows[r.prompt_of[i]] for r, i in answers],
            [r.texts[i] for r, i in answers],
            [r.where(i) for r, i in answers],
            [r.batch["completion_ids"][i][r.mask[i]].tolist() for r, i in answers],
        )
        return list(scores.split([len(r.texts) for r in sampled]))

    def score_texts(
        self, rows: Sequence[Row], texts: Sequence[str], where: Sequence[str], completion_ids: list[list[int]]
    ) -> Tensor:
        """Call the function once for N answers, (N,).

        NaN where it returns None: the reward does not apply to that answer.

        Args:
            rows: (N,) with the prompt that each answers.
            where: (N,) how a message names each.
            completion_ids: (N,) the answers' tokens.

        Raises:
            InputError: it does not return one number for each answer, raises, or takes too long.
        """
        values = call_in_time(
            self.function, self._arguments(rows, texts, completion_ids), self.name, where, self.timeout
        )
        if len(values) != len(rows):
            raise InputError(
                f"Reward {self.name} returned {len(values)} numbers for {len(rows)} answers: return one each."
            )
        try:
            scores = torch.tensor([math.nan if v is None else _number(v) for v in values])
        except (TypeError, ValueError, RuntimeError) as error:  # torch's for a tensor of several numbers
            raise InputError(f"Reward {self.name} must return numbers: {error}.") from error
        odd = [
            place
            for place, value, score in zip(where, values, scores.tolist(), strict=True)
            if value is not None and not math.isfinite(score)
        ]
        if odd:
            raise InputError(
                f"Reward {self.name} is not finite for {', '.join(odd[:5])}: fix the reward or the row, or return None."
            )
        return scores

    def _arguments(self, rows: Sequence[Row], texts: Sequence[str], completion_ids: list[list[int]]) -> dict[str, list]:
        parameters = inspect.signature(self.function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        found: dict[str, list] = {
            "images": [row["images"] for row in rows],
            "prompts": [row["prompt"] for row in rows],
            "completion_ids": completion_ids,
        }
        if "completions" in parameters:
            found["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        if "completions" not in parameters or "responses" in parameters:
            found["responses"] = list(texts)
        columns = dict.fromkeys(c for row in rows for c in row if c not in (*_OF_ANSWERS, "prompt"))
        found |= {c: [row.get(c) for row in rows] for c in columns}
        return {name: values for name, values in found.items() if takes_all or name in parameters}


def _number(value: Any) -> float:
    """A number, or a tensor or array of one."""
    if isinstance(value, str):
        raise TypeError(f"{value[:40]!r} is a text")
    return float(value.item() if hasattr(value, "item") else value)


def load_reward_fn(spec: str) -> RewardFunction:
    """`file.py:name`, or a name of reward_functions.py -> the function. Raises as `load_function`."""
    if ":" not in spec and not spec.endswith(".py"):
        return built_in(spec)
    return load_function(spec, "--reward_fn")


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """`file.py:name` -> the function.

    Raises:
        InputError: the file or the function does not exist, or the file does not run; names the flag.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not Path(file).is_file():
        raise InputError(f"{flag} {spec}: give file.py:name, with a Python file that exists.")
    module_spec = importlib.util.spec_from_file_location(f"reward_fn_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look there
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{flag} {spec}: {file} is not valid Python ({error}).") from error
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{flag} {spec}: {file} does not run ({said}): try `python {file}`.") from error
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, type):
        raise InputError(f"{flag} {spec}: {file} defines no function {name}.")
    return function


def load_rewards(
    model: VLModelWithValueHead,
    base: str,
    freeze_vision_tower: bool,
    args: PPOConfig,
    date: datetime.date | None = None,
) -> list[Reward]:
    """All rewards of the command line, and the value function that may start from the first of them.

    Args:
        model: the policy, which reward adapters and a value adapter are added to.
        base: the checkpoint under the policy's adapter.
        date: for the chat templates of reward models that print it.

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
    return rewards_of(model, base, args, date)


def rewards_of(
    model: VLModelWithValueHead | None, base: str, args: RolloutFlags, date: datetime.date | None = None
) -> list[Reward]:
    """All rewards of the command line, in its order: adapters, which are hung on `model`, models, functions.

    Raises:
        InputError: as `load_rewards`.
    """
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
        add(ModelReward, Path(path).name, model=reward_model, processor=family.processor(path, date=date))
    for spec in args.reward_fn:
        add(FunctionReward, spec.rpartition(":")[2], function=load_reward_fn(spec), timeout=args.reward_timeout)
    return rewards
