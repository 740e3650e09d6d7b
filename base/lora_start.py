"""Starts of adapters that peft does not find by itself when it makes them.

PiSSA and OLoRA are a part of the base, LoftQ is what quantisation rounds off, EVA reads rows of the data.

PiSSA (2404.02948) and OLoRA (2406.01775) take A0 and B0 out of a weight and leave W - s B0 A0 in its place, s being the
scale. The frozen start lies in the model as the adapter "ref": it is the reference, and with it what is saved is an
ordinary adapter of twice the rank, [A; A0] and [B, -B0], that gives W + s (B A - B0 A0) on the untouched base. peft's
`path_initial_model_for_weight_conversion` writes the same file.
"""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    get_eva_state_dict,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from base.adapters import Role
from base.batch import Batch
from common.errors import InputError

START = Role.REFERENCE.adapter
POLICY = Role.POLICY.adapter


class LoraOnChangedBase(PeftModelForCausalLM):
    """A model whose base lacks what its adapter started with. It saves and loads adapters of the base as it was."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """As peft's, the policy's adapter alone, with its start subtracted."""
        super().save_pretrained(save_directory, **{**kwargs, "selected_adapters": [POLICY]})
        if not kwargs.get("is_main_process", True):
            return
        path = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        start = get_peft_model_state_dict(self, adapter_name=START)
        save_file(less_start(load_file(path), start), path, {"format": "pt"})
        config = copy.copy(self.peft_config[POLICY])
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays what it is
        config.init_lora_weights = config.inference_mode = True
        config.save_pretrained(save_directory)

    def load_saved(self, folder: str) -> None:
        """Take over what `save_pretrained` wrote: the adapter, its start, and the base that lacks it.

        The start was computed anew when the model was built. Where another processor found another one, the base is
        changed by the difference.
        """
        layers = [module for module in self.modules() if isinstance(module, LoraLayer) and START in module.lora_A]
        before = [(m.lora_A[START].weight.clone(), m.lora_B[START].weight.clone()) for m in layers]
        adapter, start = split_start(load_peft_weights(folder, device="cpu"))
        set_peft_model_state_dict(self, adapter, adapter_name=POLICY)
        set_peft_model_state_dict(self, start, adapter_name=START)
        for layer, (A, B) in zip(layers, before, strict=True):
            now_A, now_B = layer.lora_A[START].weight, layer.lora_B[START].weight
            if not (torch.equal(A, now_A) and torch.equal(B, now_B)):
                weight = layer.get_base_layer().weight
                moved = weight.float() + layer.scaling[START] * (B @ A - now_B @ now_A).float()
                weight.data = moved.detach().to(weight.dtype)


def less_start(adapter: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """[A; A0] (2r, in) and [B, -B0] (out, 2r) of peft's names; what is no LoRA weight stays as it is."""
    result = dict(adapter)
    for name, first in start.items():
        is_A = ".lora_A." in name
        first = first.detach().to(adapter[name])
        result[name] = torch.cat([adapter[name], first if is_A else -first], 0 if is_A else 1).contiguous()
    return result


def split_start(saved: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter and its start out of what `less_start` returned."""
    adapter, start = dict(saved), {}
    for name, weight in saved.items():
        if ".lora_A." in name:
            adapter[name], start[name] = weight.chunk(2, 0)
        elif ".lora_B." in name:
            adapter[name], minus = weight.chunk(2, 1)
            start[name] = -minus
    return adapter, start


def keep_start(model: PeftModel) -> None:
    """Copy the adapter, as it starts, into a frozen one that serves as the reference. No random number is drawn."""
    config = copy.copy(model.peft_config[POLICY])
    config.init_lora_weights, config.modules_to_save, config.bias, config.lora_dropout = True, None, "none", 0.0
    with (
        torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".* changes the base weights")  # they are meant to be
        model.add_adapter(START, config)
    weights = get_peft_model_state_dict(model, adapter_name=POLICY)
    set_peft_model_state_dict(model, {k: w for k, w in weights.items() if ".lora_" in k}, adapter_name=START)
    model.set_adapter(POLICY)


@torch.no_grad()
def start_as_rounding_error(model: PeftModel, exact: nn.Module) -> None:
    """LoftQ, 2310.08659: s B A becomes the best approximation of rank r of W - Q(W), in each 4-bit layer.

    One step of its algorithm 1, as peft's `replace_lora_weights_loftq`, which leaves the base as it is; peft forgets
    the scale s.

    Args:
        exact: the model before quantisation, without adapters.
    """
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not hasattr(layer.get_base_layer().weight, "quant_state"):
            continue
        A, B = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
        rounded = dequantize_module_weight(layer.get_base_layer()).float()
        lost = exact.get_submodule(name).weight.to(rounded) - rounded  # (out, in)
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        root = (S[: len(A)] / layer.scaling[POLICY]).sqrt()
        rank = len(root)  # a layer may be smaller than r
        A.zero_(), B.zero_()
        A[:rank], B[:, :rank] = root[:, None] * Vh[:rank], U[:, :rank] * root


EVA_BATCHES = 500  # more than the paper needs of any data


class Moved(dict):
    """A batch that lies where the model is."""

    def to(self, device: torch.device) -> "Moved":
        """peft would move it, layouts and paths of images included."""
        return self


@torch.no_grad()
def start_from_inputs(model: PeftModel, loader: DataLoader, forward: Callable[[Batch], Any]) -> None:
    """EVA, 2410.07170: A becomes the largest principal components of what its layer reads at the answers' tokens.

    Departure: 1. every layer keeps its rank (rho = 1 in peft's EvaConfig), so that the adapter is one like any other.

    Args:
        model: whose adapter was made with init_lora_weights "eva".
        loader: batches of trainers, on the model's device; equally many on every process.
        forward: runs the model on one of them.

    Raises:
        InputError: the components do not settle, for example because a batch has fewer such tokens than the adapter ranks.
    """
    config, batches = model.peft_config[POLICY], 0

    def answers(read: tuple[Tensor, ...], batch: Batch, _layer: str) -> Tensor:
        states, layout = read[0], batch["layout"]
        trained = batch["segment_ids"] > 0 if "segment_ids" in batch else batch["labels"] != -100  # (B, L)
        if states.shape[:2] == (1, layout.tokens):
            trained = layout.end_to_end(trained)
        # Else a layer of the tower, or one that reads the picture by cross-attention
        return states[trained] if states.shape[:2] == trained.shape else states.flatten(0, -2)

    def run(_model: nn.Module, batch: Batch) -> None:
        nonlocal batches
        batches += 1
        if batches > EVA_BATCHES:
            raise ValueError(f"the components still change after {EVA_BATCHES} batches")
        forward(batch)

    try:
        found = get_eva_state_dict(
            model,
            loader,
            forward_fn=run,
            prepare_model_inputs_fn=lambda batch, _config: batch,
            prepare_layer_inputs_fn=answers,
            show_progress_bar=False,
        )
    except ValueError as error:
        raise InputError(
            f"--init_lora_weights eva finds no start: {error}. Each batch needs more tokens of answers than --lora_r {config.r}: "
            "take a larger --per_device_train_batch_size, or a smaller rank."
        ) from error
    for name, weight in found.items():
        model.get_submodule(name).lora_A[POLICY].weight.copy_(weight)
