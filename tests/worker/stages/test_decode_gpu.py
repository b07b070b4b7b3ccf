"""The GPU decoder's process, on a stand-in for nvImageCodec: used, refused, dying, hanging, lying; no image suffers from it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from structlog.testing import capture_logs

from engine import images
from engine.backends import create
from engine.detector import Detector
from tests.engine.bundles import random_bundle
from tests.engine.test_jpeg_region import encode, picture
from tests.worker.stages.test_decode import decoded_together, fetched, png
from worker.clock import Deadline
from worker.engines import EngineLoader, engine_of
from worker.errors import Code, ItemError
from worker.metrics import Metrics
from worker.settings import DecodeSettings, EngineSettings, Settings
from worker.stages import decode, decode_gpu
from worker.stages.decode_gpu import GpuFirstDecoder

FAULTS = "tests.worker.stages.gpu_faults:"
SETTINGS = DecodeSettings(processes=1, timeout_s=2.0, gpu=True)
JPEG = encode(picture(400, 300), quality=90)


def until(condition: object, timeout_s: float = 20.0) -> None:
    deadline = Deadline(timeout_s)
    while not condition():  # type: ignore[operator]
        assert not deadline.expired()
        time.sleep(0.01)


def started(function: str = "decode") -> GpuFirstDecoder:
    decoder = GpuFirstDecoder(SETTINGS, "center", gpu_function=FAULTS + function)
    decoder.start()
    return decoder


@pytest.fixture(scope="module")
def decoder() -> Iterator[GpuFirstDecoder]:
    decoder = started()
    yield decoder
    decoder.close(Deadline(5))


@pytest.fixture
def ready(decoder: GpuFirstDecoder) -> GpuFirstDecoder:
    until(lambda: decoder.gpu.in_service)
    return decoder


def by_gpu(decoder: GpuFirstDecoder, data: bytes) -> bool:
    """Whether an image came by the stand-in, whose pixels are off by one; near the safe decoder's they are always."""
    decoded = decoder.decode(fetched(data), 0)
    expected = images.read_crops(data, images.Limits(10**8))
    assert (decoded.info.width, decoded.info.height) == (expected.width, expected.height)
    difference = np.abs(decoded.crops.astype(int) - expected.crops).max()
    assert difference <= 1
    return bool(difference)


def test_the_settings_choose() -> None:
    assert type(decode_gpu.open_decoder(SETTINGS, "center")) is GpuFirstDecoder
    assert type(decode_gpu.open_decoder(DecodeSettings(), "center")) is decode.Decoder


def test_baseline_jpegs_come_by_the_gpu_all_else_does_not(ready: GpuFirstDecoder) -> None:
    assert by_gpu(ready, JPEG)
    assert not by_gpu(ready, png())
    assert not by_gpu(ready, encode(picture(400, 300), progressive=True))
    assert ready.decode(fetched(JPEG), 0).info.provenance["c2pa"] is None


def test_damage_is_the_safe_decoder_s_to_tell(ready: GpuFirstDecoder) -> None:
    with pytest.raises(ItemError) as failure:
        ready.decode(fetched(JPEG[:-300]), 0)
    assert failure.value.code == Code.DECODE_CORRUPT
    assert ready.gpu.in_service


def test_several_images_go_by_the_gpu_while_it_takes_them(ready: GpuFirstDecoder) -> None:
    assert ready.takes(0) == 1
    found = decoded_together(ready, [JPEG, png(), b"GIF89a", JPEG])
    kinds = [str(one.code) if isinstance(one, ItemError) else one.info.format for one in found]
    assert kinds == ["JPEG", "PNG", "decode.corrupt", "JPEG"]
    expected = images.read_crops(JPEG, images.Limits(10**8)).crops
    assert all(not isinstance(found[at], ItemError) and not np.array_equal(found[at].crops, expected) for at in (0, 3))


@pytest.mark.parametrize(("width", "code"), [(601, "decode.crashed"), (602, "decode.timeout"), (603, "decode.crashed")])
def test_it_dies_alone_and_is_replaced(ready: GpuFirstDecoder, width: int, code: str) -> None:
    pid, safe = ready.gpu.pid, ready.pids
    with capture_logs() as logs:
        assert not by_gpu(ready, encode(picture(width, 300))), "the safe decoder looks at it"
        until(lambda: ready.gpu.in_service)
    assert [log["code"] for log in logs if log["event"] == "decode.gpu_process_died"] == [code]
    assert ready.gpu.pid not in (None, pid)
    assert ready.pids == safe
    assert by_gpu(ready, JPEG)


def test_killed_while_idle_it_costs_no_image(ready: GpuFirstDecoder) -> None:
    pid = ready.gpu.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=2)
    assert not by_gpu(ready, JPEG)
    until(lambda: ready.gpu.in_service)
    assert by_gpu(ready, JPEG)


@pytest.mark.parametrize(
    ("function", "words"),
    [("without_device", "finds no GPU it can use"), ("dying", "its process died 5 times in a row"), ("no_such", "died 5 times")],
)
def test_where_it_cannot_be_used_one_line_says_so(function: str, words: str) -> None:
    with capture_logs() as logs:
        decoder = started(function)
        decoder.gpu._thread.join(60)
    try:
        refusals = [log for log in logs if log["event"] == "decode.gpu_refused"]
        assert len(refusals) == 1
        assert words in refusals[0]["reason"]
        assert decoder.gpu.pid is None
        assert not by_gpu(decoder, JPEG)
        assert (
            words.split(" 5 ")[0] in (decode_gpu.probe(SETTINGS, "center", FAULTS + function) or "")
            or function != "without_device"
        )
    finally:
        decoder.close(Deadline(5))


def test_it_does_not_outlive_its_decoder() -> None:
    decoder = started()
    until(lambda: decoder.gpu.in_service)
    pid = decoder.gpu.pid
    assert pid is not None
    decoder.close(Deadline(5))
    assert not psutil.pid_exists(pid)
    assert not decoder.gpu.in_service
    decoder.close(Deadline(1))


def test_closed_while_it_comes_up() -> None:
    decoder = started()
    decoder.close(Deadline(5))
    decoder.gpu._thread.join(20)
    assert not decoder.gpu._thread.is_alive()
    assert decoder.gpu.pid is None


def test_probe_says_nothing_where_it_can_be_used() -> None:
    assert decode_gpu.probe(SETTINGS, "center", FAULTS + "decode") is None
    assert "did not come up" in str(decode_gpu.probe(SETTINGS, "center", FAULTS + "dying"))


def test_scores_of_its_pixels_are_kept_apart_in_the_cache(tmp_path: Path) -> None:
    detector = Detector.from_parts(random_bundle(tmp_path / "bundle"), create("null", "cpu"))
    scopes = [engine_of(detector, 4).scope, engine_of(detector, 4, gpu_decode=True).scope]
    assert scopes == [f"{detector.cache_scope}:4", f"{detector.cache_scope}:4:nvimgcodec"]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_setting_reaches_the_cache_s_key(gpu: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = random_bundle(tmp_path / "bundle").path
    settings = Settings(
        engine=EngineSettings(bundle=path, backend="torch", device="cpu", threads=1), decode=DecodeSettings(gpu=gpu)
    )
    assert EngineLoader(settings, Metrics()).load().scope.endswith(":nvimgcodec") is gpu
