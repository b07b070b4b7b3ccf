"""`worker check`: the effective settings, secrets masked, and a probe of everything the worker leans on."""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import SecretStr

from worker import log, probes
from worker.log import mask_credentials, mask_urls
from worker.probes import Finding
from worker.settings import Settings, environment_name

ENGINE_TIMEOUT_S = 900.0
"""The first start with a compiling backend takes minutes."""

Probe = Callable[[], Iterable[Finding]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to wait, and for what."""
    parser.add_argument("--timeout", metavar="S", type=_seconds, default=10.0, help="seconds for broker and cache each (10)")
    parser.add_argument("--no-engine", action="store_true", help="leave out policy, bundle and engine")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print settings and findings; 0 when there is no problem, 2 when there is one."""
    log.silence()  # what libraries have to say about a failure stands in the findings, in one line
    for line in described(settings):
        print(line)
    print(flush=True)
    problems = 0
    for finding in findings(settings, arguments.timeout, engine=not arguments.no_engine):
        print(f"{finding.level:8} {finding.subject:8} {' '.join(finding.message.split())}", flush=True)
        problems += finding.level == probes.PROBLEM
    print(f"\n{problems} problem{'s' if problems != 1 else ''}" if problems else "\nall is well")
    return 2 if problems else 0


def described(settings: Settings) -> Iterator[str]:
    """One line a setting: its environment variable, its value, and whether it is the default."""
    for group_name, group_field in type(settings).model_fields.items():
        group = getattr(settings, group_name)
        defaults = group_field.get_default()
        for name in type(group).model_fields:
            value = getattr(group, name)
            mark = "" if value != getattr(defaults, name) else "  (default)"
            yield f"{environment_name(group_name, name)}={_shown(value)}{mark}"


def findings(settings: Settings, timeout_s: float, *, engine: bool) -> Iterator[Finding]:
    """Everything that was found, in a fixed order, in bounded time even where something hangs."""
    running = [
        _Running("broker", lambda: probes.kafka(settings.kafka, timeout_s), 3 * timeout_s + 5),
        _Running("cache", lambda: probes.cache(settings.cache, timeout_s), 3 * timeout_s + 5),
        _Running("files", lambda: probes.files(settings.fetch), timeout_s),
    ]
    if engine:
        running.append(_Running("engine", lambda: probes.model(settings), ENGINE_TIMEOUT_S))
    for probe in running:
        yield from probe.findings()


class _Running:
    """A probe in a thread of its own: what hangs in name resolution or a driver does not hang the report."""

    def __init__(self, subject: str, probe: Probe, timeout_s: float) -> None:
        self._subject = subject
        self._probe = probe
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._found: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"check-{subject}", daemon=True).start()

    def findings(self) -> Iterator[Finding]:
        """What it finds, as it comes."""
        while True:
            try:
                finding = self._found.get(timeout=max(0.01, self._deadline - time.monotonic()))
            except queue.Empty:
                yield Finding(probes.PROBLEM, self._subject, f"no answer in {self._timeout_s:.0f} s")
                return
            if finding is None:
                return
            yield finding

    def _run(self) -> None:
        try:
            for finding in self._probe():
                self._found.put(finding)
        except Exception as error:  # noqa: BLE001  the report's boundary: whatever a probe stumbles over is its finding
            self._found.put(Finding(probes.PROBLEM, self._subject, mask_urls(f"{type(error).__name__}: {error}")))
        finally:
            self._found.put(None)


def _shown(value: Any) -> str:
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return mask_credentials(secret) if "://" in secret else "********"
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 3600")
    return seconds
