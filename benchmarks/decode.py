"""Bytes to crops: the region decoder against Pillow's full decode, interleaved in one run, equal to the bit.

`pillow` is what one writes without this project: open, convert to RGB, crop the middle. `whole` is this project's reader with the
region decoder switched off. Figures are the best of several rounds, each in milliseconds of this process's CPU time: what a
busy machine adds is left out. Where nvImageCodec finds a GPU it is measured as well, by wall-clock time.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import record
from engine import images, jpeg_region
from engine.jpeg_gpu import GpuDecoderUnavailable, GpuJpegDecoder
from engine.preprocess import CROP_PX

LIMITS = images.Limits(max_pixels=64_000_000)
KINDS: tuple[tuple[str, tuple[int, int], dict[str, Any], int], ...] = (
    ("256 px baseline", (256, 256), {"quality": 85}, 300),
    ("512 px baseline", (512, 512), {"quality": 85}, 200),
    ("512 px progressive", (512, 512), {"quality": 85, "progressive": True}, 100),
    ("512 px progressive 4:4:4 q95", (512, 512), {"quality": 95, "progressive": True, "subsampling": 0}, 60),
    ("512 px progressive 4:2:2", (512, 512), {"quality": 85, "progressive": True, "subsampling": 1}, 60),
    ("2 MP baseline", (1920, 1080), {"quality": 85}, 40),
    ("12 MP baseline q75", (4000, 3000), {"quality": 75}, 9),
    ("12 MP baseline q85", (4000, 3000), {"quality": 85}, 9),
    ("12 MP baseline q92", (4000, 3000), {"quality": 92}, 9),
    ("12 MP baseline q95", (4000, 3000), {"quality": 95}, 9),
    ("12 MP baseline 4:4:4 q85", (4000, 3000), {"quality": 85, "subsampling": 0}, 9),
    ("12 MP baseline 4:4:4 q95", (4000, 3000), {"quality": 95, "subsampling": 0}, 9),
    ("12 MP progressive q85", (4000, 3000), {"quality": 85, "progressive": True}, 5),
    ("12 MP progressive 4:4:4 q95", (4000, 3000), {"quality": 95, "progressive": True, "subsampling": 0}, 5),
)


def jpeg(size: tuple[int, int], options: dict[str, Any], seed: int = 3) -> bytes:
    """A picture with a photograph's smoothness at large and grain at small: about 1.3 bits a pixel at quality 85."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 5, (size[1], size[0], 1)).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", **options)
    return out.getvalue()


def pillow(data: bytes) -> NDArray[np.uint8]:
    """The middle of the picture, as the released CoDE reads it."""
    with Image.open(io.BytesIO(data)) as file:
        rgb = file.convert("RGB")
    left, top = (round((side - CROP_PX) / 2) for side in rgb.size)
    return np.asarray(rgb.crop((left, top, left + CROP_PX, top + CROP_PX)))


def region(data: bytes) -> NDArray[np.uint8]:
    """This project's reader."""
    crop: NDArray[np.uint8] = images.read_crops(data, LIMITS).crops[0]
    return crop


def whole(data: bytes) -> NDArray[np.uint8]:
    """The same without the region decoder."""
    with mock.patch.object(jpeg_region, "read_crops", lambda *_: None):
        return region(data)


READERS: dict[str, Callable[[bytes], NDArray[np.uint8]]] = {"pillow": pillow, "whole": whole, "region": region}


def compare(data: bytes, rounds: int) -> dict[str, Any]:
    """Best CPU milliseconds of each reader."""
    best = dict.fromkeys(READERS, float("inf"))
    crops = {name: reader(data) for name, reader in READERS.items()}
    for _ in range(rounds):
        for name, reader in READERS.items():
            started = time.process_time()
            reader(data)
            best[name] = min(best[name], (time.process_time() - started) * 1000)
    return {
        "kib": len(data) // 1024,
        **{f"{name}_ms": value for name, value in best.items()},
        "times_as_fast_as_pillow": best["pillow"] / best["region"],
        "times_as_fast_as_whole": best["whole"] / best["region"],
        "equal": all(np.array_equal(crop, crops["pillow"]) for crop in crops.values()),
    }


def gpu() -> dict[str, Any]:
    """The GPU's decoder, where there is one: images a second of wall-clock time by batch size, and how far off it is."""
    try:
        decoder = GpuJpegDecoder()
    except GpuDecoderUnavailable as error:
        return {"gpu": f"not measured: {error}"}
    figures: dict[str, Any] = {"gpu": f"nvImageCodec {decoder.version}"}
    for name, size, options, rounds in KINDS:
        data = jpeg(size, options)
        crop = None if "progressive" in options else decoder.read_crops(data, LIMITS)
        if crop is None:
            continue
        figures[f"{name}, gpu"] = {"most_difference": int(np.abs(crop.crops[0].astype(int) - region(data)).max())}
        for batch_size in (1, 8, 32):
            batch = [data] * batch_size
            best_s = float("inf")
            for _ in range(max(3, rounds // batch_size)):
                started = time.perf_counter()
                decoder.read_many(batch, LIMITS)
                best_s = min(best_s, time.perf_counter() - started)
            figures[f"{name}, gpu"][f"images_per_s_at_{batch_size}"] = batch_size / best_s
    return figures


def main() -> dict[str, Any]:
    """Run and write the result file."""
    figures: dict[str, Any] = {"library": (jpeg_region.library() or "none").rpartition("/")[2]}
    for name, size, options, rounds in KINDS:
        figures[name] = compare(jpeg(size, options), rounds)
    figures |= gpu()
    record.write("decode", figures)
    return figures
