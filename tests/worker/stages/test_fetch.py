"""The fetcher as the pipeline sees it: bytes and digest of every form of event, or the contract's code."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.stages.fetch_servers import RawServer, answer, make_fetcher, make_item
from worker.clock import SystemClock
from worker.errors import Code, ConfigurationError, ItemError
from worker.image_room import RoomWanted
from worker.settings import FetchSettings
from worker.stages.fetch import Fetcher

BODY = b"\xff\xd8\xff image"
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def sources(tmp_path: Path) -> object:
    server = RawServer()
    (tmp_path / "a.jpg").write_bytes(BODY)
    yield {
        "inline": make_item(inline=BODY),
        "http": make_item(server.fixed("/a", answer(200, BODY))),
        "file": make_item((tmp_path / "a.jpg").as_uri()),
    }
    server.close()


@pytest.mark.parametrize("form", ["inline", "http", "file"])
def test_every_form_gives_bytes_and_digest(sources: dict[str, object], tmp_path: Path, form: str) -> None:
    fetcher = make_fetcher(file_roots=(tmp_path,))
    item = sources[form]
    fetched = fetcher.fetch(item)  # type: ignore[arg-type]
    assert (fetched.item, fetched.data, fetched.sha256) == (item, BODY, DIGEST)
    fetcher.close()


@pytest.mark.parametrize("form", ["inline", "http", "file"])
@pytest.mark.parametrize("expected", [DIGEST, DIGEST.upper(), "0" * 64])
def test_the_digest_is_checked_for_every_form(sources: dict[str, object], tmp_path: Path, form: str, expected: str) -> None:
    fetcher = make_fetcher(file_roots=(tmp_path,))
    event = sources[form].event  # type: ignore[attr-defined]
    item = make_item(event.url, event.inline, expected)
    if expected.lower() == DIGEST:
        assert fetcher.fetch(item).sha256 == DIGEST
    else:
        with pytest.raises(ItemError) as error:
            fetcher.fetch(item)
        assert error.value.code is Code.FETCH_HASH_MISMATCH
    fetcher.close()


def test_inline_bytes_have_the_same_limit() -> None:
    fetcher = make_fetcher(max_bytes=len(BODY))
    assert fetcher.fetch(make_item(inline=BODY)).data == BODY
    with pytest.raises(ItemError) as error:
        fetcher.fetch(make_item(inline=BODY + b"x"))
    assert error.value.code is Code.FETCH_TOO_LARGE
    fetcher.close()


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a", "data:image/png;base64,AAAA", "/etc/passwd", "", "azure://c/b", "s3a://b/k"]
)
def test_other_schemes_are_denied(url: str) -> None:
    fetcher = make_fetcher()
    with pytest.raises(ItemError) as error:
        fetcher.fetch(make_item(url))
    assert error.value.code is Code.FETCH_DENIED
    fetcher.close()


def test_by_default_no_file_and_no_private_address_is_reached(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(BODY)
    server = RawServer()
    fetcher = Fetcher(FetchSettings(), SystemClock())
    for url in ((tmp_path / "a.jpg").as_uri(), server.url("/a"), server.url("/a", host="localhost")):
        with pytest.raises(ItemError) as error:
            fetcher.fetch(make_item(url))
        assert error.value.code is Code.FETCH_DENIED
    assert server.connections == 0
    fetcher.close()
    server.close()


def test_wrong_hosts_are_found_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="WORKER_FETCH__ALLOWED_HOSTS"):
        make_fetcher(allowed_hosts=("https://example.org",))


def test_the_import_leaves_the_object_stores_for_later() -> None:
    code = "import sys, worker.stages.fetch; print([m for m in ('obstore', 'asyncio.events', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "obstore" not in done.stdout and "torch" not in done.stdout


class Held:
    """Notes what it is told; refuses from `limit` on."""

    def __init__(self, limit: int = 10**9) -> None:
        self.told: list[int] = []
        self.limit = limit

    def __call__(self, image_bytes: int) -> None:
        self.told.append(image_bytes)
        if image_bytes > self.limit:
            raise RoomWanted(image_bytes)


def test_the_size_is_told_before_the_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(BODY)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    server, fetcher = RawServer(), make_fetcher(file_roots=(tmp_path,), max_bytes=1000)
    for url, told in (
        (server.fixed("/plain", answer(200, BODY)), len(BODY)),
        (server.fixed("/chunked", chunked), 1000),
        (server.fixed("/packed", answer(200, gzip.compress(BODY), "Content-Encoding: gzip")), 1000),
        (path.as_uri(), len(BODY)),
    ):
        held = Held()
        assert fetcher.fetch(make_item(url), held).data == BODY
        assert held.told == [told], url
    fetcher.close()
    server.close()


def test_without_room_the_attempt_ends_and_the_host_is_not_blamed() -> None:
    server, fetcher = RawServer(), make_fetcher(breaker_failures=1)
    url = server.fixed("/a", answer(200, BODY))
    for _ in range(3):
        with pytest.raises(RoomWanted):
            fetcher.fetch(make_item(url), Held(limit=len(BODY) - 1))
    assert fetcher.fetch(make_item(url)).data == BODY
    fetcher.close()
    server.close()
