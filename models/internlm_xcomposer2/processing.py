"""Processor of InternLM-XComposer2-VL: pixels, placeholders and the fast tokenizer made from `tokenizer.model`."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import BaseImageProcessor, PreTrainedTokenizerFast, ProcessorMixin
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

IMAGE_TOKEN = "<ImageHere>"
TURN_START, TURN_END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"

# The released system text (the hub's spelling).
SYSTEM = """\
You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).
- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by Shanghai AI Laboratory \
(上海人工智能实验室). It is designed to be helpful, honest, and harmless.
- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user such as English and \
中文.
- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on the provided \
image."""

CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- if messages[0]['role'] != 'system' -%}
{{- '[UNUSED_TOKEN_146]system\n@SYSTEM@[UNUSED_TOKEN_145]\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '[UNUSED_TOKEN_146]' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<ImageHere>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '[UNUSED_TOKEN_145]\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[UNUSED_TOKEN_146]assistant\n' -}}
{%- endif -%}
""".replace("@SYSTEM@", SYSTEM.replace("\n", "\\n"))


class InternLMXComposer2Processor(ProcessorMixin):
    """Image processor and tokenizer in one; `<ImageHere>` is repeated `num_image_tokens` times for its image."""

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chat_template: str | None = None,
        num_image_tokens: int = 1225,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What stands for the image in the text: its token, once per feature."""
        return self.image_token * self.num_image_tokens


def build_tokenizer(model_file: Path, model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """The fast tokenizer with the ids of sentencepiece on `tokenizer.model`.

    It is byte-fallback BPE over text in which only the space is rewritten (to U+2581); pieces that sentencepiece calls
    user-defined are found before the merges, control pieces are special. `<ImageHere>` follows the last piece.

    Raises:
        ValueError: the file is not a BPE model of this kind.
    """
    proto = SentencePieceExtractor(str(model_file)).proto
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != 2 or not trainer.byte_fallback or normalizer.add_dummy_prefix:
        raise ValueError(
            f"{model_file} is not a byte-fallback BPE model without dummy prefix: not InternLM2's tokenizer."
        )
    if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
        raise ValueError(f"{model_file} rewrites its text: not InternLM2's tokenizer.")
    kinds = trainer.DESCRIPTOR.file.message_types_by_name["ModelProto"].nested_types_by_name["SentencePiece"]
    kind = {v.name: v.number for v in kinds.enum_types_by_name["Type"].values}
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    whole = {p.piece for p in proto.pieces if p.type != kind["NORMAL"]}
    merges = generate_merges(vocab, scores, skip_tokens=whole)
    unk = proto.pieces[trainer.unk_id].piece
    fast = Tokenizer(models.BPE(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = proto.pieces[trainer.bos_id].piece
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, trainer.bos_id)]
    )
    for piece in proto.pieces:
        if piece.type in (kind["UNKNOWN"], kind["CONTROL"], kind["USER_DEFINED"]):
            special = piece.type != kind["USER_DEFINED"] or piece.piece in (TURN_START, TURN_END)
            fast.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    fast.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    eos = proto.pieces[trainer.eos_id].piece
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=eos,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
