"""Whole steps of all trainers on a device that is not the CPU: nothing is on the wrong device, and the host seldom waits.

That the device sees the faults that it is for is shown first.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import base.ppo_trainer
import base.trainer
from models import MODEL_NICKNAME_MAP
from tests import zoo
from tests.pretend_device import DeviceError, PretendDevice, Wait
from tests.test_equivalence import ragged_rows, trainer_of
from tests.test_ppo import ppo_trainer, prompt_rows

NAMES = [*MODEL_NICKNAME_MAP.values(), "pixtral"]
FEW = ["llava", "qwen3_vl", "lfm2_vl"]  # a plain one, M-RoPE with deepstack features, rows that are not packed
LORA = "--use_lora True --lora_dropout 0 --lora_r 4 --optim adamw_torch_fused"
# Waits of a step and its log: at lines of the project, and inside of what it calls (models, Trainer, accelerate) but not of image features.
# Upper bounds over all families. PPO's step is an update: rollouts of six tokens, four optimizer steps.
MOST = {"sft": (5, 20), "dpo": (8, 30), "rm": (10, 20), "ppo": (93, 170)}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps the device of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def on(device: PretendDevice, values: list) -> Tensor:
    return torch.tensor(values).to(device.device)


VALUES = [1.0, 0.0, 3.0]
WAITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x[0].item(), "_local_scalar_dense"),
    "float": (lambda x: float(x.sum()), "_local_scalar_dense"),
    "bool": (lambda x: 1 if x.any() else 0, "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "cpu": (lambda x: x.cpu(), "copy to the CPU"),
    "copy_": (lambda x: torch.zeros(3).copy_(x), "copy to the CPU"),
    "boolean indexing": (lambda x: x[x > 0], "boolean indexing"),
    "values by a mask": (lambda x: x.clone().index_put_((x > 0,), x[:2]), "boolean indexing"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "equal": (lambda x: torch.equal(x, x + 1), "equal"),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
    "list of tensors": (lambda x: torch.tensor([x[0], x[1]]), "tensor"),
    "print": (lambda x: repr(x), "__repr__"),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait(name: str):
    call, kind = WAITS[name]
    with PretendDevice() as device:
        x = on(device, VALUES)
        assert not device.waits
        call(x)
        found = {wait.kind for wait in device.waits}
        device.waits.clear()
        call(torch.tensor(VALUES))  # the CPU is not waited for
    assert kind in found and not device.waits
    line = WAITS[name][0].__code__.co_firstlineno
    with PretendDevice() as device:
        call(on(device, VALUES))
    assert any(str(wait).endswith(f"tests/test_pretend_device.py:{line}") for wait in device.waits)


def test_what_does_not_make_it_wait():
    with PretendDevice() as device:
        x = on(device, VALUES)
        mask = x > 0
        results = [
            torch.where(mask, x, 0), x.masked_fill(mask, 0), x.new_zeros(3).masked_scatter(mask, x), x[x.long() % 3], x[1:],
            x.index_put((mask,), x.new_zeros(())), x.sum(), x * torch.tensor(2.0), torch.zeros(3, device=x.device), torch.zeros_like(x),
            torch.arange(3, device=x.device)[:, None] + x, x.repeat_interleave(2), nn.functional.one_hot(x.long(), 4),
            x.new_tensor([1.0]), copy.deepcopy(x), x.to(torch.float64), nn.Linear(3, 2).to(x.device)(x),
        ]  # fmt: skip
        assert not device.waits and all(r.device == device.device and r.is_cuda for r in results)
        assert [u.kind for u in device.uploads] == ["copy", "data", "copy", "copy"]  # x, new_tensor, the layer
        behind = x.to("cpu", non_blocking=True)
        assert behind.device.type == "cpu" and not device.waits
        weight = x.clone().requires_grad_(True)
        (weight * x).sum().backward()
        assert device.holds(weight.grad) and not device.waits


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda x, cpu: x + cpu,
    "stack with a number": lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
    "in place, on the CPU": lambda x, cpu: cpu.sum().add_(x.sum()),
    "where": lambda x, cpu: torch.where(cpu > 0, x, 0),
    "layer": lambda x, cpu: nn.functional.linear(x, cpu),
    "embedding": lambda x, cpu: nn.functional.embedding(x.long() * 0, cpu[:, None]),
    "a range of the CPU": lambda x, cpu: x + torch.arange(len(x)),
    "index on the device of a tensor that is not": lambda x, cpu: cpu[x.long() % 3],
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_raise(name: str):
    with PretendDevice() as device:
        MIXED[name](torch.tensor(VALUES), torch.tensor(VALUES))
        x = on(device, VALUES)
        MIXED[name](x, on(device, VALUES)) if name != "a range of the CPU" else None
        with pytest.raises(DeviceError, match="of the device, and of the CPU"):
            MIXED[name](x, torch.tensor(VALUES))


def test_collectives_take_tensors_of_the_device():
    with PretendDevice() as device:
        accelerator = Accelerator()
        accelerator.reduce(on(device, VALUES))
        for call in (accelerator.reduce, accelerator.gather, torch.distributed.all_reduce):
            with pytest.raises(DeviceError, match="in a collective"):
                call(torch.tensor(VALUES))


class Step(transformers.TrainerCallback):
    """What the device saw between the start of training and the first log."""

    def __init__(self, device: PretendDevice) -> None:
        self.device = device
        self.first = self.last = 0

    def on_train_begin(self, *args, **kwargs) -> None:
        self.first = len(self.device.waits)

    def on_log(self, *args, **kwargs) -> None:
        self.last = self.last or len(self.device.waits)

    @property
    def waits(self) -> list[Wait]:
        return self.device.waits[self.first : self.last]


def no_reward(responses: list[str], **_) -> list[float]:
    return [float(len(r)) for r in responses]


def one_step(
    device: PretendDevice, script: str, family: str, image_dir: Path, out: Path, flags: str = ""
) -> list[Wait]:
    """A run of one step; how often its host waits for the device."""
    flags = f"{LORA} {flags}"
    if script == "ppo":
        flags += f" --reward_fn {__file__}:no_reward"
        trainer = ppo_trainer(zoo.checkpoint(family), prompt_rows(image_dir, 4), out, flags)
    else:
        rows = [row for row in ragged_rows(image_dir) if row["images"]]
        trainer = trainer_of(script, zoo.checkpoint(family), rows, out, f"{flags} --per_device_train_batch_size 4")
    step = Step(device)
    trainer.add_callback(step)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert all(device.holds(p) for p in trainer.model.parameters())
    return step.waits


def counted(waits: list[Wait]) -> tuple[Counter[str], Counter[str]]:
    """Waits by line: of the project itself, and of what it calls, image features of transformers left out."""
    own = Counter(str(wait) for wait in waits if wait.inside is None)
    return own, Counter(str(wait) for wait in waits if wait.inside is not None and not wait.in_vision)


@pytest.mark.parametrize("script", MOST)
@pytest.mark.parametrize("family", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_step_on_a_device(family: str, script: str, image_dir: Path, tmp_path: Path):
    """Mixed devices and tensors of the CPU in collectives would have raised."""
    with PretendDevice() as device:
        waits = one_step(device, script, family, image_dir, tmp_path)
    for found, most in zip(counted(waits), MOST[script], strict=True):
        assert 0 < found.total() <= most, "\n".join(f"{n} {what}" for what, n in found.most_common())


def test_a_metric_of_the_cpu_is_seen(image_dir: Path, tmp_path: Path, monkeypatch):
    """PPO once made its KL coefficient on the CPU, which NCCL refuses to reduce."""
    found = base.ppo_trainer.rollout_metrics

    def faulty(rollouts, kl_coef: float, *rest) -> dict[str, Tensor]:
        return found(rollouts, kl_coef, *rest) | {"objective/kl_coef": torch.tensor([kl_coef])}

    monkeypatch.setattr(base.ppo_trainer, "rollout_metrics", faulty)
    with PretendDevice() as device, pytest.raises(DeviceError):
        one_step(device, "ppo", "llava", image_dir, tmp_path)


@pytest.mark.parametrize("fault", ["mixed", "waits"])
def test_a_fault_in_a_loss_is_seen(fault: str, image_dir: Path, tmp_path: Path, monkeypatch):
    mean = base.trainer.sample_mean

    def mixed(per_pair: Tensor, count: Tensor) -> Tensor:
        return mean(per_pair * torch.ones(len(per_pair)), count)

    def waits(per_pair: Tensor, count: Tensor) -> Tensor:
        assert per_pair[per_pair > 0].tolist() and count.item()
        return mean(per_pair, count)

    monkeypatch.setattr(base.trainer, "sample_mean", {"mixed": mixed, "waits": waits}[fault])
    with PretendDevice() as device:
        if fault == "mixed":
            with pytest.raises(DeviceError, match="of the device, and of the CPU"):
                one_step(device, "dpo", "llava", image_dir, tmp_path)
            return
        found = one_step(device, "dpo", "llava", image_dir, tmp_path)
    line = f"tests/test_pretend_device.py:{waits.__code__.co_firstlineno + 1}"
    assert {w.kind for w in found if w.line == line} == {"boolean indexing", "tolist", "_local_scalar_dense"}
