"""The replay: embeddings of earlier images, kept in the bundle, from which the heads are refitted without any corpus.

Named parts, each with embeddings float32[n, 192] at the bundle's encoder and the facts of each row:

    train                                    what the heads were fitted on
    calibrate/clean, calibrate/degraded      what calibration and thresholds rest on, row by row the same images
    evaluate/clean, evaluate/jpeg75          what the gate compares champion and candidate on
    labels                                   images that earlier refreshes learned from human decisions
    tuned                                    those of them that the encoder was trained on, where a refresh retrained it

One safetensors file: `<part>.embedding` for each part, and `facts` (UTF-8 JSON as uint8). Embeddings mean nothing to another
encoder, so the file names its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle, read_replay
from engine.heads import EMBEDDING_DIM
from engine.manifest import REPLAY_FILE
from train.data import DataError
from train.embed import Embedded, Facts
from train.probe import fair_choice

FORMAT = "code-replay/1"
TRAIN, LABELS, TUNED = "train", "labels", "tuned"
CALIBRATE = ("calibrate/clean", "calibrate/degraded")
EVALUATE = "evaluate/"
CONDITIONS = ("clean", "jpeg75")
MAX_ROWS_PER_CLASS = 5_000
"""Of each part: a bundle stays below some tens of megabytes whatever it was trained on."""
MAX_TEXT_CHARS = 500

Parts = dict[str, Embedded]


def encode(parts: Mapping[str, Embedded], encoder_sha256: str) -> bytes:
    """The file's bytes; the same parts give the same bytes."""
    from safetensors.numpy import save

    rows = {name: [[f.key, f.label, f.source, f.generator, f.group] for f in part.facts] for name, part in sorted(parts.items())}
    head = {"format": FORMAT, "encoder_sha256": encoder_sha256, "parts": rows}
    facts = np.frombuffer(json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode(), np.uint8)
    tensors = {f"{name}.embedding": np.ascontiguousarray(part.embedding, np.float32) for name, part in sorted(parts.items())}
    return save({"facts": facts, **tensors})


def decode(data: bytes, encoder_sha256: str, name: str) -> Parts:
    """The parts of a file. `name`: the file's, for messages.

    Raises:
        DataError: not such a file, of another encoder, or a part whose rows do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = dict(load(data))
        head = json.loads(tensors["facts"].astype(np.uint8, casting="equiv").tobytes())
        if head["format"] != FORMAT:
            raise DataError(f"{name}: unknown format {head['format']!r}; this version reads {FORMAT}")
        if head["encoder_sha256"] != encoder_sha256:
            raise DataError(f"{name}: its embeddings are of another encoder")
        return {part: _part(rows, tensors[f"{part}.embedding"], f"{name}, {part}") for part, rows in head["parts"].items()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DataError(f"{name}: not a readable {FORMAT} file: {exc}") from exc


def of_bundle(bundle: Bundle) -> Parts | None:
    """What a bundle carries; None where it carries nothing. Raises BundleError or DataError, naming the file."""
    data = read_replay(bundle)
    return None if data is None else decode(data, bundle.manifest.encoder.sha256, str(bundle.path / REPLAY_FILE))


def begin(folder: Path, encoder_sha256: str, train: Embedded) -> None:
    """Starts folder/replay.safetensors anew with what the heads were fitted on, bounded."""
    _write(folder, encoder_sha256, {TRAIN: bounded(train)})


def add(folder: Path, encoder_sha256: str, parts: Mapping[str, Embedded]) -> None:
    """Adds parts, bounded, to folder/replay.safetensors; does nothing where there is none of this encoder."""
    path = folder / REPLAY_FILE
    if not path.exists():
        return
    try:
        held = decode(path.read_bytes(), encoder_sha256, str(path))
    except DataError:
        return  # begun by the probe of another encoder: what is added here would not belong to it
    _write(folder, encoder_sha256, held | {name: bounded(part) for name, part in parts.items()})


def kept(folder: Path, encoder_sha256: str) -> bytes | None:
    """The bytes of folder/replay.safetensors for a bundle of this encoder; None where there is no such file of it."""
    path = folder / REPLAY_FILE
    if not path.exists():
        return None
    data = path.read_bytes()
    try:
        decode(data, encoder_sha256, str(path))
    except DataError:
        return None
    return data


def _write(folder: Path, encoder_sha256: str, parts: Parts) -> None:
    partial = folder / f"{REPLAY_FILE}.partial"
    partial.write_bytes(encode(parts, encoder_sha256))
    partial.replace(folder / REPLAY_FILE)


def bounded(part: Embedded, per_class: int = MAX_ROWS_PER_CLASS) -> Embedded:
    """The part, or a fair choice of it: parts with the same facts keep the same rows."""
    if max(int((part.labels == label).sum()) for label in (0, 1)) <= per_class:
        return part
    mask = np.zeros(len(part.facts), np.bool_)
    mask[fair_choice(part, per_class, seed=0)] = True
    return part.where(mask)


def joined(parts: list[Embedded]) -> Embedded:
    """Rows of all parts, one after the other."""
    return Embedded(
        np.concatenate([np.empty((0, EMBEDDING_DIM), np.float32), *(part.embedding for part in parts)]),
        [facts for part in parts for facts in part.facts],
    )


def _part(rows: list[list[Any]], embedding: NDArray[np.float32], where: str) -> Embedded:
    if embedding.dtype != np.float32 or embedding.shape != (len(rows), EMBEDDING_DIM) or not np.isfinite(embedding).all():
        raise DataError(f"{where}: expected finite float32 [{len(rows)}, {EMBEDDING_DIM}]")
    facts = []
    for key, label, source, generator, group in rows:
        texts = (key, source, generator, group)
        if label not in (0, 1) or not all(isinstance(text, str) and len(text) <= MAX_TEXT_CHARS for text in texts):
            raise DataError(f"{where}: a row is not [key, 0 or 1, source, generator, group]")
        facts.append(Facts(key, int(label), source, generator, group))
    return Embedded(embedding, facts)
