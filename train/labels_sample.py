"""A sample label topic: decisions on images of a folder with a manifest, or on made-up ones, for a first refresh and for tests.

Written as the console would write them, a record a line, beside the images by their digests; `publish` puts the same records on
a topic.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data import DataError, Entry, read_manifest
from train.labels import SPECVERSION
from train.labels_topic import KafkaOptions, TopicError

LABELS_FILE = "labels.jsonl"
IMAGES_FOLDER = "images"
START = datetime(2026, 1, 1, tzinfo=UTC)
SEND_S = 30.0
SIDE_PX = 256
_NAMESPACE = uuid.UUID("5f0c2f3e-6a55-4c8e-9c2b-0d6d6c1f7a11")


@dataclass(frozen=True, slots=True)
class SampleImage:
    """One image to decide on: file bytes and whether it is AI-generated."""

    data: bytes
    label: int


def chosen(data: Path, generator: str, count: int, reals: int, seed: int) -> list[SampleImage]:
    """`count` images of a generator and `reals` real ones of a folder with a manifest, drawn by the seed, whole files only.

    Raises:
        DataError: fewer of them than asked for.
    """
    entries = [entry for entry in read_manifest(data) if entry.layout == "single"]
    rng = np.random.default_rng((seed, 61))
    fakes = [entry for entry in entries if entry.label and entry.generator == generator]
    if len(fakes) < count:
        known = ", ".join(sorted({entry.generator for entry in entries if entry.label})[:20])
        raise DataError(f"{data}: {len(fakes)} images of generator {generator!r}, not {count}; generators are {known}")
    photographs = [entry for entry in entries if not entry.label]
    if len(photographs) < reals:
        raise DataError(f"{data}: {len(photographs)} real images, not {reals}")

    def drawn(pool: Sequence[Entry], number: int) -> list[SampleImage]:
        rows = rng.permutation(len(pool))[:number]
        return [SampleImage(pool[row].path.read_bytes(), pool[row].label) for row in sorted(rows.tolist())]

    return drawn(fakes, count) + drawn(photographs, reals)


def made_up(count: int, reals: int, seed: int) -> list[SampleImage]:
    """Drawings: smooth noise for a photograph, the same with a fine regular pattern for a generator that nobody has seen."""
    return [SampleImage(_drawing(seed * 100_000 + number, bool(label)), label)
            for label, total in ((1, count), (0, reals)) for number in range(total)]  # fmt: skip


def write(out: Path, images: Sequence[SampleImage], reviewer: str) -> Path:
    """Writes OUT/labels.jsonl and OUT/images/<sha256>; returns the file. The same images give the same records."""
    folder = out / IMAGES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, image in enumerate(images):
        sha256 = hashlib.sha256(image.data).hexdigest()
        (folder / sha256).write_bytes(image.data)
        lines.append(json.dumps(record(sha256, image.label, reviewer, number), ensure_ascii=False, separators=(",", ":")))
    file = out / LABELS_FILE
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def record(sha256: str, label: int, reviewer: str, number: int, **changes: Any) -> dict[str, Any]:
    """A first decision on an image, as the console writes it (docs/console.md); `changes` replace fields."""
    name = "ai_generated" if label else "authentic"
    at = START + timedelta(minutes=number)
    return {
        "specversion": SPECVERSION,
        "type": "decision",
        "record_id": str(uuid.uuid5(_NAMESPACE, f"{sha256} {name} {number}")),
        "entry": f"sha256:{sha256}",
        "by": reviewer,
        "at": at.isoformat().replace("+00:00", "Z"),
        "decision": "assign",
        "label": name,
        "why": {"reason": "artefacts" if label else "camera", "note": ""},
        "previous": None,
        "appeal": None,
        "reverses": False,
        "earlier": [],
        "verdict": None,
        "image": {"sha256": sha256, "reference": {"upload": None, "url": None}},
        "events": 1,
        "event_ids": [],
        **changes,
    }


def publish(file: Path, options: KafkaOptions) -> int:
    """Writes the records of a file to the label topic, each under its entry's key; returns how many.

    Raises:
        TopicError: the topic did not take them.
    """
    from kafka import KafkaProducer
    from kafka.errors import KafkaError

    lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    keys = [str(json.loads(line)["entry"]).encode() for line in lines]
    shared = {k: v for k, v in options.consumer().items() if k in KafkaProducer.DEFAULT_CONFIG}
    try:
        producer = KafkaProducer(**shared | {"acks": "all"})
        try:
            sent = [producer.send(options.label_topic, line, key=key) for line, key in zip(lines, keys, strict=True)]
            for future in sent:
                future.get(timeout=SEND_S)
        finally:
            producer.close(timeout=SEND_S)
    except KafkaError as exc:
        raise TopicError(f"Kafka topic {options.label_topic}: cannot be written: {type(exc).__name__}") from exc
    return len(lines)


def _drawing(seed: int, generated: bool) -> bytes:
    rng = np.random.default_rng((seed, 67))
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    rgb = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (SIDE_PX, SIDE_PX, 3))
    if generated:
        rgb[::4] += 40
        rgb[:, ::4] += 40
    file = io.BytesIO()
    Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()
