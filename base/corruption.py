"""Corrupted images v′ for losses that ask how much the image matters.

crop: a random 1-20 % of the area, resized back (mDPO, 2406.11839).
diffusion: Gaussian noise of a diffusion step on the normalised pixels (VCD, 2311.16922; POVID, CHiP and TPO use its
schedule).
black: a black picture. patch: half of a 16 x 16 grid greyed out. swap: another row's image.

There is one draw per row and step, shared by policy and reference. All keep the image's size, so that v′ has as many
image tokens as v.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from common.errors import InputError

Corruption = Literal["crop", "diffusion", "black", "patch", "swap"]


def corrupt_pictures(
    pictures: Sequence[Sequence[Image.Image]], corruption: Corruption | None, seeds: Sequence[int]
) -> list[list[Image.Image]]:
    """The RGB pictures of a batch's rows, corrupted, each as large as before.

    Args:
        pictures: nested per row.
        corruption: "diffusion" and None leave the pictures as they are; noise is added to pixel values, by `diffuse`.
        seeds: one per row.

    Raises:
        InputError: "swap" in a batch of one row.
    """
    if corruption == "swap":
        return swap_pictures(pictures)
    draws = map(np.random.default_rng, seeds)
    return [
        [corrupt_picture(picture, corruption, draw) for picture in row]
        for row, draw in zip(pictures, draws, strict=True)
    ]


def swap_pictures(pictures: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    """Each row with the pictures of the next row that has some, resized to replace its pictures."""
    if len(pictures) < 2:
        raise InputError("--corruption swap takes another row's image: use batches of two rows or more.")
    swapped = []
    for b, row in enumerate(pictures):
        others = next(filter(None, [*pictures[b + 1 :], *pictures[:b]]), row)
        swapped.append([others[i % len(others)].resize(picture.size) for i, picture in enumerate(row)])
    return swapped


def corrupt_picture(picture: Image.Image, corruption: Corruption | None, rng: np.random.Generator) -> Image.Image:
    """One RGB picture with "crop", "black" or "patch"; others leave it as it is."""
    width, height = picture.size
    if corruption == "crop":
        share = rng.uniform(0.01, 0.2)
        ratio = np.exp(
            rng.uniform(np.log(3 / 4), np.log(4 / 3))
        )  # aspect ratio of the crop, as RandomResizedCrop draws it
        w = int(np.clip(round(np.sqrt(share * width * height * ratio)), 1, width))
        h = int(np.clip(round(np.sqrt(share * width * height / ratio)), 1, height))
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        return picture.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    if corruption == "black":
        return Image.new("RGB", picture.size)
    if corruption == "patch":
        masked = picture.copy()
        draw = ImageDraw.Draw(masked)
        for cell in rng.permutation(256)[:128]:
            row, column = divmod(int(cell), 16)
            box = (column * width // 16, row * height // 16, (column + 1) * width // 16, (row + 1) * height // 16)
            if box[2] > box[0] and box[3] > box[1]:
                draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(128, 128, 128))
        return masked
    return picture


def diffuse(pixel_values: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Forward diffusion of normalised pixels: sqrt(ā) x + sqrt(1 - ā) ε at `step` of 1000, any shape, same dtype.

    VCD's schedule: betas are a sigmoid from 1e-5 to 5e-3.
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, dim=0)[step]
    noise = torch.randn(pixel_values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (kept.sqrt() * pixel_values.double() + (1 - kept).sqrt() * noise).to(pixel_values.dtype)
