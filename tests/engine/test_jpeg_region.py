"""The region decoder against Pillow's full decode: the same bits, and no opinion of its own about damaged files."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import images, jpeg_region, preprocess

LIMITS = images.Limits(max_pixels=64_000_000)
LAYOUTS: tuple[preprocess.Layout, ...] = ("center", "five")
pytestmark = pytest.mark.skipif(jpeg_region._decode is None, reason="engine._jpeg_region is not compiled here")


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    smooth = PIL.Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.integers(-20, 20, (height, width, 1))
    return PIL.Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def encode(shown: PIL.Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    shown.save(out, "JPEG", **options)
    return out.getvalue()


def whole(data: bytes, layout: preprocess.Layout) -> tuple[object, ...]:
    """What the full decode says."""
    try:
        image = images.read(data, LIMITS)
    except images.ImageError as error:
        return type(error).__name__, str(error)
    return preprocess.crops(image.frames[0], layout).tobytes(), image.width, image.height


def cut(data: bytes, layout: preprocess.Layout) -> tuple[object, ...]:
    try:
        crops = images.read_crops(data, LIMITS, layout)
    except images.ImageError as error:
        return type(error).__name__, str(error)
    return crops.crops.tobytes(), crops.width, crops.height


def quick(data: bytes) -> bool:
    return jpeg_region.read_crops(data, LIMITS, "center") is not None


def test_the_decoders_agree_on_this_machine() -> None:
    assert jpeg_region.usable()


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    mode=st.sampled_from(["RGB", "RGB", "L"]),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    options=st.fixed_dictionaries(
        {"quality": st.sampled_from([30, 75, 92, 100])},
        optional={
            "progressive": st.just(True),
            "restart_marker_rows": st.integers(1, 3),
            "restart_marker_blocks": st.integers(1, 9),
        },
    ),
    orientation=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    pieces_from=st.sampled_from([0, 10**9]),
)
def test_crops_are_those_of_the_full_decode_bit_for_bit(
    width: int,
    height: int,
    mode: str,
    subsampling: str,
    options: dict[str, object],
    orientation: int,
    layout: preprocess.Layout,
    pieces_from: int,
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(width, height, mode=mode), subsampling=subsampling, exif=exif.tobytes(), **options)
    with mock.patch.object(jpeg_region, "_PIECES_FROM_PIXELS", pieces_from):
        assert quick(data)
        assert cut(data, layout) == whole(data, layout)


def as_440(data: bytes) -> bytes:
    """A 4:4:0 file of one that is square, of 16-pixel units and 4:2:2: it has as many blocks, and other contents."""
    at = data.index(b"\x03\x01\x21\x00") + 2
    return data[:at] + b"\x12" + data[at + 1 :]


def rectangle(width: int, height: int, corners: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top = corners[0] % width, corners[1] % height
    return left, top, left + 1 + corners[2] % (width - left), top + 1 + corners[3] % (height - top)


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    corners=st.tuples(*[st.integers(0, 299)] * 4),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    options=st.sampled_from([{}, {"restart_marker_blocks": 7}, {"restart_marker_rows": 2}]),
    quality=st.sampled_from([1, 40, 92, 100]),
    mode=st.sampled_from(["RGB", "L"]),
)
def test_any_rectangle_of_a_progressive_file(
    size: tuple[int, int],
    corners: tuple[int, int, int, int],
    subsampling: str,
    options: dict[str, object],
    quality: int,
    mode: str,
) -> None:
    box = left, top, right, bottom = rectangle(*size, corners)
    data = encode(picture(*size, mode=mode), subsampling=subsampling, quality=quality, progressive=True, **options)
    found = jpeg_region.header(data)
    assert found is not None
    assert jpeg_region.usable()
    parts = jpeg_region._regions(data, found, [box])
    assert parts is not None
    assert np.array_equal(parts[0], np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))[top:bottom, left:right])


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("pieces_from", [0, 10**9])
def test_chroma_halved_in_height_alone(options: dict[str, object], pieces_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lossless turn by a quarter makes of 4:2:2."""
    monkeypatch.setattr(jpeg_region, "_PIECES_FROM_PIXELS", pieces_from)
    for side in (16, 240, 512):
        data = as_440(encode(picture(side, side), subsampling="4:2:2", quality=90, **options))
        assert quick(data)
        for layout in LAYOUTS:
            assert cut(data, layout) == whole(data, layout)


def scans(data: bytes) -> list[int]:
    """Where the scans of a file without restart markers begin: their headers."""
    return [match.start() for match in re.finditer(b"\xff\xda", data)]


def scan_ends(data: bytes) -> list[int]:
    """Where they end: the marker behind each."""
    found = (re.compile(rb"\xff[^\x00]", re.DOTALL).search(data, at + 2) for at in scans(data))
    return [match.start() for match in found if match is not None]


def test_what_a_progressive_file_holds_below_the_crop_is_passed_over() -> None:
    data = encode(picture(800, 800), progressive=True, quality=60)
    changed_files = 0
    for end in scan_ends(data):
        at = end - 3  # among the lowest rows
        if b"\xff" in data[at - 1 : at + 2]:
            continue
        for changed in (b"\x00", b"\x55\x55\x55", b""):
            damaged = data[:at] + changed + data[at + 1 :]
            assert quick(damaged)
            assert cut(damaged, "center") == whole(damaged, "center")
            changed_files += 1
    assert changed_files > 9


def test_a_marker_among_the_rows_below_the_crop_ends_the_scan_for_both() -> None:
    data = encode(picture(800, 800), progressive=True, quality=60)
    for end in scan_ends(data):
        for marker in (b"\xff\xd9", b"\xff\xd3", b"\xff\x02", b"\xff\xff", b"\xff\xfe\x00\x04ab", b"\xff\xda"):
            at = end - 9
            for damaged in (data[:at] + marker + data[at:], data[:at] + marker + data[end:], data[:at] + marker):
                assert cut(damaged, "center") == whole(damaged, "center")


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    corners=st.tuples(*[st.integers(0, 299)] * 4),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    options=st.sampled_from([{}, {"optimize": True}, {"restart_marker_blocks": 7}]),
    quality=st.sampled_from([1, 40, 92, 100]),
)
def test_any_rectangle_by_way_of_a_small_file(
    size: tuple[int, int],
    corners: tuple[int, int, int, int],
    subsampling: str,
    options: dict[str, object],
    quality: int,
) -> None:
    width, height = size
    box = rectangle(width, height, corners)
    data = encode(picture(width, height), subsampling=subsampling, quality=quality, **options)
    found = jpeg_region.header(data)
    assert found is not None
    assert jpeg_region.usable()
    pieces = jpeg_region._pieces(data, found, [box, (0, 0, width, height)])
    assert pieces is not None
    full = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pieces[0], full[box[1] : box[3], box[0] : box[2]])
    assert np.array_equal(pieces[1], full)


def test_a_large_photograph_comes_by_way_of_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(1000, 700), quality=90)
    expected = whole(data, "five")
    monkeypatch.setattr(jpeg_region, "_regions", lambda *_: None)
    assert cut(data, "five") == expected
    assert quick(data)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), options=st.sampled_from([{}, {"progressive": True}, {"restart_marker_rows": 1}]))
def test_damaged_files_are_what_the_full_decode_makes_of_them(data: st.DataObject, options: dict[str, object]) -> None:
    broken = bytearray(encode(picture(420, 380), quality=80, **options))
    for _ in range(data.draw(st.integers(0, 3))):
        broken[data.draw(st.integers(2, len(broken) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(2, len(broken)))
    del broken[start : start + data.draw(st.sampled_from([0, 1, 40, len(broken)]))]
    for layout in LAYOUTS:
        for pieces_from in (0, 10**9):
            with mock.patch.object(jpeg_region, "_PIECES_FROM_PIXELS", pieces_from):
                assert cut(bytes(broken), layout) == whole(bytes(broken), layout)


def test_a_file_cut_short_behind_the_crop_is_still_corrupt() -> None:
    data = encode(picture(900, 900))
    for length in (len(data) - 1, len(data) - 2, len(data) * 9 // 10):
        with pytest.raises(images.CorruptImage):
            images.read_crops(data[:length], LIMITS)


def test_missing_restart_markers_are_left_to_the_full_decode() -> None:
    data = encode(picture(640, 640), restart_marker_rows=1)
    at = data.rindex(b"\xff\xd1")
    for damaged in (data[:at] + data[at + 2 :], data[: at + 1] + b"\xd5" + data[at + 2 :]):
        assert not quick(damaged)
        assert cut(damaged, "center") == whole(damaged, "center")


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(300, 300).convert("CMYK")),
        encode(picture(300, 300), keep_rgb=True),
        encode(picture(300, 300)).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1),
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff",
    ],
    ids=["CMYK", "RGB", "12 bits", "empty", "cut"],
)
def test_other_kinds_are_left_to_the_full_decode(data: bytes) -> None:
    assert not quick(data)
    assert cut(data, "center") == whole(data, "center")


def test_an_incomplete_progressive_file_is_left_to_the_full_decode() -> None:
    """Its blocks are smoothed by neighbours that a region does not have."""
    data = encode(picture(640, 640), progressive=True)
    shortened = data[: scans(data)[3]] + b"\xff\xd9"
    assert not quick(shortened)
    assert cut(shortened, "five") == whole(shortened, "five")


def test_too_many_pixels_are_told_by_the_header() -> None:
    data = encode(picture(400, 300))
    with pytest.raises(images.TooManyPixels):
        images.read_crops(data, images.Limits(max_pixels=400 * 300 - 1))


def test_where_it_is_not_compiled_everything_is_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(500, 400))
    expected = cut(data, "five")
    monkeypatch.setattr(jpeg_region, "_decode", None)
    jpeg_region.library.cache_clear()
    try:
        assert not jpeg_region.usable()
        assert cut(data, "five") == expected
    finally:
        monkeypatch.undo()
        jpeg_region.library.cache_clear()


def test_a_library_that_disagrees_with_pillow_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jpeg_region._decode
    assert real is not None

    def off_by_one(*arguments: object) -> tuple[bytes, ...] | None:
        parts = real(*arguments)
        return None if parts is None else tuple(bytes(value ^ 1 for value in part) for part in parts)

    monkeypatch.setattr(jpeg_region, "_decode", off_by_one)
    jpeg_region.library.cache_clear()
    try:
        assert not jpeg_region.usable()
    finally:
        monkeypatch.undo()
        jpeg_region.library.cache_clear()


@pytest.mark.parametrize(
    "region", [(0, 31, ((0, 5),)), (5, 5, ((0, 5),)), (0, 30, ((0, 21),)), (0, 30, ((5, 9), (8, 12))), (0, 30, ())]
)
def test_regions_outside_of_the_picture_are_refused(region: tuple[int, int, tuple[tuple[int, int], ...]]) -> None:
    data = encode(picture(30, 20))
    header = jpeg_region.header(data)
    assert header is not None
    assert jpeg_region._decode is not None
    with pytest.raises(ValueError):
        jpeg_region._decode(data, header.scan, 30, 20, *region)


def test_what_is_no_jpeg_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/no/such/library.so", next(iter(Path("/proc/self/exe").resolve().parents)).as_posix(), "libm.so.6"):
        with pytest.raises(OSError):
            jpeg_region._use(path)
    assert jpeg_region.usable()


@pytest.mark.parametrize("boxes", [(), ((0, 0, 31, 5),), ((5, 5, 5, 9),), ((0, 19, 3, 21),), ((0, 0, 1, 1),) * 9])
def test_boxes_outside_of_the_picture_are_refused(boxes: tuple[tuple[int, int, int, int], ...]) -> None:
    data = encode(picture(30, 20))
    header = jpeg_region.header(data)
    assert header is not None
    assert jpeg_region._cut is not None
    with pytest.raises(ValueError):
        jpeg_region._cut(data, header.scan, 30, 20, boxes)


@pytest.mark.slow
@pytest.mark.skipif("JPEG_FOLDER" not in os.environ, reason="JPEG_FOLDER names no folder of JPEGs")
def test_every_jpeg_of_a_folder() -> None:
    compared = 0
    for path in sorted(Path(os.environ["JPEG_FOLDER"]).rglob("*.jp*g")):
        data = path.read_bytes()
        for layout in LAYOUTS:
            for pieces_from in (0, 10**9):
                with mock.patch.object(jpeg_region, "_PIECES_FROM_PIXELS", pieces_from):
                    assert cut(data, layout) == whole(data, layout), path
        compared += 1
    assert compared
