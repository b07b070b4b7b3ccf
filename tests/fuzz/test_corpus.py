"""Every kept input again: those that once broke a promise, and the smallest set that reaches what the fuzzer reached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, record_of

KEPT = Path(__file__).parent / "corpus"
FILES = sorted(path for path in KEPT.glob("*/*") if path.parent.name != "images")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_kept_input(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


_EACH_IMAGE = """
import pathlib, sys
from tests.fuzz.targets import images
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    images(path.read_bytes())
"""


def test_kept_images_in_a_process_of_their_own() -> None:
    """A codec that crashes takes that process with it, and the last name printed is the file's."""
    root, kept = Path(__file__).parents[2], KEPT / "images"
    command = [sys.executable, "-c", _EACH_IMAGE, str(kept)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    assert len(done.stdout.split()) == len(list(kept.iterdir())) > 20


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in KEPT.glob("*/*")} == set(TARGETS)


def test_the_promises_can_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that lets something else out is noticed."""
    monkeypatch.setattr("worker.contracts.parse", lambda *_: {}["nothing"])
    with pytest.raises(KeyError):
        TARGETS["events"](b"{}")


def test_records_are_written_by_hand() -> None:
    record = record_of(b"ce_id: 1\ncontent-type: image/png\n\n\x89PNG\n\nmore")
    assert record.headers == (("ce_id", b"1"), ("content-type", b"image/png"))
    assert record.value == b"\x89PNG\n\nmore"
