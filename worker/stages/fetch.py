"""The bytes of an image, by the scheme of its URL, within limits and with the digest checked.

One attempt a call; trying again in place or through the retry topic is the pipeline's.
"""

from __future__ import annotations

import hashlib

import httpcore

from worker.clock import Clock, Deadline
from worker.errors import Code, ItemError
from worker.image_room import Hold, unbounded
from worker.items import Event, Fetched, Item
from worker.settings import FetchSettings
from worker.stages.fetch_buckets import BucketSource
from worker.stages.fetch_files import FileSource
from worker.stages.fetch_hosts import HostGate
from worker.stages.fetch_http import HttpSource
from worker.stages.fetch_network import CheckedNetwork, Lookup, Resolver, system_lookup
from worker.stages.fetch_urls import denied, split_scheme

MAX_WAIT_FOR_HOST_S = 2.0


class Fetcher:
    """Fetches images; one for all fetch threads."""

    def __init__(
        self,
        settings: FetchSettings,
        clock: Clock,
        *,
        lookup: Lookup = system_lookup,
        network: httpcore.NetworkBackend | None = None,
    ) -> None:
        """`lookup` resolves names and `network` opens connections to judged addresses: the seams of the tests.

        Raises:
            ConfigurationError: FETCH__ALLOWED_HOSTS holds what is no host name.
        """
        self._settings = settings
        self._clock = clock
        gate = HostGate(
            limit=settings.concurrency_per_host or max(1, (settings.concurrency + 1) // 2),
            wait_s=min(MAX_WAIT_FOR_HOST_S, settings.timeout_s / 4),
            failures=settings.breaker_failures,
            reset_s=settings.breaker_reset_s,
            clock=clock,
        )
        self._resolver = Resolver(threads=settings.concurrency, lookup=lookup)
        checked = CheckedNetwork(self._resolver, allow_private=settings.allow_private_addresses, inner=network)
        self._http = HttpSource(settings, clock, gate, checked)
        self._buckets = BucketSource(settings, gate)
        self._files = FileSource(settings.file_roots, settings.max_bytes)

    def fetch(self, item: Item, hold: Hold = unbounded) -> Fetched:
        """Get the event's image in one attempt of at most FETCH__TIMEOUT_S. Thread-safe.

        `hold` is told the image's size in bytes, or the largest allowed where nobody says it, before its bytes are read; what
        it raises ends the attempt and is passed on.

        Raises:
            ItemError: fetch.denied, fetch.not_found, fetch.too_large, fetch.hash_mismatch.
            TransientItemError: fetch.timeout, fetch.unavailable, with the host's hint or `attempted=False` where it has one.
        """
        data = self._read(item.event, hold)
        digest = hashlib.sha256(data).hexdigest()
        expected = item.event.sha256
        if expected is not None and expected.strip().lower() != digest:
            raise ItemError(Code.FETCH_HASH_MISMATCH, f"the image's SHA-256 is {digest}, the event expects another")
        return Fetched(item=item, data=data, sha256=digest)

    def close(self) -> None:
        """Close connections and end the threads."""
        self._http.close()
        self._buckets.close()
        self._resolver.close()

    def _read(self, event: Event, hold: Hold) -> bytes:
        if event.inline is not None:
            if len(event.inline) > self._settings.max_bytes:
                raise ItemError(Code.FETCH_TOO_LARGE, f"the image is larger than {self._settings.max_bytes} bytes")
            return event.inline
        if event.url is None:
            raise denied("the event has no image")
        deadline = Deadline(self._settings.timeout_s, self._clock)
        scheme, _ = split_scheme(event.url)
        match scheme:
            case "http" | "https":
                return self._http.read(event.url, deadline, hold)
            case "s3" | "gs":
                return self._buckets.read(event.url, deadline, hold)
            case "file":
                return self._files.read(event.url, deadline, hold)
        raise denied(f"scheme {scheme} is not allowed")
