"""`worker submit`: publishes an upload event for each file, folder or URL, and waits until the broker has them all."""

from __future__ import annotations

import argparse
import json
import mimetypes
import sys
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from worker.clock import Deadline
from worker.errors import ConfigurationError
from worker.kafka_clients import describe, ensure_topics, open_producer
from worker.log import mask_urls
from worker.settings import KafkaSettings, Settings

SCHEMES = ("http", "https", "s3", "gs", "file")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
MAX_WAITING = 1_000
MAX_WAITING_BYTES = 64 * 2**20
TOPIC_WAIT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of submit."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="PATH_OR_URL",
        help=f"a file, a folder (its images: {' '.join(SUFFIXES)}, also in folders below), or a URL ({', '.join(SCHEMES)})",
    )
    parser.add_argument(
        "--inline",
        action="store_true",
        help="send the bytes of files; otherwise their file:// URLs (see WORKER_FETCH__FILE_ROOTS)",
    )
    parser.add_argument("--topic", help="instead of the first of WORKER_KAFKA__UPLOAD_TOPICS")
    parser.add_argument("--tenant", help="whose policy applies")
    parser.add_argument("--priority", type=_priority, metavar="N", help="0 is the most urgent")
    parser.add_argument("--event-id", metavar="ID", help="for a single file or URL; otherwise ids are made up")
    parser.add_argument("--compression", choices=["none", "gzip", "snappy", "lz4", "zstd"], help="of the records")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print an id and a name for each event the broker has taken; 0 if it took all, 1 if not."""
    sources = [_checked(source) for source in arguments.sources]
    if arguments.event_id is not None:
        if len(sources) != 1 or (isinstance(sources[0], Path) and sources[0].is_dir()):
            raise ConfigurationError("--event-id is for a single file or URL")
        if not 1 <= len(arguments.event_id) <= 200:
            raise ConfigurationError("--event-id must have 1 to 200 characters")
    kafka = settings.kafka
    topic = arguments.topic or kafka.upload_topics[0]
    ensure_topics(kafka, Deadline(min(TOPIC_WAIT_S, kafka.startup_timeout_s)), topics=[topic])
    sender = _Sender(kafka, topic, arguments)
    for source in _each(sources):
        sender.send(source, arguments.event_id or str(uuid.uuid4()))
    sender.close()
    if sender.taken + sender.failed == 0:
        print("worker submit: no images found", file=sys.stderr)
        return 1
    if sender.failed:
        print(f"worker submit: {sender.failed} of {sender.taken + sender.failed} events were not published", file=sys.stderr)
    return 1 if sender.failed else 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An event without an acknowledgement yet."""

    future: Any
    event_id: str
    name: str
    size_bytes: int


class _Sender:
    """Publishes with a bounded number of events and bytes in flight; prints them as they are acknowledged."""

    def __init__(self, settings: KafkaSettings, topic: str, arguments: argparse.Namespace) -> None:
        compression = arguments.compression or settings.compression
        self._producer = open_producer(
            settings,
            compression_type=None if compression == "none" else compression,
            delivery_timeout_ms=2 * settings.request_timeout_ms + 1_000,
            # One event that the broker refuses must not end the producer for those behind it (see stages/publish.py).
            enable_idempotence=False,
        )
        self._topic = topic
        self._arguments = arguments
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self.taken = 0
        self.failed = 0

    def send(self, source: Path | str, event_id: str) -> None:
        """Publish one event; waits for earlier ones when too many are in flight."""
        from kafka.errors import KafkaError

        name = mask_urls(source) if isinstance(source, str) else str(source)
        try:
            value, headers = self._event(source, event_id)
            future = self._producer.send(self._topic, value=value, key=event_id.encode(), headers=headers)
        except OSError as error:
            self._fail(name, error.strerror or str(error))
            return
        except KafkaError as error:
            self._fail(name, describe(error))
            return
        self._waiting.append(_Waiting(future, event_id, name, len(value)))
        self._waiting_bytes += len(value)
        while len(self._waiting) > MAX_WAITING or self._waiting_bytes > MAX_WAITING_BYTES:
            self._settle()

    def close(self) -> None:
        """Wait for all of them."""
        while self._waiting:
            self._settle()
        self._producer.close()

    def _event(self, source: Path | str, event_id: str) -> tuple[bytes, list[tuple[str, bytes]]]:
        arguments = self._arguments
        if isinstance(source, Path) and arguments.inline:
            kind = mimetypes.guess_type(source.name)[0] or ""
            headers = [
                ("content-type", kind.encode() if kind.startswith("image/") else b"image/*"),
                ("event_id", event_id.encode()),
            ]
            if arguments.tenant is not None:
                headers.append(("tenant", arguments.tenant.encode()))
            if arguments.priority is not None:
                headers.append(("priority", str(arguments.priority).encode()))
            return source.read_bytes(), headers
        url = source if isinstance(source, str) else source.absolute().as_uri()
        body: dict[str, Any] = {"event_id": event_id, "image": {"url": url}}
        if arguments.tenant is not None:
            body["tenant"] = arguments.tenant
        if arguments.priority is not None:
            body["priority"] = arguments.priority
        return json.dumps(body, ensure_ascii=False).encode(), [("content-type", b"application/json")]

    def _settle(self) -> None:
        from kafka.errors import KafkaError

        waiting = self._waiting.popleft()
        self._waiting_bytes -= waiting.size_bytes
        try:
            waiting.future.get()  # ends by itself: the client gives up after its delivery time-out
        except KafkaError as error:
            self._fail(waiting.name, describe(error))
            return
        self.taken += 1
        print(f"{waiting.event_id}  {waiting.name}", flush=True)

    def _fail(self, name: str, reason: str) -> None:
        self.failed += 1
        print(f"worker submit: {name}: {reason}", file=sys.stderr)


def _checked(source: str) -> Path | str:
    """A URL of a known scheme as it is, anything else as a path that exists."""
    scheme = urlsplit(source).scheme.lower() if "://" in source else ""
    if scheme in SCHEMES:
        return source
    if scheme:
        raise ConfigurationError(f"{mask_urls(source)}: unknown scheme {scheme}; known are {', '.join(SCHEMES)}")
    path = Path(source).expanduser()
    if not path.exists():
        raise ConfigurationError(f"{source}: no such file or folder")
    return path


def _each(sources: list[Path | str]) -> Iterator[Path | str]:
    """Files and URLs, folders opened, one at a time: a folder may hold millions."""
    for source in sources:
        if isinstance(source, Path) and source.is_dir():
            yield from (path for path in _walk(source) if path.suffix.lower() in SUFFIXES)
        else:
            yield source


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files below the folder, sorted within each; hidden ones and links to folders are left out."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    yield from (entry for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)


def _priority(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value
