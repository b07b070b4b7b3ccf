"""Policy, bundle and engine as `worker check` sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kafka import errors as kafka_errors

from tests.engine.bundles import random_bundle
from worker import kafka_transactions, probes
from worker.settings import DecodeSettings, EngineSettings, KafkaSettings, PolicySettings, Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundles") / "b").path


def found(folder: Path, policy: Path | None = None, **engine: Any) -> list[tuple[str, str, str]]:
    settings = Settings(engine=EngineSettings(bundle=folder, **engine), policy=PolicySettings(file=policy))
    return [(finding.level, finding.subject, finding.message) for finding in probes.model(settings)]


def test_a_bundle_that_runs(folder: Path) -> None:
    pytest.importorskip("torch")
    findings = found(folder, backend="torch", device="cpu", threads=1)
    assert [subject for _, subject, _ in findings] == ["decode", "bundle", "policy", "policy", "engine"]
    findings = findings[1:]
    assert {level for level, _, _ in findings} == {"ok"}
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
    (finding,) = [f for f in found(damaged) if f[1] not in ("policy", "decode")]
    assert finding[:2] == ("problem", "bundle")
    assert "heads.safetensors" in finding[2]


@pytest.mark.parametrize(
    ("library", "level", "words"),
    [("/x/libjpeg-6dc8d115.so.62.4.0", "ok", "by libjpeg-6dc8d115"), (None, "note", "decoded whole")],
)
def test_how_jpegs_are_decoded_is_told(monkeypatch: pytest.MonkeyPatch, library: str | None, level: str, words: str) -> None:
    monkeypatch.setattr("engine.jpeg_region.library", lambda: library)
    finding = probes.decoding()
    assert (finding.level, finding.subject) == (level, "decode")
    assert words in finding.message


@pytest.mark.parametrize(
    ("reason", "level", "words"),
    [
        (None, "ok", "by nvImageCodec on the GPU"),
        ("no driver", "note", "WORKER_DECODE__GPU=true, but JPEGs are decoded on the CPU: no"),
    ],
)
def test_whether_the_gpu_decodes_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str | None, level: str, words: str
) -> None:
    monkeypatch.setattr("worker.stages.decode_gpu.probe", lambda *_: reason)
    settings = Settings(engine=EngineSettings(bundle=tmp_path), decode=DecodeSettings(gpu=True))
    finding = list(probes.model(settings))[1]
    assert (finding.level, finding.subject) == (level, "decode")
    assert words in finding.message


def replicated(replicas: int) -> dict[str, dict[str, Any]]:
    return {"image.verdicts": {"partitions": [{"replica_nodes": list(range(replicas))}]}}


@pytest.mark.parametrize(
    ("nodes", "replicas", "min_insync", "said"),
    [
        (3, 3, {"image.verdicts": 2}, None),
        (3, 1, {"image.verdicts": 1}, "1 replica, min.insync.replicas 1: a record can be acknowledged and lost"),
        (3, 3, {"image.verdicts": 1}, "3 replicas, min.insync.replicas 1: a record can be acknowledged and lost"),
        (3, 3, {"image.verdicts": 3}, "publishing stops while one broker is away"),
        (1, 1, {}, "one broker"),
        (3, 3, {}, None),
    ],
)
def test_topics_that_do_not_outlive_a_broker_are_named(
    nodes: int, replicas: int, min_insync: dict[str, int], said: str | None
) -> None:
    findings = probes._durability(KafkaSettings(), nodes, replicated(replicas), min_insync)
    assert [finding.level for finding in findings] == ([] if said is None else ["note"])
    assert said is None or said in findings[0].message


class Admin:
    """Answers as a broker with these requests, and this error to a question for a transactional id."""

    def __init__(self, apis: list[int], error: Exception | None = None) -> None:
        self._manager = type("Manager", (), {"broker_version_data": type("Data", (), {"api_versions": dict.fromkeys(apis)})})
        self._error = error

    def describe_transactions(self, names: list[str]) -> None:
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize(
    ("error", "level", "said"),
    [
        (None, "ok", "code-worker-<host>-<random>"),
        (kafka_errors.TransactionalIdNotFoundError(), "ok", "code-worker-"),
        (
            kafka_errors.TransactionalIdAuthorizationFailedError(),
            "problem",
            "may not use transactional ids that begin with code-worker-",
        ),
        (kafka_errors.CoordinatorNotAvailableError(), "note", "does not answer"),
    ],
)
def test_whether_this_user_may_use_transactions(error: Exception | None, level: str, said: str) -> None:
    finding = probes._transactions(
        KafkaSettings(delivery="exactly_once"), Admin([*kafka_transactions.NEEDED_APIS.values()], error)
    )
    assert finding.level == level
    assert said in finding.message


def test_a_broker_without_transactions_is_a_problem() -> None:
    finding = probes._transactions(KafkaSettings(delivery="exactly_once"), Admin([0, 1, 22]))
    assert finding.level == "problem"
    assert "it lacks AddPartitionsToTxn" in finding.message
