"""Errors by what happens next.

    WorkerError
    ├── ItemError(code)            this event fails: dead letter and an undetermined verdict; the worker goes on
    │   └── TransientItemError     the same, but tried again within its budget (in place, then the retry topic)
    ├── StaleItemError             the item's partition is gone: drop it silently, neither commit nor count it
    └── FatalError(exit_code)      the process ends without a commit
        ├── ConfigurationError     exit 2: what the operator must change, field by field
        └── DependencyError        exit 3: broker, bundle or device stayed unusable past its budget

Foreign exceptions (kafka, redis, httpcore, obstore, PIL, torch) are mapped to these at one boundary each, `from exc`.
"""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """Failure codes of the contract, section 5: stable, seen in verdicts, dead letters and metrics."""

    EVENT_MALFORMED = "event.malformed"
    EVENT_TOO_LARGE = "event.too_large"
    FETCH_DENIED = "fetch.denied"
    FETCH_NOT_FOUND = "fetch.not_found"
    FETCH_TOO_LARGE = "fetch.too_large"
    FETCH_HASH_MISMATCH = "fetch.hash_mismatch"
    FETCH_TIMEOUT = "fetch.timeout"
    FETCH_UNAVAILABLE = "fetch.unavailable"
    DECODE_UNSUPPORTED = "decode.unsupported"
    DECODE_CORRUPT = "decode.corrupt"
    DECODE_TOO_MANY_PIXELS = "decode.too_many_pixels"
    DECODE_TIMEOUT = "decode.timeout"
    DECODE_CRASHED = "decode.crashed"
    ENGINE_FAILED = "engine.failed"


class WorkerError(Exception):
    """Base of every error this package raises on purpose."""


class ItemError(WorkerError):
    """One event failed for good. `message` is one line, safe to publish: no query strings, addresses or secrets."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class TransientItemError(ItemError):
    """One event failed for now and may succeed later (`fetch.timeout`, `fetch.unavailable`).

    `retry_after_s` is the host's own hint (HTTP Retry-After), in seconds. `attempted` is False where nothing was tried
    (the host's breaker is open, or it is at its limit): such a failure says nothing about this event, so it should not
    use up one of its attempts.
    """

    def __init__(self, code: Code, message: str, retry_after_s: float | None = None, *, attempted: bool = True) -> None:
        super().__init__(code, message)
        self.retry_after_s = retry_after_s
        self.attempted = attempted


class StaleItemError(WorkerError):
    """The partition of this item was revoked or lost while it was in flight."""


class FatalError(WorkerError):
    """The process cannot go on."""

    exit_code = 1


class ConfigurationError(FatalError):
    """The settings are wrong; `problems` has one line a field."""

    exit_code = 2

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("; ".join(self.problems))


class DependencyError(FatalError):
    """A broker, bundle or device stayed unusable past its budget."""

    exit_code = 3
