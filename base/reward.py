"""Scalar heads on any family's backbone: reward models, and the policy with its value function.

    rewards = VLRewardModel.from_pretrained("runs/rm")(**inputs, completion_index=last_token_positions(segment_ids))  # (R,)

A head is one row of weights over the hidden states that lm_head reads. It is saved beside the weights or the adapter, in a file of its own, so
that the folder stays an ordinary checkpoint for AutoModelForImageTextToText or PeftModel.
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
import contextlib
import copy
import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput, cached_file

from base.errors import InputError

REWARD_HEAD = "reward_head.safetensors"
VALUE_HEAD = "value_head.safetensors"
VALUE_ADAPTER = (
    "value_function"  # adapter name, and folder of its weights beside the policy's; BERT calls a layer "value"
)

Row = dict[str, Any]


def last_token_positions(segment_ids: Tensor) -> Tensor:
    """Flat position b * L + t of the last real token of each response, never of padding: (B, L) -> (R,) long.

    For packed and plain rows alike; responses are counted row by row, as in `packing.pack_rows`.
    """
    following = torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1)
    return ((segment_ids > 0) & (following != segment_ids)).flatten().nonzero()[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Several adapters on one base
# ---------------------------------------------------------------------------------------------------------------------


def _switches(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextlib.contextmanager
def adapter_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with one adapter of a peft model, or with none.

    peft's own set_adapter and disable_adapter also switch `requires_grad`, which would freeze the adapters that train beside.
    """
    layers = _switches(model)
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    try:
        for m in layers:
            m._active_adapter, m._disable_adapters = [name] if name is not None else m._active_adapter, name is None
        yield
    finally:
        for m, (active, disabled) in zip(layers, before, strict=True):
            m._active_adapter, m._disable_adapters = active, disabled


def adapter_now(model: nn.Module) -> str | None:
    """The adapter that is active, or None."""
    layer = next(iter(_switches(model)), None)
    return None if layer is None or layer._disable_adapters else layer.active_adapters[0]


def _recompute_with_same_adapter(model: nn.Module) -> tuple[Any, Any]:
    # Gradient checkpointing runs layers again during backward, when another adapter is active than in their forward.
    return contextlib.nullcontext(), adapter_active(model, adapter_now(model))


# ---------------------------------------------------------------------------------------------------------------------
# Heads on disk
# ---------------------------------------------------------------------------------------------------------------------


def scalar_head(backbone: nn.Module) -> nn.Linear:
    """A fresh head: D -> 1, no bias, std 1 / sqrt(D + 1) (Stiennon et al., 2009.01325)."""
    hidden_size = backbone.config.get_text_config().hidden_size
    head = nn.Linear(hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head


def _file(folder: str, name: str) -> Path | None:
    """A file of a checkpoint folder or hub repository, or None."""
    if os.path.isdir(folder):
        path = Path(folder) / name
        return path if path.is_file() else None
    found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def load_head(folder: str, name: str, backbone: nn.Module) -> nn.Linear:
    """Read a head that was trained on a backbone of this size.

    Raises:
        InputError: the file is missing, or the head is of another size.
    """
    path = _file(folder, name)
    if path is None:
        script = "train_rm.py" if name == REWARD_HEAD else "train_ppo.py"
        raise InputError(f"{folder} has no {name}: give the output folder of {script}, or train a reward model first.")
    head = scalar_head(backbone)
    with safe_open(path, "pt") as file:
        weight = file.get_tensor("weight")
    if weight.shape != head.weight.shape:
        raise InputError(
            f"{path} is a head for hidden size {weight.shape[1]}, the model has {head.weight.shape[1]}: they were not trained together."
        )
    head.weight = nn.Parameter(weight.float())
    return head


def head_metadata(folder: str, name: str = REWARD_HEAD) -> dict[str, str]:
    """What was saved beside a head: `base`, the fingerprint of the checkpoint that its adapter was trained on."""
    path = _file(folder, name)
    if path is None:
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def checkpoint_fingerprint(model_name_or_path: str) -> str | None:
    """Identity of a checkpoint's weights: names, shapes and some bytes of every tensor. None if there is no safetensors file.

    Two checkpoints of one family differ, and so does one that was trained on in place; loading in another dtype or quantised does not matter.
    """
    index = _file(model_name_or_path, "model.safetensors.index.json")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else ["model.safetensors"]
    digest = hashlib.sha256()
    for name in names:
        path = _file(model_name_or_path, name)
        if path is None:
            return None
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
            for tensor, info in sorted(header.items()):
                if tensor == "__metadata__":
                    continue
                begin, end = info["data_offsets"]
                file.seek(8 + size + (begin + end) // 2 // 16 * 16)
                digest.update(
                    json.dumps([tensor, info["dtype"], info["shape"]]).encode() + file.read(min(64, end - begin))
                )
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class _HeadModel(nn.Module):
    """A backbone (maybe wrapped by peft) with a scalar head, as transformers.Trainer needs it."""

    head_name: str

    def __init__(self, backbone: nn.Module, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head if head is not None else scalar_head(backbone)
        self.head.to(next(backbone.parameters()).device)

    @property
    def core(self) -> nn.Module:
        """The adapter's model inside peft."""
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.core.is_activation_checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As transformers', safe with several adapters in one forward."""
        settings = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        if isinstance(self.backbone, PeftModel):
            settings["context_fn"] = functools.partial(_recompute_with_same_adapter, self.backbone)
        self.core.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **kwargs)

    def apply_head(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """(N, D) -> (N,) float32."""
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()

    def save_pretrained(self, save_directory: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Save backbone or adapter as transformers and peft do, and the head beside.

        Args:
            state_dict: of this whole module, gathered by the caller (ZeRO-3).
        """
        self._save_backbone(save_directory, _part(state_dict, "backbone."), **kwargs)
        weight = self.head.weight if state_dict is None else state_dict["head.weight"]
        save_head(self.backbone, weight, save_directory, self.head_name)

    def _save_backbone(self, save_directory: str, state_dict: dict[str, Tensor] | None, **kwargs: Any) -> None:
        self.backbone.save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def load_checkpoint(self, folder: str) -> None:
        """Take over the weights that `save_pretrained` wrote, to resume."""
        load_weights(self.backbone, folder)
        self.head.load_state_dict(load_head(folder, self.head_name, self.backbone).state_dict())

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Load a full checkpoint with its head, or a LoRA adapter with its head on the base that adapter_config.json names.

        Args:
            kwargs: go to models.load_model.

        Raises:
            InputError: the head or weights are missing, or the adapter was trained on another base than the one it names.
        """
        from models import base_model_path, load_model  # models imports this module

        metadata = head_metadata(model_name_or_path, cls.head_name)
        check_same_base(model_name_or_path, metadata, base_model_path(model_name_or_path))
        model = load_model(model_name_or_path, **{"dtype": torch.float32, **kwargs})
        return cls(model, load_head(model_name_or_path, cls.head_name, model))


class VLRewardModel(_HeadModel):
    """Any backbone with a linear head on the hidden state of each response's last real token."""

    head_name = REWARD_HEAD

    def __init__(self, backbone: nn.Module, head: nn.Linear | None = None) -> None:
        super().__init__(backbone, head)
        _freeze_lm_head(self.core)

    def forward(self, completion_index: Tensor, **inputs: Any) -> Tensor:
        """Rewards (N,) float32 at flat positions b * L + t.

        Args:
            completion_index: (N,), see `last_token_positions`.
            inputs: what `packed_inputs` of the backbone returns.
        """
        return self.apply_head(self.head, self.backbone(**inputs, completion_index=completion_index).hidden)


def _part(state_dict: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if state_dict is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def save_head(backbone: nn.Module, weight: Tensor, folder: str, name: str) -> None:
    """Write a head, and the fingerprint of the base of its adapter."""
    metadata = {}
    if isinstance(backbone, PeftModel):
        base = backbone.peft_config[backbone.active_adapter].base_model_name_or_path
        metadata["base"] = (checkpoint_fingerprint(base) if base else None) or ""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight.detach().float().cpu().contiguous()}, Path(folder) / name, metadata)


def check_same_base(folder: str, metadata: dict[str, str], base: str) -> None:
    """Raise InputError if the adapter in `folder` was trained on another checkpoint than `base`."""
    trained_on = metadata.get("base")
    if trained_on and (found := checkpoint_fingerprint(base)) and found != trained_on:
        raise InputError(
            f"The adapter in {folder} was trained on other weights than those of {base}: give the base that it was trained on, "
            "or train it anew."
        )


def load_weights(backbone: nn.Module, folder: str, adapter_name: str = "default") -> None:
    """Overwrite the weights of a model, or of one adapter, with those saved in `folder`."""
    if isinstance(backbone, PeftModel):
        set_peft_model_state_dict(backbone, load_peft_weights(folder, device="cpu"), adapter_name=adapter_name)
        return
    from models import load_model  # names on disk differ from names in memory: load as from_pretrained does

    fresh = load_model(folder, dtype=next(backbone.parameters()).dtype)
    backbone.load_state_dict(fresh.state_dict())


@torch.no_grad()
def score_rows(
    model: VLRewardModel,
    processor: Any,
    rows: Sequence[Row],
    batch_size: int = 8,
    share_prefix: bool = True,
    dummy_images: dict[str, Any] | None = None,
) -> list[list[float]]:
    """Reward of every response of preference rows.

    Args:
        model, processor: of one checkpoint.
        rows: columns `images`, `prompt`, `responses`.
        dummy_images: of VLProcessor, under ZeRO-3: what the vision tower runs on where a batch has no image.

    Returns:
        For each row one number per response, in order.
    """
    from base.collator import VLRMDataCollatorWithPadding
    from models import core_mapper_for

    try:
        collator_class = core_mapper_for(model.core.config.name_or_path).reward_collator
    except InputError:
        collator_class = VLRMDataCollatorWithPadding
    collator = collator_class(processor, share_prefix=share_prefix)
    model.eval()
    scores: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = collator.encode_rows(chunk)
        image_inputs = model.core.encode_images(to_device(batch["img_input_dict"], model.device))
        if dummy_images is not None and batch["img_input_dict"].get("pixel_values") is None:
            model.core.encode_images(to_device(dummy_images, model.device))
        segment_ids = batch["segment_ids"].to(model.device)
        inputs = model.core.packed_inputs(
            batch["input_ids"].to(model.device), segment_ids, image_inputs, batch["packed"]
        )
        rewards = iter(model(**inputs, completion_index=last_token_positions(segment_ids)).tolist())
        scores += [[next(rewards) for _ in row["responses"]] for row in chunk]
    return scores


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, ModelOutput):
        return type(value)(**{k: to_device(v, device) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return type(value)(to_device(v, device) for v in value) if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# PPO: one base, many hats
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PolicyOutput(ModelOutput):
    """What the policy and the value function say about N response tokens.

    Attributes:
        logps: (N,) float32 log-probs of the tokens at the sampling temperature.
        entropy: (N,) float32, of the next-token distributions, if asked for.
        state_values: (N,) float32, value of the state before each token. (`values` would hide dict.values, which DDP and DeepSpeed call.)
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    state_values: Tensor | None = None


POLICY, REFERENCE = "policy", "reference"


class VLModelWithValueHead(_HeadModel):
    """The policy with its value function and, on the same base, reference and reward models as adapters.

    With LoRA the policy is the adapter "default", the value function the adapter "value_function" (or the policy's trunk) with a head, the reference
    the base with no adapter (or the adapter "ref"), and a reward model an adapter with a head: one base in memory wears all hats. With full
    fine-tuning the value function has the policy's trunk or a backbone of its own.
    """

    head_name = VALUE_HEAD

    def __init__(
        self, backbone: nn.Module, head: nn.Linear | None = None, value_backbone: nn.Module | None = None
    ) -> None:
        super().__init__(backbone, head)
        self.value_backbone = value_backbone
        self.reward_heads = nn.ModuleDict()
        # TRL would switch gradient checkpointing off and on around generation; layers only use it in training mode.
        self.is_gradient_checkpointing = False

    # -- building ---------------------------------------------------------------------------------------------------------

    @property
    def separate_value(self) -> bool:
        """Whether the value function has weights of its own besides the head."""
        return self.value_backbone is not None or VALUE_ADAPTER in getattr(self.backbone, "peft_config", {})

    def add_value_function(self, init_from: str | None = None) -> None:
        """Give the value function weights of its own: a second adapter, or with full fine-tuning a second backbone.

        Args:
            init_from: output folder of train_rm.py that it starts from, head included; None starts as the policy does, with a fresh head.
        """
        from models import load_model

        if isinstance(self.backbone, PeftModel):
            if init_from is None:
                config = copy.copy(self.backbone.peft_config["default"])
                config.modules_to_save = None
                config.inference_mode = False
                self.backbone.add_adapter(VALUE_ADAPTER, config)
            else:
                self.backbone.load_adapter(init_from, adapter_name=VALUE_ADAPTER, is_trainable=True)
            self.backbone.set_adapter("default")
            for name, parameter in self.backbone.named_parameters():
                if f".{VALUE_ADAPTER}." in name:
                    parameter.requires_grad_(True)
        else:
            path = init_from or self.core.config.name_or_path
            self.value_backbone = load_model(path, dtype=next(self.backbone.parameters()).dtype)
            _freeze_lm_head(self.value_backbone)
        if init_from is not None:
            self.head = load_head(init_from, REWARD_HEAD, self.backbone).to(self.device)

    def add_reward_adapter(self, folder: str, base: str) -> str:
        """Hang a reward model's adapter and head on the policy's base; return the name of the hat.

        Raises:
            InputError: the folder holds no adapter or no head, or was trained on another base than `base`.
        """
        if not isinstance(self.backbone, PeftModel):
            raise InputError(
                "--reward_adapter needs --use_lora True: the policy's own weights move, so give --reward_model_name_or_path."
            )
        if _file(folder, "adapter_config.json") is None:
            raise InputError(
                f"{folder} has no adapter_config.json: a reward model of its own goes to --reward_model_name_or_path."
            )
        head = load_head(folder, REWARD_HEAD, self.backbone)
        check_same_base(folder, head_metadata(folder), base)
        name = f"reward_{len(self.reward_heads)}"
        self.backbone.load_adapter(folder, adapter_name=name, is_trainable=False)
        self.backbone.set_adapter("default")
        for parameter_name, parameter in self.backbone.named_parameters():
            if f".{VALUE_ADAPTER}." in parameter_name:  # set_adapter froze it
                parameter.requires_grad_(True)
        self.reward_heads[name] = head.requires_grad_(False).to(self.device)
        return name

    def freeze_vision_side(self) -> None:
        """Freeze tower and projector, so that image features stay what they are for the whole run."""
        for backbone in (self.backbone, self.value_backbone):
            if backbone is not None:
                for _, parameter in _vision_side(backbone):
                    parameter.requires_grad_(False)

    def own_vision(self, hat: str) -> bool:
        """Whether a reward adapter changes the vision side: then it needs features of its own."""
        return any(f".{hat}." in name for name, _ in _vision_side(self.backbone))

    def value_has_own_vision(self) -> bool:
        """Whether the value function's vision side differs from the policy's (ZeRO-3: this rank's part): then it needs features of its own."""
        if self.value_backbone is None:
            return isinstance(self.backbone, PeftModel) and self.own_vision(VALUE_ADAPTER)
        here = lambda p: getattr(p, "ds_tensor", p).detach().cpu()  # noqa: E731
        mine = dict(_vision_side(self.backbone))
        return any(not torch.equal(here(mine[name]), here(p)) for name, p in _vision_side(self.value_backbone))

    # -- passes ------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        completion_index: Tensor,
        completion_ids: Tensor | None = None,
        hat: str = POLICY,
        temperature: float = 1.0,
        with_entropy: bool = False,
        value_inputs: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """One pass under one hat. Every pass goes through here, because DDP and DeepSpeed only see what does.

        Args:
            completion_index, completion_ids: (N,) flat positions that predict the tokens, and the tokens. For a reward hat: (R,) last tokens.
            hat: POLICY gives PolicyOutput; REFERENCE log-probs (N,); the name of a reward adapter rewards (R,).
            value_inputs: instead of `inputs` for the value function, if its vision side differs.
        """
        tokens = {"completion_index": completion_index, "completion_ids": completion_ids, "temperature": temperature}
        if hat == REFERENCE:
            ref = "ref" if "ref" in self.backbone.peft_config else None
            with adapter_active(self.backbone, ref):
                return self.backbone(**inputs, **tokens).logps
        if hat != POLICY:
            with adapter_active(self.backbone, hat):
                hidden = self.backbone(**inputs, completion_index=completion_index).hidden
            return self.apply_head(self.reward_heads[hat], hidden)
        policy = self.backbone(**inputs, **tokens, with_entropy=with_entropy)
        value_inputs = value_inputs if value_inputs is not None else inputs
        if self.value_backbone is not None:
            hidden = self.value_backbone(**value_inputs, completion_index=completion_index).hidden
        elif self.separate_value:
            with adapter_active(self.backbone, VALUE_ADAPTER):
                hidden = self.backbone(**value_inputs, completion_index=completion_index).hidden
        else:
            hidden = policy.hidden
        return PolicyOutput(logps=policy.logps, entropy=policy.entropy, state_values=self.apply_head(self.head, hidden))

    # -- disk --------------------------------------------------------------------------------------------------------------

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        super().activation_checkpointing_enable(*args, **kwargs)
        if self.value_backbone is not None:
            self.value_backbone.activation_checkpointing_enable(*args, **kwargs)

    def _save_backbone(self, save_directory: str, state_dict: dict[str, Tensor] | None, **kwargs: Any) -> None:
        if isinstance(self.backbone, PeftModel):
            mine = ["default", VALUE_ADAPTER] if self.separate_value else ["default"]
            kwargs["selected_adapters"] = mine  # not those of reference and reward
        super()._save_backbone(save_directory, state_dict, **kwargs)

    def save_pretrained(self, save_directory: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """The policy as an ordinary checkpoint; the value function's own weights in the folder `value_function` beside."""
        super().save_pretrained(save_directory, state_dict, **kwargs)
        if self.value_backbone is not None:
            self.value_backbone.save_pretrained(
                os.path.join(save_directory, VALUE_ADAPTER), state_dict=_part(state_dict, "value_backbone."), **kwargs
            )

    def load_checkpoint(self, folder: str) -> None:
        super().load_checkpoint(folder)
        value_folder = os.path.join(folder, VALUE_ADAPTER)
        if self.value_backbone is not None:
            load_weights(self.value_backbone, value_folder)
        elif self.separate_value:
            load_weights(self.backbone, value_folder, VALUE_ADAPTER)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Load the output folder of train_ppo.py: the policy, and the value function with its head."""
        model = super().from_pretrained(model_name_or_path, **kwargs)
        value_folder = os.path.join(model_name_or_path, VALUE_ADAPTER)
        if os.path.isdir(value_folder):
            if isinstance(model.backbone, PeftModel):
                model.backbone.load_adapter(value_folder, adapter_name=VALUE_ADAPTER)
                model.backbone.set_adapter("default")
            else:
                from models import load_model

                model.value_backbone = load_model(value_folder, dtype=next(model.backbone.parameters()).dtype)
        return model


def _freeze_lm_head(core: nn.Module) -> None:
    """Freeze an lm_head that no loss reaches: DDP waits for every gradient. A tied one belongs to the embeddings."""
    lm_head = core.get_output_embeddings()
    if lm_head is not None and lm_head.weight is not core.get_input_embeddings().weight:
        lm_head.requires_grad_(False)


def _vision_side(backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters outside the language model, with their names."""
    core = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
    text = {id(p) for m in (core.get_decoder(), core.get_output_embeddings()) for p in m.parameters()}
    return [(name, p) for name, p in core.named_parameters() if id(p) not in text]
