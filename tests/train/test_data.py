"""Manifests and shards: names decide, damage is named, every shard has one reader."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.train.pictures import corpus
from train.data import Damage, DataError, digest, read_manifest, read_shard, trained_sources, write_shards


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_manifest_gives_labels_sources_and_groups(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path), "train")
    assert sorted(e.label for e in entries) == [0] * 6 + [1] * 6
    assert entries[0].group == "real-source-0:owner/real-source-0/folder0"
    assert all(e.path.is_file() for e in entries)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("file\t", "name\t", 1), "column 'file' is missing"),
        (lambda text: text.replace("\treal\t", "\ttrue\t", 1), "line 2: label 'true'"),
        (lambda text: text.replace("train/real/0.jpg", "../0.jpg", 1), "not a path inside the folder"),
        (lambda text: text.split("\n")[0] + "\n", "no entry of split 'train'"),
    ],
)
def test_manifest_errors_name_line_and_column(tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]
    manifest = corpus(tmp_path) / "manifest.tsv"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(DataError, match=says):
        read_manifest(tmp_path, "train")


def test_manifest_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.tsv: no such file"):
        read_manifest(tmp_path, "train")


def test_members_go_by_name_not_by_order(tmp_path: Path) -> None:
    # D3's keys differ in extension from record to record, and the order of members is anything.
    shard = _tar(
        tmp_path / "d3.tar",
        [
            ("elsa_v2__train__1.url.txt", b"u"),
            ("elsa_v2__train__1.gen_3.png", b"three"),
            ("elsa_v2__train__1.real.jpg", b"real"),
            ("elsa_v2__train__1.gen_0.jpg", b"zero"),
            ("elsa_v2__train__2.caption.txt", b"c"),
            ("elsa_v2__train__2.gen_1.webp", b"one"),
            ("elsa_v2__train__2.real.PNG", b"other"),
        ],
    )
    damage = Damage()
    first, second = read_shard(shard, damage)
    assert first.key == "elsa_v2__train__1"
    assert (first.real, first.fakes) == (b"real", {"gen_3": b"three", "gen_0": b"zero"})
    assert (second.real, second.fakes) == (b"other", {"gen_1": b"one"})
    assert not damage.skipped


def test_damage_is_counted_and_named_and_the_rest_is_read(tmp_path: Path) -> None:
    shard = _tar(
        tmp_path / "s.tar", [("a.real.jpg", b"x" * 600), ("b.real.jpg", b""), ("b.gen_0.png", b"y"), ("c.real.jpg", b"z" * 900)]
    )
    shard.write_bytes(shard.read_bytes()[: 512 + 1024 + 512 + 512 + 512 + 512 + 100])
    damage = Damage()
    records = list(read_shard(shard, damage))
    assert [(r.key, sorted(r.images)) for r in records] == [("a", ["real"]), ("b", ["gen_0"])]
    assert damage.skipped[0] == ("s.tar:b.real.jpg", "empty")
    assert len(damage.skipped) == 2 and damage.skipped[1][0].startswith("s.tar")
    assert "2 skipped: s.tar:b.real.jpg (empty)" in str(damage)


def test_packed_shards_hold_the_files_unchanged(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path / "in"), "train")
    entries[3].path.unlink()
    shards, damage = write_shards(entries, tmp_path / "out", records_per_shard=5)
    assert len(shards) == 3 and [name for name, _ in damage.skipped] == [str(entries[3].path)]
    records = [record for shard in shards for record in read_shard(shard, Damage())]
    packed = {next(iter(r.images.values())) for r in records}
    assert packed == {e.path.read_bytes() for e in entries if e.path.exists()}
    assert records[0].meta["real"]["source"] == "real-source-0"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_pack_puts_aligned_fakes_beside_their_reals_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path / "in"), "train")
    entries[1] = dataclasses.replace(entries[1], layout="grid2x2")
    shards, damage = write_shards(entries, tmp_path / "out", aligned=lambda data: b"\xff\xd8" + data[:9])
    records = [record for shard in shards for record in read_shard(shard, Damage())]
    assert sum("aligned" in r.images for r in records) == sum(r.real is not None for r in records) == 5
    assert all("aligned" in r.images for r in records if r.real is not None)
    assert [(name, reason) for name, reason in damage.skipped] == [
        (str(entries[1].path), "layout grid2x2: cut it into its images first")
    ]


def test_digest_depends_on_content_not_on_order(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path), "train")
    assert digest(entries) == digest(entries[::-1]) != digest(entries[1:])


def test_trained_sources(tmp_path: Path) -> None:
    assert trained_sources(corpus(tmp_path, sources=1)) == {"real-source-0", "fake-source-0"}


@pytest.mark.skipif("D3_SAMPLE" not in os.environ, reason="D3_SAMPLE does not name a shard of D3")
def test_d3_sample() -> None:
    records = list(read_shard(Path(os.environ["D3_SAMPLE"]), Damage()))
    assert records and all(r.real and sorted(r.fakes) == ["gen_0", "gen_1", "gen_2", "gen_3"] for r in records)
