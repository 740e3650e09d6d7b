"""The fast LoRA layer allows what peft's layer allows. Expected values: peft's own layer with the same weights, and finite differences."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from base.fast_lora import LoraLinear, use_fast_lora


@pytest.fixture
def layers() -> tuple[nn.Module, nn.Module]:
    """(fast, peft's) with the same weights, float64."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model = model.double()
    fast = copy.deepcopy(model)
    use_fast_lora(fast)
    one, other = fast.base_model.model[0], model.base_model.model[0]
    assert type(one) is LoraLinear and type(other) is Linear
    return one, other


def gradients(layer: nn.Module, x: torch.Tensor, use) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    weights = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach() for y in (use(layer(x)).sum(), *torch.autograd.grad(use(layer(x)).sum(), [x, *weights]))]


INPUTS = {
    "1-D": (6,),
    "2-D": (5, 6),
    "3-D": (2, 3, 6),
    "4-D": (2, 1, 3, 6),
    "empty": (0, 6),
    "empty 3-D": (2, 0, 6),
    "one": (1, 6),
}


def in_place(h: torch.Tensor) -> torch.Tensor:
    h = h * 1 if h.is_leaf else h
    h += 1
    h *= 2
    return h.relu_()


USES = {"as it is": lambda h: h.square(), "in place": in_place, "view": lambda h: h.reshape(-1).mul_(3).square()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", INPUTS)
def test_equal_to_peft(layers, shape: str, use: str):
    x = torch.randn(INPUTS[shape], dtype=torch.float64)
    for mine, theirs in zip(*(gradients(layer, x, USES[use]) for layer in layers), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_not_contiguous(layers):
    x = torch.randn(6, 5, dtype=torch.float64).T
    for mine, theirs in zip(*(gradients(layer, x, USES["in place"]) for layer in layers), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradient_of_gradient(layers):
    fast, _ = layers
    A, B = fast.lora_A["default"].weight, fast.lora_B["default"].weight
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def product(x, A, B):
        return torch.func.functional_call(fast, {"lora_A.default.weight": A, "lora_B.default.weight": B}, (x,)).square()

    assert torch.autograd.gradcheck(product, (x, A, B))
    assert torch.autograd.gradgradcheck(product, (x, A, B))


def test_vmap_and_function_transforms(layers):
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    for transformed in (
        lambda layer: torch.func.vmap(layer)(x),
        lambda layer: torch.func.grad(lambda y: layer(y).square().sum())(x),
        lambda layer: torch.func.vmap(torch.func.grad(lambda y: layer(y).square().sum()))(x),
        lambda layer: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
        lambda layer: torch.func.hessian(lambda y: layer(y).square().sum())(x[0, 0]),
    ):
        torch.testing.assert_close(*(transformed(layer) for layer in layers))


def test_forward_mode(layers):
    x, tangent = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    found = []
    for layer in layers:
        with torch.autograd.forward_ad.dual_level():
            out = layer(torch.autograd.forward_ad.make_dual(x, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0], torch.zeros_like(found[0]))
