"""Configuration of Qwen-VL: a Qwen2-shaped decoder, a ViT and a pooling layer that gives a fixed number of tokens per image.

The defaults are the public 9.6 B model. `QwenConfig` stands for the original remote-code layout and only says how to
convert it.
"""

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig, Qwen2Config


class QwenVLVisionConfig(CLIPVisionConfig):
    """The ViT (CLIP's encoder without a class token) and the pooling layer behind it.

    Attributes:
        num_positions: learned positions, a square grid that is resized to the image's patch grid.
        num_queries: tokens per image after pooling, a square number.
        output_size: width of these tokens, the decoder's hidden size.
        pool_head_dim: head size of the pooling attention.
    """

    model_type = "qwen_vl_vision"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    num_positions: int = 256
    num_queries: int = 256
    output_size: int = 4096
    pool_head_dim: int = 128


class QwenVLTextConfig(Qwen2Config):
    """Qwen-7B (v1) in the names of Qwen2.

    Attributes:
        train_length: tokens the model was trained on; beyond it, in eval mode only:
        use_dynamic_ntk: the rotary base grows with the length of the prompt,
        use_logn_attn: queries at position p are scaled by ln(p + 1) / ln(train_length).
    """

    model_type = "qwen_vl_text"
    base_config_key = "text_config"

    intermediate_size: int = 11008
    max_position_embeddings: int = 8192
    train_length: int = 2048
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True


class QwenVLConfig(PreTrainedConfig):
    """Qwen-VL and Qwen-VL-Chat."""

    model_type = "qwen_vl"
    sub_configs_defaults = {"vision_config": QwenVLVisionConfig, "text_config": QwenVLTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151859
    image_start_token_id: int = 151857
    image_end_token_id: int = 151858
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False


class QwenConfig(PreTrainedConfig):
    """A checkpoint in the original layout (model_type `qwen`).

    Raises:
        ValueError: always, with the command that converts the checkpoint.
    """

    model_type = "qwen"

    def __init__(self, **kwargs: Any) -> None:
        raise ValueError(
            "This is a Qwen-VL checkpoint in the original remote-code layout: "
            "convert it once with `python -m models.qwen_vl.convert IN OUT` and pass OUT."
        )
