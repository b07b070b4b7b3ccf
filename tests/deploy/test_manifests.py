"""Every overlay: valid for the API server, safe by default, and in agreement with the code."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest
import yaml

from tests.deploy.conftest import Read
from tests.deploy.manifests import (
    API_VERSIONS,
    K8S,
    KUSTOMIZATIONS,
    OVERLAYS,
    VERSION,
    Resource,
    bytes_of,
    environment,
    one,
    pods,
    render,
    settings_map,
    text,
    worker,
    workloads,
)
from worker import settings as settings_module
from worker.app import JOIN_TIMEOUT_S, LEAVE_TIMEOUT_S
from worker.health import Health
from worker.settings import Settings
from worker.stages import policy_file

CUSTOM_KINDS = {
    "KafkaTopic",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "TrainJob",
    "TrainingRuntime",
    "TriggerAuthentication",
}
SECRET_SETTINGS = {
    settings_module.environment_name(group, field)
    for group, info in Settings.model_fields.items()
    for field, inner in info.annotation.model_fields.items()  # type: ignore[union-attr]
    if "SecretStr" in str(inner.annotation)
}


# -- validity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_api_server_would_accept_every_resource(name: str) -> None:
    for resource in render(name):
        if resource["kind"] in CUSTOM_KINDS:
            continue
        for version in API_VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)


def test_only_the_known_custom_kinds_are_left_to_their_own_checks() -> None:
    unknown = {r["kind"] for name in KUSTOMIZATIONS for r in render(name) if "." in r["apiVersion"].partition("/")[0]}
    assert unknown - CUSTOM_KINDS == {"NetworkPolicy"}


def test_a_misspelt_field_would_be_found() -> None:
    deployment = one("overlays/dev", "Deployment", "code-worker")
    broken = yaml.safe_load(yaml.safe_dump(deployment))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, API_VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_resource_a_file_and_every_file_is_used(name: str) -> None:
    folder = K8S / name
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text()).get("resources", [])
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files <= set(listed)
    for path in folder.glob("*.yaml"):
        assert len(list(yaml.safe_load_all(path.read_text()))) == 1, path


def test_names_and_namespaces() -> None:
    for overlay, namespace in (("dev", "moderation-dev"), ("production", "moderation"), ("canary", "moderation")):
        for resource in render(f"overlays/{overlay}"):
            if resource["kind"] != "Namespace":
                assert resource["metadata"]["namespace"] == namespace, resource["metadata"]["name"]
    ours = {(r["kind"], r["metadata"]["name"]) for r in render("overlays/production")}
    assert not ours & {(r["kind"], r["metadata"]["name"]) for r in render("overlays/canary")}, (
        "the canary would replace production"
    )


# -- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_setting_is_one_and_the_worker_would_start_with_them(overlay: str, settings_of: Read) -> None:
    name = f"overlays/{overlay}"
    settings_of(overlay)
    fields = {
        settings_module.environment_name(group, field)
        for group, info in Settings.model_fields.items()
        for field in info.annotation.model_fields  # type: ignore[union-attr]
    }
    assert set(settings_map(name)) <= fields
    assert set(environment(name)) - fields == {settings_module.SECRETS_DIR}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_outlives_the_drain_and_the_group_outwaits_it(overlay: str, settings_of: Read) -> None:
    settings = settings_of(overlay)
    grace = one(f"overlays/{overlay}", "Deployment", "code-worker")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert settings.shutdown.drain_s + LEAVE_TIMEOUT_S + 2 * JOIN_TIMEOUT_S <= grace
    assert settings.shutdown.drain_s * 1000 < settings.kafka.max_poll_interval_ms


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_memory_holds_what_hostile_images_may_take(overlay: str, settings_of: Read) -> None:
    settings = settings_of(overlay)
    limit = bytes_of(worker(f"overlays/{overlay}")["resources"]["limits"]["memory"])
    decoders = settings.decode.processes * settings.decode.max_memory_bytes
    assert decoders + settings.kafka.max_in_flight_bytes + 2**30 <= limit, "1 GiB is left for the process and the model"


def test_threads_are_named_where_a_cpu_serves(settings_of: Read) -> None:
    settings = settings_of("dev")
    assert settings.engine.threads == int(worker("overlays/dev")["resources"]["requests"]["cpu"]), "0 would take the node's cores"
    assert settings.kafka.create_topics, "dev has no topic definitions"


def test_the_canary_reaches_nobody(settings_of: Read) -> None:
    canary = settings_of("canary")
    production = settings_of("production")
    assert canary.kafka.upload_topics == production.kafka.upload_topics
    for field in ("group_id", "verdict_topic", "retry_topic", "dead_letter_topic"):
        assert getattr(canary.kafka, field) != getattr(production.kafka, field), field
    assert canary.engine.bundle != production.engine.bundle
    assert canary.batch == production.batch, "or its plans are others"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_policy_is_one_the_worker_reads(overlay: str, settings_of: Read) -> None:
    name = f"overlays/{overlay}"
    settings = settings_of(overlay)
    policy = one(name, "ConfigMap", "code-worker-policy")
    spec = one(name, "Deployment", "code-worker")["spec"]["template"]["spec"]
    volume = next(v["name"] for v in spec["volumes"] if v.get("configMap", {}).get("name") == policy["metadata"]["name"])
    mount = next(m["mountPath"] for m in worker(name)["volumeMounts"] if m["name"] == volume)
    assert str(settings.policy.file) == f"{mount}/policy.toml"
    policy_file.parse(policy["data"]["policy.toml"].encode(), "policy.toml")


def test_paths_in_settings_are_mounted(settings_of: Read) -> None:
    for overlay in OVERLAYS:
        settings = settings_of(overlay)
        mounts = [mount["mountPath"] for mount in worker(f"overlays/{overlay}")["volumeMounts"]]
        for path in (settings.engine.bundle, settings.engine.plan_cache, settings.policy.file, settings.kafka.ssl_cafile):
            assert path is None or any(str(path).startswith(mount) for mount in mounts), path
        assert environment(f"overlays/{overlay}")[settings_module.SECRETS_DIR] in mounts


# -- probes, ports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_the_pages_that_there_are(overlay: str, settings_of: Read) -> None:
    name = f"overlays/{overlay}"
    settings, container = settings_of(overlay), worker(name)
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": settings.http.port}
    assert settings.http.host == "0.0.0.0"
    paths = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths["startupProbe"] == paths["readinessProbe"] == {"path": "/readyz", "port": "http"}
    assert paths["livenessProbe"] == {"path": "/livez", "port": "http"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_start_may_take_as_long_as_the_worker_itself_allows(overlay: str) -> None:
    probe = worker(f"overlays/{overlay}")["startupProbe"]
    allowed = Health.__init__.__kwdefaults__["starting_s"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > allowed
    assert one(f"overlays/{overlay}", "Deployment", "code-worker")["spec"]["progressDeadlineSeconds"] > allowed


# -- safety --------------------------------------------------------------------------------------------------------------


def test_pods_run_without_privileges_tokens_and_surprises() -> None:
    seen = 0
    for where, spec in pods():
        seen += 1
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["enableServiceLinks"] is False, where
        security = spec["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] >= 10000, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False and inner["readOnlyRootFilesystem"] is True, where
            assert inner["capabilities"] == {"drop": ["ALL"]}, where
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
            assert "memory" in container["resources"]["limits"], where
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]), where
            assert not any("value" in e and re.search("PASS|TOKEN|SECRET_|KEY", e["name"]) for e in container.get("env", [])), (
                where
            )
        assert not any(key in spec for key in ("hostNetwork", "hostPID", "hostIPC")), where
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), where
    assert seen >= 5


def test_every_image_is_pinned_to_the_release() -> None:
    for where, spec in pods():
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            image, _, tag = container["image"].rpartition(":")
            assert image and tag == VERSION, f"{where}: {container['image']}"


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_no_manifest_holds_a_secret(name: str) -> None:
    assert not [r for r in render(name) if r["kind"] == "Secret"]
    assert "-----BEGIN" not in text(name)
    plain = {key for r in render(name) if r["kind"] == "ConfigMap" for key in r["data"]}
    plain |= {entry["name"] for spec in workloads(name) for c in spec["containers"] for entry in c.get("env", [])}
    assert plain & SECRET_SETTINGS <= {"WORKER_CACHE__URL"}, "belongs into the Secret"
    assert not re.search(r"\w+://[^/\s]*:[^/\s]*@", text(name)), "an address with a password in it"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_policy_covers_the_pods_and_names_what_they_need(overlay: str) -> None:
    name = f"overlays/{overlay}"
    policy = one(name, "NetworkPolicy", "code-worker")["spec"]
    labels = one(name, "Deployment", "code-worker")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ports = {(port["port"], port.get("endPort", port["port"])) for rule in policy["egress"] for port in rule["ports"]}
    assert ports == {(53, 53), (9092, 9094), (6379, 6380), (80, 80), (443, 443)}
    assert all(port["port"] == "http" for rule in policy["ingress"] for port in rule["ports"])
    blocks = [to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to]
    assert "169.254.0.0/16" in blocks[0]["except"], "the cloud's metadata service"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_choose_the_overlays_own_pods(overlay: str) -> None:
    name = f"overlays/{overlay}"
    deployment = one(name, "Deployment", "code-worker")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == overlay
    for selector in (deployment["selector"], one(name, "PodDisruptionBudget")["spec"]["selector"]):
        assert selector["matchLabels"]["app.kubernetes.io/instance"] == overlay
        assert selector["matchLabels"].items() <= labels.items()
    for spread in deployment["template"]["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


# -- scaling, topics -----------------------------------------------------------------------------------------------------


def topics() -> dict[str, Resource]:
    return {topic["metadata"]["name"]: topic for topic in render("topics")}


def test_the_scaler_watches_what_the_workers_read(settings_of: Read) -> None:
    settings = settings_of("production")
    scaled = one("overlays/production", "ScaledObject")["spec"]
    assert set(scaled) == {
        "scaleTargetRef", "pollingInterval", "minReplicaCount", "maxReplicaCount", "fallback", "advanced", "triggers",
    }  # fmt: skip
    deployment = one("overlays/production", "Deployment", "code-worker")
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "kubectl apply would undo the scaler"
    (trigger,) = scaled["triggers"]
    meta = trigger["metadata"]
    assert all(isinstance(value, str) for value in meta.values()), "KEDA takes strings"
    assert meta["consumerGroup"] == settings.kafka.group_id
    assert (meta["topic"],) == settings.kafka.upload_topics
    assert meta["bootstrapServers"] == ",".join(settings.kafka.bootstrap_servers)
    assert meta["offsetResetPolicy"] == settings.kafka.auto_offset_reset
    assert (meta["sasl"], meta["tls"]) == ("scram_sha512", "enable") and settings.kafka.sasl_mechanism == "SCRAM-SHA-512"
    assert meta["limitToPartitionsWithLag"] == meta["excludePersistentLag"] == "true" and meta["allowIdleConsumers"] == "false"
    partitions = topics()[meta["topic"]]["spec"]["partitions"]
    assert 1 <= scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"] <= partitions
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 300
    authentication = one("overlays/production", "TriggerAuthentication")
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    keys = {ref["parameter"]: ref["key"] for ref in authentication["spec"]["secretTargetRef"]}
    assert keys["password"] == settings_module.environment_name("kafka", "sasl_password")
    assert keys["username"] == settings_module.environment_name("kafka", "sasl_username")


@pytest.mark.parametrize("overlay", ["production", "canary"])
def test_every_topic_that_is_used_is_defined(overlay: str, settings_of: Read) -> None:
    kafka = settings_of(overlay).kafka
    assert not kafka.create_topics
    used = {*kafka.upload_topics, kafka.verdict_topic, kafka.retry_topic, kafka.dead_letter_topic, kafka.label_topic}
    assert used <= set(topics())


def test_topics_hold_the_largest_record_and_survive_a_broker(settings_of: Read) -> None:
    settings = settings_of("production")
    kafka, retry_s = settings.kafka, settings.fetch.attempts * settings.fetch.retry_delay_max_s
    for name, topic in topics().items():
        spec = topic["spec"]
        assert topic["apiVersion"] == "kafka.strimzi.io/v1" and set(spec) == {"partitions", "replicas", "config"}
        assert spec["config"]["max.message.bytes"] >= kafka.max_record_bytes, name
        assert 1 < spec["config"]["min.insync.replicas"] < spec["replicas"], name
        retention = spec["config"]["retention.ms"]
        assert retention == -1 or retention / 1000 > 10 * retry_s, name
