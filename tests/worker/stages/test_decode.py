"""Decoder processes: real ones, made to crash, hang, bloat and lie."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest

from engine import images
from tests.engine import hostile_images
from worker.clock import Deadline
from worker.errors import Code, DependencyError, ItemError, StaleItemError
from worker.items import Decoded, Delivery, Event, Fetched, Item, Position, Record, Timings
from worker.settings import DecodeSettings
from worker.stages.decode import ALONE_AFTER, Decoder
from worker.stages.decode_child import Child
from worker.stages.decode_memory import IMAGE_BYTES, SharedMemory

FAULTS = "tests.worker.stages.decode_faults:decode"
ROOT = Path(__file__).resolve().parents[3]


def fetched(data: bytes) -> Fetched:
    record = Record(Position("image.uploads", 0, 7, 1), None, None, (), 0)
    return Fetched(Item(record, Event("event-1", None, data), Delivery(), Timings(0.0)), data, "00" * 32)


def png(width: int = 300, height: int = 260, **options: object) -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    """Two processes whose failures are on order, shared by the tests: each leaves it usable, which is the point."""
    decoder = Decoder(DecodeSettings(processes=2, timeout_s=2.0, max_memory_bytes=2**29), "center", function=FAULTS)
    decoder.start()
    yield decoder
    decoder.close(Deadline(5))


def code_of(decoder: Decoder, data: bytes, index: int = 0) -> Code:
    with pytest.raises(ItemError) as failure:
        decoder.decode(fetched(data), index)
    assert "\n" not in failure.value.message
    assert len(failure.value.message) < 300
    return failure.value.code


def assert_usable(decoder: Decoder) -> None:
    for index in range(decoder.threads):
        assert decoder.decode(fetched(png()), index).crops.shape == (1, 224, 224, 3)


@pytest.mark.parametrize("processes", [0, 1])
def test_crops_and_info_are_those_of_the_reader(processes: int) -> None:
    decoder = Decoder(DecodeSettings(processes=processes), "five")
    decoder.start()
    try:
        data = png()
        decoded = decoder.decode(fetched(data), 0)
        expected = images.read_crops(data, images.Limits(10**6), "five")
        assert np.array_equal(decoded.crops, expected.crops)
        assert decoded.crops_per_frame == 5
        info = decoded.info
        assert (info.width, info.height, info.format, info.frames, info.sha256) == (300, 260, "PNG", 1, "00" * 32)
        assert info.provenance == {"c2pa": None, "digital_source_type": None, "generator_metadata": None}
        assert decoder.threads >= 1
        assert code_of(decoder, b"GIF89a") == Code.DECODE_CORRUPT
        assert code_of(decoder, b"%PDF-1.7") == Code.DECODE_UNSUPPORTED
    finally:
        decoder.close(Deadline(5))


def test_pixel_limit_holds_in_the_child() -> None:
    decoder = Decoder(DecodeSettings(processes=1, max_pixels=1000), "center")
    decoder.start()
    assert code_of(decoder, png()) == Code.DECODE_TOO_MANY_PIXELS
    decoder.close(Deadline(5))


@pytest.mark.parametrize("fault", [b"segfault", b"die", b"bloat", b"raise"])
def test_a_crash_costs_its_own_image(decoder: Decoder, fault: bytes) -> None:
    restarts = decoder.restarts
    assert code_of(decoder, fault) == Code.DECODE_CRASHED
    assert decoder.restarts == restarts + 2, "tried once more on a fresh process, and that one replaced too"
    assert_usable(decoder)


def test_a_crash_names_the_signal(decoder: Decoder) -> None:
    with pytest.raises(ItemError, match=r"died 2 times on this image: killed by SIGSEGV"):
        decoder.decode(fetched(b"segfault"), 0)


def test_an_image_whose_decoder_died_by_chance_succeeds_at_the_second_try(decoder: Decoder, tmp_path: Path) -> None:
    decoded = decoder.decode(fetched(b"die-once " + str(tmp_path / "marker").encode()), 0)
    assert decoded.info.format == "PNG"


def decoded_together(decoder: Decoder, several: list[bytes], index: int = 0) -> list[Decoded | ItemError]:
    """Each, in as many turns as it takes."""
    found: list[Decoded | ItemError] = []
    while left := several[len(found) :]:
        took = decoder.decode_several([fetched(data) for data in left[: decoder.takes(index)]], index)
        assert took
        found += took
    return found


def outcomes(decoder: Decoder, several: list[bytes], index: int = 0) -> list[str]:
    """Format or code of each."""
    return [str(one.code) if isinstance(one, ItemError) else one.info.format for one in decoded_together(decoder, several, index)]


@pytest.fixture
def fresh() -> Iterator[Decoder]:
    """One process that has seen no trouble yet."""
    decoder = Decoder(DecodeSettings(processes=1, timeout_s=2.0, max_memory_bytes=2**29), "five", function=FAULTS)
    decoder.start()
    yield decoder
    decoder.close(Deadline(5))


@pytest.fixture
def turns(fresh: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each request to a decoder process was about."""
    asked: list[int] = []
    original = Child.exchange_several

    def exchange(child: Child, several: Sequence[bytes], *rest: Any) -> Any:
        asked.append(len(several))
        return original(child, several, *rest)

    monkeypatch.setattr(Child, "exchange_several", exchange)
    return asked


def test_several_images_come_to_what_each_alone_comes_to(fresh: Decoder, turns: list[int]) -> None:
    pictures = [png(200 + 30 * number, 230, compress_level=1) for number in range(5)]
    several = [*pictures[:2], b"GIF89a", pictures[2], b"%PDF-1.7", *pictures[3:]]
    found = decoded_together(fresh, several)
    for data, one in zip(several, found, strict=True):
        if isinstance(one, ItemError):
            assert code_of(fresh, data) == one.code
        else:
            assert one.fetched.data == data
            assert np.array_equal(one.crops, images.read_crops(data, images.Limits(10**6), "five").crops)
    assert [isinstance(one, ItemError) for one in found] == [False, False, True, False, True, False, False]
    assert turns[0] == 7
    assert fresh.restarts == 0


def test_crops_without_room_beside_the_others_come_with_the_next_turn(fresh: Decoder, turns: list[int], tmp_path: Path) -> None:
    out = io.BytesIO()
    frames = [PIL.Image.new("RGB", (300, 300), (number * 60, 0, 0)) for number in range(4)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    several = [out.getvalue()] * 4  # of 20 crops each: 3 MB, of which the shared memory takes two
    found = decoded_together(fresh, several)
    assert [None if isinstance(one, ItemError) else len(one.crops) for one in found] == [20] * 4
    assert turns == [4, 2]
    assert fresh.restarts == 0


def test_images_that_are_slow_do_not_wait_for_each_other(fresh: Decoder, turns: list[int]) -> None:
    found = decoded_together(fresh, [b"slow 0.03"] * 4)
    assert all(not isinstance(one, ItemError) for one in found)
    assert turns == [4, 3, 2, 1]


@pytest.mark.parametrize("fault", [b"segfault", b"die", b"bloat", b"lie json", b"lie count"])
def test_a_crash_among_several_costs_the_guilty_one_alone(fresh: Decoder, turns: list[int], fault: bytes) -> None:
    assert outcomes(fresh, [png(), png(), fault, png()]) == ["PNG", "PNG", "decode.crashed", "PNG"]
    assert fresh.restarts == 3, "once for all, then twice for the one"
    turns.clear()
    assert outcomes(fresh, [png()] * 4) == ["PNG"] * 4
    assert turns == [1] * 4, "whoever sends what kills decoders sends it again: one by one for a while"
    for _ in range(ALONE_AFTER // 4):
        assert outcomes(fresh, [png()] * 4) == ["PNG"] * 4
    assert turns[-1] == 4


def test_a_process_killed_while_idle_is_not_blamed_on_several_either(fresh: Decoder) -> None:
    pid = fresh.pids[0]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=2)
    assert outcomes(fresh, [png()] * 3) == ["PNG"] * 3
    assert fresh.restarts == 0


@pytest.mark.timing
def test_a_hang_among_several_costs_one_second_more(fresh: Decoder) -> None:
    started = time.monotonic()
    assert outcomes(fresh, [png(), b"hang", png()]) == ["PNG", "decode.timeout", "PNG"]
    assert 3.0 <= time.monotonic() - started < 6.0
    assert fresh.restarts == 2


def test_several_without_processes_or_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedMemory, "create", classmethod(lambda cls, size: None))
    for processes in (0, 1):
        decoder = Decoder(DecodeSettings(processes=processes), "center")
        decoder.start()
        assert outcomes(decoder, [png(), b"GIF89a", png()]) == ["PNG", "decode.corrupt", "PNG"]
        decoder.close(Deadline(5))


@pytest.mark.timing
@pytest.mark.parametrize("fault", [b"hang", b"spin"])
def test_a_hang_ends_at_the_timeout_and_is_not_tried_again(decoder: Decoder, fault: bytes) -> None:
    restarts, pid, started = decoder.restarts, decoder.pids[1], time.monotonic()
    assert code_of(decoder, fault, 1) == Code.DECODE_TIMEOUT
    assert 2.0 <= time.monotonic() - started < 5.0
    assert decoder.restarts == restarts + 1
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert_usable(decoder)


def test_a_child_killed_in_the_middle_of_an_image(decoder: Decoder) -> None:
    pid = decoder.pids[0]
    assert pid is not None
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    assert code_of(decoder, b"hang") == Code.DECODE_TIMEOUT, "the second try hangs to its end"
    killer.join()
    assert_usable(decoder)


def test_a_child_killed_while_idle_is_not_blamed_on_the_next_image(decoder: Decoder) -> None:
    assert_usable(decoder)
    restarts, pid = decoder.restarts, decoder.pids[0]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=2)
    assert decoder.decode(fetched(png()), 0).info.format == "PNG"
    assert decoder.restarts <= restarts + 1


@pytest.mark.parametrize(
    "lie", ["size", "memory", "json", "nested", "array", "status", "code", "bytes", "format", "width", "each", "frames"]
)
def test_what_a_taken_over_child_sends_is_not_believed(decoder: Decoder, lie: str) -> None:
    assert code_of(decoder, b"lie " + lie.encode()) in (Code.DECODE_CRASHED, Code.DECODE_TIMEOUT)
    assert_usable(decoder)


def test_provenance_of_a_taken_over_child_is_bounded(decoder: Decoder) -> None:
    found = decoder.decode(fetched(b"lie provenance"), 0).info.provenance
    assert found == {"c2pa": "x" * 200, "digital_source_type": None, "generator_metadata": None}


def test_the_terminal_s_signals_are_for_the_parent(decoder: Decoder) -> None:
    assert_usable(decoder)
    pids = decoder.pids
    for pid in pids:
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert_usable(decoder)
    assert decoder.pids == pids


def test_chatter_of_codecs_is_bounded_and_reaches_nobody(decoder: Decoder, capfd: pytest.CaptureFixture[str]) -> None:
    written = decoder.decode(fetched(b"chatter"), 0).info.provenance["c2pa"]
    assert 0 < int(written) <= 1 << 16
    assert "tag ignored" not in "".join(capfd.readouterr())


def test_a_child_holds_no_secret_and_no_foreign_file(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_KAFKA__SASL_PASSWORD", "secret")
    fresh = Decoder(DecodeSettings(processes=1), "center", function=FAULTS)
    fresh.start()
    try:
        names = fresh.decode(fetched(b"environment"), 0).info.provenance["c2pa"].split(",")
        malloc = {"MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
        libraries = {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
        assert set(names) <= {"PATH", "LC_ALL", "LC_CTYPE"} | malloc | libraries
        files = fresh.decode(fetched(b"open-files"), 0).info.provenance["c2pa"].split(",")
        assert sorted(files) == ["/dev/null", "/dev/null", "/memfd:decoder-images", "/memfd:decoder-stderr", "socket"]
        assert fresh.decode(fetched(b"limits"), 0).info.provenance["c2pa"] == "core=0 files=64"
    finally:
        fresh.close(Deadline(5))


def test_an_image_that_needs_too_much_memory_is_one_crash() -> None:
    """8,000 x 8,000 pixels of RGB are 256 MB in Pillow: within the pixel limit, beyond this memory limit."""
    decoder = Decoder(DecodeSettings(processes=1, max_memory_bytes=2**27), "center")
    decoder.start()
    out = io.BytesIO()
    PIL.Image.new("RGB", (8000, 8000), "red").save(out, "PNG", compress_level=1)
    with pytest.raises(ItemError, match="ran out of memory") as failure:
        decoder.decode(fetched(out.getvalue()), 0)
    assert failure.value.code == Code.DECODE_CRASHED
    assert decoder.decode(fetched(png()), 0).info.width == 300
    decoder.close(Deadline(5))


def test_memory_of_a_large_image_is_given_back(decoder: Decoder) -> None:
    """Freed, it would stay with the child: hundreds of megabytes for each process."""
    pid = decoder.pids[0]
    assert pid is not None
    out = io.BytesIO()
    PIL.Image.new("RGB", (6000, 6000), "blue").save(out, "JPEG", progressive=True)
    assert decoder.decode(fetched(out.getvalue()), 0).info.width == 6000
    assert_usable(decoder)
    assert psutil.Process(pid).memory_info().rss < 150 << 20


def test_two_hundred_hostile_files_through_two_processes(decoder: Decoder) -> None:
    corpus = [data for _, data in hostile_images.corpus(200)] + [b"segfault", b"die"] * 3
    outcomes: list[str] = []

    def work(index: int) -> None:
        for data in corpus[index::2]:
            try:
                outcomes.append(decoder.decode(fetched(data), index).info.format)
            except ItemError as error:
                outcomes.append(error.code.value)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(outcomes) == len(corpus)
    assert outcomes.count("decode.crashed") == 6
    assert len(set(outcomes)) > 4
    assert_usable(decoder)
    zombies = [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
    assert not zombies


def test_an_image_larger_than_the_shared_memory_is_decoded_too(decoder: Decoder) -> None:
    large = png(700, 700)
    assert len(large) > IMAGE_BYTES
    for data in (large, png(), large, png(1200, 900, compress_level=1)):
        decoded = decoder.decode(fetched(data), 1)
        assert np.array_equal(decoded.crops, images.read_crops(data, images.Limits(10**8), "center").crops)


def test_more_crops_than_the_shared_memory_holds_come_through_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.stages.decode_memory.MAX_CROP_BYTES", 224 * 224 * 3 * 4)
    decoder = Decoder(DecodeSettings(processes=1), "five")
    decoder.start()
    try:
        decoded = decoder.decode(fetched(png()), 0)
        assert np.array_equal(decoded.crops, images.read_crops(png(), images.Limits(10**8), "five").crops)
    finally:
        decoder.close(Deadline(5))


@pytest.mark.parametrize("work", ["hang", "spin", "idle"])
def test_children_die_with_a_killed_parent(work: str) -> None:
    """`kill -9` of the worker, with a child asleep, busy and idle."""
    program = f"""
import sys, threading
from tests.worker.stages.test_decode import DecodeSettings, Decoder, FAULTS, fetched
decoder = Decoder(DecodeSettings(processes=2, timeout_s=60), "center", function=FAULTS)
decoder.start()
print(*decoder.pids, flush=True)
if {work!r} != "idle":
    threading.Thread(target=decoder.decode, args=(fetched({work!r}.encode()), 0)).start()
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    assert not alive


@pytest.mark.timing
def test_close_ends_idle_and_hanging_children_and_frees_their_threads() -> None:
    decoder = Decoder(DecodeSettings(processes=2, timeout_s=60), "center", function=FAULTS)
    decoder.start()
    pids = [pid for pid in decoder.pids if pid]
    raised: list[BaseException] = []

    def hang() -> None:
        try:
            decoder.decode(fetched(b"hang"), 0)
        except StaleItemError as error:
            raised.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    decoder.close(Deadline(0.5))
    thread.join(5)
    assert time.monotonic() - started < 3
    assert len(raised) == 1, "neither a verdict nor a dead letter for an image that was given up"
    assert not any(psutil.pid_exists(pid) for pid in pids)
    decoder.close(Deadline(0.5))
    with pytest.raises(StaleItemError):
        decoder.decode(fetched(png()), 1)


def test_close_lets_an_image_in_the_works_finish() -> None:
    decoder = Decoder(DecodeSettings(processes=1), "center")
    decoder.start()
    out = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), dtype=np.uint8)).save(out, "PNG")
    widths: list[int] = []
    thread = threading.Thread(target=lambda: widths.append(decoder.decode(fetched(out.getvalue()), 0).info.width))
    thread.start()
    time.sleep(0.05)
    decoder.close(Deadline(10))
    thread.join(10)
    assert widths == [2500]


def test_processes_that_cannot_start_are_one_clear_error() -> None:
    decoder = Decoder(DecodeSettings(processes=1), "center", function="worker.no_such_module:decode")
    with pytest.raises(DependencyError, match=r"do not start: exit status 1: .*No module named 'worker.no_such_module'"):
        decoder.start()
    decoder.close(Deadline(1))


def test_restarts_are_told_as_they_happen() -> None:
    reasons: list[str] = []
    settings = DecodeSettings(processes=1, timeout_s=0.3)
    decoder = Decoder(settings, "center", on_restart=reasons.append, function=FAULTS)
    decoder.start()
    code_of(decoder, b"hang")
    code_of(decoder, b"die")
    assert reasons == ["timeout", "crashed", "crashed"]
    decoder.close(Deadline(5))


def test_large_inputs_and_many_crops_pass_whole() -> None:
    """20 MB of PNG in, 4 frames x 5 crops out: far beyond what one send or receive takes."""
    rng = np.random.default_rng(9)
    frames = [PIL.Image.fromarray(rng.integers(0, 256, (1000, 1300, 3), dtype=np.uint8)) for _ in range(6)]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:], compress_level=0)
    assert len(out.getvalue()) > 20_000_000
    decoder = Decoder(DecodeSettings(processes=1), "five")
    decoder.start()
    decoded = decoder.decode(fetched(out.getvalue()), 0)
    assert decoded.crops.shape == (20, 224, 224, 3)
    assert decoded.info.frames == 6
    assert np.array_equal(decoded.crops, images.read_crops(out.getvalue(), images.Limits(10**7), "five").crops)
    decoder.close(Deadline(5))
