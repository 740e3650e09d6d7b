"""Qwen-VL: ViT with a pooling layer (256 tokens per image), Qwen-7B decoder. https://arxiv.org/abs/2308.12966

Released checkpoints are converted once: `python -m models.qwen_vl.convert Qwen/Qwen-VL-Chat OUT`.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from base.images import ImageSource
from base.model import VLModelMixin
from base.processor import Messages, VLProcessor, count_images
from data.rows import IMAGE_MARK
from models.core_mapper import ModelCoreMapper
from models.qwen_vl.configuration import QwenConfig, QwenVLConfig
from models.qwen_vl.modeling import QwenVLForConditionalGeneration
from models.qwen_vl.processing import QwenVLProcessor as NativeProcessor
from models.square_image_processor import SquareImageProcessor

AutoConfig.register("qwen", QwenConfig)
AutoConfig.register("qwen_vl", QwenVLConfig)
AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration)
AutoProcessor.register(QwenVLConfig, NativeProcessor)
AutoImageProcessor.register(
    QwenVLConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), SquareImageProcessor)
)


class QwenVLForRL(VLModelMixin, QwenVLForConditionalGeneration):
    """Qwen-VL with the project's model methods."""

    projector_in_tower = ["attn_pool"]
    end_to_end = False  # the rotary base depends on the length of the row
    # The released fine-tuning script leaves the down projection out.
    default_lora_target = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    # Names of the released code, as its recipes give them.
    renamed_lora_targets = {
        "c_attn": ["q_proj", "k_proj", "v_proj"],
        "attn.c_proj": ["o_proj"],
        "w1": ["up_proj"],
        "w2": ["gate_proj"],
        "mlp.c_proj": ["down_proj"],
    }

    def freeze_vision_tower(self) -> None:
        """Stop gradients into the ViT; as in the released fine-tuning script, the pooling layer still trains."""
        super().freeze_vision_tower()
        self.get_vision_tower().attn_pool.requires_grad_(True)

    def last_hidden_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in the base class, without NTK and logn beyond the training length."""
        # Policy (train mode) and reference (eval mode) must be the same function beyond the training length, too.
        return super().last_hidden_state(*args, extrapolate=False, **kwargs)


class QwenVLProcessor(VLProcessor):
    """`<|im_start|>user\\nPicture 1: <img>...</img>\\nquestion<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>\\n`."""

    _picture = re.compile(r"Picture \d+: <img><imgpad></img>\n")

    def format_multimodal_prompt(
        self, prompt: str, images: ImageSource | Sequence[ImageSource] | int | None = 1
    ) -> str:
        """Put one numbered picture per image in front of a raw prompt."""
        return "".join(f"Picture {n + 1}: <img><imgpad></img>\n" for n in range(count_images(images))) + prompt

    def remove_image_placeholder(self, prompt: str) -> str:
        """The prompt without pictures, whatever their numbers."""
        return self._picture.sub("", prompt).replace(IMAGE_MARK, "")

    def is_multimodal_prompt_valid(self, prompt: str | None) -> bool:
        """Whether the prompt contains a picture."""
        return bool(prompt) and (bool(self._picture.search(prompt)) or IMAGE_MARK in prompt)

    def as_parts(self, messages: Messages, images: int | None) -> Messages:
        """As in the base class, with a mark in place of every numbered picture."""
        # The base class expects one fixed placeholder text; this family's contains a number.
        marked = [
            message | {"content": self._picture.sub(IMAGE_MARK, message["content"])}
            if isinstance(message["content"], str) and message["role"] != "assistant"
            else message
            for message in messages
        ]
        return super().as_parts(marked, images)


core_mapper = ModelCoreMapper(model=QwenVLForRL, processor=QwenVLProcessor)
