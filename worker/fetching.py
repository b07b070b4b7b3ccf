"""One image from its host into the budget: room first, the fetch, one repeat in place; or where its event goes without it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from worker.budget import Budget
from worker.clock import Clock
from worker.errors import Code, ItemError, TransientItemError
from worker.image_room import ExpectedSize, ImageRoom, RoomWanted
from worker.items import Fetched, Item
from worker.metrics import Metrics
from worker.outcomes import Failed, Postponed
from worker.settings import FetchSettings
from worker.stages.fetch import Fetcher

IN_PLACE_DELAY_S = 0.2
"""Mean pause before the one repeat in place of a fetch that failed at once."""


class Fetching:
    """Used by all fetch threads, and by the main thread for what came inside its event."""

    def __init__(
        self,
        settings: FetchSettings,
        budget: Budget,
        fetcher: Fetcher,
        metrics: Metrics,
        clock: Clock,
        unfetched: Callable[[Failed | Postponed], None],
    ) -> None:
        """`unfetched` takes, from any of these threads, an event whose image did not come."""
        self._settings = settings
        self._budget = budget
        self._fetcher = fetcher
        self._metrics = metrics
        self._clock = clock
        self._unfetched = unfetched
        self.expected_size = ExpectedSize(settings.max_bytes)

    def fetch(self, item: Item) -> Fetched | None:
        """Room for the image is reserved first, so that the bytes in flight stay bounded whatever arrives.

        None where its event went another way from here, its room given back.
        """
        inline = item.event.inline
        image_bytes = self.expected_size.bytes if inline is None else len(inline)
        while True:
            self._budget.reserve(image_bytes)
            try:
                fetched = self.fetch_within(item, image_bytes)
            except RoomWanted as larger:
                image_bytes = larger.image_bytes
                continue
            if fetched is not None and inline is None:
                self.expected_size.learn(len(fetched.data))
            return fetched

    def fetch_within(self, item: Item, reserved_bytes: int) -> Fetched | None:
        """The image within the room reserved for it; None as `fetch`.

        Raises:
            RoomWanted: it is larger than what was reserved, and there is no more now; its room was given back.
        """
        room = ImageRoom(self._budget, reserved_bytes)
        try:
            fetched, error, made = self._in_place(item, room)
        except RoomWanted:
            room.keep(0)
            raise
        if fetched is not None:
            room.keep(len(fetched.data))
            return fetched
        room.keep(0)
        if isinstance(error, TransientItemError) and not error.attempted:
            self._postpone(item, error, made - 1)  # its host was left alone: that is no attempt of this event
        elif isinstance(error, TransientItemError) and made < self._settings.attempts:
            self._postpone(item, error, made)
        elif error is not None:
            self._unfetched(Failed.of(replace(item, delivery=replace(item.delivery, attempt=made)), error))
        return None

    def _in_place(self, item: Item, room: ImageRoom) -> tuple[Fetched | None, ItemError | None, int]:
        """Try once; on an event's first way through, a host that failed at once is asked a second time.

        Returns the image or the error, and how many attempts this event has had by now.
        """
        made = item.delivery.attempt
        started = self._clock.monotonic()
        while True:
            try:
                return self._fetcher.fetch(item, room.hold), None, made
            except ItemError as error:
                quick = error.code is Code.FETCH_UNAVAILABLE and made == 1 < self._settings.attempts and _attempted(error)
                if not quick:
                    return None, error, made
                self._metrics.retries.labels(error.code.value).inc()
            finally:
                ended = self._clock.monotonic()
                seconds = ended - started
                item.timings.span("fetch", started, ended)
                item.timings.fetch = seconds * 1000
                self._metrics.fetch.observe(seconds)
            made += 1
            self._clock.sleep(IN_PLACE_DELAY_S * random.uniform(0.5, 1.5))

    def _postpone(self, item: Item, error: TransientItemError, made: int) -> None:
        limits = self._settings
        delay_s = limits.retry_delay_s * 4 ** max(0, made - 2)
        delay_s = min(max(delay_s, error.retry_after_s or 0.0), limits.retry_delay_max_s)
        self._metrics.retries.labels(error.code.value).inc()
        failed = replace(item, delivery=replace(item.delivery, attempt=made))
        self._unfetched(Postponed(failed, error, delay_s))


def _attempted(error: ItemError) -> bool:
    return not isinstance(error, TransientItemError) or error.attempted
