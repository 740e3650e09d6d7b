"""Learning rates by part of the model: `--vision_lr`, `--projector_lr`, and LoRA+ (`--loraplus_lr_ratio`)."""

from collections import defaultdict
from typing import Any

from torch import nn
from torch.optim import Optimizer

from args import VLConfig
from base.model import VLModelMixin
from common.errors import InputError

DEFAULT = "learning_rate"


def learning_rates(model: nn.Module, args: VLConfig) -> dict[int, tuple[str, float]]:
    """id -> (flag of the part, learning rate) of every parameter that trains.

    LoRA+ (2402.12354) is as in peft: lora_B, and the vectors of an adapter (DoRA's lengths), get the ratio. Unlike there,
    vectors outside of adapters (the bias of a projector that trains as a whole) do not.

    Raises:
        InputError: a flag names the rate of a part in which nothing trains.
    """
    part_of: dict[int, str] = {}
    for core in (module for module in model.modules() if isinstance(module, VLModelMixin)):
        # A projector may lie in the tower.
        parts = {"vision_lr": core.get_vision_tower().parameters(), "projector_lr": core.projector_parameters()}
        for flag, parameters in parts.items():
            given = getattr(args, flag) is not None
            found = {id(p): flag if given else DEFAULT for p in parameters if p.requires_grad}
            if given and not found:
                raise InputError(
                    f"--{flag} is the rate of a part in which nothing trains: leave it out, or let it train."
                )
            part_of |= found

    def rate_of(name: str, parameter: nn.Parameter) -> tuple[str, float]:
        part = part_of.get(id(parameter), DEFAULT)
        rate = getattr(args, part)
        if args.loraplus_lr_ratio and (".lora_B." in name or (".lora_" in name and parameter.ndim == 1)):
            return f"{part} x loraplus_lr_ratio", rate * args.loraplus_lr_ratio
        return part, rate

    return {id(p): rate_of(name, p) for name, p in model.named_parameters() if p.requires_grad}


def split_by_rate(optimizer: Optimizer, rates: dict[int, tuple[str, float]]) -> None:
    """Split the groups of an optimizer that has not stepped so that each has the rate of one part.

    Those of --learning_rate come first: the first group's rate is what is logged. Which group a weight is in depends on
    the part and not on the number, so that a run that goes on with another rate finds the same groups.
    """
    groups: list[tuple[str, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        members: dict[tuple[str, float], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            members[rates[id(parameter)]].append(parameter)
        groups += [(part, {**group, "params": those, "lr": rate}) for (part, rate), those in members.items()]
    optimizer.param_groups = [group for _, group in sorted(groups, key=lambda entry: entry[0] != DEFAULT)]
