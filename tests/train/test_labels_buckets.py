"""s3 and gs addresses of labels, through a local server that stands for the object store."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest

pytest.importorskip("obstore")

from train.labels import Label
from train.labels_images import Allowed, Images

DATA = b"\xff\xd8\xff the bytes of an image"
SHA = hashlib.sha256(DATA).hexdigest()


class Store(BaseHTTPRequestHandler):
    """Bucket `uploads` with one object."""

    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.asked.append(path)
        status, body = {
            "/uploads/dir/a b.jpg": (200, DATA),
            "/uploads/big": (200, DATA * 50),
            "/uploads/secret": (403, b""),
            "/uploads/down": (503, b""),
        }.get(path, (404, b""))
        self.send_response(status)
        self.send_header("etag", '"1"')
        self.send_header("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["s3", "gs", "gs without a scheme"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "STORAGE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    Store.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    host = f"127.0.0.1:{server.server_port}"
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host if "without" in request.param else f"http://{host}")
    yield request.param[:2]
    server.shutdown()
    thread.join()
    server.server_close()


def test_objects_of_buckets_that_the_operator_has_named(tmp_path: Path, scheme: str) -> None:
    images = Images(tmp_path, Allowed(buckets=frozenset({"uploads"}), max_bytes=len(DATA) * 4))

    def label(key: str, bucket: str = "uploads") -> Label:
        return Label(SHA, 1, "ada", "2026-01-01T00:00:00Z", "1", url=f"{scheme}://{bucket}/{key}")

    def why_not(one: Label) -> str:
        with pytest.raises(LookupError) as caught:
            images.find(one)
        return str(caught.value.args[0])

    assert why_not(label("dir/a%20b.jpg", "other")) == "bucket not allowed: other" and not Store.asked
    assert why_not(label("big")) == "image too large"
    for key in ("gone", "secret", "down"):
        assert why_not(label(key)).startswith(f"{scheme} object not to be had (") and "127.0.0.1" not in why_not(label(key))
    assert images.find(label("dir/a%20b.jpg")).read_bytes() == DATA and images.counts == {"address": 1}
