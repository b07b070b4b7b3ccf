"""Policy, bundle and engine as `worker check` sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.bundles import random_bundle
from worker import probes
from worker.settings import EngineSettings, PolicySettings, Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundles") / "b").path


def found(folder: Path, policy: Path | None = None, **engine: Any) -> list[tuple[str, str, str]]:
    settings = Settings(engine=EngineSettings(bundle=folder, **engine), policy=PolicySettings(file=policy))
    return [(finding.level, finding.subject, finding.message) for finding in probes.model(settings)]


def test_a_bundle_that_runs(folder: Path) -> None:
    pytest.importorskip("torch")
    findings = found(folder, backend="torch", device="cpu", threads=1)
    assert {level for level, _, _ in findings} == {"ok"}
    assert [subject for _, subject, _ in findings] == ["bundle", "policy", "policy", "engine"]
    assert findings[2][2].startswith("tenant default: ai_generated from 0.5, review from ")
    assert findings[3][2].startswith("torch on cpu: ready in ")


def test_a_backend_that_does_not_run_here(folder: Path) -> None:
    (finding,) = [f for f in found(folder, backend="tensorrt") if f[1] == "engine"]
    assert finding[0] == "problem"
    assert finding[2].startswith("WORKER_ENGINE__BACKEND=tensorrt: ")


def test_a_policy_that_does_not_fit_the_bundle(folder: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[tenants.default]\n\nreview = 'fpr_0.5'\n")
    problems = [f for f in found(folder, policy, backend="tensorrt") if f[1] == "policy"]
    assert len(problems) == 1
    assert problems[0][0] == "problem"
    assert problems[0][2].startswith("policy.toml:3: tenants.default.review: ")


def test_a_damaged_bundle_is_named(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "heads.safetensors").write_bytes(b"x")
    (finding,) = [f for f in found(damaged) if f[1] != "policy"]
    assert finding[:2] == ("problem", "bundle")
    assert "heads.safetensors" in finding[2]
