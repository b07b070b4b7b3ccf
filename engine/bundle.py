"""A model bundle on disk: resolve, load, write, publish. Its files are read by `bundle_files`.

    versions/                 `resolve` reads CURRENT: one line, the name of a version's folder beside it
    ├── CURRENT
    └── 2025.11.1/            a bundle
        ├── manifest.json         engine/manifest.py; the bundle's digest is the SHA-256 of these bytes
        ├── encoder.safetensors   timm's names; float32 or float16, float32 in memory
        ├── heads.safetensors     linear.*, knn.*, svm.*
        ├── MODEL_CARD.md
        └── replay.safetensors    may be absent: embeddings for a refit of the heads (train/replay.py); serving never parses it

Nothing in it is executable. Every file is read once, bounded, and its digest is that of the bytes that are parsed. A written
bundle never changes: a new model is a new version.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError
from safetensors.numpy import save as serialize_safetensors

from engine import bundle_files
from engine.bundle_files import (
    HEAD_TENSORS,
    KNN_IDS,
    BundleError,
    encoder_shapes,
    exists,
    load_encoder,
    load_heads,
    parse_manifest,
    problems,
    read,
    read_verified,
)
from engine.calibration import Calibration
from engine.heads import Head, Heads
from engine.manifest import (
    ENCODER_FILE,
    HEADS_FILE,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    REPLAY_FILE,
    Band,
    EncoderPart,
    FileRef,
    HeadsPart,
    KnnFacts,
    LinearFacts,
    Manifest,
    OcsvmFacts,
    Parent,
    PreprocessPart,
    Reference,
    Threshold,
    is_plain_name,
)
from engine.preprocess import Preprocess

__all__ = [
    "CURRENT_FILE",
    "Bundle",
    "BundleError",
    "Draft",
    "encoder_shapes",
    "load",
    "packaged",
    "publish",
    "read_manifest",
    "read_replay",
    "resolve",
    "write",
]

CURRENT_FILE = "CURRENT"


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A verified bundle in memory.

    `encoder`: float32 arrays by timm's names, shapes of `encoder_shapes()`; `digest`: hex SHA-256 of the manifest's bytes,
    which hold the digests of all other files; `path`: the folder it was read from.
    """

    manifest: Manifest
    encoder: dict[str, NDArray[np.float32]]
    heads: Heads
    digest: str
    path: Path

    @property
    def preprocess(self) -> Preprocess:
        """Crop, mean and std of this model."""
        return self.manifest.preprocess.value


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Everything of a bundle but the file digests, which `write` computes. Fields as in `Manifest`.

    `encoder`: float32 (or float16, to halve the file) by timm's names. `linear_c` and `svm_nu` are facts of the fit, for readers.
    """

    name: str
    version: str
    encoder: Mapping[str, NDArray[Any]]
    heads: Heads
    calibration: Mapping[Head, Calibration]
    layer_norm_eps: float
    model_card: str
    preprocess: Preprocess = field(default_factory=Preprocess)
    thresholds: Mapping[Head, Mapping[str, Threshold]] = field(default_factory=dict)
    abstain: Mapping[Head, Band] = field(default_factory=dict)
    reference: Reference | None = None
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    linear_c: float | None = None
    svm_nu: float | None = None
    created_at: datetime | None = None
    """Timezone-aware; None: now."""
    replay: bytes | None = None
    """Content of the replay file; None: the bundle has none."""


def resolve(path: Path | str) -> Path:
    """The folder of the bundle that `path` means: itself if it holds a manifest, else the version its CURRENT names.

    Raises:
        BundleError: no such folder, neither file in it, or CURRENT names no bundle beside it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; a model bundle is a folder with {MANIFEST_FILE} or {CURRENT_FILE}")
    if exists(folder / MANIFEST_FILE):
        return folder
    pointer = folder / CURRENT_FILE
    if not exists(pointer):
        raise BundleError(f"{folder}: holds neither {MANIFEST_FILE} nor {CURRENT_FILE}, so it is no model bundle")
    name = read(folder, CURRENT_FILE, 1024).decode("utf-8", "replace").strip()
    if not is_plain_name(name):
        raise BundleError(f"{pointer}: must hold the name of a folder beside it, holds {name!r}")
    version = folder / name
    if not exists(version / MANIFEST_FILE):
        raise BundleError(f"{pointer}: names {name}, but there is no {version / MANIFEST_FILE}")
    return version


def packaged() -> Path:
    """The folder of the bundle that comes with the project: `models/` of a checkout, `engine/_models/` of an installed wheel.

    Raises:
        BundleError: neither is there.
    """
    package = Path(__file__).resolve().parent
    checkout, installed = package.parent / "models", package / "_models"
    # Beside an installed package lies site-packages, where a folder `models` would be somebody else's.
    if (package.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    if installed.is_dir():
        return installed
    raise BundleError(f"{installed}: no model is packaged with this installation; name a bundle's folder")


def load(path: Path | str) -> Bundle:
    """Read and verify the bundle that `path` means (see `resolve`).

    Raises:
        BundleError: a missing, oversized or changed file, an unknown format, a tensor of a wrong name, shape or dtype, a
            weight that is not finite, a file outside the folder. The message names the file.
    """
    folder = resolve(path)
    raw = read(folder, MANIFEST_FILE, bundle_files.MAX_MANIFEST_BYTES)
    manifest = parse_manifest(folder / MANIFEST_FILE, raw)
    encoder = load_encoder(folder, manifest.encoder)
    heads = load_heads(folder, manifest.heads)
    read_verified(folder, manifest.model_card, bundle_files.MAX_MODEL_CARD_BYTES)
    if manifest.replay is not None:
        read_verified(folder, manifest.replay, bundle_files.MAX_REPLAY_BYTES)
    return Bundle(manifest, encoder, heads, hashlib.sha256(raw).hexdigest(), folder)


def read_manifest(path: Path | str) -> tuple[Manifest, str]:
    """The manifest of the bundle that `path` means and its digest, without reading the other files: cheap enough to poll.

    Raises:
        BundleError: as `load`, for the manifest alone.
    """
    folder = resolve(path)
    raw = read(folder, MANIFEST_FILE, bundle_files.MAX_MANIFEST_BYTES)
    return parse_manifest(folder / MANIFEST_FILE, raw), hashlib.sha256(raw).hexdigest()


def read_replay(bundle: Bundle) -> bytes | None:
    """The verified bytes of a bundle's replay file; None where it has none.

    Raises:
        BundleError: it is missing, oversized or changed.
    """
    part = bundle.manifest.replay
    return None if part is None else read_verified(bundle.path, part, bundle_files.MAX_REPLAY_BYTES)


def write(folder: Path | str, draft: Draft) -> Bundle:
    """Write a new bundle as `folder`: staged beside it, read back and verified, then renamed, so never half written.

    Raises:
        BundleError: the folder exists already, the draft is no valid bundle, or the disk refuses.
    """
    target = Path(folder)
    if target.exists():
        raise BundleError(f"{target}: exists already; a written bundle never changes, give the new one another version")
    staged = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    try:
        staged.mkdir(parents=True)
        for name, data in _files(target, draft).items():
            _write_durably(staged / name, data)
        bundle = load(staged)
        _sync_folder(staged)
        staged.rename(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise BundleError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Bundle(bundle.manifest, bundle.encoder, bundle.heads, bundle.digest, target)


def publish(parent: Path | str, version: str) -> Path:
    """Make `version` the one that `resolve(parent)` gives, in one atomic step, after verifying it.

    Returns:
        The folder of the version.

    Raises:
        BundleError: it is no valid bundle of that version, or the pointer cannot be written.
    """
    folder = Path(parent)
    if not is_plain_name(version):
        raise BundleError(f"{folder}: {version!r} is no plain name of a version's folder")
    bundle = load(folder / version)
    if bundle.path != folder / version or bundle.manifest.version != version:
        raise BundleError(f"{bundle.path / MANIFEST_FILE}: is of version {bundle.manifest.version}, not {version}")
    staged = folder / f".{CURRENT_FILE}.{secrets.token_hex(6)}.tmp"
    try:
        _write_durably(staged, f"{version}\n".encode())
        staged.replace(folder / CURRENT_FILE)
        _sync_folder(folder)
    except OSError as error:
        raise BundleError(f"{folder / CURRENT_FILE}: cannot be written: {error.strerror}") from error
    finally:
        staged.unlink(missing_ok=True)
    return folder / version


def _files(target: Path, draft: Draft) -> dict[str, bytes]:
    heads = {name: getattr(draft.heads, field_name) for field_name, name in HEAD_TENSORS.items()}
    if draft.heads.knn_ids is not None:
        if any("\n" in text for text in draft.heads.knn_ids):
            raise BundleError(f"{target / HEADS_FILE}: {KNN_IDS}: a name holds a line break")
        heads[KNN_IDS] = np.frombuffer("\n".join(draft.heads.knn_ids).encode(), np.uint8)
    files = {
        # Contiguous copies: the serialiser writes the memory as it lies, whatever the strides say.
        ENCODER_FILE: serialize_safetensors({k: np.ascontiguousarray(v) for k, v in draft.encoder.items()}),
        HEADS_FILE: serialize_safetensors({k: _contiguous(v) for k, v in heads.items()}),
        MODEL_CARD_FILE: draft.model_card.encode(),
    }
    if draft.replay is not None:
        files[REPLAY_FILE] = draft.replay
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    try:
        manifest = _manifest(draft, digests)
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, allow_nan=False, ensure_ascii=False)
    except ValidationError as error:
        raise BundleError(f"{target / MANIFEST_FILE}: {problems(error)}") from error
    except ValueError as error:
        raise BundleError(f"{target / MANIFEST_FILE}: a metric is not finite: {error}") from error
    return {**files, MANIFEST_FILE: f"{text}\n".encode()}


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    # ascontiguousarray would turn a scalar into a row of one.
    return array if array.flags.c_contiguous else array.copy(order="C")


def _manifest(draft: Draft, digests: Mapping[str, str]) -> Manifest:
    fakes = int(draft.heads.knn_labels.sum())
    return Manifest(
        name=draft.name,
        version=draft.version,
        created_at=draft.created_at or datetime.now(UTC).replace(microsecond=0),
        encoder=EncoderPart(
            file=ENCODER_FILE,
            sha256=digests[ENCODER_FILE],
            layer_norm_eps=draft.layer_norm_eps,
            parameters=sum(int(tensor.size) for tensor in draft.encoder.values()),
        ),
        heads=HeadsPart(
            file=HEADS_FILE,
            sha256=digests[HEADS_FILE],
            linear=LinearFacts(c=draft.linear_c),
            knn=KnnFacts(reals=len(draft.heads.knn_labels) - fakes, fakes=fakes),
            ocsvm=OcsvmFacts(
                gamma=draft.heads.svm_gamma,
                degree=draft.heads.svm_degree,
                coef0=draft.heads.svm_coef0,
                nu=draft.svm_nu,
                support_vectors=len(draft.heads.svm_dual),
            ),
        ),
        preprocess=PreprocessPart.of(draft.preprocess),
        calibration=dict(draft.calibration),
        thresholds={head: dict(named) for head, named in draft.thresholds.items()},
        abstain=dict(draft.abstain),
        reference=draft.reference,
        metrics=dict(draft.metrics),
        parents=draft.parents,
        model_card=FileRef(file=MODEL_CARD_FILE, sha256=digests[MODEL_CARD_FILE]),
        replay=FileRef(file=REPLAY_FILE, sha256=digests[REPLAY_FILE]) if REPLAY_FILE in digests else None,
    )


def _write_durably(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
