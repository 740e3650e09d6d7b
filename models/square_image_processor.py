"""The preprocessing that Qwen-VL and InternLM-XComposer2 share: squash to a square, CLIP's mean and deviation."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil


class SquareImageProcessor(CLIPImageProcessorPil):
    """PIL's bicubic filter to `size`, whatever the aspect ratio; an alpha channel is dropped, as in the released code.

    transformers' processor for CLIP does not fit: it resizes with torchvision where it can, which gives other pixels,
    and puts transparent pictures on white.
    """

    do_center_crop = False

    def process_image(self, image: Image.Image | np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        """A picture as numbers, without its alpha channel."""
        if isinstance(image, Image.Image):
            image = image.convert("RGB")
        return super().process_image(image, *args, **kwargs)
