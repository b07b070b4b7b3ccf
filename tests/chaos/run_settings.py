"""The settings of a run: short time-outs, so that a fault is felt and overcome within a run of minutes."""

from __future__ import annotations

from tests.conftest import unique_settings
from worker.settings import KafkaSettings


def kafka_settings(bootstrap: str, delivery: str) -> KafkaSettings:
    """A group and topics of its own."""
    values = {"bootstrap_servers": tuple(bootstrap.split(",")), "delivery": delivery, "create_topics": False}
    return unique_settings("", **values)


def worker_settings(kafka: KafkaSettings, cache_url: str) -> dict[str, object]:
    """WORKER_ settings without the prefix."""
    return {
        "KAFKA__BOOTSTRAP_SERVERS": ",".join(kafka.bootstrap_servers),
        "KAFKA__GROUP_ID": kafka.group_id,
        "KAFKA__UPLOAD_TOPICS": ",".join(kafka.upload_topics),
        "KAFKA__VERDICT_TOPIC": kafka.verdict_topic,
        "KAFKA__RETRY_TOPIC": kafka.retry_topic,
        "KAFKA__DEAD_LETTER_TOPIC": kafka.dead_letter_topic,
        "KAFKA__DELIVERY": kafka.delivery,
        "KAFKA__SESSION_TIMEOUT_MS": 10_000,
        "KAFKA__MAX_POLL_INTERVAL_MS": 60_000,
        "KAFKA__REQUEST_TIMEOUT_MS": 10_000,
        "CACHE__URL": cache_url,
        "FETCH__ALLOW_PRIVATE_ADDRESSES": "true",
        "FETCH__RETRY_DELAY_S": 0.5,
        "FETCH__RETRY_DELAY_MAX_S": 4,
        "FETCH__ATTEMPTS": 8,
        "DECODE__PROCESSES": 1,
        "DECODE__TIMEOUT_S": 4,
        "SHUTDOWN__DRAIN_S": 30,
    }
