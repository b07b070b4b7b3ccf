"""What lies behind `--data`: a folder with a manifest becomes a pixel store, a folder of shards an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.images import ImageError, read
from train import pool, shard_index, stages, store
from train.data import Damage, DataError, Entry, read_manifest, trained_sources
from train.recipe import Recipe
from train.shard_index import ShardIndex, read_member
from train.sources import SHARD_INDEX, Source
from train.terminal import counter
from train.views import bases

Rgb = NDArray[np.uint8]


def prepared_folder(data: Path, out: Path) -> Path:
    """Where the prepared form of `data` lies in a run's folder. Raises DataError if it is neither kind of data."""
    if (data / "manifest.tsv").exists():
        return out / "store"
    if shard_index.shards_in(data):
        return out / "shards"
    raise DataError(f"{data}: holds neither a manifest.tsv nor .tar shards: manifest.tsv: no such file")


def prepare(
    data: Path,
    out: Path,
    recipe: Recipe,
    reconstruct: Callable[[], Callable[[Rgb], Rgb] | None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Decodes a folder into OUT/store, or indexes shards into OUT/shards, unless that is done; returns facts of the data.

    `reconstruct` is called for the maker of aligned fakes, only where the store makes them; None: it makes none.
    """
    folder = prepared_folder(data, out)
    if folder.name == "store":
        entries = read_manifest(data, "train")
        built, damage = store.build(entries, folder, reconstruct(), counter("decoded"))
        say(f"store: {len(built.items)} images; {damage}")
        if recipe.pool_copies:
            pool.build(folder, folder / "pool", recipe.pool_copies, counter("pool"))
        return stages.data_facts(data, entries, sum(item.pair >= 0 for item in built.items))
    if recipe.pool_copies:
        raise DataError(f"{data}: a pool (pool_copies) is made of a folder with a manifest, not of shards")
    index = shard_index.build(shard_index.shards_in(data), folder / SHARD_INDEX)
    say(f"shards: {len(index)} records in {len(index.paths)} shards; {index.damage}")
    return shard_facts(index)


def shard_facts(index: ShardIndex) -> dict[str, Any]:
    """As `stages.data_facts`: a role of D3 (gen_0 to gen_3) stands for its generator; shards state no licences."""
    counts = {role: int(index.has(role).sum()) for role in index.roles}
    sources = [
        {
            "label": "real" if role == "real" else "fake",
            "source": "shards",
            "generator": role,
            "files": n,
            "licence": "not stated",
        }
        for role, n in counts.items()
        if role != "aligned"
    ]
    fakes = sum(counts[role] for role in index.fake_roles)
    aligned = counts.get("aligned", 0)
    return {"real": counts.get("real", 0), "fake": fakes, "aligned": aligned, "sha256": index.digest, "sources": sources}


def fit_images(source: Source, recipe: Recipe) -> Iterator[tuple[Rgb, int]]:
    """(uint8[h, w, 3], label) of about `probe_images` training images, as delivered and without further augmentation."""
    given = 0
    for step in range(recipe.steps):
        for _, side, _, base in bases(source, source.slots(recipe, step, 0).pairs, recipe, step, 0):
            yield np.asarray(base), side
            given += 1
        if given >= recipe.probe_images:
            return


def held_out_images(folder: Path, most: int) -> Iterator[tuple[Rgb, int]]:
    """(uint8[h, w, 3], label) of up to `most` held-out images, half of each class, spread evenly; damaged ones are left out.

    Of a folder with a manifest: validation images of sources that are in training too (the others are to judge, not to steer).
    Of shards: real and first fake of each record.
    """
    for label, files in enumerate(_held_out_files(folder)):
        wanted = min(most // 2, len(files))
        for i in np.linspace(0, len(files) - 1, wanted).round().astype(int) if wanted else ():
            try:
                yield read(files[i](), store.LIMITS).frames[0], label
            except (ImageError, OSError):
                continue


def _held_out_files(folder: Path) -> tuple[list[Callable[[], bytes]], list[Callable[[], bytes]]]:
    if (folder / "manifest.tsv").exists():
        sources = trained_sources(folder)
        entries = [e for e in read_manifest(folder, "val") if e.source in sources and e.layout == "single"]
        real, fake = ([e.path.read_bytes for e in entries if e.label == label] for label in (0, 1))
        return real, fake
    paths = shard_index.shards_in(folder)
    if not paths:
        raise DataError(f"{folder}: holds neither a manifest.tsv nor .tar shards")
    records = [(number, members) for number, path in enumerate(paths) for _, members in shard_index.records(path, Damage())]

    def reader(number: int, where: tuple[int, int]) -> Callable[[], bytes]:
        return lambda: read_member(paths, shard_index.Member(number, *where))

    reals = [reader(number, members["real"]) for number, members in records if "real" in members]
    fakes = [reader(number, min(m.items())[1]) for number, members in records if (m := _fakes(members))]
    return reals, fakes


def _fakes(members: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {role: where for role, where in members.items() if role.startswith("gen_")}


def sample_store(index: ShardIndex, out: Path, records: int) -> None:
    """Builds OUT/store from records spread evenly over the shards, for `train probe`: of each its real and one fake."""
    folder, entries = out / "sample", list[Entry]()
    folder.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(np.linspace(0, len(index) - 1, min(records, len(index))).round().astype(int).tolist()):
        fakes = [role for role in index.fake_roles if index.member(i, role).size]
        for role in (["real"] if index.has("real")[i] else []) + ([fakes[number % len(fakes)]] if fakes else []):
            path = folder / f"{i}.{role}"
            data = read_member(index.paths, index.member(i, role))
            path.write_bytes(data)
            group = f"shards:{index.keys[i].decode()}"
            generator = "camera" if role == "real" else role
            entries.append(Entry(path, "train", int(role != "real"), "shards", generator, group, "single", ""))
    store.build(entries, out / "store")
    for entry in entries:
        entry.path.unlink()
    folder.rmdir()
