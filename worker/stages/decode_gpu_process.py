"""What the GPU decoder process does with an image: nvImageCodec, or a refusal. The program around it is `decode_process`.

Its first image opens the device and runs the self-check, so whoever starts the process sends one of its own first. Every refusal
is `decode.unsupported`, meaning no more than "ask the safe decoder": the reason stands in the message.
"""

from __future__ import annotations

import functools

from engine import images
from engine.containers import JPEG
from engine.jpeg_gpu import GpuDecoderUnavailable, GpuJpegDecoder
from engine.preprocess import Layout
from worker.stages import provenance


def decode_image(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, dict[str, str | None]]:
    """Crops and provenance of a plain baseline JPEG.

    Raises:
        UnsupportedImage: any other image, or there is no GPU decoder.
    """
    try:
        cut = _decoder().read_crops(data, limits, layout)
    except GpuDecoderUnavailable as error:
        raise images.UnsupportedImage(str(error)[: images.MAX_MESSAGE_CHARS]) from error
    if cut is None:
        raise images.UnsupportedImage("left to the safe decoder")
    return images.Crops(cut.crops, len(cut.crops), JPEG, cut.width, cut.height, 1), provenance.read(data)


@functools.cache
def _decoder() -> GpuJpegDecoder:
    """The one of this process; a failed start is not kept, but nobody asks twice."""
    return GpuJpegDecoder()
