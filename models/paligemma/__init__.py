"""PaliGemma and PaliGemma 2: images and prompt are a prefix with attention in both directions.
https://arxiv.org/abs/2407.07726"""

import os
from typing import Any

import torch
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration

from base import packing
from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class PaliGemmaForRL(VLModelMixin, PaliGemmaForConditionalGeneration):
    """PaliGemma with the project's model methods."""

    def packed_attention_mask(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> torch.Tensor:
        """The packed mask; prompt tokens see each other. Tokens that the answers share, also in segment 0, do not."""
        prompt = (segment_ids == 0) & (img_inputs["token_type_ids"] == 0)
        return packing.packed_mask(segment_ids) | (prompt[:, :, None] & prompt[:, None, :])[:, None]


class PaliGemmaProcessor(VLProcessor):
    """`<image><bos>question\\nanswer<eos>`: one question and one answer; no format for more turns is published."""

    default_chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] != ('user' if loop.index0 == 0 else 'assistant') or loop.index0 > 1 %}"
        "{{ raise_exception('PaliGemma takes one question and one answer, without a system message') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] + eos_token }}{% else %}"
        "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}{{ bos_token }}"
        "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '\n' }}"
        "{% endif %}{% endfor %}"
    )
    per_token_keys = {"token_type_ids": 1}  # 0 in the prefix

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Do the work of the native processor, which refuses batches without images and writes the BOS of a
        text-only row into the middle of its words."""
        texts = [t.replace(self.image_token, self.image_token * self.processor.image_seq_length) for t in texts]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        encoded["token_type_ids"] = torch.zeros_like(encoded["input_ids"])
        pictures = [picture for row in images for picture in row]
        return {**encoded, **(self.image_processor(pictures, return_tensors="pt") if pictures else {})}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save without our template: the native processor adds BOS and newline by itself, and with a template they
        would be there twice."""
        template, self.processor.chat_template = self.processor.chat_template, None
        super().save_pretrained(save_directory, **kwargs)
        self.processor.chat_template = template


core_mapper = ModelCoreMapper(model=PaliGemmaForRL, processor=PaliGemmaProcessor)
