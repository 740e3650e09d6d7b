"""LoRA adapters as others save them: every weight finds its place or the run stops, wherever an adapter is loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import train_dpo
import train_rm
from args import LoraArguments
from base.adapters import Role, adapter_active, adapter_now
from base.loading import load_adapter, load_model
from base.row_checks import ProcessorCheck
from base.value import VLModelWithValueHead
from common.errors import InputError
from eval.generate import Answerer
from models import core_mapper_for
from models.assemble import add_lora
from models.merging import merge
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


# The decoder's layers in transformers up to 4.51
OLD_DECODER = {
    "qwen2_vl": "model.",
    "qwen2_5_vl": "model.",
    "llava": "language_model.model.",
    "llava_next": "language_model.model.",
    "gemma3": "language_model.model.",
    "paligemma": "language_model.model.",
}
# How trainers name their targets, given the beginning of the old names
TARGETS: dict[str, Callable[[str], list[str] | str]] = {
    "names": lambda old: ["q_proj", "gate_proj"],
    "not in the tower": lambda old: r"^(?!.*(?:visual|vision_tower|multi_modal_projector)).*(?:q_proj|gate_proj).*",
    "from the root": lambda old: rf"^({old.split('.')[0]}(?=\.).*\.(q_proj|gate_proj))$",
    "in full": lambda old: [
        f"{old}layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.gate_proj")
    ],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", OLD_DECODER)
def test_names_of_older_transformers_are_read(family: str, targets: str, tmp_path: Path):
    """Weights and targets alike: today the tower's names begin as the decoder's did (`model.`)."""
    old_decoder, base = OLD_DECODER[family], zoo.checkpoint(family)
    if targets == "names" and family != "qwen2_vl":
        pytest.skip("bare names hit the tower as well, whose weights such an adapter has")
    expected = lora_b(load_model(str(save_adapter(base, tmp_path, ["q_proj", "gate_proj"]))))

    def old(weights: dict) -> dict:
        return {name.replace(".model.language_model.", f".{old_decoder}"): tensor for name, tensor in weights.items()}

    alphas = {f"{old_decoder}layers.1.self_attn.q_proj": 3}
    change(tmp_path, old, target_modules=TARGETS[targets](old_decoder), alpha_pattern=alphas)
    assert all(f".{old_decoder}layers" in name for name in load_file(tmp_path / WEIGHTS))
    model = load_model(str(tmp_path))
    found = lora_b(model)
    assert len(found) == len(expected) == 4
    scales = {name: m.scaling["default"] for name, m in model.named_modules() if hasattr(m, "lora_B")}
    assert sorted(scales.values()) == [3 / 4, 4, 4, 4] and all("layers.1" in n for n in scales if scales[n] < 4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    continued = load_adapter(load_model(str(tmp_path), is_trainable=True), str(tmp_path), "second")
    second = {name: weight for name, weight in continued.named_parameters() if "lora_B.second" in name}
    assert all(torch.equal(a, b) for a, b in zip(second.values(), expected, strict=True))
    assert not any(weight.requires_grad for weight in second.values())
    continued.save_pretrained(tmp_path / "again")
    again = lora_b(load_model(str(tmp_path / "again")))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    change(tmp_path, DAMAGE["half"])
    with pytest.raises(InputError, match="does not fit"):
        load_model(str(tmp_path))


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


def test_other_adapters_are_refused(llava: str, tmp_path: Path):
    """Prompt tuning and others would be asked for log-probs that their prompts take no part in."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_model(llava), config).save_pretrained(tmp_path)
    for load in (load_model, lambda folder: load_adapter(load_model(llava), folder), lambda f: merge(llava, f)):
        with pytest.raises(InputError, match="adapter of the kind PROMPT_TUNING, and only LoRA's are supported"):
            load(str(tmp_path))


def test_an_adapter_of_an_adapter_is_refused(llava: str, tmp_path: Path):
    first = save_adapter(llava, tmp_path / "first")
    second = change(save_adapter(llava, tmp_path / "second"), base_model_name_or_path=str(first))
    with pytest.raises(InputError, match=r"names .*first as its base, which is an adapter itself: merge that one"):
        load_model(str(second))


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_saved_modules_are_no_older_names(family: str, tmp_path: Path):
    """Embeddings and a head beside LoRA: their names begin as older ones did (`model.`), and Gemma's are tied."""
    base = zoo.checkpoint(family)
    model = add_lora(
        load_model(base), LoraArguments(use_lora=True, lora_r=4, modules_to_save=["embed_tokens", "lm_head"])
    )
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(20, 30)[None]
    expected = model.eval()(input_ids=ids).logits
    assert torch.equal(load_model(str(tmp_path)).eval()(input_ids=ids).logits, expected)
    second = load_adapter(load_model(str(tmp_path)), str(tmp_path), "second")
    second.set_adapter("second")
    assert torch.equal(second.eval()(input_ids=ids).logits, expected)


def test_modules_that_an_adapter_saves_must_be_there(llava: str, tmp_path: Path):
    model = add_lora(load_model(llava), LoraArguments(use_lora=True, lora_r=4, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda weights: {name: tensor for name, tensor in weights.items() if "lora_" in name})
    with pytest.raises(InputError, match=r"lm_head\.weight is not in the folder\.$"):
        load_model(str(tmp_path))


def test_an_adapter_that_cannot_be_merged_is_one_sentence(llava: str, tmp_path: Path):
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", lora_bias=True)
    get_peft_model(load_model(llava), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"adapter in .* cannot be merged: .*lora_bias"):
        merge(llava, str(tmp_path))


def test_pickled_weights_are_refused(llava: str, tmp_path: Path):
    folder = save_adapter(llava, tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="only safetensors are read"):
        load_model(str(folder))


CONTRADICTIONS = {
    "--lora_r 8": r"--lora_r 8 contradicts the adapter in .*, which has 4",
    "--lora_alpha 3": "--lora_alpha 3 contradicts.* 16",
    "--lora_dropout 0.5": r"--lora_dropout 0\.5 contradicts.* 0\.05",
    "--lora_bias all": "--lora_bias all contradicts.* none",
    "--lora_target_modules q_proj": "--lora_target_modules .*q_proj.* contradicts",
    "--modules_to_save lm_head": "--modules_to_save lm_head contradicts.* None",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_flags_that_contradict_the_adapter_are_refused(flags: str, llava: str, tmp_path: Path, command):
    folder = str(save_adapter(llava, tmp_path / "adapter"))
    with pytest.raises(InputError, match=CONTRADICTIONS[flags]):
        train_dpo.main(command("dpo", f"--use_lora True {flags}", model=folder))
    with pytest.raises(InputError, match="is a LoRA adapter: add --use_lora True"):
        train_dpo.main(command("dpo", model=folder))


def test_the_run_records_what_the_adapter_has(llava: str, tmp_path: Path, command):
    """Flags that agree are accepted; what was not given is the adapter's, in run.json and in what is saved."""
    targets = ["q_proj", "v_proj"]
    folder = str(save_adapter(llava, tmp_path / "adapter", targets))
    flags = f"--use_lora True --lora_r 4 --lora_target_modules {' '.join(targets)} --max_steps 1"
    train_dpo.main(command("dpo", flags, model=folder))
    recorded = json.loads((tmp_path / "dpo" / "run.json").read_text())["arguments"]["LoraArguments"]
    saved = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text())
    assert (recorded["lora_r"], recorded["lora_alpha"], recorded["lora_dropout"]) == (4, 16, 0.05)
    assert recorded["lora_target_modules"] == [saved["target_modules"]] and saved["r"] == 4


def test_modules_that_do_not_exist_are_refused(llava: str):
    with pytest.raises(
        InputError, match=r"--modules_to_save lm_haed is not a module.*choose from .*lm_head.*projector"
    ):
        add_lora(load_model(llava), LoraArguments(use_lora=True, modules_to_save=["lm_haed"]))
    with pytest.raises(InputError, match=r"--lora_target_modules: .*no_such"):
        add_lora(load_model(llava), LoraArguments(use_lora=True, lora_target_modules=[r".*\.no_such_(proj)"]))
    model = add_lora(load_model(llava), LoraArguments(use_lora=True, modules_to_save=["lm_head"]))
    assert any("modules_to_save" in name and weight.requires_grad for name, weight in model.named_parameters())


def with_token(llava: str, folder: Path, token: str, **settings: object) -> str:
    """A copy of a checkpoint whose tokenizer has one token more than the model has embeddings."""
    shutil.copytree(llava, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        if name == "config.json":
            content["text_config"]["vocab_size"] = tokenizer.convert_tokens_to_ids(
                token
            )  # the new token's is the first without
        else:
            content |= settings
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_tokens_beyond_the_embeddings_are_refused(llava: str, tmp_path: Path):
    """At load if every row would hold one, else in the row that does: some published tokenizers have tokens that nobody uses."""
    with pytest.raises(InputError, match=r"<extra> \(\d+\) is not among the \d+ embeddings.*resize_token_embeddings"):
        path = with_token(llava, tmp_path / "pad", "<extra>", pad_token="<extra>")
        core_mapper_for(path).processor(path)
    path = with_token(llava, tmp_path / "unused", "<extra>")
    processor = core_mapper_for(path).processor(path)
    for text in ("An <extra> photo", "A photo"):
        conversation = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": text}]
        prompt = [{"role": "user", "content": text}]
        calls = [
            lambda: processor.encode_response(text),  # noqa: B023
            lambda: processor.process_batch_conv([conversation], [[zoo.image()]]),  # noqa: B023
            lambda: processor(convs=[prompt], images=[[]]),  # noqa: B023
        ]
        for call in calls:
            if "<extra>" not in text:
                call()
                continue
            with pytest.raises(InputError, match=r"<extra> \(\d+\) is not among the embeddings of the model: take"):
                call()
    check = ProcessorCheck(processor)
    assert processor.tokens_without_embedding == ["<extra>"]
    row = {"images": [], "prompt": [{"role": "user", "content": "Hi"}], "responses": ["An <extra> photo", "A photo"]}
    assert "has <extra> in its texts, for which the model has no embedding: take" in str(
        check.of_row(row, "preference", None)
    )
    assert check.of_row(row | {"responses": ["A photo", "A dog"]}, "preference", None) is None


# -- which adapter computes ----------------------------------------------------------------------------------------------


def test_the_adapter_that_computes_is_switched_as_trl_does():
    """The base, each adapter, and one that came later; nothing stops training by that."""
    from trl.trainer.utils import use_adapter

    config = LoraArguments(use_lora=True, lora_r=4, lora_target_modules=["q_proj"])
    model = add_lora(load_model(zoo.checkpoint("llava"), dtype=torch.float32), config).eval()
    ids = torch.arange(5, 15)[None]

    def draw() -> None:
        torch.manual_seed(len(model.peft_config))
        for name, weight in model.named_parameters():
            if f"lora_B.{[*model.peft_config][-1]}." in name:
                torch.nn.init.normal_(weight)

    def logits(switch: Callable, name: str | None) -> torch.Tensor:
        with torch.no_grad(), switch(model, name):
            return model(input_ids=ids).logits

    draw()
    base, first = logits(adapter_active, None), logits(adapter_active, "default")
    assert adapter_now(model) == "default" and not torch.equal(base, first)
    more = copy.copy(model.peft_config["default"])
    more.target_modules = {name.replace("q_proj", "v_proj") for name in model.targeted_module_names}
    model.add_adapter("other", more)
    model.eval()  # the new layers, too
    draw()
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    found = {name: logits(adapter_active, name) for name in (None, "default", "other")}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trains
    assert torch.equal(found[None], base) and torch.equal(found["default"], first)
    for name, of_name in found.items():
        assert torch.equal(of_name, logits(use_adapter, name)), name
    assert not torch.equal(found["other"], base)


def test_the_module_tree_is_walked_once_for_each_set_of_adapters(monkeypatch: pytest.MonkeyPatch):
    model = add_lora(load_model(zoo.checkpoint("llava")), LoraArguments(use_lora=True))
    walks, modules = [], type(model).modules
    monkeypatch.setattr(type(model), "modules", lambda self: walks.append(1) or modules(self))
    for _ in range(3):
        with adapter_active(model, None):
            assert adapter_now(model) is None
        assert adapter_now(model) == "default"
    assert len(walks) == 1
