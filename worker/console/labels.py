"""Records of the label topic, and the one rule by which every console (and the training job) reads them.

The topic is the only memory that consoles share. All records of an image have one key, so they stand in one partition and
everyone sees them in one order:

* `decision` is effective exactly if its `previous` names the decision that is in effect where it stands (null for the first).
  Of two that were made at once the first in the topic counts; the other names what is no longer in effect, and means nothing.
* `claim` holds if nobody else's claim is in force where it stands. It keeps two people from looking at one image at a time;
  what keeps them from deciding twice is the rule above, which asks no clock.
* `release` gives a claim back; `appeal` puts a decided image into the queue again.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from worker.contracts.verdict import rfc3339

SPECVERSION = "code-label/1"
MAX_NOTE_CHARS = 2_000
MAX_CLAIM_S = 86_400
REASONS = {
    "artefacts": "Visible traces of generation",
    "provenance": "Provenance or metadata",
    "source": "Known source or author",
    "camera": "Traces of camera, lens or scanner",
    "other": "Other (say what)",
}

Kind = Literal["claim", "release", "decision", "appeal"]
KINDS = ("claim", "release", "decision", "appeal")


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """One record; `content` is what its kind adds."""

    kind: Kind
    entry: str
    by: str
    at: float
    """POSIX seconds."""
    record_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    content: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The record's value."""
        head = {
            "specversion": SPECVERSION,
            "type": self.kind,
            "record_id": self.record_id,
            "entry": self.entry,
            "by": self.by,
            "at": rfc3339(self.at),
        }
        return json.dumps(head | self.content, ensure_ascii=False, separators=(",", ":")).encode()

    def public(self) -> dict[str, Any]:
        """For the page's history."""
        return {"type": self.kind, "record_id": self.record_id, "by": self.by, "at": rfc3339(self.at), **self.content}


def read(value: bytes | None) -> LabelRecord | None:
    """A record of this version; None for anything else: others may write to the topic too."""
    try:
        found = json.loads(value or b"")
        if not isinstance(found, dict) or found.get("specversion") != SPECVERSION or found.get("type") not in KINDS:
            return None
        texts = [found[name] for name in ("entry", "by", "record_id")]
        if not all(isinstance(text, str) and text for text in texts):
            return None
        at = datetime.fromisoformat(found["at"]).timestamp()
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    known = ("specversion", "type", "record_id", "entry", "by", "at")
    content = {name: value for name, value in found.items() if name not in known}
    if found["type"] == "decision" and content.get("label") not in ("ai_generated", "authentic"):
        return None
    if found["type"] == "claim" and not (
        isinstance(seconds := content.get("seconds"), int | float) and 0 < seconds <= MAX_CLAIM_S
    ):
        return None
    return LabelRecord(found["type"], texts[0], texts[1], at, texts[2], content)


def entry_of(verdict: dict[str, Any]) -> str:
    """What is decided about: the image, or the event where no bytes of an image are known."""
    sha256 = verdict["image"]["sha256"]
    return f"sha256:{sha256}" if sha256 else f"event:{verdict['event_id']}"


@dataclass(slots=True)
class Claim:
    """Who has an entry, and until when (POSIX seconds, by the clock of the console that wrote it)."""

    by: str
    record_id: str
    until: float

    def in_force(self, now: float) -> bool:
        """Whether it has not run out."""
        return now < self.until


@dataclass(slots=True)
class Course:
    """What the topic says of one entry, up to some record."""

    decisions: list[LabelRecord] = field(default_factory=list)
    """Effective ones, oldest first."""
    appeal: LabelRecord | None = None
    """The one that waits for an answer."""
    claim: Claim | None = None
    history: list[LabelRecord] = field(default_factory=list)
    """Decisions, appeals and skips, for the page."""

    @property
    def latest(self) -> LabelRecord | None:
        """The decision in effect."""
        return self.decisions[-1] if self.decisions else None

    @property
    def open(self) -> bool:
        """Whether it waits for a decision."""
        return not self.decisions or self.appeal is not None

    def fold(self, record: LabelRecord) -> bool:
        """Take the next record of the topic; False for one that has no effect."""
        rules = {"claim": self._claim, "release": self._release, "decision": self._decision, "appeal": self._appeal}
        effective = rules[record.kind](record)
        if effective and (record.kind in ("decision", "appeal") or record.content.get("skipped")):
            self.history.append(record)
        return effective

    def _claim(self, record: LabelRecord) -> bool:
        if not self.open or (self.claim and self.claim.by != record.by and self.claim.in_force(record.at)):
            return False
        self.claim = Claim(record.by, record.record_id, record.at + float(record.content["seconds"]))
        return True

    def _release(self, record: LabelRecord) -> bool:
        if self.claim is None or self.claim.by != record.by:
            return False
        self.claim = None
        return True

    def _decision(self, record: LabelRecord) -> bool:
        latest = self.latest
        if record.content.get("previous") != (latest.record_id if latest else None) or not self.open:
            return False
        self.decisions.append(record)
        self.appeal = self.claim = None
        return True

    def _appeal(self, record: LabelRecord) -> bool:
        if self.open:
            return False
        self.appeal, self.claim = record, None
        return True
