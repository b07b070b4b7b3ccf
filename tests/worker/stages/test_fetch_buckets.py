"""s3 through a real S3-compatible server (moto), and both stores through servers that misbehave."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from tests.worker.stages.fetch_servers import RawServer, answer, drip, make_fetcher, make_item, reset
from worker.errors import Code, ItemError, TransientItemError

OBJECT_HEADERS = ('ETag: "1"', "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "STORAGE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def outcome(url: str, **options: object) -> bytes | ItemError:
    fetcher = make_fetcher(**options)
    try:
        return fetcher.fetch(make_item(url)).data
    except ItemError as error:
        assert isinstance(error, TransientItemError) == (error.code in (Code.FETCH_TIMEOUT, Code.FETCH_UNAVAILABLE))
        assert "127.0.0.1" not in error.message and "\n" not in error.message and "169.254" not in error.message
        return error
    finally:
        fetcher.close()


def code(url: str, **options: object) -> Code:
    found = outcome(url, **options)
    assert isinstance(found, ItemError)
    return found.code


# --- a real S3-compatible server ----------------------------------------------------------------------------------

KEYS = [
    "a/b.png",
    "plain",
    "a b+c&d=e;f@g:h,i!j'k(l)m*n.png",
    "ü/日本/é.png",
    "%20a%2Fb%zz",
    "a?b#c",
    'q"<>[]{}|\\^`~',
    "..a/.b/c..",
]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Endpoint of a server with bucket `uploads`; each key holds its own name."""
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    secrets = {"aws_access_key_id": "id", "aws_secret_access_key": "key", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **secrets)
    client.create_bucket(Bucket="uploads")
    client.create_bucket(Bucket="second")
    for key in KEYS:
        client.put_object(Bucket="uploads", Key=key, Body=key.encode())
    client.put_object(Bucket="uploads", Key="big", Body=b"x" * 3_000_000)
    client.put_object(Bucket="uploads", Key="empty", Body=b"")
    client.put_object(Bucket="uploads", Key="public", Body=b"for all", ACL="public-read")
    client.put_object(Bucket="second", Key="other", Body=b"second")
    yield endpoint
    server.stop()


@pytest.fixture
def s3_environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    return s3


def test_objects_are_read_by_their_literal_key(s3_environment: str) -> None:
    fetcher = make_fetcher()
    for key in KEYS:
        assert fetcher.fetch(make_item(f"s3://uploads/{key}")).data == key.encode(), key
    assert fetcher.fetch(make_item("s3://second/other")).data == b"second"
    assert fetcher.fetch(make_item("s3://uploads/empty")).data == b""
    fetcher.close()


def test_missing_objects_and_buckets(s3_environment: str) -> None:
    assert code("s3://uploads/missing") is Code.FETCH_NOT_FOUND
    assert code("s3://no-such-bucket/a.png") is Code.FETCH_NOT_FOUND


def test_the_size_limit(s3_environment: str) -> None:
    assert code("s3://uploads/big", max_bytes=2_999_999) is Code.FETCH_TOO_LARGE
    assert outcome("s3://uploads/big", max_bytes=3_000_000) == b"x" * 3_000_000


def test_allowed_buckets(s3_environment: str) -> None:
    assert outcome("s3://second/other", allowed_buckets=("second",)) == b"second"
    assert code("s3://uploads/plain", allowed_buckets=("second",)) is Code.FETCH_DENIED


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_anonymous_access_at_the_endpoint_of_each_standard_variable(
    s3: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, s3)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert outcome("s3://uploads/public") == b"for all"
    assert code("s3://uploads/plain") is Code.FETCH_DENIED


def test_many_threads_and_few_stores(s3_environment: str) -> None:
    fetcher = make_fetcher(concurrency=8)
    wrong: list[object] = []

    def work() -> None:
        for turn in range(20):
            try:
                data = fetcher.fetch(make_item("s3://uploads/plain" if turn % 2 else "s3://second/other")).data
                if data != (b"plain" if turn % 2 else b"second"):
                    wrong.append(data)
            except ItemError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(40):
        with pytest.raises(ItemError):
            fetcher.fetch(make_item(f"s3://bucket-{number}/x"))
    assert wrong == []
    assert len(fetcher._buckets._stores) == 32
    fetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch-buckets"]


# --- servers that misbehave ---------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, RawServer]]:
    """A scheme, and the server that stands for its whole world."""
    server = RawServer()
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url(""))
    yield request.param, server
    server.close()


def test_an_object_arrives(store: tuple[str, RawServer]) -> None:
    scheme, server = store
    server.fixed("/bucket", answer(200, b"image", *OBJECT_HEADERS))
    assert outcome(f"{scheme}://bucket/dir/a b.png") == b"image"
    target = server.requests[0].split(b" ")[1].decode()
    assert unquote(target) == "/bucket/dir/a b.png"
    assert b"authorization" not in server.requests[0].lower()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, Code.FETCH_UNAVAILABLE),
        (401, Code.FETCH_DENIED),
        (403, Code.FETCH_DENIED),
        (404, Code.FETCH_NOT_FOUND),
        (429, Code.FETCH_UNAVAILABLE),
        (500, Code.FETCH_UNAVAILABLE),
        (503, Code.FETCH_UNAVAILABLE),
    ],
)
def test_statuses_in_one_attempt(store: tuple[str, RawServer], status: int, expected: Code) -> None:
    scheme, server = store
    server.fixed("/bucket", answer(status, b"<Error/>"))
    assert code(f"{scheme}://bucket/a") is expected
    assert len(server.requests) == 1


@pytest.mark.timing
def test_an_object_that_says_it_is_too_large_is_not_read(store: tuple[str, RawServer]) -> None:
    scheme, server = store
    head = ["HTTP/1.1 200 OK", "Content-Length: 5000000000", *OBJECT_HEADERS, "", ""]
    server.routes["/bucket"] = drip(["\r\n".join(head).encode(), *([b"x"] * 1_000)], 0.05, server.closing)
    started = time.monotonic()
    assert code(f"{scheme}://bucket/a") is Code.FETCH_TOO_LARGE
    assert time.monotonic() - started < 1.5


@pytest.mark.timing
@pytest.mark.parametrize("when", ["silent", "slow body"])
def test_the_deadline_holds(store: tuple[str, RawServer], when: str) -> None:
    scheme, server = store
    head = "\r\n".join(["HTTP/1.1 200 OK", "Content-Length: 1000", *OBJECT_HEADERS, "", ""]).encode()
    parts = [b""] * 100 if when == "silent" else [head, *([b"x"] * 1_000)]
    server.routes["/bucket"] = drip(parts, 0.05, server.closing)
    started = time.monotonic()
    assert code(f"{scheme}://bucket/a", timeout_s=0.5) is Code.FETCH_TIMEOUT
    assert time.monotonic() - started < 1.5


def test_broken_transfers_are_unavailable(store: tuple[str, RawServer]) -> None:
    scheme, server = store
    head = "\r\n".join(["HTTP/1.1 200 OK", "Content-Length: 1000", *OBJECT_HEADERS, "", ""]).encode()
    server.routes["/bucket/cut"] = drip([head, b"half"], 0, server.closing)
    server.routes["/bucket/reset"] = reset
    server.routes["/bucket/ssh"] = drip([b"SSH-2.0\r\n"], 0, server.closing)
    for key in ("cut", "reset", "ssh"):
        assert code(f"{scheme}://bucket/{key}") is Code.FETCH_UNAVAILABLE, key
    server.close()


def test_nobody_listens(store: tuple[str, RawServer]) -> None:
    scheme, server = store
    server.close()
    assert code(f"{scheme}://bucket/a") is Code.FETCH_UNAVAILABLE


def test_a_failing_bucket_is_left_alone_others_are_not(store: tuple[str, RawServer]) -> None:
    scheme, server = store
    server.fixed("/down", answer(503))
    server.fixed("/fine", answer(200, b"image", *OBJECT_HEADERS))
    fetcher = make_fetcher(breaker_failures=2)
    attempted = []
    for _ in range(4):
        with pytest.raises(TransientItemError) as error:
            fetcher.fetch(make_item(f"{scheme}://down/a"))
        attempted.append(error.value.attempted)
    assert attempted == [True, True, False, False]
    assert fetcher.fetch(make_item(f"{scheme}://fine/a")).data == b"image"
    fetcher.close()


def test_keys_the_client_could_not_name_exactly_never_reach_it(store: tuple[str, RawServer]) -> None:
    scheme, server = store
    for key in ("a/../b", "/a", "a/", "a//b", "./a"):
        assert code(f"{scheme}://bucket/{key}") is Code.FETCH_DENIED
    assert server.connections == 0


def test_the_emulator_variable_may_leave_out_the_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RawServer()
    server.fixed("/bucket", answer(200, b"image", *OBJECT_HEADERS))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.port}")
    assert outcome("gs://bucket/a") == b"image"
    server.close()


def test_a_wrong_configuration_is_not_the_event_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "/no/such/file.json")
    assert code("gs://bucket/a") is Code.FETCH_UNAVAILABLE
