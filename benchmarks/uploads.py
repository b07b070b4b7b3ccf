"""Upload events for the benchmarks: images inside their events, or named by address, and a host that takes its time to answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.kafka_ends import CLIENT_BATCH_BYTES
from benchmarks.kafka_ends import Uploads as Producer

HEADERS = 8 * 1024
"""Bytes of a request's head that are read at most."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One record of the upload topic."""

    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()


def inline(pictures: Sequence[bytes]) -> list[Upload]:
    """The image is the record's value; ids are `picture-0` onwards."""
    return [
        Upload(picture, (("content-type", b"image/jpeg"), ("event_id", f"picture-{number}".encode())))
        for number, picture in enumerate(pictures)
    ]


def by_reference(urls: Sequence[str]) -> list[Upload]:
    """The record names the image's address."""
    return [
        Upload(json.dumps({"event_id": f"picture-{number}", "image": {"url": url}}).encode()) for number, url in enumerate(urls)
    ]


def produce(uploads: Sequence[Upload], bootstrap: str, batch_bytes: int = CLIENT_BATCH_BYTES) -> None:
    """Into `image.uploads`, in order, dealt to its partitions one by one: who owns half of them has half of the work."""
    linger_ms = 5 if batch_bytes == CLIENT_BATCH_BYTES else 50
    producer = Producer(bootstrap, linger_ms, batch_bytes, **{"compression.type": "lz4"})
    partitions = producer.partitions("image.uploads")
    for number, upload in enumerate(uploads):
        producer.send("image.uploads", upload.value, upload.headers, number % partitions)
    producer.flush()


@contextmanager
def slow_host(picture: bytes, latency_s: float) -> Iterator[str]:
    """A web server whose every path is this picture, `latency_s` after it was asked for. Yields its address.

    It appends eight bytes that are the path's number, so that no two pictures have one digest.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(latency_s)
                number = int(head.split(b" ", 2)[1].rpartition(b"/")[2])
                body = picture + number.to_bytes(8, "big")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the other side has what it wanted
        finally:
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=HEADERS)
        started.set_result((asyncio.get_running_loop(), server.sockets[0].getsockname()[1]))
        async with server:
            await stop.wait()

    stop = asyncio.Event()
    started: Future[tuple[asyncio.AbstractEventLoop, int]] = Future()
    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="slow-host")  # run ends what is still connected
    thread.start()
    loop, port = started.result(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
