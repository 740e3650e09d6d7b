"""Video files: how records name them, what their header says, and the proof that a file is whole.

A video of a row is the list of its files: one that holds a film, or the pictures of its frames in order. Films are read
with PyAV (ffmpeg's libraries in a wheel), which rows without films do not need.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from common.errors import InputError
from data.images import check_image, size_of_file
from data.rows import BadRow, shorten, text_of, type_name

ENDINGS = ("mp4", "m4v", "mov", "3gp", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "ogv", "gif")
# ffmpeg's names of what these hold. Others are not tried: some of them are lists of further files or addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegvideo,mpegts,flv,asf,ogg"
_FILM = re.compile(rf"\.({'|'.join(ENDINGS)})$", re.IGNORECASE)
_STILL = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?|ppm|jp2|avif)$", re.IGNORECASE)
_MAX_SIDE = 16384  # pixels


class Header(NamedTuple):
    """Number of frames, frames per second, and the size of an upright frame in pixels."""

    frames: int
    fps: float
    width: int
    height: int


# ----------------------------------------------------------------------------------------------------------------------
# Names in records


def is_film(files: Sequence[object]) -> bool:
    """Whether a video is one film, not a list of frames."""
    return len(files) == 1 and isinstance(files[0], str) and bool(_FILM.search(files[0]))


def video_column(record: Mapping[str, Any]) -> list[list[str]]:
    """The videos of a record's `videos` or `video`: none, one name, a list of names, or lists of the frames' names.

    Raises:
        BadRow: both columns are there, or a name is not that of a film or of a picture.
    """
    there = [name for name in ("video", "videos") if record.get(name)]
    if len(there) > 1:
        raise BadRow("has both `video` and `videos`: keep one of them")
    return videos_of(record[there[0]], there[0]) if there else []


def videos_of(value: object, name: str = "videos") -> list[list[str]]:
    """Every video as the list of its files. A flat list of pictures is one video, frame by frame."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and all(isinstance(v, str) and _STILL.search(v) for v in values):
        values = [values]
    return [_files_of(v, name) for v in values]


def _files_of(value: object, name: str) -> list[str]:
    listed = isinstance(value, list)
    files = [_name_of(v, name) for v in (value if listed else [value])]  # type: ignore[attr-defined]
    if not files:
        raise BadRow(f"has a video without frames in `{name}`: name its file or the pictures of its frames")
    if is_film(files) or (listed and all(map(_STILL.search, files))):
        return files
    odd = next((file for file in files if not (listed and _STILL.search(file))), files[0])
    raise BadRow(
        f"names the video {shorten(odd)} in `{name}`: a video is one {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file, or a list of "
        "the pictures of its frames"
    )


def _name_of(value: object, name: str) -> str:
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            raise BadRow(f"holds a video as bytes in `{name}`: write it to a file and name that")
        value = value.get("path") or value.get("url")
    if isinstance(value, bytes) or value is None:
        raise BadRow(f"its `{name}` is {type_name(value)} where a video is due: give the name of its file")
    return text_of(value, f"`{name}`")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def av() -> ModuleType:
    """PyAV.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av  # optional
    except ImportError as error:
        raise InputError(
            "Videos need a package that is not installed: pip install -r requirements.txt (it holds av, PyAV)."
        ) from error
    av.logging.set_level(None)  # what ffmpeg says of a damaged file comes as an error, too
    return av


@contextmanager
def open_film(path: str) -> Iterator[Any]:
    """An open film of PyAV.

    Raises:
        ValueError, OSError: the file is no film or cannot be read; PyAV's errors are such.
    """
    with av().open(path, options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}) as container:
        if not container.streams.video:
            raise ValueError("it holds no pictures")
        container.streams.video[0].thread_type = "AUTO"
        yield container


def upright(frame: Any) -> np.ndarray:  # noqa: ANN401  PyAV's frames
    """(H, W, 3) uint8 RGB of a decoded frame, turned as the camera says."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))


def read_header(path: str) -> Header:
    """What a film's header says; its first frame is decoded. Frames that no header counts are counted without decoding.

    Raises:
        ValueError, OSError: the file is no film or cannot be read.
    """
    with open_film(path) as container:
        stream = container.streams.video[0]
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("it holds no frame")
        height, width = upright(first).shape[:2]
        frames, rate = stream.frames, stream.average_rate or stream.guessed_rate or Fraction(1)
    return Header(frames or count_frames(path), float(rate), width, height)


def count_frames(path: str) -> int:
    """Frames whose data are all there. Reads the whole file and decodes nothing."""
    with open_film(path) as container:
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size and not packet.is_corrupt)


def check_video(files: Sequence[str], image_root: str, allow_outside: bool, decode: bool = False) -> bytes:
    """Signature of a video that is whole: equal for equal files whatever their names.

    A film is read to its end; with `decode` every frame of it is decoded.

    Raises:
        BadRow: a file is missing, a link out of the image root, empty, damaged or cut off.
        InputError: PyAV is not installed.
    """
    if not is_film(files):
        found = [check_image(file, image_root, allow_outside, decode) for file in files]
        if len({checked.size for checked in found}) > 1:
            raise BadRow(f"has frames of different sizes in one video ({shorten(files[0])}, ...): make them equal")
        return hashlib.blake2b(b"".join(checked.signature for checked in found), digest_size=16).digest()
    return _check_film(files[0], image_root, allow_outside, decode)


@functools.lru_cache(maxsize=65536)
def _check_film(path: str, image_root: str, allow_outside: bool, decode: bool) -> bytes:
    size = size_of_file(path, image_root, allow_outside, "video")
    name = shorten(path)
    try:
        header, whole = read_header(path), count_frames(path)
        if decode:
            with open_film(path) as container:
                whole = sum(1 for _ in container.decode(video=0))
        with open(path, "rb") as file:
            head = file.read(4096)
            file.seek(max(size - 4096, 0))
            tail = file.read(4096)
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise BadRow(f"has the video {name}, which is broken or cut off ({reason(error)}): replace the file") from None
    if whole < header.frames:
        raise BadRow(f"has the video {name}, which is cut off: {whole} of its {header.frames} frames are there")
    if max(header.width, header.height) > _MAX_SIDE:
        raise BadRow(f"has the video {name} of {header.width} x {header.height} pixels: make it smaller")
    return hashlib.blake2b(size.to_bytes(8, "big") + head + tail, digest_size=16).digest()


def forget_videos() -> None:
    """Look at every file anew: it may have changed."""
    _check_film.cache_clear()


def reason(error: Exception) -> str:
    """What PyAV says is wrong, without the file's name."""
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__)
