"""The plan cache: compiled plans on disk, shared by replicas; what is damaged, foreign or outdated is never handed out.

    folder/
    ├── sm89-fp16-1f0c….plan          the plan, as TensorRT serialised it
    ├── sm89-fp16-1f0c….plan.json     everything it was built from, its size and SHA-256, its inputs, outputs, profiles, layers
    └── sm89-fp16-1f0c….lock          held while it is built, so that replicas starting together build once

The file's name is a digest of everything the plan depends on; the JSON must say the same, and the plan's bytes must have the
digest in it. Both are written beside their place, synced and renamed: a reader sees the old pair, the new one, or a pair that
does not fit together, which counts as missing. Whoever may write to the folder decides what the worker executes: keep it to
the worker's user.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from engine import file_lock

log = structlog.get_logger()

FORMAT = "code-plan/1"
LOCK_TIMEOUT_S = 1800.0
KEPT_PLANS = 32

Facts = dict[str, Any]


class PlanError(Exception):
    """A plan file cannot be read or does not match what its JSON says; the message names the file."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything a plan depends on.

    `bundle`: digest of the model bundle; `graph`: SHA-256 of the ONNX bytes, so that a release that writes another graph finds
    no old plans; `architecture`: `engine.graph.architecture`; `flavour` and `version`: tensorrt or tensorrt_rtx and its full
    version; `gpu`: name of the device, or `any` where the flavour's plans run on every GPU of a compute capability;
    `capability`: sm89, …; `sizes`: the batch sizes that have a profile; `refit`: whether the weights can be replaced.
    """

    bundle: str
    graph: str
    architecture: str
    flavour: str
    version: str
    gpu: str
    capability: str
    precision: str
    heads_precision: str
    sizes: tuple[int, ...]
    refit: bool

    @property
    def name(self) -> str:
        """Stem of the files."""
        canonical = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return f"{self.capability}-{self.precision}-{hashlib.sha256(canonical.encode()).hexdigest()[:32]}"

    def as_json(self) -> Facts:
        """The fields as they stand in a plan's JSON."""
        return {**asdict(self), "sizes": list(self.sizes)}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A verified plan: its bytes, and what its JSON says."""

    data: bytes
    facts: Facts


def default_folder() -> Path:
    """Where plans are kept if nothing else is said: the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "code-moderation-worker" / "plans"


def read(file: Path) -> Plan:
    """A plan and its facts, verified against each other.

    Raises:
        PlanError: missing, or not what the JSON beside it describes.
    """
    try:
        facts = json.loads(_sidecar(file).read_bytes())
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise PlanError(f"{error.filename}: missing") from error
    except (OSError, ValueError) as error:
        raise PlanError(f"{_sidecar(file)}: cannot be read: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise PlanError(f"{_sidecar(file)}: not of the format {FORMAT}")
    if facts.get("bytes") != len(data):
        raise PlanError(f"{file}: has {len(data)} bytes, its JSON says {facts.get('bytes')}")
    digest = hashlib.sha256(data).hexdigest()
    if facts.get("sha256") != digest:
        raise PlanError(f"{file}: its SHA-256 is {digest}, its JSON says {facts.get('sha256')}")
    return Plan(data, facts)


def write(file: Path, data: bytes, facts: Facts) -> Plan:
    """Write a plan and its JSON, each whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    stamped = {
        "format": FORMAT,
        **facts,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    replace(file, data)
    replace(_sidecar(file), f"{json.dumps(stamped, indent=1)}\n".encode())
    return Plan(data, stamped)


class PlanCache:
    """A folder of plans. Any number of processes may use it at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, key: PlanKey) -> Path:
        """Where the plan of a key lies."""
        return self.folder / f"{key.name}.plan"

    def get(self, key: PlanKey) -> Plan | None:
        """The plan of a key, or None where it is missing, damaged or another key's."""
        file = self.file(key)
        if not file.exists():
            return None
        try:
            plan = read(file)
        except PlanError as error:
            log.warning("plan.rejected", reason=str(error))
            return None
        if plan.facts.get("key") != key.as_json():
            log.warning("plan.rejected", reason=f"{file}: was built for something else than its name says")
            return None
        return plan

    def obtain(self, key: PlanKey, build: Callable[[], tuple[bytes, Facts]], rejected: str | None = None) -> Plan:
        """The plan of a key, built by this process or by another one that began earlier.

        Args:
            key: of the plan.
            build: makes the plan's bytes and facts; called while the key's lock is held.
            rejected: SHA-256 of a plan that was handed out for this key and did not load: that one counts as missing.

        Raises:
            Whatever `build` raises.
            LockTimeout: another process has been building for half an hour.
            OSError: the folder or the lock cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"{key.name}.lock"
        with file_lock.hold(lock, LOCK_TIMEOUT_S, on_wait=lambda: log.info("plan.waiting", file=self.file(key).name)):
            found = self.get(key)
            if found is not None and found.facts["sha256"] != rejected:
                return found
            began = time.monotonic()
            data, facts = build()
            facts = {**facts, "key": key.as_json()}
            try:
                plan = write(self.file(key), data, facts)
            except OSError as error:
                log.warning("plan.not_kept", file=str(self.file(key)), reason=str(error))
                return Plan(data, facts)
        log.info("plan.built", file=self.file(key).name, duration_ms=round((time.monotonic() - began) * 1000))
        self._prune(keep=key)
        return plan

    def alike(self, key: PlanKey) -> Iterator[Plan]:
        """Refittable plans that differ from the key's in their weights only, the newest first."""
        if not key.refit or not self.folder.is_dir():
            return
        same = {name: value for name, value in key.as_json().items() if name not in ("bundle", "graph")}
        for file in sorted(self.folder.glob(f"{key.capability}-{key.precision}-*.plan"), key=_age, reverse=True):
            if file == self.file(key):
                continue
            try:
                found = read(file)
                theirs = PlanKey(**{**found.facts["key"], "sizes": tuple(found.facts["key"]["sizes"])})
            except (PlanError, KeyError, TypeError) as error:
                log.warning("plan.rejected", reason=f"{file}: {error}")
                continue
            if file == self.file(theirs) and same.items() <= theirs.as_json().items():
                yield found

    def _prune(self, keep: PlanKey) -> None:
        """Remove the oldest plans beyond `KEPT_PLANS`; who still wants one builds it again."""
        files = sorted(self.folder.glob("*.plan"), key=_age, reverse=True)
        for file in files[KEPT_PLANS:]:
            if file != self.file(keep):
                _sidecar(file).unlink(missing_ok=True)
                file.unlink(missing_ok=True)


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def replace(file: Path, data: bytes) -> None:
    """Write a file beside its place, sync it, and rename it: whole or not at all."""
    staged = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    try:
        with staged.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)
