"""An index of tar shards in D3's layout: where each member lies, by name, so that only what is used is read and decoded.

Plain (uncompressed) tars are random access: a header a member, then its bytes. The index is built once by walking the headers,
kept beside the run as arrays, and built again when a shard's name, size or time of change differs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.data import MEMBER, Damage, DataError
from train.store import Tables, tables_of

FORMAT = "code-shards/1"
SAMPLED_TABLES = 256
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a shard."""

    shard: int
    offset: int
    size: int


class ShardIndex:
    """Records of all shards as arrays: `shard` int32[n], `keys` S[n], `offset` and `size` int64[n, roles] (size 0: not there).

    Records stand in the order of the shards' names, then of their first member. Opened arrays are shared by forked processes.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts: dict[str, Any] = json.loads(bytes(arrays["facts"]))
                self.shard: NDArray[np.int32] = arrays["shard"]
                self.keys = arrays["keys"]
                self.offset: NDArray[np.int64] = arrays["offset"]
                self.size: NDArray[np.int64] = arrays["size"]
        except FileNotFoundError as exc:
            raise DataError(f"{path}: no such file; the shards were not indexed") from exc
        except (ValueError, KeyError, OSError) as exc:
            raise DataError(f"{path}: not an index of shards; remove it to have it built again") from exc
        if facts.get("format") != FORMAT:
            raise DataError(f"{path}: format {facts.get('format')!r} is not {FORMAT}")
        self.paths = [Path(name) for name in facts["paths"]]
        self.roles: list[str] = facts["roles"]
        self.stamp: list[list[Any]] = facts["stamp"]
        self.damage = Damage([(name, reason) for name, reason in facts["damage"]])
        self.tables = [Tables(**tables) for tables in facts["tables"]]

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the shards' names and every member's key, place and size."""
        whole = hashlib.sha256(json.dumps([FORMAT, [p.name for p in self.paths], self.roles]).encode())
        for array in (self.shard, self.keys, self.offset, self.size):
            whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def has(self, role: str) -> NDArray[np.bool_]:
        """bool[n]: which records hold a role."""
        if role not in self.roles:
            return np.zeros(len(self), np.bool_)
        held: NDArray[np.bool_] = self.size[:, self.roles.index(role)] > 0
        return held

    @property
    def fake_roles(self) -> list[str]:
        return [role for role in self.roles if role.startswith("gen_")]

    def member(self, record: int, role: str) -> Member:
        column = self.roles.index(role)
        return Member(int(self.shard[record]), int(self.offset[record, column]), int(self.size[record, column]))

    def name(self, record: int, role: str) -> str:
        """`shard.tar:key.role`, for reports."""
        return f"{self.paths[int(self.shard[record])].name}:{self.keys[record].decode()}.{role}"


def shards_in(folder: Path) -> list[Path]:
    """The tar files of a folder by name. Raises DataError naming a compressed one, which cannot be read at random."""
    paths = (
        sorted(p for p in folder.iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst"))) if folder.is_dir() else []
    )
    for path in paths:
        if not path.name.endswith(".tar"):
            raise DataError(f"{path}: compressed; unpack it to a plain .tar (its images are compressed already)")
    return paths


def build(paths: Sequence[Path], path: Path, on_shard: Callable[[int], None] | None = None) -> ShardIndex:
    """The index at `path`, made if it is not there or the shards have changed. Raises DataError where no record is found."""
    stamp = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    if path.exists():
        kept = ShardIndex(path)
        if kept.stamp == stamp and kept.paths == list(paths):
            return kept
    damage, parts = Damage(), list[_Part]()
    for number, shard in enumerate(paths):
        parts.append(_part(shard, damage))
        if on_shard is not None:
            on_shard(number + 1)
    roles = sorted({role for part in parts for role in part.columns}, key=lambda role: (role != "real", role))
    if not roles:
        raise DataError(f"{paths[0].parent if paths else path.parent}: no record with .real or .gen_N members; {damage}")
    offset, size = (np.concatenate([part.table(which, roles) for part in parts]) for which in (0, 1))
    shard_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])
    facts = {
        "format": FORMAT,
        "paths": [str(p) for p in paths],
        "roles": roles,
        "stamp": stamp,
        "damage": damage.skipped,
        "tables": _sampled_tables(paths, shard_of, offset[:, 0], size[:, 0]) if roles[0] == "real" else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            shard=shard_of,
            keys=np.concatenate([part.keys for part in parts if len(part.keys)]),
            offset=offset,
            size=size,
        )
    partial.replace(path)
    return ShardIndex(path)


@dataclass(frozen=True, slots=True)
class _Part:
    """One shard's records: keys S[n], and per role (offset int64[n], size int64[n])."""

    keys: NDArray[np.bytes_]
    columns: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]

    def table(self, which: int, roles: list[str]) -> NDArray[np.int64]:
        """int64[n, roles]: offsets (0) or sizes (1)."""
        out = np.zeros((len(self.keys), len(roles)), np.int64)
        for role, column in self.columns.items():
            out[:, roles.index(role)] = column[which]
        return out


def _part(shard: Path, damage: Damage) -> _Part:
    found = list(records(shard, damage))
    columns = {}
    for role in {role for _, members in found for role in members}:
        pairs = np.array([members.get(role, (0, 0)) for _, members in found], np.int64)
        columns[role] = (pairs[:, 0], pairs[:, 1])
    return _Part(np.array([key.encode() for key, _ in found], np.bytes_), columns)


def records(path: Path, damage: Damage) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {role: (offset, size)}) of one shard; members of a key are neighbours, in any order, as WebDataset writes them."""
    key, members = "", dict[str, tuple[int, int]]()
    for name, offset, size in _files(path, damage):
        found = MEMBER.match(PurePosixPath(name).as_posix())
        if not found:
            continue
        if found["key"] != key and members:
            yield key, members
        if found["key"] != key:
            key, members = found["key"], {}
        members[found["role"].lower()] = (offset, size)
    if members:
        yield key, members


def _files(path: Path, damage: Damage) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the bytes, size) of a shard's files. What is empty, cut off or unreadable is named in `damage`.

    After a broken header the walk goes on at the next whole one (`ignore_zeros`), so one bad sector does not cost a shard.
    """
    length, end, last = path.stat().st_size, 0, "its beginning"
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for info in tar:
                if info.offset > end:
                    damage.add(f"{path.name}: {info.offset - end} bytes after {last}", "no readable header; members may be lost")
                end, last = info.offset_data + -(-info.size // _BLOCK) * _BLOCK, info.name
                if not info.isfile():
                    continue
                if not info.size or info.offset_data + info.size > length:
                    damage.add(f"{path.name}:{info.name}", "empty" if not info.size else "truncated")
                    continue
                yield info.name, info.offset_data, info.size
    except (tarfile.TarError, OSError) as exc:
        damage.add(path.name, f"unreadable after {last}: {exc}")


def _sampled_tables(paths: Sequence[Path], shard: NDArray[np.int32], offset: Any, size: Any) -> list[dict[str, Any]]:
    """Quantisation tables of up to 256 of the reals that are JPEGs, evenly over the records."""
    held = np.flatnonzero(size)
    out = []
    for i in held[np.linspace(0, len(held) - 1, min(len(held), SAMPLED_TABLES)).round().astype(int)] if len(held) else []:
        data = read_member(paths, Member(int(shard[i]), int(offset[i]), int(size[i])))
        try:
            tables = tables_of(data)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # named when it is drawn and decoded
            continue
        if tables is not None:
            out.append({"values": tables.values, "subsampling": tables.subsampling})
    return out


def read_member(paths: Sequence[Path], member: Member) -> bytes:
    """The bytes of one member. Raises DataError if the shard is gone or has shrunk."""
    try:
        with io.FileIO(paths[member.shard]) as file:
            data = os.pread(file.fileno(), member.size, member.offset)
    except OSError as exc:
        raise DataError(f"{paths[member.shard]}: {exc.strerror}") from exc
    return data
