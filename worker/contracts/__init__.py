"""Wire schemas: the upload event's three forms, the verdict, the dead letter (contract, sections 3 to 5)."""

from worker.contracts.event import MAX_CONTEXT_BYTES, EventError, EventLimits, parse
from worker.contracts.verdict import (
    VERDICT_NAMESPACE,
    Verdict,
    build_verdict,
    rfc3339,
    verdict_headers,
    verdict_id,
)

__all__ = [
    "MAX_CONTEXT_BYTES",
    "VERDICT_NAMESPACE",
    "EventError",
    "EventLimits",
    "Verdict",
    "build_verdict",
    "parse",
    "rfc3339",
    "verdict_headers",
    "verdict_id",
]
