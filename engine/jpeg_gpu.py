"""Crops of baseline JPEGs by nvImageCodec on an NVIDIA GPU: an option, and never trusted blindly.

Its pixels are near Pillow's, not Pillow's: another inverse transform, another rounding. So nothing is decoded by it before it
has come close enough on pictures made here, and whatever is not plainly a whole baseline JPEG, or comes back in another shape
than was asked for, is left to the safe decoder, which alone says what is damaged. Only the regions of the crops are asked for.
The EXIF orientation is applied here, as for every other way.

The CUDA decoder alone is allowed, not the hardware one and none on the CPU: which of them takes an image would depend on its
size, on the GPU and on the load, and with it the pixels. Progressive files, whose codes it reads on the CPU, are left out.

What runs here holds a CUDA context and reads strangers' bytes: give it a process of its own (`worker.stages.decode_gpu`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine import containers, jpeg_region, preprocess
from engine.containers import Part
from engine.image_files import ImageError, Limits
from engine.jpeg_region import Cut, Header
from engine.pixels import stored_box

MOST_DIFFERENCE = 8
"""Of a sample of the self-check's pictures from Pillow's."""
MOST_MEAN_DIFFERENCE = 1.0

_OPTIONS = ":fancy_upsampling=1"
"""Chroma as libjpeg interpolates it; 0.8 would repeat samples by itself, which is tens of levels off at edges."""
_APP14, _RESTARTS, _FRAMES = b"\xff\xee", b"\xff\xdd", (b"\xff\xc0", b"\xff\xc1")
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_EOI, _RST0 = 0xD9, 0xD0


class GpuDecoderUnavailable(Exception):  # noqa: N818 - the name says what is the case
    """nvImageCodec is not installed, finds no GPU, or differs too much from Pillow. The message is one line."""


class _Wanted(NamedTuple):
    """An image's regions as a viewer shows them, and where they lie among its stored pixels."""

    found: Header
    width: int
    height: int
    regions: list[preprocess.Box]
    boxes: list[tuple[int, int, int, int]]


class GpuJpegDecoder:
    """Decodes crops on one GPU; to be used by one thread.

    Args:
        library: nvImageCodec's module; None: the one that is installed.
        device_id: CUDA device.

    Raises:
        GpuDecoderUnavailable: it cannot be used here.
    """

    def __init__(self, library: Any = None, device_id: int = 0) -> None:
        self._library = library = load_library() if library is None else library
        self.version = str(getattr(library, "__version__", "?"))
        kinds = library.BackendKind
        try:
            self._decoder = library.Decoder(
                device_id=device_id,
                max_num_cpu_threads=1,
                backends=[library.Backend(kinds.GPU_ONLY), library.Backend(kinds.HYBRID_CPU_GPU)],
                options=_OPTIONS,
            )
            self._params = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)
        except Exception as error:
            raise GpuDecoderUnavailable(f"nvImageCodec {self.version} finds no GPU it can use ({_line(error)})") from error
        self._check()

    def read_crops(self, data: bytes, limits: Limits, layout: preprocess.Layout = "center") -> Cut | None:
        """The crops of one image; None where the safe decoder has to decide. As `read_many`."""
        return self.read_many([data], limits, layout)[0]

    def read_many(self, images: Sequence[bytes], limits: Limits, layout: preprocess.Layout = "center") -> list[Cut | None]:
        """The crops of several images, decoded as one batch; None for each that the safe decoder has to look at.

        Nothing about an image is raised: too many pixels are the safe decoder's to refuse, too.
        """
        wanted = [_wanted(data, limits, layout) for data in images]
        streams: list[Any] = []
        for data, want in zip(images, wanted, strict=True):
            streams += [] if want is None else self._streams(data, want)
        pixels = iter(self._decode(streams))
        return [None if want is None else _cut(want, [next(pixels) for _ in want.boxes], layout) for want in wanted]

    def _streams(self, data: bytes, want: _Wanted) -> list[Any]:
        """One stream a region; Nones where nvImageCodec's own parser takes the file for something else."""
        try:
            stream = self._library.CodeStream(data)
            if (stream.width, stream.height) != (want.found.width, want.found.height):
                return [None] * len(want.boxes)
            return [
                stream.get_sub_code_stream(
                    region=self._library.Region(start_y=top, start_x=left, end_y=bottom, end_x=right),
                )
                for left, top, right, bottom in want.boxes
            ]
        except Exception:  # noqa: BLE001 - a foreign library on strangers' bytes: the safe decoder has the word
            return [None] * len(want.boxes)

    def _decode(self, streams: list[Any]) -> list[NDArray[np.uint8] | None]:
        """Pixels of each stream, in host memory; None where there are none."""
        present = [stream for stream in streams if stream is not None]
        try:
            images = self._decoder.decode(present, params=self._params) if present else []
            arrays = iter([None if image is None else np.asarray(image.cpu()) for image in images])
        except Exception:  # noqa: BLE001 - as above; what ails the device for good ends the process or fails every image
            return [None] * len(streams)
        return [None if stream is None else next(arrays, None) for stream in streams]

    def _check(self) -> None:
        """Compare with Pillow on pictures made here.

        Raises:
            GpuDecoderUnavailable: it fails on one, or differs by more than the tolerance.
        """
        for data in _check_pictures():
            with PIL.Image.open(io.BytesIO(data), formats=("JPEG",)) as file:
                full = np.asarray(file.convert("RGB"))
            for layout in get_args(preprocess.Layout):
                expected = preprocess.crops(full, layout)
                cut = self.read_crops(data, Limits(full.shape[0] * full.shape[1]), layout)
                if cut is None:
                    raise GpuDecoderUnavailable(f"nvImageCodec {self.version} did not decode a picture of the self-check")
                difference = np.abs(cut.crops.astype(np.int16) - expected)
                most, mean = int(difference.max()), float(difference.mean())
                if most > MOST_DIFFERENCE or mean > MOST_MEAN_DIFFERENCE:
                    raise GpuDecoderUnavailable(
                        f"nvImageCodec {self.version} differs from Pillow by up to {most} levels, {mean:.2f} in the mean;"
                        f" {MOST_DIFFERENCE} and {MOST_MEAN_DIFFERENCE:g} are allowed"
                    )


def load_library() -> Any:
    """nvImageCodec's module.

    Raises:
        GpuDecoderUnavailable: it is not installed, or does not load.
    """
    try:
        from nvidia import nvimgcodec
    except Exception as error:
        raise GpuDecoderUnavailable(f"nvImageCodec cannot be imported ({_line(error)}); install the extra gpu-decode") from error
    return nvimgcodec


def _wanted(data: bytes, limits: Limits, layout: preprocess.Layout) -> _Wanted | None:
    """What to decode of an image that is plainly of the common kind; None for any other."""
    found = jpeg_region.header(data) if containers.sniff(data) == containers.JPEG else None
    if found is None or found.progressive or not _is_plain(data, found):
        return None
    try:
        limits.check(found.width, found.height)
    except ImageError:
        return None
    turned = found.orientation >= 5
    width, height = (found.height, found.width) if turned else (found.width, found.height)
    regions = preprocess.regions(height, width, layout)
    boxes = [stored_box((left, top, right, bottom), found[:2], found.orientation) for top, left, bottom, right in regions]
    return _Wanted(found, width, height, regions, boxes)


def _is_plain(data: bytes, found: Header) -> bool:
    """Grey or YCbCr of 8 bits at the common samplings, in one scan that is all there."""
    segments = list(containers.jpeg_segments(data))
    frame = next(segment for segment in segments if segment.name in _FRAMES)
    count = data[frame.start + 5]
    if data[frame.start] != 8 or count not in (1, 3) or frame.end - frame.start != 6 + 3 * count:
        return False
    ids, samplings = data[frame.start + 6 : frame.end : 3], data[frame.start + 7 : frame.end : 3]
    if count == 3 and (ids not in (b"\1\2\3", b"\0\1\2") or not all(_is_ycc(data, s) for s in segments if s.name == _APP14)):
        return False
    if samplings[0] not in (0x11, 0x21, 0x12, 0x22) or samplings[1:] not in (b"", b"\x11\x11"):
        return False
    scan = segments[-1]
    if data[scan.start] != count:
        return False
    across, down = (8, 8) if count == 1 else (8 * (samplings[0] >> 4), 8 * (samplings[0] & 15))
    mcus = -(-found.width // across) * -(-found.height // down)
    interval = 0
    for segment in segments:
        if segment.name == _RESTARTS:
            interval = int.from_bytes(data[segment.start : segment.start + 2], "big")
    return _ends_well(data, found.scan, (mcus - 1) // interval if interval else 0)


def _is_ycc(data: bytes, adobe: Part) -> bool:
    """Whether Adobe's segment says what JFIF does; another one is let pass."""
    return not data.startswith(b"Adobe", adobe.start) or data[adobe.start + 11 : adobe.start + 12] == b"\1"


def _ends_well(data: bytes, scan: int, restarts: int) -> bool:
    """Whether the scan's restart markers come in sequence and in number, and then the end of the image."""
    for seen, match in enumerate(_MARKER.finditer(data, scan)):
        marker = match[1][0]
        if marker == _EOI:
            return seen == restarts
        if marker != _RST0 + (seen & 7) or seen == restarts:
            return False
    return False


def _cut(want: _Wanted, pixels: list[NDArray[np.uint8] | None], layout: preprocess.Layout) -> Cut | None:
    """Crops of an image's regions; None where one of them is missing or has another shape."""
    shown: dict[preprocess.Box, NDArray[np.uint8]] = {}
    for region, (left, top, right, bottom), part in zip(want.regions, want.boxes, pixels, strict=True):
        if part is None or part.dtype != np.uint8 or part.shape != (bottom - top, right - left, 3):
            return None
        shown[region] = jpeg_region.turn(part, want.found.orientation)
    return Cut(preprocess.crops_of(lambda *region: shown[region], want.height, want.width, layout), want.width, want.height)


def _check_pictures() -> list[bytes]:
    """Small ones of every kind that comes this way, and one of over a million pixels, whose codes the GPU reads."""
    small = [data for data in jpeg_region.samples() if (found := jpeg_region.header(data)) and not found.progressive]
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(noise).resize((1240, 930), PIL.Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return [*small, out.getvalue()]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
