"""A decode function that fails as the input tells it to: what crafted images do to real decoders, without their crafting."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine import images
from engine.preprocess import Layout
from worker.stages.decode_process import COUNT, REPLY, decode_image

Found = dict[str, str | None]


def decode(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, Found]:
    """Do what `data` says, or decode it."""
    name, _, argument = data.partition(b" ")
    action = _ACTIONS.get(name)
    return action(argument.decode("latin-1")) if action else decode_image(data, limits, layout)


def _reply(text: str = "") -> tuple[images.Crops, Found]:
    return images.Crops(np.zeros((1, 224, 224, 3), np.uint8), 1, "PNG", 1, 1, 1), {"c2pa": text}


def _segfault(_: str) -> tuple[images.Crops, Found]:
    ctypes.string_at(0)
    return _reply()


def _die(_: str) -> tuple[images.Crops, Found]:
    os.kill(os.getpid(), signal.SIGKILL)
    return _reply()


def _hang(_: str) -> tuple[images.Crops, Found]:
    while True:
        time.sleep(60)


def _spin(_: str) -> tuple[images.Crops, Found]:
    while True:
        pass


def _bloat(_: str) -> tuple[images.Crops, Found]:
    kept = []
    while True:
        kept.append(np.zeros(1 << 24, np.uint8))  # address space, whose pages nobody needs to touch


def _slow(seconds: str) -> tuple[images.Crops, Found]:
    time.sleep(float(seconds))
    return _reply()


def _raise(_: str) -> tuple[images.Crops, Found]:
    raise KeyError("a fault of our own, not of the image")


def _die_once(path: str) -> tuple[images.Crops, Found]:
    """Die the first time; the marker file remembers."""
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _reply()


def _chatter(_: str) -> tuple[images.Crops, Found]:
    """What a codec prints on a broken file, a million times."""
    written = 0
    for _line in range(1000):
        try:
            written += os.write(2, b"warning: tag ignored\n" * 500)
        except OSError:
            break
    return _reply(str(written))


def _environment(_: str) -> tuple[images.Crops, Found]:
    return _reply(",".join(sorted(os.environ)))


def _open_files(_: str) -> tuple[images.Crops, Found]:
    kinds = []
    for entry in range(64):
        try:
            mode = os.fstat(entry).st_mode
        except OSError:
            continue
        kinds.append("socket" if stat.S_ISSOCK(mode) else os.readlink(f"/proc/self/fd/{entry}").split(" ")[0])
    return _reply(",".join(kinds))


def _limits(_: str) -> tuple[images.Crops, Found]:
    return _reply(f"core={resource.getrlimit(resource.RLIMIT_CORE)[0]} files={resource.getrlimit(resource.RLIMIT_NOFILE)[0]}")


def _lie(what: str) -> tuple[images.Crops, Found]:
    """A taken-over child sends what it likes."""
    crops, found = _reply()
    match what:
        case "size":
            _send(REPLY.pack(2, 10, 1 << 40))
        case "memory":
            _send(REPLY.pack(4, 2, 224 * 224 * 3 * 5) + b"{}")
        case "json":
            _send(REPLY.pack(2, 4, 0) + b"{{{{")
        case "nested":
            _send(REPLY.pack(2, 60000, 0) + b"[" * 60000)
        case "array":
            _send(REPLY.pack(2, 2, 0) + b"[]")
        case "status":
            _send(REPLY.pack(9, 2, 0) + b"{}")
        case "frames":
            crops = replace(crops, frame_count=0)
        case "code":
            _send(REPLY.pack(3, 22, 0) + b'{"code":"engine.what"}')
        case "count":
            _send(b"", count=9)
        case "bytes":
            _send(b"\xff" * 5)
            os._exit(0)
        case "format":
            crops = replace(crops, format="EXE")
        case "width":
            crops = replace(crops, width=-5)
        case "each":
            crops = replace(crops, crops_per_frame=7)
        case "provenance":
            return crops, {"c2pa": "x" * 5000, "digital_source_type": {"a": 1}, "more": "y"}  # type: ignore[dict-item]
    return crops, found


def _send(raw: bytes, count: int = 1) -> None:
    for entry in range(64):
        try:
            if stat.S_ISSOCK(os.fstat(entry).st_mode):
                os.write(entry, COUNT.pack(count) + raw)
        except OSError:
            continue
    os._exit(0)


_ACTIONS = {
    b"segfault": _segfault,
    b"die": _die,
    b"hang": _hang,
    b"spin": _spin,
    b"bloat": _bloat,
    b"slow": _slow,
    b"raise": _raise,
    b"die-once": _die_once,
    b"chatter": _chatter,
    b"environment": _environment,
    b"open-files": _open_files,
    b"limits": _limits,
    b"lie": _lie,
}
