"""Publishing by lineage: one writer at a time in the folder of versions, and the way back to the version before.

MODELS/.lock             held while CURRENT is decided about
MODELS/withdrawn.json    versions that were rolled back: what no refresh publishes again by itself
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine import bundle as bundles
from engine.file_lock import LockTimeout, hold
from train.promote import PromoteError

LOCK_FILE = ".lock"
WITHDRAWN_FILE = "withdrawn.json"
LOCK_TIMEOUT_S = 60.0


@contextmanager
def publishing(models: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Only one process publishes into `models` at a time.

    Raises:
        PromoteError: another one has been at it all the time, or the folder cannot be written.
    """
    try:
        models.mkdir(parents=True, exist_ok=True)
        with hold(models / LOCK_FILE, timeout_s):
            yield
    except LockTimeout as exc:
        raise PromoteError(f"{models}: another process is publishing there") from exc


def withdrawn(models: Path) -> list[dict[str, str]]:
    """Versions that were rolled back, oldest first: version, heads_sha256, encoder_sha256, at.

    Raises:
        PromoteError: the file is not what `rollback` writes.
    """
    path = models / WITHDRAWN_FILE
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as exc:
        raise PromoteError(f"{path}: not JSON ({exc})") from exc
    if not isinstance(found, list) or not all(isinstance(row, dict) and "heads_sha256" in row for row in found):
        raise PromoteError(f"{path}: not a list of withdrawn versions")
    return found


def rollback(models: Path, to: str | None = None) -> tuple[str, Path]:
    """Makes the version that the current one was made from current again, or version `to`; (the version that was left, folder).

    The version that is left is marked as withdrawn first, so that a kill in between leaves nothing that a later refresh would
    publish again.

    Raises:
        PromoteError: there is no version before, or it is gone or another one than the lineage names.
        BundleError: a bundle is damaged.
    """
    with publishing(models):
        current = bundles.load(models)
        if current.path == models:
            raise PromoteError(f"{models}: is a bundle itself, not a folder of versions with CURRENT")
        target = to if to is not None else _before(models, current)
        if target == current.manifest.version:
            raise PromoteError(f"{models}: version {target} is the current one already")
        if not (models / target).is_dir():
            raise PromoteError(f"{models}: there is no version {target}")
        bundles.load(models / target)
        _withdraw(models, current, target)
        return current.manifest.version, bundles.publish(models, target)


def _before(models: Path, current: bundles.Bundle) -> str:
    manifest = current.manifest
    if not manifest.parents:
        raise PromoteError(f"{models}: {manifest.version} was made from no other version: there is nothing to go back to")
    parent = manifest.parents[0]
    if not (models / parent.version).is_dir():
        raise PromoteError(f"{models}: {manifest.version} was made from {parent.version}, which is not there any more")
    _, digest = bundles.read_manifest(models / parent.version)
    if digest != parent.digest:
        raise PromoteError(f"{models}: {parent.version} is not the bundle that {manifest.version} was made from")
    return parent.version


def _withdraw(models: Path, current: bundles.Bundle, target: str) -> None:
    """What is gone back to is withdrawn no longer."""
    manifest = current.manifest
    row = {
        "version": manifest.version,
        "heads_sha256": manifest.heads.sha256,
        "encoder_sha256": manifest.encoder.sha256,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = [other for other in withdrawn(models) if other.get("version") not in (manifest.version, target)]
    _write(models / WITHDRAWN_FILE, [*rows, row])


def _write(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
