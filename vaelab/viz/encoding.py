"""Pictures as the bytes of PNG and WebP files."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LOSSLESS_SIDE = 256
"""Side in pixels up to which pictures are PNG; larger ones are WebP."""


def encode_pixels(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Encode pixels (H, W, 3) or, with opacity, (H, W, 4) uint8.

    Args:
        pixels: the pixels.
        kind: a format of Pillow.
        options: its options.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(picture: Tensor) -> np.ndarray:
    """Convert a picture (3, H, W) in [-1, 1] to pixels (H, W, 3) uint8."""
    return ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def encode_picture(picture: Tensor) -> bytes:
    """Encode a picture (3, H, W) in [-1, 1]: as PNG, or as WebP if a side is above :data:`LOSSLESS_SIDE`."""
    pixels = pixels_of(picture)
    small = max(pixels.shape[:2]) <= LOSSLESS_SIDE
    return encode_pixels(pixels) if small else encode_pixels(pixels, "WEBP", quality=90)


def decode_picture(data: bytes) -> Tensor:
    """Decode what :func:`encode_picture` made: (3, H, W) in [-1, 1]."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
