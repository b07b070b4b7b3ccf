"""In-process types: one frozen dataclass a step, so that a stage cannot be called too early.

Record -> Event (in an Item) -> Fetched -> Decoded -> Scored -> Verdict | ItemError
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Headers = tuple[tuple[str, bytes], ...]
StageSpan = tuple[str, float, float]
"""A stage of one event: its name, and when it began and ended, monotonic seconds."""


class Position(NamedTuple):
    """Where a record stands in the log, and in which tenure of its partition it was read.

    `generation` is the ledger's own count of assignments of this partition to this process, so that a late result
    of an earlier tenure is recognised and dropped.
    """

    topic: str
    partition: int
    offset: int
    generation: int


@dataclass(frozen=True, slots=True)
class Record:
    """A Kafka record as it was read, bytes untouched: what a dead letter must give back."""

    position: Position
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int

    @property
    def size_bytes(self) -> int:
        """Bytes this record pins in memory."""
        return len(self.key or b"") + len(self.value or b"") + sum(len(k) + len(v or b"") for k, v in self.headers)


@dataclass(frozen=True, slots=True)
class Event:
    """An upload event of the contract, section 3; exactly one of `url` and `inline` is set."""

    event_id: str
    url: str | None
    inline: bytes | None
    tenant: str = "default"
    item: dict[str, str] | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    content_type: str | None = None
    sha256: str | None = None
    priority: int = 0
    uploaded_at: float | None = None
    """POSIX seconds; None where the producer gave none (the record's timestamp stands in for it)."""
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """How often this event was tried, from the retry headers: 1 and None on its first way through."""

    attempt: int = 1
    first_seen: float | None = None
    """POSIX seconds of the first attempt."""
    not_before: float | None = None
    """POSIX seconds before which a retried record must not be tried."""
    origin: Position | None = None
    """Topic, partition and offset of the upload this retry stems from (generation 0)."""


@dataclass(slots=True)
class Timings:
    """Milliseconds a stage took for one event; None where the stage was not run. Monotonic clock."""

    started: float
    fetch: float | None = None
    decode: float | None = None
    queue: float | None = None
    infer: float | None = None
    spans: list[StageSpan] | None = None
    """For an event that is traced: the stages so far."""

    def span(self, name: str, started: float, ended: float) -> None:
        """Note a stage, where the event is traced."""
        if self.spans is not None:
            self.spans.append((name, started, ended))


@dataclass(frozen=True, slots=True)
class Item:
    """An accepted event on its way: what every later step carries along."""

    record: Record
    event: Event
    delivery: Delivery
    timings: Timings


@dataclass(frozen=True, slots=True)
class Fetched:
    """The image's bytes, within limits and with the digest checked."""

    item: Item
    data: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the verdict says about the image (contract, section 4, `image` and `evidence.provenance`)."""

    sha256: str
    width: int
    height: int
    format: str
    frames: int
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Crops of the image, ready for the engine.

    `crops`: uint8 [frames * crops_per_frame, 224, 224, 3], RGB, frame-major.
    """

    fetched: Fetched
    info: ImageInfo
    crops: NDArray[np.uint8]
    crops_per_frame: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Calibrated scores of one image: what the cache keeps.

    `heads`: probability in [0, 1] by head name, already combined over crops and frames; `crops`: probability of the
    serving head for each crop of the deciding frame.
    """

    heads: dict[str, float]
    crops: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """The model that made a score (contract, section 4, `model`)."""

    name: str
    version: str
    head: str
    backend: str
    device: str


@dataclass(frozen=True, slots=True)
class Scored:
    """An image with its scores, from the engine or from the cache."""

    item: Item
    info: ImageInfo
    scores: Scores
    model: ModelRef
    cache_hit: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy makes of a score (contract, section 4: `label`, `uncertain`, `action`, `policy`)."""

    label: str
    """ai_generated, authentic or undetermined."""
    action: str
    """allow, review or block."""
    uncertain: bool
    policy: str
    version: str
    shadow: dict[str, str] | None = None
    """What each shadow rule would have done, by its name; None where the policy has none for the tenant."""
