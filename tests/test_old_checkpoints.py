"""Checkpoints in older layouts work, and those that cannot be trained are refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, T5Config

import train_dpo
from base.loading import load_model
from common.errors import InputError
from models import core_mapper_for
from tests import zoo


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(zoo.checkpoint(family), tmp_path / family))


def edit(file: Path, **changes: object) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def prompt_ids(path: str) -> list[list[int]]:
    processor = core_mapper_for(path).processor(path)
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    return processor.encode_conversations([messages] * 2, [[zoo.image(0)], [zoo.image(1, 20, 60)]])[0]


@pytest.mark.parametrize(
    "family, lacking",
    [
        ("llava", ["num_additional_image_tokens"]),  # 575 image tokens and not 576, until the model complains
        ("llava", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]),
        ("llava_next", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]),
        ("vipllava", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]),
        ("instructblip", ["num_query_tokens"]),
    ],
)
def test_fields_that_older_processors_lack_come_from_the_configuration(family: str, lacking: list[str], copy_of):
    folder = copy_of(family)
    edit(folder / "processor_config.json", **dict.fromkeys(lacking))
    assert prompt_ids(str(folder)) == prompt_ids(zoo.checkpoint(family))


def test_processor_files_of_2024(copy_of):
    """No processor_config.json: image processor and template have files of their own."""
    folder = copy_of("llava")
    whole = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(whole["image_processor"]))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    assert prompt_ids(str(folder)) == prompt_ids(zoo.checkpoint("llava"))


def test_one_of_several_templates_and_the_cached_reference(copy_of, command, tmp_path: Path):
    folder = copy_of("llava")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ 'tools' }}"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert prompt_ids(str(folder)) == prompt_ids(zoo.checkpoint("llava"))
    cache = f"--precompute_ref_log_probs True --ref_log_probs_dir {tmp_path / 'cache'} --max_steps 1"
    train_dpo.main(command("dpo", f"--use_lora True {cache}", model=str(folder)))
    edit(folder / "tokenizer_config.json", chat_template=named[1:])
    with pytest.raises(InputError, match="chat templates named tool_use"):
        core_mapper_for(str(folder)).processor(str(folder))


QUANTISED = {
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "MLX": {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused_by_name(method: str, copy_of, command):
    folder = copy_of("llava")
    edit(folder / "config.json", **QUANTISED[method])
    for flags in ("--use_lora True", "--use_lora True --q_lora True"):
        with pytest.raises(InputError, match=f"quantised with {method}, which cannot be trained.*base model"):
            train_dpo.main(command("dpo", flags, model=str(folder)))


def test_pickled_weights_are_refused_with_the_conversion(copy_of):
    folder = copy_of("llava")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_model(str(folder))


def test_a_checkpoint_without_a_head_is_an_embedding_model(copy_of):
    folder = copy_of("qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    assert weights.pop("lm_head.weight") is not None
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no lm_head\.weight.*embedding models.*made from"):
        load_model(str(folder))
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="do not fit"):
        load_model(str(folder))


def test_what_config_json_does_not_say_or_says_otherwise(copy_of):
    """No JSON object, a type of tomorrow, other sizes than the weights have."""
    folder = copy_of("qwen2_vl")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | {"vocab_size": 100})
    with pytest.raises(InputError, match=r"do not fit Qwen2VL.*mismatched keys .*embed_tokens.*\[100, 32\]"):
        load_model(str(folder))
    edit(folder / "config.json", text_config=text | {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(InputError, match="quantised with mxfp4"):
        load_model(str(folder))
    edit(folder / "config.json", text_config=text, model_type="qwen_of_tomorrow")
    with pytest.raises(InputError, match=r"config\.json is not read by the installed transformers .*qwen_of_tomorrow"):
        core_mapper_for(str(folder)).processor(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is not a configuration"):
        core_mapper_for(str(folder))


@pytest.mark.parametrize("family", ["blip_2", "instructblip"])
def test_encoder_decoders_are_refused(family: str, copy_of):
    """Variants with T5 have the class of those with OPT or Vicuna."""
    folder = copy_of(family)
    config = AutoConfig.from_pretrained(folder).to_dict()
    text = T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=config["text_config"]["vocab_size"]
    )
    kind = type(AutoConfig.from_pretrained(folder))
    with_t5 = kind(**config | {"text_config": text.to_dict()})
    with_t5.architectures = config["architectures"]
    with_t5.save_pretrained(folder)
    with pytest.raises(InputError, match=r"is an encoder-decoder .*the answer follows the prompt"):
        core_mapper_for(str(folder))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_embeddings_larger_than_the_tokenizer(family: str, copy_of, command, tmp_path: Path):
    """Most released checkpoints pad their vocabulary: nothing changes but the number of rows."""
    folder = copy_of(family)
    model = load_model(str(folder))
    rows = model.get_input_embeddings().weight.shape[0] + 60
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    processor = core_mapper_for(str(folder)).processor(str(folder))
    assert rows > len(processor.tokenizer) and not processor._beyond
    train_dpo.main(command("dpo", "--max_steps 1", model=str(folder)))
    trained = load_model(str(tmp_path / "dpo"))
    assert trained.get_input_embeddings().weight.shape[0] == trained.get_output_embeddings().weight.shape[0] == rows
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "dpo").config.get_text_config().vocab_size == rows
