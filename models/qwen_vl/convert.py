"""Rewrite a Qwen-VL checkpoint between the original remote-code layout and the native one.

    python -m models.qwen_vl.convert Qwen/Qwen-VL-Chat out/          # a hub name or a folder
    python -m models.qwen_vl.convert out/ original/ --reverse

No code of the checkpoint is run and no pickle is loaded. Tensors are split, permuted and renamed, never computed: a
round trip gives the same bits.
"""

import json
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from models.checkpoint_io import Rule, Tensors, rewrite
from models.convert_cli import main
from models.qwen_vl.configuration import QwenVLConfig
from models.qwen_vl.modeling import QwenVLForConditionalGeneration
from models.qwen_vl.processing import QwenVLProcessor, build_tokenizer, write_ranks
from models.square_image_processor import SquareImageProcessor

MODEL_TYPE = "qwen"
ARCHITECTURE = "QWenLMHeadModel"
# The released code fixes these three: a 16 x 16 grid of positions, 256 queries, heads of 128 in the pooling layer.
NUM_POSITIONS, NUM_QUERIES, POOL_HEAD_DIM = 256, 256, 128


def to_native_config(original: dict) -> QwenVLConfig:
    """The native configuration of an original `config.json`.

    Raises:
        ValueError: a setting that no Qwen-VL release uses and the port does not have.
    """
    if "visual" not in original:
        raise ValueError("config.json has no `visual` entry: this is a text-only Qwen, not a Qwen-VL.")
    expected = {"rotary_pct": 1.0, "no_bias": True, "tie_word_embeddings": False}
    expected["kv_channels"] = original["hidden_size"] // original["num_attention_heads"]
    for key, value in expected.items():
        if original.get(key, value) != value:
            raise ValueError(f"config.json sets {key} to {original[key]}; only {value} is supported.")
    visual = original["visual"]
    return QwenVLConfig(
        architectures=["QwenVLForConditionalGeneration"],
        dtype=original.get("torch_dtype", "bfloat16"),
        image_start_token_id=visual["image_start_id"],
        image_end_token_id=visual["image_start_id"] + 1,
        image_token_id=visual["image_start_id"] + 2,
        initializer_range=original["initializer_range"],
        text_config={
            "vocab_size": original["vocab_size"],
            "hidden_size": original["hidden_size"],
            "intermediate_size": original["intermediate_size"] // 2,  # the original counts both branches
            "num_hidden_layers": original["num_hidden_layers"],
            "num_attention_heads": original["num_attention_heads"],
            "num_key_value_heads": original["num_attention_heads"],
            "max_position_embeddings": original["max_position_embeddings"],
            "initializer_range": original["initializer_range"],
            "rms_norm_eps": original["layer_norm_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": float(original["rotary_emb_base"])},
            "train_length": original["seq_length"],
            "use_dynamic_ntk": original["use_dynamic_ntk"],
            "use_logn_attn": original["use_logn_attn"],
        },
        vision_config={
            "hidden_size": visual["width"],
            "intermediate_size": int(visual["width"] * visual["mlp_ratio"]),
            "num_hidden_layers": visual["layers"],
            "num_attention_heads": visual["heads"],
            "image_size": visual["image_size"],
            "patch_size": visual["patch_size"],
            "num_positions": NUM_POSITIONS,
            "num_queries": NUM_QUERIES,
            "output_size": visual["output_dim"],
            "pool_head_dim": POOL_HEAD_DIM,
        },
    )


def to_original_config(config: QwenVLConfig) -> dict:
    """The original `config.json` of a native configuration.

    Raises:
        ValueError: a size that the original code fixes to another value.
    """
    text, vision = config.text_config, config.vision_config
    fixed = {"num_positions": NUM_POSITIONS, "num_queries": NUM_QUERIES, "pool_head_dim": POOL_HEAD_DIM}
    for key, value in fixed.items():
        if getattr(vision, key) != value:
            raise ValueError(f"vision_config.{key} is {getattr(vision, key)}; the original code fixes it to {value}.")
    # The original computes the width from a ratio: four decimals, as released, where they give the same width.
    ratio = round(vision.intermediate_size / vision.hidden_size, 4)
    if int(vision.hidden_size * ratio) != vision.intermediate_size:
        ratio = math.nextafter(vision.intermediate_size / vision.hidden_size, math.inf)
    return {
        "architectures": [ARCHITECTURE],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": text.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": 2 * text.intermediate_size,
        "kv_channels": text.hidden_size // text.num_attention_heads,
        "layer_norm_epsilon": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": MODEL_TYPE,
        "no_bias": True,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "onnx_safe": None,
        "rotary_emb_base": int(text.rope_parameters["rope_theta"]),
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": text.train_length,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": str(config.dtype or "bfloat16").removeprefix("torch."),
        "use_cache": True,
        "use_dynamic_ntk": text.use_dynamic_ntk,
        "use_flash_attn": "auto",
        "use_logn_attn": text.use_logn_attn,
        "visual": {
            "heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "image_start_id": config.image_start_token_id,
            "layers": vision.num_hidden_layers,
            "mlp_ratio": ratio,
            "output_dim": vision.output_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
        },
        "vocab_size": text.vocab_size,
    }


def rules(config: QwenVLConfig) -> list[Rule]:
    """Every tensor of a Qwen-VL checkpoint in both layouts."""
    vision_heads = config.vision_config.num_attention_heads

    def split3(fused: torch.Tensor) -> Tensors:
        return fused.chunk(3)

    def join3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        return (torch.cat([q, k, v]),)

    def split_heads(fused: torch.Tensor) -> Tensors:
        """The ViT's rows lie per head, [q k v] of head 0, then of head 1, ..."""
        return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (vision_heads, 3, -1)).unbind(1))

    def join_heads(*parts: torch.Tensor) -> Tensors:
        return (torch.stack([part.unflatten(0, (vision_heads, -1)) for part in parts], dim=1).flatten(0, 2),)

    def transpose(matrix: torch.Tensor) -> Tensors:
        return (matrix.t(),)

    table = [
        Rule(("transformer.wte.weight",), ("model.language_model.embed_tokens.weight",)),
        Rule(("transformer.ln_f.weight",), ("model.language_model.norm.weight",)),
        Rule(("lm_head.weight",), ("lm_head.weight",)),
    ]
    for n in range(config.text_config.num_hidden_layers):
        old, new = f"transformer.h.{n}.", f"model.language_model.layers.{n}."
        for kind in ("weight", "bias"):
            fused = tuple(f"{new}self_attn.{x}_proj.{kind}" for x in "qkv")
            table.append(Rule((f"{old}attn.c_attn.{kind}",), fused, split3, join3))
        names = {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",  # out = c_proj(w1(x) * silu(w2(x)))
            "mlp.c_proj": "mlp.down_proj",
        }
        table += [Rule((f"{old}{a}.weight",), (f"{new}{b}.weight",)) for a, b in names.items()]

    old, new = "transformer.visual.", "model.vision_tower."
    table += [
        Rule((f"{old}conv1.weight",), (f"{new}patch_embedding.weight",)),
        Rule((f"{old}positional_embedding",), (f"{new}position_embedding",)),
        Rule((f"{old}attn_pool.query",), (f"{new}attn_pool.query",)),
        Rule((f"{old}attn_pool.pos_embed",), (f"{new}attn_pool.pos_embed",)),
        Rule((f"{old}attn_pool.kv_proj.weight",), (f"{new}attn_pool.kv_proj.weight",)),
        # The original multiplies with this matrix from the right.
        Rule((f"{old}proj",), (f"{new}projection.weight",), transpose, transpose),
    ]
    for kind in ("weight", "bias"):
        names = {
            "ln_pre": "pre_layernorm",
            "ln_post": "post_layernorm",
            "attn_pool.ln_q": "attn_pool.ln_q",
            "attn_pool.ln_kv": "attn_pool.ln_kv",
            "attn_pool.attn.out_proj": "attn_pool.out_proj",
        }
        for n in range(config.vision_config.num_hidden_layers):
            a, b = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
            names |= {
                f"{a}ln_1": f"{b}layer_norm1",
                f"{a}ln_2": f"{b}layer_norm2",
                f"{a}attn.out_proj": f"{b}self_attn.out_proj",
                f"{a}mlp.c_fc": f"{b}mlp.fc1",
                f"{a}mlp.c_proj": f"{b}mlp.fc2",
            }
            fused = tuple(f"{new}{b}self_attn.{x}_proj.{kind}" for x in "qkv")
            table.append(Rule((f"{old}{a}attn.in_proj.{kind}",), fused, split_heads, join_heads))
        table += [Rule((f"{old}{a}.{kind}",), (f"{new}{b}.{kind}",)) for a, b in names.items()]
        fused = tuple(f"{new}attn_pool.{x}_proj.{kind}" for x in "qkv")
        table.append(Rule((f"{old}attn_pool.attn.in_proj_{kind}",), fused, split3, join3))
    return table


def ignored(name: str) -> bool:
    """Buffers of older releases that the model computes."""
    return name.endswith(("rotary_emb.inv_freq", ".masked_bias"))


def native_shapes(config: QwenVLConfig) -> dict[str, torch.Size]:
    """Names and shapes of the converted state dict; no weights are made."""
    with torch.device("meta"):
        state = QwenVLForConditionalGeneration(config).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def convert(source: Path, target: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Original layout in `source` to native layout in `target`; config.json is written last.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint_io`.
    """
    config = to_native_config(json.loads((source / "config.json").read_text()))
    tokenizer = build_tokenizer(source / "qwen.tiktoken")
    if tokenizer.convert_tokens_to_ids("<imgpad>") != config.image_token_id:
        raise ValueError(
            f"{source}: qwen.tiktoken and config.json disagree about the id of <imgpad>: take both from the same release."
        )
    rewrite(source, target, rules(config), ignored, native_shapes(config), max_shard_bytes=max_shard_bytes)
    side = config.vision_config.image_size
    pixels = SquareImageProcessor(size={"height": side, "width": side})
    QwenVLProcessor(pixels, tokenizer, num_image_tokens=NUM_QUERIES).save_pretrained(target)
    generation = json.loads(file.read_text()) if (file := source / "generation_config.json").exists() else {}
    kept = ("do_sample", "max_new_tokens", "top_k", "top_p", "temperature", "repetition_penalty")
    GenerationConfig(
        **{key: generation[key] for key in kept if key in generation},
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(target)
    config.save_pretrained(target)


def revert(source: Path, target: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Native layout in `source` to the original layout in `target`: weights, config.json and the tokenizer.

    The Python files of the hub are not written.
    """
    config = QwenVLConfig.from_pretrained(source)
    original = to_original_config(config)
    rewrite(source, target, rules(config), shapes=native_shapes(config), reverse=True, max_shard_bytes=max_shard_bytes)
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_ranks(tokenizer, target / "qwen.tiktoken")
    tokenizer_config = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "QWenTokenizer",
    }
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    generation = {"chat_format": "chatml", "eos_token_id": end, "pad_token_id": end, "max_window_size": 6144}
    native = GenerationConfig.from_pretrained(source)
    generation |= {key: getattr(native, key) for key in ("do_sample", "max_new_tokens", "top_k", "top_p")}
    for name, content in {
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
        "config.json": original,
    }.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(__doc__, "models.qwen_vl.convert", convert, revert, ["*.tiktoken"])
