"""Bundles on disk: what is written is read back; whatever is damaged is refused with the file's name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from engine import bundle as bundle_module
from engine import bundle_files
from engine.bundle import Bundle, BundleError, encoder_shapes, load, packaged, publish, read_manifest, resolve, write
from engine.heads import EMBEDDING_DIM, HEADS
from engine.manifest import Parent
from tests.engine.bundles import random_bundle, random_draft, random_encoder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "1")


@pytest.fixture
def folder(original: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "copy"
    shutil.copytree(original.path, copy)
    return copy


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def redigest(folder: Path, part: str) -> None:
    """Give the manifest the digest of the changed file, so that what is tested is the next check."""

    def change(content: dict[str, Any]) -> None:
        content[part]["sha256"] = hashlib.sha256((folder / content[part]["file"]).read_bytes()).hexdigest()

    edit(folder, change)


def test_what_is_written_is_read_back(original: Bundle, tmp_path: Path) -> None:
    draft = random_draft(seed=7, version="2.0", parents=(Parent(name="random", version="1", digest=original.digest),))
    written = write(tmp_path / "2.0", draft)
    read = load(tmp_path / "2.0")
    assert read.digest == written.digest == hashlib.sha256((tmp_path / "2.0" / "manifest.json").read_bytes()).hexdigest()
    assert read.manifest == written.manifest and read.path == written.path == tmp_path / "2.0"
    assert read.manifest.parents[0].digest == original.digest
    assert set(read.encoder) == set(encoder_shapes())
    for name, array in draft.encoder.items():
        np.testing.assert_array_equal(read.encoder[name], array)
        assert read.encoder[name].dtype == np.float32
    embedding = np.random.default_rng(0).standard_normal((5, EMBEDDING_DIM)).astype(np.float32)
    np.testing.assert_array_equal(read.heads.raw_scores(embedding), draft.heads.raw_scores(embedding))
    assert read.heads.knn_ids == draft.heads.knn_ids
    assert read.preprocess == draft.preprocess
    assert sorted(path.name for path in (tmp_path / "2.0").iterdir()) == [
        "MODEL_CARD.md",
        "encoder.safetensors",
        "heads.safetensors",
        "manifest.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.0"]


def test_the_same_draft_gives_the_same_bytes(tmp_path: Path, original: Bundle) -> None:
    at = original.manifest.created_at
    first = random_bundle(tmp_path / "a", created_at=at)
    assert random_bundle(tmp_path / "b", created_at=at).digest == first.digest
    assert random_bundle(tmp_path / "c", created_at=at, seed=1).digest != first.digest


def test_the_manifest_says_what_the_contract_asks_for(original: Bundle) -> None:
    content = json.loads((original.path / "manifest.json").read_text())
    assert content["format"] == "code-bundle/1"
    assert {"name", "version", "created_at", "metrics", "parents"} <= set(content)
    assert {"file", "sha256", "arch", "layer_norm_eps"} <= set(content["encoder"])
    assert content["encoder"]["parameters"] == 5_524_416
    assert content["preprocess"]["id"] == original.preprocess.id
    assert set(content["calibration"]) == set(HEADS) <= set(content["heads"])
    assert content["thresholds"]["linear"]["fpr_0.01"]["reals"] == 4000


def test_float16_weights_become_float32(tmp_path: Path) -> None:
    encoder = {name: array.astype(np.float16) for name, array in random_encoder(0).items()}
    read = random_bundle(tmp_path / "half", encoder=encoder)
    assert {array.dtype for array in read.encoder.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(read.encoder["norm.weight"], encoder["norm.weight"].astype(np.float32))
    assert (tmp_path / "half" / "encoder.safetensors").stat().st_size < 12_000_000


def test_strided_arrays_are_written_as_they_read(tmp_path: Path) -> None:
    encoder = random_encoder(0)
    encoder["blocks.0.attn.qkv.weight"] = np.asfortranarray(encoder["blocks.0.attn.qkv.weight"])
    read = random_bundle(tmp_path / "1", encoder=encoder)
    np.testing.assert_array_equal(read.encoder["blocks.0.attn.qkv.weight"], encoder["blocks.0.attn.qkv.weight"])


def test_fields_of_a_later_version_are_ignored(folder: Path, original: Bundle) -> None:
    edit(folder, lambda content: content.update(novelty={"a": 1}) or content["encoder"].update(novelty=2))
    assert load(folder).manifest == original.manifest


# --- damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder.safetensors", "heads.safetensors", "MODEL_CARD.md"])
def test_a_changed_byte_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name}: its SHA-256 is [0-9a-f]{{64}}, the manifest says"):
        load(folder)


@pytest.mark.parametrize("name", ["encoder.safetensors", "heads.safetensors", "MODEL_CARD.md"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: missing"):
        load(folder)


@pytest.mark.parametrize("name", ["encoder.safetensors", "manifest.json"])
def test_a_folder_or_a_pipe_is_no_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError, match=name):
        load(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match=rf"{name}: not a regular file"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '{"format": "code-bundle/1"', "\xff", '{"a": NaN}', "[" * 100_000], ids=repr
)
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load(folder)


@pytest.mark.parametrize("found", ["code-bundle/2", "", None, 1])
def test_an_unknown_format_is_refused(folder: Path, found: object) -> None:
    edit(folder, lambda content: content.update(format=found))
    with pytest.raises(BundleError, match=r"manifest\.json: unknown format .*; this version reads code-bundle/1"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("version"), "version"),
        (lambda c: c.update(version="../2"), "version"),
        (lambda c: c.update(name=""), "name"),
        (lambda c: c.update(created_at="yesterday"), "created_at"),
        (lambda c: c["encoder"].update(sha256="abc"), "encoder.sha256"),
        (lambda c: c["encoder"].update(arch="vit_base_patch16_224"), "encoder.arch"),
        (lambda c: c["encoder"].update(layer_norm_eps=0), "encoder.layer_norm_eps"),
        (lambda c: c["encoder"].update(file="heads.safetensors"), "files of their own"),
        (lambda c: c["heads"].pop("knn"), "heads.knn"),
        (lambda c: c["heads"]["knn"].update(k=5), "heads.knn.k"),
        (lambda c: c["calibration"].pop("ocsvm"), "no calibration for ocsvm"),
        (lambda c: c["calibration"].update(svm=c["calibration"]["linear"]), "calibration.svm"),
        (lambda c: c["calibration"]["linear"].update(slope=-1), "calibration.linear"),
        (lambda c: c["preprocess"].update(crop_px=256), "crop_px is 256"),
        (lambda c: c["preprocess"].update(pad_rgb=[9, 9, 9]), "pad_rgb"),
        (lambda c: c["preprocess"].update(id="0" * 16), "preprocess: .*id is 0000000000000000"),
        (lambda c: c["preprocess"].update(mean=[0.5, 0.5, 0.5]), "these values have the id"),
        (lambda c: c["preprocess"].update(std=[0, 1, 1]), "preprocess.std"),
        (lambda c: c["thresholds"]["linear"]["fpr_0.01"].update(fpr=2), "thresholds.linear.fpr_0.01.fpr"),
        (lambda c: c["abstain"]["linear"].update(low=0.9), "abstain.linear"),
        (lambda c: c["reference"].update(embedding_mean=[0.0]), "reference.embedding_mean"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, change: Callable[[dict[str, Any]], object], named: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{named}") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize("name", ["../encoder.safetensors", "/etc/passwd", "a/b", "a\\b", "..", ".", ".hidden", "", "x\n", "x\0"])
@pytest.mark.parametrize("part", ["encoder", "model_card"])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, part: str, name: str) -> None:
    shutil.copy(folder / "encoder.safetensors", folder.parent / "encoder.safetensors")
    edit(folder, lambda content: content[part].update(file=name))
    with pytest.raises(BundleError, match=rf"manifest\.json: {part}\.file"):
        load(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    shutil.move(folder / "encoder.safetensors", folder.parent / "encoder.safetensors")
    (folder / "encoder.safetensors").symlink_to("../encoder.safetensors")
    with pytest.raises(BundleError, match=r"encoder\.safetensors: leads out of its folder"):
        load(folder)


def test_links_within_the_folder_are_fine_as_kubernetes_mounts_have_them(folder: Path, original: Bundle) -> None:
    data = folder / "..2025_11_01"
    data.mkdir()
    (folder / "..data").symlink_to("..2025_11_01")
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(data / file.name)
        file.symlink_to(Path("..data") / file.name)
    assert load(folder).digest == original.digest


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ("MAX_MANIFEST_BYTES", "manifest.json"),
        ("MAX_ENCODER_BYTES", "encoder.safetensors"),
        ("MAX_HEADS_BYTES", "heads.safetensors"),
        ("MAX_MODEL_CARD_BYTES", "MODEL_CARD.md"),
    ],
)
def test_an_oversized_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str) -> None:
    monkeypatch.setattr(bundle_files, limit, (folder / name).stat().st_size)
    load(folder)
    monkeypatch.setattr(bundle_files, limit, (folder / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=rf"{name}: larger than \d+ bytes"):
        load(folder)


def tensor(name: str, value: np.ndarray | None) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("encoder", tensor("norm.weight", None), "missing tensors: norm.weight"),
        ("encoder", tensor("head.weight", np.zeros(2, np.float32)), "unexpected tensors: head.weight"),
        ("encoder", tensor("norm.weight", np.zeros(191, np.float32)), r"norm.weight: expected float32 \[192\]"),
        ("encoder", tensor("norm.weight", np.zeros(192, np.float64)), "norm.weight: expected float32"),
        ("encoder", tensor("norm.weight", np.full(192, np.nan, np.float32)), "norm.weight: holds a value that is not finite"),
        ("encoder", tensor("norm.weight", np.full(192, np.inf, np.float16)), "norm.weight: holds a value that is not finite"),
        ("heads", tensor("linear.weight", None), "missing tensors: linear.weight"),
        ("heads", tensor("linear.weight", np.zeros((1, 192), np.float32)), r"linear.weight: expected float32 \[192\]"),
        ("heads", tensor("svm.dual", np.full(24, np.inf, np.float32)), "svm.dual: holds a value that is not finite"),
        ("heads", tensor("knn.labels", np.zeros(48, np.uint8)), "knn.labels: the gallery needs images of both classes"),
        ("heads", tensor("knn.labels", np.arange(48, dtype=np.uint8) // 47), "the manifest says"),
        ("heads", tensor("knn.ids", np.full(9, 255, np.uint8)), "knn.ids"),
        ("heads", tensor("knn.ids", np.zeros(9, np.float32)), "knn.ids"),
        ("heads", tensor("knn.ids", np.frombuffer(b"a\nb", np.uint8)), "knn.ids: 2 names for 48 rows"),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, part: str, change: Callable[[dict[str, np.ndarray]], object], named: str) -> None:
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    redigest(folder, part)
    with pytest.raises(BundleError, match=rf"{part}\.safetensors: .*{named}"):
        load(folder)


@pytest.mark.parametrize("data", [b"", b"\x00" * 8, b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"not json at all!"], ids=len)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / "encoder.safetensors").write_bytes(data)
    redigest(folder, "encoder")
    with pytest.raises(BundleError, match=r"encoder\.safetensors: not a readable safetensors file"):
        load(folder)


def test_a_dtype_that_numpy_has_not_is_refused(folder: Path) -> None:
    header = json.dumps({"cls_token": {"dtype": "BF16", "shape": [1, 1, 192], "data_offsets": [0, 384]}}).encode()
    (folder / "encoder.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(384))
    redigest(folder, "encoder")
    with pytest.raises(BundleError, match=r"encoder\.safetensors"):
        load(folder)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value in a manifest, containers included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in leaves(child, (*path, key)))]


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused_in_one_line(folder: Path, original: Bundle, data: st.DataObject) -> None:
    content = json.loads((original.path / "manifest.json").read_text())
    *path, last = data.draw(st.sampled_from(leaves(content)[1:]))
    place = content
    for key in path:
        place = place[key]
    place[last] = data.draw(any_json)
    (folder / "manifest.json").write_text(json.dumps(content))
    try:
        read_manifest(folder)
    except BundleError as error:
        assert "manifest.json: " in str(error) and "\n" not in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_taken_or_refused_by_name(folder: Path, original: Bundle, data: st.DataObject) -> None:
    intact = (original.path / "heads.safetensors").read_bytes()
    damaged = bytearray(intact)
    header = 8 + int.from_bytes(intact[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header + 64))] = data.draw(st.integers(0, 255))
    (folder / "heads.safetensors").write_bytes(damaged[: data.draw(st.integers(0, 4)) * len(damaged) // 4 or None])
    redigest(folder, "heads")
    try:
        load(folder)
    except BundleError as error:
        assert "heads.safetensors: " in str(error) and "\n" not in str(error)


def test_names_from_a_file_cannot_break_the_line(folder: Path) -> None:
    tensors = load_file(folder / "heads.safetensors")
    save_file({**tensors, "a\n\x1b[2J": np.zeros(1, np.float32)}, folder / "heads.safetensors")
    redigest(folder, "heads")
    with pytest.raises(BundleError, match=r"unexpected tensors: a\?\?\[2J$"):
        load(folder)
    edit(folder, lambda content: content["thresholds"]["linear"].update({"a\nb": {}}))
    with pytest.raises(BundleError, match=r"thresholds\.linear\.a\?b\."):
        load(folder)


def test_a_folder_that_may_not_be_entered_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read: Permission denied"):
        load(folder)


# --- writing --------------------------------------------------------------------------------------------------------------


def test_a_written_bundle_is_never_written_over(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="exists already"):
        write(folder, random_draft(seed=1))
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"version": "a/b"}, "version"),
        ({"metrics": {"auroc": float("nan")}}, "metric"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"encoder": {}}, r"encoder\.safetensors: missing tensors|parameters"),
        ({"calibration": {}}, "no calibration"),
    ],
)
def test_a_draft_that_could_not_be_loaded_is_not_written(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=named):
        write(tmp_path / "bundle", random_draft(**fields))
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_a_line_break_cannot_be_kept(tmp_path: Path) -> None:
    draft = random_draft()
    names = ("a\nb", *draft.heads.knn_ids[1:])  # type: ignore[index]
    with pytest.raises(BundleError, match="line break"):
        write(tmp_path / "bundle", replace(draft, heads=replace(draft.heads, knn_ids=names)))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BundleError, match="bundle: cannot be written: No space left on device"):
        write(tmp_path / "bundle", random_draft())
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_killed_leaves_no_bundle(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from engine import bundle
from tests.engine.bundles import random_draft
bundle._sync_folder = lambda folder: os.kill(os.getpid(), 9)  # after the files, before the rename
bundle.write(Path(sys.argv[1]) / "v1", random_draft())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    assert not (tmp_path / "v1").exists()
    assert random_bundle(tmp_path / "v1").path.name == "v1"


# --- resolving and publishing ---------------------------------------------------------------------------------------------


def test_current_names_the_version(tmp_path: Path) -> None:
    first, second = random_bundle(tmp_path / "1"), random_bundle(tmp_path / "2", seed=1, version="2")
    with pytest.raises(BundleError, match=r"holds neither manifest\.json nor CURRENT"):
        resolve(tmp_path)
    assert publish(tmp_path, "1") == tmp_path / "1" == resolve(tmp_path)
    assert load(tmp_path).digest == first.digest == read_manifest(tmp_path)[1]
    assert publish(tmp_path, "2") == resolve(tmp_path)
    assert load(tmp_path).digest == second.digest
    assert load(tmp_path / "1").digest == first.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "CURRENT"]


def test_publishing_verifies_first(tmp_path: Path) -> None:
    random_bundle(tmp_path / "1")
    publish(tmp_path, "1")
    random_bundle(tmp_path / "2", version="2")
    random_bundle(tmp_path / "other", version="3")
    (tmp_path / "2" / "heads.safetensors").write_bytes(b"broken")
    for version, message in (("2", "heads.safetensors"), ("other", "is of version 3, not other"), ("9", "no such folder")):
        with pytest.raises(BundleError, match=message):
            publish(tmp_path, version)
    with pytest.raises(BundleError, match="no plain name"):
        publish(tmp_path, "../1")
    assert resolve(tmp_path) == tmp_path / "1"
    assert (tmp_path / "CURRENT").read_text() == "1\n"


@pytest.mark.parametrize("text", ["", "\n", "../1", "/etc", "1\n2", "9", "a" * 5000, "\x00"], ids=lambda text: repr(text[:8]))
def test_a_pointer_that_leads_nowhere_is_refused(tmp_path: Path, text: str) -> None:
    random_bundle(tmp_path / "1")
    (tmp_path / "CURRENT").write_text(text)
    with pytest.raises(BundleError, match="CURRENT"):
        resolve(tmp_path)


def test_readers_see_one_version_or_the_other_while_it_is_swapped(tmp_path: Path) -> None:
    digests = {random_bundle(tmp_path / v, seed=int(v), version=v).digest for v in ("1", "2")}
    publish(tmp_path, "1")
    stop, seen, failures = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(read_manifest(tmp_path)[1])
            except BundleError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        publish(tmp_path, "21"[turn % 2])
    stop.set()
    reader.join()
    assert failures == [] and seen == digests


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path(__file__)):
        with pytest.raises(BundleError, match="no such folder"):
            resolve(path)


def test_the_packaged_bundle_is_that_of_the_checkout_or_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "engine"
    package.mkdir()
    monkeypatch.setattr(bundle_module, "__file__", str(package / "bundle.py"))
    (tmp_path / "models").mkdir()
    with pytest.raises(BundleError, match="no model is packaged"):  # somebody else's `models` in site-packages
        packaged()
    (package / "_models").mkdir()
    assert packaged() == package / "_models"
    (tmp_path / "pyproject.toml").touch()
    assert packaged() == tmp_path / "models"


def test_the_page_on_bundles_names_every_field_and_tensor(original: Bundle) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "bundles.md").read_text("utf-8")
    fields = [*type(original.manifest).model_fields, *load_file(original.path / "heads.safetensors")]
    assert [name for name in fields if f"`{name}" not in page] == []
