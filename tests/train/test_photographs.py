"""Photographs of packages: crops at many scales, groups that stay whole, one manifest beside the corpus; Qt resource files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.pictures import corpus, picture
from train import photographs, qt_resources
from train.data import DataError, read_manifest, trained_sources
from train.packages import DEBIAN, FIRST, PACKAGES, Package


def resource_file(path: Path, files: dict[str, bytes], *, version: int = 1, compressed: tuple[str, ...] = ()) -> Path:
    """Writes /folder/NAME for each of `files`, by the layout in Qt's qresource.cpp."""
    names, data, tree = b"", b"", b""
    extra = b"\0" * 8 if version >= 2 else b""

    def name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    tree += struct.pack(">IHII", 0, 2, 1, 1) + extra
    tree += struct.pack(">IHII", name("folder"), 2, len(files), 2) + extra
    for inside, content in files.items():
        packed = inside in compressed
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        tree += struct.pack(">IHHHI", name(inside), int(packed), 0, 0, len(data)) + extra
        data += struct.pack(">I", len(stored)) + stored
    head = 20
    path.write_bytes(
        struct.pack(">4s4I", b"qres", version, head, head + len(tree), head + len(tree) + len(data)) + tree + data + names
    )
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_a_qt_resource_file_come_back(tmp_path: Path, version: int) -> None:
    files = {"a.webp": b"first", "ü.txt": b"second" * 40, "empty": b""}
    path = resource_file(tmp_path / "r.rcc", files, version=version, compressed=("ü.txt",))
    assert dict(qt_resources.files(path)) == {f"/folder/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("content", [b"", b"qres", b"RIFF" + b"\0" * 40, struct.pack(">4s4I", b"qres", 1, 20, 20, 20)])
def test_what_is_no_qt_resource_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.rcc").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.rcc: not a"):
        list(qt_resources.files(tmp_path / "x.rcc"))


def test_a_tree_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop.rcc"
    path.write_bytes(struct.pack(">4s4I", b"qres", 1, 20, 34, 34) + struct.pack(">IHII", 0, 2, 1, 0))
    with pytest.raises(DataError, match="before its folder"):
        list(qt_resources.files(path))


def test_crops_are_cut_at_the_photograph_s_own_resolution_and_at_smaller_scales() -> None:
    # Grey levels tell where a pixel lies: a ramp of one level for 16 px.
    ramp = np.repeat(np.arange(100, dtype=np.uint8), 16)
    photograph = Image.fromarray(np.broadcast_to(ramp[None, :, None], (1000, 1600, 3)).copy())
    cut = [np.asarray(crop) for crop in photographs.crops(photograph, 12, 3, np.random.default_rng(0))]
    assert {crop.shape for crop in cut} == {(320, 320, 3)}
    spans = [int(crop[0, -1, 0]) - int(crop[0, 0, 0]) + 1 for crop in cut]
    assert spans[:3] == [20, 20, 20]  # 320 px of the original, on its 16 px grid
    assert max(spans) > 30 and min(spans) >= 20
    again = [np.asarray(crop) for crop in photographs.crops(photograph, 12, 3, np.random.default_rng(0))]
    assert all((a == b).all() for a, b in zip(cut, again, strict=True))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    unpacked = tmp_path / "unpacked"
    (unpacked / "share").mkdir(parents=True)
    for number in range(4):
        picture(number, 400, 500).save(unpacked / "share" / f"photo-{number}.jpg")
    picture(9, 100, 500).save(unpacked / "share" / "photo-small.jpg")
    held = io.BytesIO()
    picture(20, 350, 360).save(held, "WEBP")
    resource_file(unpacked / "share" / "r.rcc", {"wanted.webp": held.getvalue(), "other.webp": held.getvalue()})
    known = (
        Package("one", "CC0", "share", ("photo-*.jpg",), crops=8),
        Package("two", "GPL-2+", "share", ("r.rcc:*/wanted.webp",), crops=4),
    )
    monkeypatch.setattr(photographs, "PACKAGES", known)
    return unpacked


def test_packages_are_told_apart_and_the_first_ones_stand_first() -> None:
    assert PACKAGES[: len(FIRST)] == FIRST
    sources = [package.source for package in PACKAGES]
    assert len(set(sources)) == len(sources) and len(set(DEBIAN)) == len(DEBIAN)
    judges = {(package.kind, package.judge) for package in PACKAGES}
    assert judges == {("camera", False), ("camera", True), ("human-art", False), ("human-art", True)}
    assert not any(package.judge for package in FIRST)


def test_a_picture_smaller_than_a_crop_gives_squares_of_its_shorter_side() -> None:
    small = picture(3, 260, 500)
    assert [crop.size for crop in photographs.crops(small, 3, 1, np.random.default_rng(1))] == [(260, 260)] * 3


def test_what_is_transparent_lies_on_a_grey() -> None:
    held = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 10, 10, 0)).save(held, "PNG")
    greys = set()
    for seed in range(20):
        rgb = np.asarray(photographs.opened(held.getvalue(), np.random.default_rng(seed)))
        assert rgb.shape == (8, 8, 3) and len(np.unique(rgb)) == 1
        greys.add(int(rgb[0, 0, 0]))
    assert 255 in greys and len(greys) > 3


def test_a_source_that_judges_is_neither_for_training_nor_for_validation(packages: Path, tmp_path: Path) -> None:
    known = (
        Package("art", "CC0", "share", ("photo-*.jpg",), crops=8, kind="human-art"),
        Package("judge", "CC0", "share", ("photo-*.jpg",), crops=8, smallest=100, judge=True),
    )
    out = tmp_path / "data"
    photographs.joined(corpus(tmp_path / "corpus"), photographs.write(packages, out, known), out)
    entries = read_manifest(out)
    assert {e.split for e in entries if e.source == "judge"} == {photographs.JUDGE}
    assert len({e.group for e in entries if e.source == "judge"}) == 5
    assert {e.generator for e in entries if e.source == "art"} == {"human-art"}
    assert "art" in trained_sources(out) and "judge" not in trained_sources(out)


def test_the_packages_to_fetch_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["photographs", "--packages"])
    assert photographs.main() == 0
    assert capsys.readouterr().out.split() == list(DEBIAN)


def test_photographs_stand_beside_the_corpus_and_a_photograph_is_on_one_side_alone(packages: Path, tmp_path: Path) -> None:
    beside = corpus(tmp_path / "corpus")
    out = tmp_path / "data"
    rows = photographs.write(packages, out, photographs.PACKAGES)
    assert photographs.joined(beside, rows, out) == 12 + 3 * 8 + 2 + 4
    entries = read_manifest(out)
    assert all(entry.path.exists() for entry in entries)
    mine = [entry for entry in entries if entry.source in ("one", "two")]
    assert {(e.source, e.split): sum(o.source == e.source and o.split == e.split for o in mine) for e in mine} == {
        ("one", "train"): 24, ("one", "val"): 2, ("two", "train"): 4,
    }  # fmt: skip
    splits = {entry.group: {other.split for other in mine if other.group == entry.group} for entry in mine}
    assert len(splits) == 5 and all(len(found) == 1 for found in splits.values())
    assert {entry.label for entry in mine} == {0}


def test_a_package_that_is_not_there_is_named_in_one_line(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / "share" / "r.rcc").unlink()
    arguments = ["--unpacked", str(packages), "--corpus", str(corpus(tmp_path / "corpus")), "--out", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", ["photographs", *arguments])
    assert photographs.main() == 2
    assert "no r.rcc; unpack the packages" in capsys.readouterr().err
