"""Fixtures shared by all packages: the embedded broker and cache, one process each for the whole session."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import hypothesis
import psutil
import pytest

from worker.embedded import EmbeddedBroker, EmbeddedCache
from worker.errors import DependencyError
from worker.settings import KafkaSettings

# How long one example takes says more about the neighbours on this machine than about the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

BESIDE_THE_CHECKOUT = Path(__file__).parents[2] / "shared" / "kafka" / "cluster"
SLOW_START_S = 300.0
LARGE_RECORDS = ("--set", "message.max.bytes=30000000", "--set", "replica.fetch.max.bytes=30000000")

# A shell's background job ignores Ctrl-C, and its children inherit that: the tests of Ctrl-C need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `soak` runs by hand only: where the -m expression names it."""
    if "soak" in config.option.markexpr:
        return
    by_hand = [item for item in items if item.get_closest_marker("soak")]
    if by_hand:
        config.hook.pytest_deselected(items=by_hand)
        items[:] = [item for item in items if item not in by_hand]


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
    """Path of the script that starts Apache Kafka; what there is to start is told by `cluster_script`."""
    script, reason = cluster_script()
    if script is None:
        pytest.skip(reason)
    if not Path(script).is_file():
        pytest.fail(f"KAFKA_CLUSTER={script}: no such file")
    return script


@pytest.fixture(scope="session")
def three(kafka_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """Three brokers, two in-sync replicas needed, records up to 30 MB; shared, so leave every broker running."""
    with KafkaCluster(kafka_cluster, tmp_path_factory.mktemp("three") / "kafka") as cluster:
        cluster.start("--nodes", "3")
        yield cluster


@pytest.fixture(scope="session")
def secure(kafka_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """One broker that asks for TLS and SCRAM; shared, so leave it running."""
    with KafkaCluster(kafka_cluster, tmp_path_factory.mktemp("secure") / "kafka") as cluster:
        cluster.start("--nodes", "1", "--secure")
        yield cluster


def cluster_script(environ: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """The script that starts Apache Kafka, or None and why not.

    Environment `KAFKA_CLUSTER` names it, with the verbs of `KafkaCluster`; empty or `none` switches these tests off. Unset,
    it is the one that lies beside the checkout.
    """
    named = environ.get("KAFKA_CLUSTER")
    if named is None:
        if not BESIDE_THE_CHECKOUT.is_file():
            return None, "no Apache Kafka: KAFKA_CLUSTER names no script that starts it, and none lies beside the checkout"
        named = str(BESIDE_THE_CHECKOUT)
    if named.strip() in ("", "none"):
        return None, "KAFKA_CLUSTER switches the tests on Apache Kafka off"
    if shutil.which("java") is None:
        return None, "no Apache Kafka: java is not installed (17 or later)"
    return named, ""


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class KafkaCluster:
    """Apache Kafka in `folder`, driven by the script: `start("--nodes", "3")`, `run("kill", "2")`, `run("env")`."""

    def __init__(self, script: str, folder: Path) -> None:
        self.folder = folder
        self._script = script

    def start(self, *arguments: str, options: Sequence[str] = LARGE_RECORDS) -> str:
        """The bootstrap servers. A start that fails (a port taken meanwhile) is tried again, one that is slow waited for."""
        for attempt in range(3):
            try:
                return self.run("start", *arguments, *options)
            except subprocess.CalledProcessError as error:
                if self._listens(SLOW_START_S):
                    return self.run("env")
                self.__exit__()
                if attempt == 2:
                    raise RuntimeError(f"Apache Kafka does not start: {error.stdout} {error.stderr}") from error
        raise AssertionError

    def run(self, *arguments: str) -> str:
        """What the script prints."""
        command = [sys.executable, self._script, *arguments, "--dir", str(self.folder)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.strip()

    def _listens(self, within_s: float) -> bool:
        """Whether every node comes to listen after all: on a busy machine it takes longer than the script's minute."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return False  # it did not get so far as to start them
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and all(map(_lives, state["pids"].values())):
            if all(map(_is_open, state["ports"])):
                return True
            time.sleep(0.5)
        return False

    def __enter__(self) -> KafkaCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if (self.folder / "state.json").exists():
            self.run("stop")
        shutil.rmtree(self.folder, ignore_errors=True)


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
