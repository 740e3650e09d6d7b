"""InternLM-XComposer2-VL: CLIP tower, two-layer projector, InternLM2 decoder with partial LoRA for image tokens.

https://arxiv.org/abs/2401.16420. Released checkpoints are converted once:
`python -m models.internlm_xcomposer2.convert internlm/internlm-xcomposer2-vl-7b OUT`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from base.model import VLModelMixin
from base.processor import VLProcessor
from models.core_mapper import ModelCoreMapper
from models.internlm_xcomposer2.configuration import InternLMXComposer2Config, InternLMXComposer2OriginalConfig
from models.internlm_xcomposer2.modeling import InternLMXComposer2ForConditionalGeneration
from models.internlm_xcomposer2.processing import InternLMXComposer2Processor as NativeProcessor
from models.square_image_processor import SquareImageProcessor

AutoConfig.register("internlmxcomposer2", InternLMXComposer2OriginalConfig)
AutoConfig.register("internlm_xcomposer2", InternLMXComposer2Config)
AutoModelForImageTextToText.register(InternLMXComposer2Config, InternLMXComposer2ForConditionalGeneration)
AutoProcessor.register(InternLMXComposer2Config, NativeProcessor)
AutoImageProcessor.register(
    InternLMXComposer2Config,
    image_processor_classes=dict.fromkeys(("pil", "torchvision"), SquareImageProcessor),
)


class InternLMXComposer2ForRL(VLModelMixin, InternLMXComposer2ForConditionalGeneration):
    """InternLM-XComposer2-VL with the project's model methods."""


class InternLMXComposer2Processor(VLProcessor):
    """`<s>[UNUSED_TOKEN_146]user\\n<ImageHere>question[UNUSED_TOKEN_145]\\n[UNUSED_TOKEN_146]assistant\\nanswer[UNUSED_TOKEN_145]\\n`."""


core_mapper = ModelCoreMapper(model=InternLMXComposer2ForRL, processor=InternLMXComposer2Processor)
