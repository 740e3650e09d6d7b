"""Find the adapter folder of a checkpoint.

To add a family: a folder with a `core_mapper`, one line in MODEL_NICKNAME_MAP (docs/CustomizedModel.md).
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
import importlib
import re

from base.loading import architecture_of
from common.errors import InputError
from models.core_mapper import ModelCoreMapper

__all__ = ["CONVERTED_MODELS", "FLASH_ATTN_MODELS", "MODEL_NICKNAME_MAP", "ModelCoreMapper", "core_mapper_for"]

# Class name in a checkpoint's config.json ("architectures") -> folder in models/
MODEL_NICKNAME_MAP = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "InstructBlipForConditionalGeneration": "instructblip",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "InternVLForConditionalGeneration": "internvl",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "smolvlm",
    "PaliGemmaForConditionalGeneration": "paligemma",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Mistral3ForConditionalGeneration": "mistral3",
    "MllamaForConditionalGeneration": "mllama",
    "VipLlavaForConditionalGeneration": "vipllava",
    "Idefics2ForConditionalGeneration": "idefics2",
    "AyaVisionForConditionalGeneration": "aya_vision",
    "Ovis2ForConditionalGeneration": "ovis2",
    "Glm4vForConditionalGeneration": "glm4v",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Lfm2VlForConditionalGeneration": "lfm2_vl",
    "DeepseekVLForConditionalGeneration": "deepseek_vl",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Blip2ForConditionalGeneration": "blip_2",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "Molmo2ForConditionalGeneration": "molmo2",
    "Cohere2VisionForConditionalGeneration": "cohere2_vision",
    "Glm46VForConditionalGeneration": "glm46v",
    "Granite4VisionForConditionalGeneration": "granite4_vision",
    "QwenVLForConditionalGeneration": "qwen_vl",
    "InternLMXComposer2ForConditionalGeneration": "internlm_xcomposer2",
}

# Class name of a remote-code checkpoint -> folder whose converter rewrites it once
CONVERTED_MODELS = {
    "QWenLMHeadModel": "qwen_vl",
    "InternLMXComposer2ForCausalLM": "internlm_xcomposer2",
}

# Classes that transformers marks with `_supports_flash_attn`
FLASH_ATTN_MODELS = [
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "InstructBlipForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Ovis2ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Granite4VisionForConditionalGeneration",
    "QwenVLForConditionalGeneration",
    "InternLMXComposer2ForConditionalGeneration",
]


def core_mapper_for(model_name_or_path: str) -> ModelCoreMapper:
    """The adapter of a checkpoint: a full checkpoint or a LoRA adapter folder, a local path or a hub id.

    Raises:
        InputError: no adapter supports the checkpoint's architecture.
    """
    architecture = architecture_of(model_name_or_path)
    if architecture in CONVERTED_MODELS:
        raise InputError(
            f"{model_name_or_path} is a {architecture} in the original remote-code layout: convert it once with "
            f"`python -m models.{CONVERTED_MODELS[architecture]}.convert {model_name_or_path} OUT` and pass OUT."
        )
    if architecture not in MODEL_NICKNAME_MAP:  # a reward model of TRL or ms-swift (base/other_heads.py)
        architecture = re.sub("ForSequenceClassification$", "ForConditionalGeneration", architecture)
    if architecture not in MODEL_NICKNAME_MAP:
        raise InputError(
            f"{model_name_or_path} is a {architecture}, which no folder of models/ supports. Known are "
            f"{', '.join(sorted(MODEL_NICKNAME_MAP))}. docs/CustomizedModel.md shows how to add one."
        )
    return importlib.import_module(f"models.{MODEL_NICKNAME_MAP[architecture]}").core_mapper


# These classes are not part of transformers: importing their folders registers them with its Auto classes.
for _folder in CONVERTED_MODELS.values():
    importlib.import_module(f"models.{_folder}")
