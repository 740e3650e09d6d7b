"""FSDP2 on one process: what its flags and accelerate's config mean, what is refused, what is gathered at a time.

Two ranks against one: tests/test_distributed.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import args
from base.fsdp import in_root, layers_of, shard, whole, whole_weights
from base.loading import load_model
from common.errors import InputError
from common.fsdp_flags import Sharding, sharding_of, sharding_of_launcher
from tests import zoo
from tests.test_command_lines import CONFIGS, OTHERS

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "accelerate_configs" / "fsdp2.yaml"


@pytest.mark.parametrize(
    ("fsdp", "config", "expected"),
    [
        (None, None, None),
        ("False", None, None),
        ("full_shard auto_wrap", None, Sharding()),
        ("auto_wrap,full_shard", None, Sharding()),
        (["full_shard", "auto_wrap"], "{}", Sharding()),
        ("shard_grad_op auto_wrap", None, Sharding(reshard_after_forward=False)),
        ("True", '{"fsdp_version": 2, "reshard_after_forward": false}', Sharding(reshard_after_forward=False)),
        (True, {"transformer_layer_cls_to_wrap": "A,B"}, Sharding(("A", "B"))),
        ("full_shard auto_wrap", {"transformer_cls_names_to_wrap": ["A"]}, Sharding(("A",))),
    ],
)
def test_what_the_flags_mean(fsdp, config, expected: Sharding | None):
    found = sharding_of(fsdp, config)
    assert found == expected
    if found:  # the form that run.json keeps says the same
        assert sharding_of(found.words, found.config) == found


@pytest.mark.parametrize(
    ("fsdp", "config", "sentence"),
    [
        ("full_shard", None, '^--fsdp full_shard does not say that one layer .* write --fsdp "full_shard auto_wrap".$'),
        ("shard_grad_op", None, 'write --fsdp "shard_grad_op auto_wrap".$'),
        ("auto_wrap", None, 'how weights are shared out: write --fsdp "full_shard auto_wrap".$'),
        ("full_shard auto_wrap offload", None, "^--fsdp offload .*zero3_offload.json"),
        ("hybrid_shard auto_wrap", None, "^--fsdp hybrid_shard .*full_shard"),
        ("fullshard auto_wrap", None, '^--fsdp fullshard is unknown: write --fsdp "full_shard auto_wrap".$'),
        (None, '{"version": 2}', "^--fsdp_config does nothing alone"),
        ("True", '{"version": 1}', "^--fsdp_config version 1: FSDP1 is not supported"),
        ("True", '{"auto_wrap_policy": "SIZE_BASED_WRAP"}', "only TRANSFORMER_BASED_WRAP is supported"),
        ("True", '{"activation_checkpointing": true}', "--gradient_checkpointing True"),
        ("True", '{"state_dict_type": "SHARDED_STATE_DICT"}', "FULL_STATE_DICT"),
        ("True", '{"reshard_after_forward": "often"}', "reshard_after_forward often: give true"),
        ("True", '{"ignored": 1}', "^--fsdp_config ignored is not a setting of FSDP2 here"),
        ("True", "{", "^--fsdp_config { cannot be read"),
        ("True", "none.json", "^--fsdp_config none.json cannot be read .*give a JSON file.$"),
    ],
)
def test_what_is_refused_says_what_to_write(fsdp, config, sentence: str):
    with pytest.raises(InputError, match=sentence):
        sharding_of(fsdp, config)


def launched(**changes) -> dict[str, str]:
    """The variables that `accelerate launch` makes of our config file, which accelerate/utils/launch.py names so."""
    settings = yaml.safe_load(CONFIG.read_text())["fsdp_config"] | changes
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    return {"ACCELERATE_USE_FSDP": "true"} | {
        names.get(n, n.upper()): str(v).lower() if isinstance(v, bool) else str(v) for n, v in settings.items()
    }


def test_the_config_of_accelerate():
    environment = launched()
    assert sharding_of_launcher(environment) == Sharding()
    assert "ACCELERATE_USE_FSDP" not in environment, "accelerate would share the model out, too"
    assert sharding_of_launcher(environment) is None
    changed = launched(fsdp_reshard_after_forward=False, fsdp_transformer_layer_cls_to_wrap="A,B")
    assert sharding_of_launcher(changed) == Sharding(("A", "B"), False)
    with pytest.raises(InputError, match=r"^fsdp_version in the config of accelerate launch 1: FSDP1 is not supported"):
        sharding_of_launcher(launched(fsdp_version=1))
    with pytest.raises(InputError, match=r"^fsdp_offload_params in the config of accelerate launch true"):
        sharding_of_launcher(launched(fsdp_offload_params=True))


def parse(script: str, folder: Path, flags: str) -> args.VLConfig:
    common = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(folder), "--save_strategy", "no"]
    common += ["--reward_fn", "f.py:g"] if script == "ppo" else []
    return args.parse(*OTHERS, CONFIGS[script], argv=common + ["--fsdp", "full_shard auto_wrap", *flags.split()])[-1]


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        ("sft", "", "^--fsdp shares weights out over several processes, and this is one: start it with torchrun"),
        ("ppo", "", "^--fsdp is not supported in PPO"),
        ("dpo", "--fp16 True", "^--fp16 does not work with --fsdp: take --bf16 True.$"),
        ("rm", "--optim adafactor", "^--optim adafactor does not work with --fsdp: take adamw_torch_fused"),
        ("sft", "--auto_find_batch_size True", "^--auto_find_batch_size does not work with --fsdp"),
    ],
)
def test_flags_beside_fsdp(tmp_path: Path, script: str, flags: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        parse(script, tmp_path, flags)


def test_launcher_and_flag_are_one_too_many(tmp_path: Path, monkeypatch):
    for name, value in launched().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="leave the flag out"):
        parse("sft", tmp_path, "")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "idefics3", "instructblip"])
def test_layers_of_vision_tower_and_language_model(family: str):
    """All layers of the decoder, and outside of layers no more than embeddings, projector and small change."""
    model = load_model(zoo.checkpoint(family))
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    assert {id(p) for p in model.get_decoder().layers.parameters()} <= inside
    blocks = [m for name, m in model.get_vision_tower().named_modules() if name.endswith((".0", ".1"))]
    assert any({id(p) for p in block.parameters()} <= inside for block in blocks)
    every = [id(p) for layer in layers for p in layer.parameters()]
    assert len(every) == len({*every}), "a layer inside a layer"
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    assert not head & inside, "base/logps.py reads the head's weights without calling it"


def test_layers_by_name():
    model = load_model(zoo.checkpoint("llava"))
    assert [type(m).__name__ for m in layers_of(model, ["LlamaMLP"])] == ["LlamaMLP"] * 2
    with pytest.raises(
        InputError, match=r"no layers in .* of the class Missing: .*CLIPEncoderLayer, LlamaDecoderLayer"
    ):
        layers_of(model, ["LlamaMLP", "Missing"])
    with pytest.raises(InputError, match="name their class by --fsdp_config"):
        layers_of(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.BUILDERS)
def test_a_config_by_the_class_of_layers(family: str):
    """The decoder's class alone, as configs of other programs name it, and the classes of all stacks."""
    model = load_model(zoo.checkpoint(family))
    decoder = [*model.get_decoder().layers]
    kinds = {type(layer).__name__ for layer in decoder}
    named = layers_of(model, sorted(kinds))
    assert {*map(id, named)} == {*map(id, decoder)}
    found = layers_of(model)
    again = layers_of(model, sorted({type(layer).__name__ for layer in found}))
    assert {*map(id, found)} <= {*map(id, again)}


@pytest.fixture
def alone():
    """A process group of this process alone, which FSDP asks for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Toy(nn.Module):
    """Two layers, a head outside of them that is tied to an embedding, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden) * self.scale
        return self.head(hidden)


def test_weights_out_and_in_again(alone):
    """Names, values and ties of the whole; `load_state_dict` of whole weights, also of a model that has only been evaluated."""
    toy, ids = Toy(), torch.tensor([[0, 3, 1]])
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    expected = toy(ids).detach()
    shard(toy, layers_of(toy))
    assert isinstance(toy, FSDPModule) and all(isinstance(p, DTensor) for p in toy.parameters())
    with torch.no_grad():
        assert torch.equal(toy(ids), expected)
    assert not isinstance(toy.head.weight, DTensor)  # what lies outside of layers is still gathered
    gathered = whole_weights(toy, keep=True)
    assert gathered.keys() == before.keys() and all(torch.equal(gathered[n], before[n]) for n in before)
    assert gathered["head.weight"] is gathered["embedding.weight"]
    assert whole_weights(toy, keep=False) == {}
    with torch.no_grad():
        toy(ids)
    doubled = {name: 2 * value for name, value in before.items()}
    toy.load_state_dict(doubled)
    assert all(torch.equal(value, doubled[name]) for name, value in whole_weights(toy, keep=True).items())


def test_a_part_of_the_model_runs_in_its_root(alone):
    toy = Toy()
    expected = toy.head(torch.ones(1, 4)).detach()
    shard(toy, layers_of(toy))
    with torch.no_grad():
        assert torch.equal(in_root(toy, lambda: toy.head(torch.ones(1, 4))), expected)
    assert in_root(nn.Linear(1, 1), lambda: 3) == 3


def test_a_layer_holds_weights_of_several_types(alone):
    """A frozen base in bf16 with float32 adapters: gathered as they are, the gradients of what trains are float32."""
    toy = Toy()
    toy.layers[0].weight = nn.Parameter(toy.layers[0].weight.detach().bfloat16(), requires_grad=False)
    seen = []
    toy.layers[0].register_forward_hook(lambda module, *_: seen.append((module.weight.dtype, module.bias.dtype)))
    shard(toy, layers_of(toy))
    with torch.autocast("cpu", torch.bfloat16):
        toy(torch.tensor([[0, 3, 1]])).sum().backward()
    assert seen == [(torch.bfloat16, torch.float32)]
    assert toy.layers[0].bias.grad.dtype == torch.float32 and toy.layers[0].weight.grad is None


def test_whole_reads_nested_parts(alone):
    toy = Toy()
    weight = toy.layers[0].weight.detach().clone()
    shard(toy, layers_of(toy))
    found = whole({"state": [{"exp_avg": toy.layers[0].weight, "step": 3}]})
    assert torch.equal(found["state"][0]["exp_avg"], weight) and found["state"][0]["step"] == 3


def test_run_json_keeps_one_form(tmp_path: Path, alone):
    config = parse("dpo", tmp_path, "")
    assert config.fsdp == "full_shard auto_wrap" and json.dumps(config.fsdp_config)
    assert config.fsdp_plugin_args is None, "accelerate would share the model out, too"
    assert config.sharding == Sharding() and config.place_model_on_device is False
    assert "ACCELERATE_USE_FSDP" not in os.environ
