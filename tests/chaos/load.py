"""The events of a run: each a pure function of seed and number, with what must come of it; and who produces them.

Images are grey squares whose score the null engine makes from their brightness, so that a verdict tells whose it is. They come
inline with bytes of their own, inline and often the same (cache, identical images in flight), by URL from a host that refuses
some at first (retry topic), and broken in three ways (dead letters).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from confluent_kafka import Producer
from PIL import Image

from tests.blackbox.upload_events import png_chunk

SIDE_PX = 224
GREYS = 16
REFUSED_FIRST = 2
"""So often the host refuses every third picture before it gives it: once more than the fetch repeats in place."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One record and what must come of it."""

    event_id: str | None
    kind: str
    grey: int | None
    value: bytes
    headers: tuple[tuple[str, bytes], ...]

    @property
    def key(self) -> bytes:
        """The record's key."""
        return (self.event_id or self.value.decode()).encode()

    @property
    def code(self) -> str | None:
        """The failure it must end in."""
        return {"broken": "decode.unsupported", "malformed": "event.malformed", "no id": "event.malformed"}.get(self.kind)


@functools.cache
def _base(grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (SIDE_PX, SIDE_PX), grey * 255 // (GREYS - 1)).save(out, "PNG")
    return out.getvalue()


def picture(grey: int, note: str = "") -> bytes:
    """A grey PNG; with a note its bytes are its own."""
    data = _base(grey)
    return data[:33] + png_chunk(b"tEXt", b"Comment\0" + note.encode()) + data[33:] if note else data


def plan(seed: int, number: int, host: str, pad_bytes: int = 0) -> Planned:
    """Event `number` of the run. `host` is the address of `Host`; `pad_bytes` makes inline pictures so much larger."""
    rng = random.Random(f"{seed}/{number}")
    share, grey = rng.random(), rng.randrange(GREYS)
    event_id = f"{seed}-{number:07d}"
    raw = (("content-type", b"image/png"), ("ce_id", event_id.encode()))
    if share < 0.87:
        return Planned(event_id, "unique", grey, picture(grey, event_id) + bytes(pad_bytes), raw)
    if share < 0.92:
        return Planned(event_id, "popular", grey, picture(grey), raw)
    if share < 0.95:
        body = {"event_id": event_id, "image": {"url": f"http://{host}/{grey}/{number}"}}
        return Planned(event_id, "url", grey, json.dumps(body).encode(), ())
    if share < 0.96:
        body = {"event_id": event_id, "image": {"bytes": base64.b64encode(picture(grey, event_id)).decode()}, "priority": 1}
        return Planned(event_id, "unique", grey, json.dumps(body).encode(), ())
    if share < 0.98:
        return Planned(event_id, "broken", None, b"no picture " + event_id.encode(), raw)
    if share < 0.99:
        return Planned(event_id, "malformed", None, json.dumps({"event_id": event_id}).encode(), ())
    return Planned(None, "no id", None, b"{nope " + event_id.encode(), ())


LARGE_BYTES = 20 * 10**6


def large(number: int, host: str) -> Planned:
    """An event that names an image of 20 MB: a picture with as much behind its end."""
    event_id = f"large-{number:07d}"
    body = {"event_id": event_id, "image": {"url": f"http://{host}/{number % GREYS}/{number * 3 + 1}/large"}}
    return Planned(event_id, "large", number % GREYS, json.dumps(body).encode(), ())


def sha256_of(planned: Planned, number: int, pad_bytes: int = 0) -> str:
    """The digest that the verdict of a good event must name."""
    if planned.kind == "popular":
        data = picture(planned.grey or 0)
    elif planned.kind == "url":
        data = picture(planned.grey or 0, f"url {number}")
    elif planned.value.startswith(b"{"):
        data = base64.b64decode(json.loads(planned.value)["image"]["bytes"])
    else:
        data = planned.value
    return hashlib.sha256(data).hexdigest()


class Host:
    """Serves the pictures of URL events on loopback; every third is refused with 503 at first."""

    def __init__(self) -> None:
        refused: dict[str, int] = {}
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                _, grey, number, *size = self.path.split("/")
                with lock:
                    refuse = int(number) % 3 == 0 and refused.get(number, 0) < REFUSED_FIRST
                    refused[number] = refused.get(number, 0) + 1
                body = b"later" if refuse else picture(int(grey), f"url {number}")
                if size:
                    body += bytes(LARGE_BYTES - len(body))
                self.send_response(503 if refuse else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A worker was killed in the middle of a fetch."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Uploader:
    """Produces events with librdkafka's idempotent producer, through every fault; remembers where each record went.

    `wait_s(number)` says how long event `number` still has to wait; it is asked again and again until it says 0 or less.
    """

    def __init__(self, bootstrap: str, topic: str, plans: Iterable[Planned], wait_s: Callable[[int], float]) -> None:
        self.offsets: dict[int, tuple[int, int]] = {}
        """By number partition and offset of the record, once acknowledged."""
        self.sent = 0
        self.failures: list[str] = []
        self._plans, self._topic, self._wait_s = plans, topic, wait_s
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "message.timeout.ms": 0,
                "linger.ms": 20,
                "compression.type": "lz4",
                "message.max.bytes": 25_000_000,
                "queue.buffering.max.kbytes": 65_536,
                "log_level": 0,
            }
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether every event is sent and acknowledged."""
        return not self._thread.is_alive() and len(self.offsets) == self.sent

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        for number, planned in enumerate(self._plans):
            while (wait_s := self._wait_s(number)) > 0 and not self._stop.is_set():
                self._producer.poll(min(wait_s, 0.05))
            self._send(number, planned)
            if self._stop.is_set():
                break
        while not self._stop.is_set() and self._producer.flush(1.0):
            pass

    def _send(self, number: int, planned: Planned) -> None:
        def acknowledged(error: object, message: Any) -> None:
            if error is not None:
                self.failures.append(str(error))
            else:
                self.offsets[number] = (message.partition(), message.offset())

        while not self._stop.is_set():
            try:
                self._producer.produce(
                    self._topic, planned.value, planned.key, headers=list(planned.headers), on_delivery=acknowledged
                )
            except BufferError:
                self._producer.poll(0.1)
            else:
                self.sent += 1
                self._producer.poll(0)
                return


def steadily(events: int, seconds: float) -> Callable[[int], float]:
    """A pace: so many events evenly over so many seconds from now on."""
    began = time.monotonic()
    return lambda number: began + seconds * number / events - time.monotonic()
