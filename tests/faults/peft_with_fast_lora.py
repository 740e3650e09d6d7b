"""A pytest plugin that lets peft's own tests run on this project's LoRA layer (base/fast_lora.py). They are in peft's source distribution:

    pip download --no-deps --no-binary :all: peft==VERSION && tar xzf peft-VERSION.tar.gz
    mv peft-VERSION/tests peft-VERSION/peft_tests && touch peft-VERSION/peft_tests/__init__.py    # they import each other as a package
    PYTHONPATH=. python -m pytest -o addopts= -p tests.faults.peft_with_fast_lora peft-VERSION/peft_tests/test_custom_models.py -k "lora or Lora"

They also need diffusers, parameterized, requests and scipy. `--layer peft` runs them on peft's own layer: what fails there, too, is not ours
(without a hub, every test that loads a model from it).
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTuner

from base import fast_lora

layers = 0  # how many became fast


def _then_fast(inject: Any) -> Any:
    def inject_adapter(self: BaseTuner, model: Any, *args: Any, **kwargs: Any) -> Any:
        global layers
        result = inject(self, model, *args, **kwargs)
        before = sum(type(m) is fast_lora.LoraLinear for m in model.modules())
        fast_lora.use_fast_lora(model)
        layers += sum(type(m) is fast_lora.LoraLinear for m in model.modules()) - before
        return result

    return inject_adapter


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which layer to test."""
    parser.addoption("--layer", choices=["fast", "peft"], default="fast")


def pytest_configure(config: pytest.Config) -> None:
    """Every adapter that peft injects from here on computes as ours."""
    if config.getoption("--layer") == "fast":
        BaseTuner.inject_adapter = _then_fast(BaseTuner.inject_adapter)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many layers were tested: 0 would mean that nothing was."""
    terminalreporter.write_line(f"LoRA layers that became fast: {layers}")
