"""The verdict (contract, section 4): its model in the contract's order of fields, its id, its headers."""

from __future__ import annotations

import functools
import hashlib
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from worker.errors import Code
from worker.items import Decision, Event, ImageInfo, ModelRef, Position, Scores, Timings

VERDICT_NAMESPACE = uuid.UUID("43573f0c-6147-5f72-83d3-26a252192843")
"""UUIDv5 of the URL namespace and `code-verdict/1`; fixed for ever, or a verdict and its repetition would not share an id."""

CE_TYPE = "code.verdict.v1"
CE_SOURCE = "/code-worker"

_NO_PROVENANCE = {"c2pa": None, "digital_source_type": None, "generator_metadata": None}


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="null", json_schema_serialization_defaults_required=True
    )


class PolicyRef(_Part):
    """Which policy decided."""

    name: str
    version: str = Field(description="as given in the policy file, or the first 12 hex digits of its SHA-256")
    shadow: dict[str, Literal["allow", "review", "block"]] | None = Field(
        None,
        exclude_if=lambda shadow: shadow is None,
        description="what shadow rules would have done; absent without them",
    )


class Model(_Part):
    """Which model scored, and where it ran."""

    name: str
    version: str
    head: str
    backend: str
    device: str


class Image(_Part):
    """What is known of the image; null where the event failed before it was."""

    sha256: str | None = None
    width: int | None = Field(None, description="pixels, after EXIF orientation")
    height: int | None = Field(None, description="pixels, after EXIF orientation")
    format: str | None = Field(None, description="as sniffed from the bytes")
    frames: int | None = Field(None, description="frames that were scored")


class Evidence(_Part):
    """What the score stands on."""

    heads: dict[str, float] = Field(description="calibrated probability by head; empty without a score")
    crops: tuple[float, ...] = Field(description="the serving head's probability of each crop of the deciding frame")
    provenance: dict[str, Any] = Field(description="marks of a generator: c2pa, digital_source_type, generator_metadata")


class TimingsMs(_Part):
    """Milliseconds by stage; null where the stage was not run."""

    fetch: float | None = None
    decode: float | None = None
    queue: float | None = None
    infer: float | None = None
    total: float | None = None


class Source(_Part):
    """Where the upload event stands in the log."""

    topic: str
    partition: int
    offset: int


class Verdict(_Part):
    """One event judged by one model."""

    specversion: Literal["code-verdict/1"] = "code-verdict/1"
    verdict_id: str = Field(description="UUIDv5 of event id and model version: redeliveries carry the same id")
    event_id: str
    tenant: str
    item: dict[str, str] | None
    attributes: dict[str, str]
    label: Literal["ai_generated", "authentic", "undetermined"]
    score: float | None = Field(ge=0, le=1, description="calibrated probability that the image is AI-generated")
    uncertain: bool = Field(description="whether the score lies in the band in which the model abstains")
    action: Literal["allow", "review", "block"]
    policy: PolicyRef
    reason: Code | None = Field(description="why there is no score")
    model: Model
    image: Image
    evidence: Evidence
    cache: Literal["miss", "hit"]
    timings_ms: TimingsMs
    source: Source
    processed_at: str = Field(description="RFC 3339, UTC")

    def to_json(self) -> bytes:
        """The value of the Kafka record: compact UTF-8 JSON."""
        return self.__pydantic_serializer__.to_json(self)


@dataclass(frozen=True, slots=True)
class Published:
    """A verdict as it goes to Kafka, and what its receipt is counted by."""

    body: bytes
    headers: list[tuple[str, bytes]]
    label: str
    action: str
    model_version: str
    reason: Code | None


def verdict_id(event_id: str, model_version: str) -> str:
    """UUIDv5 in `VERDICT_NAMESPACE` of the event id, a NUL and the model version, in UTF-8; the standard library takes 7 us."""
    name = VERDICT_NAMESPACE.bytes + f"{event_id}\0{model_version}".encode()
    digits = hashlib.sha1(name, usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def rfc3339(posix_s: float) -> str:
    """UTC with milliseconds and `Z`."""
    return datetime.fromtimestamp(posix_s, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def build_verdict(
    *,
    event: Event,
    source: Position,
    model: ModelRef,
    decision: Decision,
    processed_at: float,
    scores: Scores | None = None,
    image: ImageInfo | None = None,
    sha256: str | None = None,
    reason: Code | None = None,
    cache_hit: bool = False,
    timings: Timings | None = None,
    finished: float | None = None,
) -> Verdict:
    """Put a verdict together, of an event that was scored or of one that failed.

    Args:
        event: the upload event, or what `EventError.event` could read of it.
        source: where the upload stands, also when it came back by the retry topic.
        model: the one that scored or would have scored.
        decision: the policy's.
        processed_at: POSIX seconds.
        scores: None for a failed event; `model.head` names the one that becomes `score`.
        image: None where it was not decoded; `sha256` may still be known.
        reason: the failure's code, exactly where `scores` is None.
        timings: what the stages took; `finished` is the monotonic time of now, for the total.
    """
    values: dict[str, Any] = {
        "verdict_id": verdict_id(event.event_id, model.version),
        "event_id": event.event_id,
        "tenant": event.tenant,
        "item": event.item,
        "attributes": event.attributes,
        "label": decision.label,
        "score": None if scores is None else scores.heads[model.head],
        "uncertain": decision.uncertain,
        "action": decision.action,
        "policy": _policy(decision.policy, decision.version) if decision.shadow is None else _shadowed(decision),
        "reason": reason,
        "model": _model(model),
        "image": _image(image, sha256),
        "evidence": _evidence(scores, image),
        "cache": "hit" if cache_hit else "miss",
        "timings_ms": _timings(timings, finished),
        "source": {"topic": source.topic, "partition": source.partition, "offset": source.offset},
        "processed_at": rfc3339(processed_at),
    }
    return Verdict(**values)  # the parts as plain dictionaries: one call of the validator makes them all


def publish_scored(
    *,
    event: Event,
    source: Position,
    model: ModelRef,
    decision: Decision,
    processed_at: float,
    scores: Scores,
    image: ImageInfo,
    cache_hit: bool,
    timings: Timings,
    finished: float,
) -> Published:
    """The same bytes as those of `build_verdict`, without the model's checks: for most events, whose values are all our own.

    Arguments as there.
    """
    identity, time = verdict_id(event.event_id, model.version), rfc3339(processed_at)
    policy: dict[str, Any] = {"name": decision.policy, "version": decision.version}
    if decision.shadow is not None:
        policy["shadow"] = decision.shadow
    body = to_json(
        {
            "specversion": "code-verdict/1",
            "verdict_id": identity,
            "event_id": event.event_id,
            "tenant": event.tenant,
            "item": event.item,
            "attributes": event.attributes,
            "label": decision.label,
            "score": scores.heads[model.head],
            "uncertain": decision.uncertain,
            "action": decision.action,
            "policy": policy,
            "reason": None,
            "model": _model_values(model),
            "image": _image(image, None),
            "evidence": _evidence(scores, image),
            "cache": "hit" if cache_hit else "miss",
            "timings_ms": _timings(timings, finished),
            "source": {"topic": source.topic, "partition": source.partition, "offset": source.offset},
            "processed_at": time,
        },
        inf_nan_mode="null",
    )
    headers = _headers(identity, event.event_id, time, event.traceparent)
    return Published(body, headers, decision.label, decision.action, model.version, None)


def publish(verdict: Verdict, traceparent: str | None = None) -> Published:
    """A verdict with the headers of its record."""
    headers = verdict_headers(verdict, traceparent)
    return Published(verdict.to_json(), headers, verdict.label, verdict.action, verdict.model.version, verdict.reason)


def verdict_headers(verdict: Verdict, traceparent: str | None = None) -> list[tuple[str, bytes]]:
    """Headers of the Kafka record: CloudEvents binary mode, and the upload event's trace context."""
    return _headers(verdict.verdict_id, verdict.event_id, verdict.processed_at, traceparent)


def _headers(identity: str, event_id: str, time: str, traceparent: str | None) -> list[tuple[str, bytes]]:
    headers = [
        ("content-type", b"application/json"),
        ("ce_specversion", b"1.0"),
        ("ce_id", identity.encode()),
        ("ce_type", CE_TYPE.encode()),
        ("ce_source", CE_SOURCE.encode()),
        ("ce_subject", event_id.encode()),
        ("ce_time", time.encode()),
    ]
    if traceparent is not None:
        headers.append(("traceparent", traceparent.encode()))
    return headers


@functools.lru_cache(64)
def _model(model: ModelRef) -> Model:
    return Model(name=model.name, version=model.version, head=model.head, backend=model.backend, device=model.device)


@functools.lru_cache(64)
def _model_values(model: ModelRef) -> dict[str, str]:
    return _model(model).model_dump()


@functools.lru_cache(64)
def _policy(name: str, version: str) -> PolicyRef:
    return PolicyRef(name=name, version=version, shadow=None)


def _shadowed(decision: Decision) -> PolicyRef:
    return PolicyRef(name=decision.policy, version=decision.version, shadow=decision.shadow)


def _image(image: ImageInfo | None, sha256: str | None) -> dict[str, Any]:
    if image is None:
        return {"sha256": sha256}
    return {
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
        "format": image.format,
        "frames": image.frames,
    }


def _evidence(scores: Scores | None, image: ImageInfo | None) -> dict[str, Any]:
    provenance = _NO_PROVENANCE if image is None or not _is_json(image.provenance) else _NO_PROVENANCE | image.provenance
    if scores is None:
        return {"heads": {}, "crops": (), "provenance": provenance}
    return {"heads": scores.heads, "crops": scores.crops, "provenance": provenance}


def _is_json(provenance: dict[str, Any]) -> bool:
    """Whether it can be written: a mark is an uploader's text, and must not keep a verdict from being published."""
    try:
        to_json(provenance)
    except ValueError:
        return False
    return True


def _timings(timings: Timings | None, finished: float | None) -> dict[str, float | None]:
    if timings is None:
        return {}
    total = None if finished is None else (finished - timings.started) * 1000
    stages = {"fetch": timings.fetch, "decode": timings.decode, "queue": timings.queue, "infer": timings.infer, "total": total}
    return {name: None if value is None else round(value, 3) for name, value in stages.items()}
