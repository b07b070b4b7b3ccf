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
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
                _, grey, number = self.path.split("/")
                with lock:
                    refuse = int(number) % 3 == 0 and refused.get(number, 0) < REFUSED_FIRST
                    refused[number] = refused.get(number, 0) + 1
                body = b"later" if refuse else picture(int(grey), f"url {number}")
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
    """Produces the events at a steady pace with librdkafka's idempotent producer; remembers where each went."""

    def __init__(self, bootstrap: str, topic: str, plans: list[Planned], seconds: float) -> None:
        self.offsets: dict[int, tuple[int, int]] = {}
        """By number partition and offset of the record, once acknowledged."""
        self.sent = 0
        self._plans, self._topic, self._seconds = plans, topic, seconds
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
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def start(self) -> Uploader:
        self._thread.start()
        return self

    @property
    def done(self) -> bool:
        """Whether every event is acknowledged."""
        return len(self.offsets) == len(self._plans)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        started = time.monotonic()
        for number, planned in enumerate(self._plans):
            behind = started + self._seconds * number / len(self._plans) - time.monotonic()
            while behind > 0 and not self._stop.is_set():
                self._producer.poll(min(behind, 0.05))
                behind = started + self._seconds * number / len(self._plans) - time.monotonic()
            self._send(number, planned)
            if self._stop.is_set():
                break
        while not self._stop.is_set() and self._producer.flush(1.0):
            pass

    def _send(self, number: int, planned: Planned) -> None:
        def acknowledged(error: object, message: object) -> None:
            if error is not None:
                self.failures.append(str(error))
            else:
                self.offsets[number] = (message.partition(), message.offset())  # type: ignore[attr-defined]

        while not self._stop.is_set():
            try:
                self._producer.produce(
                    self._topic, planned.value, planned.key, headers=list(planned.headers), on_delivery=acknowledged
                )
            except BufferError:
                self._producer.poll(0.1)
            else:
                self.sent += 1
                return
