"""Decode: images become crops in separate processes, so that one that crashes, hangs or bloats its decoder costs itself only.

Each thread of this stage owns one decoder process (`decode_process.py`) and speaks with it over a socket pair. A process that
dies or overruns its time is killed and replaced at once; the replacement loads while the thread reports the failure.

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

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from engine import images
from engine.containers import FORMATS
from engine.preprocess import CROP_PX, Layout
from worker.clock import Deadline
from worker.errors import Code, DependencyError, ItemError, StaleItemError
from worker.items import Decoded, Fetched, ImageInfo
from worker.settings import DecodeSettings
from worker.stages import decode_process, provenance
from worker.stages.decode_process import DECODED, MAX_JSON_BYTES, READY, REFUSED, REPLY, REQUEST

DECODE_FUNCTION = "worker.stages.decode_process:decode_image"
ATTEMPTS = 2
START_ATTEMPTS = 3
START_TIMEOUT_S = 60.0
MAX_CROPS_PER_FRAME = 5

_CROP_BYTES = CROP_PX * CROP_PX * 3
_LAUNCHER = (
    "import json, sys; start = json.loads(sys.argv[1]); sys.path[:] = start['path']; "
    "from worker.stages.decode_process import main; main(start)"
)
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LC_ALL": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",  # numpy starts no threads that nobody needs
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 24),  # pictures up to 4 megapixels reuse pages that are there already
    "MALLOC_TRIM_THRESHOLD_": str(1 << 26),
}
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_MAX_SIZE = 1 << 31
_END_S = 0.5

log = structlog.get_logger()


class _DecoderDied(Exception):  # noqa: N818 - a state of the child, caught in this file
    """The child is gone, or what it sent is no reply."""


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
        self._children: list[_Child | None] = [None] * settings.processes
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
        for attempt in range(1, ATTEMPTS + 1):
            child = self._ready(index)
            try:
                return _decoded(fetched, *child.exchange(fetched.data, self._settings))
            except TimeoutError:
                self._replace(index, fetched, "timeout", attempt)
                raise ItemError(Code.DECODE_TIMEOUT, f"not decoded within {self._settings.timeout_s:g} s") from None
            except _DecoderDied as died:
                problem = f"{died}; {child.end()}" if str(died) else child.end()
                self._replace(index, fetched, "crashed", attempt, problem)
        raise ItemError(Code.DECODE_CRASHED, f"the decoder process died {ATTEMPTS} times on this image: {problem}")

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
        return _decoded(fetched, decode_process.describe(crops, found), crops.crops)

    def _ready(self, index: int) -> _Child:
        """The child of `index`, started anew where it died idle or did not come up."""
        problem = ""
        for attempt in range(START_ATTEMPTS):
            time.sleep(0.2 * attempt)
            child = self._children[index]
            if child is None or not child.alive:
                problem = self._spawn(index) or problem
                child = self._children[index]
            if child is None:
                continue
            try:
                child.wait_ready()
                return child
            except (TimeoutError, _DecoderDied) as error:
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
                self._children[index] = _Child(self._settings, self._crops, self._function)
            except OSError as error:
                self._children[index] = None
                return error.strerror or type(error).__name__
        return ""

    def _check_open(self) -> None:
        if self._closed:
            raise StaleItemError("the decoder was closed")

    def _replace(self, index: int, fetched: Fetched, reason: str, attempt: int, problem: str = "") -> None:
        self._check_open()
        with self._lock:
            self._restarts[reason] += 1
        if self._on_restart is not None:
            self._on_restart(reason)
        position = fetched.item.record.position
        log.warning(
            "decode.process_replaced",
            event_id=fetched.item.event.event_id,
            topic=position.topic,
            partition=position.partition,
            offset=position.offset,
            code=f"decode.{reason}",
            attempt=attempt,
            problem=problem,
        )
        self._spawn(index)


class _Child:
    """One decoder process and the socket to it.

    Raises:
        OSError: no process could be started.
    """

    def __init__(self, settings: DecodeSettings, crops: Layout, function: str) -> None:
        self._connection, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._exchanging = threading.Lock()
        self._output = _scratch()
        with theirs:
            start = {
                "path": [str(Path(entry).resolve()) for entry in sys.path],
                "socket": theirs.fileno(),
                "parent": os.getpid(),
                "function": function,
                "max_pixels": settings.max_pixels,
                "max_frames": settings.max_frames,
                "layout": crops,
                "max_memory_bytes": settings.max_memory_bytes,
                "timeout_s": settings.timeout_s,
            }
            kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _LAUNCHER, json.dumps(start)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._output,
                    pass_fds=[theirs.fileno()],
                    env=_ENVIRONMENT | kept,
                )
            except OSError:
                self._connection.close()
                os.close(self._output)
                raise
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Wait until it has loaded.

        Raises:
            _DecoderDied: it ended instead.
            TimeoutError: not within START_TIMEOUT_S.
        """
        if self._is_ready:
            return
        status, _, _ = self._receive(Deadline(START_TIMEOUT_S))
        if status != READY:
            raise _DecoderDied("it did not report ready")
        self._is_ready = True

    def exchange(self, data: bytes, settings: DecodeSettings) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Send an image, wait for its description and crops.

        Raises:
            ItemError: the child refused the image.
            TimeoutError: no complete reply in time.
            _DecoderDied: the child ended, ran out of memory or does not speak the protocol.
        """
        with self._exchanging:
            return self._exchange(data, settings.max_frames * MAX_CROPS_PER_FRAME, Deadline(settings.timeout_s))

    def _exchange(self, data: bytes, most_crops: int, deadline: Deadline) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        try:
            self._connection.settimeout(deadline.remaining())
            head = REQUEST.pack(len(data))
            sent = self._connection.sendmsg([head, data])
            if sent < len(head) + len(data):
                self._connection.sendall(memoryview(data)[max(0, sent - len(head)) :])
        except TimeoutError:
            raise
        except OSError as error:
            raise _DecoderDied from error
        status, content, crops = self._receive(deadline, most_crops)
        if status == REFUSED:
            raise _refusal(content)
        if status != DECODED:
            raise _DecoderDied("it sent no verdict")
        return content, crops

    def _receive(self, deadline: Deadline, most_crops: int = 0) -> tuple[int, dict[str, Any], NDArray[np.uint8]]:
        """One reply. The child may be in a stranger's hands: nothing it says about sizes is taken on trust."""
        head = bytearray(REPLY.size)
        self._fill(memoryview(head), deadline)
        status, text_bytes, pixel_bytes = REPLY.unpack(head)
        count, rest = divmod(pixel_bytes, _CROP_BYTES)
        if text_bytes > MAX_JSON_BYTES or rest or count > most_crops:
            raise _DecoderDied("its reply has an impossible size")
        text = bytearray(text_bytes)
        self._fill(memoryview(text), deadline)
        crops = np.empty((count, CROP_PX, CROP_PX, 3), np.uint8)
        if count:
            self._fill(crops.data.cast("B"), deadline)
        try:
            content = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise _DecoderDied("its reply is not JSON") from error
        if not isinstance(content, dict):
            raise _DecoderDied("its reply is not an object")
        return status, content, crops

    def _fill(self, buffer: memoryview, deadline: Deadline) -> None:
        while buffer:
            self._connection.settimeout(max(deadline.remaining(), 1e-6))  # zero would mean not to wait at all
            try:
                received = self._connection.recv_into(buffer)
            except TimeoutError:
                raise
            except OSError as error:
                raise _DecoderDied from error
            if not received:
                raise _DecoderDied
            buffer = buffer[received:]

    def finish(self, deadline: Deadline) -> None:
        """End it after the image in the works, or at the deadline."""
        waited = self._exchanging.acquire(timeout=deadline.remaining())
        self.kill()
        if waited:
            self._exchanging.release()

    def kill(self) -> None:
        """End it now, reap it, and wake whoever waits for its reply. Safe to call twice."""
        with self._lock:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            if self._output >= 0:
                os.close(self._output)
                self._output = -1

    def end(self) -> str:
        """How it ended, for people."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "killed because its reply made no sense"
        if code >= 0:
            return f"exit status {code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"

    def last_words(self) -> str:
        """The last line of its standard error, bounded and printable."""
        if self._output < 0:
            return ""
        size = os.fstat(self._output).st_size
        lines = os.pread(self._output, 4096, max(0, size - 4096)).decode("ascii", "replace").strip().splitlines()
        return "".join(char for char in lines[-1] if char.isprintable())[:200] if lines else ""


def _scratch() -> int:
    """A file in memory for what codecs print; the child's limit on file sizes bounds it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("decoder-stderr")
    return os.open(os.devnull, os.O_RDWR)


def _refusal(content: dict[str, Any]) -> ItemError | _DecoderDied:
    code, message = content.get("code"), str(content.get("message"))[: images.MAX_MESSAGE_CHARS]
    if code == Code.DECODE_CRASHED:
        return _DecoderDied(message)
    if code not in (Code.DECODE_UNSUPPORTED, Code.DECODE_CORRUPT, Code.DECODE_TOO_MANY_PIXELS):
        return _DecoderDied("it refused for a reason that is none")
    return ItemError(Code(code), message)


def _decoded(fetched: Fetched, content: dict[str, Any], crops: NDArray[np.uint8]) -> Decoded:
    """A Decoded of a checked reply.

    Raises:
        _DecoderDied: a value is missing or out of range.
    """
    sizes = [content.get(name) for name in ("width", "height", "frames", "crops_per_frame")]
    if content.get("format") not in FORMATS or not all(isinstance(size, int) and 0 < size < _MAX_SIZE for size in sizes):
        raise _DecoderDied("its reply is incomplete")
    width, height, frames, each = cast(list[int], sizes)
    if each not in (1, MAX_CROPS_PER_FRAME) or not len(crops) or len(crops) % each:
        raise _DecoderDied("its reply has an impossible number of crops")
    info = ImageInfo(
        sha256=fetched.sha256,
        width=width,
        height=height,
        format=content["format"],
        frames=frames,
        provenance=provenance.bounded(content.get("provenance")),
    )
    return Decoded(fetched=fetched, info=info, crops=crops, crops_per_frame=each)
