"""Scoring: the same numbers as `engine.detector` gives for the same files, one crop or five, in every condition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import backends
from engine.backends.base import Outputs
from engine.backends.null import NullBackend
from engine.bundle import Bundle
from engine.detector import Detector
from tests.engine.bundles import random_bundle
from tests.train.pictures import corpus, picture
from tests.train.reports import detector
from train.data import Damage, DataError, Entry, read_manifest
from train.ladder import BY_NAME, RUNGS
from train.scoring import score

CLEAN = [BY_NAME["clean"]]


@pytest.mark.parametrize("layout", ["center", "five"])
def test_scores_are_those_of_serving(tmp_path: Path, layout: str) -> None:
    corpus(tmp_path / "data", splits=("val",))
    picture(77, 100, 90).save(tmp_path / "data" / "val" / "real" / "0.jpg")  # fits in one crop, the others have five
    entries = read_manifest(tmp_path / "data", "val")
    with detector(tmp_path / "bundle", crops=layout) as opened:
        got = score(opened, entries, CLEAN, Damage())["clean"]
        files = [(str(entry.path), entry.path.read_bytes()) for entry in entries]
        served = [row.score for row in opened.classify(files)]
    assert all(s is not None for s in served) and got.several == (layout == "five")
    np.testing.assert_allclose(got.probability[:, 0], [s.score for s in served if s], rtol=1e-6)
    np.testing.assert_array_equal(got.ranking(0), (got.probability if layout == "five" else got.raw)[:, 0])


def test_conditions_hold_the_same_images_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    corpus(tmp_path / "data", splits=("val",))
    entries = read_manifest(tmp_path / "data", "val")
    entries[3].path.write_bytes(b"no image")
    damage, counted = Damage(), []
    with detector(tmp_path / "bundle") as opened:
        got = score(opened, entries, [BY_NAME["clean"], BY_NAME["jpeg50"], BY_NAME["blur2"]], damage, counted.append)
    assert list(got) == ["clean", "jpeg50", "blur2"] and [Path(name).name for name, _ in damage.skipped] == [entries[3].path.name]
    assert all([f.key for f in s.facts] == [e.sha256 for e in entries if e is not entries[3]] for s in got.values())
    assert not np.array_equal(got["clean"].raw, got["blur2"].raw) and counted == []


def test_quarters_of_a_grid_are_one_cluster(tmp_path: Path) -> None:
    corpus(tmp_path, splits=("val",))
    manifest = (tmp_path / "manifest.tsv").read_text().replace("single", "grid2x2", 1)
    (tmp_path / "manifest.tsv").write_text(manifest)
    with detector(tmp_path / "bundle") as opened:
        got = score(opened, read_manifest(tmp_path, "val"), CLEAN, Damage())["clean"]
    assert len(got.facts) == 15 and sorted(np.bincount(got.clusters).tolist()) == [1] * 11 + [4]


class _HalfBroken(NullBackend):
    """No finite output for bright crops."""

    def _infer(self, crops: np.ndarray) -> Outputs:
        out = super()._infer(crops)
        out.raw[out.raw[:, 0] > 0] = np.nan
        return out


def _entries(folder: Path, shades: list[int]) -> list[Entry]:
    from PIL import Image

    found = []
    for i, shade in enumerate(shades):
        path = folder / f"{i}.png"
        Image.new("RGB", (224, 224), (shade,) * 3).save(path)
        found.append(Entry(path, "val", i % 2, "s", "g", "s", "single", f"sha-{i}"))
    return found


def test_an_output_that_is_not_finite_is_named_and_left_out(tmp_path: Path) -> None:
    bundle: Bundle = random_bundle(tmp_path / "bundle")
    opened, damage = Detector.from_parts(bundle, _HalfBroken()), Damage()
    got = score(opened, _entries(tmp_path, [10, 250, 20]), CLEAN, damage)["clean"]
    assert [f.key for f in got.facts] == ["sha-0", "sha-2"] and np.isfinite(got.raw).all()
    assert damage.skipped == [("sha-1", "the model's output is not finite")]
    with pytest.raises(DataError, match="no finite score"):
        score(opened, _entries(tmp_path, [250]), CLEAN, Damage())


def test_nothing_to_score_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    (entry,) = _entries(tmp_path, [0])
    entry.path.unlink()
    opened = Detector.from_parts(random_bundle(tmp_path / "bundle"), backends.create("null"))
    with pytest.raises(DataError, match=r"none of 1 images.*0\.png"):
        score(opened, [entry], CLEAN, Damage())


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_every_rung_repeats_itself_and_changes_pixels(rung) -> None:  # type: ignore[no-untyped-def]
    image = picture(3, 230, 260, fake=True)
    once, again = rung.change(image), rung.change(image)
    assert once.mode == "RGB" and once.tobytes() == again.tobytes()
    assert (once.tobytes() == image.tobytes()) == (rung.name == "clean")
    # Images of one pixel are uploads, too.
    assert rung.change(image.resize((1, 1))).size[0] >= 1


def test_the_ladder_has_every_kind_of_degradation() -> None:
    assert {rung.family for rung in RUNGS} == {"clean", "jpeg", "webp", "resize", "crop", "blur", "screenshot"}
    assert len(BY_NAME) == len(RUNGS)
