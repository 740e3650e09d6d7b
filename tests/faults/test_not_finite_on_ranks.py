"""NaN on one of two ranks under DeepSpeed: both stop with the same sentence, and none of it is saved."""

import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file

from common.tensors import first_not_finite
from tests.test_distributed import LAUNCH, launch

MODES = {"full": "", "lora": "--use_lora True --lora_r 4"}
# Under DeepSpeed, which steps by itself, the first bad step stops the run.
SAID = {
    "loss": r"Step 2 has a loss or gradient that is not finite\. Its rows: .*pairs\.json",
    "gradient": r"Step 2 has a loss or gradient that is not finite\. Its rows: .*pairs\.json",
    "weight": r"The weights after step 2 are not finite",
}


def finite(out: Path) -> bool:
    saved = [(n, t) for f in out.rglob("*.safetensors") for n, t in load_file(f).items()]
    # DeepSpeed's files name classes of its own, which are let through by name; nothing else is executed.
    states = [f for f in out.rglob("*_states.pt")]
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        optimizer = [t for f in states for t in _tensors(torch.load(f, weights_only=True))]
    return bool(saved) and first_not_finite([*saved, *((f"{i}", t) for i, t in enumerate(optimizer))]) is None


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for v in inside for t in _tensors(v)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup, mode, what",
    [
        ("zero2", "full", "loss"),
        ("zero2", "lora", "gradient"),
        ("zero2", "lora", "weight"),
        ("zero3", "lora", "loss"),
        ("zero3", "full", "gradient"),
        ("zero3", "full", "weight"),
    ],
)
def test_one_rank_breaks(command, tmp_path: Path, setup: str, mode: str, what: str):
    launcher, flags = LAUNCH[setup]
    saving = "--max_steps 4 --per_device_train_batch_size 2 --save_strategy steps --save_steps 1 --ddp_timeout 120"
    out = tmp_path / "out"
    argv = command("dpo", f"{saving} {MODES[mode]} {flags}", out=out)
    launch(launcher, [{"name": "a", "script": "dpo", "argv": argv, "break": [2, 1, what], "refused": True}], tmp_path)
    for rank in (0, 1):
        said = (tmp_path / f"jobs.said-{rank}").read_text()
        assert re.search(SAID[what], said) or (what == "weight" and "on another process" in said)
        assert "checkpoint-1, is whole" in said
    assert finite(out) and [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not [*out.glob("*.safetensors")]
    json.loads((out / "checkpoint-1" / "trainer_state.json").read_text(), parse_constant=lambda c: pytest.fail(c))
