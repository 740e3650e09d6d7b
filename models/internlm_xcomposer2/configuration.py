"""Configuration of InternLM-XComposer2-VL: a Llama-shaped decoder with partial LoRA, a CLIP tower and a two-layer projector.

The defaults are the public 7 B model. `InternLMXComposer2OriginalConfig` stands for the original remote-code layout and
only says how to convert it.
"""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class InternLMXComposer2TextConfig(LlamaConfig):
    """InternLM2-7B in the names of Llama.

    Attributes:
        plora_rank, plora_alpha, plora_dropout: partial LoRA, the low-rank path of image tokens.
    """

    model_type = "internlm_xcomposer2_text"
    base_config_key = "text_config"

    vocab_size: int = 92544
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    plora_rank: int = 256
    plora_alpha: int = 256
    plora_dropout: float = 0.05


class InternLMXComposer2Config(PreTrainedConfig):
    """InternLM-XComposer2-VL.

    Attributes:
        image_token_id: the placeholder's id. It lies beyond the vocabulary and has no embedding.
        original_max_length: `max_length` of the original config.json, for the way back; nothing here reads it.
    """

    model_type = "internlm_xcomposer2"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=CLIPVisionConfig,
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 490,
                "patch_size": 14,
            },
        ),
        "text_config": InternLMXComposer2TextConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 92544
    original_max_length: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @property
    def num_patches(self) -> int:
        """Of an image, each of which is a token. (`num_image_tokens`, the processor's argument, is set here too when a
        processor is loaded with it.)"""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2


class InternLMXComposer2OriginalConfig(PreTrainedConfig):
    """A checkpoint in the original layout (model_type `internlmxcomposer2`).

    Raises:
        ValueError: always, with the command that converts the checkpoint.
    """

    model_type = "internlmxcomposer2"

    def __init__(self, **kwargs: Any) -> None:
        raise ValueError(
            "This is an InternLM-XComposer2 checkpoint in the original remote-code layout: "
            "convert it once with `python -m models.internlm_xcomposer2.convert IN OUT` and pass OUT."
        )
