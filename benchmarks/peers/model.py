"""What every peer calls: the same ONNX file on OpenVINO, or a device that only takes time; Pillow's decode as CoDE does it."""

from __future__ import annotations

import fcntl
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 224


def crop(data: bytes) -> NDArray[np.uint8]:
    """The centre crop of an image file, uint8 [224, 224, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGB")
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


class Model:
    """Called with crops uint8 [n, 224, 224, 3], gives the linear head's raw scores, n of them.

    PEER_MODEL names the ONNX file, or `a,b`: seconds that a batch of n takes, a + b*n, one batch at a time among all processes.
    """

    def __init__(self) -> None:
        named = os.environ["PEER_MODEL"]
        self._request = threading.Lock()
        self._seconds: tuple[float, float] | None = None
        if named.endswith(".onnx"):
            import openvino

            # As OpenVINO's guide has it for requests of one thread at a time; on processors that have bf16 it takes that.
            options = {"PERFORMANCE_HINT": "LATENCY"}
            if (threads := os.environ.get("PEER_THREADS")) is not None:
                options["INFERENCE_NUM_THREADS"] = threads
            self._compiled = openvino.Core().compile_model(named, "CPU", options)
        else:
            a, b = named.split(",")
            self._seconds = (float(a), float(b))
            self._lock = Path(os.environ["PEER_DEVICE_LOCK"])

    def __call__(self, crops: NDArray[np.uint8]) -> list[float]:
        """Scores of a batch."""
        if self._seconds is not None:
            with self._lock.open("wb") as device:
                fcntl.flock(device, fcntl.LOCK_EX)
                time.sleep(self._seconds[0] + self._seconds[1] * len(crops))
            return [0.0] * len(crops)
        with self._request:
            return [float(row[0]) for row in self._compiled(crops)["raw"]]
