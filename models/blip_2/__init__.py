"""BLIP-2 with an OPT decoder: a Q-Former reads the image. https://arxiv.org/abs/2301.12597"""

from torch import nn
from transformers import Blip2ForConditionalGeneration

from base.model import VLModelMixin
from models.core_mapper import ModelCoreMapper
from models.query_former import QueryFormerMixin, QueryFormerProcessor


class Blip2ForRL(QueryFormerMixin, VLModelMixin, Blip2ForConditionalGeneration):
    """BLIP-2 with the project's model methods."""

    default_lora_target = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

    def get_decoder(self) -> nn.Module:
        """The decoder without its head."""
        return self.language_model.get_decoder()


class Blip2Processor(QueryFormerProcessor):
    """`Question: question Answer: answer</s>`."""

    model_name = "BLIP-2"

    default_chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' Answer: ' + m['content'][0]['text'] + eos_token }}"
        "{% else %}"
        "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
        "{{ 'Question: ' if m['role'] == 'user' }}"
        "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ ' ' if m['role'] == 'system' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}"
    )


core_mapper = ModelCoreMapper(model=Blip2ForRL, processor=Blip2Processor)
