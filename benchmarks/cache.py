"""The score cache by itself, on a real server: what a look-up and a write cost an event, by how many share a round trip; and with
no server at all, what it costs to find that out and to go on without."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from pydantic import SecretStr

from benchmarks import record
from engine.heads import HEADS
from worker.embedded import EmbeddedCache, free_port
from worker.items import Scores
from worker.metrics import Metrics
from worker.settings import CacheSettings
from worker.stages.cache import CachedScore, ScoreCache

ROUNDS = (1, 8, 32, 128)
"""Events that share a round trip."""
KNOWN = 4096
SCOPE = "benchmark"


def entry(number: int) -> CachedScore:
    """Scores of one of the known images."""
    scores = Scores(dict.fromkeys(HEADS, 0.5), (0.5,))
    return CachedScore(SCOPE, digest(number), scores, 512, 512, "JPEG", 1, {})


def digest(number: int) -> str:
    """Of image `number`."""
    return hashlib.sha256(number.to_bytes(8, "big")).hexdigest()


def timed(call: Callable[[int], object], at_once: int, seconds: float) -> dict[str, float]:
    """Microseconds of the clock and of this process's CPU an event; `call` gets the number of its first event."""
    call(0)
    done, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        call(done)
        done += at_once
    took, used = time.perf_counter() - began, time.process_time() - used
    return {"us_an_event": took / done * 1e6, "cpu_us_an_event": used / done * 1e6, "events_per_s": done / took}


def main(seconds: float) -> dict[str, Any]:
    """Measure and write the result file."""
    figures: dict[str, Any] = {"hit": {}, "miss": {}}
    with EmbeddedCache() as server:
        cache = ScoreCache(CacheSettings(url=SecretStr(server.url), timeout_ms=1000), Metrics())
        for first in range(0, KNOWN, 256):
            cache.put_many(map(entry, range(first, first + 256)))
        last = digest(KNOWN - 1)
        while last not in cache.get_many(SCOPE, [last]):  # writes go in the background
            time.sleep(0.01)
        for at_once in ROUNDS:

            def hits(first: int, count: int = at_once) -> None:
                wanted = [digest((first + n) % KNOWN) for n in range(count)]
                if len(cache.get_many(SCOPE, wanted)) != count:
                    raise SystemExit("a score that was written is not there")

            def misses(first: int, count: int = at_once) -> None:
                cache.get_many(SCOPE, [digest(KNOWN + first + n) for n in range(count)])

            figures["hit"][f"{at_once} at once"] = timed(hits, at_once, seconds)
            figures["miss"][f"{at_once} at once"] = timed(misses, at_once, seconds)
        cache.close()
    dead = ScoreCache(CacheSettings(url=SecretStr(f"redis://127.0.0.1:{free_port()}/0")), Metrics())
    began = time.perf_counter()
    while dead.state == "closed":
        dead.get_many(SCOPE, [digest(0)])
    figures["no server"] = {"ms_until_left_alone": (time.perf_counter() - began) * 1e3}
    figures["no server"] |= timed(lambda _: dead.get_many(SCOPE, [digest(0)]), 1, min(seconds, 1.0))
    dead.close()
    record.write("cache", figures)
    return figures
