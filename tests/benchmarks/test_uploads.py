"""What the benchmarks upload: images inside their events or by address, and the host that is slow on purpose."""

from __future__ import annotations

import http.client
import json
import time
from urllib.parse import urlsplit

from benchmarks.uploads import by_reference, inline, slow_host


def test_images_inside_their_events_have_ids_of_their_own() -> None:
    first, second = inline([b"a", b"b"])
    assert (first.value, dict(first.headers)["event_id"]) == (b"a", b"picture-0")
    assert (second.value, dict(second.headers)["event_id"]) == (b"b", b"picture-1")


def test_an_address_stands_in_its_event() -> None:
    (only,) = by_reference(["http://host/7"])
    assert json.loads(only.value) == {"event_id": "picture-0", "image": {"url": "http://host/7"}} and only.headers == ()


def test_the_slow_host_takes_its_time_and_no_two_of_its_pictures_are_the_same() -> None:
    with slow_host(b"picture", 0.2) as host:
        connection = http.client.HTTPConnection(urlsplit(host).netloc, timeout=5)
        bodies = []
        for number in (3, 4):  # on one connection
            began = time.monotonic()
            connection.request("GET", f"/{number}")
            bodies.append(connection.getresponse().read())
            assert time.monotonic() - began >= 0.2
        connection.close()
    assert bodies == [b"picture" + number.to_bytes(8, "big") for number in (3, 4)]
