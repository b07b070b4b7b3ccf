"""Human decisions as training labels: the records of the label topic (`code-label/1`), folded to one label an image.

The rule is the console's (docs/console.md): walk through an entry's records in the topic's order; a decision counts if its
`previous` is the `record_id` of the decision in effect (null at first) and, after the first, only with an appeal in between. The
last one that counts is the label. An entry is one image (`sha256:<hex>`), so a thousand uploads of one image are one label.

Whatever else stands in the topic is passed over, counted and named; nothing in it can end the job.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from train.data import DataError, read_manifest

SPECVERSION = "code-label/1"
LABELS = {"ai_generated": 1, "authentic": 0}
MAX_RECORD_BYTES = 256 * 1024
MAX_TEXT_CHARS = 200
MAX_URL_CHARS = 2_000
KEPT_EXAMPLES = 5

_ENTRY = re.compile(r"sha256:([0-9a-f]{64})")
_PASSED_OVER = ("claim", "release")


@dataclass(frozen=True, slots=True)
class Upload:
    """Where an upload event stands."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Label:
    """The decision in effect on one image. `label`: 1 = AI-generated; `at`: RFC 3339; `path`: the image, where it is at hand."""

    sha256: str
    label: int
    by: str
    at: str
    record_id: str
    reason: str = ""
    upload: Upload | None = None
    url: str | None = None
    path: Path | None = None


@dataclass(slots=True)
class Tally:
    """What was read and what was passed over, by reason, with the first few names of each."""

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Count one more; `name`: which record or image."""
        self.skipped[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < KEPT_EXAMPLES:
            named.append(name[:MAX_TEXT_CHARS])

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{count} passed over: {reason}: {', '.join(self.examples[reason])}{', …' if count > KEPT_EXAMPLES else ''}"
            for reason, count in sorted(self.skipped.items())
        ]


@dataclass(frozen=True, slots=True)
class _Record:
    kind: str
    entry: str
    record_id: str
    content: dict[str, Any]


@dataclass(slots=True)
class _Course:
    """What the topic says of one entry so far."""

    decision: _Record | None = None
    appealed: bool = False


class LabelFold:
    """Folds records, in the topic's order, to labels. `add` never raises, whatever it is given."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._courses: dict[str, _Course] = {}

    def add(self, value: bytes | None, name: str) -> None:
        """Take the next record; `name`: where it stands, for the tally."""
        self.tally.records += 1
        try:
            record = _read(value)
        except _Refused as refused:
            self.tally.skip(str(refused), name)
            return
        if record is None:
            return
        course = self._courses.setdefault(record.entry, _Course())
        if record.kind == "appeal":
            course.appealed = course.decision is not None
            return
        latest = course.decision.record_id if course.decision else None
        if record.content.get("previous") != latest or (latest is not None and not course.appealed):
            self.tally.skip("decision without effect (another one was first, or no appeal stands between)", name)
            return
        course.decision, course.appealed = record, False

    def labels(self) -> list[Label]:
        """The labels in effect, ordered by digest; entries whose image is unknown are counted."""
        found = []
        for entry, course in sorted(self._courses.items()):
            if course.decision is None:
                continue
            match = _ENTRY.fullmatch(entry)
            if match is None:
                self.tally.skip("decision about an event whose image is unknown", entry)
                continue
            found.append(_label(match[1], course.decision.content))
        return found


def read_file(path: Path) -> tuple[list[Label], Tally]:
    """Labels from a file with a record a line (as the topic holds them), in the topic's order.

    Raises:
        DataError: the file cannot be read.
    """
    fold = LabelFold()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(_bounded(lines), 1):
                if line.strip():
                    fold.add(line, f"{path.name}, line {number}")
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror or exc}") from exc
    return fold.labels(), fold.tally


def read_folder(root: Path) -> tuple[list[Label], Tally]:
    """Labels from a folder with manifest.tsv (docs/training.md): every image in it, decided by its manifest.

    Files are looked up by the digest of their bytes, which is computed here. Raises DataError for the manifest's faults.
    """
    tally, found = Tally(), {}
    for entry in read_manifest(root):
        tally.records += 1
        if entry.layout != "single":
            tally.skip("a file of several images", str(entry.path))
            continue
        try:
            digest = hashlib.sha256(entry.path.read_bytes()).hexdigest()
        except OSError as exc:
            tally.skip(exc.strerror or "unreadable", str(entry.path))
            continue
        found[digest] = Label(digest, entry.label, f"manifest:{entry.source}"[:MAX_TEXT_CHARS], "", digest, path=entry.path)
    return [found[digest] for digest in sorted(found)], tally


def digest(labels: Iterable[Label]) -> str:
    """SHA-256 over what the labels say, whatever their order."""
    lines = sorted(f"{label.sha256}\t{label.label}\t{label.by}\t{label.record_id}" for label in labels)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Refused(Exception):  # noqa: N818 - never leaves this file
    """A record that is passed over; the message is the reason."""


def _read(value: bytes | None) -> _Record | None:
    """A decision or appeal; None for what labels do not depend on."""
    if value is None or len(value) > MAX_RECORD_BYTES:
        raise _Refused("empty record" if value is None else "record larger than 256 KiB")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise _Refused("not JSON") from None
    if not isinstance(found, dict) or found.get("specversion") != SPECVERSION:
        raise _Refused(f"not {SPECVERSION}")
    kind = found.get("type")
    if kind in _PASSED_OVER:
        return None
    if kind not in ("decision", "appeal"):
        raise _Refused("unknown type of record")
    for name in ("entry", "by", "record_id"):
        if not _is_text(found.get(name), MAX_TEXT_CHARS):
            raise _Refused(f"{name}: not a printable text of 1 to {MAX_TEXT_CHARS} characters")
    if not _is_time(found.get("at")):
        raise _Refused("at: not an RFC 3339 time")
    if kind == "decision":
        _check_decision(found)
    return _Record(kind, found["entry"], found["record_id"], found)


def _check_decision(found: dict[str, Any]) -> None:
    label = found.get("label")
    if not isinstance(label, str) or label not in LABELS:
        raise _Refused("label: neither ai_generated nor authentic")
    image = found.get("image")
    stated = image.get("sha256") if isinstance(image, dict) else None
    match = _ENTRY.fullmatch(found["entry"])
    if match is not None and stated not in (None, match[1]):
        raise _Refused("image.sha256 is not the entry's")


def _is_text(value: object, most: int) -> bool:
    # Half a surrogate pair is not printable either: it could not be written anywhere.
    return isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


def _is_time(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _label(sha256: str, content: dict[str, Any]) -> Label:
    why, image = content.get("why"), content.get("image")
    reference = image.get("reference") if isinstance(image, dict) else None
    reference = reference if isinstance(reference, dict) else {}
    reason = why.get("reason") if isinstance(why, dict) else None
    url = reference.get("url")
    return Label(
        sha256=sha256,
        label=LABELS[content["label"]],
        by=content["by"],
        at=content["at"],
        record_id=content["record_id"],
        reason=reason if isinstance(reason, str) and _is_text(reason, MAX_TEXT_CHARS) else "",
        upload=_upload(reference.get("upload")),
        url=url if isinstance(url, str) and _is_text(url, MAX_URL_CHARS) else None,
    )


def _upload(found: object) -> Upload | None:
    if not isinstance(found, dict):
        return None
    topic, partition, offset = found.get("topic"), found.get("partition"), found.get("offset")
    if not isinstance(topic, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", topic):
        return None
    if type(partition) is not int or type(offset) is not int or not 0 <= partition < 2**31 or not 0 <= offset < 2**63:
        return None
    return Upload(topic, partition, offset)


def _bounded(lines: Any) -> Iterator[bytes]:
    """Lines of a binary file, each cut just beyond the limit, so that one without an end fills no memory."""
    while line := lines.readline(MAX_RECORD_BYTES + 2):
        rest = line
        while not rest.endswith(b"\n") and (rest := lines.readline(MAX_RECORD_BYTES + 2)):
            pass
        yield line
