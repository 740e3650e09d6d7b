"""For families that pool the features of a video frame by frame: videos of different length in one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


class VideosOfAnyLength:
    """In front of `VLModelMixin`: takes `pixel_values_videos` as a list with one (F, C, H, W) tensor per video, too.

    The native classes want one tensor for all videos. The tower sees all frames at once, as often as it does on other ranks.
    """

    def encode_images(self, img_inputs: dict[str, Any]) -> dict[str, Any]:
        """As VLModelMixin's."""
        clips = img_inputs.get("pixel_values_videos")
        if not isinstance(clips, list | tuple):
            return super().encode_images(img_inputs)  # type: ignore[misc]
        encoded = super().encode_images(img_inputs | {"pixel_values_videos": torch.cat([*clips])[None]})  # type: ignore[misc]
        features = encoded["mm_encoder_outputs"]["video"].pooler_output[0]  # (all frames' tokens and a line's end, D)
        pooled = _video_by_video(features, [len(clip) for clip in clips])
        encoded["mm_encoder_outputs"]["video"] = BaseModelOutputWithPooling(pooler_output=pooled[None])
        return encoded

    def last_hidden_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As VLModelMixin's."""
        if isinstance(kwargs.get("pixel_values_videos"), list | tuple):
            kwargs = self.encode_images(kwargs)
        return super().last_hidden_state(*args, **kwargs)  # type: ignore[misc]


def _video_by_video(features: Tensor, frames: Sequence[int]) -> Tensor:
    """Features of the frames of all videos, with what stands behind the last one (a line's end, or nothing) behind each video."""
    per_frame = len(features) // sum(frames)
    ending = features[per_frame * sum(frames) :]
    parts = features[: per_frame * sum(frames)].split([per_frame * n for n in frames])
    return torch.cat([tensor for part in parts for tensor in (part, ending)])
