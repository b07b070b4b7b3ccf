"""Scores by digest in Redis: many in one round trip, milliseconds at most, and never an event's failure.

Whatever ails Redis (dead, slow, full, read-only, loading, wrong password, another protocol altogether) is a miss and a
metric. Three bounds hold: the socket's time-out; the time a caller waits, a small multiple of it, which also covers what no
socket time-out does (name resolution, TLS, an answer that drips); and the breaker, which leaves a failing Redis alone.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import structlog

from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, DependencyError
from worker.log import mask_credentials, mask_urls
from worker.metrics import Metrics
from worker.settings import CacheSettings
from worker.stages import breaker, cache_entry
from worker.stages.breaker import Breaker
from worker.stages.cache_entry import CachedScore

if TYPE_CHECKING:
    import redis

__all__ = ["CachedScore", "ScoreCache", "probe"]

log = structlog.get_logger(__name__)

KEY_PREFIX = "code-worker:score"
PATIENCE = 3
"""A caller waits this many socket time-outs at most."""
MAX_PENDING_WRITES = 16
"""Rounds of writes that wait behind a slow Redis; more are dropped: they only cost a later inference."""
WRITE_COMPLAINT_INTERVAL_S = 60.0


class ScoreCache:
    """The cache of one worker. All traffic goes through one thread of its own and one connection, in order."""

    def __init__(self, settings: CacheSettings, metrics: Metrics, clock: Clock | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock or SystemClock()
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_reset_s, self._clock)
        # A full or read-only server refuses writes and still answers reads: writes have a breaker of their own.
        self._write_breaker = Breaker(1, settings.breaker_reset_s, self._clock)
        self._patience_s = PATIENCE * settings.timeout_ms / 1000
        self._next_write_complaint = 0.0
        self._client: redis.Redis | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending_writes = threading.BoundedSemaphore(MAX_PENDING_WRITES)
        if settings.enabled:
            self._client = connect(settings)
            threading.Thread(target=self._serve, name="cache-io", daemon=True).start()

    @property
    def state(self) -> str:
        """disabled, closed (in use), open (left alone for now) or half_open (about to be tried again)."""
        return "disabled" if self._client is None else self._breaker.state

    def get_many(self, scope: str, digests: list[str]) -> dict[str, CachedScore]:
        """Cached scores by digest, in one round trip; what is missing, unreadable or not answered in time is not in it.

        Args:
            scope: what scores depend on beside the image.
            digests: SHA-256 of the images, hex; each counts once in `cache_requests_total`.
        """
        if not digests:
            return {}
        client = self._client
        if client is None or not self._breaker.allow():
            self._metrics.cache_requests.labels("bypass").inc(len(digests))
            return {}
        unique = list(dict.fromkeys(digests))
        keys = [key_of(scope, digest) for digest in unique]
        values = self._ask(lambda: client.mget(keys))
        if values is None or len(values) != len(keys):
            self._metrics.cache_requests.labels("error").inc(len(digests))
            return {}
        found = {}
        for digest, key, value in zip(unique, keys, values, strict=True):
            if isinstance(value, bytes) and (entry := _read(value, key, scope, digest)) is not None:
                found[digest] = entry
        hits = sum(digest in found for digest in digests)
        self._metrics.cache_requests.labels("hit").inc(hits)
        self._metrics.cache_requests.labels("miss").inc(len(digests) - hits)
        return found

    def put_many(self, entries: Iterable[CachedScore]) -> None:
        """Write scores in one pipelined round trip, in the background: returns at once, and before later reads are asked."""
        pairs = [pair for pair in map(_written, entries) if pair is not None]
        client = self._client
        if not pairs:
            return
        if client is None or self._breaker.state != breaker.CLOSED:
            self._metrics.cache_writes.labels("bypass").inc(len(pairs))
        elif not self._pending_writes.acquire(blocking=False):
            self._metrics.cache_writes.labels("dropped").inc(len(pairs))
        elif not self._write_breaker.allow():
            self._pending_writes.release()
            self._metrics.cache_writes.labels("bypass").inc(len(pairs))
        else:
            self._jobs.put(_Job(lambda: self._write(client, pairs)))

    def close(self) -> None:
        """End the thread once what stands before is done; does not wait for a Redis that does not answer."""
        if self._client is not None:
            self._jobs.put(None)

    # -- the thread that talks to Redis ------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
        if self._client is not None:
            self._client.close()

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Run a read in the thread; None when it failed or took too long. Reports to the breaker, once."""
        started = time.monotonic()
        job = _Job(call)
        self._jobs.put(job)
        answered = job.wait(self._patience_s)
        self._metrics.cache_seconds.observe(time.monotonic() - started)
        if answered and job.error is None:
            self._succeeded()
            return job.result
        self._failed(job.error if answered else TimeoutError(f"no answer in {self._patience_s * 1000:.0f} ms"))
        return None

    def _write(self, client: redis.Redis, pairs: list[tuple[bytes, bytes]]) -> None:
        """Runs in the thread."""
        from redis.exceptions import ResponseError

        try:
            with client.pipeline(transaction=False) as pipe:
                for key, value in pairs:
                    pipe.set(key, value, ex=self._settings.ttl_s)
                answers = pipe.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001  as in _Job.run: whatever it is, it must only cost speed
            self._write_breaker.failed()
            self._metrics.cache_writes.labels("error").inc(len(pairs))
            if not isinstance(error, ResponseError):
                self._failed(error)
            return
        finally:
            self._pending_writes.release()
        refused = [answer for answer in answers if answer is not True]
        self._metrics.cache_writes.labels("ok").inc(len(pairs) - len(refused))
        if not refused:
            self._write_breaker.succeeded()
            return
        self._metrics.cache_writes.labels("error").inc(len(refused))
        self._write_breaker.failed()
        self._complain(refused[0])

    # -- the breaker -------------------------------------------------------------------------------------------------

    def _succeeded(self) -> None:
        if self._breaker.succeeded():
            self._metrics.cache_breaker_open.set(0)
            log.info("cache.back")

    def _failed(self, error: Exception | None) -> None:
        if self._breaker.failed():
            self._metrics.cache_breaker_open.set(1)
            log.warning("cache.left_alone", error=describe(error), retry_in_s=self._settings.breaker_reset_s)

    def _complain(self, answer: object) -> None:
        now = self._clock.monotonic()
        if now >= self._next_write_complaint:
            self._next_write_complaint = now + WRITE_COMPLAINT_INTERVAL_S
            log.warning("cache.write_refused", error=describe(answer))


class _Job:
    """One call on its way through the thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._finished = threading.Event()
        self._abandoned = False
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Make the call, unless nobody waits for it any more."""
        if self._abandoned:
            return
        try:
            self.result = self._call()
        except Exception as error:  # noqa: BLE001
            # The boundary: beside RedisError and OSError, a peer that speaks another protocol makes redis-py raise
            # ValueError, IndexError and others while it parses. None of them may cost more than speed.
            self.error = error
        self._finished.set()

    def wait(self, seconds: float) -> bool:
        """Whether it ran in time; if not, it is dropped should it not have begun."""
        finished = self._finished.wait(seconds)
        self._abandoned = not finished
        return finished


def connect(settings: CacheSettings, timeout_s: float | None = None) -> redis.Redis:
    """A client that neither retries nor waits; connects at the first command.

    Raises:
        ConfigurationError: the URL is none of redis:// or rediss://. It is not repeated: it may hold a password.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    timeout_s = settings.timeout_ms / 1000 if timeout_s is None else timeout_s
    try:
        return redis.Redis.from_url(
            settings.url.get_secret_value(),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),  # the default sleeps between ten tries
            retry_on_timeout=False,
            protocol=2,  # spares a round trip at connect
            client_name="code-worker",
        )
    except (ValueError, TypeError) as error:
        raise ConfigurationError("WORKER_CACHE__URL: not a usable redis:// or rediss:// URL") from error


def probe(settings: CacheSettings, timeout_s: float) -> float:
    """Write, read and delete a key, for `worker check`; milliseconds of the slowest of the three.

    Raises:
        DependencyError: what went wrong, in one line without secrets.
        ConfigurationError: the URL is unusable.
    """
    client = connect(settings, timeout_s)
    where = mask_credentials(settings.url.get_secret_value())
    key = f"{KEY_PREFIX}:probe"
    try:
        client.ping()  # connects
        times = [time.monotonic()]
        client.set(key, b"1", ex=10)
        times.append(time.monotonic())
        answer = client.get(key)
        times.append(time.monotonic())
        client.delete(key)
        times.append(time.monotonic())
    except Exception as error:
        raise DependencyError(f"{where}: {describe(error)}") from error
    finally:
        client.close()
    if answer != b"1":
        raise DependencyError(f"{where}: a key written could not be read back")
    return max(after - before for before, after in itertools.pairwise(times)) * 1000


def describe(error: object) -> str:
    """One line about an error of Redis, without secrets."""
    return mask_urls(f"{type(error).__name__}: {error}").replace("\n", " ")[:300]


def key_of(scope: str, sha256: str) -> bytes:
    """Key in Redis: the prefix, the entry's version, the scope, the digest."""
    return b"%s:%s:%s:%s" % (KEY_PREFIX.encode(), cache_entry.VERSION, scope.encode(), sha256.encode())


def _written(entry: CachedScore) -> tuple[bytes, bytes] | None:
    key = key_of(entry.scope, entry.sha256)
    try:
        return key, cache_entry.encode(entry, key)
    except cache_entry.EntryError:
        return None  # such an image is inferred every time


def _read(value: bytes, key: bytes, scope: str, sha256: str) -> CachedScore | None:
    try:
        return cache_entry.decode(value, key, scope, sha256)
    except cache_entry.EntryError:
        return None  # foreign, damaged or of another version: a miss, overwritten soon
