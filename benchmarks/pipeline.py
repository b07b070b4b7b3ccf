"""The whole path against its parts, in one run: bare decode, bare detector, path with a null engine, path with the real one.

Events are inline 512x512 JPEGs, every one with bytes of its own, so that the cache never helps. The cost of the path is CPU time
by thread of the worker (each stage has threads of its own) and by decoder process, per 1,000 events.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks import decode, record
from benchmarks.kafka_ends import CLIENT_BATCH_BYTES, Verdicts
from benchmarks.uploads import Upload, inline, produce
from engine import images
from engine.detector import Detector
from worker.clock import Deadline
from worker.embedded import EmbeddedBroker, EmbeddedCache
from worker.kafka_clients import ensure_topics, open_admin
from worker.settings import KafkaSettings

SIDE_PX = 512
BATCH = 32


def jpegs(count: int, seed: int = 3) -> list[bytes]:
    """`count` JPEGs of a photograph's size and entropy; unique by bytes after the end of the picture."""
    rng = np.random.default_rng(seed)
    base = []
    for _ in range(16):
        smooth = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize(
            (SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 8, (SIDE_PX, SIDE_PX, 1))
        out = io.BytesIO()
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        base.append(out.getvalue())
    return [base[number % len(base)] + number.to_bytes(8, "big") for number in range(count)]


def bare_decode(pictures: list[bytes]) -> dict[str, float]:
    """CPU seconds per 1,000 images of the decoder alone, in this process."""
    limits = images.Limits(max_pixels=64_000_000, max_frames=4)
    images.read_crops(pictures[0], limits, "center")
    started = time.process_time()
    for picture in pictures:
        images.read_crops(picture, limits, "center")
    return {"cpu_s_per_1000": (time.process_time() - started) / len(pictures) * 1000}


def bare_pillow(pictures: list[bytes]) -> dict[str, float]:
    """CPU seconds per 1,000 images of a whole decode by Pillow and a crop, in this process."""
    decode.pillow(pictures[0])
    started = time.process_time()
    for picture in pictures:
        decode.pillow(picture)
    return {"cpu_s_per_1000": (time.process_time() - started) / len(pictures) * 1000}


def bare_detector(pictures: list[bytes], seconds: float) -> dict[str, Any]:
    """Images a second of the detector alone over full batches of the same images' crops."""
    limits = images.Limits(max_pixels=64_000_000, max_frames=4)
    crops = np.concatenate([images.read_crops(picture, limits, "center").crops for picture in pictures[:BATCH]])
    with Detector.open(None) as detector:
        detector.warm_up((BATCH,))
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            detector.infer(crops)
            done += BATCH
        rate = done / (time.perf_counter() - started)
        return {"images_per_s": rate, "backend": detector.backend_name, "device": detector.device, "batch": BATCH}


def detector_on_files(pictures: list[bytes]) -> dict[str, float]:
    """Images a second of the detector over the same files, decoding included, without Kafka and cache (`engine classify`)."""
    with Detector.open(None) as detector:
        detector.warm_up((BATCH,))
        rows = detector.classify((str(number), picture) for number, picture in enumerate(pictures))
        for _ in range(2 * BATCH):
            next(rows)
        started = time.perf_counter()
        count = sum(1 for _ in rows)
        return {"images_per_s": count / (time.perf_counter() - started)}


LEFT_OUT_OF = 8
"""At the end of a backlog one worker may have nothing left while another still works: that is no throughput."""


def path(
    uploads: Sequence[Upload],
    module: str,
    warm_up: int,
    processes: int = 1,
    partitions: int | None = None,
    settings: dict[str, str] | None = None,
    batch_bytes: int = CLIENT_BATCH_BYTES,
) -> dict[str, Any]:
    """Events a second and CPU by stage of worker processes over these uploads, after `warm_up` of them, the last eighth left out.

    `partitions` of the upload topic: the broker's default where none are given. `settings`: environment of the
    workers. `batch_bytes`: of the uploads' record batches.
    """
    with tempfile.TemporaryDirectory() as scratch, EmbeddedBroker() as broker, EmbeddedCache() as cache, ExitStack() as stack:
        _create_topics(broker.bootstrap, partitions)
        produce(uploads, broker.bootstrap, batch_bytes)  # before the worker starts: a producer must not share its cores
        workers = [
            stack.enter_context(
                _worker(module, broker, cache, Path(scratch, str(number)), {**(settings or {}), "BENCHMARK_WORKER": str(number)})
            )
            for number in range(processes)
        ]
        verdicts = stack.enter_context(closing(_Verdicts(broker.bootstrap)))
        seen = verdicts.wait(warm_up, workers)
        before, wall = _cpu_by_stage(workers), time.perf_counter()
        last = verdicts.wait(len(uploads) - len(uploads) // LEFT_OUT_OF, workers)
        wall = time.perf_counter() - wall
        after = _cpu_by_stage(workers)
        families = [psutil.Process(worker.pid) for worker in workers]
        resident = sum(m.memory_info().rss for family in families for m in (family, *family.children(recursive=True)))
    events = last - seen
    stages = {name: (after[name] - before.get(name, 0.0)) / events * 1000 for name in sorted(after)}
    return {
        "events_per_s": events / wall,
        "events": events,
        "cpu_s_per_1000": sum(stages.values()),
        "cpu_s_per_1000_by_stage": {name: round(value, 4) for name, value in stages.items() if value > 0},
        "resident_mib": resident / 2**20,
    }


@contextmanager
def _worker(
    module: str, broker: EmbeddedBroker, cache: EmbeddedCache, scratch: Path, settings: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    environment |= {
        "WORKER_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap,
        "WORKER_KAFKA__CREATE_TOPICS": "true",
        "WORKER_KAFKA__SESSION_TIMEOUT_MS": "6000",  # the embedded broker completes a join after half of it
        "WORKER_CACHE__URL": cache.url,
        "WORKER_HTTP__PORT": "0",
        "WORKER_LOG__LEVEL": "WARNING",
        **settings,
    }
    scratch.mkdir(exist_ok=True)
    with (scratch / "worker.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *module.split()], env=environment, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)
        sys.stderr.write((scratch / "worker.log").read_text()[-2000:])


def _create_topics(bootstrap: str, partitions: int | None) -> None:
    settings = KafkaSettings(bootstrap_servers=(bootstrap,), create_topics=True)
    if partitions is not None:
        with closing(open_admin(settings)) as admin:
            admin.create_topics({settings.upload_topics[0]: {"num_partitions": partitions, "replication_factor": 1}})
    ensure_topics(settings, Deadline(60))


class _Verdicts:
    """Counts verdicts."""

    def __init__(self, bootstrap: str) -> None:
        # Ten answers a second, not one for every verdict: whoever counts must not share the cores.
        self._verdicts = Verdicts(bootstrap, "image.verdicts", **{"fetch.min.bytes": 2**20, "fetch.wait.max.ms": 100})
        self._seen = 0

    def wait(self, count: int, workers: list[subprocess.Popen[bytes]]) -> int:
        """Until `count` verdicts were seen, none of them of a failure. Returns how many were."""
        deadline = time.monotonic() + 600
        while self._seen < count:
            found = self._verdicts.read(0.2, at_most=50)  # the warm-up ends within so many of its end
            self._seen += len(found)
            failed = [reason for body in found if (reason := json.loads(body)["reason"]) is not None]
            if failed:
                raise SystemExit(f"an event failed: {failed[0]}")
            if any(worker.poll() is not None for worker in workers) or time.monotonic() > deadline:
                raise SystemExit(f"the worker ended or stalled at {self._seen} of {count} verdicts")
        return self._seen

    def close(self) -> None:
        """Let go of the broker."""
        self._verdicts.close()


def _cpu_by_stage(workers: list[subprocess.Popen[bytes]]) -> dict[str, float]:
    """CPU seconds by thread name without its number, and of the decoder processes.

    `main` is the thread that reads. A thread without a name of its own has that of its maker: OpenVINO's are `engine-load`.
    """
    tick = os.sysconf("SC_CLK_TCK")
    seconds: dict[str, float] = defaultdict(float)
    for worker in workers:
        for task in Path(f"/proc/{worker.pid}/task").iterdir():
            fields = (task / "stat").read_text()
            name = fields[fields.index("(") + 1 : fields.rindex(")")].rstrip("0123456789").rstrip("-_")
            name = "main" if task.name == str(worker.pid) else "other threads" if name.startswith("python") else name
            times = fields[fields.rindex(")") + 2 :].split()
            seconds[name] += (int(times[11]) + int(times[12])) / tick
        for child in psutil.Process(worker.pid).children(recursive=True):
            used = child.cpu_times()
            seconds["decoder processes"] += used.user + used.system
    return dict(seconds)


def main(events: int, seconds: float) -> dict[str, Any]:
    """Run all parts and write the result file."""
    pictures = jpegs(events)
    some = pictures[: max(600, events // 3)]
    detectors = [bare_detector(pictures, seconds)]
    files = [detector_on_files(some)]
    figures: dict[str, Any] = {
        "picture": f"{SIDE_PX}x{SIDE_PX} JPEG, {len(pictures[0]) // 1024} KiB, inline",
    }
    # Before and after the path they are compared with: a shared machine is not as fast a minute later.
    decoders = {"bare_decode": bare_decode, "bare_pillow": bare_pillow}
    bare = [{name: measure(pictures[:500]) for name, measure in decoders.items()}]
    figures["null_engine"] = path(inline(pictures), "benchmarks.null_worker", warm_up=events // 5)
    bare.append({name: measure(pictures[:500]) for name, measure in decoders.items()})
    figures |= {name: {"cpu_s_per_1000": sum(turn[name]["cpu_s_per_1000"] for turn in bare) / len(bare)} for name in decoders}
    figures |= {
        "real_engine": path(inline(some), "worker run", warm_up=100),
    }
    detectors.append(bare_detector(pictures, seconds))
    files.append(detector_on_files(some))
    figures["bare_detector"] = detectors[0] | {"images_per_s": sum(d["images_per_s"] for d in detectors) / 2}
    figures["detector_on_files"] = {"images_per_s": sum(f["images_per_s"] for f in files) / 2}
    rate = figures["real_engine"]["events_per_s"]
    figures["path_over_detector_on_files"] = rate / figures["detector_on_files"]["images_per_s"]
    figures["path_over_bare_detector"] = rate / figures["bare_detector"]["images_per_s"]
    figures["path_over_decode_cpu"] = figures["null_engine"]["cpu_s_per_1000"] / figures["bare_decode"]["cpu_s_per_1000"]
    figures["path_over_pillow_cpu"] = figures["null_engine"]["cpu_s_per_1000"] / figures["bare_pillow"]["cpu_s_per_1000"]
    record.write("pipeline", figures)
    return figures
