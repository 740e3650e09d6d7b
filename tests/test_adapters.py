"""LoRA adapters as others save them: every weight finds its place or the run stops, wherever an adapter is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import train_dpo
import train_rm
from args import LoraArguments
from base.adapters import Role
from base.loading import load_adapter, load_model
from base.value import VLModelWithValueHead
from common.errors import InputError
from eval.generate import Answerer
from models import core_mapper_for
from models.assemble import add_lora
from tests import zoo

WEIGHTS = "adapter_model.safetensors"


def save_adapter(base: str, folder: Path, targets: list[str] | None = None) -> Path:
    """An adapter that changes its base, which LoRA's initial weights do not."""
    model = add_lora(load_model(base), LoraArguments(use_lora=True, lora_r=4, lora_target_modules=targets or ["auto"]))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def change(folder: Path, weights: Callable[[dict], dict] = dict, **config: object) -> Path:
    """Rewrite an adapter's weights and configuration."""
    save_file(weights(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def lora_b(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight for name, weight in model.named_parameters() if "lora_B" in name]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], r"^(?!.*visual).*(?:q_proj|v_proj).*"], ids=["names", "regex"]
)
def test_names_of_older_transformers_are_read(family: str, targets: list[str] | str, tmp_path: Path):
    """Up to 4.51 the decoder of Qwen2-VL was `model`, and adapters were saved under that name."""
    base = zoo.checkpoint(family)
    expected = lora_b(load_model(str(save_adapter(base, tmp_path, ["q_proj", "v_proj"]))))

    def old(weights: dict) -> dict:
        return {name.replace(".model.language_model.", ".model."): tensor for name, tensor in weights.items()}

    change(tmp_path, old, target_modules=targets)
    assert all("language_model" not in name for name in load_file(tmp_path / WEIGHTS))
    found = lora_b(load_model(str(tmp_path)))
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    continued = load_adapter(load_model(str(tmp_path)), str(tmp_path), "second")
    second = [weight for name, weight in continued.named_parameters() if "lora_B.second" in name]
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))


DAMAGE = {
    "foreign": lambda weights: {name.replace("layers", "blocks"): tensor for name, tensor in weights.items()},
    "half": lambda weights: {name: tensor for name, tensor in weights.items() if "layers.0" in name},
    "more": lambda weights: weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
    "shape": lambda weights: {name: tensor[:, :3].contiguous() for name, tensor in weights.items()},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_wherever_it_is_loaded(
    damage: str, llava: str, tmp_path: Path, command
):
    good = str(save_adapter(llava, tmp_path / "good"))
    bad = str(change(shutil.copytree(good, tmp_path / "bad"), DAMAGE[damage]))
    policy = load_model(good)
    value = VLModelWithValueHead(load_model(good))
    loads = {
        "continue": lambda: load_model(bad, is_trainable=True),
        "reference": lambda: load_adapter(policy, bad, Role.REFERENCE.adapter),
        "value": lambda: value.add_value_function(bad),
        "evaluation": lambda: Answerer(llava, bad, torch.device("cpu"), bf16=False),
        "evaluation of the folder": lambda: Answerer(bad, None, torch.device("cpu"), bf16=False),
        "training": lambda: train_dpo.main(command("dpo", "--use_lora True", model=bad)),
    }
    for where, load in loads.items():
        with pytest.raises(InputError, match=r"adapter in .*bad does not fit") as error:
            load()
        assert "\n" not in str(error.value), where


def test_a_reward_adapter_that_does_not_fit_is_refused(llava: str, tmp_path: Path, command):
    train_rm.main(command("rm", "--use_lora True --lora_r 4"))
    change(tmp_path / "rm", DAMAGE["half"])
    with pytest.raises(InputError, match="does not fit"):
        VLModelWithValueHead(load_model(str(save_adapter(llava, tmp_path / "policy")))).add_reward_adapter(
            str(tmp_path / "rm"), llava
        )


def test_an_adapter_without_processor_files_has_its_bases(llava: str, tmp_path: Path):
    folder = str(save_adapter(llava, tmp_path))
    processor = core_mapper_for(folder).processor(folder)
    assert processor.chat_template == core_mapper_for(llava).processor(llava).chat_template


def test_a_base_that_has_moved_is_named_with_the_file_that_names_it(llava: str, tmp_path: Path):
    folder = change(save_adapter(llava, tmp_path), base_model_name_or_path="/nowhere/llava")
    with pytest.raises(InputError, match=r"/nowhere/llava is neither .*adapter_config\.json names it"):
        load_model(str(folder))


def test_pickled_weights_are_refused(llava: str, tmp_path: Path):
    folder = save_adapter(llava, tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="only safetensors are read"):
        load_model(str(folder))


def test_loading_an_adapter_gives_a_peft_model(llava: str, tmp_path: Path):
    assert isinstance(load_model(str(save_adapter(llava, tmp_path))), PeftModel)
