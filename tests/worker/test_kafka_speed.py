"""The faster reading of kafka-python's frames: the same bytes, the same ends."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import errors
from kafka.net import transport
from kafka.protocol import frame

from worker import kafka_speed


def test_it_fits_the_installed_client_and_may_be_applied_again() -> None:
    assert kafka_speed.apply()
    assert kafka_speed.apply()
    assert transport.KafkaTCPTransport._sock_recv is kafka_speed._sock_recv
    assert transport.KafkaSSLTransport._sock_recv is not kafka_speed._sock_recv, "TLS keeps its own"


def test_a_client_that_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any) -> None: ...

    monkeypatch.setattr(transport.KafkaTCPTransport, "_sock_recv", other)
    assert not kafka_speed.apply()
    assert transport.KafkaTCPTransport._sock_recv is other


@given(data=st.binary(max_size=200), sizes=st.lists(st.one_of(st.none(), st.integers(0, 80)), max_size=8))
def test_reading_gives_what_slicing_gives(data: bytes, sizes: list[int | None]) -> None:
    buffer = frame.KafkaBytes(len(data))
    buffer.write(data)
    buffer.seek(0)
    at = 0
    for size in sizes:
        expected = data[at:] if size is None else data[at : at + size]
        assert kafka_speed._read(buffer, size) == expected
        at += len(expected)
        assert buffer.tell() == at


def test_a_socket_gives_all_it_holds_then_nothing_then_its_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        client = SimpleNamespace(_sock=ours)
        assert kafka_speed._sock_recv(client) == (b"", None)
        theirs.sendall(b"x" * 50_000)
        assert kafka_speed._sock_recv(client) == (b"x" * 50_000, None)
        theirs.close()
        data, error = kafka_speed._sock_recv(client)
        assert data == b"" and isinstance(error, errors.KafkaConnectionError)
        ours.close()
        data, error = kafka_speed._sock_recv(client)
        assert data == b"" and isinstance(error, errors.KafkaConnectionError)
