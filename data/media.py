"""What names a picture, a film or a sound in a record, whatever its column is called. By files' endings, by first bytes, by names.

Records of every format are searched with this: in columns (data/columns.py), messages and parts of messages (data/rows.py).
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

Medium = Literal["picture", "video", "audio"]

_PICTURE_FILE = re.compile(r"\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|ppm|jp2|avif|ico|heic|heif)(\?.*)?$", re.IGNORECASE)
_FILM_FILE = re.compile(r"\.(mp4|avi|mov|mkv|webm|m4v|mpe?g)(\?.*)?$", re.IGNORECASE)
_SOUND_FILE = re.compile(r"\.(wav|mp3|flac|ogg|opus|m4a|aac)(\?.*)?$", re.IGNORECASE)
_PICTURE_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_PICTURE_BASE64 = ("data:image", "iVBORw0KGgo", "/9j/", "R0lGOD")
_PICTURE_WORDS = {"image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "pixels"}
_PICTURE_WORDS |= {"pixel", "screenshot", "screenshots", "frame", "frames", "thumbnail", "jpg", "jpeg", "png"}
# `image_id`, `image_caption`: about a picture, not its name.
_ABOUT_WORDS = {
    "id", "ids", "size", "width", "height", "wh", "ratio", "aspect", "source", "type", "caption", "captions", "text",
    "description", "question", "answer", "count", "num", "number", "n", "has", "is", "with", "format", "mode", "license",
    "hash", "sha", "md5", "category", "class", "label", "labels", "split", "dataset", "set", "token", "tokens", "grid",
    "quality", "score", "index", "idx", "credit", "author", "title", "date", "tag", "tags", "start", "end", "rate", "fps",
}  # fmt: skip
_MEDIUM_WORDS: dict[Medium, set[str]] = {
    "video": {"video", "videos", "film", "films", "movie", "movies", "clip", "clips"},
    "audio": {"audio", "audios", "sound", "sounds", "speech", "speeches", "waveform"},
}


def medium_of(name: str, value: object, beside_images: bool = False) -> tuple[Medium, object] | None:
    """The medium that a value under this name stands for and what names it, or None.

    Args:
        beside_images: the row has images: then a picture is known by its ending or content, not by the column's name alone.
    """
    words = words_of(name)
    named = isinstance(value, str | list | Mapping | bytes) and bool(value) and not words & _ABOUT_WORDS
    first = value[0] if isinstance(value, list) and value else value
    short = named and (not isinstance(first, str) or len(first.split()) <= 3)
    media: tuple[tuple[Medium, re.Pattern[str]], ...] = (("video", _FILM_FILE), ("audio", _SOUND_FILE))
    for medium, files in media:
        says_so = words & {medium, f"{medium}s"} or (short and words & _MEDIUM_WORDS[medium])
        if (named and says_so) or _find(value, lambda leaf, files=files: _is_file(leaf, files)):  # type: ignore[misc]
            return medium, first
    picture = _find(value, _is_picture)
    if picture is None and short and words & _PICTURE_WORDS and not beside_images:
        picture = first
    return ("picture", picture) if picture is not None else None


def is_base64(text: str) -> bool:
    """Whether a text is a picture's bytes, not its name."""
    return len(text) > 60 and text.startswith(_PICTURE_BASE64)


def words_of(name: str) -> set[str]:
    """`imagePath`, `image_path` -> {"image", "path"}."""
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def stem(name: object) -> str:
    """A file's name without folder and ending."""
    return os.path.splitext(os.path.basename(str(name or "")))[0]


def _find(value: object, test: Callable[[str | bytes], bool], depth: int = 5) -> Any:  # noqa: ANN401  whatever it finds
    """The first text or bytes within a value that passes the test."""
    if isinstance(value, str | bytes):
        return value if test(value) else None
    if depth and isinstance(value, list | Mapping):
        for inner in list(value.values() if isinstance(value, Mapping) else value)[:50]:
            if (found := _find(inner, test, depth - 1)) is not None:
                return found
    return None


def _is_picture(leaf: str | bytes) -> bool:
    if isinstance(leaf, bytes):
        return leaf.startswith(_PICTURE_BYTES) or (leaf[:4] == b"RIFF" and leaf[8:12] == b"WEBP")
    return _is_file(leaf, _PICTURE_FILE) or is_base64(leaf)


def _is_file(leaf: str | bytes, files: re.Pattern[str]) -> bool:
    """A file's name, not a sentence that ends with one."""
    return isinstance(leaf, str) and len(leaf) < 1000 and bool(files.search(leaf)) and len(leaf.split()) <= 3
