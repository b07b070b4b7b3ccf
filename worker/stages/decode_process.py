"""The decoder process: decodes images one after the other, under limits of its own; `worker.stages.decode` starts and asks it.

It is a plain program with one socket to its parent, an environment of a few harmless variables, and no other open file, so a
taken-over decoder finds no broker, cache or secret. It imports numpy, Pillow and this project's reader, nothing else.

Protocol, over a stream socket: the child sends one READY reply, then answers each request for one or more of its images, in
order; whoever asks sends the others again. A request is `REQUEST` (how many images, whether they lie in the shared memory one
behind the other, their sizes in bytes), and the image where it does not lie there, which several always do. An answer is `COUNT`
(how many images it is about) and as many replies. A reply is `REPLY` (status, sizes of JSON and pixels), a JSON object and the
pixels of the crops, unless these lie in the shared memory one behind the other (`DECODED_IN_MEMORY`), as those of several do.
End of file on either side means that the other one is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from engine import images, jpeg_region
from engine.preprocess import Layout
from worker.stages import provenance
from worker.stages.decode_memory import SharedMemory

MAX_GROUP = 8
"""Images of one request: a turn of both processes costs as much as a tenth of a small picture's decoding."""
GROUP_S = 0.02
"""After so long the images that are done are answered for, and the others are left: none waits long for its neighbours."""
REQUEST = struct.Struct(f"!B?{MAX_GROUP}Q")
COUNT = struct.Struct("!B")
REPLY = struct.Struct("!BIQ")
READY, DECODED, REFUSED, DECODED_IN_MEMORY = 1, 2, 3, 4
MAX_JSON_BYTES = 1 << 16

ERROR_CODES: dict[type[images.ImageError], str] = {
    images.UnsupportedImage: "decode.unsupported",
    images.CorruptImage: "decode.corrupt",
    images.TooManyPixels: "decode.too_many_pixels",
    images.OutOfMemory: "decode.crashed",
}

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CPU_SLACK_S = 5
_MAX_OPEN_FILES = 64
_MAX_OUTPUT_BYTES = 1 << 16
_OOM_SCORE = "800"
_KEPT_BYTES = 1 << 26
_LOOKED_AFTER_BYTES, _LOOKED_EVERY = 1 << 17, 64
"""The resident size is looked at after images of this many bytes, and after every so many others."""

_NO_PIXELS = memoryview(b"")

DecodeFunction = Callable[[bytes, images.Limits, Layout], tuple[images.Crops, dict[str, str | None]]]


def decode_image(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, dict[str, str | None]]:
    """Crops and provenance of an image.

    Raises:
        engine.images.ImageError: it cannot be decoded.
    """
    return images.read_crops(data, limits, layout), provenance.read(data)


def describe(crops: images.Crops, found: dict[str, str | None]) -> dict[str, Any]:
    """The JSON half of a reply."""
    return {
        "format": crops.format,
        "width": crops.width,
        "height": crops.height,
        "frames": crops.frame_count,
        "crops_per_frame": crops.crops_per_frame,
        "provenance": found,
    }


def main(start: dict[str, Any]) -> NoReturn:
    """Become a decoder.

    Args:
        start: `socket` and `memory` (file descriptors; the latter may be None), `parent` (process id), `function` (module:name
            of a DecodeFunction), `max_pixels`, `max_frames`, `layout`, `max_memory_bytes` (None: holds a CUDA context, see
            `_limit`), `timeout_s`.
    """
    connection = socket.socket(fileno=start["socket"])
    module, _, name = start["function"].partition(":")
    function: DecodeFunction = getattr(importlib.import_module(module), name)
    memory = None if start["memory"] is None else SharedMemory.adopt(start["memory"])
    _detach(start["parent"])
    _limit(start["max_memory_bytes"])
    warnings.simplefilter("ignore")
    limits = images.Limits(start["max_pixels"], start["max_frames"])

    def decode(data: bytes) -> tuple[images.Crops, dict[str, str | None]]:
        return function(data, limits, start["layout"])

    jpeg_region.usable()  # compares its two ways once, before the first image waits for it
    resident_bytes = _memory_bytes()[1]
    try:
        connection.sendall(COUNT.pack(1) + REPLY.pack(READY, 0, 0))
        answered = 0
        while (request := _request(connection, memory)) is not None:
            _limit_cpu(start["timeout_s"] + _CPU_SLACK_S)
            before, answered = answered, answered + _answer(connection, memory, decode, request)
            look = max(map(len, request)) > _LOOKED_AFTER_BYTES or before // _LOOKED_EVERY < answered // _LOOKED_EVERY
            del request  # or it would be kept until the next one is here
            if look and _memory_bytes()[1] > resident_bytes + _KEPT_BYTES:
                _give_back()
    except ConnectionError:
        pass  # the parent is gone
    os._exit(0)  # no destructors: nothing here is worth the time


def _answer(
    connection: socket.socket,
    memory: SharedMemory | None,
    decode: Callable[[bytes], tuple[images.Crops, dict[str, str | None]]],
    request: list[bytes],
) -> int:
    """Answer for the first of these images or more; for how many."""
    replies: list[bytes] = []
    ends, laid = time.monotonic() + GROUP_S, 0
    for data in request:
        if replies and time.monotonic() > ends:
            break
        try:
            crops, found = decode(data)
        except images.ImageError as error:
            replies.append(_reply(REFUSED, {"code": ERROR_CODES[type(error)], "message": str(error)}))
            if isinstance(error, images.OutOfMemory):
                _send(connection, replies)
                os._exit(1)  # whatever is left of the heap is not worth keeping
            continue
        pixels = crops.crops.data.cast("B")
        if memory is not None and memory.put_crops(laid, pixels):
            laid += len(pixels)
            replies.append(_reply(DECODED_IN_MEMORY, describe(crops, found), pixels))
        elif replies:  # left for the next request, whose first it will be
            break
        else:
            _send(connection, [_reply(DECODED, describe(crops, found), pixels)], pixels)
            return 1
    _send(connection, replies)
    return len(replies)


def _request(connection: socket.socket, memory: SharedMemory | None) -> list[bytes] | None:
    """The next images; None at the end of the parent."""
    head = connection.recv(REQUEST.size, socket.MSG_WAITALL)
    if len(head) < REQUEST.size:
        return None
    count, in_memory, *sizes = REQUEST.unpack(head)
    if in_memory and memory is not None:
        return [memory.image(sum(sizes[:number]), sizes[number]) for number in range(count)]
    size = sizes[0]
    data = connection.recv(size, socket.MSG_WAITALL) if size else b""
    while len(data) < size:  # a signal cut the wait short
        more = connection.recv(size - len(data), socket.MSG_WAITALL)
        if not more:
            return None
        data += more
    return [data]


def _reply(status: int, content: dict[str, Any], pixels: memoryview = _NO_PIXELS) -> bytes:
    text = json.dumps(content).encode()
    return REPLY.pack(status, len(text), len(pixels)) + text


def _send(connection: socket.socket, replies: list[bytes], pixels: memoryview = _NO_PIXELS) -> None:
    """`pixels` where they go through the socket."""
    head = b"".join((COUNT.pack(len(replies)), *replies))
    sent = connection.sendmsg([head, pixels])
    if sent < len(head) + len(pixels):
        connection.sendall(head[sent:])
        connection.sendall(pixels[max(0, sent - len(head)) :])


def _detach(parent: int) -> None:
    """Leave signals of the terminal to the parent, and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before the death signal was armed
        os._exit(1)


def _limit(max_memory_bytes: int | None) -> None:
    """Bound what a taken-over or runaway decoder may take from the machine; memory counts from here on.

    None: a process with a CUDA context, which reserves address space without end, opens a file a device and sizes shared memory
    through files; of its limits that on processor time is left.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # /proc may be hidden
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)  # out of memory, the kernel takes this one first
    if max_memory_bytes is None:
        return
    _lower(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    _lower(resource.RLIMIT_FSIZE, _MAX_OUTPUT_BYTES)  # of what codecs print to standard error, a file in memory
    if sys.platform == "linux":
        _lower(resource.RLIMIT_AS, _memory_bytes()[0] + max_memory_bytes)


def _memory_bytes() -> tuple[int, int]:
    """Address space and resident size of this process; zeros where the system does not tell."""
    if sys.platform != "linux":
        return 0, 0
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        space, resident = os.read(file, 256).split()[:2]
    finally:
        os.close(file)
    return int(space) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _give_back() -> None:
    """Return freed memory to the system: after a large image glibc keeps hundreds of megabytes, twice that for two processes."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _limit_cpu(seconds: float) -> None:
    """Processor time from now on until SIGXCPU kills this process: a net below the parent's own clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
