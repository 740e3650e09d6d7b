"""Qwen-VL from transformers' own modules: Qwen2's decoder, CLIP's encoder, and what the two do not have.

Differences from those modules:
1. The decoder extrapolates beyond its training length in eval mode: dynamic NTK (a larger rotary base, bloc97 2023) and
   logn (larger queries, Su Jianlin 2021). Up to `train_length` tokens both are the identity.
2. The ViT has no class token and resizes its 16 x 16 learned positions to the patch grid.
3. One cross-attention layer pools the patches into 256 tokens (Qwen-VL, arXiv:2308.12966, section 2.1).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel
from transformers.models.clip.modeling_clip import eager_attention_forward as clip_eager_attention
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2Model,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from models.image_text import ImageTextForConditionalGeneration, ImageTextModel
from models.qwen_vl.configuration import QwenVLConfig, QwenVLTextConfig, QwenVLVisionConfig

# ---------------------------------------------------------------------------------------------------------------------
# Vision


def sincos_grid(dim: int, grid: int) -> torch.Tensor:
    """Fixed positions of a grid x grid image, (grid * grid, dim): columns in the first half of the channels, rows after."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (grid, dim/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (grid, dim/2)
    columns = wave[None].expand(grid, -1, -1)
    rows = wave[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def resize_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Bicubic resize of a square grid of positions, (n, D) -> (grid * grid, D), computed in float32."""
    side = int(positions.shape[0] ** 0.5)
    if side == grid:
        return positions
    image = positions.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, side, side)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


class QwenVLAttentionPool(nn.Module):
    """Learned queries attend to the patches: (N, patches, hidden_size) -> (N, num_queries, output_size).

    Positions are added to queries and keys, not to values.
    """

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        width = config.output_size
        self.config = config
        self.num_heads = width // config.pool_head_dim
        self.head_dim = config.pool_head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Parameter(torch.empty(config.num_queries, width))
        # Fixed, but part of the released state dict. A buffer stays fixed when the pool is set to train.
        self.pos_embed = nn.Buffer(torch.empty(config.num_queries, width))
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ln_kv = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, patches, hidden_size) -> (N, num_queries, output_size)."""
        N, n_patches, _ = patches.shape
        values = self.ln_kv(self.kv_proj(patches))  # (N, patches, D)
        keys = values + resize_positions(self.pos_embed, int(n_patches**0.5)).to(values.dtype)
        queries = (self.ln_q(self.query) + self.pos_embed.to(values.dtype)).expand(N, -1, -1)  # (N, num_queries, D)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, clip_eager_attention)
        q, k, v = heads(self.q_proj(queries)), heads(self.k_proj(keys)), heads(self.v_proj(values))
        pooled, _ = attend(self, q, k, v, None, scaling=self.scaling)
        return self.out_proj(pooled.flatten(-2))


class QwenVLVisionModel(CLIPPreTrainedModel):
    """ViT, pooling, norm and projection: (N, 3, H, W) pixels -> (N, num_queries, output_size) in `pooler_output`."""

    config: QwenVLVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(config.num_positions, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.attn_pool = QwenVLAttentionPool(config)
        self.post_layernorm = nn.LayerNorm(config.output_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.output_size, config.output_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.position_embedding, std=self.config.hidden_size**-0.5)
        elif isinstance(module, QwenVLAttentionPool):
            init.normal_(module.query, std=0.02)
            n, width = module.pos_embed.shape  # not `query`, which is empty where ZeRO-3 has partitioned it
            init.copy_(module.pos_embed, sincos_grid(width, int(n**0.5)))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Patches (N, patches, width) in `last_hidden_state`, `pooler_output` as above."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        patches = patches + resize_positions(self.position_embedding, int(patches.shape[1] ** 0.5))
        patches = self.encoder(self.pre_layernorm(patches), **kwargs).last_hidden_state  # (N, patches, width)
        pooled = self.projection(self.post_layernorm(self.attn_pool(patches)))  # (N, num_queries, D)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=pooled)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def ntk_alpha(lengths: torch.Tensor, train_length: int) -> torch.Tensor:
    """Dynamic NTK's alpha for rows of L tokens: 2^ceil(log2(L / train_length) + 1) - 1, at least 1. (B,) -> (B,) float32."""
    stretch = (lengths.double() / train_length).log2() + 1
    return (2 ** stretch.ceil() - 1).clamp(min=1).float()


def logn_scale(position_ids: torch.Tensor, train_length: int) -> torch.Tensor:
    """Factor of the query at position p: ln(p + 1) / ln(train_length), at least 1. (B, L) -> (B, 1, L, 1) float32."""
    scale = (position_ids + 1).float().log() / torch.log(torch.tensor(float(train_length)))
    return scale.clamp(min=1)[:, None, :, None]


class QwenVLRotaryEmbedding(Qwen2RotaryEmbedding):
    """Rotary angles, with one base per row when `alpha` (B,) is given."""

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, alpha: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the angles, (B, L, d) each."""
        inv_freq = self.inv_freq.to(x.device, torch.float32)  # (d/2,)
        if alpha is not None:
            d = 2 * inv_freq.shape[0]
            base = self.config.rope_parameters["rope_theta"] * alpha.to(x.device) ** (d / (d - 2))  # (B,)
            inv_freq = 1.0 / base[:, None, None] ** (torch.arange(0, d, 2, device=x.device).float() / d)  # (B, 1, d/2)
        angle = position_ids[..., None].float() * inv_freq  # (B, L, d/2)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class QwenVLAttention(Qwen2Attention):
    """Qwen2's attention with a scale on the queries (logn)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Qwen2's: output (B, L, D) and attention weights. `query_scale`: (B, 1, L, 1)."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, L, d)

        q, k, v = (heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if query_scale is not None:
            q = q * query_scale.to(q.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


class QwenVLTextModel(Qwen2Model):
    """Qwen2's decoder that extrapolates beyond `train_length`.

    Both extensions read positions, not row indices, and every row has its own rotary base: padding and the other rows
    of the batch change nothing. (The released code counts padding and takes one base per batch.)
    """

    config: QwenVLTextConfig
    _can_record_outputs = {"hidden_states": Qwen2DecoderLayer, "attentions": QwenVLAttention}

    def __init__(self, config: QwenVLTextConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = QwenVLAttention(config, index)
        self.rotary_emb = QwenVLRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        extrapolate: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D).

        Args:
            position_ids: (B, L); counted from a 2-D attention mask, or from 0, when absent.
            extrapolate: whether to use NTK and logn beyond `train_length`; by default in eval mode only, as released.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the decoder exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        L = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -L:]
            else:
                position_ids = torch.arange(past, past + L, device=inputs_embeds.device)[None]

        alpha = query_scale = None
        if not self.training if extrapolate is None else extrapolate:
            alpha, query_scale = self._extrapolation(position_ids, past_key_values)

        if not isinstance(mask := attention_mask, dict):
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        else:
            mask = attention_mask["full_attention"]

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids, alpha)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                query_scale=query_scale,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _extrapolation(
        self, position_ids: torch.Tensor, past_key_values: Cache | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """NTK's alpha (B,) and logn's scale of the queries (B, 1, L, 1), each None if the configuration leaves it out."""
        alpha = query_scale = None
        if self.config.use_dynamic_ntk:
            # Keys in the cache were rotated with the base of the prompt: decoding keeps it, however long a row gets.
            decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
            alpha = getattr(past_key_values, "ntk_alpha", None) if decoding else None
            if alpha is None:
                alpha = ntk_alpha(position_ids.amax(-1) + 1, self.config.train_length)
            if past_key_values is not None:
                past_key_values.ntk_alpha = alpha
        if self.config.use_logn_attn:
            query_scale = logn_scale(position_ids, self.config.train_length)
        return alpha, query_scale


# ---------------------------------------------------------------------------------------------------------------------
# Both


class QwenVLPreTrainedModel(PreTrainedModel):
    """What transformers must know of every model of this family."""

    config: QwenVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "CLIPEncoderLayer", "QwenVLAttentionPool"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class QwenVLModel(ImageTextModel, QwenVLPreTrainedModel):
    """Vision model and decoder without the language-model head."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.vision_tower = QwenVLVisionModel._from_config(config.vision_config)
        self.language_model = QwenVLTextModel._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """(N, 3, H, W) pixels -> `pooler_output`, a list of N tensors (num_queries, hidden_size)."""
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = list(outputs.pooler_output)
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where image tokens stand, (B, L, 1) bool.

        Raises:
            ValueError: the number of placeholders is not the number of image features.
        """
        if input_ids is None:
            image_token = self.get_input_embeddings().weight[self.config.image_token_id]
            mask = (inputs_embeds == image_token).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if image_features is not None and mask.sum() != image_features.shape[0]:
            raise ValueError(
                f"{int(mask.sum())} image placeholders in the rows but {image_features.shape[0]} image features: "
                f"every image needs {self.config.vision_config.num_queries} <imgpad> tokens."
            )
        return mask[..., None]

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
        """Hidden states (B, L, D). Arguments as in transformers' LLaVA; ValueError: see `embed`."""
        inputs_embeds, image_features = self.embed(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(**outputs, image_hidden_states=image_features)


class QwenVLForConditionalGeneration(ImageTextForConditionalGeneration, QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language-model head."""

    model_class = QwenVLModel
