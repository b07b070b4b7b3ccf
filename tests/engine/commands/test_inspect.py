"""`engine inspect`: what it says of a bundle, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.__main__ import main
from engine.manifest import Parent
from tests.engine.bundles import random_bundle


def test_people_read_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = Parent(name="random", version="0", digest="ab" * 32)
    bundle = random_bundle(tmp_path / "1", parents=(parent,), metrics={"unseen": {"auroc": 0.91}, "curve": [0.5] * 99})
    assert main(["inspect", str(tmp_path / "1")]) == 0
    text = capsys.readouterr().out
    lines = {line.split(maxsplit=1)[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert text.startswith("random 1\n") and bundle.digest in text and "\x1b" not in text
    assert "5,524,416 parameters, eps 1e-06" in lines["encoder"]
    assert "random 0 abababababab" in lines["parent"]
    assert "24 real and 24 generated" in lines["knn"]
    assert "score from 0.9000: FPR 0.500% of 4,000 reals (95% sure: below 1.000%)" in lines["fpr_0.01"]
    assert lines["unseen.auroc"].endswith(" 0.91")
    assert len(lines["curve"]) < 120 and lines["curve"].endswith("…")


def test_programs_read_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = random_bundle(tmp_path / "1")
    assert main(["inspect", str(tmp_path / "1"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["digest"] == bundle.digest and content["verified"] is True
    assert content["manifest"] == json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert content["size_bytes"]["encoder.safetensors"] == (tmp_path / "1" / "encoder.safetensors").stat().st_size
