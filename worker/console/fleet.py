"""What only the workers know (lag, batch sizes, events in flight), from their /metrics pages.

A name that stands for several addresses (a headless Service) is several workers; each of them is asked.
"""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections import deque
from typing import Any
from urllib.parse import SplitResult, urlsplit

import structlog
from prometheus_client.parser import text_string_to_metric_families

from worker.errors import ConfigurationError
from worker.settings import environment_name

log = structlog.get_logger(__name__)

INTERVAL_S = 2.0
TIMEOUT_S = 2.0
MAX_PAGE_BYTES = 4 * 2**20
KEPT = 30
"""Readings kept: batch sizes are those of the last minute."""

_GAUGES = {
    "code_worker_consumer_lag": "lag",
    "code_worker_in_flight_events": "in_flight",
    "code_worker_paused_partitions": "paused_partitions",
}
_BATCHES = "code_worker_batch_size_bucket"
_REASONS = "code_worker_batches_total"


class Fleet:
    """Reads the pages in a thread of its own every two seconds; without addresses it does nothing."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        """
        Raises:
            ConfigurationError: an address is not http or https.
        """
        wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ConfigurationError(f"{environment_name('console', 'metrics_urls')}: must be http or https addresses")
        self._urls = urls
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="console-fleet", daemon=True)
        self._readings: deque[dict[str, float]] = deque(maxlen=KEPT)
        self._summary: dict[str, Any] | None = None

    def start(self) -> None:
        """Begin to read."""
        if self._urls:
            self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stopping.set()

    def summary(self) -> dict[str, Any] | None:
        """Sums over the workers; None where no worker is named or none answers yet."""
        return self._summary

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S if self._summary else 0.5):
            workers = [address for url in self._urls for address in _addresses(url)]
            pages = [page for page in map(_page, workers) if page is not None]
            self._readings.append(_reading(pages))
            self._summary = self._summarised(len(workers), len(pages))

    def _summarised(self, workers: int, answering: int) -> dict[str, Any]:
        latest, oldest = self._readings[-1], self._readings[0]
        grown = {name: max(0.0, value - oldest.get(name, 0.0)) for name, value in latest.items()}
        sizes: list[tuple[float, int]] = []
        below = 0.0
        bounds = (name for name in latest if name.startswith(_BATCHES))
        for bound, name in sorted((float(name.removeprefix(_BATCHES + " ")), name) for name in bounds):
            sizes.append((bound, round(grown[name] - below)))
            below = grown[name]
        reasons = {name.removeprefix(_REASONS + " "): round(grown[name]) for name in latest if name.startswith(_REASONS)}
        return {
            "workers": workers,
            "answering": answering,
            "batch_sizes": [{"most": None if bound == float("inf") else int(bound), "batches": count} for bound, count in sizes],
            "batch_reasons": reasons,
            **{short: round(latest.get(short, 0)) for short in _GAUGES.values()},
        }


def _addresses(url: str) -> list[str]:
    """The pages behind an address: where its name has several IP addresses, one each. Of a machine that has addresses of both
    families those of one are taken; https is left alone, since certificates are for names."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname in (None, "localhost"):
        return [url]
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        log.debug("console.metrics_unknown", error=str(error))
        return [url]
    families = {family: sorted({str(address[0]) for kind, *_, address in found if kind == family}) for family, *_ in found}
    hosts = families.get(socket.AF_INET) or families.get(socket.AF_INET6) or []
    return [_at(parts, host) for host in hosts] if len(hosts) > 1 else [url]


def _at(parts: SplitResult, host: str) -> str:
    literal = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=f"{literal}:{parts.port or 80}").geturl()


def _page(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read(MAX_PAGE_BYTES).decode("utf-8", "replace"))
    except (OSError, ValueError) as error:
        log.debug("console.metrics_unreachable", error=str(error))
        return None


def _reading(pages: list[str]) -> dict[str, float]:
    """Sums of the samples of interest over all workers."""
    sums: dict[str, float] = {}
    for page in pages:
        try:
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    if sample.name in _GAUGES:
                        name = _GAUGES[sample.name]
                    elif sample.name == _BATCHES:
                        name = f"{_BATCHES} {sample.labels['le']}"
                    elif sample.name == _REASONS:
                        name = f"{_REASONS} {sample.labels['reason']}"
                    else:
                        continue
                    sums[name] = sums.get(name, 0.0) + sample.value
        except (ValueError, KeyError) as error:
            log.debug("console.metrics_unreadable", error=str(error))
    return sums
