"""Checkpoints with random weights in the shapes of public models, and rows to train them on.

`cpu` keeps each model's image tokens and layout at about 1/8 of its width and depth, with tower and lm_head near their
published share of the work; `7b` is the published configuration; `tiny` is for a test. Both sides of a comparison need
the same tokens, so all families share one byte-level tokenizer and one ChatML template, which writes nothing after an
answer's end token (trainers differ in whether they train on what follows it).
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image

from base.model import VLModelMixin
from tests import zoo

SIZES = ("tiny", "cpu", "7b")
WORDS = sorted({word.strip(".:?,") for sentence in zoo.SENTENCES for word in sentence.split()})
Parts = tuple[tf.PreTrainedModel, tf.ProcessorMixin]


def template(image: str) -> str:
    """ChatML without a line break after <|im_end|>."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
        "{{ '" + image + "' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def tokenizer_of(special: list[str], named: dict[str, str] | None = None) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of bytes with ChatML's marks and these special tokens; `named`: attributes such as image_token."""
    return zoo.byte_tokenizer(["<|im_start|>", *special], named, **zoo.CHATML)


def decoder(size: str, vocabulary: int, cpu: tuple[int, int, int], full: tuple[int, int, int, int, int]) -> dict:
    """Text configuration: cpu (width, layers, key-value heads), full (width, intermediate, layers, heads, key-value heads)."""
    if size == "7b":
        width, inner, layers, heads, kv = full
    elif size == "cpu":
        width, layers, kv = cpu
        inner, heads = width * 43 // 16 // 32 * 32, width // (full[0] // full[3])  # heads as wide as published
    else:
        width, inner, layers, heads, kv = 32, 64, 2, 4, 2
    # lm_head keeps its share of the decoder's work
    share = layers * inner / (full[2] * full[1])
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary if size == "7b" else max(512, int(vocabulary * share)),
        max_position_embeddings=32768,
    )


def encoder(size: str, cpu: tuple[int, int], full: tuple[int, int, int, int]) -> dict:
    """Vision configuration: cpu (width, layers), full (width, intermediate, layers, heads)."""
    width, inner, layers, heads = full if size == "7b" else (cpu[0], 4 * cpu[0], cpu[1], max(cpu[0] // 64, 1))
    if size == "tiny":
        width, inner, layers, heads = 32, 64, 2, 4
    return dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)


def ids(tokenizer: tf.PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The special ids that a configuration wants, as its keyword arguments."""
    return dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def llava(size: str) -> Parts:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, 576 tokens per image, Vicuna-7B."""
    return _llava(size, anyres=False)


def llava_wide(size: str) -> Parts:
    """LLaVA-1.5 at half its width, with two layers: matrix products outweigh the rest, as they do at 7B."""
    return _llava(size, anyres=False, cpu=((2048, 2, 16), (256, 6)))


def llava_next(size: str) -> Parts:
    """LLaVA-NeXT-7B: a base view and two tiles of a 672 x 336 picture, 1,752 tokens."""
    return _llava(size, anyres=True)


def _llava(
    size: str, anyres: bool, cpu: tuple[tuple[int, int, int], tuple[int, int]] = ((512, 4, 4), (128, 3))
) -> Parts:
    tokenizer = tokenizer_of(["<image>"], {"image_token": "<image>"})
    side, patch = (28, 7) if size == "tiny" else (336, 14)
    vision = tf.CLIPVisionConfig(
        **encoder(size, cpu[1], (1024, 4096, 24, 16)), image_size=side, patch_size=patch, projection_dim=768
    )
    text = tf.LlamaConfig(**decoder(size, 32064, cpu[0], (4096, 11008, 32, 32, 32)), **ids(tokenizer))
    common: dict[str, Any] = dict(
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    square = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if not anyres:
        config = tf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id, vision_feature_layer=-2
        )
        return tf.LlavaForConditionalGeneration(config), tf.LlavaProcessor(
            tf.CLIPImageProcessor(**square), tokenizer, **common
        )
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    config = tf.LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
    )
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessor(**square, image_grid_pinpoints=grids), tokenizer, **common
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


def qwen2_5_vl(size: str) -> Parts:
    """Qwen2.5-VL-7B: its tower reads four patches per token; 256 tokens for 448 x 448 pixels, 576 for 672 x 672."""
    tokenizer = tokenizer_of(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    patch = 7 if size == "tiny" else 14
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(patch_size=patch, temporal_patch_size=2, merge_size=2),
        tokenizer,
        tf.Qwen2VLVideoProcessor(patch_size=patch),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    text = decoder(size, 152064, (512, 4, 1), (3584, 18944, 28, 28, 4))
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, window_size=28, fullatt_block_indexes=[1])
    if size == "cpu":
        vision = dict(
            depth=4,
            hidden_size=160,
            intermediate_size=428,
            num_heads=2,
            window_size=112,
            fullatt_block_indexes=[1, 3],
        )
    elif size == "7b":
        vision = dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        )
    sections = [2, 1, 1] if size == "tiny" else [16, 24, 24]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    names = dict(
        image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>", vision_end="<|vision_end|>"
    )
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision | {"patch_size": patch, "out_hidden_size": text["hidden_size"]},
        text_config=text | ids(tokenizer) | {"rope_parameters": rope},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


def internvl(size: str) -> Parts:
    """InternVL3-8B: InternViT-300M at 448 pixels, 256 tokens per tile, one tile here."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_of([*named.values()], named)
    side, patch, tokens = (28, 7, 4) if size == "tiny" else (448, 14, 256)
    square = {"height": side, "width": side}
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer,
        tf.InternVLVideoProcessor(size=square),
        image_seq_length=tokens,
        chat_template=template("<IMG_CONTEXT>"),
    )
    vision = encoder(size, (128, 3), (1024, 4096, 24, 16))
    config = tf.InternVLConfig(
        vision_config=vision | {"image_size": [side, side], "patch_size": [patch, patch]},
        text_config=tf.Qwen2Config(
            **decoder(size, 151674, (512, 4, 1), (3584, 18944, 28, 28, 4)), **ids(tokenizer), tie_word_embeddings=False
        ),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def smolvlm(size: str) -> Parts:
    """SmolVLM2-2.2B's design: tiles of 512 pixels (here four of them and the whole picture), 64 tokens each."""
    return _smolvlm(
        size,
        encoder(size, (128, 3), (1152, 4304, 27, 16)),
        decoder(size, 49280, (384, 4, 6), (2048, 8192, 24, 32, 32)),
    )


def smolvlm_256m(size: str) -> Parts:
    """SmolVLM-256M as published, at every size: not a stand-in."""
    size = size if size == "tiny" else "7b"
    return _smolvlm(
        size, encoder(size, (0, 0), (768, 3072, 12, 12)), decoder(size, 49280, (0, 0, 0), (576, 1536, 30, 9, 3))
    )


def _smolvlm(size: str, vision: dict, text: dict) -> Parts:
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<|im_end|>",
        "global_image_token": "<global-img>",
    }
    special = [token for token in named.values() if token != "<|im_end|>"]
    tokenizer = tokenizer_of([*special, *zoo.IDEFICS_TILES, "<video>"], named)
    side, patch, scale = (28, 7, 2) if size == "tiny" else (512, 16, 4)
    processor = tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(
            size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}, do_image_splitting=True
        ),
        tokenizer,
        tf.SmolVLMVideoProcessor(),
        image_seq_len=(side // patch // scale) ** 2,
        chat_template=template("<image>"),
    )
    config = tf.SmolVLMConfig(
        vision_config=vision | {"image_size": side, "patch_size": patch},
        text_config=tf.LlamaConfig(**text, **ids(tokenizer), tie_word_embeddings=False),
        image_token_id=tokenizer.image_token_id,
        scale_factor=scale,
        tie_word_embeddings=False,
    )
    return tf.SmolVLMForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[str], Parts]] = {
    f.__name__: f for f in (llava, llava_wide, llava_next, qwen2_5_vl, internvl, smolvlm, smolvlm_256m)
}
# Width and height of the pictures, at sizes cpu and 7b
PICTURES = {
    "llava": (336, 336),
    "llava_wide": (336, 336),
    "llava_next": (672, 336),
    "qwen2_5_vl": (448, 448),
    "internvl": (448, 448),
    "smolvlm": (1024, 1024),
    "smolvlm_256m": (1024, 1024),
}
# At size tiny; Qwen2.5-VL's is its smallest, to which every trainer would otherwise enlarge a picture in a way of its own
TINY_PICTURES = dict.fromkeys(PICTURES, (28, 28)) | {"qwen2_5_vl": (56, 56)}


def build(family: str, size: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint with random weights (seed 0) and return its folder."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model, processor = FAMILIES[family](size)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def answer(tokenizer: tf.PreTrainedTokenizerFast, tokens: int, seed: int, begin: str = "") -> str:
    """Random words that follow those of `begin`: `tokens` tokens in all, with the end token."""
    words = [word for word in WORDS if len(tokenizer.tokenize(" " + word)) == 1]
    missing = tokens - 1 - len(tokenizer.tokenize(begin))
    return begin + "".join(" " + word for word in random.Random(seed).choices(words, k=missing))


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def lora_targets(model: tf.PreTrainedModel) -> str:
    """For LoraConfig: the linear layers of transformers' own model that train_*.py adapt by default."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(VLModelMixin.default_lora_target)})"


def rows(
    family: str,
    size: str,
    folder: Path,
    tokens: int,
    count: int,
    num_responses: int = 2,
    common: float = 0.0,
    pixels: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Preference rows whose answers all take `tokens` tokens, pictures as PNG files in `folder`.

    Args:
        pixels: width and height of the pictures; the family's of `PICTURES` if not given.
        common: share of an answer's tokens that all answers of a row begin with.
    """
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    found = []
    for i in range(count):
        path = folder / f"picture{i}.png"
        picture(TINY_PICTURES[family] if size == "tiny" else pixels or PICTURES[family], i).save(path)
        begin = answer(tokenizer, int(tokens * common), 1000 + i) if common else ""
        found.append(
            {
                "images": [str(path)],
                "prompt": [{"role": "user", "content": answer(tokenizer, 20, 2000 + i)}],
                "responses": [answer(tokenizer, tokens, 10 * i + k, begin) for k in range(num_responses)],
                "ranks": [float(k) for k in range(num_responses)],
            }
        )
    return found
