"""The plan cache: what is not sound is never handed out, replicas build once, old plans go."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import plans
from engine.plans import PlanCache, PlanError, PlanKey

KEY = PlanKey(
    bundle="b" * 64,
    graph="c" * 64,
    architecture="a" * 16,
    flavour="tensorrt",
    version="10.9.1",
    gpu="NVIDIA L4",
    capability="sm89",
    precision="fp16",
    heads_precision="fp32",
    sizes=(1, 8),
    refit=True,
)
OTHERS = {
    "bundle": "d" * 64,
    "graph": "d" * 64,
    "architecture": "d" * 16,
    "flavour": "tensorrt_rtx",
    "version": "10.9.2",
    "gpu": "NVIDIA L40S",
    "capability": "sm90",
    "precision": "bf16",
    "heads_precision": "fp16",
    "sizes": (1, 8, 16),
    "refit": False,
}


def no_build() -> tuple[bytes, plans.Facts]:
    raise AssertionError("built although a plan was there")


def test_what_was_built_is_found(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "new" / "folder")
    assert cache.get(KEY) is None
    built = cache.obtain(KEY, lambda: (b"plan", {"inputs": []}))
    assert built.data == b"plan"
    for found in (cache.get(KEY), cache.obtain(KEY, no_build), plans.read(cache.file(KEY))):
        assert found is not None and found.data == b"plan" and found.facts["inputs"] == []
        assert found.facts["key"] == KEY.as_json()


@pytest.mark.parametrize("field", OTHERS)
def test_every_field_of_the_key_matters(tmp_path: Path, field: str) -> None:
    assert set(OTHERS) == set(KEY.as_json())
    cache = PlanCache(tmp_path)
    cache.obtain(KEY, lambda: (b"plan", {}))
    other = replace(KEY, **{field: OTHERS[field]})
    assert cache.get(other) is None
    # Not even under the other's name.
    for suffix in ("", ".json"):
        Path(f"{cache.file(KEY)}{suffix}").rename(f"{cache.file(other)}{suffix}")
    assert cache.get(other) is None
    assert cache.obtain(other, lambda: (b"other", {})).data == b"other"
    assert cache.get(other).data == b"other"  # type: ignore[union-attr]


@given(data=st.binary(min_size=1, max_size=64), position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: bytes, position: int, bit: int) -> None:
    cache = PlanCache(tmp_path_factory.mktemp("plans"))
    cache.obtain(KEY, lambda: (data, {}))
    damaged = bytearray(data)
    damaged[position % len(data)] ^= 1 << bit
    cache.file(KEY).write_bytes(damaged)
    assert cache.get(KEY) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "code-plan/2"}', '{"format": "code-plan/1"}', "\xff\xfe"])
def test_json_that_says_nothing_counts_as_missing(tmp_path: Path, text: str) -> None:
    cache = PlanCache(tmp_path)
    cache.obtain(KEY, lambda: (b"plan", {}))
    cache.file(KEY).with_suffix(".plan.json").write_bytes(text.encode("latin-1"))
    assert cache.get(KEY) is None
    with pytest.raises(PlanError, match=r"\.plan"):
        plans.read(cache.file(KEY))


def test_a_rejected_plan_is_built_anew_once(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    bad = cache.obtain(KEY, lambda: (b"bad", {})).facts["sha256"]
    assert cache.obtain(KEY, lambda: (b"good", {}), rejected=bad).data == b"good"
    # A process that rejected the same plan comes later, and takes what the first one built.
    assert cache.obtain(KEY, no_build, rejected=bad).data == b"good"


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> tuple[bytes, plans.Facts]:
        raise ValueError("no")

    cache = PlanCache(tmp_path)
    with pytest.raises(ValueError, match="no"):
        cache.obtain(KEY, fail)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}
    assert cache.obtain(KEY, lambda: (b"plan", {})).data == b"plan"


def test_a_full_disk_costs_the_plan_its_place_and_not_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plans, "replace", full)
    assert PlanCache(tmp_path).obtain(KEY, lambda: (b"plan", {})).data == b"plan"
    assert PlanCache(tmp_path).get(KEY) is None


def test_a_reader_between_the_two_files_of_a_writer_sees_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PlanCache(tmp_path)
    old = cache.obtain(KEY, lambda: (b"old", {})).facts["sha256"]
    seen: list[object] = []
    write = plans.replace

    def watched(file: Path, data: bytes) -> None:
        write(file, data)
        seen.append(cache.get(KEY))

    monkeypatch.setattr(plans, "replace", watched)
    cache.obtain(KEY, lambda: (b"new", {}), rejected=old)
    assert seen[0] is None and seen[1].data == b"new"  # type: ignore[attr-defined]


def start(folder: Path, barrier: object, built: object) -> None:
    def build() -> tuple[bytes, plans.Facts]:
        with built.get_lock():  # type: ignore[attr-defined]
            built.value += 1  # type: ignore[attr-defined]
        time.sleep(0.3)
        return b"plan", {}

    barrier.wait()  # type: ignore[attr-defined]
    assert PlanCache(folder).obtain(KEY, build).data == b"plan"


def test_replicas_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, built = context.Barrier(10), context.Value("i", 0)
    replicas = [context.Process(target=start, args=(tmp_path, barrier, built)) for _ in range(10)]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    assert [replica.exitcode for replica in replicas] == [0] * 10
    assert built.value == 1


def test_alike_are_refittable_plans_of_the_same_architecture(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    wanted = replace(KEY, bundle="e" * 64, graph="e" * 64)
    assert list(PlanCache(tmp_path / "none").alike(wanted)) == []
    fits = replace(KEY, bundle="1" * 64, graph="1" * 64)
    cache.obtain(fits, lambda: (b"fits", {}))
    for field, value in OTHERS.items():
        if field not in ("bundle", "graph"):
            cache.obtain(replace(fits, **{field: value}), lambda: (b"other", {}))
    assert [plan.data for plan in cache.alike(wanted)] == [b"fits"]
    assert list(cache.alike(replace(wanted, refit=False))) == []
    assert list(cache.alike(fits)) == [], "a plan is not its own likeness"
    cache.file(fits).write_bytes(b"fitz")
    assert list(cache.alike(wanted)) == []


def test_a_plan_under_another_ones_name_is_not_alike(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.obtain(KEY, lambda: (b"plan", {}))
    for suffix in ("", ".json"):
        Path(f"{cache.file(KEY)}{suffix}").rename(tmp_path / f"sm89-fp16-{'0' * 32}.plan{suffix}")
    assert list(cache.alike(replace(KEY, bundle="e" * 64))) == []


def test_the_oldest_plans_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "KEPT_PLANS", 3)
    cache = PlanCache(tmp_path)
    keys = [replace(KEY, bundle=f"{i:064d}") for i in range(6)]
    for i, key in enumerate(keys):
        cache.obtain(key, lambda: (b"plan", {}))
        os.utime(cache.file(key), (i, i))
    assert [cache.get(key) is not None for key in keys] == [False, False, False, True, True, True]
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_the_json_is_for_people_too(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.obtain(KEY, lambda: (b"plan", {"profiles": [1]}))
    facts = json.loads(cache.file(KEY).with_suffix(".plan.json").read_text())
    assert facts["bytes"] == 4 and facts["profiles"] == [1] and facts["key"]["gpu"] == "NVIDIA L4"


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans.default_folder() == tmp_path / "code-moderation-worker" / "plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plans.default_folder().is_relative_to(Path.home())
