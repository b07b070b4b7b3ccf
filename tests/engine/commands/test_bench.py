"""`engine bench`: figures that add up, and what they were measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.__main__ import main
from engine.backends.base import OutOfDeviceMemory, Outputs
from engine.backends.null import NullBackend
from engine.commands import model_arguments
from engine.detector import Detector
from tests.engine.bundles import random_bundle


class Small(NullBackend):
    def _infer(self, crops: np.ndarray) -> Outputs:
        if len(crops) > 4:
            raise OutOfDeviceMemory("no room for 8 crops")
        return super()._infer(crops)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_bundle(tmp_path / "1")
    monkeypatch.setattr(model_arguments, "detector", lambda a: Detector.from_parts(bundle, Small(), a.head, a.crops))


@pytest.mark.usefixtures("small")
def test_json_says_what_was_measured_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "--batch-sizes", "1,4,8,4", "--seconds", "0", "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert report["backend"] == "null" and report["model"]["name"] == "random"
    assert {"machine", "versions", "commit", "at"} <= set(report) and report["machine"]["usable_cores"] >= 1
    one, four, eight = report["results"]
    assert [row["batch_size"] for row in (one, four, eight)] == [1, 4, 8]
    for row in (one, four):
        latency = row["latency_ms"]
        assert row["batches"] >= 3 and 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
        assert row["images_per_s"] == pytest.approx(row["batch_size"] * 1000 / latency["mean"], rel=0.05)
    assert eight == {"batch_size": 8, "error": "no room for 8 crops"}


@pytest.mark.usefixtures("small")
def test_people_see_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--batch-sizes", "2,8", "--seconds", "0"]) == 0
    text = capsys.readouterr().out
    assert "images/s" in text and "random 1 on null (cpu)" in text and "no room for 8 crops" in text


@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_be_written_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--batch-sizes", "1", "--seconds", "0", "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert "x.json: cannot be written: No such file or directory" in capsys.readouterr().err
