"""Pieces of a picture: cut and joined alike, covering all of it; and a picture through the sandboxed decoder."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.preprocess import CROP_PX, center_crop
from tests.worker.console.stage import picture
from worker.clock import SystemClock
from worker.console import picture_layout
from worker.console.pictures import Pictures
from worker.console.uploads import Unavailable
from worker.settings import DecodeSettings

SIZES = st.integers(1, 3000)


@given(st.integers(1, picture_layout.PREVIEW_PX), st.integers(1, picture_layout.PREVIEW_PX))
def test_a_preview_survives_its_journey_in_tiles(width: int, height: int) -> None:
    preview = np.random.default_rng(width * 1000 + height).integers(0, 255, (height, width, 3), np.uint8)
    tiles = picture_layout.split(preview)
    columns, rows = picture_layout.tiles(width, height)
    assert tiles.shape == (columns * rows, CROP_PX, CROP_PX, 3)
    assert (picture_layout.join(tiles, width, height) == preview).all()


@given(SIZES, SIZES)
def test_windows_lie_within_the_picture_and_reach_its_edges(width: int, height: int) -> None:
    windows = picture_layout.windows(width, height)
    assert 1 <= len(windows) <= 36
    for window in windows:
        assert window.top >= 0 and window.top + window.height <= height
        assert window.left >= 0 and window.left + window.width <= width
        assert 0 < window.height <= CROP_PX and 0 < window.width <= CROP_PX
    assert min(w.top for w in windows) == min(w.left for w in windows) == 0
    assert max(w.top + w.height for w in windows) == height
    assert max(w.left + w.width for w in windows) == width
    columns, rows = picture_layout.tiles(*picture_layout.preview_size(width, height))
    assert 1 + len(windows) + columns * rows <= picture_layout.MAX_PIECES


@given(SIZES, SIZES)
def test_previews_keep_the_shape_and_never_grow(width: int, height: int) -> None:
    wide, high = picture_layout.preview_size(width, height)
    assert wide <= min(width, picture_layout.PREVIEW_PX)
    assert high <= min(height, picture_layout.PREVIEW_PX)
    scale = max(width, height) / max(wide, high)
    assert abs(wide * scale - width) <= scale and abs(high * scale - height) <= scale


@pytest.fixture(scope="module")
def pictures() -> Iterator[Pictures]:
    made = Pictures(DecodeSettings(), None, SystemClock())  # type: ignore[arg-type]  # nothing is fetched here
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize("size", [(1500, 700), (480, 360), (100, 60)])
def test_a_picture_through_the_decoder_process(pictures: Pictures, size: tuple[int, int]) -> None:
    data = picture(3, size)
    found = pictures.read(data, "ab" * 32)
    assert (found.info.width, found.info.height) == size
    original = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    assert (found.center == center_crop(original)).all()
    window, pixels = found.windows[-1], found.pixels[-1]
    part = original[window.top : window.top + window.height, window.left : window.left + window.width]
    assert (pixels == center_crop(part)).all()
    preview = PIL.Image.open(io.BytesIO(found.preview))
    assert preview.format == "WEBP"
    assert preview.size == picture_layout.preview_size(*size)
    shrunk = np.asarray(PIL.Image.fromarray(original).resize(preview.size), dtype=float)
    assert np.abs(np.asarray(preview.convert("RGB"), dtype=float) - shrunk).mean() < 12


@pytest.mark.parametrize("data", [b"", b"no image", picture(3)[:5000]])
def test_what_is_no_image_is_said_so(pictures: Pictures, data: bytes) -> None:
    with pytest.raises(Unavailable, match=r"^decode\."):
        pictures.read(data, "")
