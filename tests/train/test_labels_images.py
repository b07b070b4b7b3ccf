"""From a label to its image: every way there is, what is allowed, and that only the labelled bytes count."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from train.labels import Label, Tally, Upload
from train.labels_images import Allowed, Images, collect
from train.labels_topic import TopicError, UploadReader

DATA = b"\xff\xd8\xff the bytes of an image"
SHA = hashlib.sha256(DATA).hexdigest()
PLACE = Upload("image.uploads", 0, 7)


def label(**fields: object) -> Label:
    return Label(SHA, 1, "ada", "2026-01-01T00:00:00Z", "1", **fields)  # type: ignore[arg-type]


class Uploads(UploadReader):
    """A topic with one record, or a trouble."""

    def __init__(self, value: bytes = b"", content_type: str = "application/json", trouble: Exception | None = None) -> None:
        self._record = (value, {"content-type": content_type.encode()})
        self._trouble = trouble

    def read(self, upload: Upload) -> tuple[bytes, dict[str, bytes]]:
        if self._trouble is not None:
            raise self._trouble
        return self._record


def why_not(images: Images, one: Label) -> str:
    with pytest.raises(LookupError) as caught:
        images.find(one)
    return str(caught.value.args[0])


def test_folders_by_digest_and_the_archive_that_remembers(tmp_path: Path) -> None:
    store, archive = tmp_path / "store", tmp_path / "archive"
    (store / SHA[:2]).mkdir(parents=True)
    (store / SHA[:2] / f"{SHA}.jpg").write_bytes(DATA)
    first = Images(archive, Allowed(folders=(store,)))
    assert first.find(label()).read_bytes() == DATA and first.counts == {"image folder": 1}
    again = Images(archive, Allowed())
    assert again.find(label()).read_bytes() == DATA and again.counts == {"archive": 1}


@pytest.mark.parametrize(
    ("value", "content_type"),
    [
        (DATA, "image/jpeg"),
        (json.dumps({"event_id": "e", "image": {"bytes": base64.b64encode(DATA).decode()}}).encode(), "application/json"),
        (
            json.dumps({"specversion": "1.0", "id": "e", "data": {"image": {"bytes": base64.b64encode(DATA).decode()}}}).encode(),
            "application/cloudevents+json; charset=utf-8",
        ),
    ],
)
def test_images_inside_upload_events(tmp_path: Path, value: bytes, content_type: str) -> None:
    images = Images(tmp_path, Allowed(), Uploads(value, content_type))
    assert images.find(label(upload=PLACE)).read_bytes() == DATA and images.counts == {"upload event": 1}


@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b'{"image": 3}', b'{"image": {"bytes": "%%%"}}', b'{"image": {"bytes": 7}}', b"\xff"]
)
def test_events_without_a_usable_image_cost_that_label_alone(tmp_path: Path, value: bytes) -> None:
    images, tally = Images(tmp_path, Allowed(), Uploads(value)), Tally()
    assert collect([label(upload=PLACE)], images, tally) == [] and sum(tally.skipped.values()) == 1


def test_an_upload_that_is_gone_and_a_topic_in_trouble(tmp_path: Path) -> None:
    gone = Images(tmp_path, Allowed(), Uploads(trouble=LookupError("the upload is no longer in its topic")))
    assert why_not(gone, label(upload=PLACE)) == "the upload is no longer in its topic"
    trouble = Images(tmp_path, Allowed(), Uploads(trouble=TopicError("Kafka topic x: secret address")))
    assert why_not(trouble, label(upload=PLACE)) == "the upload's topic cannot be read"


def test_other_bytes_than_the_labelled_ones_never_count(tmp_path: Path) -> None:
    images = Images(tmp_path, Allowed(), Uploads(DATA + b"!", "image/jpeg"))
    assert "another image" in why_not(images, label(upload=PLACE))
    assert not list(tmp_path.rglob("*.jpg")) and not (tmp_path / SHA[:2] / SHA).exists()


def test_addresses_are_opened_only_where_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "a.jpg").write_bytes(DATA)
    (outside / "a.jpg").write_bytes(DATA)
    (inside / "link.jpg").symlink_to(outside / "a.jpg")
    images = Images(tmp_path / "archive", Allowed(file_roots=(inside,)))
    for url, reason in (
        (f"file://{outside}/a.jpg", "outside the allowed folders"),
        (f"file://{inside}/../out/a.jpg", "outside the allowed folders"),
        (f"file://{inside}/link.jpg", "outside the allowed folders"),
        ("s3://secrets/k", "bucket not allowed"),
        ("gs://secrets/k", "bucket not allowed"),
        ("http://169.254.169.254/latest", "host not allowed"),
        ("https://user@elsewhere.example/x", "host not allowed"),
        ("ftp://x/y", "scheme not allowed"),
        ("http://[", "ValueError"),
    ):
        assert reason in why_not(images, label(url=url)), url
    assert images.find(label(url=f"file://{inside}/a.jpg")).read_bytes() == DATA


def test_sizes_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(DATA)
    images = Images(tmp_path / "archive", Allowed(file_roots=(tmp_path,), max_bytes=len(DATA) - 1))
    assert why_not(images, label(url=f"file://{tmp_path}/a.jpg")) == "image too large"


class Site(BaseHTTPRequestHandler):
    """/image needs its query, as a signed address does; /moved leads to it; /big has no end."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/image?signature=1")
            self.end_headers()
            return
        if self.path.startswith("/image") and "signature=1" not in self.path:
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(DATA * (50 if self.path == "/big" else 1))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_hosts_that_the_operator_has_named(tmp_path: Path, site: str) -> None:
    allowed = Allowed(hosts=frozenset({"127.0.0.1"}), max_bytes=len(DATA) * 4)
    images = Images(tmp_path, allowed)
    assert "answered 403" in why_not(images, label(url=f"{site}/image"))
    assert "answered 302" in why_not(images, label(url=f"{site}/moved"))
    assert why_not(images, label(url=f"{site}/big")) == "image too large"
    assert "cannot be reached" in why_not(images, label(url="http://127.0.0.1:1/x"))
    # The label's address has lost its query; the upload event has it still.
    event = json.dumps({"event_id": "e", "image": {"url": f"{site}/image?signature=1"}}).encode()
    signed = Images(tmp_path, allowed, Uploads(event))
    assert signed.find(label(upload=PLACE, url=f"{site}/image")).read_bytes() == DATA
