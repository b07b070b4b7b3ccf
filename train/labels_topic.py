"""The label topic and the upload topics, read without a group by the worker's own settings (`WORKER_KAFKA__…`).

Batches that cannot be decoded are passed over (`train.labels_batches`); should the client hang all the same, reading happens in a
thread that is given up when nothing comes of it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from train.data import DataError
from train.labels import Label, LabelFold, Tally, Upload
from train.labels_batches import skip_damaged

if TYPE_CHECKING:
    from kafka import KafkaConsumer

PREFIX = "WORKER_KAFKA__"
CONNECT_S = 30.0
READ_S = 600.0
UPLOAD_READ_S = 15.0
POLL_MS = 200
QUIET_S = 20.0
"""Nothing for so long before the end of the topic: an open transaction, or a broker in trouble."""
MAX_ABANDONED_READS = 3

Result = TypeVar("Result")


class TopicError(Exception):
    """Kafka is not usable now; a later try may work. The message names servers or topic."""


@dataclass(frozen=True, slots=True)
class KafkaOptions:
    """Where the topics are and how to get there; fields as in the worker's settings, group KAFKA."""

    bootstrap_servers: tuple[str, ...] = ("localhost:9092",)
    label_topic: str = "image.labels"
    upload_topics: tuple[str, ...] = ("image.uploads",)
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool = True

    def consumer(self) -> dict[str, Any]:
        """Keyword arguments of KafkaConsumer."""
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "client_id": "code-train",
            "security_protocol": self.security_protocol,
            "bootstrap_timeout_ms": int(CONNECT_S * 1000),
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "isolation_level": "read_committed",
            "allow_auto_create_topics": False,
            "metrics_enabled": False,
        }
        if self.security_protocol in ("SSL", "SASL_SSL"):
            options["ssl_check_hostname"] = self.ssl_check_hostname
            for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
                if (path := getattr(self, name)) is not None:
                    options[name] = path
        if self.security_protocol.startswith("SASL"):
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        return options


def options_from(environ: Mapping[str, str] | None = None) -> KafkaOptions:
    """The worker's settings of the group KAFKA, as far as reading needs them: environment over secret files over TOML file.

    Raises:
        DataError: a file that these variables name cannot be read.
    """
    environ = os.environ if environ is None else environ
    file = environ.get("WORKER_CONFIG")
    values: dict[str, Any] = dict(_toml(Path(file))) if file else {}
    known = KafkaOptions.__dataclass_fields__
    secrets = Path(environ["WORKER_SECRETS_DIR"]) if environ.get("WORKER_SECRETS_DIR") else None
    for name in known:
        variable = f"{PREFIX}{name.upper()}"
        if secrets is not None and (secrets / variable).is_file():
            values[name] = (secrets / variable).read_text("utf-8").strip()
        if variable in environ:
            values[name] = environ[variable]
    chosen = {name: _typed(name, value) for name, value in values.items() if name in known}
    return KafkaOptions(**chosen)


def read_labels(options: KafkaOptions) -> tuple[list[Label], Tally]:
    """Every label in effect at the topic's present end.

    Raises:
        TopicError: no such topic, no broker, or no end reached in time.
        DataError: a setting that the client refuses.
    """
    return _watched(lambda: _read_labels(options), READ_S, f"Kafka topic {options.label_topic}")


class UploadReader:
    """Reads single records of the upload topics. One thread."""

    def __init__(self, options: KafkaOptions) -> None:
        self._options = options
        self._consumer: KafkaConsumer | None = None
        self._abandoned = 0

    def read(self, upload: Upload) -> tuple[bytes, dict[str, bytes]]:
        """Value and headers of the record at that place.

        Raises:
            LookupError: it is not there any more, or its topic is none of ours; the message says so.
            TopicError: the topic cannot be read.
        """
        if upload.topic not in self._options.upload_topics:
            raise LookupError("the upload's topic is none of WORKER_KAFKA__UPLOAD_TOPICS")
        if self._abandoned >= MAX_ABANDONED_READS:
            raise TopicError("the upload topics could not be read several times: given up")
        try:
            found = _watched(lambda: self._read(upload), UPLOAD_READ_S + CONNECT_S, f"Kafka topic {upload.topic}")
        except TopicError:
            # The consumer may still be at work in the thread that was given up.
            self._consumer, self._abandoned = None, self._abandoned + 1
            raise
        if found is None:
            raise LookupError("the upload is no longer in its topic")
        return found

    def close(self) -> None:
        """Close the connection."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None

    def _read(self, upload: Upload) -> tuple[bytes, dict[str, bytes]] | None:
        from kafka import KafkaConsumer, TopicPartition
        from kafka.errors import OffsetOutOfRangeError

        if self._consumer is None:
            # Without a reset: an offset that is gone is an answer, not a reason to read another one.
            self._consumer = KafkaConsumer(**self._options.consumer() | {"max_poll_records": 1, "auto_offset_reset": "none"})
            skip_damaged(self._consumer, lambda place, reason: None)
        consumer, place = self._consumer, TopicPartition(upload.topic, upload.partition)
        if upload.partition not in (consumer.partitions_for_topic(upload.topic) or ()):
            return None
        consumer.assign([place])
        consumer.seek(place, upload.offset)
        end = time.monotonic() + UPLOAD_READ_S
        while time.monotonic() < end:
            try:
                batches = consumer.poll(timeout_ms=POLL_MS)
            except OffsetOutOfRangeError:
                return None
            for records in batches.values():
                found = records[0]
                if found.offset != upload.offset or found.value is None:
                    return None
                return bytes(found.value), {name.lower(): value for name, value in found.headers if value is not None}
        return None


def _read_labels(options: KafkaOptions) -> tuple[list[Label], Tally]:
    from kafka import KafkaConsumer, TopicPartition

    topic = options.label_topic
    with closing(KafkaConsumer(**options.consumer())) as consumer:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        if not partitions:
            raise TopicError(f"Kafka topic {topic} does not exist, or this user may not read it")
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        fold = LabelFold()
        seen: set[str] = set()

        def damaged(place: str, _: str) -> None:
            # A batch may be fetched more than once.
            if place not in seen:
                seen.add(place)
                fold.tally.skip("a record batch that cannot be decoded", place)

        skip_damaged(consumer, damaged)
        ends: dict[Any, int] = {}
        # A record's own partition orders it; across partitions there is no order, and an entry has all of its records in one.
        quiet_until = time.monotonic() + QUIET_S
        while time.monotonic() < quiet_until:
            for tp, records in consumer.poll(timeout_ms=POLL_MS).items():
                for record in records:
                    fold.add(record.value, f"{tp.topic}/{tp.partition}/{record.offset}")
                quiet_until = time.monotonic() + QUIET_S
            # From the fetch answers: asked for its ends, the embedded broker tells the beginning of the last batch.
            for tp in partitions:
                if tp not in ends and (end := consumer.highwater(tp)) is not None:
                    ends[tp] = end
            if len(ends) == len(partitions) and all((consumer.position(tp) or 0) >= end for tp, end in ends.items()):
                return fold.labels(), fold.tally
        stuck = [f"{tp.partition} at offset {consumer.position(tp)}" for tp in partitions if tp not in ends
                 or (consumer.position(tp) or 0) < ends[tp]]  # fmt: skip
        raise TopicError(f"Kafka topic {topic}: no end reached in partition {', '.join(stuck)}")


def _watched(read: Callable[[], Result], seconds: float, what: str) -> Result:
    """The result of `read`, in a thread that is given up after `seconds`; the one boundary to kafka-python's errors."""
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((True, read()))
        except Exception as error:  # noqa: BLE001 - raised again by the caller, mapped
            outcome.put((False, error))

    threading.Thread(target=work, name="kafka-read", daemon=True).start()
    try:
        done, value = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TopicError(f"{what}: cannot be read: nothing came of it in {seconds:.0f} s") from None
    if done:
        result: Result = value
        return result
    if isinstance(value, TopicError):
        raise value
    text = " ".join(str(value).split())
    if isinstance(value, ValueError | AssertionError) or type(value).__name__ == "KafkaConfigurationError":
        raise DataError(f"{PREFIX}*: {text or type(value).__name__}") from value
    raise TopicError(f"{what}: cannot be read: {type(value).__name__}{f': {text}' if text else ''}") from value


def _toml(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise DataError(f"WORKER_CONFIG: {path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise DataError(f"WORKER_CONFIG: {path}: not TOML: {exc}") from exc
    group = found.get("kafka", {})
    return group if isinstance(group, dict) else {}


def _typed(name: str, value: Any) -> Any:
    if name in ("bootstrap_servers", "upload_topics"):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts if str(part).strip())
    if name == "ssl_check_hostname":
        return value if isinstance(value, bool) else str(value).strip().lower() in ("1", "true", "yes", "on")
    return value if value is None else str(value)
