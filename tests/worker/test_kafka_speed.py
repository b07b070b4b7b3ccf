"""The faster reading of kafka-python's frames: the same bytes, the same ends."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import errors
from kafka.net import selector, transport
from kafka.producer.record_accumulator import RecordAccumulator
from kafka.protocol import frame
from kafka.structs import TopicPartition

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
        client = SimpleNamespace(_sock=ours, _protocol=object())
        assert kafka_speed._sock_recv(client) == (b"", None)
        theirs.sendall(b"x" * 50_000)
        assert kafka_speed._sock_recv(client) == (b"x" * 50_000, None)
        theirs.close()
        data, error = kafka_speed._sock_recv(client)
        assert data == b"" and isinstance(error, errors.KafkaConnectionError)
        ours.close()
        data, error = kafka_speed._sock_recv(client)
        assert data == b"" and isinstance(error, errors.KafkaConnectionError)


def test_a_transport_that_was_closed_meanwhile_has_ended() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"late")
        for transport in (SimpleNamespace(_sock=None, _protocol=object()), SimpleNamespace(_sock=ours, _protocol=None)):
            data, error = kafka_speed._sock_recv(transport)
            assert data == b"" and isinstance(error, errors.KafkaConnectionError)


def test_a_loop_hears_of_everything_though_most_wake_ups_are_spared() -> None:
    """Lost wake-ups would show as a wait for the loop's own time-out, 30 s."""
    assert kafka_speed.apply()
    net = selector.NetworkSelector()
    net.start()
    sent = []
    original = kafka_speed._originals["wakeup"]
    kafka_speed._originals["wakeup"] = lambda self: (sent.append(1), original(self))
    try:
        done = threading.Semaphore(0)

        def ask() -> None:
            for _ in range(500):
                net.call_soon_threadsafe(done.release)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(2_000):
            assert done.acquire(timeout=10)
        for thread in threads:
            thread.join()
        time.sleep(0.05)  # asleep again: one more has to wake it
        net.call_soon_threadsafe(done.release)
        assert done.acquire(timeout=10)
        assert len(sent) < 2_001
    finally:
        kafka_speed._originals["wakeup"] = original
        net.close()


def test_a_socket_is_registered_for_reading_and_then_for_writing_too() -> None:
    assert kafka_speed.apply()
    net = selector.NetworkSelector()
    ours, theirs = socket.socketpair()
    try:
        reader, writer = selector.Task(lambda: None), selector.Task(lambda: None)
        net.register_event(ours, selectors.EVENT_READ, reader)
        net.register_event(ours, selectors.EVENT_WRITE, writer)
        key = net._selector.get_key(ours)
        assert key.data == (reader, writer) and key.events == selectors.EVENT_READ | selectors.EVENT_WRITE
        with pytest.raises(RuntimeError):
            net.register_event(ours, selectors.EVENT_READ, reader)
        net.unregister_event(ours, selectors.EVENT_WRITE)
        net.unregister_event(ours, selectors.EVENT_READ)
        ours.close()
        with pytest.raises(ValueError):
            net.register_event(ours, selectors.EVENT_READ, reader)
    finally:
        theirs.close()
        net.close()


def test_the_wait_for_company_is_an_option_that_the_client_reads_anew() -> None:
    accumulator = RecordAccumulator(linger_ms=5, batch_size=1 << 20)
    cluster = SimpleNamespace(leader_for_partition=lambda _: 0)
    moment = time.monotonic()
    accumulator.append(TopicPartition("t", 0), None, None, b"x", [], now=moment)
    assert accumulator.ready(cluster, now=moment + 0.01)[0] == {0}
    kafka_speed.linger(SimpleNamespace(_accumulator=accumulator), 20)
    assert accumulator.ready(cluster, now=moment + 0.01)[0] == set()
    kafka_speed.linger(SimpleNamespace(), 20)  # another client: left alone
