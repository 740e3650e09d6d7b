"""Ovis2: the tower describes a patch as a mixture of visual words. https://arxiv.org/abs/2405.20797"""

from transformers import Ovis2ForConditionalGeneration

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper


class Ovis2ForRL(VLModelMixin, Ovis2ForConditionalGeneration):
    """Ovis2 with the project's model methods."""


class Ovis2Processor(VLProcessor):
    """ChatML with a default system message, `<image>` and a line break."""


core_mapper = ModelCoreMapper(model=Ovis2ForRL, processor=Ovis2Processor)
