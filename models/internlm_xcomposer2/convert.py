"""Rewrite an InternLM-XComposer2-VL checkpoint between the original remote-code layout and the native one.

    python -m models.internlm_xcomposer2.convert internlm/internlm-xcomposer2-vl-7b out/     # a hub name or a folder
    python -m models.internlm_xcomposer2.convert out/ original/ --reverse

No code of the checkpoint is run and no pickle is loaded. Tensors are split, permuted and renamed, never computed: a
round trip gives the same bits.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from models.checkpoint_io import Rule, Tensors, rewrite
from models.convert_cli import main
from models.internlm_xcomposer2.configuration import InternLMXComposer2Config
from models.internlm_xcomposer2.modeling import InternLMXComposer2ForConditionalGeneration
from models.internlm_xcomposer2.processing import (
    IMAGE_TOKEN,
    TURN_END,
    InternLMXComposer2Processor,
    build_tokenizer,
)
from models.square_image_processor import SquareImageProcessor

MODEL_TYPE = "internlmxcomposer2"
ARCHITECTURE = "InternLMXComposer2ForCausalLM"
# The released code fixes these; a config.json that names others (small test models) overrides them.
PUBLIC_PLORA = {"plora_rank": 256, "plora_alpha": 256}
PUBLIC_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


def to_native_config(original: dict) -> InternLMXComposer2Config:
    """The native configuration of an original `config.json`.

    Raises:
        ValueError: a setting that the release does not use and the port does not have.
    """
    for key, value in {"bias": False, "hidden_act": "silu", "tie_word_embeddings": False}.items():
        if original.get(key, value) != value:
            raise ValueError(f"config.json sets {key} to {original[key]}; only {value} is supported.")
    # A dynamic base with factor 1 is a plain one up to max_position_embeddings; the model refuses longer rows.
    scaling = original.get("rope_scaling") or {"type": "dynamic", "factor": 1.0}
    if scaling.get("type") != "dynamic" or scaling.get("factor") != 1.0:
        raise ValueError(f"config.json sets rope_scaling to {scaling}; only dynamic with factor 1.0 is supported.")
    vocab_size = original["vocab_size"]
    return InternLMXComposer2Config(
        architectures=["InternLMXComposer2ForConditionalGeneration"],
        dtype=original.get("torch_dtype", "bfloat16"),
        image_token_id=vocab_size,
        original_max_length=original.get("max_length", 4096),
        initializer_range=original["initializer_range"],
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": original["hidden_size"],
            "intermediate_size": original["intermediate_size"],
            "num_hidden_layers": original["num_hidden_layers"],
            "num_attention_heads": original["num_attention_heads"],
            "num_key_value_heads": original["num_key_value_heads"],
            "max_position_embeddings": original["max_position_embeddings"],
            "initializer_range": original["initializer_range"],
            "rms_norm_eps": original["rms_norm_eps"],
            "rope_parameters": {"rope_type": "default", "rope_theta": float(original["rope_theta"])},
            "bos_token_id": original["bos_token_id"],
            "eos_token_id": original["eos_token_id"],
            **{key: original.get(key, value) for key, value in PUBLIC_PLORA.items()},
        },
        vision_config=PUBLIC_VISION | original.get("vision_config", {}) | {"image_size": original["img_size"]},
    )


def to_original_config(config: InternLMXComposer2Config) -> dict:
    """The original `config.json` of a native configuration."""
    text, vision = config.text_config, config.vision_config
    original = {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
            "AutoModel": f"modeling_internlm_xcomposer2.{ARCHITECTURE}",
            "AutoModelForCausalLM": f"modeling_internlm_xcomposer2.{ARCHITECTURE}",
        },
        "bias": False,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "img_size": vision.image_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": text.intermediate_size,
        "max_length": config.original_max_length,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": MODEL_TYPE,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": text.eos_token_id,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": {"factor": 1.0, "type": "dynamic"},
        "rope_theta": int(text.rope_parameters["rope_theta"]),
        "tie_word_embeddings": False,
        "torch_dtype": str(config.dtype or "bfloat16").removeprefix("torch."),
        "use_cache": False,
        "vocab_size": text.vocab_size,
    }
    plora = {key: getattr(text, key) for key in PUBLIC_PLORA}
    if plora != PUBLIC_PLORA:
        original |= plora
    tower = {key: getattr(vision, key) for key in PUBLIC_VISION}
    if tower != PUBLIC_VISION:
        original["vision_config"] = tower | {"image_size": vision.image_size}
    return original


def rules(config: InternLMXComposer2Config) -> list[Rule]:
    """Every tensor of an InternLM-XComposer2-VL checkpoint in both layouts."""
    text = config.text_config
    groups = text.num_key_value_heads
    queries = text.num_attention_heads // groups  # query heads per key/value head

    def split_qkv(fused: torch.Tensor) -> Tensors:
        """Rows of `wqkv` lie per key/value head: its query heads, its key, its value."""
        heads = fused.unflatten(0, (groups, queries + 2, -1))  # (groups, queries + 2, head_dim, in)
        q, k, v = heads.split([queries, 1, 1], dim=1)
        return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)

    def join_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        heads = [
            q.unflatten(0, (groups, queries, -1)),
            k.unflatten(0, (groups, 1, -1)),
            v.unflatten(0, (groups, 1, -1)),
        ]
        return (torch.cat(heads, dim=1).flatten(0, 2),)

    def sort_qkv(fused: torch.Tensor) -> Tensors:
        return (torch.cat(split_qkv(fused)),)

    def unsort_qkv(sorted_rows: torch.Tensor) -> Tensors:
        head_dim = sorted_rows.shape[0] // (groups * (queries + 2))
        return join_qkv(*sorted_rows.split([groups * queries * head_dim, groups * head_dim, groups * head_dim]))

    table = [
        Rule(("model.tok_embeddings.weight",), ("model.language_model.embed_tokens.weight",)),
        Rule(("model.norm.weight",), ("model.language_model.norm.weight",)),
        Rule(("output.weight",), ("lm_head.weight",)),
    ]
    for n in range(text.num_hidden_layers):
        old, new = f"model.layers.{n}.", f"model.language_model.layers.{n}."
        wqkv, attention = f"{old}attention.wqkv.", f"{new}self_attn."
        qkv = tuple(f"{attention}{x}_proj.weight" for x in "qkv")
        table += [
            Rule((f"{old}attention_norm.weight",), (f"{new}input_layernorm.weight",)),
            Rule((f"{old}ffn_norm.weight",), (f"{new}post_attention_layernorm.weight",)),
            Rule((f"{wqkv}weight",), qkv, split_qkv, join_qkv),
            Rule((f"{wqkv}Plora_A.weight",), (f"{attention}qkv_plora.a",)),
            Rule((f"{wqkv}Plora_B.weight",), (f"{attention}qkv_plora.b",), sort_qkv, unsort_qkv),
        ]
        linears = {
            "attention.wo": "self_attn.o",
            "feed_forward.w1": "mlp.gate",
            "feed_forward.w3": "mlp.up",
            "feed_forward.w2": "mlp.down",
        }
        for a, b in linears.items():
            table += [
                Rule((f"{old}{a}.weight",), (f"{new}{b}_proj.weight",)),
                Rule((f"{old}{a}.Plora_A.weight",), (f"{new}{b}_plora.a",)),
                Rule((f"{old}{a}.Plora_B.weight",), (f"{new}{b}_plora.b",)),
            ]

    old, new = "vit.vision_tower.vision_model.", "model.vision_tower."
    tower = ["embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    modules = ["pre_layrnorm", "post_layernorm"]
    for n in range(config.vision_config.num_hidden_layers):
        parts = [
            "layer_norm1",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
            *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
        ]
        modules += [f"encoder.layers.{n}.{part}" for part in parts]
    tower += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    table += [Rule((old + name,), (new + name,)) for name in tower]
    for kind in ("weight", "bias"):
        table += [
            Rule((f"vision_proj.0.{kind}",), (f"model.multi_modal_projector.linear_1.{kind}",)),
            Rule((f"vision_proj.2.{kind}",), (f"model.multi_modal_projector.linear_2.{kind}",)),
        ]
    return table


def ignored(name: str) -> bool:
    """Buffers of some releases that the model computes."""
    return name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))


def native_shapes(config: InternLMXComposer2Config) -> dict[str, torch.Size]:
    """Names and shapes of the converted state dict; no weights are made."""
    with torch.device("meta"):
        state = InternLMXComposer2ForConditionalGeneration(config).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def convert(source: Path, target: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Original layout in `source` to native layout in `target`; config.json is written last.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint_io`.
    """
    config = to_native_config(json.loads((source / "config.json").read_text()))
    tokenizer = build_tokenizer(source / "tokenizer.model", config.text_config.max_position_embeddings)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        raise ValueError(f"{source}: tokenizer.model has not the {config.image_token_id} pieces of config.json.")
    rewrite(source, target, rules(config), ignored, native_shapes(config), max_shard_bytes=max_shard_bytes)
    side = config.vision_config.image_size
    pixels = SquareImageProcessor(size={"height": side, "width": side})
    InternLMXComposer2Processor(pixels, tokenizer, num_image_tokens=config.num_patches).save_pretrained(target)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(target)
    # Only the reverse conversion reads the sentencepiece file.
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    config.save_pretrained(target)


def revert(source: Path, target: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Native layout in `source` to the original layout in `target`: weights, config.json and the tokenizer.

    The Python files of the hub are not written. Training saves no `tokenizer.model`: copy it into `source` from the
    converted checkpoint first.

    Raises:
        FileNotFoundError: `source` holds no tokenizer.model.
    """
    config = InternLMXComposer2Config.from_pretrained(source)
    if not (source / "tokenizer.model").exists():
        raise FileNotFoundError(f"{source} holds no tokenizer.model: copy the released file there.")
    rewrite(source, target, rules(config), shapes=native_shapes(config), reverse=True, max_shard_bytes=max_shard_bytes)
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer_class = "InternLMXComposer2Tokenizer"
    auto_map = {"AutoTokenizer": [f"tokenization_internlm_xcomposer2.{tokenizer_class}", None]}
    for name, content in {
        "tokenizer_config.json": {"auto_map": auto_map, **names, "tokenizer_class": tokenizer_class},
        "special_tokens_map.json": names,
        "generation_config.json": ids,
        "config.json": to_original_config(config),
    }.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(__doc__, "models.internlm_xcomposer2.convert", convert, revert, ["tokenizer.model"])
