"""What BLIP-2 and InstructBLIP share: a Q-Former's queries stand before the text, in a class without a model below its lm_head."""

from typing import Any, ClassVar

import torch
from PIL import Image
from transformers.utils import ModelOutput

from base.processor import VLProcessor
from common.errors import InputError

TOWER_INPUTS = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")


class QueryFormerMixin:
    """For classes that have no inner model without head: embeddings go to the decoder."""

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


class QueryFormerProcessor(VLProcessor):
    """One image per prompt; the native processor puts its tokens before BOS."""

    model_name: ClassVar[str] = "This model"

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Without the image marks: the native processor inserts the image tokens itself."""
        if counts := {len(row) for row in images} - {1}:
            raise InputError(
                f"{self.model_name} takes one image per prompt, a row has {min(counts)}: leave such rows out."
            )
        return super().call_native([text.replace(self.image_token, "") for text in texts], images)
