"""Upload events in every form, codec and way of being broken, produced by a client that is not ours (librdkafka).

`make` plans them; each plan says what must come of it. Images are drawn here; broken ones are made broken here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from confluent_kafka import Producer
from PIL import Image

CODECS = ("gzip", "snappy", "lz4", "zstd")
FORMATS = ("JPEG", "PNG", "JPEG", "PNG", "JPEG", "WEBP", "JPEG", "PNG", "GIF", "JPEG", "BMP", "TIFF", "AVIF", "JPEG")
MAX_IMAGE_BYTES = 900_000


@dataclass(frozen=True)
class Plan:
    """One record to produce and what must come of it."""

    value: bytes | None
    headers: list[tuple[str, bytes]]
    event_id: str | None
    code: str | None = None
    kind: str = "good"
    fields: dict[str, object] = field(default_factory=dict)


class Images:
    """Small drawings in all formats; `pick` gives most JPEGs and PNGs bytes of their own, unknown to the cache."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._base: list[tuple[bytes, str]] = []
        for index in range(56):
            side = int(rng.integers(120, 520))
            noise = rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
            form = FORMATS[index % len(FORMATS)]
            out = io.BytesIO()
            picture.save(out, form, **({"speed": 10} if form == "AVIF" else {}))
            self._base.append((out.getvalue(), form))

    def pick(self, random_: random.Random) -> tuple[bytes, str]:
        data, form = random_.choice(self._base)
        note = str(random_.getrandbits(64)).encode()
        if random_.random() < 0.9:
            if form == "JPEG":
                data = data[:2] + b"\xff\xfe" + struct.pack(">H", len(note) + 2) + note + data[2:]
            elif form == "PNG":
                data = data[:33] + png_chunk(b"tEXt", b"Comment\0" + note) + data[33:]
        return data, f"image/{form.lower()}"


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims a huge picture."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + png_chunk(b"IEND", b"")
    )


def make(count: int, base_url: str, root: Path, seed: int, broken_share: float = 0.05) -> Iterator[Plan]:
    """`count` plans; `base_url` serves /image/NAME, /missing, /unavailable, /slow, /large; `root` is a file root."""
    random_ = random.Random(seed)
    images = Images(seed)
    broken = list(_BROKEN)
    for number in range(count):
        event_id = f"event-{seed}-{number}"
        if random_.random() < broken_share:
            yield _BROKEN[broken[number % len(broken)]](event_id, base_url, images, random_)
        else:
            yield _good(event_id, base_url, root, images, random_)


def produce(plans: list[Plan], bootstrap: str, topic: str) -> None:
    """Send them through four producers, a codec each, and wait for every acknowledgement."""
    producers = {
        codec: Producer(
            {
                "bootstrap.servers": bootstrap,
                "compression.type": codec,
                "linger.ms": 20,
                "message.max.bytes": 4_000_000,
                "log_level": 0,
            }
        )
        for codec in CODECS
    }
    failures: list[str] = []

    def delivered(error: object, _message: object) -> None:
        if error is not None:
            failures.append(str(error))

    for number, plan in enumerate(plans):
        producer = producers[CODECS[number % len(CODECS)]]
        while True:
            try:
                producer.produce(
                    topic, value=plan.value, headers=plan.headers, key=plan.event_id or b"no id", on_delivery=delivered
                )
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    for producer in producers.values():
        assert producer.flush(120) == 0
    assert not failures, failures[:3]


def _object(event_id: str, image: dict[str, str], **more: object) -> dict[str, object]:
    return {"event_id": event_id, "image": image, "tenant": "acme", "attributes": {"k": "v"}, **more}


def _json(event_id: str, image: dict[str, str], **more: object) -> bytes:
    return json.dumps(_object(event_id, image, **more)).encode()


def _good(event_id: str, base_url: str, root: Path, images: Images, random_: random.Random) -> Plan:
    data, content_type = images.pick(random_)
    inline = {"bytes": base64.b64encode(data).decode()}
    form = random_.randrange(6)
    if form == 0:
        return Plan(_json(event_id, inline, sha256=hashlib.sha256(data).hexdigest(), priority=random_.randrange(3)), [], event_id)
    if form == 1:
        envelope = {
            "specversion": "1.0",
            "id": event_id,
            "type": "image.uploaded",
            "source": "/test",
            "data": _object("other", inline),
        }
        return Plan(json.dumps(envelope).encode(), [("content-type", b"application/cloudevents+json; charset=utf-8")], event_id)
    if form == 2:
        headers = [
            ("ce_specversion", b"1.0"),
            ("ce_id", event_id.encode()),
            ("ce_type", b"image.uploaded"),
            ("ce_source", b"/test"),
        ]
        return Plan(_json(event_id, inline), [*headers, ("content-type", b"application/json")], event_id)
    if form == 3:
        headers = [("content-type", content_type.encode()), ("event_id", event_id.encode()), ("tenant", b"acme")]
        return Plan(data, headers, event_id)
    if form == 4:
        return Plan(_json(event_id, {"url": f"{base_url}/image/{random_.randrange(40)}"}), [], event_id)
    path = root / f"{random_.randrange(40)}.img"
    if not path.exists():
        path.write_bytes(data)
    return Plan(_json(event_id, {"url": path.as_uri()}), [], event_id)


def _inline(event_id: str, data: bytes, code: str, kind: str) -> Plan:
    return Plan(data, [("content-type", b"image/png"), ("ce_id", event_id.encode())], event_id, code, kind)


def _url(event_id: str, url: str, code: str, kind: str, **more: object) -> Plan:
    return Plan(_json(event_id, {"url": url}, **more), [], event_id, code, kind)


def _truncated(images: Images, random_: random.Random) -> bytes:
    noise = np.random.default_rng(random_.randrange(2**32)).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=90)
    return out.getvalue()[: len(out.getvalue()) // 2]


_BROKEN = {
    "not json": lambda i, b, im, r: Plan(b"{nope", [], None, "event.malformed", "not json"),
    "tombstone": lambda i, b, im, r: Plan(None, [], None, "event.malformed", "tombstone"),
    "no image": lambda i, b, im, r: Plan(json.dumps({"event_id": i}).encode(), [], i, "event.malformed", "no image"),
    "both": lambda i, b, im, r: Plan(_json(i, {"url": "https://a/", "bytes": "AA=="}), [], i, "event.malformed", "both"),
    "bad base64": lambda i, b, im, r: Plan(_json(i, {"bytes": "@@@"}), [], i, "event.malformed", "bad base64"),
    "priority": lambda i, b, im, r: Plan(_json(i, {"bytes": "AA=="}, priority="high"), [], i, "event.malformed", "priority"),
    "inline too large": lambda i, b, im, r: _inline(
        i, b"\xff\xd8\xff" + bytes(MAX_IMAGE_BYTES), "event.too_large", "inline too large"
    ),
    "scheme": lambda i, b, im, r: _url(i, "ftp://example.org/a.jpg", "fetch.denied", "scheme"),
    "host": lambda i, b, im, r: _url(i, "http://169.254.169.254/latest", "fetch.denied", "host"),
    "path": lambda i, b, im, r: _url(i, "file:///etc/passwd", "fetch.denied", "path"),
    "missing": lambda i, b, im, r: _url(i, f"{b}/missing", "fetch.not_found", "missing"),
    "large": lambda i, b, im, r: _url(i, f"{b}/large", "fetch.too_large", "large"),
    "mismatch": lambda i, b, im, r: _url(i, f"{b}/image/1", "fetch.hash_mismatch", "mismatch", sha256="0" * 64),
    "unavailable": lambda i, b, im, r: _url(i, f"{b}/unavailable", "fetch.unavailable", "unavailable"),
    "slow": lambda i, b, im, r: _url(i, f"{b}/slow", "fetch.timeout", "slow"),
    "text": lambda i, b, im, r: _inline(i, b"just words, no picture", "decode.unsupported", "text"),
    "truncated": lambda i, b, im, r: _inline(i, _truncated(im, r), "decode.corrupt", "truncated"),
    "bomb": lambda i, b, im, r: _inline(i, png_claiming(60_000, 60_000), "decode.too_many_pixels", "bomb"),
}
