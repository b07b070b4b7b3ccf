"""Parity for the report: who is compared, on which crops, and what a disagreement looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import backends
from engine.backends.null import NullBackend
from tests.engine.bundles import random_bundle
from tests.train.pictures import corpus
from train import agreement
from train.data import DataError, read_manifest


def test_a_backend_that_cannot_run_is_named_and_the_reference_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "REFERENCE", "null")
    monkeypatch.setitem(backends._CLASSES, "none", ("engine.backends.missing", "Missing"))
    got = agreement.measure(random_bundle(tmp_path / "b"), agreement.made_up_crops(2), ("null", "none"))
    ((name, reason),) = got["not_run"]
    assert name == "none" and "not installed" in reason
    assert got["compared"] == [] and got["crops"] == 2 and got["reference"] == "null"


class _Offset(NullBackend):
    """Raw scores shifted by a little."""

    name = "offset"
    shift = 1e-6

    def _infer(self, crops):  # type: ignore[no-untyped-def]
        out = super()._infer(crops)
        out.raw[:] += self.shift
        return out


def test_differences_within_and_beyond_the_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "REFERENCE", "null")
    monkeypatch.setitem(backends._CLASSES, "offset", (__name__, "_Offset"))
    bundle = random_bundle(tmp_path / "b")
    (row,) = agreement.measure(bundle, None, ("offset",))["compared"]
    assert row["agrees"] and row["precision"] == "fp32" and row["max_probability"]["linear"] < row["tolerance"]
    monkeypatch.setattr(_Offset, "shift", 0.5)
    (row,) = agreement.measure(bundle, None, ("offset",))["compared"]
    assert not row["agrees"] and row["max_probability"]["linear"] > row["tolerance"]


def test_crops_are_spread_over_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path, reals=6, fakes=6, splits=("val",))
    monkeypatch.setattr(agreement, "CROPS", 4)
    entries = read_manifest(tmp_path, "val")
    crops = agreement.crops_of(entries)
    assert crops.shape == (4, 224, 224, 3) and len(np.unique(crops.reshape(4, -1), axis=0)) == 4
    for entry in entries:
        entry.path.unlink()
    with pytest.raises(DataError, match="no image"):
        agreement.crops_of(entries)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_openvino_agrees_with_torch_on_a_random_bundle(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("openvino")
    (row,) = agreement.measure(random_bundle(tmp_path / "b"), agreement.made_up_crops(4), ("openvino",))["compared"]
    assert row["backend"] == "openvino" and row["agrees"]
