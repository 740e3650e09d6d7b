"""InternLM-XComposer2-VL from transformers' own modules: Llama's decoder, CLIP's tower, and partial LoRA.

Partial LoRA (arXiv:2401.16420, section 3.2) is a low-rank path beside every linear layer of the decoder that image
tokens take and text tokens do not. Differences from the released code:
1. The fused `wqkv` is split into q, k and v, as transformers and peft know them; its partial LoRA stays fused (one A
   for the three), so that the parameters and their gradients are those of the release.
2. The path reads and writes the rows of image tokens only; the release computes all rows and masks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from models.image_text import ImageTextForConditionalGeneration, ImageTextModel
from models.internlm_xcomposer2.configuration import InternLMXComposer2Config, InternLMXComposer2TextConfig


class PartialLora(nn.Module):
    """y + alpha / rank * B A dropout(x), at image tokens only.

    The two matrices are bare parameters under names without `lora_`: quantisation replaces linear layers and peft
    matches names, and neither is meant to touch them.
    """

    def __init__(self, config: InternLMXComposer2TextConfig, in_features: int, out_features: int):
        super().__init__()
        self.scaling = config.plora_alpha / config.plora_rank
        self.dropout = nn.Dropout(config.plora_dropout)
        self.a = nn.Parameter(torch.empty(config.plora_rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, config.plora_rank))

    def forward(self, x: torch.Tensor, y: torch.Tensor, image_index: torch.Tensor | None) -> torch.Tensor:
        """`y` with the low-rank path added at image tokens, (B, L, out_features).

        Args:
            x: (B, L, in_features), what the linear layer read.
            y: (B, L, out_features), what it returned.
            image_index: (N,) flat positions b * L + t of image tokens, possibly an empty tensor; None skips the path.
        """
        if image_index is None:
            return y
        rows = self.dropout(x.flatten(0, 1)[image_index]).to(self.a.dtype)  # (N, in_features)
        path = self.scaling * F.linear(F.linear(rows, self.a), self.b)  # (N, out_features)
        return y.flatten(0, 1).index_add(0, image_index, path.to(y.dtype)).view_as(y)


class InternLMXComposer2Attention(LlamaAttention):
    """Llama's attention with partial LoRA on its input and output projections."""

    def __init__(self, config: InternLMXComposer2TextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.widths = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]  # q, k, v
        self.qkv_plora = PartialLora(config, config.hidden_size, sum(self.widths))
        self.o_plora = PartialLora(config, heads * self.head_dim, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Llama's: output (B, L, D) and attention weights; `image_index` as in `PartialLora`."""
        qkv = torch.cat([project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        qkv = self.qkv_plora(hidden_states, qkv, image_index)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in qkv.split(self.widths, dim=-1))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        output = output.flatten(-2)  # (B, L, heads * head_dim)
        return self.o_plora(output, self.o_proj(output), image_index), weights


class InternLMXComposer2MLP(LlamaMLP):
    """Llama's MLP with partial LoRA on its three projections."""

    def __init__(self, config: InternLMXComposer2TextConfig):
        super().__init__(config)
        self.gate_plora = PartialLora(config, config.hidden_size, config.intermediate_size)
        self.up_plora = PartialLora(config, config.hidden_size, config.intermediate_size)
        self.down_plora = PartialLora(config, config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor, image_index: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D); `image_index` as in `PartialLora`."""
        gate = self.gate_plora(x, self.gate_proj(x), image_index)
        up = self.up_plora(x, self.up_proj(x), image_index)
        inner = self.act_fn(gate) * up
        return self.down_plora(inner, self.down_proj(inner), image_index)


class InternLMXComposer2DecoderLayer(LlamaDecoderLayer):
    """Llama's layer with this family's attention and MLP."""

    def __init__(self, config: InternLMXComposer2TextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = InternLMXComposer2Attention(config, layer_idx)
        self.mlp = InternLMXComposer2MLP(config)

    def forward(
        self, hidden_states: torch.Tensor, image_index: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D); `image_index` as in `PartialLora`."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), image_index=image_index, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), image_index)


class InternLMXComposer2TextModel(LlamaModel):
    """Llama's decoder; `image_index` (see `PartialLora`) goes through to its layers."""

    config: InternLMXComposer2TextConfig
    _no_split_modules = ["InternLMXComposer2DecoderLayer"]
    _can_record_outputs = {"hidden_states": InternLMXComposer2DecoderLayer, "attentions": InternLMXComposer2Attention}

    def __init__(self, config: InternLMXComposer2TextConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [InternLMXComposer2DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PartialLora):
            init.normal_(module.a, std=self.config.initializer_range)
            init.zeros_(module.b)


class InternLMXComposer2Projector(nn.Module):
    """Linear, GELU, linear: (N, patches, vision width) -> (N, patches, hidden size)."""

    def __init__(self, config: InternLMXComposer2Config):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, patches, vision width) -> (N, patches, hidden size)."""
        return self.linear_2(F.gelu(self.linear_1(patches)))


class InternLMXComposer2PreTrainedModel(PreTrainedModel):
    """What transformers must know of every model of this family."""

    config: InternLMXComposer2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLMXComposer2DecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class InternLMXComposer2Model(ImageTextModel, InternLMXComposer2PreTrainedModel):
    """Vision tower, projector and decoder without the language-model head."""

    def __init__(self, config: InternLMXComposer2Config):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = InternLMXComposer2Projector(config)
        self.language_model = InternLMXComposer2TextModel._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """(N, 3, H, W) pixels -> `pooler_output`, a list of N tensors (patches, hidden_size).

        The patches are the tower's last hidden states before its final norm, without the class token.
        """
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = list(self.multi_modal_projector(outputs.last_hidden_state[:, 1:]))
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where image tokens stand, (B, L, 1) bool.

        Raises:
            ValueError: the number of placeholders is not the number of image features, or input_ids are missing.
        """
        if input_ids is None:
            raise ValueError("Image placeholders have no embedding: give input_ids, not inputs_embeds, with images.")
        mask = input_ids == self.config.image_token_id
        if image_features is not None and mask.sum() != image_features.shape[0]:
            raise ValueError(
                f"{int(mask.sum())} image placeholders in the rows but {image_features.shape[0]} image features: "
                f"every image needs {self.config.num_patches} <ImageHere> tokens."
            )
        return mask[..., None]

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As in the base class, (B, L, D), with another token's embedding at placeholders."""
        # The placeholder's id lies beyond the embedding matrix: look up another row.
        return super().embed_text(input_ids.masked_fill(input_ids == self.config.image_token_id, 0))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Hidden states (B, L, D). Arguments as in transformers' LLaVA.

        Raises:
            ValueError: see `embed`; or the row is longer than the positions the model knows.
        """
        inputs_embeds, image_features = self.embed(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(past + inputs_embeds.shape[1], position_ids)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_index=self._image_index(input_ids, inputs_embeds, decoding=past > 0 and inputs_embeds.shape[1] == 1),
            **kwargs,
        )
        return LlavaModelOutputWithPast(**outputs, image_hidden_states=image_features)

    def _image_index(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, decoding: bool
    ) -> torch.Tensor | None:
        """Flat positions of image tokens. A generated token is never one; a text-only batch has an empty index, not None,
        so that every data-parallel rank runs the partial LoRA."""
        if decoding:
            return None
        if input_ids is None:
            return torch.empty(0, dtype=torch.long, device=inputs_embeds.device)
        return (input_ids.flatten() == self.config.image_token_id).nonzero()[:, 0]

    def _check_length(self, length: int, position_ids: torch.Tensor | None) -> None:
        limit = self.config.text_config.max_position_embeddings
        if length <= limit:
            return
        length = length if position_ids is None else int(position_ids.max()) + 1
        if length > limit:
            raise ValueError(f"The row has {length} tokens; InternLM-XComposer2 knows {limit} positions: shorten it.")


class InternLMXComposer2ForConditionalGeneration(
    ImageTextForConditionalGeneration, InternLMXComposer2PreTrainedModel, GenerationMixin
):
    """InternLM-XComposer2-VL with its language-model head."""

    model_class = InternLMXComposer2Model
