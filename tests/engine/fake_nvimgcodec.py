"""A stand-in for nvImageCodec's module: its names, its errors and its Nones, with Pillow's pixels a little off.

Made after 0.8 and 0.9, whose CPU backend is what `test_jpeg_gpu` compares it with where 0.9 is installed. `FAULT` says what goes
wrong, `CALLS` keeps what was asked for.
"""

from __future__ import annotations

import enum
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

__version__ = "0.0-fake"
FAULT = ""
CALLS: list[int] = []


class BackendKind(enum.Enum):
    CPU_ONLY = 1
    GPU_ONLY = 2
    HYBRID_CPU_GPU = 3


class ColorSpec(enum.Enum):
    UNCHANGED = 0
    SRGB = 1


@dataclass
class Backend:
    backend_kind: BackendKind


@dataclass
class DecodeParams:
    apply_exif_orientation: bool = True
    color_spec: ColorSpec = ColorSpec.SRGB


@dataclass
class Region:
    start_y: int
    start_x: int
    end_y: int
    end_x: int


class CodeStream:
    def __init__(self, data: bytes, region: Region | None = None) -> None:
        try:
            with PIL.Image.open(io.BytesIO(data)) as file:
                self.width, self.height = file.size
        except OSError:
            raise RuntimeError("Failed to get image info") from None
        if FAULT == "other size":
            self.width += 1
        self.data, self.region = data, region

    def get_sub_code_stream(self, image_idx: int = 0, region: Region | None = None) -> CodeStream:
        return CodeStream(self.data, region)


class Image:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def cpu(self) -> Image | None:
        if FAULT == "device lost":
            raise RuntimeError("CUDA Runtime failure: '#700'")
        return self

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.pixels.__array_interface__


class Decoder:
    def __init__(
        self, device_id: int = -1, max_num_cpu_threads: int = 0, backends: list[Backend] | None = None, options: str = ""
    ) -> None:
        if FAULT == "no device":
            raise RuntimeError("CUDA Runtime failure: '#35' at device_utils.h:32")
        assert backends
        assert BackendKind.CPU_ONLY not in {backend.backend_kind for backend in backends}
        self.fancy = ":fancy_upsampling=1" in options

    def decode(self, srcs: list[CodeStream], *, params: DecodeParams | None = None) -> list[Image | None]:
        CALLS.append(len(srcs))
        if FAULT == "raises":
            raise RuntimeError("Internal error")
        return [self._one(stream, params or DecodeParams()) for stream in srcs]

    def _one(self, stream: CodeStream, params: DecodeParams) -> Image | None:
        assert not params.apply_exif_orientation
        assert params.color_spec is ColorSpec.SRGB
        try:
            with PIL.Image.open(io.BytesIO(stream.data)) as file:
                full = np.asarray(file.convert("RGB"))
        except OSError:
            return None
        region = stream.region or Region(0, 0, *full.shape[:2])
        pixels = full[region.start_y : region.end_y, region.start_x : region.end_x].astype(np.int16)
        if FAULT == "none":
            return None
        off = 40 if FAULT == "far off" or not self.fancy else 1
        pixels = (pixels + off * (np.indices(pixels.shape).sum(axis=0) % 3 - 1)).clip(0, 255).astype(np.uint8)
        return Image(np.ascontiguousarray(pixels[1:] if FAULT == "shape" else pixels))
