"""Processor of Qwen-VL: pixels, placeholders and the fast tokenizer made from `qwen.tiktoken`."""

import base64
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import BaseImageProcessor, PreTrainedTokenizerFast, ProcessorMixin
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

# In the order of their ids, which follow the ranks of qwen.tiktoken.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *[f"<|extra_{i}|>" for i in range(205)],
    *["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"],
    *["<img>", "</img>", "<imgpad>"],
]

# The released chat format. A picture is `Picture n: <img>...</img>` and a line break, numbered through the
# conversation; the 256 positions between the tags, where the released code writes the image's path, are filled with
# <imgpad>.
CHAT_TEMPLATE = """\
{%- set picture = namespace(n=0) -%}
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set picture.n = picture.n + 1 -%}
{{- 'Picture ' ~ picture.n ~ ': <img><imgpad></img>\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


class QwenVLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; `<imgpad>` in a text is repeated `num_image_tokens` times for its image."""

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chat_template: str | None = None,
        num_image_tokens: int = 256,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = "<imgpad>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What stands for the image in the text: its token, once per feature."""
        return self.image_token * self.num_image_tokens


def read_ranks(file: Path) -> dict[bytes, int]:
    """`qwen.tiktoken`: one base64 token and its rank per line.

    Raises:
        ValueError: a line does not hold a token and its rank.
    """
    ranks = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        token, _, rank = line.partition(" ")
        if not rank.isdigit():
            raise ValueError(f"{file}, line {number} is not a base64 token and its rank: download the file again.")
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


class _Converter(TikTokenConverter):
    load_tiktoken_bpe = staticmethod(read_ranks)


def build_tokenizer(ranks_file: Path, model_max_length: int = 8192) -> PreTrainedTokenizerFast:
    """The fast tokenizer with the ids of the released one: NFC, Qwen's pre-tokenisation, merges by rank, special tokens."""
    fast = _Converter(ranks_file, pattern=PRETOKENIZE_REGEX, extra_special_tokens=SPECIAL_TOKENS).converted()
    fast.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def write_ranks(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """The inverse of `build_tokenizer`: the ranks as `qwen.tiktoken` has them."""
    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
    added = set(tokenizer.get_added_vocab())
    ordinary = sorted((rank, token) for token, rank in tokenizer.get_vocab().items() if token not in added)
    lines = [f"{base64.b64encode(bytes(to_byte[c] for c in token)).decode()} {rank}\n" for rank, token in ordinary]
    file.write_text("".join(lines))
