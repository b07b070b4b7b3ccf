"""`worker watch`: prints verdicts as they arrive. Joins no group and commits nothing: it takes no event from anybody."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from worker.clock import Deadline
from worker.settings import Settings
from worker.topic_reader import follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of watch."""
    parser.add_argument("--json", action="store_true", help="a line of JSON for each verdict, as it was published")
    parser.add_argument("--from-beginning", action="store_true", help="begin with the oldest verdict of the topic")
    parser.add_argument("--count", type=_positive, metavar="N", help="end after N verdicts")
    parser.add_argument("--timeout", type=float, metavar="S", help="end after S seconds: 1 if --count verdicts have not come")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print until --count, --timeout or Ctrl-C, which is the normal end without --count: 0, else 130."""
    printed = 0
    deadline = Deadline(arguments.timeout if arguments.timeout is not None else float("inf"))
    try:
        for record in follow(settings.kafka, settings.kafka.verdict_topic, arguments.from_beginning):
            if record is not None:
                printed += _print(record, as_json=arguments.json, first=printed == 0)
            if arguments.count is not None and printed >= arguments.count:
                return 0
            if deadline.expired():
                return 0 if arguments.count is None else 1
    except KeyboardInterrupt:
        return 0 if arguments.count is None else 130
    return 0


def _print(record: Any, *, as_json: bool, first: bool) -> bool:
    """Print one verdict; what is not one is told on standard error and does not count."""
    try:
        verdict = json.loads(record.value)
        line = json.dumps(verdict, ensure_ascii=False, separators=(",", ":")) if as_json else _row(verdict)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        where = f"{record.topic}/{record.partition}/{record.offset}"
        print(f"worker watch: {where} is not a verdict: {type(error).__name__}", file=sys.stderr)
        return False
    if first and not as_json:
        print(_columns("processed", "event", "label", "score", "action", "reason", "cache", "ms"))
    print(line, flush=True)
    return True


def _row(verdict: dict[str, Any]) -> str:
    score, total = verdict["score"], verdict["timings_ms"]["total"]
    return _columns(
        str(verdict["processed_at"])[11:23],
        str(verdict["event_id"]),
        str(verdict["label"]),
        "-" if score is None else f"{score:.3f}",
        str(verdict["action"]),
        verdict["reason"] or "",
        str(verdict["cache"]),
        "-" if total is None else f"{total:.0f}",
    )


def _columns(processed: str, event: str, label: str, score: str, action: str, reason: str, cache: str, total: str) -> str:
    row = f"{processed:<13}{event:<38}{label:<14}{score:>6}  {action:<8}{reason:<24}{cache:<6}{total:>6}"
    # Ids are the uploaders': none of their characters may steer the terminal.
    return "".join(character if character.isprintable() else "?" for character in row).rstrip()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
