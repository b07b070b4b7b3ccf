"""Shards as the input of pretraining: by name, only what is used, every record once, damage named, exact from any step."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import train.shard_source as shard_source  # noqa: E402
from engine.images import read as real_read  # noqa: E402
from tests.train.shards import d3, encoded, tar  # noqa: E402
from tests.train.tiny import recipe  # noqa: E402
from train import shard_index  # noqa: E402
from train.data import DataError  # noqa: E402
from train.shard_index import ShardIndex, read_member  # noqa: E402
from train.shard_source import ShardSource  # noqa: E402
from train.sources import SHARD_INDEX, open_source  # noqa: E402
from train.views import batch_at, loader  # noqa: E402


def _indexed(paths: list[Path], folder: Path) -> ShardIndex:
    return shard_index.build(paths, folder / SHARD_INDEX)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    _indexed(d3(root / "in"), root / "index")
    return root / "index"


def test_the_index_goes_by_name_and_points_at_the_bytes(folder: Path) -> None:
    index = ShardIndex(folder / SHARD_INDEX)
    assert index.roles == ["real", "gen_0", "gen_1", "gen_2", "gen_3"] and len(index) == 12
    assert read_member(index.paths, index.member(5, "real")) == encoded(509, "jpg", fake=False)
    assert read_member(index.paths, index.member(5, "gen_3")) == encoded(503, "png", fake=True)
    assert index.name(5, "real") == "elsa-0001.tar:elsa_v2__train__5.real"
    assert len(index.tables) == 12 and not index.damage.skipped


def test_the_index_is_kept_until_a_shard_changes(tmp_path: Path) -> None:
    paths = d3(tmp_path / "in", shards=2)
    first = _indexed(paths, tmp_path)
    made = (tmp_path / SHARD_INDEX).stat().st_mtime_ns
    assert _indexed(paths, tmp_path).digest == first.digest and (tmp_path / SHARD_INDEX).stat().st_mtime_ns == made
    tar(paths[0], [("a.real.jpg", encoded(1, "jpg", fake=False)), ("a.gen_0.png", encoded(2, "png", fake=True))])
    assert len(_indexed(paths, tmp_path)) == 5 != len(first)


def test_only_what_is_used_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(shard_source, "read", lambda data, limits: decoded.append(data) or real_read(data, limits))
    source = ShardSource(folder / SHARD_INDEX, recipe(aligned=0.0))
    slots = source.slots(recipe(records=3, aligned=0.0), 0, 0)
    assert len(slots.pairs) == 3 and len(decoded) == 6  # of five images a record, two


def test_real_and_fake_of_a_slot_are_of_one_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ShardSource(folder / SHARD_INDEX, recipe(aligned=0.0))
    used: list[tuple[int, str]] = []
    monkeypatch.setattr(source, "_read", lambda record, role, skipped: used.append((record, role)) or _picture())
    for step in range(8):
        source.slots(recipe(records=3, aligned=0.0), step, 0)
    assert all(a[0] == b[0] and a[1] == "real" for a, b in zip(used[::2], used[1::2], strict=True))
    assert {role for _, role in used[1::2]} == {"gen_0", "gen_1", "gen_2", "gen_3"}


def _picture() -> shard_source.Picture:
    from PIL import Image

    return shard_source.Picture(Image.new("RGB", (16, 16)), lossless=False)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_record_is_read_once_an_epoch_over_all_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    tiny = recipe(records=2, aligned=0.0, lanes=2, steps=12)
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        source = ShardSource(folder / SHARD_INDEX, tiny, world_size)
        monkeypatch.setattr(source, "_read", lambda record, role, _: _note(seen, record, role))
        for step in range(12 // 2 // world_size):
            source.slots(tiny, step, rank)
    assert seen == dict.fromkeys(range(12), 1)


def _note(seen: Counter[int], record: int, role: str) -> shard_source.Picture:
    seen[record] += role == "real"
    return _picture()


def test_the_loader_gives_the_same_batches_from_any_step_and_any_number_of_workers(folder: Path) -> None:
    tiny = recipe(steps=9, aligned=0.0)
    inline = list(loader(folder, tiny, 0, workers=0))
    late = list(loader(folder, tiny, 5, workers=2))
    assert [b.step for b in late] == [5, 6, 7, 8]
    for a, b in zip(inline[5:], late, strict=True):
        assert torch.equal(a.patches, b.patches) and torch.equal(a.index, b.index)
    assert not torch.equal(inline[0].patches, inline[1].patches)


def test_damaged_members_are_skipped_counted_and_named(tmp_path: Path) -> None:
    members = []
    for r in range(6):
        members.append((f"k{r}.real.jpg", b"no image" if r == 2 else encoded(r, "jpg", fake=False)))
        members.append((f"k{r}.gen_0.png", encoded(50 + r, "png", fake=True)[: 200 if r == 4 else None]))
    members.append(("k6.real.jpg", b""))
    _indexed([tar(tmp_path / "s.tar", members)], tmp_path)
    tiny = recipe(records=3, aligned=0.0, steps=8, lanes=1)
    batches = list(loader(tmp_path, tiny, 0, workers=1))
    assert {name for b in batches for name, _ in b.skipped} == {"s.tar:k2.real", "s.tar:k4.gen_0"}
    assert all(reason for b in batches for _, reason in b.skipped)
    assert ShardIndex(tmp_path / SHARD_INDEX).damage.skipped == [("s.tar:k6.real.jpg", "empty")]


def test_a_cut_shard_and_a_broken_header_cost_no_more_than_themselves(tmp_path: Path) -> None:
    cut, broken = d3(tmp_path, shards=2)
    cut.write_bytes(cut.read_bytes()[:-30_000])
    data = bytearray(broken.read_bytes())
    at = data.index(b"elsa_v2__train__5.real.jpg")
    data[at : at + 300] = b"\xff" * 300
    broken.write_bytes(data)
    index = _indexed([cut, broken], tmp_path)
    assert index.has("real").sum() >= 6 and not index.has("real")[[k.decode().endswith("__5") for k in index.keys]].any()
    said = str(index.damage)
    assert "elsa-0000.tar:" in said and "elsa-0001.tar: " in said and "no readable header" in said


def test_separate_reals_and_fakes_as_pack_writes_them(tmp_path: Path) -> None:
    members = [(f"r{i}.real.jpg", encoded(i, "jpg", fake=False)) for i in range(5)]
    members += [(f"f{i}.gen_0.png", encoded(90 + i, "png", fake=True)) for i in range(3)]
    _indexed([tar(tmp_path / "s.tar", members)], tmp_path)
    source = open_source(tmp_path, recipe(aligned=0.0, lanes=1))
    pairs = [pair for step in range(5) for pair in source.slots(recipe(records=3, aligned=0.0, lanes=1), step, 0).pairs]
    fakes = Counter(np.asarray(fake.image).tobytes() for _, fake in pairs)
    assert len(fakes) == 3 and set(fakes.values()) == {5} and all(fake.lossless for _, fake in pairs)


def test_aligned_fakes_stand_beside_their_reals(tmp_path: Path) -> None:
    members = []
    for i in range(4):
        real = encoded(i, "jpg", fake=False, side=250)
        members += [(f"k{i}.real.jpg", real), (f"k{i}.aligned.jpg", real), (f"k{i}.gen_0.png", encoded(9 + i, "png", fake=True))]
    _indexed([tar(tmp_path / "s.tar", members)], tmp_path)
    tiny = recipe(records=4, aligned=0.5)
    batch = batch_at(open_source(tmp_path, tiny), tiny, 0)
    patches = batch.patches.reshape(4, 2, 4, *batch.patches.shape[1:])
    assert torch.equal(patches[:, 0, :2], patches[:, 1, :2]) and not torch.equal(patches[:, 0, 2:], patches[:, 1, 2:])


@pytest.mark.parametrize(
    ("members", "changes", "says"),
    [
        ([("a.real.jpg", b"x")], {"aligned": 0.0}, "no images of one class"),
        ([("a.real.jpg", b"x"), ("a.gen_0.png", b"y")], {"aligned": 0.5}, "aligned fakes and the shards hold none"),
        ([("a.txt", b"x")], {}, "no record with .real"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(tmp_path: Path, members, changes, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=says):
        _indexed([tar(tmp_path / "s.tar", members)], tmp_path)
        open_source(tmp_path, recipe(**changes))


def test_compressed_shards_and_too_few_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(DataError, match=r"a\.tar\.gz: compressed"):
        shard_index.shards_in(tmp_path)
    _indexed(d3(tmp_path / "in", shards=1, records=1), tmp_path)
    with pytest.raises(DataError, match="too few for 2 processes"):
        open_source(tmp_path, recipe(aligned=0.0), world_size=2)


def test_nothing_but_damage_ends_in_one_line(tmp_path: Path) -> None:
    _indexed([tar(tmp_path / "s.tar", [("a.real.jpg", b"x"), ("a.gen_0.png", b"y")])], tmp_path)
    with pytest.raises(DataError, match=r"20 records in a row are damaged, the last s\.tar:a\.gen_0") as caught:
        list(loader(tmp_path, recipe(aligned=0.0), 0, workers=1))
    assert "Traceback" not in str(caught.value)


@pytest.mark.skipif("D3_SAMPLE" not in os.environ, reason="D3_SAMPLE does not name a shard of D3")
def test_d3_sample(tmp_path: Path) -> None:
    index = _indexed([Path(os.environ["D3_SAMPLE"])], tmp_path)
    assert index.roles == ["real", "gen_0", "gen_1", "gen_2", "gen_3"]
    for geometry in ("paper", "native"):
        tiny = recipe(aligned=0.0, geometry=geometry, preset="code")
        assert batch_at(open_source(tmp_path, tiny), tiny, 0).patches.shape == (24, 5, 3, 16, 16)
