"""What a wheel carries: the current model, and only that."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.bundle import publish
from tests.engine.bundles import random_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, with two versions of a random model."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "README.md").touch()
    for package in ("engine", "worker", "train"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for version in ("1", "2"):
        random_bundle(tree / "models" / version, version=version)
    publish(tree / "models", "2")
    return tree


def build(tree: Path) -> Path:
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tree / "dist")], cwd=tree, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return next((tree / "dist").glob("*.whl"))


def test_a_wheel_carries_the_current_model_and_finds_it(tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tree)) as wheel:
        models = sorted(name for name in wheel.namelist() if "_models" in name)
        wheel.extractall(tmp_path / "site")
    assert models == [
        "engine/_models/2/MODEL_CARD.md",
        "engine/_models/2/encoder.safetensors",
        "engine/_models/2/heads.safetensors",
        "engine/_models/2/manifest.json",
        "engine/_models/CURRENT",
    ]
    code = "from engine.bundle import load, packaged; print(packaged()); print(load(packaged()).manifest.version)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "engine" / "_models"), "2"], done.stderr


def test_without_a_model_the_wheel_is_built_and_says_so_when_used(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / "models")
    with zipfile.ZipFile(build(tree)) as wheel:
        assert not [name for name in wheel.namelist() if "_models" in name]
        wheel.extractall(tmp_path / "site")
    code = "import sys; from engine.__main__ import main; sys.exit(main(['inspect']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no model is packaged with this installation; name a bundle's folder" in done.stderr
