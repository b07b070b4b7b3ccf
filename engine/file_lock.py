"""One process at a time, also across machines on a shared volume: advisory locks, and leases where a volume has none.

`flock` is released by the kernel when its process dies. Volumes that refuse it (some network and FUSE mounts) get a lease: a file
that names its holder, is touched while the work goes on, and may be taken from a holder that is dead or silent. In the moment of
taking, a lease can end up with two holders: what it guards must survive that, as writing files atomically does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEASE_S = 60.0
"""A lease that was not touched for this long has lost its holder."""

_POLL_S = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class LockTimeout(Exception):  # noqa: N818 - the name says what is the case
    """The lock was not free in time; the message names its file."""


@contextmanager
def hold(file: Path, timeout_s: float, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock `file` while the block runs. The file stays: removing it would let two processes in.

    Args:
        file: in a folder that exists; made if missing.
        timeout_s: how long to wait.
        on_wait: called once, before waiting for another holder.

    Raises:
        LockTimeout: another process held it all the time.
        OSError: the file cannot be opened.
    """
    deadline = time.monotonic() + timeout_s
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            _wait(lambda: _try_flock(descriptor), file, deadline, on_wait)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            with _lease(file.with_name(f"{file.name}.lease"), deadline, on_wait):
                yield
        else:
            yield
    finally:
        os.close(descriptor)  # releases the lock


def _wait(attempt: Callable[[], bool], file: Path, deadline: float, on_wait: Callable[[], None]) -> None:
    waited = False
    while not attempt():
        if not waited:
            waited = True
            on_wait()
        if time.monotonic() >= deadline:
            raise LockTimeout(f"{file}: another process has held this lock for too long")
        time.sleep(_POLL_S)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _lease(file: Path, deadline: float, on_wait: Callable[[], None]) -> Iterator[None]:
    token = secrets.token_hex(8)
    _wait(lambda: _try_lease(file, token), file, deadline, on_wait)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(file, stop), name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if _holder(file).get("token") == token:
            file.unlink(missing_ok=True)


def _try_lease(file: Path, token: str) -> bool:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": token}
    staged = file.with_name(f"{file.name}.{token}")
    staged.write_text(json.dumps(mine))
    try:
        # A hard link is made or refused as a whole, even on old NFS.
        os.link(staged, file)
        return True
    except FileExistsError:
        if _abandoned(file):
            # By renaming, one of several takers gets it; the others find it gone and try again.
            with suppress(FileNotFoundError):
                stale = file.with_name(f"{file.name}.{token}.stale")
                file.rename(stale)
                stale.unlink()
        return False
    finally:
        staged.unlink(missing_ok=True)


def _abandoned(file: Path) -> bool:
    holder = _holder(file)
    if holder.get("host") == socket.gethostname() and isinstance(pid := holder.get("pid"), int):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # alive, another user's
    try:
        return time.time() - file.stat().st_mtime > LEASE_S
    except FileNotFoundError:
        return False


def _holder(file: Path) -> dict[str, object]:
    try:
        holder = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _keep(file: Path, stop: threading.Event) -> None:
    while not stop.wait(LEASE_S / 4):
        with suppress(OSError):
            os.utime(file)
