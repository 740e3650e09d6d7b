"""Scalar heads on any family's backbone, in memory and on disk.

A head is one row of weights over the hidden states that lm_head reads. It is saved beside the weights or the adapter,
in a file of its own, so that the folder stays an ordinary checkpoint for AutoModelForImageTextToText or PeftModel.
"""

import functools
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from base.adapters import Role, recompute_with_same_adapter
from base.layout import base_model_path, checkpoint_file, checkpoint_fingerprint
from base.loading import load_model, load_weights
from base.other_heads import other_head
from common.errors import InputError

REWARD_HEAD = "reward_head.safetensors"
VALUE_HEAD = "value_head.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------


class ScalarHead(nn.Linear):
    """D -> 1, computed in float32 whatever the precision around it: on the bf16 grid close rewards would tie.

    Ours have no bias; other programs' may have one.
    """

    def __init__(self, hidden_size: int, bias: bool = False) -> None:
        super().__init__(hidden_size, 1, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, 1) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def scalar_head(backbone: nn.Module) -> ScalarHead:
    """A fresh head: std 1 / sqrt(D + 1) (Stiennon et al., 2009.01325)."""
    hidden_size = backbone.config.get_text_config().hidden_size
    head = ScalarHead(hidden_size)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head


def load_head(folder: str, name: str, backbone: nn.Module) -> nn.Linear:
    """Read a head that was trained on a backbone of this size; a reward head also as other programs write it.

    Raises:
        InputError: the file is missing, or the head is of another size.
    """
    path = checkpoint_file(folder, name)
    other = other_head(folder) if path is None and name == REWARD_HEAD else None
    if other is not None:
        path, tensors = other.file, other.tensors
    elif path is None:
        script = "train_rm.py" if name == REWARD_HEAD else "train_ppo.py"
        raise InputError(f"{folder} has no {name}: give the output folder of {script}, or train a reward model first.")
    else:
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is damaged ({error}): take another checkpoint, or copy the file again."
            ) from error
    weight, bias = tensors["weight"], tensors.get("bias")
    head = scalar_head(backbone)
    if weight.shape != head.weight.shape:
        raise InputError(
            f"{path} is a head for hidden size {weight.shape[1]}, the model has {head.weight.shape[1]}: "
            "they were not trained together."
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError(f"{path} holds values that are not finite: its training diverged. Take another checkpoint.")
    head.weight = nn.Parameter(weight.float())
    head.bias = None if bias is None else nn.Parameter(bias.float())
    return head


def head_metadata(folder: str, name: str = REWARD_HEAD) -> dict[str, str]:
    """What was saved beside a head: `base`, the fingerprint of the checkpoint that its adapter was trained on."""
    path = checkpoint_file(folder, name)
    if path is None:
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): take another checkpoint, or copy the file again.") from error


def sub_state_dict(state_dict: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    """The entries below `prefix`, named as the part itself names them."""
    if state_dict is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def save_head(backbone: nn.Module, tensors: dict[str, Tensor], folder: str, name: str) -> None:
    """Write a head, and the fingerprint of the base of its adapter."""
    metadata = {}
    if isinstance(backbone, PeftModel):
        base = backbone.peft_config[backbone.active_adapter].base_model_name_or_path
        metadata["base"] = (checkpoint_fingerprint(base) if base else None) or ""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, Path(folder) / name, metadata)


def check_same_base(folder: str, metadata: dict[str, str], base: str) -> None:
    """Raise InputError if the adapter in `folder` was trained on another checkpoint than `base`."""
    trained_on = metadata.get("base")
    if trained_on and (found := checkpoint_fingerprint(base)) and found != trained_on:
        raise InputError(
            f"The adapter in {folder} was trained on other weights than those of {base}: give the base that it was "
            "trained on, or train it anew."
        )


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


class HeadModel(nn.Module):
    """A backbone (maybe wrapped by peft) with a scalar head, as transformers.Trainer needs it; `head` is None where no loss needs one."""

    head_name: str

    def __init__(self, backbone: nn.Module, head: nn.Linear | None = None, with_head: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = None
        if with_head:
            self.head = head if head is not None else scalar_head(backbone)
            self.head.to(next(backbone.parameters()).device)

    @property
    def core(self) -> nn.Module:
        """The adapter's model inside peft."""
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    @property
    def config(self) -> PreTrainedConfig:
        """Of the backbone."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Of the head; without one, of the backbone."""
        return next(self.backbone.parameters()).device if self.head is None else self.head.weight.device

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backbone recomputes layers during backward."""
        return self.core.is_activation_checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As transformers', safe with several adapters in one forward."""
        settings = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        if isinstance(self.backbone, PeftModel):
            settings["context_fn"] = functools.partial(recompute_with_same_adapter, self.backbone)
        self.core.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **kwargs)

    def apply_head(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """(N, D) -> (N,) float32."""
        return torch.squeeze_copy(head(hidden), -1)  # FSDP warns of views, on which nobody could add in place

    def save_pretrained(self, save_directory: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Save backbone or adapter as transformers and peft do, and the head beside.

        Args:
            state_dict: of this whole module, gathered by the caller (ZeRO-3).
        """
        self._save_backbone(save_directory, sub_state_dict(state_dict, "backbone."), **kwargs)
        if self.head is None:
            return
        tensors = self.head.state_dict() if state_dict is None else sub_state_dict(state_dict, "head.")
        save_head(self.backbone, tensors, save_directory, self.head_name)

    def _save_backbone(self, save_directory: str, state_dict: dict[str, Tensor] | None, **kwargs: Any) -> None:
        if isinstance(self.backbone, PeftModel):  # adapters in memory for the reference are not part of the result
            kwargs = {"selected_adapters": [Role.POLICY.adapter]} | kwargs
        self.backbone.save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def load_checkpoint(self, folder: str) -> None:
        """Take over the weights that `save_pretrained` wrote, to resume."""
        load_weights(self.backbone, folder)
        if self.head is not None:
            self.head.load_state_dict(load_head(folder, self.head_name, self.backbone).state_dict())

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Load a full checkpoint with its head, or a LoRA adapter with its head on the base that its config names.

        Args:
            kwargs: go to base.loading.load_model.

        Raises:
            InputError: the head or weights are missing, or the adapter was trained on another base than the one it
                names.
        """
        metadata = head_metadata(model_name_or_path, cls.head_name)
        check_same_base(model_name_or_path, metadata, base_model_path(model_name_or_path))
        of_others = cls.head_name == REWARD_HEAD and checkpoint_file(model_name_or_path, REWARD_HEAD) is None
        model = load_model(model_name_or_path, **{"dtype": torch.float32, **kwargs}, with_other_head=of_others)
        return cls(model, load_head(model_name_or_path, cls.head_name, model))


def freeze_lm_head(core: nn.Module) -> None:
    """Freeze an lm_head that no loss reaches: DDP waits for every gradient. A tied one belongs to the embeddings."""
    lm_head = core.get_output_embeddings()
    if lm_head is not None and lm_head.weight is not core.get_input_embeddings().weight:
        lm_head.requires_grad_(False)
