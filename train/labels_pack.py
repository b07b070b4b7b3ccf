"""Labelled images as a data folder and as shards: `train pack --labels`, and the training data of an encoder refresh."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from train.data import read_manifest, write_shards
from train.labels import Label, Tally

MANIFEST = "manifest.tsv"
COLUMNS = ("file", "split", "label", "generator", "source", "sha256")
SOURCE = "labels"
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


def write_folder(pairs: Sequence[tuple[Label, Path]], out: Path, tally: Tally) -> Path:
    """OUT/files/<sha256>.<jpg|png|webp> and OUT/manifest.tsv, split `train`, source `labels`; returns OUT.

    Files are unchanged. Other formats have no place in D3's layout: they are passed over and counted.
    """
    files = out / "files"
    files.mkdir(parents=True, exist_ok=True)
    rows = []
    for label, path in pairs:
        data = path.read_bytes()
        extension = _extension(data)
        if extension is None:
            tally.skip("a format that shards do not hold", label.sha256[:16])
            continue
        name = f"files/{label.sha256}.{extension}"
        (out / name).write_bytes(data)
        generator = "labelled" if label.label else "camera"
        rows.append((name, "train", "fake" if label.label else "real", generator, SOURCE, label.sha256))
    partial = out / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    partial.replace(out / MANIFEST)
    return out


def write_label_shards(pairs: Sequence[tuple[Label, Path]], out: Path, records: int, tally: Tally) -> list[Path]:
    """Shards in D3's layout from labelled images, and the data folder they were packed from (OUT/folder)."""
    folder = write_folder(pairs, out / "folder", tally)
    shards, damage = write_shards(read_manifest(folder), out, records)
    for name, reason in damage.skipped:
        tally.skip(reason, name)
    return shards


def _extension(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), None)
