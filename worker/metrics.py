"""Every metric of the worker, in one place (contract, section 7; prefix `code_worker_`).

The names under "contract" are relied upon by dashboards, alerts and the autoscaler; those under "also" may change in a minor
version. Labels take few values: topics, partitions, codes, actions, policy rules; never tenants, hosts or ids.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from worker.errors import Code

PREFIX = "code_worker"

CACHE_RESULTS = ("hit", "miss", "error", "bypass")
BATCH_REASONS = ("full", "timeout", "drain")
TRANSIENT_CODES = (Code.FETCH_TIMEOUT, Code.FETCH_UNAVAILABLE)

_AGE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 21600, 86400)
_STAGE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


class Metrics:
    """All metrics, in a registry of their own; a series is cheap enough to touch for every event (about a microsecond)."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` gauge beside every counter doubles the page and nobody asks for it
        self.registry = registry = CollectorRegistry()

        # --- contract ---------------------------------------------------------------------------------------------------
        self.events_received = _counter("events_received", "Records read from the upload and retry topics.", registry)
        self.verdicts = _counter(
            "verdicts",
            "Verdicts acknowledged; source: engine, cache or failure.",
            registry,
            "label",
            "action",
            "source",
        )
        self.cache_requests = _counter(
            "cache_requests", "Images looked up; bypass: the cache is off or its breaker open.", registry, "result"
        )
        self.dead_letters = _counter("dead_letters", "Dead letters acknowledged by the broker.", registry, "code")
        self.retries = _counter("retries", "Further tries, in place or by the retry topic.", registry, "code")
        self.batches = _counter("batches", "Batches sent to the device, by what closed them.", registry, "reason")
        self.rebalances = _counter("rebalances", "Rebalance callbacks: assigned, revoked, lost.", registry, "type")
        self.commits = _counter("commits", "Offset commits: ok, failed.", registry, "status")

        self.event_age = _histogram(
            "event_age_seconds", "From the upload (uploaded_at, or the record's time) to its verdict.", registry, _AGE_BUCKETS_S
        )
        self.fetch = _histogram("fetch_seconds", "Fetching an image, tries in place included.", registry, _STAGE_BUCKETS_S)
        self.decode = _histogram("decode_seconds", "Decoding and cropping an image.", registry, _STAGE_BUCKETS_S)
        self.queue_wait = _histogram("queue_wait_seconds", "Waiting for a batch to leave.", registry, _STAGE_BUCKETS_S)
        self.batch_size = _histogram("batch_size", "Crops in a batch.", registry, _BATCH_BUCKETS)
        self.inference = _histogram("inference_seconds", "One batch on the device.", registry, _STAGE_BUCKETS_S)

        self.in_flight_events = _gauge("in_flight_events", "Events read and not yet finished.", registry)
        self.in_flight_bytes = _gauge("in_flight_bytes", "Bytes those events pin.", registry)
        self.paused_partitions = _gauge("paused_partitions", "Partitions paused because the budget is used up.", registry)
        self.consumer_lag = _gauge("consumer_lag", "Log end minus committed offset.", registry, "topic", "partition")
        self.engine_info = _gauge("engine_info", "1 for the model that serves.", registry, "model", "backend", "device")

        # --- also -------------------------------------------------------------------------------------------------------
        self.build_info = _gauge("build_info", "1 for the version that runs.", registry, "version")
        self.events_duplicate = _counter(
            "events_duplicate", "Events given up in mid-work with their partition: its next owner works on them again.", registry
        )
        self.events_stale = _counter("events_stale", "Results dropped because their partition had been revoked.", registry)
        self.transactions = _counter("transactions", "exactly_once: transactions ended: committed, aborted.", registry, "outcome")
        self.transaction_seconds = _histogram(
            "transaction_seconds", "exactly_once: one transaction, from its first record.", registry, _STAGE_BUCKETS_S
        )
        self.shared_inferences = _counter(
            "shared_inferences", "Images that took the scores of an identical image in flight.", registry
        )
        self.cache_writes = _counter("cache_writes", "Scores written: ok, error, bypass, dropped.", registry, "result")
        self.cache_seconds = _histogram("cache_seconds", "One round trip to the cache.", registry, _STAGE_BUCKETS_S)
        self.cache_breaker_open = _gauge("cache_breaker_open", "1 while the cache is left alone after failures.", registry)
        self.dead_letter_circuit_open = _gauge(
            "dead_letter_circuit_open", "1 while the intake is stopped because too many events fail.", registry
        )
        self.decoder_restarts = _counter(
            "decoder_restarts", "Decoder processes replaced: crashed, timeout, recycled.", registry, "reason"
        )
        self.bundle_swaps = _counter("bundle_swaps", "Model bundles swapped in while running: ok, failed.", registry, "status")
        self.policy_reloads = _counter("policy_reloads", "Changed policy files read again: ok, failed.", registry, "status")
        self.policy_info = _gauge("policy_info", "1 for the policy that decides.", registry, "name", "version")
        self.shadow_decisions = _counter(
            "shadow_decisions", "What shadow rules would have done, beside what was done.", registry, "rule", "action", "actual"
        )
        self.score_drift = _gauge(
            "score_drift", "Population stability index of recent scores against the model's reference.", registry, "head"
        )
        self.embedding_drift = _gauge(
            "embedding_drift",
            "Shift of the mean embedding against the model's reference, in standard deviations.",
            registry,
        )
        self.drift_crops = _gauge("drift_crops", "Crops behind the drift figures; old ones fade.", registry)
        self.ready = _gauge("ready", "1 while /readyz says yes.", registry)
        ProcessCollector(registry=registry)  # process_resident_memory_bytes and its family, under their usual names

        self._start_series()

    def set_engine(self, model: str, backend: str, device: str) -> None:
        """The model that serves from now on; the one before disappears, and its drift with it."""
        self.score_drift.clear()
        self.embedding_drift.set(float("nan"))
        self.drift_crops.set(0)
        self.engine_info.clear()
        self.engine_info.labels(model, backend, device).set(1)

    def set_policy(self, name: str, version: str) -> None:
        """The policy that decides from now on; the one before disappears."""
        self.policy_info.clear()
        self.policy_info.labels(name, version).set(1)

    def forget_partition(self, topic: str, partition: int) -> None:
        """A partition that went elsewhere must not leave its last lag behind."""
        with suppress(KeyError):  # older clients raise where no lag was ever set
            self.consumer_lag.remove(topic, str(partition))

    def page(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _start_series(self) -> None:
        """Series at zero from the start: `rate()` sees the first event, and an absent series means an absent worker."""
        for result in CACHE_RESULTS:
            self.cache_requests.labels(result)
        for result in ("ok", "error", "bypass", "dropped"):
            self.cache_writes.labels(result)
        for code in Code:
            self.dead_letters.labels(code.value)
        for code in TRANSIENT_CODES:
            self.retries.labels(code.value)
        for reason in BATCH_REASONS:
            self.batches.labels(reason)
        for kind in ("assigned", "revoked", "lost"):
            self.rebalances.labels(kind)
        for outcome in ("committed", "aborted"):
            self.transactions.labels(outcome)
        for status in ("ok", "failed"):
            self.commits.labels(status)
            self.bundle_swaps.labels(status)
            self.policy_reloads.labels(status)
        for reason in ("crashed", "timeout", "recycled"):
            self.decoder_restarts.labels(reason)
        self.build_info.labels(_version()).set(1)
        self.embedding_drift.set(float("nan"))


def _counter(name: str, help_text: str, registry: CollectorRegistry, *labels: str) -> Counter:
    """prometheus_client itself appends `_total`."""
    return Counter(name, help_text, labels, namespace=PREFIX, registry=registry)


def _histogram(name: str, help_text: str, registry: CollectorRegistry, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, help_text, namespace=PREFIX, registry=registry, buckets=buckets)


def _gauge(name: str, help_text: str, registry: CollectorRegistry, *labels: str) -> Gauge:
    return Gauge(name, help_text, labels, namespace=PREFIX, registry=registry)


def _version() -> str:
    try:
        return metadata.version("code-moderation-worker")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0+unknown"
