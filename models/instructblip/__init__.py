"""InstructBLIP with a decoder-only language model (Vicuna): a Q-Former reads the image and the instruction.
https://arxiv.org/abs/2305.06500
"""

import re
from typing import Any

import torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration
from transformers.utils import ModelOutput

from base.model import VLModelMixin
from base.processor import VLProcessor
from common.errors import InputError
from models.core_mapper import ModelCoreMapper

TOWER_INPUTS = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")


class InstructBlipForRL(VLModelMixin, InstructBlipForConditionalGeneration):
    """InstructBLIP with the project's model methods. The transformers class has no model without its lm_head:
    embeddings go to the decoder."""

    def last_hidden_state(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = False,
        **img_inputs: Any,
    ) -> torch.Tensor:
        """As in the base class, (B, L, D)."""
        embeds = self._embed(input_ids, img_inputs)
        return self.get_decoder()(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        ).last_hidden_state

    def generate(
        self, *args: Any, mm_encoder_outputs: dict[str, Any] | None = None, **kwargs: Any
    ) -> torch.Tensor | ModelOutput:
        """As in the base class; with features the language model generates, because the native method needs pixels."""
        if mm_encoder_outputs is None:
            return super().generate(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in TOWER_INPUTS}
        kwargs["inputs_embeds"] = self._embed(kwargs["input_ids"], {"mm_encoder_outputs": mm_encoder_outputs})
        kwargs["suppress_tokens"] = sorted({*(kwargs.get("suppress_tokens") or []), *self.image_placeholder_ids})
        return self.language_model.generate(*args, **kwargs)

    def _embed(self, input_ids: torch.Tensor, img_inputs: dict[str, Any]) -> torch.Tensor:
        """Token embeddings (B, L, D) with the projected queries in place of the image tokens."""
        embeds = self.get_input_embeddings()(input_ids)
        features = (img_inputs.get("mm_encoder_outputs") or self.encode_images(img_inputs)["mm_encoder_outputs"])[
            "image"
        ]
        queries = features.pooler_output.to(embeds.dtype)
        return embeds.masked_scatter(self.get_placeholder_mask(input_ids, embeds), queries)


class InstructBlipProcessor(VLProcessor):
    """The paper's format is the bare instruction, `question answer</s>`; image tokens stand before BOS, one image per
    prompt."""

    default_chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + eos_token }}"
        "{% else %}"
        "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """The native processor inserts the image tokens itself. The Q-Former reads the instruction only: the text before
        the first special token, which ends it (an answer's mark or EOS)."""
        if counts := {len(row) for row in images} - {1}:
            raise InputError(f"InstructBLIP takes one image per prompt, a row has {min(counts)}: leave such rows out.")
        texts = [text.replace(self.image_token, "") for text in texts]
        special = re.compile("|".join(map(re.escape, self.tokenizer.all_special_tokens)))
        read = self.processor.qformer_tokenizer(
            [special.split(text)[0] for text in texts], padding=True, return_tensors="pt"
        )
        return super().call_native(texts, images) | {
            f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")
        }


core_mapper = ModelCoreMapper(model=InstructBlipForRL, processor=InstructBlipProcessor)
