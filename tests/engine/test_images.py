"""The reader: what users are promised about formats and conversions (docs/images.md), and what hostile files get."""

from __future__ import annotations

import io
import logging
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import images, preprocess
from engine.containers import png_chunks
from engine.images import CorruptImage, ImageError, Limits, TooManyPixels, UnsupportedImage
from tests.engine import hostile_images
from tests.engine.hostile_images import encode, frames, picture, png_chunk, png_file, tiff_file, valid

LIMITS = Limits(10**7, 4)
ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")


def only_frame(data: bytes) -> NDArray[np.uint8]:
    image = images.read(data, LIMITS)
    assert len(image.frames) == 1
    return image.frames[0]


def grey(levels: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.repeat(np.asarray(levels, np.int64)[..., None], 3, axis=2)


def over_white(rgb: NDArray[np.generic], alpha: NDArray[np.generic]) -> NDArray[np.float64]:
    """The formula itself, in floating point."""
    share = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(rgb, np.float64) * share + 255 * (1 - share)


def assert_close(got: NDArray[np.uint8], expected: NDArray[np.generic], within: float = 1.0) -> None:
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got.astype(float) - expected).max() <= within


def assert_like(got: NDArray[np.uint8], expected: PIL.Image.Image, within: float) -> None:
    """On average, for what lossy codecs give back."""
    array = np.asarray(expected.convert("RGB"), np.float64)
    assert got.shape == array.shape
    assert np.abs(got - array).mean() < within


# What is read


@pytest.mark.parametrize("name", valid())
@pytest.mark.parametrize("layout", ["center", "five"])
def test_every_format_and_its_crops(name: str, layout: preprocess.Layout) -> None:
    data = valid()[name]
    image = images.read(data, LIMITS)
    assert image.format == name.split()[0]
    assert (image.width, image.height) == (96, 64)
    assert all(frame.shape == (64, 96, 3) and frame.dtype == np.uint8 for frame in image.frames)
    crops = images.read_crops(data, LIMITS, layout)
    expected = np.concatenate([preprocess.crops(frame, layout) for frame in image.frames])
    assert np.array_equal(crops.crops, expected)
    assert (crops.format, crops.width, crops.height) == (image.format, image.width, image.height)
    assert crops.frame_count == image.frame_count


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG", "AVIF", "HEIF"])
def test_large_images_give_five_crops_of_the_same_pixels(name: str) -> None:
    data = encode(picture(517, 430), name)
    whole, crops = images.read(data, LIMITS), images.read_crops(data, LIMITS, "five")
    assert crops.crops_per_frame == 5
    assert np.array_equal(crops.crops, preprocess.crops(whole.frames[0], "five"))


@pytest.mark.parametrize(
    ("name", "within"), [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("JPEG", 4), ("WEBP", 4), ("AVIF", 4), ("HEIF", 6)]
)
def test_pixels_are_the_encoded_ones(name: str, within: float) -> None:
    original = picture(200, 150)
    assert_like(only_frame(encode(original, name)), original, within + 0.01)


def test_names_and_declared_types_play_no_part() -> None:
    """There is nothing to pass them in; the bytes decide."""
    assert images.read(valid()["PNG rgb"], LIMITS).format == "PNG"
    assert images.sniff(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(20)) == "HEIC"
    assert images.sniff(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(20)) == "AVIF"
    assert images.sniff(b"\0\0\0\x18ftypisom\0\0\0\0isommp42") is None


def test_an_mpo_is_its_first_picture() -> None:
    data = encode(frames(2)[0], "MPO", save_all=True, append_images=frames(2)[1:])
    image = images.read(data, LIMITS)
    assert (image.format, image.frame_count, len(image.frames)) == ("JPEG", 1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw", "AVIF", "HEIF"])
def test_orientation_is_applied_once(name: str, orientation: int) -> None:
    stored = PIL.Image.new("RGB", (90, 60))
    for colour, box in zip(
        ("red", "lime", "blue", "white"), ((0, 0, 45, 30), (45, 0, 90, 30), (0, 30, 45, 60), (45, 30, 90, 60)), strict=True
    ):
        stored.paste(colour, box)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if name == "TIFF lzw" else {"lossless": True} if name == "WEBP" else {}
    data = encode(stored, name.split()[0], exif=exif.tobytes(), **options)
    # Row 0 and column 0 of the stored picture at these sides of the shown one (EXIF 2.32, 4.6.4).
    shown = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation](np.asarray(stored).astype(float))  # fmt: skip
    image = images.read(data, LIMITS)
    assert (image.width, image.height) == ((60, 90) if orientation >= 5 else (90, 60))
    assert image.frames[0].shape == shown.shape
    assert np.abs(image.frames[0] - shown).mean() < 8
    assert np.array_equal(images.read_crops(data, LIMITS).crops, preprocess.crops(image.frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_of_turned_images_are_those_of_the_whole(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(431, 302), "PNG", exif=exif.tobytes())
    assert np.array_equal(
        images.read_crops(data, LIMITS, "five").crops, preprocess.crops(images.read(data, LIMITS).frames[0], "five")
    )


# Conversions


@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_alpha_lies_over_white(name: str) -> None:
    rgba = picture(120, 80, "RGBA")
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 98}, "HEIF": {"quality": 98}}.get(name, {})
    array = np.asarray(rgba)
    expected = over_white(array[..., :3], array[..., 3])
    got = only_frame(encode(rgba, name, **options))
    if options.get("quality"):
        assert np.abs(got - expected).mean() < 4
    else:
        assert_close(got, expected)


def test_grey_with_alpha_and_one_bit() -> None:
    la = picture(30, 20, "RGBA").convert("LA")
    array = np.asarray(la)
    assert_close(only_frame(encode(la, "PNG")), over_white(grey(array[..., 0]), array[..., 1]))
    bits = picture(30, 20).convert("1")
    assert np.array_equal(only_frame(encode(bits, "PNG")), grey(np.asarray(bits) * 255))
    assert np.array_equal(only_frame(encode(bits, "TIFF", compression="group4")), grey(np.asarray(bits) * 255))
    assert np.array_equal(only_frame(encode(bits, "BMP")), grey(np.asarray(bits) * 255))


def png_rows(array: NDArray[np.generic]) -> bytes:
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))


RNG = np.random.default_rng(3)
GREY16 = RNG.integers(0, 65536, (5, 7)).astype(">u2")
RGB16 = RNG.integers(0, 65536, (5, 7, 3)).astype(">u2")
RGB8 = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY2 = RNG.integers(0, 4, (5, 8), dtype=np.uint8)


def keyed(array: NDArray[np.generic], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    out = np.asarray(array, np.int64).copy()
    out[mask] = 255
    return out


PNG_CASES = {
    "grey 16": (png_file(7, 5, depth=16, colour=0, pixels=png_rows(GREY16)), grey(GREY16 >> 8)),
    "grey 16 keyed": (
        png_file(7, 5, png_chunk(b"tRNS", GREY16[2:3, 3:4].tobytes()), depth=16, colour=0, pixels=png_rows(GREY16)),
        keyed(grey(GREY16 >> 8), np.equal(GREY16, GREY16[2, 3])),
    ),
    "rgb 16": (png_file(7, 5, depth=16, colour=2, pixels=png_rows(RGB16)), RGB16 >> 8),
    "rgb 16 keyed": (
        png_file(7, 5, png_chunk(b"tRNS", RGB16[2, 3].tobytes()), depth=16, colour=2, pixels=png_rows(RGB16)),
        keyed(RGB16 >> 8, np.equal(RGB16, RGB16[2, 3]).all(axis=2)),
    ),
    "rgb 8 keyed": (
        png_file(7, 5, png_chunk(b"tRNS", RGB8[1, 1].astype(">u2").tobytes()), pixels=png_rows(RGB8)),
        keyed(RGB8, np.equal(RGB8, RGB8[1, 1]).all(axis=2)),
    ),
    "grey 2 keyed": (
        png_file(8, 5, png_chunk(b"tRNS", b"\0\1"), depth=2, colour=0,
                 pixels=png_rows(GREY2[:, 0::4] << 6 | GREY2[:, 1::4] << 4 | GREY2[:, 2::4] << 2 | GREY2[:, 3::4])),
        keyed(grey(GREY2 * 85), np.equal(GREY2, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PNG_CASES)
def test_depths_and_transparent_colours_of_png(case: str) -> None:
    data, expected = PNG_CASES[case]
    assert_close(only_frame(data), expected, within=0)


def test_palette_with_partly_transparent_entries() -> None:
    colours = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
    places = RNG.integers(0, 16, (5, 7), dtype=np.uint8)
    alphas = np.array([0, 255, 128, 64] + [255] * 12)
    chunks = png_chunk(b"PLTE", colours.tobytes()), png_chunk(b"tRNS", bytes(alphas[:4].tolist()))
    got = only_frame(png_file(7, 5, *chunks, colour=3, pixels=png_rows(places)))
    assert_close(got, over_white(colours[places], alphas[places]))


def test_cmyk_of_adobe_is_not_a_negative() -> None:
    red = encode(PIL.Image.new("RGB", (64, 64), (200, 30, 30)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(only_frame(red).mean(axis=(0, 1)) - (200, 30, 30)).max() < 6
    tiff = encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert only_frame(tiff)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_tiff_keeps_the_high_byte(mode: str, compression: str | None) -> None:
    values = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    image = PIL.Image.frombytes(mode, (30, 20), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert np.array_equal(only_frame(encode(image, "TIFF", compression=compression)), grey(values >> 8))


def tiff_samples(values: NDArray[np.generic], photometric: int, sample_format: int, bits: int | None = None) -> bytes:
    """A raw TIFF of one sample a pixel, little-endian."""
    height, width = values.shape
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, bits or values.itemsize * 8), 259: (3, 1, 1)}
    tags |= {262: (3, 1, photometric), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, len(raw)), 339: (3, 1, sample_format)}
    size = len(tiff_file(tags | {273: (4, 1, 0)}))
    return tiff_file(tags | {273: (4, 1, size)}) + raw


def test_white_is_zero_is_turned_round() -> None:
    values = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)
    assert np.array_equal(only_frame(tiff_samples(values, 0, 1)), grey(255 - (values >> 8)))
    small = values.astype(np.uint8)
    assert np.array_equal(only_frame(tiff_samples(small, 0, 1)), grey(255 - small.astype(int)))


def test_floats_in_the_unit_interval_are_scaled_by_255() -> None:
    values = RNG.random((6, 9), np.float32) * 0.5
    assert_close(only_frame(tiff_samples(values, 1, 3)), np.repeat((values * 255)[..., None], 3, 2), within=0.51)


def test_other_floats_and_integers_are_stretched() -> None:
    for values, kind in (
        (RNG.normal(0, 1e4, (6, 9)).astype(np.float32), 3),
        (RNG.integers(-9e8, 9e8, (6, 9)).astype(np.int32), 2),
    ):
        wide = values.astype(np.float64)
        expected = (wide - wide.min()) / (wide.max() - wide.min()) * 255
        assert_close(only_frame(tiff_samples(values, 1, kind)), np.repeat(expected[..., None], 3, 2), within=0.6)


def test_not_numbers_and_constants_in_float_pictures() -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, 4.0], [2.0, 3.0]], np.float32)
    assert only_frame(tiff_samples(values, 1, 3))[:, :, 0].tolist() == [[0, 0], [0, 255], [0, 128]]
    assert only_frame(tiff_samples(np.full((2, 2), np.nan, np.float32), 1, 3)).max() == 0
    assert only_frame(tiff_samples(np.full((2, 2), 7e30, np.float32), 1, 3)).max() == 0


def test_a_bitmap_that_is_transparent_everywhere_is_opaque() -> None:
    header = struct.pack("<2sIHHI", b"BM", 138 + 16, 0, 0, 138) + struct.pack("<IiiHHIIiiII", 124, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(138 - 54 - 16)
    pixel = bytes((30, 20, 10, 0))
    assert only_frame(header + masks + pixel * 4)[0, 0].tolist() == [10, 20, 30]
    assert only_frame(header + masks + pixel * 3 + bytes((30, 20, 10, 255)))[1, 1].tolist() == [255, 255, 255]


def test_profiles_are_not_applied() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = picture()
    assert np.array_equal(only_frame(encode(plain, "PNG", icc_profile=profile)), np.asarray(plain))


# Frames


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, 4, [0]), (4, 4, [0, 1, 2, 3]), (10, 4, [0, 3, 6, 9]), (10, 1, [0]), (3, 2, [0, 2]), (7, 3, [0, 3, 6])],
)
def test_frames_are_evenly_spread(count: int, most: int, expected: list[int]) -> None:
    assert list(images.spread(count, most)) == expected


@given(st.integers(1, 3000), st.integers(1, 64))
def test_spread_is_even_for_every_count(count: int, most: int) -> None:
    places = list(images.spread(count, most))
    assert places[0] == 0
    assert len(places) == min(count, most) == len(set(places))
    assert places == sorted(places)
    if most > 1:
        assert places[-1] == count - 1
        steps = np.diff(places)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1


@pytest.mark.parametrize("name", ["PNG animated", "WEBP animated", "GIF animated", "AVIF sequence", "TIFF pages"])
def test_animations_give_the_first_the_last_and_some_between(name: str) -> None:
    image = images.read(valid()[name], Limits(10**6, 3))
    assert image.frame_count == 6
    reds = [round(float(frame[..., 0].mean()) / 20) for frame in image.frames]
    assert reds in ([0, 2, 5], [0, 3, 5])


def test_pictures_of_a_heic_begin_with_the_primary_one() -> None:
    data = encode(frames(3)[0], "HEIF", append_images=frames(3)[1:], primary_index=1)
    image = images.read(data, LIMITS)
    assert image.frame_count == 3
    assert [round(float(frame[..., 0].mean()) / 20) for frame in image.frames] == [1, 0, 2]


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP"])
def test_frames_are_shown_as_a_viewer_shows_them(name: str) -> None:
    """A green square moves over a red ground: later frames hold the square only, the ground comes from the first."""
    shown = []
    for place in (5, 25, 45):
        frame = PIL.Image.new("RGB", (64, 32), "red")
        frame.paste((0, 255, 0), (place, 5, place + 10, 15))
        shown.append(frame)
    options = {"lossless": True} if name == "WEBP" else {}
    image = images.read(encode(shown[0], name, save_all=True, append_images=shown[1:], **options), LIMITS)
    for got, expected in zip(image.frames, shown, strict=True):
        assert_like(got, expected, 2)


def test_transparent_parts_of_a_gif_are_white() -> None:
    image = PIL.Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 10, 20))
    got = only_frame(encode(image, "GIF", transparency=0))
    assert got[5, 5].tolist() == [255, 255, 255]
    assert got[5, 15].tolist() == [255, 0, 0]


def test_pages_of_different_sizes_and_their_crops() -> None:
    pages = [picture(300, 260), picture(50, 40), picture(230, 100)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    image = images.read(data, LIMITS)
    assert [frame.shape[:2] for frame in image.frames] == [(260, 300), (40, 50), (100, 230)]
    assert (image.width, image.height) == (300, 260)
    crops = images.read_crops(data, LIMITS, "five")
    assert crops.crops.shape == (15, 224, 224, 3)
    assert np.array_equal(crops.crops[5:10], np.repeat(preprocess.crops(image.frames[1], "five"), 5, axis=0))


def test_thumbnail_pages_are_left_out() -> None:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    out = io.BytesIO()
    with PIL.TiffImagePlugin.AppendingTiffWriter(out) as writer:
        for page, kind in ((picture(60, 50), 0), (picture(6, 5), 1), (picture(60, 50), 4), (picture(40, 30), 2)):
            tags = ImageFileDirectory_v2()
            tags[254] = kind
            page.save(writer, "TIFF", tiffinfo=tags)
            writer.newFrame()
    image = images.read(out.getvalue(), LIMITS)
    assert [frame.shape[:2] for frame in image.frames] == [(50, 60), (30, 40)]
    assert image.frame_count == 2


def test_an_animation_claims_more_frames_than_it_has() -> None:
    data = bytearray(valid()["PNG animated"])
    at = data.index(b"acTL")
    struct.pack_into(">I", data, at + 4, 2_000_000_000)
    struct.pack_into(">I", data, at + 12, zlib.crc32(bytes(data[at : at + 12])))
    image = images.read(bytes(data), LIMITS)
    assert image.frame_count == 6
    assert len(image.frames) == 4


def without(data: bytes, name: bytes, number: int) -> bytes:
    """A PNG without its `number`th chunk of that name."""
    chunk = [chunk for chunk in png_chunks(data) if chunk.name == name][number]
    return data[: chunk.begin] + data[chunk.end + 4 :]


@pytest.mark.parametrize(
    "data",
    [
        without(valid()["PNG animated"], b"fcTL", 0),
        without(valid()["PNG animated"], b"fcTL", 3),
        without(valid()["PNG animated"], b"fdAT", 2),
        without(valid()["PNG animated"], b"acTL", 0),
        valid()["PNG animated"].replace(b"acTL\0\0\0\6", b"acTL\0\0\0\0"),
    ],
    ids=["first fcTL", "fourth fcTL", "third fdAT", "acTL", "no frames"],
)
def test_a_broken_animation_is_its_default_image(data: bytes) -> None:
    """As browsers show it."""
    image = images.read(data, LIMITS)
    assert (image.frame_count, len(image.frames)) == (1, 1)
    assert image.frames[0][0, 0].tolist() == [0, 128, 64]


# Hostile files


@pytest.mark.parametrize("name", hostile_images.foreign())
def test_foreign_formats_are_unsupported(name: str) -> None:
    with pytest.raises(UnsupportedImage):
        images.read(hostile_images.foreign()[name], LIMITS)


def test_no_other_decoder_is_ever_loaded() -> None:
    program = (
        "import sys\nfrom tests.engine import hostile_images as h\n"
        "files = [*h.valid().values(), *h.foreign().values(), *(data for _, data in h.corpus(100))]\n"
        "before = set(sys.modules)\n"  # making the files loaded every plugin
        "for name in [n for n in before if n.startswith('PIL') or n.startswith('engine')]: del sys.modules[name]\n"
        "from engine import images\n"
        "for data in files:\n"
        "    try: images.read(data, images.Limits(10**6))\n"
        "    except images.ImageError: pass\n"
        "print(sorted(n.removeprefix('PIL.').removesuffix('ImagePlugin') for n in sys.modules\n"
        "             if n.startswith('PIL.') and n.endswith('ImagePlugin')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == str(sorted(["Avif", "Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP"])), done.stderr


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_checked_before_pixels_are_allocated(name: str) -> None:
    """With 160 MB to spare: a decoder that allocated the claimed pixels would run out of memory instead."""
    program = (
        "import resource, sys\nfrom engine import images\nfrom tests.engine import hostile_images as h\n"
        f"data = h.sized({name!r}, 16000, 16000)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (160 << 20),) * 2)\n"
        "try: images.read(data, images.Limits(64_000_000))\n"
        "except images.ImageError as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "TooManyPixels", done.stderr


# A WebP cannot say zero, its header holds sizes less one; a GIF's screen grows with its frames, see the next test.
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("WEBP", "GIF")])
@pytest.mark.parametrize("size", [(0, 0), (0, 50), (50, 0)])
def test_a_size_of_zero_is_corrupt(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(CorruptImage):
        images.read(hostile_images.sized(name, *size), LIMITS)


def test_an_empty_frame_of_a_gif_is_corrupt() -> None:
    data = b"GIF89a\0\0\0\0\0\0\0," + bytes(8) + b"\0\x02\x02\x44\x01\0;"
    with pytest.raises(CorruptImage):
        images.read(data, LIMITS)


def test_a_gif_that_grows_with_its_frames_is_measured_first() -> None:
    data = bytearray(valid()["GIF still"])
    at = data.index(b",", 13 + 768)
    struct.pack_into("<4H", data, at + 1, 60_000, 60_000, 5_000, 5_000)
    with pytest.raises(TooManyPixels):
        images.read(bytes(data), Limits(64_000_000))


def test_a_later_page_is_measured_too() -> None:
    pages = [picture(60, 50), PIL.Image.new("1", (4000, 4000))]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_deflate")
    with pytest.raises(TooManyPixels):
        images.read(data, Limits(10**6))


def test_a_tile_larger_than_its_page_is_measured() -> None:
    tags = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 5), 262: (3, 1, 1), 277: (3, 1, 1)}
    with pytest.raises(TooManyPixels):
        images.read(tiff_file(tags | {322: (4, 1, 32768), 323: (4, 1, 32768), 324: (4, 1, 8), 325: (4, 1, 8)}), LIMITS)


def test_run_length_bitmaps_are_bounded_in_time() -> None:
    header = struct.pack("<2sIHHI", b"BM", 1100, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 8000, 1000, 1, 8, 1, 8, 0, 0, 0, 0)
    started = time.process_time()
    with pytest.raises((CorruptImage, TooManyPixels)):
        images.read(header + bytes(range(256)) * 4 + b"\1\1" + b"\0\0" * 1001 + b"\0\1", Limits(64_000_000))
    with pytest.raises(TooManyPixels):
        images.read(hostile_images.sized("BMP", 9000, 9000)[:30] + b"\1" + hostile_images.sized("BMP", 9, 9)[31:], Limits(10**8))
    assert time.process_time() - started < 5


def test_the_limit_itself_is_allowed() -> None:
    data = encode(PIL.Image.new("RGB", (100, 100)), "PNG")
    assert images.read(data, Limits(10_000)).width == 100
    with pytest.raises(TooManyPixels, match="100 x 100 pixels are more than 9999"):
        images.read(data, Limits(9_999))


def test_a_limit_beyond_pillow_s_own_holds() -> None:
    """Pillow refuses 179 megapixels; the setting decides."""
    data = hostile_images.zipped_png(14_000, 14_000)
    with pytest.raises(CorruptImage):  # cut short, so that it costs nothing
        images.read(data[: len(data) // 50], Limits(200_000_000))


def test_chunks_of_png_are_counted() -> None:
    with pytest.raises(CorruptImage, match="more than 200000 chunks"):
        images.read(png_file(8, 8, png_chunk(b"IDAT", b"") * 300_000), LIMITS)


@pytest.mark.parametrize("name", hostile_images.text_bombs())
def test_metadata_bombs_are_images_all_the_same(name: str) -> None:
    started = time.process_time()
    image = images.read(hostile_images.text_bombs()[name], LIMITS)
    assert (image.width, image.height) == (96, 64)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("data", "frame_count"),
    [(hostile_images.gif_bomb(100_000), 100_000), (hostile_images.gif_bomb(300, 3000, 3000), 300)],
    ids=["tiny", "large"],
)
def test_bombs_of_frames_are_bounded_in_time(data: bytes, frame_count: int) -> None:
    started = time.process_time()
    image = images.read(data, LIMITS)
    assert image.frame_count == frame_count
    assert len(image.frames) == 4
    assert time.process_time() - started < 8


@pytest.mark.parametrize(
    "data",
    [
        tiff_file({256: (4, 1, 9)}, following=[8]),
        tiff_file(*[{256: (4, 1, 9), 257: (4, 1, 9)}] * 3000),
        tiff_file({}, {}, {}, following=[14, 20, 8]),
        b"II*\0\x08\0\0\0\xff\xff" + bytes(100),
        b"II*\0\xff\xff\xff\xff",
        b"MM\0\x2b\0\x08\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0" + b"\x01\0" * 100_000,
    ],
)
def test_directories_of_tiff_that_loop_lie_and_multiply(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises((CorruptImage, UnsupportedImage)):
        images.read(data, LIMITS)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("name", valid())
def test_truncated_files_are_corrupt(name: str) -> None:
    """Cut in the middle of its pixels there is no verdict; cut elsewhere there is one or none, and no other error."""
    data = valid()[name]
    for cut in sorted({*range(min(len(data), 64)), *np.linspace(64, len(data) - 1, 60).astype(int).tolist()}):
        try:
            image = images.read(data[:cut], LIMITS)
        except ImageError:
            continue
        assert image.width == 96
    if name == "TIFF pages":
        return  # the pages before the cut are whole
    cut = len(data) * 3 // 4 if name.startswith(("HEIC", "AVIF")) else len(data) // 2
    with pytest.raises(CorruptImage):
        images.read(data[:cut], LIMITS)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(valid())), st.integers(0, 2**32), st.integers(1, 30), st.sampled_from([60, 300, 10**9]))
def test_flipped_bits_give_an_image_or_an_image_error(name: str, seed: int, bits: int, within: int) -> None:
    data = valid()[name]
    rng = np.random.default_rng(seed)
    mutated = hostile_images.flipped(data[:within], rng, bits) + data[within:]
    try:
        crops = images.read_crops(mutated, Limits(2_000_000, 3), "five")
    except ImageError as error:
        assert_presentable(str(error))
    else:
        assert crops.crops.shape[1:] == (224, 224, 3)
        assert crops.width * crops.height <= 2_000_000


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([data[:32] for data in valid().values()]), st.binary(max_size=400))
def test_noise_behind_a_valid_beginning(head: bytes, noise: bytes) -> None:
    try:
        images.read(head + noise, Limits(10**6))
    except ImageError as error:
        assert_presentable(str(error))


def assert_presentable(message: str) -> None:
    assert 0 < len(message) <= images.MAX_MESSAGE_CHARS
    assert message.isprintable()
    assert not re.search(r"/\w+/|0x[0-9a-f]{6}|<_?io\.", message), message


@pytest.fixture
def hostile() -> Iterator[tuple[str, bytes]]:
    return hostile_images.corpus(300, seed=11)


def test_a_corpus_of_hostile_files_is_silent(
    hostile: Iterator[tuple[str, bytes]], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """No warning, no log record: the command line reads files in this process."""
    outcomes = set()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("always")
        for name, data in hostile:
            try:
                outcomes.add(images.read_crops(data, Limits(10**7, 2)).format)
            except ImageError as error:
                assert_presentable(str(error))
                outcomes.add(type(error).__name__)
            except Exception as error:
                raise AssertionError(name) from error
    assert not [warning for warning in recwarn if "PIL" in warning.filename]
    assert {"CorruptImage", "UnsupportedImage", "TooManyPixels", "JPEG", "PNG"} <= outcomes


def test_out_of_memory_is_told_apart() -> None:
    program = (
        "import resource\nfrom engine import images\nfrom tests.engine import hostile_images as h\n"
        "data = h.zipped_png(7000, 7000)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)\n"
        "try: images.read(data, images.Limits(64_000_000))\n"
        "except images.ImageError as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "OutOfMemory", done.stderr


def test_what_decoders_do_not_know_is_unsupported_not_corrupt() -> None:
    lab = tiff_file({256: (3, 1, 4), 257: (3, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 32845), 273: (4, 1, 8)})
    twelve = bytearray(valid()["JPEG baseline"])
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    bmp = bytearray(valid()["BMP rgb"])
    struct.pack_into("<I", bmp, 30, 4)
    jpeg_2000 = tiff_file({256: (3, 1, 4), 257: (3, 1, 4), 259: (3, 1, 34712)})
    for data in (lab, bytes(twelve), bytes(bmp), jpeg_2000):
        with pytest.raises(UnsupportedImage):
            images.read(data, LIMITS)
