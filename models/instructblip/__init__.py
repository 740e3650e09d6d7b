"""InstructBLIP with a decoder-only language model (Vicuna): a Q-Former reads the image and the instruction.
https://arxiv.org/abs/2305.06500
"""

import re
from typing import Any

from PIL import Image
from transformers import InstructBlipForConditionalGeneration

from base.model import VLModelMixin
from models.core_mapper import ModelCoreMapper
from models.query_former import QueryFormerMixin, QueryFormerProcessor


class InstructBlipForRL(QueryFormerMixin, VLModelMixin, InstructBlipForConditionalGeneration):
    """InstructBLIP with the project's model methods."""


class InstructBlipProcessor(QueryFormerProcessor):
    """The paper's format is the bare instruction, `question answer</s>`; image tokens stand before BOS, one image per
    prompt."""

    model_name = "InstructBLIP"
    default_chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + eos_token }}"
        "{% else %}"
        "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """The Q-Former reads the instruction only: the text before the first special token, which ends it (an answer's
        mark or EOS)."""
        special = re.compile("|".join(map(re.escape, self.tokenizer.all_special_tokens)))
        questions = [special.split(text.replace(self.image_token, ""))[0] for text in texts]
        read = self.processor.qformer_tokenizer(questions, padding=True, return_tensors="pt")
        return super().call_native(texts, images) | {
            f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")
        }


core_mapper = ModelCoreMapper(model=InstructBlipForRL, processor=InstructBlipProcessor)
