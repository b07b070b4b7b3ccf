"""Fixtures shared by all packages: the embedded broker and cache, one process each for the whole session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

from worker.embedded import EmbeddedBroker, EmbeddedCache
from worker.errors import DependencyError
from worker.settings import KafkaSettings

# How long one example takes says more about the neighbours on this machine than about the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

# A shell's background job ignores Ctrl-C, and its children inherit that: the tests of Ctrl-C need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def broker() -> Iterator[EmbeddedBroker]:
    """A running broker. Shared: use topics and groups of your own (`kafka_settings` gives them)."""
    try:
        server = EmbeddedBroker().start()
    except DependencyError as error:
        _skip_or_fail(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def cache_server() -> Iterator[EmbeddedCache]:
    """A running cache. Shared: use keys of your own, or an EmbeddedCache of your own to hurt it."""
    try:
        server = EmbeddedCache().start()
    except DependencyError as error:
        _skip_or_fail(str(error))
    with server:
        yield server


@pytest.fixture
def kafka_settings(broker: EmbeddedBroker) -> Callable[..., KafkaSettings]:
    """Makes settings for the embedded broker with topics and a group nobody else uses; the topics do not exist yet."""

    def make(bootstrap: str | None = None, **overrides: object) -> KafkaSettings:
        return unique_settings(bootstrap or broker.bootstrap, **overrides)

    return make


@pytest.fixture(scope="session")
def kafka_cluster() -> str:
    """Path of the script that starts Apache Kafka (environment KAFKA_CLUSTER)."""
    script = os.environ.get("KAFKA_CLUSTER")
    if not script:
        pytest.skip("KAFKA_CLUSTER is not set: the path of a script that starts Apache Kafka")
    if not Path(script).is_file():
        pytest.fail(f"KAFKA_CLUSTER={script}: no such file")
    return script


class KafkaCluster:
    """Apache Kafka in `folder`, driven by the script: `run("start", "--nodes", "3")`, `run("kill", "2")`, `run("env")`."""

    def __init__(self, script: str, folder: Path) -> None:
        self.folder = folder
        self._script = script

    def run(self, *arguments: str) -> str:
        """What the script prints."""
        command = [sys.executable, self._script, *arguments, "--dir", str(self.folder)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout.strip()

    def __enter__(self) -> KafkaCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists():
            self.run("stop")


def unique_settings(bootstrap: str, **overrides: object) -> KafkaSettings:
    """Settings with topics and a group of a unique name."""
    name = uuid.uuid4().hex[:8]
    values: dict[str, object] = {
        "bootstrap_servers": (bootstrap,),
        "group_id": f"group-{name}",
        "upload_topics": (f"uploads-{name}",),
        "verdict_topic": f"verdicts-{name}",
        "retry_topic": f"retry-{name}",
        "dead_letter_topic": f"dead-{name}",
        "label_topic": f"labels-{name}",
        "create_topics": True,
        "session_timeout_ms": 2_000,  # the embedded broker completes a join after half of it, two seconds at least
    }
    return KafkaSettings.model_validate(values | overrides)


def _skip_or_fail(reason: str) -> NoReturn:
    """What is missing skips on a laptop and fails in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
