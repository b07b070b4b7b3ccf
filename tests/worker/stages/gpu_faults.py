"""What the GPU decoder process calls in tests: the real function on the stand-in for nvImageCodec, and faults on order.

The size of an image is the order: a width of 601 kills the process, 602 hangs it, 603 sends a reply that makes no sense.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace

from engine import images, jpeg_gpu, jpeg_region
from engine.preprocess import Layout
from tests.engine import fake_nvimgcodec
from worker.stages import decode_gpu_process

Found = dict[str, str | None]

jpeg_gpu.load_library = lambda: fake_nvimgcodec


def decode(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, Found]:
    """Do what the width says, or decode."""
    found = jpeg_region.header(data)
    width = 0 if found is None else found.width
    if width == 601:
        os.kill(os.getpid(), signal.SIGKILL)
    if width == 602:
        time.sleep(60)
    crops, marks = decode_gpu_process.decode_image(data, limits, layout)
    return (replace(crops, width=-1) if width == 603 else crops), marks


def without_device(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, Found]:
    """As on a machine without a GPU."""
    fake_nvimgcodec.FAULT = "no device"
    return decode_gpu_process.decode_image(data, limits, layout)


def dying(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, Found]:
    """As on a GPU whose driver kills whoever decodes a region."""
    print("nvjpeg: segmentation fault", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError
