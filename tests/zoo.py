"""Tiny random checkpoints, one builder per family, so that every test runs offline and in milliseconds.

`checkpoint("llava")` is the folder of a model with about 0.1 M random weights and its processor, saved as the hub would hold it: vanilla key
names, vanilla `architectures`, a tokenizer of the family's kind and the family's published chat template (each template names its source; the
words of the templates are ours, what they render is not). Two things are unlike a hub checkpoint, on purpose: weights are larger than a fresh
initialisation, and the gates that start at zero (Gemma 3's projection, Mllama's cross-attention) are open, so that images change the output.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import base.compat  # noqa: F401  (must come before transformers)

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "USER: What is in this image? ASSISTANT: A red square and a blue circle on the table.",
    "user assistant system User Assistant model describe the photo in one sentence, yes or no",
    "There are two green triangles left of a yellow star. The quick brown fox jumps over the lazy dog. 0123456789",
]
WIDTH = 32
TEXT = dict(
    hidden_size=WIDTH,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
VISION = dict(
    hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
)
SQUARE = {"height": 28, "width": 28}

Parts = tuple[tf.PreTrainedModel, tf.ProcessorMixin]
BUILDERS: dict[str, Callable[[], Parts]] = {}


def family(build: Callable[[], Parts]) -> Callable[[], Parts]:
    """Registers a builder under its own name."""
    BUILDERS[build.__name__] = build
    return build


# ----------------------------------------------------------------------------------------------------------------------------------------
# Tokenizers of the three kinds that the families use. The kind matters: it decides what happens at the border of prompt and response.


def byte_tokenizer(special: Sequence[str], named: dict[str, str] | None = None, **kwargs) -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE (Qwen, Llama 3, SmolLM, Tekken): text splits at spaces, a space belongs to the word that follows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _trained(core, special, named, pre_tokenizers.ByteLevel.alphabet(), **kwargs)


def sentencepiece_tokenizer(
    special: Sequence[str], named: dict[str, str] | None = None, prefix: bool = True, **kwargs
) -> tf.PreTrainedTokenizerFast:
    """SentencePiece BPE. `prefix=True`: Llama 2, Vicuna, Mistral, which put a space before every piece of text, also after a special token.
    `prefix=False`: Gemma, which does not."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # for training only: merges stay inside words
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    tokenizer = _trained(core, ["<unk>", *special], named, alphabet, **kwargs)
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = None
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    undo = [decoders.Replace("▁", " "), decoders.Fuse()]
    core.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def _trained(
    core: Tokenizer,
    special: Sequence[str],
    named: dict[str, str] | None,
    alphabet: list[str],
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    pad: str = "<pad>",
    add_bos: bool = True,
) -> tf.PreTrainedTokenizerFast:
    tokens = list(dict.fromkeys([pad, *([bos] if bos else []), eos, *special]))
    core.train_from_iterator(
        SENTENCES * 20,
        trainers.BpeTrainer(
            vocab_size=400 + len(tokens), special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=named or {}
    )


def token_ids(tokenizer: tf.PreTrainedTokenizerFast) -> dict[str, int]:
    """The three ids and the vocabulary size that every text config wants."""
    return dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# ----------------------------------------------------------------------------------------------------------------------------------------
# Families. Each template renders what its source publishes; contents are lists of parts, as the sources expect.

# llava-hf/llava-1.5-7b-hf, model card: "USER: <image>\n<prompt> ASSISTANT:"; images first, one space after every text. The card's template
# writes no end token after an answer; the original code (haotian-liu/LLaVA, conversation.py, vicuna_v1) writes </s>.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@family
def llava() -> Parts:
    """LLaVA-1.5: CLIP tower, Vicuna decoder, 16 tokens per image here (576 in the released models)."""
    tokenizer = sentencepiece_tokenizer(["<image>"], {"image_token": "<image>"})
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
    )
    return tf.LlavaForConditionalGeneration(config), processor


# mistralai/Pixtral-12B-2409, model card of mistral-community/pixtral-12b: "<s>[INST]Describe the images.\n[IMG][IMG][/INST]": parts in their
# order, no spaces inside the tags, the answer follows the tag and ends in </s>.
PIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@family
def pixtral() -> Parts:
    """Pixtral-12B: the LLaVA class around a Pixtral tower; as many tokens as patches, with a break after every row."""
    tokenizer = byte_tokenizer(["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    processor = tf.PixtralProcessor(
        tf.PixtralImageProcessor(size={"longest_edge": 28}, patch_size={"height": 7, "width": 7}),
        tokenizer,
        patch_size=7,
        spatial_merge_size=1,
        chat_template=PIXTRAL_TEMPLATE,
    )
    config = tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT, head_dim=8, **token_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


# ----------------------------------------------------------------------------------------------------------------------------------------


def build(family: str, directory: str | Path, seed: int = 0) -> Path:
    """Builds one family's tiny checkpoint and processor into `directory` and returns the path; the same seed gives the same weights.

    Raises:
        KeyError: for a family without a builder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = BUILDERS[family]()
        _make_images_matter(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


@torch.no_grad()
def _make_images_matter(model: tf.PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):  # Mllama: tanh(0) shuts the images out
            weight.fill_(0.5)
        elif name.endswith("mm_input_projection_weight"):  # Gemma 3: zeros
            torch.nn.init.normal_(weight, std=0.1)
        elif weight.ndim >= 2:
            weight.mul_(4)  # 0.02 is far too small for a width of 32: all logits would be equal


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny_checkpoints_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def checkpoint(family: str, seed: int = 0) -> str:
    """The folder of a tiny checkpoint, built once per process and removed at its end. For reading only: copy it before changing it."""
    return str(build(family, _root() / f"{family}-{seed}", seed))


def image(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """An RGB picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
