"""The parent's end of one decoder process: starts it, exchanges images for crops, ends it. Used by one thread at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import images
from engine.preprocess import CROP_PX, Layout
from worker.clock import Deadline
from worker.errors import Code, ItemError
from worker.settings import DecodeSettings
from worker.stages.decode_memory import SharedMemory
from worker.stages.decode_process import (
    COUNT,
    DECODED,
    DECODED_IN_MEMORY,
    MAX_GROUP,
    MAX_JSON_BYTES,
    READY,
    REFUSED,
    REPLY,
    REQUEST,
)

START_TIMEOUT_S = 60.0
MAX_CROPS_PER_FRAME = 5

Content = tuple[dict[str, Any], NDArray[np.uint8]]
"""What a reply says, and its crops, uint8 [k, 224, 224, 3]."""

_CROP_BYTES = CROP_PX * CROP_PX * 3
_NO_CROPS = np.empty((0, CROP_PX, CROP_PX, 3), np.uint8)
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
_CUDA_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES")
_END_S = 0.5


class DecoderDied(Exception):  # noqa: N818 - a state of the child, caught by the stage
    """The child is gone, or what it sent is no reply."""


class DecoderGone(DecoderDied):
    """The child was gone before it was asked: no image did that."""


class Child:
    """One decoder process and the socket to it.

    `cuda`: it will hold a CUDA context, and gets the limits and variables that go with one.

    Raises:
        OSError: no process could be started.
    """

    def __init__(self, settings: DecodeSettings, crops: Layout, function: str, *, cuda: bool = False) -> None:
        self._connection, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._exchanging = threading.Lock()
        self._output = _scratch()
        self._waits_s = 0.0
        self._buffer = memoryview(bytearray(COUNT.size + MAX_GROUP * (REPLY.size + MAX_JSON_BYTES)))
        most_crops = max(settings.max_frames, MAX_GROUP) * (MAX_CROPS_PER_FRAME if crops == "five" else 1)
        self._memory = SharedMemory.create(most_crops * _CROP_BYTES)
        with theirs, contextlib.ExitStack() as stack:
            if self._memory is not None:
                stack.callback(os.close, self._memory.fd)  # the mapping stays
            start = {
                "memory": None if self._memory is None else self._memory.fd,
                "path": [str(Path(entry).resolve()) for entry in sys.path],
                "socket": theirs.fileno(),
                "parent": os.getpid(),
                "function": function,
                "max_pixels": settings.max_pixels,
                "max_frames": settings.max_frames,
                "layout": crops,
                "max_memory_bytes": None if cuda else settings.max_memory_bytes,
                "timeout_s": settings.timeout_s,
            }
            names = _KEPT_VARIABLES + (_CUDA_VARIABLES if cuda else ())
            kept = {name: os.environ[name] for name in names if name in os.environ}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _LAUNCHER, json.dumps(start)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._output,
                    pass_fds=[theirs.fileno(), *([] if self._memory is None else [self._memory.fd])],
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
            DecoderDied: it ended instead.
            TimeoutError: not within START_TIMEOUT_S.
        """
        if self._is_ready:
            return
        self._wait_at_most(START_TIMEOUT_S)
        ((status, _),) = self._receive(Deadline(START_TIMEOUT_S))
        if status != READY:
            raise DecoderDied("it did not report ready")
        self._is_ready = True

    @property
    def is_ready(self) -> bool:
        """Whether `wait_ready` has seen it ready; it may have died since."""
        return self._is_ready

    def exchange(self, data: bytes, settings: DecodeSettings) -> Content:
        """Send an image, wait for its description and crops.

        Raises:
            ItemError: the child refused the image.
            TimeoutError: no complete reply in time.
            DecoderGone: the child had ended before.
            DecoderDied: the child ended, ran out of memory or does not speak the protocol.
        """
        (answer,) = self.exchange_several([data], settings, settings.timeout_s)
        if isinstance(answer, ItemError):
            raise answer
        return answer

    def exchange_several(self, images: Sequence[bytes], settings: DecodeSettings, timeout_s: float) -> list[Content | ItemError]:
        """Send images, wait for what the first of them, or more, come to.

        Args:
            images: `MAX_GROUP` at most. Several must have room in the shared memory together, else only the first is sent.
            settings: the child's.
            timeout_s: for the whole answer.

        Raises:
            TimeoutError, DecoderGone, DecoderDied: as `exchange`; nothing is known of any of the images then.
        """
        with self._exchanging:
            self._wait_at_most(timeout_s)
            deadline = Deadline(timeout_s)
            in_memory = self._memory is not None and self._memory.put_images(images)
            if not in_memory:
                images = images[:1]
                in_memory = self._memory is not None and self._memory.put_images(images)
            sizes = [len(data) for data in images]
            head = REQUEST.pack(len(images), in_memory, *sizes, *[0] * (MAX_GROUP - len(images)))
            self._send(head, None if in_memory else images[0])
            most_crops = settings.max_frames * MAX_CROPS_PER_FRAME
            return [_outcome(*reply) for reply in self._receive(deadline, len(images), most_crops)]

    def _send(self, head: bytes, data: bytes | None) -> None:
        """`data` where the image goes through the socket."""
        try:
            self._connection.sendall(head)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError as error:
            raise DecoderGone from error
        try:
            if data is not None:
                self._connection.sendall(data)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError as error:
            raise DecoderDied from error

    def _wait_at_most(self, seconds: float) -> None:
        """How long the kernel lets one call wait. Python's own limits cost two system calls each."""
        if seconds == self._waits_s:
            return
        self._waits_s = seconds
        limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6) or int(seconds < 1))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._connection.setsockopt(socket.SOL_SOCKET, option, limit)

    def _receive(self, deadline: Deadline, most: int = 1, most_crops: int = 0) -> list[tuple[int, Content]]:
        """An answer of up to `most` replies. The child may be in a stranger's hands: none of its sizes is taken on trust."""
        buffer = self._buffer
        got = self._fill(buffer, 0, COUNT.size, deadline)
        (count,) = COUNT.unpack(buffer[: COUNT.size])
        if not 0 < count <= most:
            raise DecoderDied("its reply is about an impossible number of images")
        replies: list[tuple[int, Content]] = []
        at, laid = COUNT.size, 0
        for _ in range(count):
            got = self._fill(buffer, got, at + REPLY.size, deadline)
            status, text_bytes, pixel_bytes = REPLY.unpack(buffer[at : at + REPLY.size])
            crops, rest = divmod(pixel_bytes, _CROP_BYTES)
            if text_bytes > MAX_JSON_BYTES or rest or crops > most_crops or (status == DECODED and count > 1):
                raise DecoderDied("its reply has an impossible size")
            begin, at = at + REPLY.size, at + REPLY.size + text_bytes
            got = self._fill(buffer, got, at, deadline)
            content, pixels = _object(bytes(buffer[begin:at])), _NO_CROPS
            if status == DECODED_IN_MEMORY:
                pixels = self._shared(laid, crops)
                laid += pixel_bytes
            elif status == DECODED:
                pixels, got = self._received(crops, buffer[at:got], deadline), at
            replies.append((status, (content, pixels)))
        if got > at:
            raise DecoderDied("its reply is longer than it says")
        return replies

    def _shared(self, at: int, count: int) -> NDArray[np.uint8]:
        """Crops out of the shared memory, `at` so many bytes from the first."""
        shared = None if self._memory is None else self._memory.crops(at, count * _CROP_BYTES)
        if shared is None:
            raise DecoderDied("its reply has an impossible size")
        return shared.reshape(count, CROP_PX, CROP_PX, 3)

    def _received(self, count: int, early: memoryview, deadline: Deadline) -> NDArray[np.uint8]:
        """Crops out of the socket; `early` is what came along with the text."""
        crops = np.empty((count, CROP_PX, CROP_PX, 3), np.uint8)
        view = crops.data.cast("B") if count else memoryview(b"")
        if len(early) > len(view):
            raise DecoderDied("its reply is longer than it says")
        if count:
            view[: len(early)] = early
            self._fill(view, len(early), len(view), deadline)
        return crops

    def _fill(self, buffer: memoryview, got: int, needed: int, deadline: Deadline) -> int:
        """Receive into the buffer, behind what it has got, until it has what is needed; how much it has then."""
        while got < needed:
            try:
                received = self._connection.recv_into(buffer[got:])
            except BlockingIOError:
                raise TimeoutError from None
            except OSError as error:
                raise DecoderDied from error
            if not received:
                raise DecoderDied
            got += received
            if got < needed and deadline.expired():  # it sends drop by drop
                raise TimeoutError
        return got

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


def _object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise DecoderDied("its reply is not JSON") from error
    if not isinstance(content, dict):
        raise DecoderDied("its reply is not an object")
    return content


def _outcome(status: int, content: Content) -> Content | ItemError:
    """What a reply comes to.

    Raises:
        DecoderDied: it is none, or says that the child ends.
    """
    if status in (DECODED, DECODED_IN_MEMORY):
        return content
    if status != REFUSED:
        raise DecoderDied("it sent no verdict")
    refusal = _refusal(content[0])
    if isinstance(refusal, DecoderDied):
        raise refusal
    return refusal


def _refusal(content: dict[str, Any]) -> ItemError | DecoderDied:
    code, message = content.get("code"), str(content.get("message"))[: images.MAX_MESSAGE_CHARS]
    if code == Code.DECODE_CRASHED:
        return DecoderDied(message)
    if code not in (Code.DECODE_UNSUPPORTED, Code.DECODE_CORRUPT, Code.DECODE_TOO_MANY_PIXELS):
        return DecoderDied("it refused for a reason that is none")
    return ItemError(Code(code), message)
