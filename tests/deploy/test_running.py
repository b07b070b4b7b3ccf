"""The worker with the manifest's own arguments and environment on a real broker and cache: ready, scraped, drained in time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kubelet import Container, Node, get
from tests.deploy.manifests import one, render
from tests.deploy.test_monitoring import DASHBOARD, expressions, panels
from worker.embedded import EmbeddedBroker, EmbeddedCache
from worker.samples import write_samples

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(300)]

NAME = "overlays/dev"
WITHOUT_DATA_IN_A_DEMO = {"Shadow rules"}
"""Panels that stay empty where nothing happens of what they show."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds} s")


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory, broker: EmbeddedBroker, cache_server: EmbeddedCache) -> Iterator[Container]:
    """The worker of the dev overlay; only addresses and ports are this machine's."""
    port = free_port()
    pod = Node(tmp_path_factory.mktemp("node"), render(NAME)).container(
        one(NAME, "Deployment", "code-worker"),
        WORKER_CACHE__URL=cache_server.url,
        WORKER_HTTP__HOST="127.0.0.1",
        WORKER_HTTP__PORT=str(port),
        WORKER_KAFKA__BOOTSTRAP_SERVERS=broker.bootstrap,
        WORKER_KAFKA__GROUP_ID=f"dev-{port}",
    )
    pod.start(f"http://127.0.0.1:{port}")
    try:
        wait_for("startup probe", lambda: pod.probe("startupProbe") == 200, 120)
        yield pod
    finally:
        pod.kill()


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_probes_go_ready_and_events_get_their_verdicts(pod: Container, tmp_path: Path) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pod.probe(probe) == 200, probe
    samples = write_samples(tmp_path)
    said(pod.run("worker", "submit", "--inline", str(tmp_path)))
    count = str(len(samples))
    lines = said(pod.run("worker", "watch", "--json", "--from-beginning", "--count", count, "--timeout", "90"))
    assert len(lines) == len(samples)
    assert {json.loads(line)["model"]["backend"] for line in lines if json.loads(line)["score"] is not None} == {"openvino"}


def test_prometheus_scrapes_it_evaluates_the_rules_and_the_dashboard_has_data(pod: Container, tmp_path: Path) -> None:
    prometheus = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is missing: Debian's package has it; or name it with PROMETHEUS")
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(one("overlays/production", "PrometheusRule")["spec"]))
    target = {"targets": [pod.url.removeprefix("http://")], "labels": {"deployment": "dev", "namespace": "moderation-dev"}}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "code-worker", "static_configs": [target]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    server = subprocess.Popen(
        [
            prometheus,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        base = f"http://127.0.0.1:{port}/api/v1"
        query(base, "up", 30)
        (tmp_path / "images").mkdir()
        write_samples(tmp_path / "images", seed=11)
        said(pod.run("worker", "submit", "--inline", str(tmp_path / "images")))
        query(base, 'sum(increase(code_worker_verdicts_total{source="engine"}[1m])) > 0', 60)
        empty = []
        for panel in panels():
            for target_ in panel["targets"]:
                if panel["title"] not in WITHOUT_DATA_IN_A_DEMO and not ask(base, target_["expr"]):
                    empty.append(f"{panel['title']}: {target_['expr']}")
        assert not empty
        groups = json.loads(get(f"{base}/rules")[1])["data"]["groups"]
        states = {rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]}
        assert set(states) == {where for where, _ in expressions()} & set(states) and len(states) >= 20
        assert {state for state, _ in states.values()} == {"ok"}, states
    finally:
        server.terminate()
        server.wait(20)


def ask(base: str, expression: str) -> list[Any]:
    filled = expression.replace("$__rate_interval", "1m").replace("$deployment", ".*")
    _, body = get(f"{base}/query?{urllib.parse.urlencode({'query': filled})}")
    return list(json.loads(body).get("data", {}).get("result", [])) if body.startswith("{") else []


def query(base: str, expression: str, seconds: float) -> list[Any]:
    return list(wait_for(expression, lambda: ask(base, expression), seconds))


def test_a_termination_drains_within_the_grace_period(pod: Container) -> None:
    code, seconds = pod.terminate()
    assert code == 0 and seconds < pod.grace_s, pod.tail()


def test_the_dashboard_names_panels_that_may_be_empty() -> None:
    assert {panel["title"] for panel in DASHBOARD["panels"]} >= WITHOUT_DATA_IN_A_DEMO
