"""Pictures of rows: paths, bytes or PIL images -> upright 8-bit RGB."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from PIL import ExifTags, Image
from transformers import BatchFeature

from common.errors import InputError
from data.images import FORMATS, size_and_time, to_rgb

ImageSource = str | os.PathLike[str] | bytes | dict[str, Any] | Image.Image
ImageFile = str | io.BytesIO | Image.Image


def image_file(image: ImageSource) -> ImageFile:
    """What `PIL.Image.open` accepts for an image of a row (path, bytes or {"bytes", "path"}); a PIL image stays one."""
    if isinstance(image, dict):
        return image_file(image["bytes"] if image.get("bytes") is not None else image["path"])
    if isinstance(image, bytes):
        return io.BytesIO(image)
    return image if isinstance(image, Image.Image) else os.fspath(image)


def openable(image: ImageSource) -> str | io.BytesIO:
    """What `PIL.Image.open` takes for an image of a row; a PIL image becomes an uncompressed file in memory, as 8-bit RGB."""
    file = image_file(image)
    if not isinstance(file, Image.Image):
        return file
    memory = io.BytesIO()
    load_image(file).save(memory, "PPM")
    memory.seek(0)
    return memory


IMAGE_STATES = "image_states"  # column of a data set with cached reference log-probs: what `image_states` said when they were computed


def image_states(row: Mapping[str, Any]) -> list[list[int]]:
    """Size and time of change of each file of a row's images and videos, by which a replaced one is known; [] for bytes and missing files."""
    videos = (file for files in row.get("videos") or () for file in files)
    files = [image_file(image) for image in (*row["images"], *videos, row.get("image_rejected")) if image is not None]
    return [list((isinstance(file, str) and size_and_time(file)) or ()) for file in files]


def load_image(image: ImageSource) -> Image.Image:
    """Decode one image to upright 8-bit RGB (data.images.to_rgb: transparency on white, deep greys scaled).

    Raises:
        InputError: the file is missing, truncated or not an image; names it.
    """
    file = image_file(image)
    try:
        decoded = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        return to_rgb(decoded)
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error


def png(image: ImageSource) -> bytes:
    """An image as a PNG file of the pixels that `load_image` returns. Raises InputError as it does."""
    memory = io.BytesIO()
    load_image(image).save(memory, "PNG", compress_level=1)
    return memory.getvalue()


def upright_size(image: ImageSource) -> tuple[int, int]:
    """Width and height of what `load_image` returns, read from the file's header.

    Raises:
        InputError: as `load_image`.
    """
    file = image_file(image)
    try:
        opened = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        turned = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return opened.size[::-1] if turned else opened.size
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error


class ImageProcessor:
    """An image processor that takes an empty list, too: a batch without images has no pixels.

    Args:
        native: of transformers; what it knows beside pixels (sizes, patches) is asked of it.
        call: what makes the pixels, if not `native`.
    """

    def __init__(self, native: Any, call: Callable[..., Any] | None = None) -> None:
        self._native, self._call = native, call or native

    def __call__(self, images: Any = None, **kwargs: Any) -> Any:
        """As the image processor; None for the pixels of no image."""
        if isinstance(images, list | tuple) and not images:
            return BatchFeature({"pixel_values": None})
        return self._call(images=images, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_native"], name) if "_native" in vars(self) else object.__getattribute__(self, name)


def refuse_images(
    image_processor: Any, images: Sequence[Sequence[ImageSource]], pictures: Sequence[Sequence[Image.Image]]
) -> None:
    """Raise an InputError for the first picture that the image processor does not take (too narrow, for some families).

    Args:
        images: as the rows name them, nested per row; `pictures` are the same, decoded.
    """
    for image, picture in zip(chain(*images), chain(*pictures), strict=True):
        try:
            image_processor(images=[picture], return_tensors="pt")
        except ValueError as error:
            file = image_file(image)
            name = f"Image {file}" if isinstance(file, str) else "An image"
            raise InputError(
                f"{name} of {picture.width} x {picture.height} pixels is refused by the image processor ({error}): "
                "crop it or drop the row."
            ) from error


def _unreadable(file: ImageFile, error: Exception) -> InputError:
    name = file if isinstance(file, str) else "image bytes in the row"
    return InputError(f"Cannot read {name} as an image ({error}): replace the file or drop the row.")
