"""From a label to the image it is about: wherever the bytes come from, they count only if their SHA-256 is the label's.

Asked in this order: the file of a labelled folder; the job's own archive of images it has found before; folders that are named by
digest; the upload event where it stands in its topic (an image that came inside it); the event's or the label's address, where
the operator has allowed its bucket, host or folder. Nothing else is ever opened: labels and uploads are written by others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from train.data import DataError
from train.labels import Label, Tally
from train.labels_buckets import read_object
from train.labels_topic import KafkaOptions, TopicError, UploadReader

MAX_IMAGE_BYTES = 50 * 2**20
TIMEOUT_S = 20.0
SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".heic", ".tiff", ".bmp")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be opened. `folders`: files named `<sha256>[.ext]`; `file_roots`, `buckets`, `hosts`: for addresses."""

    folders: tuple[Path, ...] = ()
    file_roots: tuple[Path, ...] = ()
    buckets: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    max_bytes: int = MAX_IMAGE_BYTES


@dataclass(slots=True)
class Images:
    """Finds images and keeps them in `archive`, by digest; `counts` says where they came from."""

    archive: Path
    allowed: Allowed
    uploads: UploadReader | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def find(self, label: Label) -> Path:
        """The file with the label's image.

        Raises:
            LookupError: it cannot be had; the message is the reason, the same for all of a kind.
        """
        kept = self.archive / label.sha256[:2] / label.sha256
        if kept.is_file():
            return self._counted("archive", kept)
        problems: list[str] = []
        for origin, read in self._ways(label):
            try:
                data = read()
            except (LookupError, TopicError, OSError, ValueError) as exc:
                problems.append(_reason(exc))
                continue
            if hashlib.sha256(data).hexdigest() != label.sha256:
                problems.append(f"{origin} holds another image now")
                continue
            _write(kept, data)
            return self._counted(origin, kept)
        raise LookupError(problems[-1] if problems else "no reference that may be opened")

    def _counted(self, origin: str, path: Path) -> Path:
        self.counts[origin] = self.counts.get(origin, 0) + 1
        return path

    def _ways(self, label: Label) -> Iterable[tuple[str, Callable[[], bytes]]]:
        """Lazily, so that nothing is asked of a broker or host where the image is at hand."""
        most = self.allowed.max_bytes
        if label.path is not None:
            path = label.path
            yield "labelled folder", lambda: _read_file(path, most)
        for folder in self.allowed.folders:
            for suffix in SUFFIXES:
                for place in (folder / f"{label.sha256}{suffix}", folder / label.sha256[:2] / f"{label.sha256}{suffix}"):
                    if place.is_file():
                        yield "image folder", lambda place=place: _read_file(place, most)  # type: ignore[misc]
        url = label.url
        if label.upload is not None and self.uploads is not None:
            event: dict[str, Any] = {}

            def inline() -> bytes:
                event.update(self._event(label))
                if event["data"] is None:
                    raise LookupError("the image is not inside its upload event")
                return bytes(event["data"])

            yield "upload event", inline
            # Addresses in labels have lost their query, where a signature may stand; the event has all of it.
            url = event.get("url") or url
        if url is not None:
            address = url
            yield "address", lambda: _read_address(address, self.allowed)

    def _event(self, label: Label) -> dict[str, Any]:
        """Image bytes and address of the upload event, None where it has no such."""
        if self.uploads is None or label.upload is None:
            raise LookupError("no reference to an upload")
        value, headers = self.uploads.read(label.upload)
        kind = headers.get("content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind.startswith("image/"):
            return {"data": value, "url": None}
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            raise LookupError("the upload event cannot be read") from None
        if kind.startswith("application/cloudevents") and isinstance(found, dict):
            found = found.get("data")
        image = found.get("image") if isinstance(found, dict) else None
        image = image if isinstance(image, dict) else {}
        text, url = image.get("bytes"), image.get("url")
        try:
            data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
        except (binascii.Error, ValueError):
            raise LookupError("the upload event's image is not base64") from None
        return {"data": data, "url": url if isinstance(url, str) else None}


def found_images(
    labels: Iterable[Label], archive: Path, allowed: Allowed, kafka: KafkaOptions | None, tally: Tally
) -> list[tuple[Label, Path]]:
    """`collect`, with the upload topics of `kafka` where it is given."""
    uploads = UploadReader(kafka) if kafka is not None else None
    try:
        return collect(labels, Images(archive, allowed, uploads), tally)
    finally:
        if uploads is not None:
            uploads.close()


def collect(labels: Iterable[Label], images: Images, tally: Tally) -> list[tuple[Label, Path]]:
    """The labels whose image could be had, with its file; the others are counted by reason."""
    found = []
    for label in labels:
        try:
            found.append((label, images.find(label)))
        except LookupError as exc:
            tally.skip(f"image not to be had: {exc.args[0]}", label.sha256[:16])
    return found


def _reason(exc: Exception) -> str:
    if isinstance(exc, TopicError):
        return "the upload's topic cannot be read"
    return str(exc.args[0]) if isinstance(exc, LookupError) and exc.args else type(exc).__name__


def _read_address(url: str, allowed: Allowed) -> bytes:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return _read_file(_inside(Path(unquote(parts.path)), allowed.file_roots), allowed.max_bytes)
    if parts.scheme in ("s3", "gs"):
        if parts.netloc not in allowed.buckets:
            raise LookupError(f"bucket not allowed: {parts.netloc[:80]}")
        return read_object(parts.scheme, parts.netloc, unquote(parts.path.lstrip("/")), allowed.max_bytes)
    if parts.scheme in ("http", "https"):
        if (parts.hostname or "") not in allowed.hosts:
            raise LookupError(f"host not allowed: {(parts.hostname or '')[:80]}")
        return _read_http(url, allowed.max_bytes)
    raise LookupError(f"scheme not allowed: {parts.scheme[:20]}")


def _inside(path: Path, roots: tuple[Path, ...]) -> Path:
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(Path(os.path.realpath(root))) for root in roots):
        raise LookupError("file outside the allowed folders")
    return real


def _read_file(path: Path, max_bytes: int) -> bytes:
    # Non-blocking, so that a pipe in the place of a file is not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        return _within(stream.read(max_bytes + 1), max_bytes)


def _read_http(url: str, max_bytes: int) -> bytes:
    """One answer from a host that the operator has named; redirects are not followed."""
    import httpcore

    timeout = {"connect": TIMEOUT_S, "read": TIMEOUT_S, "write": TIMEOUT_S, "pool": TIMEOUT_S}
    try:
        with (
            httpcore.ConnectionPool() as pool,
            pool.stream("GET", url, headers={"accept": "image/*"}, extensions={"timeout": timeout}) as answer,
        ):
            if answer.status != 200:
                raise LookupError(f"the host answered {answer.status}")
            data = bytearray()
            for chunk in answer.iter_stream():
                data += chunk
                if len(data) > max_bytes:
                    raise LookupError("image too large")
            return bytes(data)
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.UnsupportedProtocol) as exc:
        raise LookupError(f"the host cannot be reached ({type(exc).__name__})") from exc


def _within(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise LookupError("image too large")
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as exc:
        raise DataError(f"{path.parent}: cannot be written: {exc.strerror or exc}") from exc
