"""From what a data set stores to tensors, as Shi, Wang and Roshka (channel suppression) do, section 3."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

BROKEN = (OSError, RuntimeError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)
"""What a damaged picture raises when it is read."""


def preprocess(image: PIL.Image.Image, resolution: int) -> Tensor:
    """A picture as the paper's section 3 prepares it: RGB; the shorter side resized to
    ``resolution`` (bilinear); the centre cropped; (x - 0.5) / 0.5.

    Returns:
        (3, resolution, resolution) float32 in [-1, 1].
    """
    image = _as_rgb(image)
    short = min(image.size)
    width, height = (resolution if side == short else int(resolution * side / short) for side in image.size)
    image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    return ((pixels - 0.5) / 0.5).contiguous()


def collate(items: list[dict[str, Any] | None]) -> dict[str, Tensor] | None:
    """Stack what could be read; a picture that could not goes with its label. None if none could."""
    items = [item for item in items if item is not None]
    if not items:
        return None
    batch = {"pixels": torch.stack([item["pixels"] for item in items])}
    for key in items[0].keys() - {"pixels"}:
        batch[key] = torch.tensor([item[key] for item in items])
    return batch


def _as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: PIL would clip it to white
        image = PIL.Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode(value: Any) -> PIL.Image.Image:
    """A picture from what ``datasets`` stores of it; raises one of BROKEN where it is damaged."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is None:
            raise ValueError("the row holds no picture")
        stored = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        image = PIL.Image.open(io.BytesIO(stored))
    elif isinstance(value, PIL.Image.Image):
        image = value
    else:
        raise ValueError(f"the row holds {type(value).__name__}, not a picture")
    image.load()
    return image
