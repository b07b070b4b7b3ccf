"""`worker dev`: the whole path on this machine: embedded broker and cache, a worker, the console, and verdicts as they come."""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from worker.embedded import Child, EmbeddedBroker, EmbeddedCache, free_port
from worker.errors import ConfigurationError, DependencyError, FatalError
from worker.settings import Settings, environment_name

ONCE_TIMEOUT_S = 120.0
INLINE_LIMIT_BYTES = 512 * 1024
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demo."""
    parser.add_argument("--samples", action="store_true", help="upload sample images drawn on the spot, unless --images is given")
    parser.add_argument("--images", type=Path, metavar="PATH", help="upload the images of this file or folder")
    parser.add_argument(
        "--once", action="store_true", help=f"end when every image has its verdict; 1 if not within {ONCE_TIMEOUT_S:.0f} s"
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Start everything, upload what was asked for, print verdicts until Ctrl-C (or, with --once, until all are there)."""
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: interrupted.set())
    with tempfile.TemporaryDirectory(prefix="code-worker-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        images = _images(arguments, folder)
        broker = stack.enter_context(EmbeddedBroker(folder / "broker.log"))
        cache = stack.enter_context(EmbeddedCache(folder / "cache.log"))
        port = settings.http.port if environment_name("http", "port") in os.environ else free_port()
        os.environ |= _environment(settings, broker, cache, port, images)
        settings = _reloaded()
        worker = stack.enter_context(_Worker(folder / "worker.log", port))
        print(f"broker  {broker.bootstrap}\ncache   {cache.url}")
        print(f"worker  http://127.0.0.1:{port}  (/readyz, /metrics)", flush=True)
        if not arguments.once:  # nobody would have the time to look
            print(f"console {_console(stack, folder / 'console.log', settings)}", flush=True)
        print(flush=True)
        return _show(settings, images, worker, interrupted, once=arguments.once)


class _Worker(Child):
    """`worker run` as a child that ends with this process."""

    name = "worker"
    ready_timeout_s = 180.0

    def __init__(self, log_file: Path, port: int) -> None:
        super().__init__(log_file, port)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "worker", "run"]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    def __exit__(self, *_: object) -> None:
        self.stop(grace_s=60.0)


class _Console(Child):
    """`worker console` as a child that ends with this process."""

    name = "console"
    ready_timeout_s = 180.0

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "worker", "console"]

    def _answers(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/livez", timeout=2) as answer:
            return bool(answer.status == 200)


def _console(stack: contextlib.ExitStack, log_file: Path, settings: Settings) -> str:
    """Start the console where it is installed; its address, or why there is none: the worker needs nothing of it."""
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        return "not installed: pip install 'code-moderation-worker[console]'"
    port = os.environ.setdefault(environment_name("console", "port"), str(free_port()))
    os.environ.setdefault(environment_name("console", "auth"), "none")
    os.environ[environment_name("console", "metrics_urls")] = f"http://127.0.0.1:{settings.http.port}/metrics"
    try:
        console = stack.enter_context(_Console(log_file, int(port)))
    except DependencyError as error:
        return f"none: {error}"
    return f"http://127.0.0.1:{console.port}"


def _images(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    if arguments.images is not None:
        return _found(arguments.images.expanduser())
    if not arguments.samples:
        return []
    from worker.samples import write_samples

    samples = folder / "samples"
    samples.mkdir()
    return write_samples(samples)


def _found(path: Path) -> list[Path]:
    if path.is_file():
        return [path.resolve()]
    if not path.is_dir():
        raise ConfigurationError(f"--images {path}: no such file or folder")
    found = sorted(file.resolve() for file in path.rglob("*") if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ConfigurationError(f"--images {path}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _environment(
    settings: Settings, broker: EmbeddedBroker, cache: EmbeddedCache, port: int, images: list[Path]
) -> dict[str, str]:
    """What the worker is told beside the user's own settings; its bus and cache are the embedded ones."""
    roots = {str(root) for root in settings.fetch.file_roots} | {str(path.parent) for path in images}
    return {
        environment_name("kafka", "bootstrap_servers"): broker.bootstrap,
        environment_name("kafka", "security_protocol"): "PLAINTEXT",
        environment_name("kafka", "create_topics"): "true",
        environment_name("kafka", "session_timeout_ms"): "6000",  # the embedded broker completes a join after half of it
        environment_name("cache", "url"): cache.url,
        environment_name("http", "port"): str(port),
        environment_name("fetch", "file_roots"): ",".join(sorted(roots)),
    }


def _reloaded() -> Settings:
    from worker import settings as settings_module

    return settings_module.load()


def _show(settings: Settings, images: list[Path], worker: _Worker, interrupted: threading.Event, *, once: bool) -> int:
    """Upload the images and print verdicts; returns the exit code."""
    from worker.topic_reader import follow

    waiting = _upload(settings, images) if images else {}
    total = len(waiting)
    deadline = time.monotonic() + ONCE_TIMEOUT_S
    _print_row("image", "label", "score", "action", "reason", "cache", "ms")
    for record in follow(settings.kafka, settings.kafka.verdict_topic, from_beginning=True):
        if record is not None:
            verdict = json.loads(record.value)
            name = waiting.pop(str(verdict["event_id"]), str(verdict["event_id"]))
            _print_verdict(name, verdict)
        if once and not waiting:
            print(f"\n{total} of {total} images have their verdict")
            return 0
        if interrupted.is_set():
            return 130 if once else 0
        if worker.pid is None:
            raise FatalError(f"the worker ended: {worker.complaint()}")
        if once and time.monotonic() > deadline:
            print(
                f"\n{len(waiting)} of {total} images have no verdict after {ONCE_TIMEOUT_S:.0f} s: {', '.join(waiting.values())}"
            )
            return 1
    return 0


def _upload(settings: Settings, images: list[Path]) -> dict[str, str]:
    """Publish an event for each image, by turns as a file URL, inline in JSON and raw. Returns names by event id."""
    from worker.kafka_clients import open_producer

    names = {}
    producer = open_producer(settings.kafka)
    for number, path in enumerate(images):
        event_id = str(uuid.uuid4())
        value, headers = _event(path, event_id, number % 3)
        producer.send(settings.kafka.upload_topics[0], value=value, key=event_id.encode(), headers=headers)
        names[event_id] = path.name
    producer.flush(timeout=ONCE_TIMEOUT_S)
    producer.close()
    return names


def _event(path: Path, event_id: str, form: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Value and headers of an upload event: 0 a file URL, 1 base64 in JSON, 2 the bytes themselves; large files by URL."""
    if form == 0 or path.stat().st_size > INLINE_LIMIT_BYTES:
        return json.dumps({"event_id": event_id, "image": {"url": path.as_uri()}}).encode(), []
    data = path.read_bytes()
    if form == 1:
        return json.dumps({"event_id": event_id, "image": {"bytes": base64.b64encode(data).decode()}}).encode(), []
    return data, [("content-type", b"image/*"), ("event_id", event_id.encode())]


def _print_verdict(name: str, verdict: dict[str, Any]) -> None:
    score = verdict["score"]
    shown = "-" if score is None else f"{score:.3f}"
    total = verdict["timings_ms"]["total"]
    milliseconds = "-" if total is None else f"{total:.0f}"
    _print_row(name, verdict["label"], shown, verdict["action"], verdict["reason"] or "", verdict["cache"], milliseconds)


def _print_row(name: str, label: str, score: str, action: str, reason: str, cache: str, milliseconds: str) -> None:
    print(f"{name[:36]:<37}{label:<14}{score:>6}  {action:<8}{reason:<24}{cache:<6}{milliseconds:>6}", flush=True)
