"""Image files: cheap proof that a file is whole.

A check reads a file's header and end and never decodes JPEG, PNG, GIF or WebP, the formats of the public sets, unless
their end looks wrong. Other formats have no cheap proof and are decoded once. Decoding for training happens in the
collator.
"""

import functools
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data.rows import BadRow, is_inside, shorten

# Formats that hold pictures (JPEG covers MPO, its kin with several). Pillow knows more, some of which start other
# programs (EPS) or are not pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_ENDS = 4096  # bytes read at each end of a file


class Checked(NamedTuple):
    """signature: equal for equal files. size: width and height in pixels, upright as `base.images.load_image` makes it."""

    signature: bytes
    size: tuple[int, int]


def check_image(image: str | Mapping[str, Any], image_root: str, allow_outside: bool, decode: bool = False) -> Checked:
    """Signature and size of an image (path or {"bytes", "path"}) that is whole as far as its header and end tell.

    Equal files have equal signatures whatever their names; different files with equal size, start and end share one, too.
    With `decode` the whole image is decoded as training will do it.

    Raises:
        BadRow: missing, a link out of the image root, no file, empty, unreadable, truncated or too large.
    """
    data, path = (image.get("bytes"), image["path"]) if isinstance(image, Mapping) else (None, image)
    if data is not None:
        if not data:
            raise BadRow("has an image of 0 bytes: restore it or take the row out")
        with io.BytesIO(data) as file:
            return _check_open_image(file, len(data), "its image", decode)
    return _check_file(str(path), image_root, allow_outside, decode)


# Many rows ask about one picture. `data.verify` empties the memory before it looks at a data set.
@functools.lru_cache(maxsize=65536)
def _check_file(path: str, image_root: str, allow_outside: bool, decode: bool) -> Checked:
    size = size_of_file(path, image_root, allow_outside, "image")
    try:
        with open(path, "rb") as file:
            return _check_open_image(file, size, f"the image {shorten(path)}", decode)
    except OSError as error:
        raise BadRow(f"names the image {shorten(path)}, which cannot be read ({error.strerror or error})") from None


def size_of_file(path: str, image_root: str, allow_outside: bool, what: str) -> int:
    """Size in bytes of the file of a picture or video (`what`).

    Raises:
        BadRow: it is missing, a link out of the image root, no file or empty.
    """
    name = shorten(path)
    try:
        info = os.stat(path)
        real = os.path.join(_real_folder(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(real):
            real = os.path.realpath(real)
        if not allow_outside and not is_inside(real, _real_folder(image_root)):
            raise BadRow(
                f"names the {what} {name}, a link to {shorten(real)} outside of --image_root {image_root}: copy it there, "
                "or trust the file with --allow_outside_image_root True"
            )
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "no regular file"
            raise BadRow(f"names the {what} {name}, which is {kind}: give the name of a file")
        if info.st_size == 0:
            raise BadRow(f"names the {what} {name}, which has 0 bytes: restore the file")
        return info.st_size
    except FileNotFoundError:
        raise BadRow(f"names the {what} {name}, which does not exist: check --image_root {image_root}") from None
    except OSError as error:
        raise BadRow(f"names the {what} {name}, which cannot be read ({error.strerror or error})") from None


def size_and_time(path: str) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns of a file, by which a replaced one is known; None if it is not there."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


def forget_images() -> None:
    """Look at every file anew: it may have changed."""
    _check_file.cache_clear()
    _real_folder.cache_clear()


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of a decoded or undecoded picture. Transparency is laid on white, deep greys are scaled.

    Deep greys (16 or 32 bits, floats) have no common white: it is 1, 255 or 65535, whichever the largest value fits, and
    where values are negative or larger their own range is stretched.

    Raises:
        ValueError: values that are not numbers.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        grey = np.asarray(picture, dtype=np.float64)
        low, high = grey.min(), grey.max()
        if not np.isfinite([low, high]).all():
            raise ValueError("it holds values that are not numbers")
        white = next((top for top in (1, 255, 65535) if low >= 0 and high <= top), None)
        black, white = (0, white) if white else (low, max(high, low + 1e-12))
        picture = Image.fromarray(((grey - black) / (white - black) * 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white_sheet = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white_sheet, picture)
    return picture.convert("RGB")


def _check_open_image(file: BinaryIO, size: int, name: str, decode: bool) -> Checked:
    head = file.read(_ENDS)
    file.seek(max(size - _ENDS, 0))
    tail = file.read(_ENDS)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the size is checked here
            with Image.open(file, formats=FORMATS) as opened:
                width, height = opened.size
                turned = _turned(opened)
                if width < 1 or height < 1:
                    raise BadRow(f"has {name} of {width} x {height} pixels: replace the file")
                if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError
                if decode or not _ends_well(opened.format, head, tail, size):
                    to_rgb(opened)
                elif opened.format == "PNG":
                    opened.verify()  # checksums of all chunks, nothing is decoded
    except BadRow:
        raise
    except Image.UnidentifiedImageError:
        raise BadRow(
            f"has {name}, which is not {', '.join(FORMATS[:4])} or another known kind of picture: convert it"
        ) from None
    except Image.DecompressionBombError:
        raise BadRow(
            f"has {name}, which is larger than {Image.MAX_IMAGE_PIXELS:,} pixels (Pillow's limit against decompression "
            "bombs): make it smaller"
        ) from None
    except Exception as error:  # Pillow's plugins raise whatever their parser meets in a broken file
        raise BadRow(f"has {name}, which is broken or cut off ({_reason(error)}): replace the file") from None
    signature = hashlib.blake2b(size.to_bytes(8, "big") + head + tail, digest_size=16).digest()
    return Checked(signature, (height, width) if turned else (width, height))


def _turned(opened: Image.Image) -> bool:
    """Whether the camera's mark says that width and height change places."""
    if "exif" not in opened.info and opened.format != "TIFF":
        return False  # a PNG would be decoded to look for it
    try:
        return opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # odd metadata is no reason to refuse a picture
        return False


def _ends_well(image_format: str | None, head: bytes, tail: bytes, size: int) -> bool:
    """False when the file may be cut off, or when its format does not tell."""
    end = tail.rstrip(b"\0\r\n ")  # padding that cameras and archives add
    match image_format:
        case "JPEG" | "MPO":
            return end.endswith(b"\xff\xd9")
        case "PNG":
            return end.endswith(b"IEND\xaeB`\x82")
        case "GIF":
            return end.endswith(b";")
        case "WEBP":
            return int.from_bytes(head[4:8], "little") + 8 <= size
    return False


@functools.lru_cache(maxsize=65536)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def _reason(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__)
