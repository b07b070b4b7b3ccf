"""Decode: images become crops in separate processes, so that one that crashes, hangs or bloats its decoder costs itself only.

Each thread of this stage owns one decoder process (`decode_process.py`) and speaks with it over a socket pair; images and crops
lie in memory that the two share (`decode_memory.py`). A process that dies or overruns its time is killed and replaced at once;
the replacement loads while the thread reports the failure.

Why plain subprocesses, measured on a 2-core machine: numpy, Pillow and pillow-heif load in 0.15 to 0.2 s of CPU and 36 MB,
which is the price of healing. A fork server heals in 2 ms, but it is one more process that may die, its children share one
memory layout (an attacker may probe it crash by crash), and they are not ours to wait for. multiprocessing would import
`__main__` again, hand down the environment, and unpickle what a taken-over child sends; here a reply is a fixed header, JSON
and raw pixels, each checked for size and type.

The kernel kills a child when the thread that started it ends (PR_SET_PDEATHSIG), so `start` belongs to a thread that lives as
long as the decoder, and `decode(..., index)` to the one that owns `index`. With `processes` 0 images are decoded in the
calling thread, with the limits on pixels and frames only.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from engine import images
from engine.containers import FORMATS
from engine.preprocess import Layout
from worker.clock import Deadline
from worker.errors import Code, DependencyError, ItemError, StaleItemError
from worker.items import Decoded, Fetched, ImageInfo
from worker.settings import DecodeSettings
from worker.stages import decode_process, provenance
from worker.stages.decode_child import MAX_CROPS_PER_FRAME, Child, DecoderDied, DecoderGone

DECODE_FUNCTION = "worker.stages.decode_process:decode_image"
ATTEMPTS = 2
START_ATTEMPTS = 3
GROUP_TIMEOUT_S = 1.0
"""For the answer to several images: the process answers after one image that is slow, so this is for one image. Slower ones than
this are decoded once more, alone, with all the time they may take."""
ALONE_AFTER = 64
"""So many images go one by one after trouble with a group: who sends what kills decoders sends it again."""
_MAX_SIZE = 1 << 31

log = structlog.get_logger()


class Decoder:
    """Decodes images in `settings.processes` child processes, or in the calling threads where that is 0.

    Args:
        settings: limits and the number of processes.
        crops: which crops of a frame the engine wants.
        on_restart: called with `crashed` or `timeout` whenever a process is replaced, on the thread that noticed.
        function: what the children call, as `module:name`; tests replace it by one that fails on purpose.
    """

    def __init__(
        self,
        settings: DecodeSettings,
        crops: Layout,
        on_restart: Callable[[str], None] | None = None,
        function: str = DECODE_FUNCTION,
    ) -> None:
        self._settings = settings
        self._crops: Layout = crops
        self._limits = images.Limits(settings.max_pixels, settings.max_frames)
        self._on_restart = on_restart
        self._function = function
        self._children: list[Child | None] = [None] * settings.processes
        self._alone = [0] * settings.processes
        """By process how many images are to go one by one before several go together again."""
        self._restarts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def threads(self) -> int:
        """How many threads should call `decode`, with indices from 0."""
        return len(self._children) or max(1, os.cpu_count() or 1)

    @property
    def restarts(self) -> int:
        """Processes replaced so far."""
        return self._restarts.total()

    @property
    def pids(self) -> list[int | None]:
        """Process id of each child, None where one is missing."""
        return [child.pid if child else None for child in self._children]

    def start(self) -> None:
        """Start all processes and wait until they are ready.

        Raises:
            DependencyError: they do not start.
        """
        for index in range(len(self._children)):
            self._spawn(index)
        for index in range(len(self._children)):
            self._ready(index)

    def decode(self, fetched: Fetched, index: int) -> Decoded:
        """Decode an image on process `index`, or in this thread where there are no processes.

        Raises:
            ItemError: `decode.*` of the contract; a crash is tried once more on a fresh process.
            StaleItemError: the decoder was closed meanwhile.
            DependencyError: processes do not start any more.
        """
        if not self._children:
            return self._decode_here(fetched)
        problem = ""
        attempt = starts = 1
        while attempt <= ATTEMPTS:
            child = self._ready(index)
            try:
                return decoded_of(fetched, *child.exchange(fetched.data, self._settings))
            except DecoderGone:
                starts += 1
                if starts > START_ATTEMPTS:
                    raise DependencyError(f"decoder processes do not stay: {child.end()}") from None
                self._spawn(index)
            except TimeoutError:
                self._replace(index, "timeout", attempt=attempt, **_names(fetched))
                raise ItemError(Code.DECODE_TIMEOUT, f"not decoded within {self._settings.timeout_s:g} s") from None
            except DecoderDied as died:
                problem = f"{died}; {child.end()}" if str(died) else child.end()
                self._replace(index, "crashed", attempt=attempt, problem=problem, **_names(fetched))
                attempt += 1
        raise ItemError(Code.DECODE_CRASHED, f"the decoder process died {ATTEMPTS} times on this image: {problem}")

    def takes(self, index: int) -> int:
        """How many images `decode_several` may be given for process `index`: one after trouble, or without processes."""
        return 1 if not self._children or self._alone[index] else decode_process.MAX_GROUP

    def decode_several(self, several: Sequence[Fetched], index: int) -> list[Decoded | ItemError]:
        """Decode the first of these images, or more, on process `index`: what the process answers for in one turn.

        A process that dies or takes too long over several is replaced, and nobody is blamed for it: this time only the first
        image is decoded, and `ALONE_AFTER` go one by one, as with `decode`, which finds the guilty one. The others may go to
        any process: none waits for a neighbour that hangs.

        Args:
            several: images that have room in the shared memory together, `MAX_GROUP` at most, or any single one.

        Returns:
            For each of the first images, in order, what `decode` would return or raise; at least one.

        Raises:
            StaleItemError, DependencyError: as `decode`.
        """
        if len(several) > 1 and self.takes(index) > 1 and (outcomes := self._decode_group(several, index)):
            return outcomes
        if self._children:
            self._alone[index] = max(0, self._alone[index] - 1)
        try:
            return [self.decode(several[0], index)]
        except ItemError as error:
            return [error]

    def _decode_group(self, group: Sequence[Fetched], index: int) -> list[Decoded | ItemError]:
        """What the first of these images, or more, come to; none of them where the process did not come through."""
        child = self._ready(index)
        timeout_s = min(GROUP_TIMEOUT_S, self._settings.timeout_s)
        try:
            answers = child.exchange_several([fetched.data for fetched in group], self._settings, timeout_s)
            return [
                answer if isinstance(answer, ItemError) else decoded_of(fetched, *answer)
                for fetched, answer in zip(group, answers, strict=False)
            ]
        except DecoderGone:
            self._spawn(index)
        except TimeoutError:
            self._replace(index, "timeout", images=len(group))
        except DecoderDied as died:
            self._replace(index, "crashed", images=len(group), problem=f"{died}; {child.end()}" if str(died) else child.end())
        self._alone[index] = ALONE_AFTER
        return []

    def close(self, deadline: Deadline) -> None:
        """Let images in the works finish until the deadline, then end all processes. Safe to call twice."""
        with self._lock:
            self._closed = True
            children = [child for child in self._children if child]
        for child in children:
            child.finish(deadline)

    def _decode_here(self, fetched: Fetched) -> Decoded:
        try:
            crops, found = decode_process.decode_image(fetched.data, self._limits, self._crops)
        except images.ImageError as error:
            raise ItemError(Code(decode_process.ERROR_CODES[type(error)]), str(error)) from error
        return decoded_of(fetched, decode_process.describe(crops, found), crops.crops)

    def _ready(self, index: int) -> Child:
        """The child of `index`, started anew where it died idle or did not come up."""
        problem = ""
        for attempt in range(START_ATTEMPTS):
            if attempt:
                time.sleep(0.2 * attempt)
            child = self._children[index]
            if child is None or not (child.is_ready or child.alive):  # one that is ready and gone shows it when it is asked
                problem = self._spawn(index) or problem
                child = self._children[index]
            if child is None:
                continue
            try:
                child.wait_ready()
                return child
            except (TimeoutError, DecoderDied) as error:
                problem = f"{child.end()}: {child.last_words() or error}"
                child.kill()
        self._check_open()
        raise DependencyError(f"decoder processes do not start: {problem}")

    def _spawn(self, index: int) -> str:
        """Start a child in the place of `index`, not waiting until it is ready; what went wrong, if anything."""
        old = self._children[index]
        if old is not None:
            old.kill()
        with self._lock:  # or a child started during `close` would be left behind
            self._check_open()
            try:
                self._children[index] = Child(self._settings, self._crops, self._function)
            except OSError as error:
                self._children[index] = None
                return error.strerror or type(error).__name__
        return ""

    def _check_open(self) -> None:
        if self._closed:
            raise StaleItemError("the decoder was closed")

    def _replace(self, index: int, reason: str, **about: object) -> None:
        self._check_open()
        with self._lock:
            self._restarts[reason] += 1
        if self._on_restart is not None:
            self._on_restart(reason)
        log.warning("decode.process_replaced", code=f"decode.{reason}", **about)
        self._spawn(index)


def _names(fetched: Fetched) -> dict[str, object]:
    """What a log line calls an event."""
    position = fetched.item.record.position
    return {
        "event_id": fetched.item.event.event_id,
        "topic": position.topic,
        "partition": position.partition,
        "offset": position.offset,
    }


def decoded_of(fetched: Fetched, content: dict[str, Any], crops: NDArray[np.uint8]) -> Decoded:
    """A Decoded of a checked reply.

    Raises:
        DecoderDied: a value is missing or out of range.
    """
    sizes = [content.get(name) for name in ("width", "height", "frames", "crops_per_frame")]
    if content.get("format") not in FORMATS or not all(isinstance(size, int) and 0 < size < _MAX_SIZE for size in sizes):
        raise DecoderDied("its reply is incomplete")
    width, height, frames, each = cast(list[int], sizes)
    if each not in (1, MAX_CROPS_PER_FRAME) or not len(crops) or len(crops) % each:
        raise DecoderDied("its reply has an impossible number of crops")
    info = ImageInfo(
        sha256=fetched.sha256,
        width=width,
        height=height,
        format=content["format"],
        frames=frames,
        provenance=provenance.bounded(content.get("provenance")),
    )
    return Decoded(fetched=fetched, info=info, crops=crops, crops_per_frame=each)
