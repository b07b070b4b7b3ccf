"""The brokers of a run: Apache Kafka, or the embedded one, which bears less; and what can be done to them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

from kafka import TopicPartition
from kafka.admin import NewTopic
from kafka.errors import KafkaError

from tests.chaos.schedule import EMBEDDED, KINDS
from tests.conftest import KafkaCluster
from worker.clock import Deadline
from worker.embedded import EmbeddedBroker
from worker.kafka_clients import ensure_topics, open_admin
from worker.settings import KafkaSettings

RESTART_S = 600


class Brokers(Protocol):
    """Nodes count from 0."""

    nodes: int
    bootstrap: str
    bears: frozenset[str]
    """Names of the faults that are possible."""

    def prepare(self, settings: KafkaSettings, partitions: int) -> None:
        """Create the topics."""

    def kill(self, node: int) -> None: ...
    def restart(self, node: int) -> None: ...
    def restart_all(self) -> None: ...
    def stop(self, node: int) -> None: ...
    def resume(self, node: int) -> None: ...
    def move_leaders(self, settings: KafkaSettings, seed: float) -> bool:
        """Give every partition another leader; False where the cluster would not just now."""


class ApacheBrokers:
    """A cluster that was started by the script."""

    def __init__(self, cluster: KafkaCluster, nodes: int) -> None:
        self.nodes = nodes
        self.bootstrap = cluster.run("env")
        self.bears = frozenset(kind.name for kind in KINDS)
        self._cluster = cluster
        self._lock = threading.Lock()

    def prepare(self, settings: KafkaSettings, partitions: int) -> None:
        """Topics whose records carry the broker's time: that of the producer may step."""
        topics = [*settings.upload_topics, settings.verdict_topic, settings.retry_topic, settings.dead_letter_topic]
        configs = {"message.timestamp.type": "LogAppendTime"}
        with closing(open_admin(settings)) as admin:
            admin.create_topics([NewTopic(topic, partitions, self.nodes, topic_configs=configs) for topic in topics])
        ensure_topics(settings, Deadline(30))

    def kill(self, node: int) -> None:
        self._run("kill", node)

    def restart(self, node: int) -> None:
        """Start it again and wait until it listens."""
        with self._lock:
            self._restart(node)

    def restart_all(self) -> None:
        """Start every node before any is waited for: one alone finds no majority of controllers, and gives up after a minute."""
        with self._lock, ThreadPoolExecutor(self.nodes) as pool:
            starts = []
            for node in range(self.nodes):
                before = self._process_ids().get(node)
                starts.append(pool.submit(self._restart, node))
                while self._process_ids().get(node, before) == before and not starts[-1].done():
                    time.sleep(0.1)  # the script notes each node's process id in one file: not two at a time
            for start in starts:
                start.result()

    def _process_ids(self) -> dict[int, int]:
        """By node, as the script has noted them; empty while it writes."""
        try:
            noted = json.loads((self._cluster.folder / "state.json").read_text())["pids"]
        except ValueError:
            return {}
        return {int(name) - 1: pid for name, pid in noted.items()}

    def _restart(self, node: int) -> None:
        """The script waits a minute, which is not enough on a busy machine."""
        try:
            self._cluster.run("restart", str(node + 1))
        except subprocess.CalledProcessError:
            host, port = self.bootstrap.split(",")[node].split(":")
            deadline = Deadline(RESTART_S)
            while not deadline.expired():
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                    return
                time.sleep(0.5)
            raise

    def stop(self, node: int) -> None:
        self._run("pause", node)

    def resume(self, node: int) -> None:
        self._run("resume", node)

    def move_leaders(self, settings: KafkaSettings, seed: float) -> bool:
        """Shuffle the replicas of every partition of the verdict and upload topics, then elect the first of each."""
        rng = random.Random(seed)
        topics = [*settings.upload_topics, settings.verdict_topic, "__consumer_offsets"]
        try:
            with closing(open_admin(settings)) as admin:
                order = {
                    TopicPartition(topic["name"], part["partition_index"]): rng.sample(part["replica_nodes"], self.nodes)
                    for topic in admin.describe_topics(topics)
                    for part in topic["partitions"]
                }
                admin.alter_partition_reassignments(order)
                admin.elect_leaders(0, topics, raise_errors=False)
        except (KafkaError, ValueError):  # a broker is away
            return False
        return True

    def _run(self, verb: str, node: int) -> None:
        with self._lock:
            self._cluster.run(verb, str(node + 1))


class EmbeddedBrokers:
    """The broker of the demo, in memory: it can be stopped for a while, and nothing else."""

    nodes = 1

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.bootstrap = broker.bootstrap
        self.bears = EMBEDDED
        self._broker = broker

    def prepare(self, settings: KafkaSettings, partitions: int) -> None:
        ensure_topics(settings, Deadline(30), create=True)

    def kill(self, node: int) -> None:
        raise NotImplementedError("it would lose everything")

    restart = kill

    def restart_all(self) -> None:
        raise NotImplementedError("it would have lost everything")

    def stop(self, node: int) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self, node: int) -> None:
        self._signal(signal.SIGCONT)

    def move_leaders(self, settings: KafkaSettings, seed: float) -> bool:
        return False

    def _signal(self, number: signal.Signals) -> None:
        if self._broker.pid is not None:
            os.kill(self._broker.pid, number)
