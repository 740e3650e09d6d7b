"""peft's LoRA product with the low-rank part accumulated into the frozen one: the same numbers, fewer passes over wide tensors.

peft computes `base(x) + lora_B(lora_A(x)) * scaling`: the product, its scaling and the sum are three tensors as wide as the output, and autograd
adds one as wide as the input. Here both low-rank products are accumulated by the matrix product itself (BLAS beta = 1), forward and backward.
What is stored and saved is peft's: only the class of the layers in memory differs. `--fast_lora False` keeps peft's class.
"""

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def _product(
    flat: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """flat (N, in), weight (out, in), bias (out,), A (r, in), B (out, r) -> y (N, out), x Aᵀ (N, r)."""
    low = flat @ A.T
    return nn.functional.linear(flat, weight, bias).addmm_(low, B.T, alpha=scaling), low


class _LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with gradients to x, A and B. LoRA, 2106.09685 eq. 3."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        """x (..., in) and the rest as `_product` -> (..., out)."""
        out, low = _product(x.reshape(-1, x.shape[-1]), weight, bias, A, B, scaling)
        ctx.save_for_backward(x, low, weight, A, B)
        ctx.scaling = scaling
        # Not `view`: nobody could add in place to a view that was made in here.
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, A, B = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])  # (N, out)
        if torch.is_grad_enabled():  # a gradient of gradients: nothing in place, and `low` as a function of x and A
            low = flat @ A.T
            low_grad = (grad @ B) * ctx.scaling
            x_grad = (grad @ weight + low_grad @ A).view(x.shape)
            return x_grad, None, None, low_grad.T @ flat, (grad.T @ low) * ctx.scaling, None
        low_grad = (grad @ B) * ctx.scaling  # (N, r)
        x_grad = (grad @ weight).addmm_(low_grad, A).view(x.shape) if ctx.needs_input_grad[0] else None
        A_grad = low_grad.T @ flat if ctx.needs_input_grad[3] else None
        B_grad = (grad.T @ low).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return x_grad, None, None, A_grad, B_grad, None


def _transformed() -> bool:
    """Whether vmap, functorch's grad or forward-mode differentiation is at work, which need operations that torch knows."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


class LoraLinear(Linear):
    """peft's LoRA layer, which hands the common case to `_LoraProduct` and everything else to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out), peft's numbers."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        name, device = active[0], x.device.type
        base, A, B, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        ours = (
            base.weight.dtype == dtype
            and (autocast or A.weight.dtype == dtype)
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and B.bias is None
            and not _transformed()
            and (isinstance(dropout, nn.Identity) or not (dropout.training and dropout.p))
            # ZeRO-3 and other tools reach weights through the hooks of the modules that own them.
            and not any(m._forward_pre_hooks or m._forward_hooks for m in (base, A, B))
        )
        if not ours:
            return super().forward(x, *args, **kwargs)
        x, rest = x.to(dtype), (base.weight, base.bias, A.weight.to(dtype), B.weight.to(dtype), self.scaling[name])
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if torch.is_grad_enabled():
                return _LoraProduct.apply(x, *rest)
            # Every token of a rollout: without Function.apply and autocast 8 rows of 512 take 115 instead of 136 us on a CPU.
            out, _ = _product(x.reshape(-1, x.shape[-1]), *rest)
            return out.view(*x.shape[:-1], -1)


def use_fast_lora(model: nn.Module) -> None:
    """Let every plain LoRA layer of a model compute as `LoraLinear`. LoRA on quantised layers, or on subclasses of nn.Linear, stays peft's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
