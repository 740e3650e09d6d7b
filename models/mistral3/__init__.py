"""Mistral Small 3.1 and 3.2: Pixtral tower with patches merged two by two. https://mistral.ai/news/mistral-small-3-1"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
from transformers import Mistral3ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Mistral3ForRL(VLModelMixin, Mistral3ForConditionalGeneration):
    """Mistral Small 3 with the project's model methods."""


class Mistral3Processor(VLProcessor):
    """`[INST]question[IMG][/INST]answer</s>`, images where they stand."""


core_mapper = ModelCoreMapper(model=Mistral3ForRL, processor=Mistral3Processor)
