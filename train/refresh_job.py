"""Resumable steps in a work folder: each writes its output whole, with a digest of what went in, or leaves nothing.

    WORK/lock                 one job at a time
    WORK/images/              labelled images by digest, kept from job to job
    WORK/steps/<step>/        a step's output; step.json names its inputs' digest, its files' digests and its result
    WORK/outcomes/<digest>    how a job with these inputs ended: the same question is not worked on twice
    WORK/promoting.json       the version that is being published

A step whose inputs and files are what step.json says is not done again; any other is done from the start. Killed at any point, a
job that is started again goes on with the first step that is not whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STEP_FILE = "step.json"


class Steps:
    """The steps of one job in `folder`. `on_step` is told each step's name and whether it is done or was found done."""

    def __init__(self, folder: Path, on_step: Callable[[str, bool], None] = lambda name, found: None) -> None:
        self._folder = folder
        self._on_step = on_step

    def run(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: as found, or `make(folder)`'s, which writes the step's files into an empty folder.

        inputs: plain values that decide the outcome, digests of what they stand for among them.
        """
        wanted = digest_of({"step": name, **inputs})
        found = self._found(name, wanted)
        self._on_step(name, found is not None)
        if found is not None:
            return found
        target = self.path(name)
        staged = self._folder / f".{name}.{secrets.token_hex(4)}.tmp"
        self._sweep(name)
        staged.mkdir(parents=True)
        result = make(staged)
        files = {str(path.relative_to(staged)): _sha256(path) for path in sorted(staged.rglob("*")) if path.is_file()}
        write_json(staged / STEP_FILE, {"inputs": wanted, "files": files, "result": result})
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        _sync(self._folder)
        return result

    def path(self, name: str) -> Path:
        """The folder of a step that is done."""
        return self._folder / name

    def _found(self, name: str, wanted: str) -> dict[str, Any] | None:
        folder = self.path(name)
        try:
            step = json.loads((folder / STEP_FILE).read_text("utf-8"))
            if step["inputs"] != wanted or any(_sha256(folder / file) != sha for file, sha in step["files"].items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        result: dict[str, Any] = step["result"]
        return result

    def _sweep(self, name: str) -> None:
        """What a killed job left half done."""
        for left in self._folder.glob(f".{name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)


def digest_of(content: Any) -> str:
    """SHA-256 of plain values, the same whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole and durably, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing, or nothing that can be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
