"""Settings -> keyword arguments of kafka-python's clients, topics at start, and the client's errors as one clear line.

The only file that knows how kafka-python spells an option. Secrets go into the keyword arguments and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from worker import kafka_speed
from worker.clock import Deadline
from worker.errors import ConfigurationError, DependencyError
from worker.settings import KafkaSettings, environment_name

if TYPE_CHECKING:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

Client = TypeVar("Client")

RECORD_OVERHEAD_BYTES = 2**20
"""What our own headers, the batch and the request may add to the largest record."""
FETCH_MAX_BYTES = 3 * 2**20
PARTITION_FETCH_BYTES = 2 * 2**20
"""A fetch asks for this much in all, and of a partition; a larger first batch still comes whole (KIP-74), so these bound memory,
not records. Buffers of this size are used again by the allocator (`process_memory`); fresh ones cost
as much as what is done with them."""
FETCH_WAIT_MS = 50
"""How long a broker may hold a fetch that finds nothing. The client has one fetch in flight to a broker: while one for quiet
partitions (the retry topic's) waits there, a busy partition whose data is used up waits with it (Kafka's default is 500)."""
HEARTBEAT_MS = 1_000
"""A rebalance waits for every member's next heartbeat, so a short one keeps stalls short (Kafka's default is 3 s)."""
LINGER_MS = 5
"""How long a record waits for company."""
BUSY_LINGER_MS = 20
"""The same while many records go out. A request costs the client as much as a dozen records in it, and few come along within 5 ms
where every image is decoded. Transactions flush."""
MIN_BATCH_LIMIT_BYTES = 64 * 2**20
"""A batch may unpack to this, or to four of the largest records; one that would to more is a bomb, and unreadable."""
FOREVER_MS = 2**31 - 1
TOPIC_POLL_S = 0.25
CONNECT_GRACE_S = 2.0


def connection_options(settings: KafkaSettings) -> dict[str, Any]:
    """Addresses, TLS and SASL: what every client takes."""
    options: dict[str, Any] = {
        "bootstrap_servers": list(settings.bootstrap_servers),
        "client_id": f"code-worker-{socket.gethostname()}",
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": settings.request_timeout_ms,
        "bootstrap_timeout_ms": int(settings.startup_timeout_s * 1000),
        "reconnect_backoff_max_ms": 5_000,
        "connections_max_idle_ms": max(9 * 60_000, 2 * settings.request_timeout_ms),
    }
    if settings.security_protocol in ("SSL", "SASL_SSL"):
        options["ssl_check_hostname"] = settings.ssl_check_hostname
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            path = getattr(settings, name)
            if path is not None:
                options[name] = str(path)
    if settings.security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.sasl_mechanism
        if settings.sasl_username is not None:
            options["sasl_plain_username"] = settings.sasl_username
        if settings.sasl_password is not None:
            options["sasl_plain_password"] = settings.sasl_password.get_secret_value()
    return options


def consumer_options(settings: KafkaSettings, *, group: bool = True) -> dict[str, Any]:
    """For KafkaConsumer. Without `group` it joins none and commits nothing (`watch`, `dead`)."""
    options = connection_options(settings) | {
        "enable_auto_commit": False,
        "auto_offset_reset": settings.auto_offset_reset,
        # What an uploader's transaction took back was never uploaded; our own retry records may be transactional too.
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "fetch_max_bytes": fetch_max_bytes(settings),
        "max_partition_fetch_bytes": PARTITION_FETCH_BYTES,
        "fetch_max_wait_ms": FETCH_WAIT_MS,
        # The largest frame that is legitimate: a full fetch, or one batch of the largest size that came whole.
        "receive_message_max_bytes": max(100_000_000, fetch_max_bytes(settings) + 2 * settings.max_record_bytes),
        "metrics_enabled": False,
    }
    if group:
        from worker.kafka_assignor import EvenAssignor

        options |= {
            "group_id": settings.group_id,
            "group_instance_id": settings.group_instance_id,
            "partition_assignment_strategy": (EvenAssignor,),
            "max_poll_interval_ms": settings.max_poll_interval_ms,
            "session_timeout_ms": settings.session_timeout_ms,
            "heartbeat_interval_ms": min(HEARTBEAT_MS, settings.session_timeout_ms // 3),
        }
    return options


def producer_options(settings: KafkaSettings) -> dict[str, Any]:
    """For KafkaProducer: idempotent, acknowledged by all in-sync replicas, patient."""
    return connection_options(settings) | {
        "acks": "all",
        "enable_idempotence": True,
        # The client itself re-sends, in sequence and so without duplicates, until the broker takes the record. Once it
        # gave up, our own re-send would be a new record to the broker.
        "delivery_timeout_ms": FOREVER_MS,
        "max_block_ms": min(settings.request_timeout_ms, 10_000),
        "max_request_size": settings.max_record_bytes + RECORD_OVERHEAD_BYTES,
        "compression_type": None if settings.compression == "none" else settings.compression,
        "batch_size": 128 * 1024,
        "linger_ms": LINGER_MS,
        "allow_auto_create_topics": False,
        "metrics_enabled": False,
    }


def fetch_max_bytes(settings: KafkaSettings) -> int:
    """Bytes of one fetch answer: what a broker's data may take beside the in-flight budget is a part of it."""
    return max(PARTITION_FETCH_BYTES, min(FETCH_MAX_BYTES, settings.max_in_flight_bytes // 4))


def open_consumer(settings: KafkaSettings, *, group: bool = True, **overrides: Any) -> KafkaConsumer:
    """Connect a consumer.

    Raises:
        DependencyError: not reachable within `startup_timeout_s`, or refused.
        ConfigurationError: an option or a file it names is unusable.
    """
    from kafka import KafkaConsumer

    from worker.batch_guard import guard

    consumer = _connect(settings, KafkaConsumer, consumer_options(settings, group=group) | overrides)
    guard(consumer, max(MIN_BATCH_LIMIT_BYTES, 4 * settings.max_record_bytes))
    return consumer


def open_producer(settings: KafkaSettings, **overrides: Any) -> KafkaProducer:
    """Connect a producer. Raises as `open_consumer`."""
    from kafka import KafkaProducer

    return _connect(settings, KafkaProducer, producer_options(settings) | overrides)


def open_admin(settings: KafkaSettings, **overrides: Any) -> KafkaAdminClient:
    """Connect an admin client. Raises as `open_consumer`."""
    from kafka import KafkaAdminClient

    return _connect(settings, KafkaAdminClient, connection_options(settings) | overrides)


def ensure_topics(
    settings: KafkaSettings,
    deadline: Deadline,
    *,
    topics: Sequence[str] | None = None,
    create: bool | None = None,
    sleep: Callable[[float], None] | None = None,
) -> None:
    """Wait for the broker and for the topics that are read and written; create missing ones with `create_topics`.

    New topics get the broker's default partitions and replicas. `topics`: others than those of the worker.

    Raises:
        DependencyError: no broker, or each topic that is still missing, when the deadline passes.
    """
    import time

    sleep = sleep or time.sleep
    create = settings.create_topics if create is None else create
    pipeline = [*settings.upload_topics, settings.verdict_topic, settings.retry_topic, settings.dead_letter_topic]
    wanted = pipeline if topics is None else list(topics)
    with contextlib.closing(open_admin(settings, bootstrap_timeout_ms=_milliseconds(deadline))) as admin:
        while True:
            missing = _missing_topics(admin, wanted)
            if not missing:
                return
            if create:
                _create_topics(admin, missing)
            if deadline.expired():
                reason = "could not be created" if create else "missing; create them or set WORKER_KAFKA__CREATE_TOPICS=true"
                raise DependencyError(f"Kafka topics {reason}: {', '.join(missing)}")
            sleep(min(TOPIC_POLL_S, deadline.remaining()))


def describe(error: Exception) -> str:
    """A foreign error in one line: its name and what it says, without codes."""
    text = re.sub(r"^\[Error \d+\] ", "", " ".join(str(error).split()))
    name = type(error).__name__
    return text if text.startswith(name) or name in text[:60] else f"{name}: {text}" if text else name


def _missing_topics(admin: KafkaAdminClient, wanted: list[str]) -> list[str]:
    """Those that do not exist or have a partition without a leader."""
    from kafka.errors import KafkaError

    try:
        found = {topic["name"]: topic for topic in admin.describe_topics(wanted)}
    except KafkaError as error:
        if not error.retriable:
            raise DependencyError(f"Kafka: cannot list topics: {describe(error)}") from error
        return wanted
    return [name for name in wanted if not _usable(found.get(name))]


def _usable(topic: dict[str, Any] | None) -> bool:
    if topic is None or topic["error_code"] or not topic["partitions"]:
        return False
    return all(partition["leader_id"] >= 0 for partition in topic["partitions"])


def _create_topics(admin: KafkaAdminClient, names: list[str]) -> None:
    from kafka.errors import InvalidReplicationFactorError, KafkaError, TopicAlreadyExistsError

    for name in names:
        try:
            admin.create_topics({name: {}})
        except (TopicAlreadyExistsError, InvalidReplicationFactorError):
            continue  # made by another worker; or too few brokers are up yet: asked again until the deadline
        except KafkaError as error:
            if not error.retriable:
                raise DependencyError(f"Kafka: cannot create topic {name}: {describe(error)}") from error


class _Complaints(logging.Handler):
    """What the client's log says about failed connections: the exception it raises in the end says only "timeout"."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Bootstrap connection to %s failed") and isinstance(record.args, tuple):
            self._seen = [*self._seen[-20:], " ".join(str(record.args[1]).split())]

    @property
    def most_telling(self) -> str:
        """The last of the best: one with a reason before one closed without, before one that ran out of time."""
        return max(reversed(self._seen), key=_telling, default="")


def _telling(complaint: str) -> int:
    if re.search(r"timed ?out|timeout", complaint, re.IGNORECASE):
        return 0
    return 1 if "socket disconnected" in complaint else 2


@contextlib.contextmanager
def _watched_log() -> Iterator[_Complaints]:
    handler = _Complaints()
    logger = logging.getLogger("kafka.net.manager")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def _connect(settings: KafkaSettings, make: Callable[..., Client], options: dict[str, Any]) -> Client:
    """The one boundary where errors of connecting become ours."""
    from kafka.errors import KafkaConfigurationError, KafkaError

    _check_files(settings)
    kafka_speed.apply()
    servers = ",".join(settings.bootstrap_servers)
    with _watched_log() as complaints:
        try:
            return _within(lambda: make(**options), options["bootstrap_timeout_ms"] / 1000 + CONNECT_GRACE_S)
        except (KafkaConfigurationError, ValueError) as error:
            raise ConfigurationError(f"WORKER_KAFKA: {describe(error)}") from error
        except TimeoutError as error:
            raise DependencyError(f"Kafka at {servers} is not usable: {_cause('[SSL handshake unanswered]')}") from error
        except KafkaError as error:
            raise DependencyError(f"Kafka at {servers} is not usable: {_cause(complaints.most_telling or str(error))}") from error


def _within(make: Callable[[], Client], seconds: float) -> Client:
    """kafka-python's own time-out does not cover a TLS handshake that nobody answers: wait in a thread of our own."""
    outcome: queue.SimpleQueue[tuple[Client | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((make(), None))
        except Exception as error:  # noqa: BLE001 - raised again by the caller
            outcome.put((None, error))

    threading.Thread(target=work, name="kafka-connect", daemon=True).start()
    try:
        client, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if client is None:
        raise error or TimeoutError
    return client


def _check_files(settings: KafkaSettings) -> None:
    if settings.security_protocol not in ("SSL", "SASL_SSL"):
        return
    problems = []
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(settings, name)
        if path is not None:
            try:
                path.open("rb").close()
            except OSError as error:
                problems.append(f"{environment_name('kafka', name)}: cannot read {path}: {error.strerror}")
    if problems:
        raise ConfigurationError(problems)


_CAUSES = (
    (
        "SaslAuthenticationFailed",
        "the login was refused: check WORKER_KAFKA__SASL_USERNAME, WORKER_KAFKA__SASL_PASSWORD and WORKER_KAFKA__SASL_MECHANISM",
    ),
    (
        "UnsupportedSaslMechanism",
        "the broker does not offer this SASL mechanism: check WORKER_KAFKA__SASL_MECHANISM",
    ),
    ("CERTIFICATE_VERIFY_FAILED", "the broker's certificate is not trusted: check WORKER_KAFKA__SSL_CAFILE and the host name"),
    ("[SSL", "the TLS handshake failed: does this listener speak TLS? check WORKER_KAFKA__SECURITY_PROTOCOL and the port"),
    (
        "InvalidReceiveError",
        "what answers there does not speak plain Kafka, TLS perhaps: check WORKER_KAFKA__SECURITY_PROTOCOL and the port",
    ),
    ("ECONNREFUSED", "nothing listens there: check WORKER_KAFKA__BOOTSTRAP_SERVERS and that the broker runs"),
    ("DNS", "the host name cannot be resolved: check WORKER_KAFKA__BOOTSTRAP_SERVERS"),
    (
        "socket disconnected",
        "connections are closed at once: the likely causes are a wrong user, password or SASL mechanism, or a listener that "
        "expects another WORKER_KAFKA__SECURITY_PROTOCOL (TLS or not, SASL or not)",
    ),
    ("", "no broker answered in time: check WORKER_KAFKA__BOOTSTRAP_SERVERS, the network and the brokers"),
)


def _cause(complaint: str) -> str:
    """What to check, and in brackets the client's own words."""
    advice = next(advice for mark, advice in _CAUSES if mark in complaint)
    return f"{advice} ({complaint})" if complaint else advice


def _milliseconds(deadline: Deadline) -> int:
    return max(1, int(deadline.remaining() * 1000))
