"""Probes of everything the worker leans on, for `worker check`: broker, topics, cache, policy, bundle, engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.errors import ConfigurationError, FatalError
from worker.log import mask_credentials
from worker.metrics import Metrics
from worker.settings import CacheSettings, FetchSettings, KafkaSettings, Settings, environment_name

if TYPE_CHECKING:
    from kafka import KafkaAdminClient

    from engine.bundle import Bundle
    from engine.heads import Head
    from engine.manifest import Band, Threshold
    from worker.stages.policy import PolicyKeeper

OK = "ok"
NOTE = "note"
PROBLEM = "problem"

VERDICT_BYTES = 512 * 1024
"""A verdict of the largest item and attributes, with room to spare."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: str
    """ok, note (works, but look at it) or problem (`worker run` would end or fail events)."""
    subject: str
    message: str


def kafka(settings: KafkaSettings, timeout_s: float) -> list[Finding]:
    """Broker reachable, topics there and allowed, record sizes that fit together."""
    from kafka.errors import KafkaError

    from worker import kafka_clients

    quick = settings.model_copy(update={"request_timeout_ms": max(1_000, int(timeout_s * 1000))})
    servers = ",".join(settings.bootstrap_servers)
    try:
        with contextlib.closing(kafka_clients.open_admin(quick, bootstrap_timeout_ms=int(timeout_s * 1000))) as admin:
            nodes = len(admin.describe_cluster()["brokers"])
            findings = [Finding(OK, "broker", f"{servers} answers, {nodes} node{'s' if nodes != 1 else ''}")]
            needs = _needs(settings)
            topics = {topic["name"]: topic for topic in admin.describe_topics(list(needs))}
            for name, operations in needs.items():
                findings.append(_topic(settings, name, topics.get(name), operations))
            present = [name for name in needs if (topics.get(name) or {}).get("error_code") == 0]
            configs = _configs(admin, present)
            findings += _sizes(settings, _numbers(configs, "max.message.bytes"))
            findings += _durability(settings, nodes, topics, _numbers(configs, "min.insync.replicas"))
            if settings.delivery == "exactly_once":
                findings.append(_transactions(settings, admin))
            return findings
    except FatalError as error:
        return [Finding(PROBLEM, "broker", problem) for problem in _lines(error)]
    except KafkaError as error:
        return [Finding(PROBLEM, "broker", f"{servers}: {kafka_clients.describe(error)}")]


def _needs(settings: KafkaSettings) -> dict[str, tuple[str, ...]]:
    """What the worker does with each topic, in Kafka's words."""
    needs: dict[str, tuple[str, ...]] = dict.fromkeys(settings.upload_topics, ("READ",))
    needs[settings.retry_topic] = ("READ", "WRITE")
    return needs | {settings.verdict_topic: ("WRITE",), settings.dead_letter_topic: ("WRITE",)}


def _topic(settings: KafkaSettings, name: str, topic: Mapping[str, Any] | None, needed: tuple[str, ...]) -> Finding:
    if topic is None or topic["error_code"]:
        if settings.create_topics:
            return Finding(NOTE, "topic", f"{name}: missing; the worker will create it")
        switch = environment_name("kafka", "create_topics")
        return Finding(PROBLEM, "topic", f"{name}: missing or not visible to this user; create it, or set {switch}=true")
    leaderless = [str(part["partition_index"]) for part in topic["partitions"] if part["leader_id"] < 0]
    if leaderless:
        return Finding(PROBLEM, "topic", f"{name}: no leader for partition {', '.join(leaderless)}")
    allowed = topic.get("authorized_operations")
    missing = [operation for operation in needed if allowed and operation not in allowed]
    if missing:
        return Finding(PROBLEM, "topic", f"{name}: this user may not {' and '.join(missing)}")
    count = len(topic["partitions"])
    return Finding(OK, "topic", f"{name}: {count} partition{'s' if count != 1 else ''}")


def _configs(admin: KafkaAdminClient, topics: list[str]) -> dict[str, Any]:
    """The settings of each topic; empty where the broker does not tell."""
    from kafka.admin import ConfigResource, ConfigResourceType
    from kafka.errors import KafkaError

    try:
        answer = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in topics], config_filter="all")
        return dict(answer.get("topic", {}))
    except (KafkaError, KeyError, TypeError, ValueError):
        return {}  # brokers that are no Apache Kafka, and users who may not ask


def _numbers(configs: dict[str, Any], name: str) -> dict[str, int]:
    """A setting by topic, where the broker tells it."""
    found = {}
    for topic, values in configs.items():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[topic] = int(values[name]["value"])
    return found


def _durability(
    settings: KafkaSettings, nodes: int, topics: Mapping[str, Mapping[str, Any]], min_insync: dict[str, int]
) -> list[Finding]:
    """What is acknowledged must outlive a broker: more than one replica, and more than one of them in sync."""
    findings = []
    for name in (settings.verdict_topic, settings.retry_topic, settings.dead_letter_topic):
        partitions = (topics.get(name) or {}).get("partitions") or []
        replicas = min((len(partition["replica_nodes"]) for partition in partitions), default=0)
        if not replicas:
            continue
        if replicas < 2 or min_insync.get(name, 2) < 2:
            findings.append(
                Finding(
                    NOTE,
                    "replicas",
                    f"{name}: {replicas} replica{'s' if replicas != 1 else ''}, min.insync.replicas {min_insync.get(name, '?')}:"
                    " a record can be acknowledged and lost with one broker",
                )
            )
        elif min_insync.get(name, 1) >= replicas:
            findings.append(
                Finding(
                    NOTE,
                    "replicas",
                    f"{name}: min.insync.replicas {min_insync[name]} of {replicas}: publishing stops while one broker is away",
                )
            )
    if nodes < 2 and findings:
        return [Finding(NOTE, "replicas", "one broker: a record can be acknowledged and lost with it")]
    return findings


def _transactions(settings: KafkaSettings, admin: KafkaAdminClient) -> Finding:
    """Whether the broker has transactions, and this user may use the worker's transactional ids."""
    from kafka.errors import KafkaError, TransactionalIdAuthorizationFailedError, TransactionalIdNotFoundError

    from worker import kafka_clients
    from worker.kafka_transactions import missing_apis, transactional_id

    setting = f"{environment_name('kafka', 'delivery')}=exactly_once"
    name = transactional_id(settings)
    missing = missing_apis(admin._manager.broker_version_data)
    if missing:
        return Finding(PROBLEM, "exactly", f"{setting}: the broker has no transactions (it lacks {', '.join(missing)})")
    try:
        admin.describe_transactions([name])
    except TransactionalIdNotFoundError:
        pass  # nobody has used the name yet
    except TransactionalIdAuthorizationFailedError:
        return Finding(
            PROBLEM, "exactly", f"{setting}: this user may not use transactional ids that begin with {settings.group_id}-"
        )
    except KafkaError as error:
        return Finding(
            NOTE, "exactly", f"{setting}: the transaction coordinator does not answer: {kafka_clients.describe(error)}"
        )
    return Finding(
        OK, "exactly", f"{setting}: transactional id {settings.group_id}-{settings.group_instance_id or '<host>-<random>'}"
    )


def _sizes(settings: KafkaSettings, limits: dict[str, int]) -> list[Finding]:
    """Largest records of broker and worker, side by side; broker limits are of compressed batches."""
    if not limits:
        return [Finding(NOTE, "sizes", "the broker does not tell its limits on records; compare max.message.bytes yourself")]
    findings = []
    setting = environment_name("kafka", "max_record_bytes")
    for topic in settings.upload_topics:
        limit = limits.get(topic, 0)
        if limit > settings.max_record_bytes:
            findings.append(
                Finding(
                    NOTE,
                    "sizes",
                    f"{topic} takes records of {limit} bytes, {setting} is {settings.max_record_bytes}:"
                    " larger ones become event.too_large",
                )
            )
        for other in (settings.retry_topic, settings.dead_letter_topic):
            if other in limits and limits[other] < min(limit, settings.max_record_bytes):
                findings.append(
                    Finding(
                        PROBLEM,
                        "sizes",
                        f"{other} takes records of {limits[other]} bytes, {topic} of {limit}: the largest could not be passed on"
                        " whole; raise max.message.bytes",
                    )
                )
    verdicts = limits.get(settings.verdict_topic)
    if verdicts is not None and verdicts < VERDICT_BYTES:
        findings.append(
            Finding(
                PROBLEM,
                "sizes",
                f"{settings.verdict_topic} takes records of {verdicts} bytes; a verdict may have {VERDICT_BYTES}",
            )
        )
    if any(finding.level == PROBLEM for finding in findings):
        return findings
    shown = ", ".join(f"{topic} {limit}" for topic, limit in limits.items())
    return [*findings, Finding(OK, "sizes", f"largest records in bytes: {shown}; worker {settings.max_record_bytes}")]


def cache(settings: CacheSettings, timeout_s: float) -> list[Finding]:
    """A key written, read and deleted."""
    from worker.stages.cache import probe

    if not settings.enabled:
        return [Finding(NOTE, "cache", f"off by {environment_name('cache', 'enabled')}: every image is inferred")]
    where = mask_credentials(settings.url.get_secret_value())
    try:
        slowest_ms = probe(settings, timeout_s)
    except FatalError as error:
        return [Finding(PROBLEM, "cache", problem) for problem in _lines(error)]
    if slowest_ms > settings.timeout_ms:
        setting = environment_name("cache", "timeout_ms")
        return [Finding(NOTE, "cache", f"{where}: slow ({slowest_ms:.0f} ms a command); {setting} is {settings.timeout_ms}")]
    return [Finding(OK, "cache", f"{where}: keys can be written and read ({slowest_ms:.1f} ms a command)")]


def files(settings: FetchSettings) -> list[Finding]:
    """The folders that file URLs may name."""
    name = environment_name("fetch", "file_roots")
    return [Finding(PROBLEM, "files", f"{name}: {root} is no folder") for root in settings.file_roots if not root.is_dir()]


def decoding() -> Finding:
    """Whether JPEGs are decoded where they are looked at only."""
    from engine import jpeg_region

    library = jpeg_region.library()
    if library is None:
        return Finding(NOTE, "decode", "JPEGs are decoded whole, which takes longer; see docs/images.md for what is missing")
    return Finding(OK, "decode", f"regions of JPEGs by {library.rpartition('/')[2]}")


def gpu_decoding(settings: Settings) -> Finding:
    """Whether nvImageCodec can be used, by a process that opens the device and checks it against Pillow."""
    from worker.stages import decode_gpu

    reason = decode_gpu.probe(settings.decode, settings.engine.crops)
    if reason is None:
        return Finding(OK, "decode", "baseline JPEGs by nvImageCodec on the GPU: near Pillow's pixels, not equal to them")
    name = environment_name("decode", "gpu")
    return Finding(NOTE, "decode", f"{name}=true, but JPEGs are decoded on the CPU: {reason}")


def model(settings: Settings) -> Iterator[Finding]:
    """Policy, bundle and engine, as far as each lets the next be tried; yields as it goes, since an engine may compile."""
    from engine import bundle as bundles
    from worker.stages.policy import PolicyKeeper

    yield decoding()
    if settings.decode.gpu:
        yield gpu_decoding(settings)
    policy = None
    try:
        policy = PolicyKeeper(settings.policy, Metrics())
    except ConfigurationError as error:
        yield from (Finding(PROBLEM, "policy", problem) for problem in error.problems)
    try:
        bundle = bundles.load(settings.engine.bundle or bundles.packaged())
    except bundles.BundleError as error:
        yield Finding(PROBLEM, "bundle", f"{environment_name('engine', 'bundle')}: {error}")
        bundle = None
    if bundle is not None:
        yield Finding(OK, "bundle", f"{bundle.manifest.name} {bundle.manifest.version} at {bundle.path}")
    if policy is not None and bundle is not None:
        yield from _policy(policy, BundleScale(bundle, settings.engine.head))
    if bundle is not None:
        yield from _engine(settings, bundle)


@dataclass(frozen=True, slots=True)
class BundleScale:
    """What a policy needs of a model (`worker.stages.policy.Scale`), from a bundle that is not loaded on any device."""

    bundle: Bundle
    head: Head

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        return self.bundle.manifest.version

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        return self.bundle.manifest.thresholds.get(self.head, {})

    @property
    def abstain(self) -> Band | None:
        return self.bundle.manifest.abstain.get(self.head)


def _policy(policy: PolicyKeeper, scale: BundleScale) -> Iterator[Finding]:
    try:
        policy.bind(scale)
    except ConfigurationError as error:
        yield from (Finding(PROBLEM, "policy", problem) for problem in error.problems)
        return
    bound = policy.current
    yield Finding(OK, "policy", f"{bound.name} {bound.version}")
    for tenant, rule in bound.tenants.items():
        yield Finding(OK, "policy", f"tenant {tenant}: {rule}")
        for name, shadow in rule.shadow:
            yield Finding(OK, "policy", f"tenant {tenant}, shadow {name}: {shadow}")


def _engine(settings: Settings, bundle: Bundle) -> Iterator[Finding]:
    import numpy as np

    from engine.backends.base import BackendError
    from engine.detector import Detector
    from engine.preprocess import CROP_PX

    choice = settings.engine
    try:
        started = time.monotonic()
        with Detector.open(
            bundle.path,
            backend=choice.backend,
            device=choice.device,
            head=choice.head,
            crops=choice.crops,
            threads=choice.threads,
            plan_cache=choice.plan_cache,
            batch_sizes=(1, *settings.batch.preferred_sizes, settings.batch.max_batch_size),
        ) as detector:
            detector.warm_up((1,))
            loaded = time.monotonic()
            scores = detector.infer(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8))
            inferred = time.monotonic()
            if not np.isfinite(scores).all():
                yield Finding(PROBLEM, "engine", f"{detector.backend_name} on {detector.device}: scores are not finite")
                return
            yield Finding(
                OK,
                "engine",
                f"{detector.backend_name} on {detector.device}: ready in {loaded - started:.1f} s,"
                f" one crop in {(inferred - loaded) * 1000:.1f} ms",
            )
    except (BackendError, ValueError) as error:
        yield Finding(PROBLEM, "engine", f"{environment_name('engine', 'backend')}={choice.backend}: {error}")


def _lines(error: FatalError) -> list[str]:
    return error.problems if isinstance(error, ConfigurationError) else [str(error)]
