"""The order of the stages, in one process: real ledger, budget, batcher, policy and cache-less path; fakes at the edges."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends import create
from engine.batcher import BatchConfig, Batcher
from engine.detector import Detector
from tests.engine.bundles import random_bundle
from worker.budget import Budget
from worker.clock import SystemClock
from worker.delays import DelayQueue
from worker.engines import engine_of
from worker.errors import Code, ItemError, TransientItemError
from worker.image_room import FIRST_BYTES, Hold, unbounded
from worker.items import Decoded, Fetched, Headers, ImageInfo, Item, Record
from worker.ledger import Ledger
from worker.metrics import Metrics
from worker.outcomes import Engine
from worker.pipeline import Pipeline, Stages
from worker.settings import CircuitSettings, Settings
from worker.stages.circuit import DeadLetterCircuit
from worker.stages.policy import PolicyKeeper

TOPIC = "image.uploads"


class Fetcher:
    """Bytes by event id; raises what it was told to."""

    def __init__(self) -> None:
        self.errors: dict[str, list[ItemError]] = defaultdict(list)
        self.calls: list[str] = []
        self.sizes: dict[str, int] = {}

    def fetch(self, item: Item, hold: Hold = unbounded) -> Fetched:
        event_id = item.event.event_id
        self.calls.append(event_id)
        hold(self.sizes.get(event_id, 0))
        if self.errors[event_id]:
            raise self.errors[event_id].pop(0)
        data = item.event.inline or (item.event.url or "").encode()
        return Fetched(item, data, data.hex().ljust(64, "0")[:64])


class Cache:
    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], Any] = {}

    def get_many(self, scope: str, digests: list[str]) -> dict[str, Any]:
        return {digest: self.kept[scope, digest] for digest in digests if (scope, digest) in self.kept}

    def put_many(self, entries: Any) -> None:
        self.kept |= {(entry.scope, entry.sha256): entry for entry in entries}


class Decoder:
    """Crops whose grey level is the first byte; `gate` holds every image back."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.decoded: list[str] = []
        self.turns: list[int] = []
        self.threads = 2

    def takes(self, index: int) -> int:
        return 3

    def decode_several(self, several: list[Fetched], index: int) -> list[Decoded | ItemError]:
        """The first two at most."""
        self.gate.wait(10)
        self.turns.append(len(several))
        return [self._decode(fetched) for fetched in several[:2]]

    def _decode(self, fetched: Fetched) -> Decoded | ItemError:
        self.decoded.append(fetched.item.event.event_id)
        if fetched.data.endswith(b"corrupt"):
            return ItemError(Code.DECODE_CORRUPT, "damaged")
        crops = np.full((1, 224, 224, 3), len(fetched.data), np.uint8)
        return Decoded(fetched, ImageInfo(fetched.sha256, 300, 200, "PNG", 1), crops, 1)


class Publisher:
    """Keeps what is published; gives receipts at once, or never while `mute`."""

    def __init__(self) -> None:
        self.verdicts: list[dict[str, Any]] = []
        self.letters: list[tuple[Record, str, int]] = []
        self.retries: list[tuple[Record, int, float]] = []
        self.withheld: list[Callable[[], None]] = []
        self.mute = False

    def verdict(self, body: bytes, event_id: str, headers: Any, on_receipt: Callable[[], None], receipts: Any = None) -> None:
        self.verdicts.append(json.loads(body))
        self._acknowledge(on_receipt)

    def dead_letter(
        self, record: Record, code: str, message: str, delivery: Any, on_receipt: Callable[[], None], receipts: Any = None
    ) -> None:
        self.letters.append((record, str(code), delivery.attempt))
        self._acknowledge(on_receipt)

    def retry(
        self, record: Record, delivery: Any, delay_s: float, code: str, on_receipt: Callable[[], None], receipts: Any = None
    ) -> None:
        self.retries.append((record, delivery.attempt, delay_s))
        self._acknowledge(on_receipt)

    def _acknowledge(self, on_receipt: Callable[[], None]) -> None:
        if self.mute:
            self.withheld.append(on_receipt)
        else:
            on_receipt()


class House:
    """A running pipeline and its edges."""

    def __init__(self, folder: Path, tracer: Any = None) -> None:
        self.settings = Settings()
        self.metrics = Metrics()
        self.ledger, self.fetcher, self.cache = Ledger(), Fetcher(), Cache()
        self.decoder, self.publisher = Decoder(), Publisher()
        self.budget = Budget(64, 10**8, 10**6)
        clock = SystemClock()
        self.circuit = DeadLetterCircuit(CircuitSettings(failures_in_a_row=5, reset_s=3600), 4, clock)
        bundle = random_bundle(folder / "bundle", seed=3)
        self.engine = engine_of(Detector.from_parts(bundle, create("null", "cpu")), max_frames=4)
        policy = PolicyKeeper(self.settings.policy, self.metrics)
        policy.bind(self.engine.detector)
        batcher: Batcher[Any] = Batcher(BatchConfig(max_batch_size=8, max_queue_delay_microseconds=1000), clock.monotonic)
        stages = Stages(
            self.ledger,
            self.budget,
            DelayQueue(100, 10**6, 60.0, clock),
            self.fetcher,  # type: ignore[arg-type]
            self.cache,  # type: ignore[arg-type]
            self.decoder,  # type: ignore[arg-type]
            batcher,
            policy,
            self.publisher,  # type: ignore[arg-type]
            self.circuit,
        )
        self.pipeline = Pipeline(self.settings, stages, self.engine, self.metrics, clock, tracer=tracer)
        self.ledger.assign([(TOPIC, 0), (self.settings.kafka.retry_topic, 0)])
        self._next = 0
        loops = [self.pipeline.fetch_loop] * 3 + [self.pipeline.cache_loop, self.pipeline.engine_loop, self.pipeline.publish_loop]
        loops += [lambda: self.pipeline.decode_loop(0), lambda: self.pipeline.decode_loop(1)]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def send(
        self, event_id: str | None, url: str = "https://a.example/x", topic: str = TOPIC, headers: Headers = (), **fields: Any
    ) -> None:
        value = b"{broken" if event_id is None else json.dumps({"event_id": event_id, "image": {"url": url}, **fields}).encode()
        position = self.ledger.track(topic, 0, self._next)
        self._next += 1
        self.pipeline.accept([Record(position, None, value, headers, int(time.time() * 1000))])

    def settle(self, within_s: float = 10) -> None:
        deadline = time.monotonic() + within_s
        while self.pipeline.active:
            assert time.monotonic() < deadline, f"{self.pipeline.active} still in flight"
            time.sleep(0.005)

    def close(self) -> None:
        self.decoder.gate.set()
        self.pipeline.close(drain=True)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), thread


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.close()


def committed_to(house: House) -> int | None:
    return house.ledger.committable().get((TOPIC, 0))


def test_an_event_becomes_a_verdict_and_its_offset_committable(house: House) -> None:
    house.send("one", attributes={"k": "v"}, tenant="acme")
    house.settle()
    (verdict,) = house.publisher.verdicts
    assert (verdict["event_id"], verdict["tenant"], verdict["attributes"]) == ("one", "acme", {"k": "v"})
    assert (verdict["cache"], verdict["reason"], verdict["model"]["version"]) == ("miss", None, house.engine.model.version)
    assert verdict["source"] == {"topic": TOPIC, "partition": 0, "offset": 0}
    assert all(verdict["timings_ms"][stage] is not None for stage in ("fetch", "decode", "queue", "infer", "total"))
    assert committed_to(house) == 1
    assert (house.budget.events, house.budget.bytes) == (0, 0)


def test_identical_images_are_inferred_once(house: House) -> None:
    house.decoder.gate.clear()
    for number in range(6):
        house.send(f"twin-{number}", "https://a.example/same")
    time.sleep(0.2)
    house.decoder.gate.set()
    house.settle()
    assert len(house.decoder.decoded) == 1
    assert len(house.publisher.verdicts) == 6
    assert len({verdict["score"] for verdict in house.publisher.verdicts}) == 1
    assert sorted(verdict["cache"] for verdict in house.publisher.verdicts) == ["hit"] * 5 + ["miss"]
    house.send("later", "https://a.example/same")
    house.settle()
    assert len(house.decoder.decoded) == 1
    assert house.publisher.verdicts[-1]["cache"] == "hit"


def test_images_that_wait_go_to_the_decoder_together_and_what_it_leaves_goes_again(house: House) -> None:
    house.decoder.gate.clear()
    names = [f"event-{number}" for number in range(12)]
    for name in names:
        house.send(name, f"https://a.example/{name}{'-corrupt' if name == 'event-5' else ''}")
    time.sleep(0.2)
    house.decoder.gate.set()
    house.settle()
    assert sorted(house.decoder.decoded) == sorted(names), "each once"
    assert max(house.decoder.turns) == 3
    assert {verdict["event_id"]: verdict["reason"] for verdict in house.publisher.verdicts} == {
        name: "decode.corrupt" if name == "event-5" else None for name in names
    }
    assert (house.budget.events, house.budget.bytes) == (0, 0)


def test_identical_broken_images_fail_together(house: House) -> None:
    house.decoder.gate.clear()
    for number in range(3):
        house.send(f"bad-{number}", "https://a.example/corrupt")
    time.sleep(0.2)
    house.decoder.gate.set()
    house.settle()
    assert len(house.decoder.decoded) == 1
    assert {verdict["reason"] for verdict in house.publisher.verdicts} == {"decode.corrupt"}
    assert len(house.publisher.letters) == 3
    assert committed_to(house) == 3


def test_a_malformed_record_without_an_id_is_a_dead_letter_only(house: House) -> None:
    house.send(None)
    house.settle()
    assert not house.publisher.verdicts
    assert [(letter[0].value, letter[1]) for letter in house.publisher.letters] == [(b"{broken", "event.malformed")]
    assert committed_to(house) == 1


def test_dead_letters_in_a_row_close_the_intake_and_a_score_breaks_the_row(house: House) -> None:
    for _ in range(3):
        for _ in range(4):
            house.send(None)
        house.settle()
        house.send("good")
        house.settle()
        assert house.pipeline.room() == 64
    for _ in range(5):
        house.send(None)
    house.settle()
    assert house.pipeline.room() == 0
    house.pipeline.observe()
    assert house.metrics.registry.get_sample_value("code_worker_dead_letter_circuit_open") == 1
    assert committed_to(house) == 20  # what was read is finished


def test_a_malformed_event_with_an_id_gets_both(house: House) -> None:
    house.send("odd", priority="high")
    house.settle()
    (verdict,) = house.publisher.verdicts
    assert (verdict["label"], verdict["score"], verdict["action"], verdict["reason"]) == (
        "undetermined",
        None,
        "review",
        "event.malformed",
    )
    assert len(house.publisher.letters) == 1


def test_a_refusal_is_repeated_in_place_once_then_postponed(house: House) -> None:
    house.fetcher.errors["flaky"] = [TransientItemError(Code.FETCH_UNAVAILABLE, "503")]
    house.send("flaky")
    house.settle()
    assert house.fetcher.calls.count("flaky") == 2
    assert house.publisher.verdicts[0]["reason"] is None
    house.fetcher.errors["down"] = [TransientItemError(Code.FETCH_UNAVAILABLE, "503")] * 2
    house.send("down")
    house.settle()
    assert [(attempt, delay) for _record, attempt, delay in house.publisher.retries] == [(2, 2.0)]
    assert committed_to(house) == 2


def test_a_timeout_goes_straight_to_the_retry_topic(house: House) -> None:
    house.fetcher.errors["slow"] = [TransientItemError(Code.FETCH_TIMEOUT, "slow")]
    house.send("slow")
    house.settle()
    assert house.fetcher.calls == ["slow"]
    assert [attempt for _record, attempt, _delay in house.publisher.retries] == [1]


def test_a_host_left_alone_costs_no_attempt(house: House) -> None:
    house.fetcher.errors["later"] = [TransientItemError(Code.FETCH_UNAVAILABLE, "left alone", 7.0, attempted=False)]
    house.send("later")
    house.settle()
    assert [(attempt, delay) for _record, attempt, delay in house.publisher.retries] == [(0, 7.0)]


def test_the_last_attempt_ends_in_a_dead_letter(house: House) -> None:
    from dataclasses import replace

    from worker import envelopes
    from worker.items import Delivery

    upload = Record(house.ledger.track(TOPIC, 0, 100), b"key", b'{"event_id":"gone","image":{"url":"https://a/"}}', (), 1)
    house.ledger.finish(upload.position)
    last = Delivery(attempt=5, first_seen=1.0, origin=upload.position)
    headers = tuple(envelopes.retry_headers((), last, "fetch.unavailable", 1.0))
    house.fetcher.errors["gone"] = [TransientItemError(Code.FETCH_UNAVAILABLE, "503")] * 9
    position = house.ledger.track(house.settings.kafka.retry_topic, 0, 0)
    house.pipeline.accept([replace(upload, position=position, headers=headers)])
    house.settle()
    assert house.fetcher.calls == ["gone"]
    ((letter, code, attempt),) = house.publisher.letters
    assert (letter.headers, code, attempt) == ((), "fetch.unavailable", 5)
    assert house.publisher.verdicts[0]["source"] == {"topic": TOPIC, "partition": 0, "offset": 100}


def test_without_receipts_nothing_is_committed_and_the_budget_stays_charged(house: House) -> None:
    house.publisher.mute = True
    for number in range(4):
        house.send(f"e{number}")
    deadline = time.monotonic() + 5
    while len(house.publisher.withheld) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert committed_to(house) is None
    assert house.pipeline.active == 4
    for receipt in reversed(house.publisher.withheld):
        receipt()
    assert committed_to(house) == 4
    assert house.pipeline.active == 0
    house.publisher.mute = False


def test_what_finishes_after_its_partition_went_is_neither_published_nor_committed(house: House) -> None:
    house.decoder.gate.clear()
    house.send("late")
    time.sleep(0.1)
    house.ledger.revoke([(TOPIC, 0)])
    house.ledger.assign([(TOPIC, 0)])
    house.decoder.gate.set()
    house.settle()
    assert not house.publisher.verdicts
    assert committed_to(house) is None
    assert house.budget.bytes == 0


def test_an_engine_that_fails_on_one_image_costs_that_image(house: House) -> None:
    class Picky:
        def infer(self, crops: np.ndarray) -> np.ndarray:
            if (crops[:, 0, 0, 0] == 66).any():
                raise ValueError("cannot")
            return house.engine.detector.infer(crops)

        combine = staticmethod(house.engine.detector.combine)

    house.pipeline.swap(Engine(Picky(), house.engine.model, house.engine.scope))  # type: ignore[arg-type]
    guilty = "https://a.example/".ljust(66, "x")
    for number in range(10):
        house.send(f"e{number}", guilty if number == 4 else f"https://a.example/{number}")
    house.settle()
    reasons = {verdict["event_id"]: verdict["reason"] for verdict in house.publisher.verdicts}
    assert reasons == {f"e{number}": "engine.failed" if number == 4 else None for number in range(10)}
    assert [code for _record, code, _attempt in house.publisher.letters] == ["engine.failed"]


def test_a_failing_device_ends_the_engine_thread_and_blames_no_image(tmp_path: Path) -> None:
    from engine.backends.base import DeviceError
    from worker.errors import DependencyError

    class Dead:
        def infer(self, crops: np.ndarray) -> np.ndarray:
            raise DeviceError("lost")

    caught: list[Any] = []
    house = House(tmp_path)
    house.pipeline.swap(Engine(Dead(), house.engine.model, house.engine.scope))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda arguments: caught.append(arguments.exc_value))
        house.send("one")
        deadline = time.monotonic() + 5
        while not caught and time.monotonic() < deadline:
            time.sleep(0.01)
    assert isinstance(caught[0], DependencyError)
    assert "the device failed: lost" in str(caught[0])
    assert not house.publisher.verdicts
    assert committed_to(house) is None
    house.pipeline.close(drain=False)
    for thread in house._threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_swap_names_the_new_model(house: House, tmp_path: Path) -> None:
    house.send("before")
    house.settle()
    bundle = random_bundle(tmp_path / "next", seed=4, version="2")
    successor = engine_of(Detector.from_parts(bundle, create("null", "cpu")), max_frames=4)
    house.pipeline.swap(successor)
    house.send("before", "https://a.example/x")
    house.settle()
    first, second = house.publisher.verdicts
    assert (first["model"]["version"], second["model"]["version"]) == ("1", "2")
    assert first["verdict_id"] != second["verdict_id"]
    assert len(house.decoder.decoded) == 2


def raw(house: House, count: int, size: int = 10) -> list[Record]:
    """Uploads that are images themselves."""
    records = []
    for number in range(count):
        position = house.ledger.track(TOPIC, 0, number)
        headers = (("content-type", b"image/png"), ("event_id", f"raw-{number}".encode()))
        records.append(Record(position, None, b"%04d" % number + bytes(size), headers, int(time.time() * 1000)))
    return records


def test_images_inside_events_go_to_the_cache_together(house: House) -> None:
    house.decoder.gate.clear()
    house.pipeline.accept(raw(house, 50))
    house.decoder.gate.set()
    house.settle(30)
    assert sorted(verdict["event_id"] for verdict in house.publisher.verdicts) == sorted(f"raw-{n}" for n in range(50))
    assert all(verdict["reason"] is None and verdict["timings_ms"]["fetch"] is not None for verdict in house.publisher.verdicts)
    assert committed_to(house) == 50
    assert (house.budget.events, house.budget.bytes) == (0, 0)


def test_images_inside_events_wait_where_there_is_no_room_for_them(house: House) -> None:
    """The fetch threads wait for it, never the thread that polls."""
    house.decoder.gate.clear()
    house.budget.reserve(5 * 10**7)
    records = raw(house, 5)
    house.pipeline.accept(records)
    house.decoder.gate.set()
    assert not house.publisher.verdicts
    house.budget.release(5 * 10**7)
    house.settle(30)
    assert len(house.publisher.verdicts) == 5
    assert (house.budget.events, house.budget.bytes) == (0, 0)


def test_a_wrong_digest_of_an_image_inside_an_event_is_a_dead_letter(house: House) -> None:
    house.fetcher.errors["raw-0"] = [ItemError(Code.FETCH_HASH_MISMATCH, "another image")]
    house.pipeline.accept(raw(house, 1))
    house.settle(30)
    (letter,) = house.publisher.letters
    assert letter[1] == "fetch.hash_mismatch"
    assert (house.budget.events, house.budget.bytes) == (0, 0)


def test_an_image_larger_than_expected_is_fetched_again_once_there_is_room_for_all_of_it(house: House) -> None:
    """That is no attempt of the event, and nothing of it shows in its verdict."""
    held = 5 * 10**7 - FIRST_BYTES
    house.budget.reserve(held)
    house.fetcher.sizes["big"] = FIRST_BYTES + 1
    house.send("big")
    deadline = time.monotonic() + 30
    while not house.fetcher.calls and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert house.fetcher.calls == ["big"] and not house.publisher.verdicts
    house.budget.release(held)
    house.settle(30)
    (verdict,) = house.publisher.verdicts
    assert house.fetcher.calls == ["big", "big"] and verdict["reason"] is None
    assert (house.budget.events, house.budget.bytes) == (0, 0)


def test_many_small_images_are_fetched_at_a_time(house: House) -> None:
    """What is reserved for a fetch is what images take, not the most they may have."""
    for number in range(40):
        house.send(f"url-{number}")
    house.settle(30)
    assert len(house.publisher.verdicts) == 40
    assert house.pipeline._fetching.expected_size.bytes < 100
