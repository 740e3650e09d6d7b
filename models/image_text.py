"""What the ported models share: image features among the text embeddings, and the language-model head.

Arguments and outputs are those of transformers' LLaVA.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple


class ImageTextModel:
    """Mixed into a model with `get_image_features` and `get_placeholder_mask`."""

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, L, D); `embed` replaces those of image tokens."""
        return self.get_input_embeddings()(input_ids)

    def embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, L, D) with features in place of the image tokens, and the features (image tokens, D).

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given, or both pixels and features; see
                `get_placeholder_mask`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the model exactly one of input_ids and inputs_embeds.")
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and features is not None:
            raise ValueError("Give the model either pixel_values or mm_encoder_outputs, not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_text(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values=pixel_values, return_dict=True)
        if features is not None:
            image_features = torch.cat(list(features.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            return inputs_embeds.masked_scatter(mask, image_features), image_features
        if self.training:
            # Data-parallel ranks must run the same modules: a text-only batch adds a blank image's features times 0.
            size = self.config.vision_config.image_size
            blank = self.get_image_features(pixel_values=inputs_embeds.new_zeros(1, 3, size, size), return_dict=True)
            inputs_embeds = inputs_embeds + 0 * blank.pooler_output[0].sum().to(inputs_embeds.dtype)
        return inputs_embeds, None


class ImageTextForConditionalGeneration:
    """Mixed in before PreTrainedModel and GenerationMixin: an `ImageTextModel` named `model`, and `lm_head`."""

    model_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head, which transformers asks for by this name."""
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See the method of `model`."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See the method of `model`."""
        return self.model.get_placeholder_mask(input_ids, inputs_embeds, image_features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits (B, L or logits_to_keep, V), and with labels (B, L) the loss. Arguments as in transformers' LLaVA."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
