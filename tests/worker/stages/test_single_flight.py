"""One leader a flight, and nobody who waits is lost, in one thread and in many."""

from __future__ import annotations

import threading
from collections import Counter

from worker.stages.single_flight import SingleFlight


def test_the_first_leads_and_the_others_wait() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    assert not flights.join("a", 0)
    assert flights.lead("a", 1)
    assert flights.join("a", 2)
    assert not flights.lead("a", 3)
    assert flights.lead("b", 4)
    assert flights.done("a") == [2, 3]
    assert flights.done("a") == []
    assert flights.lead("a", 5)
    assert flights.done("a") == []
    assert flights.done("b") == []
    assert len(flights) == 0


def test_a_leader_that_gives_up_hands_over_to_the_next() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    flights.lead("a", 1)
    flights.lead("a", 2)
    flights.lead("a", 3)
    assert flights.hand_over("a") == 2
    assert flights.join("a", 4)
    assert flights.hand_over("a") == 3
    assert flights.done("a") == [4]
    flights.lead("a", 5)
    assert flights.hand_over("a") is None
    assert len(flights) == 0
    assert flights.lead("a", 6)


def test_many_threads_lose_nobody() -> None:
    flights: SingleFlight[int, int] = SingleFlight()
    seen: Counter[int] = Counter()
    led = []
    lock = threading.Lock()

    def work(start: int) -> None:
        for number in range(start, start + 500):
            key = number % 3
            if flights.lead(key, number):
                finished = [number, *flights.done(key)]
                with lock:
                    led.append(number)
                    seen.update(finished)

    threads = [threading.Thread(target=work, args=(start * 500,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == Counter(range(4000))
    assert len(flights) == 0
