"""The dead-letter topic, read back: letters with their places, and which of them a user means."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from worker.envelopes import DeadLetter, open_dead
from worker.settings import KafkaSettings
from worker.topic_reader import read_to_end


@dataclass(frozen=True, slots=True)
class FoundLetter:
    """A dead letter and where it lies in the dead-letter topic."""

    partition: int
    offset: int
    timestamp: float
    letter: DeadLetter

    @property
    def position(self) -> str:
        """PARTITION/OFFSET in the dead-letter topic."""
        return f"{self.partition}/{self.offset}"

    @property
    def origin(self) -> str:
        """TOPIC/PARTITION/OFFSET of the upload."""
        return f"{self.letter.topic}/{self.letter.partition}/{self.letter.offset}"


@dataclass(frozen=True, slots=True)
class LetterPosition:
    """Which letter: in the dead-letter topic (`topic` None), or by its upload."""

    topic: str | None
    partition: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> LetterPosition:
        """PARTITION/OFFSET or TOPIC/PARTITION/OFFSET. Raises ValueError."""
        front, _, offset = text.rpartition("/")
        topic, _, partition = front.rpartition("/")
        if not (partition.isdigit() and offset.isdigit()):
            raise ValueError(f"{text}: neither PARTITION/OFFSET nor TOPIC/PARTITION/OFFSET")
        return cls(topic or None, int(partition), int(offset))

    def __str__(self) -> str:
        return "/".join(str(part) for part in (self.topic, self.partition, self.offset) if part is not None)

    def matches(self, found: FoundLetter, dead_letter_topic: str) -> bool:
        """Whether this letter is meant."""
        if self.topic is None or self.topic == dead_letter_topic:
            return (found.partition, found.offset) == (self.partition, self.offset)
        letter = found.letter
        return (letter.topic, letter.partition, letter.offset) == (self.topic, self.partition, self.offset)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which letters; what is empty or None lets everything pass."""

    codes: Collection[str] = ()
    topic: str | None = None
    since: float | None = None
    """POSIX seconds: when the letter was written."""
    limit: int | None = None


def find_letters(settings: KafkaSettings, filters: Filters) -> Iterator[FoundLetter]:
    """Dead letters of the topic that pass. What is none is counted on standard error."""
    strangers = count = 0
    for record in read_to_end(settings, settings.dead_letter_topic, filters.since):
        letter = open_dead(record.key, record.value, tuple(record.headers))
        if letter is None:
            strangers += 1
            continue
        if filters.since is not None and record.timestamp < filters.since * 1000:
            continue
        if (filters.codes and letter.code not in filters.codes) or filters.topic not in (None, letter.topic):
            continue
        yield FoundLetter(record.partition, record.offset, record.timestamp / 1000, letter)
        count += 1
        if count == filters.limit:
            break
    if strangers:
        print(f"worker dead: {strangers} records of {settings.dead_letter_topic} are no dead letters", file=sys.stderr)
