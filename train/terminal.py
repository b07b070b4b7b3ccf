"""What the commands share in speaking with a terminal: argument types, lines on stderr, counters."""

from __future__ import annotations

import sys
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `least`."""
    import argparse

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def counter(what: str, every: int = 500) -> Callable[[int], None]:
    """Says how far a long loop is, about every so many."""

    def show(count: int) -> None:
        if count % every < 32:
            say(f"{what}: {count}")

    return show
