"""The policy with its value function and, on the same base, the reference and reward models of PPO."""

import copy
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import ModelOutput

from base.adapters import Role, adapter_active
from base.heads import (
    REWARD_HEAD,
    VALUE_HEAD,
    HeadModel,
    check_same_base,
    checkpoint_file,
    freeze_lm_head,
    head_metadata,
    load_head,
    sub_state_dict,
)
from base.loading import load_adapter, load_model, load_weights
from common.errors import InputError


@dataclass
class PolicyOutput(ModelOutput):
    """What the policy and the value function say about N response tokens.

    Attributes:
        logps: (N,) float32 log-probs of the tokens at the sampling temperature.
        entropy: (N,) float32, of the next-token distributions, if asked for.
        state_values: (N,) float32, value of the state before each token; None without a value function. (`values` would
            hide dict.values, which DDP and DeepSpeed call.)
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    state_values: Tensor | None = None


class VLModelWithValueHead(HeadModel):
    """The policy with its value function and, on the same base, reference and reward models as adapters.

    With LoRA one base in memory serves every role: the policy is an adapter, the value function another one (or the
    policy's trunk) with a head, the reference the base without an adapter (or a frozen one), and a reward model an
    adapter with a head; `Role` names the adapters. With full fine-tuning the value function has the policy's trunk or a
    backbone of its own; `with_value=False` leaves the value function out.
    """

    head_name = VALUE_HEAD

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear | None = None,
        value_backbone: nn.Module | None = None,
        with_value: bool = True,
    ) -> None:
        super().__init__(backbone, head, with_head=with_value)
        self.value_backbone = value_backbone
        self.reward_heads = nn.ModuleDict()
        # TRL would switch gradient checkpointing off and on around generation; layers only use it in training mode.
        self.is_gradient_checkpointing = False

    # -- building ------------------------------------------------------------------------------------------------------

    @property
    def separate_value(self) -> bool:
        """Whether the value function has weights of its own besides the head."""
        return self.value_backbone is not None or Role.VALUE.adapter in getattr(self.backbone, "peft_config", {})

    def add_value_function(self, init_from: str | None = None) -> None:
        """Give the value function weights of its own: a second adapter, or with full fine-tuning a second backbone.

        Args:
            init_from: output folder of train_rm.py that it starts from, head included; None starts as the policy does,
                with a fresh head.
        """
        if isinstance(self.backbone, PeftModel):
            if init_from is None:
                config = copy.copy(self.backbone.peft_config[Role.POLICY.adapter])
                config.modules_to_save = None
                config.inference_mode = False
                self.backbone.add_adapter(Role.VALUE.adapter, config)
            else:
                load_adapter(self.backbone, init_from, Role.VALUE.adapter, is_trainable=True)
            self._activate_policy()
        else:
            path = init_from or self.core.config.name_or_path
            dtype = next(self.backbone.parameters()).dtype
            self.value_backbone = load_model(path, dtype=dtype, with_other_head=init_from is not None)
            freeze_lm_head(self.value_backbone)
        if init_from is not None:
            self.head = load_head(init_from, REWARD_HEAD, self.backbone).to(self.device)

    def _activate_policy(self) -> None:
        """Make the policy's adapter the active one after another was added."""
        self.backbone.set_adapter(Role.POLICY.adapter)
        for name, parameter in self.backbone.named_parameters():
            if f".{Role.VALUE.adapter}." in name:  # set_adapter froze it
                parameter.requires_grad_(True)

    def add_reward_adapter(self, folder: str, base: str) -> Role:
        """Hang a reward model's adapter and head on the policy's base; return its role.

        Raises:
            InputError: the folder holds no adapter or no head, or was trained on another base than `base`.
        """
        if not isinstance(self.backbone, PeftModel):
            raise InputError(
                "--reward_adapter needs --use_lora True: the policy's own weights move, so give "
                "--reward_model_name_or_path."
            )
        if checkpoint_file(folder, "adapter_config.json") is None:
            raise InputError(
                f"{folder} has no adapter_config.json: a reward model of its own goes to --reward_model_name_or_path."
            )
        head = load_head(folder, REWARD_HEAD, self.backbone)
        check_same_base(folder, head_metadata(folder), base)
        role = Role.reward(len(self.reward_heads))
        load_adapter(self.backbone, folder, role.adapter)
        self._activate_policy()
        self.reward_heads[role.adapter] = head.requires_grad_(False).to(self.device)
        return role

    def freeze_vision_side(self) -> None:
        """Freeze tower and projector, so that image features stay what they are for the whole run."""
        for core in (self.core, self.value_backbone):
            if core is not None:
                for parameter in core.vision_parameters().values():
                    parameter.requires_grad_(False)

    def has_own_vision(self, role: Role) -> bool:
        """Whether a role needs image features of its own: its vision side differs from the policy's.

        Under ZeRO-3 each rank compares its part.
        """
        vision = self.core.vision_parameters()
        if role != Role.VALUE or self.value_backbone is None:
            return role != Role.POLICY and any(f".{role.adapter}." in name for name in vision)

        def here(p: nn.Parameter) -> Tensor:
            return getattr(p, "ds_tensor", p).detach().cpu()

        others = self.value_backbone.vision_parameters()
        return any(not torch.equal(here(vision[name]), here(p)) for name, p in others.items())

    # -- passes --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        completion_index: Tensor,
        completion_ids: Tensor | None = None,
        role: Role = Role.POLICY,
        temperature: float = 1.0,
        with_entropy: bool = False,
        value_inputs: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """One pass in one role. Every pass goes through here, because DDP and DeepSpeed only see what does.

        Args:
            completion_index, completion_ids: (N,) flat positions that predict the tokens, and the tokens. For a reward:
                (R,) last tokens.
            role: Role.POLICY gives PolicyOutput, values included; Role.REFERENCE log-probs (N,); Role.reward(n) rewards
                (R,).
            value_inputs: instead of `inputs` for the value function, if its vision side differs.
        """
        tokens = {"completion_index": completion_index, "completion_ids": completion_ids, "temperature": temperature}
        if role == Role.REFERENCE:
            ref = Role.REFERENCE.adapter if Role.REFERENCE.adapter in self.backbone.peft_config else None
            with adapter_active(self.backbone, ref):
                return self.backbone(**inputs, **tokens).logps
        if role != Role.POLICY:
            with adapter_active(self.backbone, role.adapter):
                hidden = self.backbone(**inputs, completion_index=completion_index).hidden
            return self.apply_head(self.reward_heads[role.adapter], hidden)
        policy = self.backbone(**inputs, **tokens, with_entropy=with_entropy)
        if self.head is None:
            return PolicyOutput(logps=policy.logps, entropy=policy.entropy)
        value_inputs = value_inputs if value_inputs is not None else inputs
        if self.value_backbone is not None:
            hidden = self.value_backbone(**value_inputs, completion_index=completion_index).hidden
        elif self.separate_value:
            with adapter_active(self.backbone, Role.VALUE.adapter):
                hidden = self.backbone(**value_inputs, completion_index=completion_index).hidden
        else:
            hidden = policy.hidden
        return PolicyOutput(logps=policy.logps, entropy=policy.entropy, state_values=self.apply_head(self.head, hidden))

    # -- disk ----------------------------------------------------------------------------------------------------------

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As HeadModel's, for both backbones."""
        super().activation_checkpointing_enable(*args, **kwargs)
        if self.value_backbone is not None:
            self.value_backbone.activation_checkpointing_enable(*args, **kwargs)

    def _save_backbone(self, save_directory: str, state_dict: dict[str, Tensor] | None, **kwargs: Any) -> None:
        if isinstance(self.backbone, PeftModel):
            trained = [Role.POLICY, Role.VALUE] if self.separate_value else [Role.POLICY]
            kwargs["selected_adapters"] = [role.adapter for role in trained]  # not those of reference and reward
        super()._save_backbone(save_directory, state_dict, **kwargs)

    def save_pretrained(self, save_directory: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """The policy as an ordinary checkpoint; the value function's own weights in its folder `value_function`."""
        super().save_pretrained(save_directory, state_dict, **kwargs)
        if self.value_backbone is not None:
            self.value_backbone.save_pretrained(
                os.path.join(save_directory, Role.VALUE.adapter),
                state_dict=sub_state_dict(state_dict, "value_backbone."),
                **kwargs,
            )

    def load_checkpoint(self, folder: str) -> None:
        """Take over the weights that `save_pretrained` wrote, to resume."""
        super().load_checkpoint(folder)
        value_folder = os.path.join(folder, Role.VALUE.adapter)
        if self.value_backbone is not None:
            load_weights(self.value_backbone, value_folder)
        elif self.separate_value:
            load_weights(self.backbone, value_folder, Role.VALUE.adapter)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Load the output folder of train_ppo.py: the policy, and the value function with its head."""
        model = super().from_pretrained(model_name_or_path, **kwargs)
        value_folder = os.path.join(model_name_or_path, Role.VALUE.adapter)
        if os.path.isdir(value_folder):
            if isinstance(model.backbone, PeftModel):
                load_adapter(model.backbone, value_folder, Role.VALUE.adapter)
                model.backbone.set_adapter(Role.POLICY.adapter)
            else:
                model.value_backbone = load_model(value_folder, dtype=next(model.backbone.parameters()).dtype)
        return model
