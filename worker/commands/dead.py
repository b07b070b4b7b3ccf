"""`worker dead`: looks into the dead-letter topic and publishes records again."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from worker.contracts import rfc3339
from worker.dead_letters import Filters, FoundLetter, LetterPosition, find_letters
from worker.envelopes import DeadLetter
from worker.errors import ConfigurationError
from worker.kafka_clients import describe, open_producer
from worker.log import mask_urls
from worker.settings import KafkaSettings, Settings

PREVIEW_CHARS = 500
MAX_WAITING = 200

NOTE = """\
Replayed events keep their ids, and so their verdicts keep theirs (verdict_id) as long as the model is the same: readers that
drop what they have seen by verdict_id see nothing twice. Replaying does not take a letter out of the topic: it can be done again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three verbs and their options."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="a line for each dead letter, and how many of each code")
    _add_filters(listing)
    listing.add_argument("--json", action="store_true", help="a line of JSON each")
    show = verbs.add_parser("show", help="headers of one dead letter, and what its value is")
    show.add_argument("position", metavar="POSITION", type=_position, help="as for replay")
    show.add_argument("--save", type=Path, metavar="FILE", help="write the value to a file")
    replay = verbs.add_parser("replay", help="publish the original records again, to the topics they came from", epilog=NOTE)
    replay.add_argument(
        "positions",
        nargs="*",
        type=_position,
        metavar="POSITION",
        help="PARTITION/OFFSET in the dead-letter topic, or TOPIC/PARTITION/OFFSET of the upload",
    )
    _add_filters(replay)
    replay.add_argument("--all", action="store_true", help="everything")
    replay.add_argument("--to", metavar="TOPIC", help="another topic than the one they came from")
    replay.add_argument("--dry-run", action="store_true", help="only say what would be done")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """0 if done; 1 if nothing was found, or a record could not be published."""
    verb = {"list": _list, "show": _show, "replay": _replay}[arguments.verb]
    return verb(arguments, settings.kafka)


def _list(arguments: argparse.Namespace, settings: KafkaSettings) -> int:
    codes: Counter[str] = Counter()
    for found in find_letters(settings, _filters(arguments)):
        codes[found.letter.code] += 1
        print(_as_json(found) if arguments.json else _as_row(found), flush=True)
    print(f"{sum(codes.values())} dead letters" + (f": {_summary(codes)}" if codes else ""), file=sys.stderr)
    return 0


def _show(arguments: argparse.Namespace, settings: KafkaSettings) -> int:
    for found in find_letters(settings, Filters()):
        if arguments.position.matches(found, settings.dead_letter_topic):
            _print_letter(found)
            if arguments.save is not None:
                _save(found.letter.value or b"", arguments.save)
            return 0
    print(f"worker dead: no dead letter at {arguments.position}", file=sys.stderr)
    return 1


def _replay(arguments: argparse.Namespace, settings: KafkaSettings) -> int:
    chosen = arguments.positions or arguments.code or arguments.topic or arguments.since is not None
    if bool(chosen) == arguments.all:
        raise ConfigurationError("say what to replay: positions, --code, --topic, --since, or --all alone")
    producer = None if arguments.dry_run else _open_producer(settings)
    replay = _Replay(settings, producer, arguments.to)
    for found in find_letters(settings, _filters(arguments)):
        if not arguments.positions or any(one.matches(found, settings.dead_letter_topic) for one in arguments.positions):
            replay.publish(found)
    replay.finish()
    return replay.report(dry_run=arguments.dry_run)


def _open_producer(settings: KafkaSettings) -> Any:
    # One record that the broker refuses must not end the producer for those behind it (see stages/publish.py).
    patience_ms = 2 * settings.request_timeout_ms + 1_000
    return open_producer(settings, delivery_timeout_ms=patience_ms, enable_idempotence=False)


class _Replay:
    """Publishes originals again, a bounded number at a time."""

    def __init__(self, settings: KafkaSettings, producer: Any, to: str | None) -> None:
        self._settings = settings
        self._producer = producer
        self._to = to
        self._waiting: list[tuple[FoundLetter, Any]] = []
        self._codes: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._failed = 0

    def publish(self, found: FoundLetter) -> None:
        """Send one, or count why not."""
        letter = found.letter
        topic = self._to or letter.topic
        if letter.omitted:
            self._left["its value was too large to be kept"] += 1
        elif letter.value is None and letter.key is None:
            self._left["it has neither key nor value"] += 1
        elif topic not in self._settings.upload_topics and self._to is None:
            # Whoever can write to the dead-letter topic must not so write to any other.
            self._left[f"{topic} is no upload topic of this worker (--to says where to)"] += 1
        else:
            self._codes[letter.code] += 1
            if self._producer is not None:
                headers = [(name, value or b"") for name, value in letter.headers]
                self._send(found, topic, headers)

    def finish(self) -> None:
        """Wait for the broker."""
        self._settle()
        if self._producer is not None:
            self._producer.close()

    def report(self, *, dry_run: bool) -> int:
        """Say what was done."""
        total = sum(self._codes.values()) - self._failed
        print(f"{'would replay' if dry_run else 'replayed'} {total}" + (f" ({_summary(self._codes)})" if self._codes else ""))
        for reason, count in self._left.items():
            print(f"left {count}: {reason}")
        if self._failed:
            print(f"worker dead: {self._failed} could not be published", file=sys.stderr)
        return 1 if self._failed or not self._codes else 0

    def _send(self, found: FoundLetter, topic: str, headers: list[tuple[str, bytes]]) -> None:
        from kafka.errors import KafkaError

        try:
            future = self._producer.send(topic, value=found.letter.value, key=found.letter.key, headers=headers)
        except KafkaError as error:
            self._fail(found, error)
            return
        self._waiting.append((found, future))
        if len(self._waiting) >= MAX_WAITING:
            self._settle()

    def _settle(self) -> None:
        from kafka.errors import KafkaError

        for found, future in self._waiting:
            try:
                future.get()
            except KafkaError as error:
                self._fail(found, error)
        self._waiting.clear()

    def _fail(self, found: FoundLetter, error: Exception) -> None:
        self._failed += 1
        print(f"worker dead: {found.position}: {describe(error)}", file=sys.stderr)


def _filters(arguments: argparse.Namespace) -> Filters:
    return Filters(tuple(arguments.code or ()), arguments.topic, arguments.since, arguments.limit)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--code", action="append", metavar="CODE", help="only this failure code; may be given again")
    parser.add_argument("--topic", metavar="TOPIC", help="only what came from this topic")
    parser.add_argument("--since", type=_since, metavar="WHEN", help="only later ones: 90s, 15m, 6h, 2d ago, or an RFC 3339 time")
    parser.add_argument("--limit", type=_limit, metavar="N", help="at most N")


def _summary(codes: Counter[str]) -> str:
    return ", ".join(f"{code} {count}" for code, count in sorted(codes.items(), key=lambda item: (-item[1], item[0])))


def _as_row(found: FoundLetter) -> str:
    letter = found.letter
    size = letter.omitted.get("value", len(letter.value or b""))
    row = (
        f"{found.position:<12}{rfc3339(found.timestamp)[:19]:<20}{letter.code:<24}{found.origin:<30}"
        f"{letter.attempt:>3}  {size:>10} B  {_key(letter):<38}{letter.message}"
    )
    return _printable(row).rstrip()


def _as_json(found: FoundLetter) -> str:
    letter = found.letter
    return json.dumps(
        {
            "partition": found.partition,
            "offset": found.offset,
            "timestamp": rfc3339(found.timestamp),
            "code": letter.code,
            "message": letter.message,
            "source": {"topic": letter.topic, "partition": letter.partition, "offset": letter.offset},
            "attempt": letter.attempt,
            "first_seen": letter.first_seen,
            "key": _key(letter),
            "value_bytes": letter.omitted.get("value", len(letter.value or b"")),
            "omitted": sorted(letter.omitted),
        },
        ensure_ascii=False,
    )


def _print_letter(found: FoundLetter) -> None:
    letter = found.letter
    value = letter.value or b""
    lines = {
        "position": found.position,
        "published": rfc3339(found.timestamp),
        "code": letter.code,
        "message": letter.message,
        "source": found.origin,
        "attempt": str(letter.attempt),
        "first seen": letter.first_seen,
        "key": _key(letter),
        "left out": ", ".join(f"{name} ({size} bytes)" for name, size in letter.omitted.items()) or "nothing",
        "value": "null" if letter.value is None else f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()}",
    }
    for name, text in lines.items():
        print(_printable(f"{name:<12}{text}"))
    for name, content in letter.headers:
        print(
            _printable(f"header      {name}: {mask_urls((content or b'').decode('utf-8', 'backslashreplace'))[:PREVIEW_CHARS]}")
        )
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return
    if text:
        print(_printable(mask_urls(text)[:PREVIEW_CHARS]))


def _save(value: bytes, path: Path) -> None:
    try:
        path.write_bytes(value)
    except OSError as error:
        raise ConfigurationError(f"--save {path}: {error.strerror}") from error


def _key(letter: DeadLetter) -> str:
    return "" if letter.key is None else letter.key[:200].decode("utf-8", "backslashreplace")


def _printable(text: str) -> str:
    """Keys, headers and values are the uploaders': none of their characters may steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _position(text: str) -> LetterPosition:
    try:
        return LetterPosition.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _since(text: str) -> float:
    """POSIX seconds."""
    ago = re.fullmatch(r"(\d+)([smhd])", text)
    if ago:
        return time.time() - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: neither like 15m, 6h or 2d nor an RFC 3339 time") from error
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text}: the offset from UTC is missing, such as Z")
    return moment.timestamp()


def _limit(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
