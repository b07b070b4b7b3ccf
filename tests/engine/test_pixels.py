"""Regions, orientations and modes."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import pixels
from tests.engine.hostile_images import picture


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_region_is_the_region_of_the_whole(orientation: int, width: int, height: int, data: st.DataObject) -> None:
    frame = pixels.Frame(picture(width, height), orientation)
    shown_width, shown_height = frame.size
    whole = frame.rgb(0, 0, shown_height, shown_width)
    assert whole.shape == (shown_height, shown_width, 3)
    top = data.draw(st.integers(0, shown_height - 1))
    left = data.draw(st.integers(0, shown_width - 1))
    bottom = data.draw(st.integers(top + 1, shown_height))
    right = data.draw(st.integers(left + 1, shown_width))
    assert np.array_equal(frame.rgb(top, left, bottom, right), whole[top:bottom, left:right])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    rgb = pixels.to_rgb(PIL.Image.new("LAB", (96, 64)) if mode == "LAB" else picture().convert(mode))
    assert rgb.mode == "RGB"
    assert rgb.size == (96, 64)


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_premultiplied_and_palette_alpha_lie_over_white(mode: str) -> None:
    straight = picture(mode="RGBA")
    source = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}[mode]
    if mode == "PA":
        stored = straight.convert("RGB").quantize(64).convert("PA")
        stored.putalpha(straight.getchannel("A"))
        expected = pixels.to_rgb(stored.convert("RGBA"))
    else:
        stored = straight.convert(source).convert(mode)
        expected = pixels.to_rgb(straight.convert(source))
    assert stored.mode == mode
    difference = np.abs(np.asarray(pixels.to_rgb(stored)).astype(int) - np.asarray(expected))
    assert difference.max() <= 3


def test_narrow_leaves_eight_bits_alone() -> None:
    plain = picture()
    assert pixels.narrow(plain) is plain
    twelve = PIL.Image.fromarray(np.array([[0, 4095, 2048]], np.uint16))
    assert np.asarray(pixels.narrow(twelve, bits=12)).tolist() == [[0, 255, 128]]
