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


def test_images_go_in_and_crops_come_out() -> None:
    worker, decoder = pair(2000)
    assert worker.put_images([b"image", b"another"])
    assert (decoder.image(0, 5), decoder.image(5, 7)) == (b"image", b"another")
    pixels = np.arange(1000, dtype=np.uint8)
    assert decoder.put_crops(1000, pixels.data.cast("B"))
    taken = worker.crops(1000, 1000)
    assert taken is not None
    assert decoder.put_crops(1000, np.zeros(1000, np.uint8).data.cast("B"))
    assert np.array_equal(taken, pixels), "a copy"
    os.close(worker.fd)


def test_what_is_too_large_is_refused() -> None:
    worker, decoder = pair(10 * MAX_CROP_BYTES)
    assert worker.put_images([bytes(IMAGE_BYTES)])
    assert worker.put_images([bytes(IMAGE_BYTES - 1), b"x"])
    assert not worker.put_images([bytes(IMAGE_BYTES + 1)])
    assert not worker.put_images([bytes(IMAGE_BYTES), b"x"])
    assert decoder.put_crops(0, memoryview(bytes(MAX_CROP_BYTES)))
    assert not decoder.put_crops(0, memoryview(bytes(MAX_CROP_BYTES + 1)))
    assert not decoder.put_crops(1, memoryview(bytes(MAX_CROP_BYTES)))
    assert worker.crops(0, MAX_CROP_BYTES) is not None
    assert worker.crops(1, MAX_CROP_BYTES) is None
    os.close(worker.fd)


@pytest.mark.parametrize("size", [0, IMAGE_BYTES, 1 << 30])
def test_nobody_can_cut_or_grow_it(size: int) -> None:
    worker, _ = pair(1000)
    with pytest.raises(OSError):
        os.ftruncate(worker.fd, size)
    os.close(worker.fd)
