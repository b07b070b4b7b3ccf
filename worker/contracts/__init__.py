"""Wire schemas: the upload event's three forms, the verdict, the dead letter (contract, sections 3 to 5)."""

from worker.contracts.event import MAX_CONTEXT_BYTES, EventError, EventLimits, parse
from worker.contracts.verdict import (
    VERDICT_NAMESPACE,
    Published,
    Verdict,
    build_verdict,
    publish,
    publish_scored,
    rfc3339,
    verdict_headers,
    verdict_id,
)

__all__ = [
    "MAX_CONTEXT_BYTES",
    "VERDICT_NAMESPACE",
    "EventError",
    "EventLimits",
    "Published",
    "Verdict",
    "build_verdict",
    "parse",
    "publish",
    "publish_scored",
    "rfc3339",
    "verdict_headers",
    "verdict_id",
]
