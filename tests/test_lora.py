"""base/fast_lora.py: peft's numbers, gradients and files from fewer passes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from base.fast_lora import LoraLinear, _LoraProduct, use_fast_lora
from tests.test_dpo import LORA, dpo_trainer, losses


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    """The same network with peft's layers and with ours; no adapter is zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b"], init_lora_weights=False)
    peft_net = get_peft_model(Net(), config)
    own_net = copy.deepcopy(peft_net)
    use_fast_lora(own_net)
    assert {type(m) for m in own_net.modules() if isinstance(m, Linear)} == {LoraLinear}
    return peft_net, own_net


def outputs_and_gradients(net: nn.Module, x: torch.Tensor, run=lambda net, x: net(x)) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    net.zero_grad()
    out = run(net, x)
    out.float().pow(2).sum().backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert gradients
    return {"out": out.detach(), "x": x.grad, **gradients}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Counts the products that do not go to peft."""
    made, apply = [], _LoraProduct.apply
    monkeypatch.setattr(_LoraProduct, "apply", lambda *args: made.append(1) or apply(*args))
    return made


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        torch.testing.assert_close(mine[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_gradients_in_float64():
    torch.manual_seed(0)
    x, W, b, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)))
    trained = [t.requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradcheck(lambda x, A, B: _LoraProduct.apply(x, W, b, A, B, 0.7), trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_peft(nets, calls, checkpointing: bool):
    x = torch.randn(3, 5, 12)
    run = (lambda net, x: checkpoint(net, x, use_reentrant=False)) if checkpointing else lambda net, x: net(x)
    theirs = outputs_and_gradients(nets[0], x, run)
    assert not calls
    assert_equal(outputs_and_gradients(nets[1], x, run), theirs, rtol=1e-5, atol=1e-6)
    assert len(calls) == (4 if checkpointing else 2)


@torch.no_grad()
def test_the_same_without_gradients(nets, calls):
    """As in rollouts: bit for bit, and without the autograd function."""
    x, net = torch.randn(3, 5, 12), nets[1]
    found = net(x)
    assert not calls
    with torch.enable_grad():
        recorded = net(x)
    assert len(calls) == 2 and recorded.requires_grad and torch.equal(found, recorded)


def test_equals_peft_under_autocast(nets, calls):
    """bf16 base, float32 adapters: what --bf16 --use_lora trains. Only the rounding of bf16 may differ."""
    for net in nets:
        for name, parameter in net.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    x = torch.randn(3, 5, 12)
    theirs = outputs_and_gradients(nets[0], x, run)
    mine = outputs_and_gradients(nets[1], x, run)
    assert len(calls) == 2
    exact = outputs_and_gradients(nets[0].float(), x)
    for name, value in exact.items():  # as close to the exact numbers as peft's
        error = {
            side: (of[name].float() - value).norm() / value.norm() for side, of in (("own", mine), ("peft", theirs))
        }
        assert error["own"] < 1.5 * error["peft"] + 1e-3, (name, error)


def test_one_switch_keeps_the_layers_of_peft(llava, preference_data, tmp_path):
    """--fast_lora False: other classes in memory, the same training."""
    found = {}
    for fast in (True, False):
        trainer = dpo_trainer(llava, preference_data, tmp_path, f"{LORA} --fast_lora {fast}")
        layers = {type(m) for m in trainer.model.modules() if isinstance(m, Linear)}
        assert layers == {LoraLinear if fast else Linear}
        found[fast] = losses(trainer)
    assert found[True][0] != found[True][-1]
    assert found[False] == pytest.approx(found[True], abs=1e-5)


def test_the_rest_is_left_to_peft(nets, calls):
    peft_net, own_net = nets
    x = torch.randn(3, 12)
    with peft_net.disable_adapter(), own_net.disable_adapter():
        assert torch.equal(own_net(x), peft_net(x))
    for net in nets:  # a second adapter, alone and together with the first
        net.add_adapter("second", LoraConfig(r=2, target_modules=["a"], lora_dropout=0.5, init_lora_weights=False))
    own_net.load_state_dict(peft_net.state_dict())
    assert not calls
    for active, fast in ((["default"], 2), (["second"], 0), (["default", "second"], 1)):
        calls.clear()
        for net in nets:
            net.base_model.set_adapter(active)
        torch.manual_seed(1)
        theirs = outputs_and_gradients(peft_net, x)
        torch.manual_seed(1)
        assert_equal(outputs_and_gradients(own_net, x), theirs, rtol=1e-5, atol=1e-6)
        assert len(calls) == fast, active


def test_saves_and_merges_as_peft(nets, tmp_path):
    x = torch.randn(3, 12)
    for net, name in zip(nets, ("peft", "own"), strict=True):
        net.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "own")]
    assert files[0] == files[1]
    before = nets[1](x)
    torch.testing.assert_close(nets[1].merge_and_unload()(x), before)
