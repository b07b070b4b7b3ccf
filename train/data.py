"""Labelled images on disk: folders with a manifest, and WebDataset-style tar shards in D3's layout.

A shard's members go by name, never by order: `<key>.real.jpg`, `<key>.gen_0.png` and `<key>.meta.json`, which `write_shards` adds
with source, generator and group. Nothing is decoded here: a record carries the files' bytes. A member that cannot be read is
skipped, counted and named in a `Damage` report.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from engine.images import ImageError

MEMBER = re.compile(r"^(?P<key>.+?)\.(?P<role>real|gen_\d+|aligned)\.(?P<extension>jpe?g|png|webp)$", re.IGNORECASE)
JPEG_START = b"\xff\xd8"
LABELS = {"real": 0, "fake": 1}
REQUIRED_COLUMNS = ("file", "split", "label", "source")


class DataError(Exception):
    """A data set cannot be used; the message names the file, and the line or column where there is one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file as a manifest names it. `group` is what must never be split: a source's prompt or folder."""

    path: Path
    split: str
    label: int
    source: str
    generator: str
    group: str
    layout: str
    sha256: str


@dataclass(slots=True)
class Damage:
    """What was skipped: member or file names with the reason."""

    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.skipped.append((name, reason))

    def __str__(self) -> str:
        named = ", ".join(f"{name} ({reason})" for name, reason in self.skipped[:5])
        more = f" and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        return f"{len(self.skipped)} skipped: {named}{more}" if self.skipped else "none skipped"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a shard: at most one real image and any number of generated ones, as file bytes."""

    key: str
    images: dict[str, bytes]
    meta: dict[str, dict[str, str]]

    @property
    def real(self) -> bytes | None:
        return self.images.get("real")

    @property
    def fakes(self) -> dict[str, bytes]:
        return {role: data for role, data in self.images.items() if role != "real"}


def read_manifest(root: Path, split: str | None = None) -> list[Entry]:
    """The entries of `root`/manifest.tsv, tab-separated with a header; of one split, or all.

    Columns `file` (relative), `split`, `label` (real | fake) and `source` are needed; `generator`, `layout`, `repo`, `path` and
    `sha256` are used where present. Raises DataError with the line at fault.
    """
    manifest = root / "manifest.tsv"
    try:
        with manifest.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t")
            missing = [column for column in REQUIRED_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{manifest}: column {missing[0]!r} is missing from the header")
            entries = [_entry(root, row, f"{manifest}, line {reader.line_num}") for row in reader]
    except FileNotFoundError as exc:
        raise DataError(f"{manifest}: no such file; a data folder holds a manifest.tsv beside its images") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{manifest}: not UTF-8 text") from exc
    chosen = [entry for entry in entries if split is None or entry.split == split]
    if not chosen:
        raise DataError(f"{manifest}: no entry of split {split!r}")
    return chosen


def _entry(root: Path, row: dict[str, str], where: str) -> Entry:
    if row["label"] not in LABELS:
        raise DataError(f"{where}: label {row['label']!r} is neither 'real' nor 'fake'")
    relative = PurePosixPath(row["file"] or "")
    if not row["file"] or relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where}: file {row['file']!r} is not a path inside the folder")
    # Seeds of one prompt share their folder of origin; a manifest without origins falls back on the file's own folder.
    origin = f"{row.get('repo') or ''}/{PurePosixPath(row['path']).parent}" if row.get("path") else str(relative.parent)
    return Entry(
        path=root / relative,
        split=row["split"],
        label=LABELS[row["label"]],
        source=row["source"],
        generator=row.get("generator") or ("camera" if row["label"] == "real" else "unknown"),
        group=f"{row['source']}:{origin}",
        layout=row.get("layout") or "single",
        sha256=row.get("sha256") or "",
    )


def trained_sources(root: Path) -> frozenset[str]:
    """Sources with images in the training split: their validation images calibrate, the others judge."""
    return frozenset(entry.source for entry in read_manifest(root, "train"))


def licences(root: Path) -> dict[str, str]:
    """Per source the terms that the manifest's `licence` column states, joined; "not stated" where there is none."""
    terms: dict[str, set[str]] = {}
    with (root / "manifest.tsv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            terms.setdefault(row["source"], set()).add(row.get("licence") or "not stated")
    return {source: ", ".join(sorted(found)) for source, found in terms.items()}


def digest(entries: Iterable[Entry]) -> str:
    """SHA-256 over the sorted (file name, label, sha256) of the entries: names a data set in TRAINING.md."""
    lines = sorted(f"{e.path.name}\t{e.label}\t{e.sha256}" for e in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_shard(path: Path, damage: Damage) -> Iterator[Record]:
    """Streams a shard's records; members of one key must be neighbours, in any order, as WebDataset writes them."""
    key = ""
    images: dict[str, bytes] = {}
    meta: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for name, data in _members(tar, path, damage):
                member = MEMBER.match(name)
                stem = member["key"] if member else name.split(".", 1)[0]
                if stem != key and images:
                    yield Record(key, images, meta)
                if stem != key:
                    key, images, meta = stem, {}, {}
                if member:
                    images[member["role"].lower()] = data
                elif name == f"{stem}.meta.json":
                    meta = _meta(name, data, path, damage)
    except FileNotFoundError as exc:
        raise DataError(f"{path}: no such shard") from exc
    except tarfile.TarError as exc:
        damage.add(path.name, f"unreadable from here on: {exc}")
    if images:
        yield Record(key, images, meta)


def _members(tar: tarfile.TarFile, path: Path, damage: Damage) -> Iterator[tuple[str, bytes]]:
    for info in tar:
        if not info.isfile():
            continue
        stream = tar.extractfile(info)
        data = stream.read() if stream is not None else b""
        if not data or len(data) != info.size:
            damage.add(f"{path.name}:{info.name}", "empty" if not data else "truncated")
            continue
        yield PurePosixPath(info.name).as_posix(), data


def _meta(name: str, data: bytes, path: Path, damage: Damage) -> dict[str, dict[str, str]]:
    try:
        meta = json.loads(data)
    except ValueError as exc:
        damage.add(f"{path.name}:{name}", f"not JSON: {exc}")
        return {}
    return meta if isinstance(meta, dict) else {}


def write_shards(
    entries: Sequence[Entry], out: Path, records_per_shard: int = 1000, aligned: Callable[[bytes], bytes] | None = None
) -> tuple[list[Path], Damage]:
    """Writes shards in D3's layout, files as they are (never re-encoded); returns the shards and what was skipped.

    One image is one record: `<number>_<sha or stem>.real.<ext>` or `.gen_0.<ext>`, with `.meta.json`. `aligned` makes of a real
    image's bytes the file of its aligned fake, which stands beside it as `.aligned.<ext>`. A 2x2 grid, which is four images, is
    left out and named. Each shard appears whole or not at all.
    """
    out.mkdir(parents=True, exist_ok=True)
    damage, shards = Damage(), []
    for start in range(0, len(entries), records_per_shard):
        shard = out / f"shard-{start // records_per_shard:06d}.tar"
        partial = shard.with_suffix(".tar.partial")
        with tarfile.open(partial, "w") as tar:
            for number, entry in enumerate(entries[start : start + records_per_shard], start):
                _write_record(tar, entry, number, damage, aligned)
        partial.replace(shard)
        shards.append(shard)
    return shards, damage


def _write_record(
    tar: tarfile.TarFile, entry: Entry, number: int, damage: Damage, aligned: Callable[[bytes], bytes] | None
) -> None:
    role = "gen_0" if entry.label else "real"
    key = f"{number:08d}_{entry.sha256[:12] or entry.path.stem.replace('.', '_')}"
    if entry.layout != "single":
        damage.add(str(entry.path), f"layout {entry.layout}: cut it into its images first")
        return
    try:
        data = entry.path.read_bytes()
        fake = aligned(data) if aligned is not None and not entry.label else b""
    except OSError as exc:
        damage.add(str(entry.path), exc.strerror or "unreadable")
        return
    except ImageError as exc:
        damage.add(str(entry.path), str(exc))
        return
    meta = {role: {"source": entry.source, "generator": entry.generator, "group": entry.group, "layout": entry.layout}}
    files = [(f"{key}.{role}{entry.path.suffix.lower()}", data)]
    if fake:
        files.append((f"{key}.aligned.{'jpg' if fake.startswith(JPEG_START) else 'png'}", fake))
    for name, content in (*files, (f"{key}.meta.json", json.dumps(meta, sort_keys=True).encode())):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
