"""The replay file: parts come back as they were, belong to one encoder, and travel in the bundle under its digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import bundle
from engine.bundle import BundleError
from tests.engine.bundles import random_bundle
from train import replay
from train.data import DataError
from train.embed import Embedded, Facts

SHA = "a" * 64


def rows(count: int, seed: int = 0, sources: int = 2) -> Embedded:
    rng = np.random.default_rng(seed)
    facts = [Facts(f"k{i}", i % 2, f"source-{i % sources}", "ü-gen", f"g{i}") for i in range(count)]
    return Embedded(rng.standard_normal((count, 192)).astype(np.float32), facts)


def test_parts_come_back_as_they_were_and_the_bytes_are_the_same_each_time() -> None:
    parts = {"train": rows(6), "evaluate/clean": rows(3, 1)}
    data = replay.encode(parts, SHA)
    assert data == replay.encode(dict(reversed(parts.items())), SHA)
    back = replay.decode(data, SHA, "file")
    assert set(back) == set(parts)
    for name, part in parts.items():
        assert np.array_equal(back[name].embedding, part.embedding) and back[name].facts == part.facts


@pytest.mark.parametrize("damage", ["other encoder", "cut", "not finite", "text", "label"])
def test_what_cannot_be_used_is_refused_by_name(damage: str) -> None:
    part = rows(4)
    if damage == "not finite":
        part.embedding[1, 2] = np.nan
    if damage == "text":
        part.facts[0] = Facts("k" * 600, 0, "s", "g", "g")
    if damage == "label":
        part.facts[0] = Facts("k", 2, "s", "g", "g")
    data = replay.encode({"train": part}, SHA)
    with pytest.raises(DataError, match="thefile"):
        replay.decode(data[:-8] if damage == "cut" else data, "b" * 64 if damage == "other encoder" else SHA, "thefile")


def test_steps_add_to_the_file_that_the_probe_began_and_to_no_other_encoders(tmp_path: Path) -> None:
    replay.add(tmp_path, SHA, {"evaluate/clean": rows(2)})
    assert replay.kept(tmp_path, SHA) is None
    replay.begin(tmp_path, SHA, rows(4))
    replay.add(tmp_path, SHA, {"evaluate/clean": rows(2)})
    replay.add(tmp_path, "b" * 64, {"evaluate/clean": rows(5)})
    data = replay.kept(tmp_path, SHA)
    assert data is not None and replay.kept(tmp_path, "b" * 64) is None
    assert {name: len(part.facts) for name, part in replay.decode(data, SHA, "f").items()} == {"train": 4, "evaluate/clean": 2}


def test_a_large_part_is_cut_fairly_and_parts_of_the_same_facts_alike() -> None:
    big, other = rows(40, 0, sources=4), rows(40, 1, sources=4)
    small, alike = replay.bounded(big, 6), replay.bounded(other, 6)
    assert [f.key for f in small.facts] == [f.key for f in alike.facts]
    assert np.bincount(small.labels).tolist() == [6, 6]
    assert len({f.source for f in small.facts}) == 4
    assert replay.bounded(big, 20) is big


def test_it_travels_in_the_bundle_under_its_digest(tmp_path: Path) -> None:
    plain = random_bundle(tmp_path / "1")
    assert replay.of_bundle(plain) is None
    sha = plain.manifest.encoder.sha256
    loaded = random_bundle(tmp_path / "2", version="2", replay=replay.encode({"train": rows(4)}, sha))
    found = replay.of_bundle(bundle.load(loaded.path))
    assert found is not None and len(found["train"].facts) == 4
    file = loaded.path / "replay.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"replay\.safetensors"):
        bundle.load(loaded.path)
