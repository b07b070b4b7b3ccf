"""What kafka-python 3.0 does with every byte it receives, done with fewer copies.

It reads its socket 4,096 bytes at a time and copies twice what it hands on: of an upload with its image inside, that is two
thirds of what consuming costs. The replacements do the same with one call and one copy; they reach into the client's private
parts, so they are put in only where those are as expected. TLS connections keep the client's own reading: TLS has small records.
"""

from __future__ import annotations

from typing import Any

RECEIVE_BYTES = 1 << 20
"""Most bytes of one read: what the kernel holds for a connection is seldom more."""


def apply() -> bool:
    """Put the replacements in; again is harmless. False where the client is not the one they were written for."""
    from kafka.net import transport
    from kafka.protocol import frame

    receiver: Any = transport.KafkaTCPTransport
    buffer: Any = frame.KafkaBytes
    if receiver._sock_recv is _sock_recv and buffer.read is _read:
        return True
    if not _is_known(receiver, "_sock_recv", {"_sock", "recv"}) or not _is_known(buffer, "read", {"_idx", "bytes"}):
        return False
    receiver._sock_recv = _sock_recv
    buffer.read = _read
    return True


def _is_known(owner: Any, name: str, used: set[str]) -> bool:
    code = getattr(getattr(owner, name, None), "__code__", None)
    return code is not None and used <= set(code.co_names)


def _sock_recv(self: Any) -> tuple[bytes, Exception | None]:
    """What the socket holds; more than `RECEIVE_BYTES` waits for the next turn of the client's loop, which comes at once."""
    from kafka import errors

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
