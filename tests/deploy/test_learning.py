"""Worker, console and the refresh CronJob by their manifests alone: arguments, environment, volumes, brokers with TLS and SCRAM.

Apache Kafka where there is one (KAFKA_CLUSTER), the embedded broker without TLS where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from engine import bundle
from tests.conftest import cluster_script
from tests.deploy.kubelet import Container, Node, get
from tests.deploy.manifests import Resource, only, render, with_components
from tests.deploy.test_running import free_port, wait_for
from tests.train import refreshed
from train import labels_sample
from train.labels_topic import options_from
from worker.embedded import EmbeddedBroker, EmbeddedCache

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(1200)]

TOKEN = "ada-token-0123456789"
PATIENCE_S = 300.0
DECISIONS = 12


@dataclass(frozen=True)
class Brokers:
    """Where they are, what a client must not say where they speak no TLS, and the Secrets of those who may come in."""

    bootstrap: str
    secrets: dict[str, dict[str, str]]
    secure: bool

    def overrides(self, container: Container) -> None:
        container.environment["WORKER_KAFKA__BOOTSTRAP_SERVERS"] = self.bootstrap
        for name in () if self.secure else ("SECURITY_PROTOCOL", "SASL_MECHANISM", "SSL_CAFILE"):
            container.environment.pop(f"WORKER_KAFKA__{name}", None)


@pytest.fixture(scope="module")
def brokers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    """Brokers on which the manifests' own topics are nobody else's."""
    console = {"WORKER_CONSOLE__TOKENS": f"ada:reviewer:{TOKEN}", "WORKER_CONSOLE__SIGNING_KEY": "k" * 40}
    person = {"WORKER_KAFKA__SASL_USERNAME": "worker", "WORKER_KAFKA__SASL_PASSWORD": "worker-secret"}
    secrets = {"code-worker-secrets": person, "code-console-secrets": console}
    if cluster_script()[0] is not None:
        cluster = request.getfixturevalue("secure")
        authority = {"ca.crt": (cluster.folder / "ca.pem").read_text()}
        yield Brokers(cluster.run("env", "--secure"), {**secrets, "kafka-cluster-ca-cert": authority}, True)
        return
    with EmbeddedBroker(tmp_path_factory.mktemp("broker") / "log").start() as broker:
        yield Brokers(broker.bootstrap, {**secrets, "kafka-cluster-ca-cert": {"ca.crt": "not asked for"}}, False)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Resource]:
    """The dev overlay on production's brokers, models volume and console; and the refresh job beside it."""
    overlay = with_components(tmp_path_factory.mktemp("overlay"), "dev", "models", "kafka-sasl", "console")
    return [*overlay, *render("refresh")]


def verdicts(worker: Container, count: int) -> list[dict[str, Any]]:
    done = worker.run("worker", "watch", "--json", "--from-beginning", "--count", str(count), "--timeout", "200", timeout_s=300)
    assert done.returncode == 0, done.stderr + worker.tail()
    return [json.loads(line) for line in done.stdout.splitlines()]


def decide(refresh: Container, found: list[dict[str, Any]], labels: dict[str, int], file: Path) -> None:
    """A decision on each image, as the console writes them: they know of it only where its upload stands."""
    lines = []
    for number, verdict in enumerate(found):
        sha256 = verdict["image"]["sha256"]
        image = {"sha256": sha256, "reference": {"upload": verdict["source"], "url": None}}
        lines.append(json.dumps(labels_sample.record(sha256, labels[sha256], "grace", number, image=image)))
    file.write_text("\n".join(lines))
    assert labels_sample.publish(file, options_from(refresh.environment)) == len(found)


def test_decisions_become_the_running_workers_model_by_the_manifests_alone(
    tmp_path: Path, brokers: Brokers, cache_server: EmbeddedCache, manifests: list[Resource]
) -> None:
    node = Node(tmp_path / "node", manifests, brokers.secrets)
    port, console_port = free_port(), free_port()
    worker = node.container(
        only(manifests, "Deployment", "code-worker"),
        WORKER_CACHE__URL=cache_server.url, WORKER_HTTP__HOST="127.0.0.1", WORKER_HTTP__PORT=str(port),
    )  # fmt: skip
    console = node.container(
        only(manifests, "Deployment", "code-console"),
        WORKER_CONSOLE__HOST="127.0.0.1", WORKER_CONSOLE__PORT=str(console_port),
    )  # fmt: skip
    # In float32 everywhere: the one-class head of the made-up bundle has scores of 1e-8, and its calibration stretches them
    # until bfloat16's rounding, another on each processor, may pass the gate's hundredth.
    refresh = node.container(only(manifests, "CronJob", "code-train-refresh"), ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    for container in (worker, console, refresh):
        brokers.overrides(container)
    refreshed.models(node.claim("code-worker-models"))
    (tmp_path / "images").mkdir()
    samples = labels_sample.write(tmp_path / "sample", labels_sample.made_up(DECISIONS, 0, seed=5), "grace")
    labels = {}
    for line in samples.read_text().splitlines():
        record = json.loads(line)
        sha256, label = record["image"]["sha256"], record["label"] == "ai_generated"
        labels[sha256] = int(label)
        (tmp_path / "images" / f"{sha256}.jpg").write_bytes((samples.parent / "images" / sha256).read_bytes())
    try:
        worker.start(f"http://127.0.0.1:{port}")
        console.start(f"http://127.0.0.1:{console_port}")
        for container in (worker, console):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                wait_for(f"{container.command[2:]} {probe}", lambda c=container, p=probe: c.probe(p) == 200, PATIENCE_S)  # type: ignore[misc]
        done = worker.run("worker", "submit", "--inline", str(tmp_path / "images"))
        assert done.returncode == 0, done.stderr
        found = verdicts(worker, DECISIONS)
        assert {verdict["model"]["version"] for verdict in found} == {"1"}

        decide(refresh, found, labels, tmp_path / "decisions.jsonl")
        entries = wait_for("the console has read the decisions", lambda: decided(console), PATIENCE_S)
        assert {entry["decision"]["by"] for entry in entries} == {"grace"}

        learned = refresh.run(timeout_s=900)
        assert learned.returncode == 0 and "promoted 1-r1" in learned.stdout, learned.stdout + learned.stderr
        assert bundle.read_manifest(node.claim("code-worker-models"))[0].version == "1-r1"

        swapped = 'code_worker_bundle_swaps_total{status="ok"} 1.0'
        wait_for("the worker takes it", lambda: swapped in worker.page("/metrics")[1], PATIENCE_S)
        assert worker.run("worker", "submit", "--inline", str(tmp_path / "images")).returncode == 0
        later = verdicts(worker, 2 * DECISIONS)
        assert sorted(verdict["model"]["version"] for verdict in later) == ["1"] * DECISIONS + ["1-r1"] * DECISIONS
        for container in (worker, console):
            code, seconds = container.terminate()
            assert code == 0 and seconds < container.grace_s, container.tail()
    finally:
        worker.kill()
        console.kill()


def decided(console: Container) -> list[dict[str, Any]]:
    """The console's decided images, once all of them are there."""
    status, text = get(f"{console.url}/api/decided", {"Authorization": f"Bearer {TOKEN}"})
    entries = json.loads(text)["entries"] if status == 200 else []
    return entries if len(entries) == DECISIONS else []
