"""What kafka-python 3.0 does with every byte and every turn of its loop, done with less.

It reads its socket 4,096 bytes at a time and copies twice what it hands on: of an upload with its image inside, that is two
thirds of what consuming costs. Its loop registers a socket anew for each wait, and asks the selector for it first: the answer
that it is not there is an exception whose text names both ends of the socket, two system calls. And every thread that has
something for the loop wakes it by a byte through a socket, also when one is on its way already, and lets go of the interpreter
for that.

The replacements do the same with fewer calls and copies; they reach into the client's private parts, so they are put in only
where those are as expected, all of them or none. TLS connections keep the client's own reading: TLS has small records.
"""

from __future__ import annotations

import selectors
from typing import Any

RECEIVE_BYTES = 1 << 20
"""Most bytes of one read: what the kernel holds for a connection is seldom more."""

_originals: dict[str, Any] = {}
"""By name the client's own functions that ours call."""


def apply() -> bool:
    """Put the replacements in; again is harmless. False where the client is not the one they were written for."""
    from kafka.net import selector, transport
    from kafka.protocol import frame

    net: Any = selector.NetworkSelector
    replacements: tuple[tuple[Any, str, set[str], Any], ...] = (
        (transport.KafkaTCPTransport, "_sock_recv", {"_sock", "recv"}, _sock_recv),
        (frame.KafkaBytes, "read", {"_idx", "bytes"}, _read),
        (net, "register_event", {"_selector", "get_key", "register", "Task"}, _register_event),
        (net, "wakeup", {"_wakeup_w", "send"}, _wakeup),
        (net, "_process_events", {"_wakeup_r", "recv"}, _process_events),
    )
    if all(getattr(owner, name, None) is ours for owner, name, _, ours in replacements):
        return True
    if not _has_map() or not all(_is_known(owner, name, used) for owner, name, used, _ in replacements):
        return False
    for owner, name, _, ours in replacements:
        _originals[name] = getattr(owner, name)
        setattr(owner, name, ours)
    return True


def linger(producer: Any, milliseconds: int) -> None:
    """From now on records wait so long for company: the client reads this option anew whenever it looks for what to send."""
    options = getattr(getattr(producer, "_accumulator", None), "config", None)
    if isinstance(options, dict) and "linger_ms" in options:
        options["linger_ms"] = milliseconds


def _is_known(owner: Any, name: str, used: set[str]) -> bool:
    code = getattr(getattr(owner, name, None), "__code__", None)
    return code is not None and used <= set(code.co_names)


def _has_map() -> bool:
    """Whether the standard library's selectors know their sockets by descriptor under the name that ours asks for."""
    with selectors.DefaultSelector() as selector:
        return isinstance(getattr(selector, "_fd_to_key", None), dict)


def _sock_recv(self: Any) -> tuple[bytes, Exception | None]:
    """What the socket holds; more than `RECEIVE_BYTES` waits for the next turn of the client's loop, which comes at once.

    A client that was closed meanwhile has no socket any more, or nobody who takes what is read: an end like any other; the
    client's own reading logs a traceback.
    """
    from kafka import errors

    if self._sock is None or self._protocol is None:
        return b"", errors.KafkaConnectionError("closed")
    try:
        data = self._sock.recv(RECEIVE_BYTES)
    except (BlockingIOError, InterruptedError):
        return b"", None
    except OSError as error:
        return b"", errors.KafkaConnectionError(error)
    return data, None if data else errors.KafkaConnectionError("socket disconnected")


def _read(self: Any, nbytes: int | None = None) -> bytes:
    """The next bytes of a frame, in one copy."""
    start, end = self._idx, len(self)
    if nbytes is not None:
        end = min(end, start + nbytes)
    self._idx = end
    with memoryview(self) as view:
        return view[start:end].tobytes()


def _register_event(self: Any, fileobj: Any, event: int, task: Any) -> None:
    """A socket that is not registered is so at once; one that is, and whatever is unusual, goes the client's own way."""
    from kafka.net.selector import Task

    descriptor = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    if descriptor < 0 or descriptor in self._selector._fd_to_key:
        _originals["register_event"](self, fileobj, event, task)
        return
    if not isinstance(task, Task):
        task = Task(task)
    self._selector.register(fileobj, event, (task, None) if event == selectors.EVENT_READ else (None, task))


def _wakeup(self: Any) -> None:
    """Wake the loop, unless a byte is on its way already: what this caller did before, the loop will see when it wakes."""
    if not getattr(self, "_wakeup_sent", False):
        self._wakeup_sent = True
        _originals["wakeup"](self)


def _process_events(self: Any, event_list: Any) -> None:
    """After each wait. The mark goes when the bytes are read, not before: they may include one of somebody who came just now.

    And it goes before the loop looks at what is to be done, so that whoever finds it in place is seen to in this turn.
    """
    try:
        _originals["_process_events"](self, event_list)
    finally:
        self._wakeup_sent = False
