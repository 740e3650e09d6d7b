"""Tiny random checkpoints, one builder per family, so that every test runs offline and in milliseconds.

`checkpoint("llava")` is the folder of a model with about 0.1 M random weights and its processor, saved as the hub
would hold it: plain key names, plain `architectures`, a tokenizer of the family's kind and the family's published
chat template (each template names its source; the Jinja code is ours, the text it renders is theirs). Two
things differ from a hub checkpoint on purpose: weights are larger than a fresh initialisation, and the gates that
start at zero (Gemma 3's projection, Mllama's cross-attention) are open, so that images change the output.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.compat import write_hub_names

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
BUILDERS: dict[str, Callable[..., Parts]] = {}
ONE_ROW_PER_RESPONSE = {"qwen3_5", "lfm2_vl"}  # their linear layers would mix the responses of a packed row


def family(build: Callable[..., Parts]) -> Callable[..., Parts]:
    """Registers a builder under its own name."""
    BUILDERS[build.__name__] = build
    return build


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of the three kinds that the families use. The kind matters: it decides what happens at the boundary of
# prompt and response.


def byte_tokenizer(special: Sequence[str], named: dict[str, str] | None = None, **kwargs) -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE (Qwen, Llama 3, SmolLM, Tekken): text splits at spaces, a space belongs to the word that
    follows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _trained(core, special, named, pre_tokenizers.ByteLevel.alphabet(), **kwargs)


def sentencepiece_tokenizer(
    special: Sequence[str], named: dict[str, str] | None = None, prefix: bool = True, **kwargs
) -> tf.PreTrainedTokenizerFast:
    """SentencePiece BPE. `prefix=True`: Llama 2, Vicuna, Mistral, which put a space before every piece of text, also
    after a special token. `prefix=False`: Gemma, which does not."""
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
    plain: Sequence[str] = (),
) -> tf.PreTrainedTokenizerFast:
    """`plain` are added tokens that are not special, as most real tokenizers have some."""
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
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
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


# ---------------------------------------------------------------------------------------------------------------------
# Gemma's tokenizers hold runs of line breaks and of spaces as added tokens that are not special.
GEMMA = dict(prefix=False, bos="<bos>", eos="<eos>", plain=["\n", "\n\n", "▁▁", "▁▁▁"])
CHATML = dict(bos=None, eos="<|im_end|>", pad="<|endoftext|>", add_bos=False)  # Qwen's tokenizers have no BOS


def _stops_at(model: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerFast, *tokens: str) -> tf.PreTrainedModel:
    """Adds end-of-turn tokens beside the tokenizer's EOS, as the generation_config.json of these families does."""
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(tokens))]
    return model


# Families. Each template renders what its source publishes; contents are lists of parts, as the sources expect.

# llava-hf/llava-1.5-7b-hf, model card: "USER: <image>\n<prompt> ASSISTANT:"; images first, one space after every text.
# The card's template writes no end token after an answer; the original code (haotian-liu/LLaVA, conversation.py,
# vicuna_v1) writes </s>.
_LLAVA_IMAGES = "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    f"{_LLAVA_IMAGES}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@family
def llava(width: int = WIDTH, heads: int = 4) -> Parts:
    """LLaVA-1.5: CLIP tower, Vicuna decoder, 16 tokens per image here (576 in the released models).

    vLLM's attention on a CPU takes heads of 64: `width=128, heads=2`.
    """
    size = {"hidden_size": width, "num_attention_heads": heads}
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
        vision_config=tf.CLIPVisionConfig(**VISION | size, projection_dim=width),
        text_config=tf.LlamaConfig(**TEXT | size, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
    )
    return tf.LlavaForConditionalGeneration(config), processor


# mistralai/Pixtral-12B-2409, model card of mistral-community/pixtral-12b: "<s>[INST]Describe the
# images.\n[IMG][IMG][/INST]": parts in their order, no spaces inside the tags, the answer follows the tag and ends in
# </s>.
INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# A system message opens the last user turn, if nothing follows that.
PIXTRAL_TEMPLATE = INST_TEMPLATE.replace(
    "{{ bos_token }}{% for m in messages %}",
    "{{ bos_token }}{% set ns = namespace(system='') %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.system = messages[0]['content'][0]['text'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}",
).replace("{{ '[INST]' }}", "{{ '[INST]' + (ns.system if loop.last else '') }}")


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


# llava-hf/llava-v1.6-mistral-7b-hf, model card "[INST] <image>\n<prompt> [/INST]" and chat_template.json, whose
# answers end in a mistyped `<\s> ` instead of </s>: kept, because checkpoints on the hub have it and the labels must
# not learn it.
LLAVA_NEXT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '<\\\\s> ' }}{% endif %}{% endfor %}"
)


@family
def llava_next() -> Parts:
    """LLaVA-NeXT (1.6) with a Mistral decoder: a base view and up to four tiles, so images of different shape give
    different token counts."""
    tokenizer = sentencepiece_tokenizer(["<image>"], {"image_token": "<image>"})
    grids = [[28, 56], [56, 28], [56, 56]]
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=grids),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT_TEMPLATE,
    )
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
        text_config=tf.MistralConfig(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=grids,
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


# llava-hf/llava-onevision-qwen2-7b-ov-hf, chat_template.json: "<|im_start|>user
# <image>\n<prompt><|im_end|><|im_start|>assistant\n": a space after the role, no newline after <|im_end|>; a rendered
# answer starts with " \n", a generation prompt with "\n".
LLAVA_ONEVISION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@family
def llava_onevision() -> Parts:
    """LLaVA-OneVision: SigLIP tower, Qwen2 decoder, anyres tiles."""
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = byte_tokenizer(["<|im_start|>", *named.values()], named, **CHATML)
    grids = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=grids),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION_TEMPLATE,
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


@family
def instructblip() -> Parts:
    """InstructBLIP with a Vicuna decoder: four query tokens per image stand before BOS (32 in the released models);
    the Q-Former reads the instruction through a BERT tokenizer. The checkpoints have no chat template: the
    paper prompts with the bare instruction."""
    tokenizer = sentencepiece_tokenizer(["<image>"])  # the processor fails on a tokenizer whose image token has a name
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *("##" + letter for letter in letters)]
    bert = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer()
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    qformer_tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=bert,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
    )
    processor = tf.InstructBlipProcessor(
        tf.BlipImageProcessor(size=SQUARE), tokenizer, qformer_tokenizer, num_query_tokens=4
    )
    config = tf.InstructBlipConfig(
        vision_config=dict(**VISION, initializer_range=0.02),
        qformer_config=dict(
            vocab_size=len(qformer_tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            encoder_hidden_size=WIDTH,
        ),
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return tf.InstructBlipForConditionalGeneration(config), processor


# Qwen/Qwen2-VL-7B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct, chat_template.json (default system message);
# Qwen/Qwen3-VL-8B-Instruct (none).
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' and default_system %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}{% else %}"
    "{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_SPECIAL = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# mrope_section counts frequencies per axis (time, height, width) and must sum to half the head size
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def _qwen(
    processor_class: type[tf.ProcessorMixin], video_class: type, default_system: bool
) -> tuple[tf.ProcessorMixin, dict[str, int]]:
    """Processor and token ids of the Qwen-VL line: 4 to 16 tokens per image here, by its size."""
    tokenizer = byte_tokenizer(QWEN_SPECIAL, **CHATML, plain=["<think>", "</think>"])
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = processor_class(
        tf.Qwen2VLImageProcessor(size=pixels, patch_size=7, temporal_patch_size=2, merge_size=2),
        tokenizer,
        # Qwen3-VL counts the pixels of all frames, the others of one.
        video_class(patch_size=7, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 8}),
        chat_template="{% set default_system = " + str(default_system).lower() + " %}" + QWEN_TEMPLATE,
    )
    names = dict(
        image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>", vision_end="<|vision_end|>"
    )
    return processor, {f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


@family
def qwen2_vl() -> Parts:
    """Qwen2-VL: native resolution, M-RoPE."""
    processor, special = _qwen(tf.Qwen2VLProcessor, tf.Qwen2VLVideoProcessor, default_system=True)
    config = tf.Qwen2VLConfig(
        vision_config=dict(depth=2, embed_dim=WIDTH, hidden_size=WIDTH, num_heads=4, patch_size=7, mlp_ratio=2),
        text_config=dict(**TEXT, **token_ids(processor.tokenizer), rope_parameters=QWEN_ROPE),
        **special,
    )
    return tf.Qwen2VLForConditionalGeneration(config), processor


@family
def qwen2_5_vl() -> Parts:
    """Qwen2.5-VL: as Qwen2-VL, with window attention in the tower."""
    processor, special = _qwen(tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor, default_system=True)
    vision = dict(depth=2, hidden_size=WIDTH, out_hidden_size=WIDTH, intermediate_size=64, num_heads=4, patch_size=7)
    config = tf.Qwen2_5_VLConfig(
        vision_config=dict(**vision, window_size=28, fullatt_block_indexes=[1]),
        text_config=dict(**TEXT, **token_ids(processor.tokenizer), rope_parameters=QWEN_ROPE),
        **special,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


@family
def qwen3_vl() -> Parts:
    """Qwen3-VL: interleaved M-RoPE, tower features added to the first decoder layers (deepstack)."""
    processor, special = _qwen(tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor, default_system=False)
    vision = dict(depth=3, hidden_size=WIDTH, out_hidden_size=WIDTH, intermediate_size=64, num_heads=4, patch_size=7)
    config = tf.Qwen3VLConfig(
        vision_config=dict(**vision, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=dict(
            **{**TEXT, "num_hidden_layers": 3},
            **token_ids(processor.tokenizer),
            head_dim=8,
            rope_parameters=QWEN_ROPE | {"mrope_interleaved": True},
        ),
        **special,
    )
    return tf.Qwen3VLForConditionalGeneration(config), processor


# OpenGVLab/InternVL3-8B-hf, chat_template.jinja; the rendered example is in transformers' own integration test of
# InternVL.
INTERNVL_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@family
def internvl() -> Parts:
    """InternVL3: tiles of 4 tokens each (256 in the released models) between <img> and </img>."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(["<|im_start|>", *named.values()], named, **CHATML)
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer,
        tf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    config = tf.InternVLConfig(
        vision_config=VISION | {"image_size": [28, 28], "patch_size": [7, 7]},
        text_config=tf.Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return tf.InternVLForConditionalGeneration(config), processor


# HuggingFaceM4/Idefics3-8B-Llama3 and HuggingFaceTB/SmolVLM-Instruct, chat_template.json: the same but for the first
# token; no space after the colon when a turn starts with an image.
IDEFICS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}"
    "{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS_SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IDEFICS_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
IDEFICS_SIZE = dict(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True)


@family
def idefics3() -> Parts:
    """Idefics3 (Llama 3): tiles of 28 pixels and a global view, 4 tokens each, with row and column marks between."""
    tokenizer = byte_tokenizer(
        IDEFICS_SPECIAL + IDEFICS_TILES, bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|finetune_right_pad_id|>"
    )
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessor(**IDEFICS_SIZE),
        tokenizer,
        image_seq_len=4,
        chat_template="{{ '<|begin_of_text|>' }}" + IDEFICS_TEMPLATE,
    )
    config = tf.Idefics3Config(
        vision_config=VISION,
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return _stops_at(tf.Idefics3ForConditionalGeneration(config), tokenizer, "<end_of_utterance>"), processor


@family
def smolvlm() -> Parts:
    """SmolVLM: Idefics3's layout around SmolLM2."""
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    tokenizer = byte_tokenizer(
        [*named.values(), *IDEFICS_TILES, "<video>"],
        named,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        add_bos=False,
    )
    processor = tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(**IDEFICS_SIZE),
        tokenizer,
        tf.SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
        image_seq_len=4,
        chat_template="{{ '<|im_start|>' }}"
        + IDEFICS_TEMPLATE.replace(
            "{% else %}{{ '<image>' }}", "{% elif part['type'] == 'video' %}{{ '<video>' }}{% else %}{{ '<image>' }}"
        ),
    )
    config = tf.SmolVLMConfig(
        vision_config=VISION,
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config), processor


@family
def paligemma() -> Parts:
    """PaliGemma: the prompt is a prefix with attention both ways, "<image>... <bos>prompt\\n". No chat template on the
    hub."""
    tokenizer = sentencepiece_tokenizer(["<image>"], {"image_token": "<image>"}, **GEMMA, add_bos=False)
    image_processor = tf.SiglipImageProcessor(size=SQUARE)
    image_processor.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(image_processor, tokenizer)  # adds 1,152 location and segmentation tokens
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.GemmaConfig(**TEXT, head_dim=8, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=len(tokenizer),
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


# google/gemma-3-4b-it, chat_template.json: system text opens the first user turn, texts are trimmed, the assistant is
# called model.
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set ns.system = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (ns.system if loop.first else '') }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@family
def gemma3() -> Parts:
    """Gemma 3: one sliding-window layer (24 positions, so that tests pass its edge) and one global; image blocks
    attend both ways."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = sentencepiece_tokenizer(["<start_of_turn>", "<end_of_turn>", *named.values()], named, **GEMMA)
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size=SQUARE), tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=4
    )
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(
            **TEXT,
            **token_ids(tokenizer),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return _stops_at(tf.Gemma3ForConditionalGeneration(config), tokenizer, "<end_of_turn>"), processor


# mistralai/Mistral-Small-3.1-24B-Instruct-2503, chat_template.json, without its default system message, which holds
# the day's date: "<s>[INST]...[/INST]answer</s>", a system message between [SYSTEM_PROMPT] and [/SYSTEM_PROMPT].
MISTRAL3_TEMPLATE = INST_TEMPLATE.replace(
    "{% if m['role'] == 'user' %}{{ '[INST]' }}{% endif %}",
    "{% if m['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' }}{% elif m['role'] == 'user' %}{{ '[INST]' }}{% endif %}",
).replace(
    "{% if m['role'] == 'user' %}{{ '[/INST]' }}",
    "{% if m['role'] == 'system' %}{{ '[/SYSTEM_PROMPT]' }}{% elif m['role'] == 'user' %}{{ '[/INST]' }}",
)


@family
def mistral3() -> Parts:
    """Mistral Small 3.1: a Pixtral tower whose patches are merged two by two."""
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = byte_tokenizer(marks)
    processor = tf.PixtralProcessor(
        tf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7}),
        tokenizer,
        patch_size=7,
        spatial_merge_size=2,
        chat_template=MISTRAL3_TEMPLATE,
    )
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION | {"image_size": 56}),
        text_config=tf.MistralConfig(**TEXT, head_dim=8, **token_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return tf.Mistral3ForConditionalGeneration(config), processor


# meta-llama/Llama-3.2-11B-Vision-Instruct, chat_template.json: prompts without an image get a system block with dates
# (the template's own fallback date here, so that the tests of every day agree); a system message beside an image is
# refused.
MLLAMA_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(images=false, system='') %}"
    "{% if messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'][0]['text'] | trim %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% for part in m['content'] if part['type'] == 'image' %}{% set ns.images = true %}"
    "{% endfor %}{% endfor %}"
    "{% if ns.images and ns.system %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}{% endif %}"
    "{% if not ns.images %}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n' + ns.system + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@family
def mllama() -> Parts:
    """Llama 3.2 Vision: the image enters by cross-attention in the second of three layers; one token in the text, up
    to two tiles."""
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|image|>", "<|python_tag|>"]
    tokenizer = byte_tokenizer(marks, bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>")
    processor = tf.MllamaProcessor(
        tf.MllamaImageProcessor(size=SQUARE, max_image_tiles=2), tokenizer, chat_template=MLLAMA_TEMPLATE
    )
    text = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    config = tf.MllamaConfig(
        vision_config=dict(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            intermediate_size=64,
            vision_output_dim=2 * WIDTH,
            image_size=28,
            patch_size=7,
            max_num_tiles=2,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        text_config=dict(
            **text | {"num_hidden_layers": 3},
            **token_ids(tokenizer),
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return tf.MllamaForConditionalGeneration(config), processor


# llava-hf/vip-llava-7b-hf, model card: "###Human: <image>\n<prompt>###Assistant:", answers after a space; the system
# sentence of the card is the user's to write.
VIPLLAVA_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': '', 'user': '###Human: ', 'assistant': '###Assistant: '}[m['role']] }}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)


@family
def vipllava() -> Parts:
    """ViP-LLaVA: LLaVA with features of several tower layers."""
    tokenizer = sentencepiece_tokenizer(["<image>"], {"image_token": "<image>"})
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VIPLLAVA_TEMPLATE,
    )
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=[-2, -1],
    )
    return tf.VipLlavaForConditionalGeneration(config), processor


@family
def idefics2() -> Parts:
    """Idefics2: a perceiver gives 4 tokens per image here (64); Mistral with a sliding window (24 here, 4,096)."""
    tokenizer = sentencepiece_tokenizer(IDEFICS_SPECIAL[:3])
    processor = tf.Idefics2Processor(
        tf.Idefics2ImageProcessor(size={"shortest_edge": 14, "longest_edge": 28}, do_image_splitting=False),
        tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,  # HuggingFaceM4/idefics2-8b, tokenizer_config.json: the same words
    )
    perceiver = dict(resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8)
    config = tf.Idefics2Config(
        vision_config=VISION,
        perceiver_config=dict(hidden_size=WIDTH, num_key_value_heads=2, **perceiver),
        text_config=tf.MistralConfig(**TEXT, **token_ids(tokenizer), sliding_window=24),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _stops_at(tf.Idefics2ForConditionalGeneration(config), tokenizer, "<end_of_utterance>"), processor


# CohereLabs/aya-vision-8b, chat_template.jinja: turns between START and END tokens, answers between response tokens.
COHERE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|><|START_RESPONSE|>'}[m['role']] }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '<|END_RESPONSE|>' }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}"
)


@family
def aya_vision() -> Parts:
    """Aya Vision: SigLIP tiles, a Cohere 2 decoder with a sliding-window layer (24 positions here)."""
    turns = ["START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN"]
    image = ["START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK"]
    tokenizer = byte_tokenizer(
        ["<image>", *(f"<|{name}|>" for name in turns + image), "TILE_1", "TILE_2", "TILE_GLOBAL"],
        {"image_token": "<image>"},
        plain=["<|START_RESPONSE|>", "<|END_RESPONSE|>"],
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
    )
    processor = tf.AyaVisionProcessor(
        tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer,
        patch_size=7,
        img_size=28,
        downsample_factor=2,
        chat_template=COHERE_TEMPLATE,
    )
    window = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Cohere2Config(**TEXT, **token_ids(tokenizer), **window),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return tf.AyaVisionForConditionalGeneration(config), processor


@family
def ovis2() -> Parts:
    """Ovis2: the tower names every patch by a mixture of 40 visual words; 4 tokens per tile, marks between tiles."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = byte_tokenizer(["<|im_start|>", "<image>", "<IMG_ATOM>", *marks], **CHATML)
    # thisisiron/Ovis2-2B-hf, chat_template.json: ChatML with a default system message, a line break after an image.
    template = "{% set default_system = true %}" + QWEN_TEMPLATE
    processor = tf.Ovis2Processor(
        tf.Ovis2ImageProcessor(size=SQUARE, max_patches=2, crop_to_patches=True),
        tokenizer,
        chat_template=template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n"),
        image_seq_length=4,
    )
    config = tf.Ovis2Config(
        vision_config=dict(**VISION, vocab_size=40, hidden_stride=2),
        text_config=tf.Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
    )
    return tf.Ovis2ForConditionalGeneration(config), processor


# zai-org/GLM-4.1V-9B-Thinking, chat_template.jinja: a turn ends where the next role begins.
GLM_TEMPLATE = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}{% else %}"
    "{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@family
def glm4v() -> Parts:
    """GLM-4.1V: Qwen2-VL's positions, one fused gate and up projection."""
    images = [
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|video|>",
    ]
    roles = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = byte_tokenizer(
        roles + images,
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        bos=None,
        eos="<|endoftext|>",
        add_bos=False,
    )
    pixels = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 56 * 56}
    processor = tf.Glm4vProcessor(
        tf.Glm4vImageProcessor(size=pixels, patch_size=7, merge_size=2),
        tokenizer,
        tf.Glm4vVideoProcessor(patch_size=7),
        chat_template=GLM_TEMPLATE,
    )
    names = ["image_start", "image_end", "image", "video_start", "video_end", "video"]
    config = tf.Glm4vConfig(
        vision_config=dict(
            depth=2,
            hidden_size=WIDTH,
            out_hidden_size=WIDTH,
            intermediate_size=64,
            num_heads=4,
            patch_size=7,
            image_size=28,
        ),
        text_config=dict(**TEXT, **token_ids(tokenizer), rope_parameters=QWEN_ROPE | {"partial_rotary_factor": 1.0}),
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in zip(names, images, strict=True)
        },
    )
    return _stops_at(tf.Glm4vForConditionalGeneration(config), tokenizer, "<|user|>"), processor


@family
def qwen3_vl_moe() -> Parts:
    """Qwen3-VL with a mixture of four experts, two per token."""
    processor, special = _qwen(tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor, default_system=False)
    vision = dict(depth=3, hidden_size=WIDTH, out_hidden_size=WIDTH, intermediate_size=64, num_heads=4, patch_size=7)
    config = tf.Qwen3VLMoeConfig(
        vision_config=dict(**vision, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=dict(
            **{**TEXT, "num_hidden_layers": 3},
            **token_ids(processor.tokenizer),
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            rope_parameters=QWEN_ROPE | {"mrope_interleaved": True},
        ),
        **special,
    )
    return tf.Qwen3VLMoeForConditionalGeneration(config), processor


# Qwen/Qwen3.5-9B, chat_template.jinja: a generation prompt opens a thinking block, and closes it where thinking is
# switched off; the last answer of a conversation has one, empty where none is given, earlier answers have none. Texts
# are trimmed.
QWEN3_5_TEMPLATE = (
    QWEN_TEMPLATE.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
    .replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n<think>\n' }}{% if enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}",
    )
    .replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
)


@family
def qwen3_5() -> Parts:
    """Qwen3.5: one layer of linear attention (gated delta net), one of full attention."""
    processor, special = _qwen(tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor, default_system=False)
    processor.chat_template = "{% set default_system = false %}" + QWEN3_5_TEMPLATE
    vision = dict(depth=2, hidden_size=WIDTH, out_hidden_size=WIDTH, intermediate_size=64, num_heads=4, patch_size=7)
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    config = tf.Qwen3_5Config(
        vision_config=dict(**vision, num_position_embeddings=64),
        text_config=dict(
            **TEXT,
            **token_ids(processor.tokenizer),
            **linear,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            rope_parameters=QWEN_ROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
        ),
        **special,
    )
    return tf.Qwen3_5ForConditionalGeneration(config), processor


@family
def lfm2_vl() -> Parts:
    """LFM2-VL: one layer of short convolutions, one of attention; SigLIP 2 at native resolution."""
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    tokenizer = byte_tokenizer(
        ["<|im_start|>", *named.values()], named, bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>"
    )
    # LiquidAI/LFM2-VL-1.6B, chat_template.jinja: BOS, then ChatML.
    template = "{{ bos_token }}{% set default_system = false %}" + QWEN_TEMPLATE
    processor = tf.Lfm2VlProcessor(
        tf.Lfm2VlImageProcessor(
            tile_size=28,
            min_tiles=1,
            max_tiles=2,
            encoder_patch_size=7,
            downsample_factor=2,
            min_image_tokens=1,
            max_image_tokens=4,
            max_num_patches=16,
            do_image_splitting=False,
        ),
        tokenizer,
        chat_template=template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    )
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    config = tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(**vision, num_patches=16, vision_use_head=False),
        text_config=tf.Lfm2Config(
            **TEXT,
            **token_ids(tokenizer),
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
        ),
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=64,
    )
    return tf.Lfm2VlForConditionalGeneration(config), processor


# deepseek-community/deepseek-vl-7b-chat, chat_template.jinja: a default system sentence, blank lines between turns.
DEEPSEEK_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
DEEPSEEK_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '" + DEEPSEEK_SYSTEM + "\n\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' }}{% elif m['role'] == 'assistant' %}"
    "{{ 'Assistant: ' }}{% endif %}"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image_placeholder>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@family
def deepseek_vl() -> Parts:
    """DeepSeek-VL: SigLIP tower, Llama-shaped decoder, 16 tokens per image here (576)."""
    tokenizer = byte_tokenizer(
        ["<image_placeholder>"],
        {"image_token": "<image_placeholder>"},
        bos="<|begin▁of▁sentence|>",
        eos="<|end▁of▁sentence|>",
    )
    processor = tf.DeepseekVLProcessor(
        tf.DeepseekVLImageProcessor(size=SQUARE, min_size=7),
        tokenizer,
        chat_template=DEEPSEEK_TEMPLATE,
        num_image_tokens=16,
    )
    config = tf.DeepseekVLConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
    )
    return tf.DeepseekVLForConditionalGeneration(config), processor


# google/gemma-4-31B-it, chat_template.jinja with thinking off, its default: a generation prompt ends with an empty
# thinking block that a given conversation does not have.
GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n<|channel>thought\n<channel|>' }}{% endif %}"
)


@family
def gemma4() -> Parts:
    """Gemma 4: images of any shape, seen both ways in the sliding-window layers (24 positions here) only."""
    named = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
    }
    turns = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|video|>"]
    tokenizer = sentencepiece_tokenizer([*turns, *named.values()], named, **GEMMA)
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(),
        tf.Gemma4ImageProcessor(patch_size=7, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer,
        tf.Gemma4VideoProcessor(patch_size=7),
        chat_template=GEMMA4_TEMPLATE,
        image_seq_length=4,
    )
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=8, global_head_dim=8)
    config = tf.Gemma4Config(
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            patch_size=7,
            position_embedding_size=512,
            pooling_kernel_size=2,
            **heads,
        ),
        audio_config=dict(  # of the smaller models; nothing here reads it
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            output_proj_dims=WIDTH,
            subsampling_conv_channels=[4, 4],
        ),
        text_config=dict(
            **TEXT | heads,
            **token_ids(tokenizer),
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer),
            use_bidirectional_attention="vision",
        ),
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
    )
    return _stops_at(tf.Gemma4ForConditionalGeneration(config), tokenizer, "<turn|>"), processor


# The two families below are not transformers' own: their classes, and the templates of their processors, are those of
# models/. Their fixed sizes (256 queries, heads of 128) follow the configuration and are small here.


@family
def qwen_vl() -> Parts:
    """Qwen-VL: 4 tokens per image (256 in the released models) that a pooling layer makes from 16 patches; the decoder
    extrapolates beyond 200 positions (2,048)."""
    from models.qwen_vl.configuration import QwenVLConfig
    from models.qwen_vl.modeling import QwenVLForConditionalGeneration
    from models.qwen_vl.processing import QwenVLProcessor
    from models.square_image_processor import SquareImageProcessor

    tokenizer = byte_tokenizer(["<|im_start|>", "<img>", "</img>", "<imgpad>"], **CHATML)
    processor = QwenVLProcessor(SquareImageProcessor(size=SQUARE), tokenizer, num_image_tokens=4)
    pool = dict(num_positions=4, num_queries=4, output_size=WIDTH, pool_head_dim=8)
    text = TEXT | {"num_key_value_heads": 4} | token_ids(tokenizer)
    config = QwenVLConfig(
        vision_config=dict(**VISION, **pool),
        text_config=dict(**text | {"pad_token_id": None}, train_length=200),
        **{
            f"image_{key}token_id": tokenizer.convert_tokens_to_ids(token)
            for key, token in {"start_": "<img>", "end_": "</img>", "": "<imgpad>"}.items()
        },
    )
    return QwenVLForConditionalGeneration(config), processor


@family
def internlm_xcomposer2() -> Parts:
    """InternLM-XComposer2: 16 tokens per image (1,225) that take a partial LoRA (opened here) through the decoder. The
    placeholder's id lies beyond the vocabulary. No dropout, so that train and eval mode agree."""
    from models.internlm_xcomposer2.configuration import InternLMXComposer2Config
    from models.internlm_xcomposer2.modeling import InternLMXComposer2ForConditionalGeneration, PartialLora
    from models.internlm_xcomposer2.processing import IMAGE_TOKEN, TURN_END, TURN_START, InternLMXComposer2Processor
    from models.square_image_processor import SquareImageProcessor

    tokenizer = sentencepiece_tokenizer([TURN_START, TURN_END], prefix=False, pad="</s>")
    vocab_size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    processor = InternLMXComposer2Processor(SquareImageProcessor(size=SQUARE), tokenizer, num_image_tokens=16)
    ids = token_ids(tokenizer) | {"vocab_size": vocab_size, "pad_token_id": None}
    config = InternLMXComposer2Config(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=dict(**TEXT, **ids, plora_rank=4, plora_alpha=4, plora_dropout=0.0),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = InternLMXComposer2ForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, PartialLora):
            torch.nn.init.normal_(module.b, std=0.1)
    return _stops_at(model, tokenizer, TURN_END), processor


@family
def llava_next_video() -> Parts:
    """LLaVA-NeXT-Video: LLaVA-NeXT with a Vicuna decoder and a video processor, which images do not need."""
    tokenizer = sentencepiece_tokenizer(["<image>", "<video>"], {"image_token": "<image>", "video_token": "<video>"})
    grids = [[28, 56], [56, 28], [56, 56]]
    processor = tf.LlavaNextVideoProcessor(
        tf.LlavaNextVideoVideoProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
        tf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=grids),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE.replace(_LLAVA_IMAGES, _LLAVA_IMAGES + _LLAVA_IMAGES.replace("image", "video")),
    )
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
        text_config=tf.LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
    )
    return tf.LlavaNextVideoForConditionalGeneration(config), processor


@family
def blip_2() -> Parts:
    """BLIP-2 with an OPT decoder: four query tokens per image stand before BOS (32 in the released models), whose BOS is
    the EOS token. The checkpoints have no chat template."""
    tokenizer = byte_tokenizer(["<image>"], bos="</s>")
    processor = tf.Blip2Processor(tf.BlipImageProcessor(size=SQUARE), tokenizer, num_query_tokens=4)
    layers = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
    config = tf.Blip2Config(
        vision_config=dict(**VISION, initializer_range=0.02),
        qformer_config=dict(**layers, intermediate_size=64, encoder_hidden_size=WIDTH),
        text_config=tf.OPTConfig(
            **layers, **token_ids(tokenizer), ffn_dim=64, word_embed_proj_dim=WIDTH, max_position_embeddings=512
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return tf.Blip2ForConditionalGeneration(config), processor


# allenai/Molmo2-4B, chat_template.jinja: images in front of the conversation, numbered if there are several; an answer's
# end token is written with the next question.
MOLMO2_TEMPLATE = (
    "{% set images = namespace(n=0) %}{% for m in messages %}{% if m['content'] is not string %}"
    "{% for part in m['content'] if part['type'] == 'image' %}{% set images.n = images.n + 1 %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% for i in range(images.n) %}{{ ('Image ' ~ (i + 1) if images.n > 1 else '') ~ '<|image|>' }}{% endfor %}"
    "{% for m in messages %}"
    "{% if loop.index0 % 2 != (m['role'] == 'assistant') | int %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_end|>\n' if m['role'] == 'user' and not loop.first }}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ ('' if loop.first else ' ') + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' if m['role'] == 'user' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@family
def molmo2() -> Parts:
    """Molmo2: up to two crops and a small view of each image; the vocabulary's second part has embeddings, but no logits."""
    names = ["im_start", "im_end", "im_patch", "im_col", "low_res_im_start", "im_low", "frame_start", "frame_end"]
    second = ["<|image|>", "<|video|>", *(f"<{name}>" for name in names)]
    tokenizer = byte_tokenizer(["<|im_start|>"], **CHATML, plain=second)
    processor = tf.Molmo2Processor(
        tf.Molmo2ImageProcessor(size=SQUARE, patch_size=7, max_crops=2, overlap_margins=[1, 1]),
        tf.Molmo2VideoProcessor(size=SQUARE, patch_size=7),
        tokenizer,
        chat_template=MOLMO2_TEMPLATE,
    )
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(second[2:]), strict=True))
    heads = dict(num_attention_heads=4, head_dim=8)
    text = TEXT | token_ids(tokenizer) | {"vocab_size": len(tokenizer) - len(second)}
    config = tf.Molmo2Config(
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            **heads,
            num_key_value_heads=4,
            image_size=[28, 28],
            patch_size=7,
        ),
        adapter_config=dict(
            vision_feature_layer=[1, 0],
            hidden_size=WIDTH,
            **heads,
            num_key_value_heads=4,
            intermediate_size=64,
            text_hidden_size=WIDTH,
        ),
        text_config=dict(**text, head_dim=8, additional_vocab_size=len(second)),
        image_start_token_id=ids["im_start"],
        low_res_image_start_token_id=ids["low_res_im_start"],
        image_end_token_id=ids["im_end"],
        image_patch_id=ids["im_patch"],
        frame_start_token_id=ids["frame_start"],
        frame_end_token_id=ids["frame_end"],
    )
    return tf.Molmo2ForConditionalGeneration(config), processor


@family
def cohere2_vision() -> Parts:
    """Command A Vision: SigLIP tiles, a Cohere 2 decoder with a sliding-window layer (24 positions here)."""
    turns = ["START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN"]
    image = ["START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK"]
    tokenizer = byte_tokenizer(
        [f"<|{name}|>" for name in turns + image],
        {
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        plain=["<|START_RESPONSE|>", "<|END_RESPONSE|>"],
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
    )
    # patch_size counts the tokens of a tile's side
    processor = tf.Cohere2VisionProcessor(
        tf.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, min_patches=1, max_patches=2),
        tokenizer,
        chat_template=COHERE_TEMPLATE.replace("'<image>'", "'<|IMG_PATCH|>'"),
    )
    window = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    config = tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Cohere2Config(**TEXT, **token_ids(tokenizer), **window),
        image_token_id=tokenizer.image_token_id,
        alignment_intermediate_size=64,
    )
    return tf.Cohere2VisionForConditionalGeneration(config), processor


@family
def glm46v() -> Parts:
    """GLM-4.6V: GLM-4.1V under another name."""
    model, processor = glm4v()
    names = ("text_config", "vision_config")
    config = tf.Glm46VConfig(
        **{name: getattr(model.config, name).to_dict() for name in names},
        **{k: v for k, v in model.config.to_dict().items() if k.endswith("_token_id") and k not in names},
    )
    own = tf.Glm46VForConditionalGeneration(config)
    own.generation_config.eos_token_id = model.generation_config.eos_token_id
    pixels = processor.image_processor
    image_processor = tf.Glm46VImageProcessor(size=dict(pixels.size), patch_size=7, merge_size=2)
    return own, tf.Glm46VProcessor(
        image_processor, processor.tokenizer, tf.Glm46VVideoProcessor(patch_size=7), chat_template=GLM_TEMPLATE
    )


# Granite 4.0's prompt guide: roles between tags, <|end_of_text|> behind every message.
GRANITE_TEMPLATE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' }}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)


@family
def granite4_vision() -> Parts:
    """Granite 4 Vision: a window Q-Former makes 4 tokens of a tile here, whose features enter both layers; logits are
    divided by 8."""
    tokenizer = byte_tokenizer(
        ["<|start_of_role|>", "<|end_of_role|>", "<image>"],
        {"image_token": "<image>"},
        bos=None,
        eos="<|end_of_text|>",
        add_bos=False,
    )
    grids = [[28, 56], [56, 28], [56, 56]]
    processor = tf.Granite4VisionProcessor(
        tf.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=grids, do_center_crop=True
        ),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=GRANITE_TEMPLATE,
    )
    config = tf.Granite4VisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION | {"hidden_size": 64}, vision_use_head=False).to_dict(),
        text_config=dict(**TEXT, **token_ids(tokenizer), logits_scaling=8.0),
        qformer_config=dict(
            model_type="blip_2_qformer",
            num_hidden_layers=1,
            intermediate_size=64,
            cross_attention_frequency=1,
            max_position_embeddings=64,
            use_qformer_text_input=False,
        ),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=grids,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1],
    )
    return tf.Granite4VisionForConditionalGeneration(config), processor


# ---------------------------------------------------------------------------------------------------------------------


def build(family: str, directory: str | Path, seed: int = 0, **changes: int) -> Path:
    """Builds one family's tiny checkpoint and processor into `directory` and returns the path; the same seed gives the
    same weights. `changes` go to the family's builder.

    Raises:
        KeyError: for a family without a builder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = BUILDERS[family](**changes)
        _make_images_matter(model)
    if type(model).__module__.startswith("transformers."):
        write_hub_names(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


@torch.no_grad()
def _make_images_matter(model: tf.PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):  # Mllama: tanh(0) would hide the images
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
    """The folder of a tiny checkpoint, built once per process and removed at its end. For reading only: copy it before
    changing it."""
    return str(build(family, _root() / f"{family}-{seed}", seed))


def image(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """An RGB picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
