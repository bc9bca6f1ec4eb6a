"""From stored pictures to tensors."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from helpers import pixels, png

from vaelab.data.transforms import BROKEN, decode, preprocess, to_rgb

RAMP = np.linspace(0, 1, 16 * 16).reshape(16, 16)


def plain(image, resolution):
    """Section 3's four steps on an 8-bit picture, one after the other."""
    width, height = image.size
    scale = resolution / min(width, height)
    image = image.convert("RGB").resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), PIL.Image.BILINEAR)
    values = np.asarray(image, dtype=np.float64) / 255
    top, left = (round((side - resolution) / 2) for side in values.shape[:2])
    return ((values[top : top + resolution, left : left + resolution] - 0.5) / 0.5).transpose(2, 0, 1)


def encoded(image, kind="PNG", **options):
    """A picture saved and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return PIL.Image.open(buffer)


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return PIL.Image.open(buffer)


def pgm(values, maximum):
    return PIL.Image.open(io.BytesIO(b"P5 16 16 %d\n" % maximum + values.astype(">u2").tobytes()))


def rgb_png_of_16_bits(values):
    """Pillow writes no 16-bit colours: the file by hand, chunk by chunk."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return PIL.Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks))


@pytest.mark.parametrize(
    "size",
    [(32, 32), (64, 64), (48, 100), (100, 48), (37, 91), (91, 37), (65, 64), (33, 200), (640, 427)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_preprocessing_is_section_3(size):
    image = PIL.Image.fromarray(pixels(0, size))
    got = preprocess(image, 64)
    assert got.shape == (3, 64, 64)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), plain(image, 64), atol=1e-6)


def test_picture_of_the_right_size_is_only_rescaled():
    values = pixels(0, (16, 16))
    got = preprocess(PIL.Image.fromarray(values), 16)
    np.testing.assert_allclose(got.numpy(), values.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_range_is_minus_one_to_one():
    assert preprocess(PIL.Image.new("RGB", (9, 9), "black"), 16).unique().tolist() == [-1]
    assert preprocess(PIL.Image.new("RGB", (9, 9), "white"), 16).unique().tolist() == [1]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = PIL.Image.fromarray(pixels(0, (40, 32))).convert(mode)
    np.testing.assert_allclose(preprocess(image, 16).numpy(), plain(image, 16), atol=1e-6)


def test_sixteen_bits_keep_their_contrast():
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    buffer = io.BytesIO()
    PIL.Image.fromarray(ramp).save(buffer, "PNG")
    got = preprocess(PIL.Image.open(buffer), 16)
    np.testing.assert_allclose(got[0].numpy(), ramp / 32767.5 - 1, atol=0.01)
    assert torch.equal(got[0], got[2])


def test_orientation_of_a_camera_is_followed():
    image = PIL.Image.fromarray(pixels(0, (24, 16)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    got = preprocess(PIL.Image.open(buffer), 16)
    np.testing.assert_allclose(got.numpy(), plain(image.rotate(-90, expand=True), 16), atol=1e-6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_orientation_is_followed_in_every_format_and_in_memory(kind, in_memory):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((16, 32, 3), np.uint8)
    halves[:, 16:] = 255  # the right half is white: at the bottom, once the picture is upright
    image = encoded(PIL.Image.fromarray(halves), kind, exif=exif)
    image = image.copy() if in_memory else image
    upright = to_rgb(decode(image)).image
    assert upright.size == (16, 32)
    assert np.asarray(upright)[:14].max() < 40 and np.asarray(upright)[-14:].min() > 215
    assert to_rgb(upright).image.size == (16, 32)


@pytest.mark.parametrize(
    "image",
    [
        tiff(RAMP.astype(np.float32)),
        tiff((RAMP * 200).astype(np.float32), extratags=[(341, "f", 1, 200.0, True)]),
        tiff((RAMP * 4095).astype(np.uint16), extratags=[(281, "H", 1, 4090, True)]),
        tiff((RAMP * 255).astype(np.int32), extratags=[(281, "H", 1, 255, True)]),
        tiff((65535 - RAMP * 65535).astype(np.uint16), photometric="miniswhite"),
        pgm(RAMP * 4095, 4095),
        pgm(RAMP * 65535, 65535),
        encoded(PIL.Image.fromarray((RAMP * 65535).astype(np.uint16))),
        PIL.Image.fromarray(RAMP.astype(np.float32)),
        rgb_png_of_16_bits(np.repeat((RAMP * 65535)[..., None], 3, 2)),
    ],
    ids=["float", "declared_float", "declared_12", "declared_32", "white_is_zero", "pgm_12", "pgm_16", "png_16",
         "in_memory", "rgb_16"],
)  # fmt: skip
def test_every_depth_is_scaled_to_its_range(image):
    values = preprocess(image, 16)
    np.testing.assert_allclose(values.numpy(), np.broadcast_to(RAMP * 2 - 1, (3, 16, 16)), atol=0.01)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (tiff((RAMP * 4090).astype(np.uint16)), "values from 0 to 4090 of 65535: it seems to hold fewer than 16 bits"),
        (tiff((RAMP * 255).astype(np.int32)), "values from 0 to 255: the file does not say which value is white"),
        (tiff((RAMP * 255).astype(np.float32)), "values from 0 to 255 does not fit the range from 0 to 1"),
        (tiff((RAMP - 0.5).astype(np.float32)), "values from -0.5 to 0.5 does not fit"),
    ],
    ids=["12_bits", "32_bits", "float_255", "negative"],
)
def test_an_unknown_range_is_refused_with_what_was_seen_until_white_is_given(image, message):
    with pytest.raises(ValueError, match=f"{message}.*give white_level"):
        preprocess(image, 16)
    low, high = np.asarray(image).min(), np.asarray(image).max()
    if low >= 0:
        values = preprocess(image, 16, white_level=float(high))
        np.testing.assert_allclose(values[0].numpy(), RAMP * 2 - 1, atol=0.01)


def test_nan_is_refused_and_black_is_black():
    with pytest.raises(ValueError, match="from nan to nan does not fit"):
        preprocess(PIL.Image.fromarray(np.full((16, 16), np.nan, np.float32)), 16)
    for kind in (np.uint16, np.int32, np.float32):
        assert preprocess(tiff(np.zeros((16, 16), kind)), 16).unique().tolist() == [-1]


@pytest.mark.parametrize("make", [lambda v: tiff(v, photometric="rgb"), rgb_png_of_16_bits], ids=["tiff", "png"])
def test_twelve_bits_in_a_16_bit_colour_file_are_refused(make):
    values = np.repeat((RAMP * 4095).astype(np.uint16)[..., None], 3, 2)
    with pytest.raises(ValueError, match="16-bit colour picture with values of up to about 4096 of 65535"):
        preprocess(make(values), 16)


def see_through(mode):
    """Left half red, right half a transparent blue."""
    values = np.zeros((16, 16, 4), np.uint8)
    values[:, :8], values[:, 8:] = (255, 0, 0, 255), (0, 0, 255, 0)
    image = PIL.Image.fromarray(values)
    if mode == "RGBA":
        return image
    if mode == "LA":
        return image.convert("LA")
    flat = PIL.Image.fromarray(values[..., :3])
    if mode == "P":
        flat = flat.quantize(2, dither=PIL.Image.Dither.NONE)
        flat.info["transparency"] = flat.getpixel((12, 8))
    else:
        flat.info["transparency"] = (0, 0, 255)
    return flat


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("background", ["white", "#00ff00"])
def test_transparent_pixels_show_the_background(mode, background):
    image, composited, _ = to_rgb(see_through(mode), background=background)
    assert composited and image.mode == "RGB"
    assert image.getpixel((12, 8)) == ((255,) * 3 if background == "white" else (0, 255, 0))
    assert image.getpixel((2, 8)) == ((76,) * 3 if mode == "LA" else (255, 0, 0))


def test_an_alpha_channel_that_hides_nothing_changes_nothing():
    image = PIL.Image.fromarray(pixels(0, (40, 32)))
    opaque, composited, _ = to_rgb(image.convert("RGBA"))
    assert not composited and np.array_equal(np.asarray(opaque), np.asarray(image))


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 900)])
def test_a_long_strip_is_cropped_before_it_is_resized(size, monkeypatch):
    sizes = []
    resize = PIL.Image.Image.resize
    monkeypatch.setattr(
        PIL.Image.Image, "resize", lambda image, to, *rest, **more: sizes.append(to) or resize(image, to, *rest, **more)
    )
    image = PIL.Image.fromarray(pixels(0, size))
    cropped = preprocess(image, 64)
    assert sizes == [(64, 64)]
    if size == (3, 900):  # small enough for the plain way
        np.testing.assert_allclose(cropped.numpy(), plain(image, 64), atol=2.1 / 127.5)


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_read_or_a_broken_picture():
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels(0, (24, 16))).save(buffer, "JPEG", exif=exif)
    stored, rng = buffer.getvalue(), np.random.default_rng(0)
    begin = stored.index(b"Exif")
    for _ in range(300):
        damaged = bytearray(stored)
        for place in rng.integers(begin, begin + 90, 3):
            damaged[place] = rng.integers(256)
        try:
            assert preprocess(decode({"bytes": bytes(damaged)}), 16).shape == (3, 16, 16)
        except BROKEN:
            continue


def test_a_row_reads_only_files_below_the_data_sets_folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/a.png", "secret.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    folders = (tmp_path / "data",)
    for path in ("a.png", str(tmp_path / "data" / "a.png")):
        assert decode({"bytes": None, "path": path}, folders).size == (20, 16)
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(ValueError, match="outside the data set's folder"):
            decode({"bytes": None, "path": path}, folders)
    for given in (folders, ()):
        with pytest.raises(ValueError, match=r"'b.png', which is not beside the data set"):
            decode({"bytes": None, "path": "b.png"}, given)
