"""Videos of rows: which frames a model sees, decoded or blank.

Frames are chosen by `sample_frames` of the family's own video processor, with the settings saved in it or those of
--video_frames and --video_fps, which are saved with the checkpoint. The pictures of a list of frames are all taken, unless
there are more than --video_frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

from base.images import ImageSource, load_image, upright_size
from common.errors import InputError
from data.videos import Header, is_film, open_film, read_header, reason, upright

Sampling = Mapping[str, float]  # num_frames and fps, as `sample_frames` takes them


@dataclass(frozen=True)
class Video:
    """A video of a row, among its images: one film, or the pictures of its frames in order."""

    files: tuple[ImageSource, ...]

    def __str__(self) -> str:
        first = self.files[0] if self.files and isinstance(self.files[0], str) else "pictures in memory"
        return first if len(self.files) == 1 else f"{first}, ... ({len(self.files)} frames)"


@dataclass(frozen=True)
class Clip:
    """The frames of a video that a model sees, (F, H, W, 3) uint8 RGB, and where they stand in it."""

    frames: np.ndarray
    metadata: VideoMetadata


Medium = ImageSource | Video


def media_of(row: Mapping[str, Any]) -> list[Medium]:
    """The images of a row and behind them its videos, as processors take them."""
    return [*row["images"], *(Video(tuple(files)) for files in row.get("videos") or ())]


def stills_of(media: Sequence[Any]) -> list[Any]:
    """The images among images and videos."""
    return [medium for medium in media if not isinstance(medium, Video | Clip)]


def count_media(media: Sequence[Any]) -> tuple[int, int]:
    """Number of images and of videos."""
    return len(stills_of(media)), len(media) - len(stills_of(media))


# ---------------------------------------------------------------------------------------------------------------------
# Which frames
# ---------------------------------------------------------------------------------------------------------------------


def set_sampling(video_processor: Any, default: Sampling, frames: int | None, fps: float | None) -> None:
    """Say in a video processor of transformers how films are sampled, so that it is saved with it.

    Args:
        default: of the family, for checkpoints that say nothing. Where it has both numbers, the family's sampling reads both.
        frames, fps: of --video_frames and --video_fps; None leaves what the checkpoint says.

    Raises:
        InputError: both are given to a family that reads one, or one of them is not above 0.
    """
    if min(1 if frames is None else frames, 1 if fps is None else fps) <= 0:
        raise InputError("--video_frames and --video_fps are numbers above 0.")
    both = {"num_frames", "fps"} <= default.keys()
    if frames is not None and fps is not None and not both:
        raise InputError("--video_frames and --video_fps both say which frames of a video are seen: give one of them.")
    said = {"num_frames": getattr(video_processor, "num_frames", None), "fps": getattr(video_processor, "fps", None)}
    given = {"num_frames": frames, "fps": fps}
    if both:
        chosen = {name: given[name] or said[name] or default[name] for name in said}
    elif frames is not None or fps is not None:
        chosen = given
    elif said["num_frames"] is not None:
        chosen = {"num_frames": said["num_frames"], "fps": None}
    else:
        chosen = (
            {"num_frames": None, "fps": said["fps"]} if said["fps"] is not None else {**dict.fromkeys(said), **default}
        )
    video_processor.num_frames, video_processor.fps = chosen["num_frames"], chosen["fps"]


def sampled(video: Video, video_processor: Any) -> tuple[Header, list[int]]:
    """The header of a video and the numbers of the frames that a model sees.

    Raises:
        InputError: the video cannot be read or sampled; names it.
    """
    header = _header(video, video_processor)
    metadata = _metadata(header)
    if not is_film(video.files) and header.frames <= (video_processor.num_frames or header.frames):
        return header, [*range(header.frames)]
    frames, fps = video_processor.num_frames, video_processor.fps
    few = max(getattr(video_processor, "temporal_patch_size", None) or 1, frames if frames and fps is None else 1)
    if header.frames <= few:  # some classes would refuse the video, some repeat frames
        return header, [*range(header.frames)]
    try:
        indices = video_processor.sample_frames(metadata, num_frames=frames, fps=fps)
    except (ValueError, ZeroDivisionError, TypeError, RuntimeError) as error:
        raise InputError(
            f"The frames of the video {video}, {header.frames} at {header.fps:.3g} a second, cannot be chosen ({error}): give "
            "another --video_frames, or drop the row."
        ) from error
    return header, [int(i) for i in indices]


def _header(video: Video, video_processor: Any) -> Header:
    if is_film(video.files):
        try:
            return read_header(str(video.files[0]))
        except (ValueError, OSError) as error:
            raise _unreadable(video, error) from error
    if not video.files:
        raise InputError("A video has no frames: name its file or the pictures of its frames.")
    # Pictures say nothing of time: they count as sampled at the rate that films are.
    return Header(len(video.files), float(video_processor.fps or 1), *upright_size(video.files[0]))


def _metadata(header: Header, indices: Sequence[int] | None = None) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=header.frames,
        fps=header.fps,
        width=header.width,
        height=header.height,
        duration=header.frames / header.fps,
        video_backend="pyav",
        frames_indices=None if indices is None else [*indices],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------


def load_clip(video: Video, video_processor: Any) -> Clip:
    """Decode the frames that a model sees. A film is decoded from its beginning to the last of them.

    Raises:
        InputError: a file is missing, damaged or cut off, or frames differ in size; names it.
    """
    header, indices = sampled(video, video_processor)
    if not is_film(video.files):
        pictures = [load_image(video.files[i]) for i in indices]
        if odd := next((p for p in pictures if p.size != pictures[0].size), None):
            raise InputError(
                f"The video {video} has frames of {pictures[0].width} x {pictures[0].height} and of {odd.width} x {odd.height} "
                "pixels: make them equal."
            )
        return Clip(np.stack([np.asarray(p) for p in pictures]), _metadata(header, indices))
    wanted, found = set(indices), {}
    try:
        with open_film(str(video.files[0])) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    found[i] = upright(frame)
                if i >= max(wanted):
                    break
    except (ValueError, OSError) as error:
        raise _unreadable(video, error) from error
    if missing := wanted - found.keys():
        raise InputError(
            f"The video {video} is cut off: frame {min(missing)} of {header.frames} is not there: replace the file or drop the row."
        )
    return Clip(np.stack([found[i] for i in indices]), _metadata(header, indices))


def blank_clip(video: Video, video_processor: Any) -> Clip:
    """A black clip that takes as many tokens as `load_clip`'s; no frame behind the first is decoded."""
    header, indices = sampled(video, video_processor)
    return Clip(np.zeros((len(indices), header.height, header.width, 3), np.uint8), _metadata(header, indices))


def first_frame(video: Video) -> Image.Image:
    """The picture that stands for a video on a page.

    Raises:
        InputError: as `load_clip`.
    """
    if not is_film(video.files):
        return load_image(video.files[0])
    try:
        with open_film(str(video.files[0])) as container:
            return Image.fromarray(upright(next(container.decode(video=0))))
    except (ValueError, OSError, StopIteration) as error:
        raise _unreadable(video, error) from error


def shown_pictures(row: Mapping[str, Any]) -> list[ImageSource]:
    """What a page shows of a row: its images, and the first frame of each video."""
    return [first_frame(medium) if isinstance(medium, Video) else medium for medium in media_of(row)]


def refuse_clips(clips: Sequence[Clip], error: ValueError) -> None:
    """Raise an InputError that says which frames a native processor did not take; nothing if there are none."""
    if clips:
        shown = " and ".join(
            f"{len(c.frames)} frames of {c.frames.shape[2]} x {c.frames.shape[1]} pixels" for c in clips
        )
        raise InputError(
            f"A row's videos ({shown}) are refused by the video processor ({error}): choose another --video_frames, or drop the row."
        ) from error


def _unreadable(video: Video, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(f"Cannot read {video} as a video ({reason(error)}): replace the file or drop the row.")
