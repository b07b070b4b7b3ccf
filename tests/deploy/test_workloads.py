"""Each workload beside its code: GPUs and plans, models, console, traces, training; and their commands exist."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest

from engine import bundle
from engine.batching_policy import BatchConfig
from engine.commands import build as build_command
from engine.manifest import Parent
from tests.deploy.conftest import Read
from tests.deploy.kubelet import Node
from tests.deploy.manifests import (
    API_VERSIONS,
    K8S,
    OVERLAYS,
    ROOT,
    VERSION,
    Resource,
    one,
    only,
    pods,
    render,
    with_components,
    worker,
    workloads,
)
from tests.engine.bundles import random_draft
from train import __main__ as train_command
from train import refresh_commands
from train.labels_topic import options_from
from worker import settings as settings_module
from worker.console import pages as console_pages
from worker.settings import TracingSettings

# -- GPUs, models, plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["overlays/production", "overlays/canary", "jobs/build-plans"])
def test_gpu_pods_ask_for_the_same_gpus(name: str) -> None:
    reference = one("overlays/production", "Deployment", "code-worker")["spec"]["template"]["spec"]
    gpu = [spec for spec in workloads(name) if "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]]
    (workload,) = gpu
    assert workload["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert workload["tolerations"] == reference["tolerations"]
    assert workload["affinity"] == reference["affinity"], "a plan that is built for one product fits no other"
    assert workload["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_plans_are_built_for_the_sizes_and_where_the_worker_looks(settings_of: Read) -> None:
    settings = settings_of("production")
    container = one("jobs/build-plans", "Job")["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][:2] == ["engine", "build"]
    parser = argparse.ArgumentParser()
    build_command.add_arguments(parser)
    arguments = parser.parse_args(container["args"][2:])
    sizes = {1, *settings.batch.preferred_sizes, settings.batch.max_batch_size}
    assert set(arguments.sizes) == sizes
    assert arguments.flavour == settings.engine.backend
    assert arguments.plan_cache == settings.engine.plan_cache
    assert arguments.bundle == settings.engine.bundle
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert (mounts["plans"], mounts["models"]) == (str(settings.engine.plan_cache), str(settings.engine.bundle))


def test_claims_that_are_mounted_are_made_and_shared() -> None:
    everything = [*render("overlays/production"), *render("training"), *render("refresh")]
    made = {r["metadata"]["name"]: r["spec"] for r in everything if r["kind"] == "PersistentVolumeClaim"}
    assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in made.values())
    for where, spec in pods():
        for volume in spec.get("volumes", []):
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in made, where


def test_the_image_of_a_backend_is_the_one_that_has_it(settings_of: Read) -> None:
    for overlay, kind in (("dev", "cpu"), ("production", "tensorrt"), ("canary", "tensorrt")):
        image = worker(f"overlays/{overlay}")["image"]
        assert image.rpartition("/")[2] == f"code-worker-{kind}:{VERSION}"
        dockerfile = (ROOT / "deploy/docker" / f"{kind}.Dockerfile").read_text()
        backend = settings_of(overlay).engine.backend
        assert re.search(rf"\.\[{backend}[\],]", dockerfile) or f"FLAVOUR={backend}" in dockerfile


def test_the_settings_of_a_full_batch_make_sense(settings_of: Read) -> None:
    for overlay in OVERLAYS:
        settings = settings_of(overlay)
        batch = settings.batch
        BatchConfig(batch.max_batch_size, batch.preferred_sizes, batch.max_queue_delay_microseconds, batch.max_queue_size)
        assert settings.kafka.max_in_flight >= 4 * batch.max_batch_size, "too few events in flight to fill batches"


def test_the_first_model_is_put_onto_an_empty_volume_and_none_is_replaced(tmp_path: Path) -> None:
    (container,) = workloads("jobs/seed-models")[0]["containers"]
    models = tmp_path / "models"
    models.mkdir()
    (script,) = container["args"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for _ in range(2):
        command = [*container["command"], script.replace("/models", str(models))]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        version = (models / "CURRENT").read_text().strip()
        assert bundle.load(models).manifest.version == bundle.load(bundle.packaged()).manifest.version
        (models / version / "MODEL_CARD.md").touch()
    assert mounted(container) == {"/models", "/tmp"}


def test_a_bad_model_is_taken_back_by_an_image_without_torch(tmp_path: Path) -> None:
    node = Node(tmp_path, render("jobs/rollback"))
    job = node.container(one("jobs/rollback", "Job"))
    models = node.claim("code-worker-models")
    first = bundle.write(models / "1", random_draft(1, version="1"))
    parent = Parent(name=first.manifest.name, version="1", digest=first.digest)
    bundle.write(models / "2", random_draft(2, version="2", parents=(parent,)))
    bundle.publish(models, "2")
    blocked = tmp_path / "blocked"
    for name in ("torch", "sklearn"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} is not in this image')")
    job.environment["PYTHONPATH"] = str(blocked)
    done = job.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert bundle.load(models).manifest.version == "1"
    assert job.run().returncode == 2, "there is nothing before it"
    assert bundle.load(models).manifest.version == "1"


def mounted(container: Resource) -> set[str]:
    return {mount["mountPath"] for mount in container["volumeMounts"]}


# -- console -------------------------------------------------------------------------------------------------------------


def test_the_console_would_start_with_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "overlays/production"
    (container,) = one(name, "Deployment", "code-console")["spec"]["template"]["spec"]["containers"]
    maps = {r["metadata"]["name"]: r["data"] for r in render(name) if r["kind"] == "ConfigMap"}
    for variable in [*os.environ]:
        if variable.startswith("WORKER_"):
            monkeypatch.delenv(variable)
    for source in container["envFrom"]:
        for variable, value in maps[source["configMapRef"]["name"]].items():
            monkeypatch.setenv(variable, value)
    secrets = {
        "KAFKA__SASL_USERNAME": "someone",
        "KAFKA__SASL_PASSWORD": "something",
        "CONSOLE__TOKENS": f"ada:reviewer:{'x' * 20}",
    }
    for secret, value in {**secrets, "CONSOLE__SIGNING_KEY": "y" * 40}.items():
        (tmp_path / f"WORKER_{secret}").write_text(value)
    monkeypatch.setenv("WORKER_SECRETS_DIR", str(tmp_path))
    settings = settings_module.load()
    assert container["args"] == ["worker", "console"] and container["image"].rpartition("/")[2] == f"code-worker-cpu:{VERSION}"
    assert [port["containerPort"] for port in container["ports"]] == [settings.console.port]
    assert settings.console.host == "0.0.0.0" and settings.console.auth == "token"
    assert settings.engine.backend == "openvino" and settings.engine.device == "cpu", "its image has no TensorRT"
    for path in (settings.engine.bundle, settings.policy.file, settings.kafka.ssl_cafile):
        assert any(str(path).startswith(mount) for mount in mounted(container)), path
    pages = {route.path for route in console_pages.ROUTES}
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} <= pages
    service = one(name, "Service", "code-console")["spec"]
    labels = one(name, "Deployment", "code-console")["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items() and service["ports"][0]["targetPort"] == "http"


def test_the_console_asks_every_worker_for_its_page(settings_of: Read) -> None:
    name = "overlays/production"
    maps = [r["data"] for r in render(name) if r["kind"] == "ConfigMap"]
    (address,) = [data["WORKER_CONSOLE__METRICS_URLS"] for data in maps if "WORKER_CONSOLE__METRICS_URLS" in data]
    service = one(name, "Service", "code-worker-pages")
    assert service["spec"]["clusterIP"] == "None", "one address would be one worker"
    (port,) = service["spec"]["ports"]
    assert address == f"http://{service['metadata']['name']}:{port['port']}/metrics"
    assert port["port"] == settings_of("production").http.port, "without an address of its own the Service translates no ports"
    labels = one(name, "Deployment", "code-worker")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    console = one(name, "Deployment", "code-console")["spec"]["template"]["metadata"]["labels"]
    (let_in,) = one(name, "NetworkPolicy", "code-worker-pages")["spec"]["ingress"]
    assert let_in["from"][0]["podSelector"]["matchLabels"].items() <= console.items()
    out = [
        rule for rule in one(name, "NetworkPolicy", "code-console")["spec"]["egress"] if rule["ports"][0]["port"] == port["port"]
    ]
    assert out[0]["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()


# -- traces --------------------------------------------------------------------------------------------------------------


def test_traces_go_to_a_collector_that_the_pods_may_reach(tmp_path: Path) -> None:
    resources = with_components(tmp_path, "dev", "tracing")
    (given,) = [r["data"] for r in resources if r["kind"] == "ConfigMap" and "settings" in r["metadata"]["name"]]
    tracing = TracingSettings(endpoint=given["WORKER_TRACING__ENDPOINT"], sample_ratio=given["WORKER_TRACING__SAMPLE_RATIO"])
    address = urlsplit(str(tracing.endpoint))
    policy = only(resources, "NetworkPolicy", "code-worker-tracing")
    for version in API_VERSIONS:
        kubernetes_validate.validate(policy, version, strict=True)
    (rule,) = policy["spec"]["egress"]
    assert [port["port"] for port in rule["ports"]] == [address.port]
    namespace = rule["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert address.hostname is not None and address.hostname.split(".")[1] == namespace
    labels = only(resources, "Deployment", "code-worker")["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    for name in ("cpu", "tensorrt"):
        assert re.search(r"\.\[[^\]]*\botel\b", (ROOT / "deploy/docker" / f"{name}.Dockerfile").read_text()), (
            "its image has the exporter"
        )


# -- training ------------------------------------------------------------------------------------------------------------


def test_the_encoder_refresh_runs_commands_that_exist_one_at_a_time() -> None:
    job = one("training", "CronJob")["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    (spec,) = workloads("training")
    steps = [*spec["initContainers"], *spec["containers"]]
    assert [step["name"] for step in steps] == ["pretrain", "probe", "calibrate", "evaluate", "promote"]
    for step in steps:
        arguments = step["args"][step["args"].index("train") + 1 :]
        parsed = train_command._parser().parse_args(arguments)
        assert parsed.command == step["name"]
        assert str(parsed.out) == "/runs/$(VERSION)", "one folder for all steps"
        assert [entry["name"] for entry in step["env"]] == ["VERSION"]
    promoted = {mount["name"]: mount["mountPath"] for mount in steps[-1]["volumeMounts"]}["models"]
    assert str(train_command._parser().parse_args(steps[-1]["args"][1:]).models) == promoted


def test_a_refusal_by_the_gate_is_not_tried_again() -> None:
    rules = one("training", "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    failing = {code: rule["onExitCodes"].get("containerName") for rule in rules if rule["action"] == "FailJob"
               for code in rule["onExitCodes"]["values"]}  # fmt: skip
    assert failing == {train_command.NOT_PROMOTED: "promote", train_command.BAD: None}


def test_what_training_promotes_is_what_workers_load(settings_of: Read) -> None:
    (spec,) = workloads("training")
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    served = one("overlays/production", "Deployment", "code-worker")["spec"]["template"]["spec"]["volumes"]
    mounted = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in served if "persistentVolumeClaim" in v}
    assert claims["models"] == mounted["models"]
    assert str(settings_of("production").engine.bundle) == "/models"


def test_the_probe_refresh_reads_what_moderators_decide_and_writes_where_workers_look(settings_of: Read) -> None:
    job = one("refresh", "CronJob")["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    (spec,) = workloads("refresh")
    (container,) = spec["containers"]
    parsed = train_command._parser().parse_args(container["args"][1:])
    assert parsed.command == "refresh" and parsed.ok_if_kept, "keeping the champion is no failed job"
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    served = one("overlays/production", "Deployment", "code-worker")["spec"]["template"]["spec"]["volumes"]
    assert claims[mounts[str(parsed.models)]] in [v.get("persistentVolumeClaim", {}).get("claimName") for v in served]
    assert claims[mounts[str(parsed.work)]] == one("refresh", "PersistentVolumeClaim")["metadata"]["name"]
    policy = one("refresh", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= job["jobTemplate"]["spec"]["template"]["metadata"]["labels"].items()


def test_the_probe_refresh_uses_the_workers_kafka_settings(settings_of: Read) -> None:
    (given,) = [r["data"] for r in render("refresh") if r["kind"] == "ConfigMap"]
    options, kafka = options_from(given), settings_of("production").kafka
    for name in given:
        field = name.removeprefix("WORKER_KAFKA__").lower()
        assert getattr(options, field) == (str(value) if isinstance(value := getattr(kafka, field), Path) else value), field
    rules = one("refresh", "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"] == [[refresh_commands.BAD]]


def test_the_nodes_of_a_large_training_run_the_same_command() -> None:
    runtime, job = one("training-many-nodes", "TrainingRuntime"), one("training-many-nodes", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (spec,) = workloads("training-many-nodes")
    (container,) = spec["containers"]
    assert container["args"][:2] == ["-m", "train"]
    assert train_command._parser().parse_args(container["args"][2:]).command == "pretrain"


@pytest.mark.parametrize("folder", ["training", "training-many-nodes"])
def test_the_mounted_recipe_is_the_repositorys(folder: str) -> None:
    assert (K8S / folder / "recipe.toml").read_bytes() == (ROOT / "train/recipes/cpu-tiny.toml").read_bytes()
