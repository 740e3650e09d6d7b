"""How many pixels of a picture a model sees: --max_pixels and --min_pixels, set in the family's image processor and saved with it.

    Qwen-VL, GLM-V                     pictures are resized to between the two, in steps of a patch
    InternVL, Aya, Command A, Ovis     so many tiles as have these pixels together (a view of the whole comes on top)
    Idefics, SmolVLM, Mistral, Pixtral the longer side is that of a square of these pixels

Other families show every picture at the size that their tower was trained at.
"""

import math
from typing import Any

from transformers.image_utils import SizeDict

from common.errors import InputError


def set_resolution(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Change a processor of transformers in place; None leaves what the checkpoint says.

    Raises:
        InputError: the family has no such setting, or the numbers leave no room for a patch or a tile.
    """
    if min_pixels is None and max_pixels is None:
        return
    size = getattr(image_processor, "size", None)
    side = {name: getattr(size, name, None) for name in ("height", "width", "shortest_edge", "longest_edge")}
    if getattr(image_processor, "merge_size", None) and side["longest_edge"]:
        _set_area(image_processor, side, min_pixels, max_pixels)
    elif min_pixels is not None:
        raise InputError(f"--min_pixels has no part in {_name(image_processor)}: leave it out.")
    elif getattr(image_processor, "max_patches", None):
        tiles = max_pixels // (side["height"] * side["width"])
        if tiles < image_processor.min_patches:
            _too_small(max_pixels, "a tile", side["height"] * side["width"] * image_processor.min_patches)
        image_processor.max_patches = tiles
    elif side["longest_edge"] and not hasattr(image_processor, "image_grid_pinpoints"):
        unit = (getattr(image_processor, "max_image_size", None) or {}).get("longest_edge", 1)  # of Idefics3's tiles
        longest = math.isqrt(max_pixels) // unit * unit
        if longest < max(unit, 28):
            _too_small(max_pixels, "a picture", max(unit, 28) ** 2)
        shortest = side["shortest_edge"] and min(side["shortest_edge"], longest)
        image_processor.size = SizeDict(longest_edge=longest, shortest_edge=shortest)
    else:
        raise InputError(
            f"--max_pixels has no part in {_name(image_processor)}, which shows every picture at one size or in fixed tiles: leave "
            "it out (docs/models.md says how many tokens that is)."
        )


def _set_area(image_processor: Any, side: dict[str, int], min_pixels: int | None, max_pixels: int | None) -> None:
    # GLM counts the pixels of a picture once for each frame that its patches span.
    frames = image_processor.temporal_patch_size if type(image_processor).__name__.startswith("Glm") else 1
    low = side["shortest_edge"] if min_pixels is None else min_pixels * frames
    high = side["longest_edge"] if max_pixels is None else max_pixels * frames
    token = (image_processor.patch_size * image_processor.merge_size) ** 2
    if high < token * frames:
        _too_small(high // frames, "a token", token)
    if min_pixels is None:
        low = min(low, high)
    if low > high:
        raise InputError(
            f"--min_pixels {low // frames} is above --max_pixels {high // frames}, the checkpoint's if not given."
        )
    image_processor.size = SizeDict(shortest_edge=low, longest_edge=high)


def _too_small(pixels: int, what: str, needed: int) -> None:
    raise InputError(f"--max_pixels {pixels} is less than {what} of this model, which has {needed}.")


def _name(image_processor: Any) -> str:
    return type(image_processor).__name__
