"""LLaVA-1.5: CLIP (or Pixtral) tower, two-layer projector, Llama decoder. https://arxiv.org/abs/2310.03744"""

from transformers import LlavaForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class LlavaForRL(VLModelMixin, LlavaForConditionalGeneration):
    """LLaVA with the project's model methods."""


class LlavaProcessor(VLProcessor):
    """`USER: <image>\\nquestion ASSISTANT: answer</s>`, the Vicuna v1.1 format."""

    # For checkpoints saved before processors carried templates.
    default_chat_template = (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
        "{% else %}{{ message['role'].upper() + ': ' }}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


core_mapper = ModelCoreMapper(model=LlavaForRL, processor=LlavaProcessor)
