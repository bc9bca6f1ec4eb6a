"""Convert stored pictures to tensors, as in Shi, Wang and Roshka (channel suppression), section 3.

A picture is decoded (:func:`decode`), converted to RGB as it is meant to be displayed (:func:`to_rgb`:
orientation, depth, transparency), and resized and cropped to a square (:func:`square`).
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from torch import Tensor

BROKEN = (EOFError, OSError, RuntimeError, SyntaxError, ValueError, struct.error, PIL.Image.DecompressionBombError)
"""The errors that a damaged picture raises when it is read."""
SIXTEEN_BITS = 2**16 - 1
LEAST_WHITE = 2**14
"""A 16-bit picture without a value of at least this uses 14 bits or fewer: it may be 10-, 12- or 14-bit data."""
ELONGATED = 8
"""If the aspect ratio is at least this, only the part of a picture that is not cropped away is resized."""


def preprocess(
    image: PIL.Image.Image, resolution: int, *, background: str = "white", white_level: float | None = None
) -> Tensor:
    """Prepare a picture as in the paper's section 3: convert to RGB, resize the shorter side to ``resolution``
    (bilinear), crop the centre, and normalise by (x - 0.5) / 0.5.

    Args:
        image: a picture of any mode.
        resolution: the side R of the result, in pixels.
        background: the colour behind transparent pixels, see :func:`to_rgb`.
        white_level: the value that is white in deep greyscale pictures, see :func:`to_rgb`.

    Returns:
        (3, R, R) float32 in [-1, 1].

    Raises:
        ValueError: the range of the picture's values is unknown, or values lie outside it.
    """
    return square(to_rgb(image, background=background, white_level=white_level).image, resolution)


class Opaque(NamedTuple):
    """A picture without transparency."""

    image: PIL.Image.Image
    """Mode RGB, or mode F with values in [0, 255] for a greyscale picture of more than 8 bits."""
    composited: bool = False
    """Whether the original had transparent pixels."""
    several_frames: bool = False
    """Whether the file holds several pictures, of which this is the first."""


def to_rgb(image: PIL.Image.Image, *, background: str = "white", white_level: float | None = None) -> Opaque:
    """Convert a picture to how it is meant to be displayed: upright, 8 bits per channel, without transparency.

    The orientation tag of a camera is followed. Transparent pixels are composited on ``background``.
    A greyscale picture of more than 8 bits is scaled by ``white_level`` if it is given, otherwise by
    what the file declares, otherwise by its format (1 for floating point, 65,535 for 16 bits).

    Args:
        image: a picture of any mode. Open it with :func:`decode`: a 16-bit colour picture that is
            already loaded looks like one of 8 bits.
        background: the colour behind transparent pixels, by any name that Pillow knows.
        white_level: the value that is white in greyscale pictures of more than 8 bits.

    Raises:
        ValueError: values lie outside the range, or the range is neither declared nor plausible.
    """
    several_frames = getattr(image, "is_animated", False)
    depth = _depth(image)  # before the picture is loaded or turned, which loses what its file says
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return Opaque(_scaled(image, depth, white_level), False, several_frames)
    composited = False
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if composited := rgba.getchannel("A").getextrema()[0] < 255:
            ground = PIL.Image.new("RGBA", rgba.size, PIL.ImageColor.getrgb(background))
            image = PIL.Image.alpha_composite(ground, rgba)
    image = image.convert("RGB")
    if depth.truncated:
        brightest = max(high for _, high in image.getextrema())
        if 0 < brightest < LEAST_WHITE >> 8:
            raise ValueError(
                f"a 16-bit colour picture with values of up to about {(brightest + 1) << 8} of {SIXTEEN_BITS}: it "
                "seems to hold fewer bits; expected a picture that uses the whole range, or one of 8 bits"
            )
    return Opaque(image, composited, several_frames)


def square(image: PIL.Image.Image, resolution: int) -> Tensor:
    """Resize the shorter side to ``resolution`` (bilinear), crop the centre, and scale the values to [-1, 1].

    Args:
        image: a picture of mode RGB, or of mode F with values in [0, 255].
        resolution: the side R of the result, in pixels.

    Returns:
        (3, R, R) float32.
    """
    short = min(image.size)
    width, height = (resolution if side == short else int(resolution * side / short) for side in image.size)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    if max(image.size) >= ELONGATED * short:
        # a strip of 1 x 50,000 pixels would take gigabytes before it is cropped
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + resolution) * across, (top + resolution) * down)
        image = image.resize((resolution, resolution), PIL.Image.Resampling.BILINEAR, box=box)
    else:
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
    return ((pixels - 0.5) / 0.5).contiguous()


class _Depth(NamedTuple):
    """What a file says about the values of its pixels."""

    black: float = 0.0
    white: float | None = None
    """The value that is white; None if the file does not say."""
    assumed: bool = False
    """Whether ``white`` comes from the number of bits alone."""
    inverted: bool = False
    """Whether 0 is white."""
    truncated: bool = False
    """Whether Pillow reads only 8 of 16 bits, as it does for colour pictures."""


def _depth(image: PIL.Image.Image) -> _Depth:
    tile = image.tile[0] if getattr(image, "tile", None) else None
    arguments = tile.args if tile is not None and isinstance(tile.args, tuple) else (tile and tile.args,)
    tags = getattr(image, "tag_v2", {}) if image.format in ("TIFF", "MPO") else {}
    if image.mode[0] not in "IF":
        return _Depth(truncated=any(";16" in str(argument) for argument in arguments))
    inverted = tags.get(262) == 0  # PhotometricInterpretation: WhiteIsZero, which Pillow applies to 8 bits only
    black, white = (_first(tags.get(signed, tags.get(plain))) for signed, plain in ((340, 280), (341, 281)))
    if image.mode == "F":
        return _Depth(black or 0.0, 1.0 if white is None else white, inverted=inverted)
    if white is not None and white > 0:
        # the tag may give the highest value that occurs; the range ends at the next full number of bits
        return _Depth(white=2.0 ** int(white).bit_length() - 1, inverted=inverted)
    bits = _first(tags.get(258))  # BitsPerSample
    if bits is not None and bits < 16:
        return _Depth(white=2.0**bits - 1, inverted=inverted)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        declared = image.format == "PPM" and arguments[-1] != SIXTEEN_BITS  # Pillow has scaled it to 16 bits
        return _Depth(white=SIXTEEN_BITS, assumed=not declared, inverted=inverted)
    return _Depth(inverted=inverted)


def _first(tag: Any) -> float | None:
    return tag[0] if isinstance(tag, tuple) else tag


def _scaled(image: PIL.Image.Image, depth: _Depth, white_level: float | None) -> PIL.Image.Image:
    """Scale a greyscale picture of more than 8 bits to values in [0, 255], mode F."""
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    seen = f"a greyscale picture of mode {image.mode} with values from {low:g} to {high:g}"
    if "transparency" in image.info:
        raise ValueError(f"{seen} and a transparent value is not supported")
    black, white = (0.0, white_level) if white_level else (depth.black, depth.white)
    if white is None and high == low == 0:
        white = 1.0
    if white is None:
        raise ValueError(f"{seen}: the file does not say which value is white; give white_level")
    if not black <= low <= high <= white:  # NaN too
        raise ValueError(f"{seen} does not fit the range from {black:g} to {white:g}; give white_level")
    if depth.assumed and not white_level and 0 < high < LEAST_WHITE:
        raise ValueError(f"{seen} of {SIXTEEN_BITS}: it seems to hold fewer than 16 bits; give white_level")
    scaled = (values - black) / (white - black) * 255
    return PIL.Image.fromarray((255 - scaled if depth.inverted else scaled).astype(np.float32))


def decode(value: Any, folders: Sequence[Path] = ()) -> PIL.Image.Image:
    """Open a picture from the value that ``datasets`` stores for it.

    Args:
        value: ``{"bytes": ..., "path": ...}``, of which one may be None; or a picture.
        folders: the folders that may hold a picture stored as a path; a relative path may start at any of them. Files
            elsewhere are not read.

    Raises:
        ValueError: the value holds no picture, or its path leads out of the folders. A damaged picture raises one of
            the errors ``BROKEN``, here or when its pixels are loaded.
    """
    if isinstance(value, PIL.Image.Image):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"the row holds {type(value).__name__}, not a picture")
    if value.get("bytes") is not None:
        return PIL.Image.open(io.BytesIO(value["bytes"]))
    if value.get("path") is None:
        raise ValueError("the row holds no picture")
    return PIL.Image.open(io.BytesIO(_inside(value["path"], folders).read_bytes()))


def _inside(path: str, folders: Sequence[Path]) -> Path:
    """Find the file that a row names, which must lie in one of ``folders``."""
    file = next((folder / path for folder in folders if (folder / path).is_file()), None)
    if file is None:
        raise ValueError(f"the row names the file {path!r}, which is not beside the data set")
    if not any(file.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(f"the row names the file {path!r}, which is outside the data set's folder")
    return file


def collate(items: list[dict[str, Any] | None]) -> dict[str, Tensor] | None:
    """Stack the items of one batch; items that are None are left out.

    Args:
        items: dicts with ``pixels`` (3, R, R) and numbers under other keys; or None for an unreadable picture.

    Returns:
        ``pixels`` (N, 3, R, R), and a tensor (N,) for every other key; None if every item is None.
    """
    items = [item for item in items if item is not None]
    if not items:
        return None
    batch = {"pixels": torch.stack([item["pixels"] for item in items])}
    for key in items[0].keys() - {"pixels"}:
        batch[key] = torch.tensor([item[key] for item in items])
    return batch
