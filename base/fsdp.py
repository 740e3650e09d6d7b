"""FSDP2: every process holds a part of each weight, and gathers one layer after the other. `--fsdp "full_shard auto_wrap"`.

    shard        a model is shared out, layer by layer; what lies outside of layers is gathered for the whole forward
    in_root      calls what runs modules outside of the model's forward (the vision tower alone, for one)
    whole_*      of parts, for files that are those of one process

torch's `fully_shard` is called from here and not through accelerate, which has it on accelerators alone, makes bf16 of the
log-probs that a forward returns, and gives lm_head a unit of its own: base/logps.py reads its weights without calling it.
The rest is Trainer's way with models that were shared out while they were loaded.
"""

import contextlib
import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from args import VLConfig
from common.errors import InputError
from common.tensors import local_part

Result = TypeVar("Result")


def layers_of(model: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """What is gathered at a time: the members of the model's stacks of layers (nn.ModuleList), in vision tower and language model.

    Args:
        names: of classes; their modules instead. A layer inside a layer is part of it.

    Raises:
        InputError: the model has no stack, or no module of a named class.
    """
    found = [*_named(model, names)] if names else [*_stacked(model)]
    missing = {*names} - {type(layer).__name__ for layer in found}
    if missing or not found:
        known = sorted({type(layer).__name__ for layer in _stacked(model)})
        raise InputError(
            f"FSDP finds no layers in {type(model).__name__}"
            + (f" of the class {', '.join(sorted(missing))}" if missing else "")
            + ": name their class by --fsdp_config '{\"transformer_layer_cls_to_wrap\": [...]}'"
            + (f"; its stacks hold {', '.join(known)}." if known else ".")
        )
    return found


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacked(child)


def _named(module: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    for child in module.children():
        yield from [child] if type(child).__name__ in names else _named(child, names)


def shard(model: nn.Module, layers: Iterable[nn.Module], reshard_after_forward: bool = True) -> None:
    """Share a model's weights out over all processes, in place; it moves to this process's device.

    Weights are gathered in the types that they have, and autocast computes as it does under DDP. In bf16 they would be
    half the traffic, and norms of float32 states with bf16 weights, which not every device has.

    Args:
        model: all of it, with peft's wrapper or a head, whole and the same on every process.
        layers: of it, `layers_of`.
        reshard_after_forward: of `Sharding`.
    """
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward)
    fully_shard(model, reshard_after_forward=False)
    model._is_fsdp_managed_module = True  # which transformers asks for
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(functools.partial(_take_parts, model))
    model.within_forward = types.MethodType(lambda self, function: function(), model)
    register_fsdp_forward_method(model, "within_forward")


def in_root(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call a function that runs modules of a model. Under FSDP it runs as the model's forward does, with what lies outside of layers gathered."""
    return model.within_forward(function) if isinstance(model, FSDPModule) else function()


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: a model that was only evaluated still has those outside of layers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _take_parts(root: nn.Module, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict` of a module: whole weights become this process's parts."""
    for name, parameter in [*module.named_parameters(recurse=False)]:
        if not isinstance(parameter, DTensor):
            reshard(root)
            parameter = getattr(module, name)
        value = state_dict.get(prefix + name)
        if value is not None and isinstance(parameter, DTensor):
            state_dict[prefix + name] = part_like(parameter, value)


def part_like(parameter: DTensor, value: Tensor) -> Tensor:
    """This process's part of a whole tensor that is shared out as a parameter of its shape is. Another shape stays whole."""
    if isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # every process has it


def whole(value: Any) -> Any:
    """Parts, alone or in dicts and lists, as whole tensors in host memory. Every process must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return [whole(entry) for entry in value] if isinstance(value, list) else value


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict of a model that was shared out, as from one process. Every process must call it.

    Of a model whose weights are mostly frozen, a LoRA model, those that train: the base is not saved.

    Args:
        keep: whether this process needs it; {} without.
    """
    reshard(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    only_trained = isinstance(getattr(model, "backbone", model), PeftModel)  # a model with a head has it inside
    done: dict[int, Tensor] = {}  # tied weights stay one tensor
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parameter = named.get(name)
        if parameter is None:  # a buffer
            state[name] = value.cpu()
        elif parameter.requires_grad or not only_trained:
            if id(parameter) not in done:
                gathered = whole(value)
                done[id(parameter)] = gathered if keep else gathered.new_empty(0)
            state[name] = done[id(parameter)]
    return state if keep else {}


def _parts_of_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Before `load_state_dict` of an optimizer: whole moments become this process's parts."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    places = {place: p for group, saved in groups for p, place in zip(group["params"], saved["params"], strict=True)}
    state = {
        place: {name: part_like(places[place], v) if torch.is_tensor(v) else v for name, v in of_one.items()}
        for place, of_one in state_dict["state"].items()
    }
    return state_dict | {"state": state}


class ShardedTrainer(Trainer):
    """transformers.Trainer whose model is shared out where --fsdp asks for it. Checkpoints are those of one process."""

    args: VLConfig

    @property
    def is_sharded(self) -> bool:
        """Whether the model has been shared out."""
        return isinstance(self.model, FSDPModule)

    def shard_model(self) -> None:
        """Share the model out, if --fsdp asks for it and it has not been done. Every process must call it."""
        if self.args.sharding is None or self.is_sharded:
            return
        layers = layers_of(self.model, self.args.sharding.layers)
        shard(self.model, layers, self.args.sharding.reshard_after_forward)
        if self.args.process_index == 0:
            kinds = sorted({type(layer).__name__.removeprefix("FSDP") for layer in layers})
            held = sum(local_part(p).numel() for p in self.model.parameters())
            total = sum(p.numel() for p in self.model.parameters())
            print(
                f"FSDP gathers {len(layers)} layers one at a time ({', '.join(kinds)}); this process holds {held:,} of {total:,} weights.",
                flush=True,
            )
        self.is_distributed_loading_by_transformers = True  # neither DDP around it nor accelerate's FSDP

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """As Trainer's, on the parts."""
        if self.is_sharded:
            reshard(
                self.model
            )  # the reference may have answered: some weights are still gathered, and would never move
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_sharded:
            optimizer.register_load_state_dict_pre_hook(_parts_of_state)
        return optimizer

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        # Whole gradients of several micro batches would take the memory that FSDP is there to save.
        return contextlib.nullcontext()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, the same files as from one process."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [os.path.join(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        # transformers' own files, of tensors and numbers: nothing in them is executed. Its Trainer would read the whole state onto every device.
        if all(map(os.path.isfile, files)):
            for kept, file in zip((self.optimizer, self.lr_scheduler), files, strict=True):
                kept.load_state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
