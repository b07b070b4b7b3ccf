"""Pictures for the page: fetched by the worker's rules, decoded in a sandboxed process, re-encoded as a bounded preview."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from worker.clock import Clock, Deadline
from worker.console import picture_layout
from worker.console.picture_layout import Window
from worker.console.uploads import Unavailable, Uploads
from worker.errors import DependencyError, ItemError, StaleItemError
from worker.items import Delivery, Event, Fetched, ImageInfo, Item, Position, Record, Timings
from worker.settings import DecodeSettings
from worker.stages.decode import Decoder
from worker.stages.decode_child import MAX_CROPS_PER_FRAME

DECODE_FUNCTION = "worker.console.picture_process:decode_picture"
CONTENT_TYPE = "image/webp"
QUALITY = 85
KEPT_PICTURES = 12
"""About 6 MB each, most of it the windows."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as the page needs it.

    `preview`: WebP; `center`: uint8 [224, 224, 3]; `windows` and their pixels uint8 [n, 224, 224, 3], padded with black.
    """

    info: ImageInfo
    preview: bytes
    center: NDArray[np.uint8]
    windows: list[Window]
    pixels: NDArray[np.uint8]


class Pictures:
    """Makes and remembers pictures. One thread owns the decoder process; any number may ask."""

    def __init__(self, settings: DecodeSettings, uploads: Uploads, clock: Clock) -> None:
        # A process of its own even where the worker decodes in threads: what a reviewer looks at is what was reported.
        frames = -(-picture_layout.MAX_PIECES // MAX_CROPS_PER_FRAME)
        bounded = settings.model_copy(update={"processes": 1, "max_frames": frames})
        self._decoder = Decoder(bounded, "center", function=DECODE_FUNCTION)
        self._thread = ThreadPoolExecutor(1, "console-decode")
        self._uploads = uploads
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Picture] = OrderedDict()

    def start(self) -> None:
        """Start the decoder process from the thread that owns it."""
        self._thread.submit(self._decoder.start).result()

    def of(self, verdict: dict[str, Any]) -> Picture:
        """The picture that a verdict is about.

        Raises:
            Unavailable: it cannot be had or decoded; says why.
        """
        key = verdict["verdict_id"]
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = self.read(self._uploads.image(verdict), verdict["image"]["sha256"] or "")
        with self._lock:
            self._kept[key] = picture
            while len(self._kept) > KEPT_PICTURES:
                self._kept.popitem(last=False)
        return picture

    def read(self, data: bytes, sha256: str) -> Picture:
        """Decode bytes.

        Raises:
            Unavailable: they are no image that can be shown.
        """
        try:
            return self._thread.submit(self._decode, data, sha256).result()
        except ItemError as error:
            raise Unavailable(f"{error.code}: {error.message}") from error
        except (StaleItemError, DependencyError) as error:
            raise Unavailable(f"the decoder is not running: {error}") from error

    def close(self) -> None:
        """End the decoder process."""
        self._decoder.close(Deadline(2.0))
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _decode(self, data: bytes, sha256: str) -> Picture:
        decoded = self._decoder.decode(bare(data, sha256, self._clock), 0)
        info = decoded.info
        windows = picture_layout.windows(info.width, info.height)
        width, height = picture_layout.preview_size(info.width, info.height)
        columns, rows = picture_layout.tiles(width, height)
        if len(decoded.crops) != 1 + len(windows) + columns * rows:
            raise DependencyError("the decoder process sent another number of pieces than its picture has")
        tiles = decoded.crops[1 + len(windows) :]
        output = io.BytesIO()
        PIL.Image.fromarray(picture_layout.join(tiles, width, height)).save(output, "WEBP", quality=QUALITY)
        return Picture(info, output.getvalue(), decoded.crops[0], windows, decoded.crops[1 : 1 + len(windows)])


def bare(data: bytes, sha256: str, clock: Clock, event_id: str = "console") -> Fetched:
    """Bytes as the decoder takes them, of no event in any topic."""
    record = Record(Position("console", 0, 0, 0), None, None, (), 0)
    return Fetched(Item(record, Event(event_id, None, data), Delivery(), Timings(clock.monotonic())), data, sha256)
