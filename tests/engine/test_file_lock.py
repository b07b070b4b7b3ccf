"""Locks between processes: one at a time, free again when a holder dies, leases where there is no flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import file_lock
from engine.file_lock import LockTimeout, hold

HOLDER = """
import sys, time
from pathlib import Path
from engine.file_lock import hold
with hold(Path(sys.argv[1]), 10):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:  # type: ignore[misc]
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_that_is_held_is_waited_for_and_then_named(other: subprocess.Popen[str], tmp_path: Path) -> None:
    waits: list[int] = []
    with pytest.raises(LockTimeout, match="lock: another process"), hold(tmp_path / "lock", 0.5, lambda: waits.append(1)):
        pass
    assert waits == [1]


def test_the_lock_of_a_killed_process_is_free(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    with hold(tmp_path / "lock", 5):
        pass


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    inside, most = 0, 0
    counter = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with hold(tmp_path / "lock", 30):
            with counter:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with counter:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_lease_where_there_is_no_flock(no_flock: None, tmp_path: Path) -> None:
    lease = tmp_path / "lock.lease"
    with hold(tmp_path / "lock", 5):
        assert json.loads(lease.read_text())["pid"] == os.getpid()
        with pytest.raises(LockTimeout), hold(tmp_path / "lock", 0.3):
            pass
    assert not lease.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_a_lease_of_a_dead_process_is_taken(no_flock: None, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease = tmp_path / "lock.lease"
    lease.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid, "token": "x"}))
    with hold(tmp_path / "lock", 5):
        assert json.loads(lease.read_text())["token"] != "x"


def test_a_lease_of_another_machine_is_taken_only_when_it_is_silent(no_flock: None, tmp_path: Path) -> None:
    lease = tmp_path / "lock.lease"
    lease.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "token": "x"}))
    with pytest.raises(LockTimeout), hold(tmp_path / "lock", 0.5):
        pass
    assert json.loads(lease.read_text())["token"] == "x"
    silent = time.time() - file_lock.LEASE_S - 1
    os.utime(lease, (silent, silent))
    with hold(tmp_path / "lock", 5):
        pass


def test_a_lease_is_touched_while_it_is_held(no_flock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "LEASE_S", 0.2)
    with hold(tmp_path / "lock", 5):
        lease = tmp_path / "lock.lease"
        os.utime(lease, (0, 0))
        deadline = time.monotonic() + 5
        while lease.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lease.stat().st_mtime > 0


def test_other_errors_are_not_taken_for_missing_locks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), hold(tmp_path / "missing" / "lock", 1):
        pass
