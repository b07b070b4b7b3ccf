"""Sample images for the demo, drawn on the spot: every format the worker reads, and two that must fail.

They are drawings, not photographs and not the output of a generator: their scores show that the path works, not how
good the detector is. Give the demo images of your own (`make demo IMAGES=DIR`) to see that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter


def write_samples(folder: Path, seed: int = 7) -> list[Path]:
    """Write the samples into `folder` and return their paths; the same seed gives the same pictures."""
    rng = np.random.default_rng(seed)
    written = []
    pictures: tuple[tuple[str, Image.Image, dict[str, Any]], ...] = (
        ("dunes.jpg", _dunes(rng, 640, 480), {"quality": 90}),
        ("harbour.png", _shapes(rng, 512, 384), {}),
        ("nebula.webp", _clouds(rng, 512, 512), {"quality": 80}),
        ("tiles.bmp", _shapes(rng, 300, 300), {}),
        ("mist.tiff", _clouds(rng, 400, 300).convert("L"), {}),
        ("meadow.avif", _dunes(rng, 480, 360), {"quality": 70}),
        ("sticker.png", _sticker(rng, 320, 320), {}),
        ("icon.png", _shapes(rng, 96, 96), {}),
        ("dunes-again.jpg", _dunes(np.random.default_rng(seed), 640, 480), {"quality": 90}),
    )
    for name, picture, options in pictures:
        path = folder / name
        picture.save(path, **options)
        written.append(path)
    frames = [_shapes(rng, 256, 256) for _ in range(6)]
    animation = folder / "parade.gif"
    frames[0].save(animation, save_all=True, append_images=frames[1:], duration=120, loop=0)
    truncated = folder / "truncated.jpg"
    truncated.write_bytes((folder / "dunes.jpg").read_bytes()[:9_000])
    text = folder / "not-an-image.jpg"
    text.write_text("This is a text file with the name of a picture.\n")
    return [*written, animation, truncated, text]


def _clouds(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth coloured noise over several octaves."""
    total: NDArray[np.float64] = np.zeros((height, width, 3))
    for octave in range(2, 7):
        cells = rng.random((2**octave, 2**octave, 3))
        layer = Image.fromarray((cells * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=np.float64) / 2**octave
    total -= total.min()
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def _dunes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Layered ridges under a sky, with grain."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([110 + 60 * y / height, 150 + 50 * y / height, 200 - 10 * y / height], axis=-1)
    for ridge in range(4):
        line = height * (0.45 + 0.13 * ridge) + 22 * np.sin(x / (60 + 25 * ridge) + rng.random() * 6)
        shade = 210 - 35 * ridge
        picture[y > line] = (shade, shade * 0.82, shade * 0.55)
    picture += rng.normal(0, 5, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _shapes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Overlapping flat shapes."""
    picture = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(150, 255, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(24):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        size = int(rng.integers(width // 12, width // 3))
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((left, top, left + size, top + size), fill=colour, outline=(20, 20, 20))
    return picture.filter(ImageFilter.SMOOTH)


def _sticker(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A shape on a transparent ground."""
    picture = _shapes(rng, width, height).convert("RGBA")
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((20, 20, width - 20, height - 20), fill=255)
    picture.putalpha(mask)
    return picture
