"""Crops against a slow oracle written from torchvision's documented steps, pixel by pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.preprocess import CROP_PX, Preprocess, center_crop, crops, crops_of

sizes_px = st.one_of(st.integers(1, 12), st.integers(215, 235), st.integers(440, 460), st.sampled_from([100, 337, 600]))


def marked(height: int, width: int) -> np.ndarray:
    """A frame in which every pixel tells its row and column, and none is black."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[..., 0] = np.arange(height)[:, None] % 251
    frame[..., 1] = np.arange(width)[None, :] % 241
    frame[..., 2] = 7 + np.arange(height)[:, None] // 251 * 16 + np.arange(width)[None, :] // 241
    return frame


def padded(frame: np.ndarray) -> np.ndarray:
    """torchvision's padding: floor of the half before, ceiling of it after, black."""
    height, width = frame.shape[:2]
    left = (CROP_PX - width) // 2 if width < CROP_PX else 0
    top = (CROP_PX - height) // 2 if height < CROP_PX else 0
    right = (CROP_PX - width + 1) // 2 if width < CROP_PX else 0
    bottom = (CROP_PX - height + 1) // 2 if height < CROP_PX else 0
    return np.pad(frame, ((top, bottom), (left, right), (0, 0)))


def torchvision_center_crop(frame: np.ndarray) -> np.ndarray:
    frame = padded(frame)
    height, width = frame.shape[:2]
    top = int(round((height - CROP_PX) / 2.0))  # noqa: RUF046 - as torchvision writes it
    left = int(round((width - CROP_PX) / 2.0))  # noqa: RUF046
    return frame[top : top + CROP_PX, left : left + CROP_PX]


@settings(max_examples=300, deadline=None)
@given(height=sizes_px, width=sizes_px)
def test_the_centre_is_torchvisions(height: int, width: int) -> None:
    frame = marked(height, width)
    crop = center_crop(frame)
    assert crop.dtype == np.uint8 and crop.shape == (CROP_PX, CROP_PX, 3) and crop.flags.c_contiguous
    np.testing.assert_array_equal(crop, torchvision_center_crop(frame))


@pytest.mark.parametrize(
    ("size_px", "first"),
    # torchvision rounds half a pixel to the even one: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4.
    [(224, 0), (225, 0), (226, 1), (227, 2), (228, 2), (229, 2), (230, 3), (231, 4), (1000, 388), (1001, 388), (1003, 390)],
)
def test_half_pixels_are_rounded_to_the_even_one(size_px: int, first: int) -> None:
    rows = np.repeat(np.arange(size_px)[:, None], 224, axis=1)
    frame = np.stack([rows % 256, rows // 256, rows * 0], axis=-1).astype(np.uint8)
    crop = center_crop(frame)
    assert int(crop[0, 0, 0]) + 256 * int(crop[0, 0, 1]) == first
    np.testing.assert_array_equal(center_crop(frame.transpose(1, 0, 2)), crop.transpose(1, 0, 2))


def test_the_odd_pixel_of_padding_goes_after_the_image() -> None:
    crop = center_crop(np.full((1, 223, 3), 9, np.uint8))
    rows, columns = np.nonzero(crop[..., 0])
    assert set(rows.tolist()) == {111}
    assert (columns.min(), columns.max()) == (0, 222)


@settings(max_examples=150, deadline=None)
@given(height=sizes_px, width=sizes_px)
def test_five_are_the_centre_and_the_corners_of_the_padded_frame(height: int, width: int) -> None:
    frame = marked(height, width)
    found = crops(frame, "five")
    if height <= CROP_PX and width <= CROP_PX:
        np.testing.assert_array_equal(found, center_crop(frame)[None])
        return
    whole = padded(frame)
    n = CROP_PX
    expected = [torchvision_center_crop(frame), whole[:n, :n], whole[:n, -n:], whole[-n:, :n], whole[-n:, -n:]]
    np.testing.assert_array_equal(found, np.stack(expected))


@settings(max_examples=100, deadline=None)
@given(height=sizes_px, width=sizes_px, layout=st.sampled_from(["center", "five"]))
def test_by_region_reads_only_within_the_frame(height: int, width: int, layout: str) -> None:
    frame = marked(height, width)

    def region(top: int, left: int, bottom: int, right: int) -> np.ndarray:
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        assert bottom - top <= CROP_PX and right - left <= CROP_PX
        return frame[top:bottom, left:right]

    np.testing.assert_array_equal(crops_of(region, height, width, layout), crops(frame, layout))


def test_a_crop_does_not_hold_on_to_its_frame() -> None:
    frame = marked(300, 224)
    crop = center_crop(frame)
    before = crop.copy()
    frame[:] = 0
    np.testing.assert_array_equal(crop, before)
    assert not np.shares_memory(crop, frame)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((300, 300), np.uint8),
        np.zeros((300, 300, 4), np.uint8),
        np.zeros((300, 300, 3), np.float32),
        np.zeros((0, 300, 3), np.uint8),
        np.zeros((1, 300, 300, 3), np.uint8),
    ],
)
def test_other_frames_are_refused(frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected a frame as uint8 \[H, W, 3\]"):
        crops(frame)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown crops layout 'ten'; known are center, five"):
        crops(np.zeros((300, 300, 3), np.uint8), "ten")  # type: ignore[arg-type]


def test_the_id_is_stable_and_changes_with_every_value() -> None:
    # Written down, because a changed id orphans every cached score and every bundle.
    assert Preprocess().id == "0b331fc991fe181c"
    changed = [
        replace(Preprocess(), crop_px=256),
        replace(Preprocess(), mean=(0.5, 0.5, 0.5)),
        replace(Preprocess(), std=(0.5, 0.5, 0.5)),
        replace(Preprocess(), pad_rgb=(1, 0, 0)),
        replace(Preprocess(), alpha_over_rgb=(0, 0, 0)),
    ]
    assert len({Preprocess().id, *(value.id for value in changed)}) == 6
