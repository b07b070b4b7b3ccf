"""Memory shared with a decoder: what goes in comes out, and nobody can change its size."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from worker.stages.decode_memory import IMAGE_BYTES, MAX_CROP_BYTES, SharedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sealed memory is Linux's")


def pair(crop_bytes: int) -> tuple[SharedMemory, SharedMemory]:
    ours = SharedMemory.create(crop_bytes)
    assert ours is not None
    return ours, SharedMemory.adopt(os.dup(ours.fd))


def test_an_image_goes_in_and_crops_come_out() -> None:
    worker, decoder = pair(1000)
    assert worker.put_image(b"image")
    assert decoder.image(5) == b"image"
    pixels = np.arange(1000, dtype=np.uint8)
    assert decoder.put_crops(pixels.data.cast("B"))
    taken = worker.crops(1000)
    assert taken is not None
    assert decoder.put_crops(np.zeros(1000, np.uint8).data.cast("B"))
    assert np.array_equal(taken, pixels), "a copy"
    os.close(worker.fd)


def test_what_is_too_large_is_refused() -> None:
    worker, decoder = pair(10 * MAX_CROP_BYTES)
    assert worker.put_image(bytes(IMAGE_BYTES))
    assert not worker.put_image(bytes(IMAGE_BYTES + 1))
    assert decoder.put_crops(memoryview(bytes(MAX_CROP_BYTES)))
    assert not decoder.put_crops(memoryview(bytes(MAX_CROP_BYTES + 1)))
    assert worker.crops(MAX_CROP_BYTES) is not None
    assert worker.crops(MAX_CROP_BYTES + 1) is None
    os.close(worker.fd)


@pytest.mark.parametrize("size", [0, IMAGE_BYTES, 1 << 30])
def test_nobody_can_cut_or_grow_it(size: int) -> None:
    worker, _ = pair(1000)
    with pytest.raises(OSError):
        os.ftruncate(worker.fd, size)
    os.close(worker.fd)
