"""The books of a run: every event accounted for, verdicts right, duplicates counted and explained, offsets where they belong.

They read the topics with librdkafka as any consumer would, `read_committed`, and know nothing of the worker's inside.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from confluent_kafka import Consumer, KafkaException, TopicPartition

from tests.chaos.load import Planned, sha256_of
from worker import contracts
from worker.settings import KafkaSettings

SLACK_S = 30.0
"""A fault is felt so long after its end: a session that has to expire, a rebalance, revokes that wait."""
RETRIED_S = 60.0
"""What doubled the retry record of an event lies so long before both of its verdicts."""
Place = tuple[int, int]
"""Partition and offset."""
DECODER_CODES = ("decode.timeout", "decode.crashed")
HOST_CODES = ("fetch.timeout", "fetch.unavailable")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A fault as it happened: POSIX seconds of its beginning and end."""

    kind: str
    began: float
    ended: float

    def touches(self, first: float, last: float) -> bool:
        """Whether it was felt at any moment between the two."""
        return self.began - 1.0 <= last and self.ended + SLACK_S >= first


@dataclass
class Balance:
    """What the books say at the end. `problems` is empty where all is well."""

    events: int
    lost: list[str] = field(default_factory=list)
    duplicates: int = 0
    """Verdicts beyond the first of their verdict id."""
    duplicate_letters: int = 0
    repeats: list[tuple[float, float, int]] = field(default_factory=list)
    """Of each duplicate verdict the times (POSIX seconds) of the copy before and of itself, and the upload's partition."""
    unexplained: list[str] = field(default_factory=list)
    """Duplicates without a fault that could have caused them."""
    blamed: int = 0
    """Good images that ended in a decoder's failure while decoders were hurt."""
    host_failed: int = 0
    verdicts: int = 0
    letters: int = 0
    problems: list[str] = field(default_factory=list)


class Books:
    """Takes verdicts and dead letters as they come; `balance` at the end."""

    def __init__(self, plans: Iterable[Planned], scores: Mapping[str, Mapping[int, float]]) -> None:
        """`scores`: by the version of each model that may sign a verdict, by grey, what it gives."""
        self._scores = scores
        self._plans: list[Planned] = []
        self._by_key: dict[bytes, int] = {}
        self.verdicts: dict[int, list[tuple[str, float, dict[str, object]]]] = defaultdict(list)
        """By number verdict id, the broker's time, and the rest that is still to be checked."""
        self.letters: dict[int, list[tuple[str, float]]] = defaultdict(list)
        self.wrong: list[str] = []
        self.accounted = 0
        self.samples: list[tuple[float, int]] = []
        """Monotonic time and how many events were accounted for."""
        self._is_accounted = bytearray()
        for planned in plans:
            self.expect(planned)

    def expect(self, planned: Planned) -> None:
        """One more event is about to be sent."""
        self._by_key[planned.key] = len(self._plans)
        self._is_accounted.append(0)
        self._plans.append(planned)

    @property
    def complete(self) -> bool:
        """Whether every event is accounted for."""
        return self.accounted == len(self._plans)

    @property
    def expected(self) -> int:
        """How many events were or will be sent."""
        return len(self._plans)

    # -- entries
    def verdict(self, value: bytes, stamp: float) -> None:
        """A record of the verdict topic, and the broker's time of it (POSIX seconds)."""
        verdict = json.loads(value)
        number = self._by_key.get(verdict["event_id"].encode())
        if number is None or self._plans[number].event_id is None:
            self.wrong.append(f"a verdict for an event that was never sent: {verdict['event_id']}")
            return
        planned = self._plans[number]
        version = verdict["model"]["version"]
        if version not in self._scores:
            self.wrong.append(f"{planned.event_id}: made by an unknown model {version}")
            return
        if verdict["verdict_id"] != contracts.verdict_id(verdict["event_id"], version):
            self.wrong.append(f"{planned.event_id}: its verdict id is not that of event and model")
        reason = verdict["reason"]
        if planned.code is not None and reason != planned.code:
            self.wrong.append(f"{planned.event_id}: {reason} instead of {planned.code}")
        if planned.code is None and reason is None:
            if verdict["image"]["sha256"] != sha256_of(planned, number):
                self.wrong.append(f"{planned.event_id}: a verdict on another image")
            if abs(verdict["score"] - self._scores[version][planned.grey or 0]) > 1e-3:
                self.wrong.append(f"{planned.event_id}: score {verdict['score']} of another image")
        rest = {"reason": reason, "source": verdict["source"], "version": version}
        self.verdicts[number].append((verdict["verdict_id"], stamp, rest))
        self._account(number)

    def letter(self, key: bytes | None, value: bytes | None, headers: dict[str, bytes], stamp: float) -> None:
        """A record of the dead-letter topic."""
        number = self._by_key.get(key or b"")
        if number is None:
            self.wrong.append(f"a dead letter for a record that was never sent: {key!r}")
            return
        if value != self._plans[number].value:
            self.wrong.append(f"record {number}: its dead letter has another value")
        self.letters[number].append((headers["__streams.errors.exception"].decode(), stamp))
        self._account(number)

    def _account(self, number: int) -> None:
        planned = self._plans[number]
        has_verdict = planned.event_id is None or number in self.verdicts
        if has_verdict and (planned.code is None or number in self.letters) and not self._is_accounted[number]:
            self._is_accounted[number] = 1
            self.accounted += 1

    # -- the end
    def misplaced(self, sources: Mapping[int, Place]) -> bool:
        """Whether a verdict names another record than the one that was acknowledged to the uploader."""
        return any(
            number in sources and (rest["source"]["partition"], rest["source"]["offset"]) != sources[number]  # type: ignore[index]
            for number, entries in self.verdicts.items()
            for _, _, rest in entries
        )

    def places(self, settings: KafkaSettings) -> dict[int, set[Place]]:
        """By number where its record stands in the upload topic, by reading it: a producer may write a batch twice."""
        found: dict[int, set[Place]] = defaultdict(set)
        consumer = Consumer(
            {
                "bootstrap.servers": ",".join(settings.bootstrap_servers),
                "group.id": f"places-{settings.group_id}",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        topic = settings.upload_topics[0]
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        while messages := consumer.consume(2_000, 5.0):
            for message in messages:
                if message.error() is None and message.key() in self._by_key:
                    found[self._by_key[message.key()]].add((message.partition(), message.offset()))
        consumer.close()
        return found

    def balance(
        self, sources: Mapping[int, Collection[Place]], disturbances: list[Disturbance], *, exactly_once: bool = False
    ) -> Balance:
        """`sources`: by number where the uploader's record stands; in two places where its producer wrote it twice."""
        found = Balance(len(self._plans), problems=list(dict.fromkeys(self.wrong)))
        found.verdicts = sum(map(len, self.verdicts.values()))
        found.letters = sum(map(len, self.letters.values()))
        for number, planned in enumerate(self._plans):
            if not self._is_accounted[number]:
                found.lost.append(planned.event_id or planned.key.decode())
            self._check_event(found, number, planned, sources.get(number, ()), disturbances)
        if found.lost:
            found.problems.append(f"{len(found.lost)} events lost, such as {found.lost[:5]}")
        if found.unexplained:
            found.problems.append(f"{len(found.unexplained)} duplicates without a cause, such as {found.unexplained[:5]}")
        if exactly_once and (found.duplicates or found.duplicate_letters):
            found.problems.append(f"{found.duplicates} verdicts and {found.duplicate_letters} dead letters twice, read committed")
        return found

    def _check_event(
        self,
        found: Balance,
        number: int,
        planned: Planned,
        places: Collection[Place],
        disturbances: list[Disturbance],
    ) -> None:
        by_id: dict[str, list[float]] = defaultdict(list)
        for verdict_id, stamp, rest in self.verdicts.get(number, ()):
            by_id[verdict_id].append(stamp)
            reason = rest["reason"]
            place = rest["source"]
            if places and (place["partition"], place["offset"]) not in places:  # type: ignore[index]
                found.problems.append(f"{planned.event_id}: its verdict names {place} instead of {sorted(places)}")
            if planned.code is None and reason is not None:
                self._check_failure(found, planned, str(reason), stamp, disturbances)
        if (
            planned.code is None
            and self.letters.get(number)
            and all(r["reason"] is None for _, _, r in self.verdicts.get(number, ()))
        ):
            found.problems.append(f"{planned.event_id}: a dead letter, and no verdict that tells of a failure")
        letters = self.letters.get(number, [])
        for code, _ in letters:
            if planned.code is not None and code != planned.code:
                found.problems.append(f"record {number}: a dead letter for {code} instead of {planned.code}")
        found.duplicates += sum(len(stamps) - 1 for stamps in by_id.values())
        found.duplicate_letters += max(0, len(letters) - 1)
        before_s = RETRIED_S if planned.kind == "url" else 0.0
        for stamps in [*by_id.values(), [stamp for _, stamp in letters]]:
            stamps.sort()
            for first, second in itertools.pairwise(stamps):
                found.repeats.append((first, second, min(places)[0] if places else -1))
                if not any(one.touches(first - before_s, second) for one in disturbances):
                    found.unexplained.append(planned.event_id or planned.key.decode())

    def _check_failure(
        self, found: Balance, planned: Planned, reason: str, stamp: float, disturbances: list[Disturbance]
    ) -> None:
        """A good event may fail for a decoder or a host that was hurt just then, and for nothing else."""
        if reason in HOST_CODES and planned.kind == "url":
            found.host_failed += 1
        elif reason in DECODER_CODES and any(
            one.kind in ("decoder_kill", "decoder_stop", "worker_stop") and one.touches(stamp, stamp) for one in disturbances
        ):
            found.blamed += 1
        else:
            found.problems.append(f"{planned.event_id}: {reason} for a good image")


class Reader:
    """Reads the topics into the books."""

    def __init__(self, settings: KafkaSettings, books: Books) -> None:
        self._verdict_topic = settings.verdict_topic
        self._books = books
        self._consumer = Consumer(
            {
                "bootstrap.servers": ",".join(settings.bootstrap_servers),
                "group.id": f"books-{settings.group_id}",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": 4_000_000,
                "queued.max.messages.kbytes": 65_536,
                "log_level": 0,
            }
        )
        topics = (settings.verdict_topic, settings.dead_letter_topic)
        self._consumer.assign([TopicPartition(topic, number, 0) for topic in topics for number in self._partitions(topic)])

    def look(self, wait_s: float = 0.2) -> int:
        """Take what has come since the last look; how many records."""
        messages = self._consumer.consume(2_000, wait_s)
        for message in messages:
            if message.error() is not None:
                continue  # a broker is away: librdkafka goes on by itself
            stamp = message.timestamp()[1] / 1000
            if message.topic() == self._verdict_topic:
                self._books.verdict(message.value(), stamp)
            else:
                self._books.letter(message.key(), message.value(), dict(message.headers() or []), stamp)
        self._books.samples.append((time.monotonic(), self._books.accounted))
        return len(messages)

    def close(self) -> None:
        self._consumer.close()

    def _partitions(self, topic: str) -> list[int]:
        return list(self._consumer.list_topics(topic, timeout=30).topics[topic].partitions)


class Offsets:
    """What the group has committed, against the records that stand in the topics."""

    def __init__(self, settings: KafkaSettings, uploads: Callable[[], Mapping[int, tuple[int, int]]]) -> None:
        """`uploads`: partition and offset of every record of the upload topic."""
        self._settings = settings
        self._uploads = uploads
        self._retry_ends: dict[int, int] = {}
        common = {"bootstrap.servers": ",".join(settings.bootstrap_servers), "enable.auto.commit": False, "log_level": 0}
        self._group = Consumer(common | {"group.id": settings.group_id})
        # Ends are found by reading: those the embedded broker tells lag behind by a batch.
        self._retries = Consumer(common | {"group.id": f"offsets-{settings.group_id}", "fetch.wait.max.ms": 100})
        topic = self._retries.list_topics(settings.retry_topic, timeout=30).topics[settings.retry_topic]
        self._retries.assign([TopicPartition(settings.retry_topic, number, 0) for number in topic.partitions])

    def behind(self) -> dict[str, int]:
        """By topic/partition how many offsets the commit is off behind the last record; negative: beyond the log's end.

        Raises:
            KafkaException: a broker is away.
        """
        upload_ends: dict[int, int] = {}
        for partition, offset in self._uploads().values():
            upload_ends[partition] = max(upload_ends.get(partition, 0), offset + 1)
        while messages := self._retries.consume(1_000, 1.0):
            for message in messages:
                if message.error() is None:
                    self._retry_ends[message.partition()] = message.offset() + 1
        found = {}
        for topic, ends in ((self._settings.upload_topics[0], upload_ends), (self._settings.retry_topic, self._retry_ends)):
            for one in self._group.committed([TopicPartition(topic, number) for number in ends], timeout=10):
                end = ends[one.partition]
                _, high = self._group.get_watermark_offsets(TopicPartition(topic, one.partition), timeout=10)
                if not end <= max(0, one.offset) <= max(end, high):  # transaction markers lie between the two
                    found[f"{topic}/{one.partition}"] = end - max(0, one.offset)
        return found

    def settled(self, seconds: float) -> dict[str, int]:
        """`behind` once it is empty, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self.behind()
            except KafkaException as error:
                found = {str(error): 0}
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def close(self) -> None:
        self._group.close()
        self._retries.close()
