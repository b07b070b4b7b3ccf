"""The worker as a process: exit codes, signals, one clear line, and no torch in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.blackbox.worker_process import WorkerProcess
from tests.engine.bundles import random_bundle
from worker.embedded import EmbeddedBroker, free_port

BLOCK_TORCH = "import sys; sys.modules['torch'] = None; "


def worker(*arguments: str, timeout_s: float = 60, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    environment |= {f"WORKER_{name}": str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "b", seed=1).path


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    last = [line for line in done.stderr.splitlines() if not line.startswith("{")][-1]
    for word in words:
        assert word in last, done.stderr


def test_wrong_settings_exit_2_named_field_by_field() -> None:
    done = worker("run", HTTP__PORT="x", KAFKA__NOPE="1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "WORKER_HTTP__PORT" in done.stderr
    assert "WORKER_KAFKA__NOPE" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["nope"], ["run", "--nope"]])
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    done = worker(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    one_line(done, "--help")


def test_a_missing_bundle_exits_2(tmp_path: Path) -> None:
    done = worker("run", ENGINE__BUNDLE=tmp_path / "nowhere", HTTP__PORT=0)
    assert done.returncode == 2
    one_line(done, "WORKER_ENGINE__BUNDLE", "nowhere")


def test_a_taken_port_exits_2(bundle: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = worker("run", HTTP__PORT=taken.getsockname()[1], ENGINE__BUNDLE=bundle)
    assert done.returncode == 2
    one_line(done, "WORKER_HTTP__PORT")


def test_a_broker_that_never_answers_exits_3(bundle: Path) -> None:
    done = worker(
        "run",
        KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{free_port()}",
        KAFKA__STARTUP_TIMEOUT_S=2,
        HTTP__PORT=0,
        ENGINE__BUNDLE=bundle,
    )
    assert done.returncode == 3
    one_line(done, "127.0.0.1")


@pytest.mark.broker
def test_a_missing_topic_exits_3_and_is_named(bundle: Path) -> None:
    with EmbeddedBroker() as broker:
        done = worker(
            "run", KAFKA__BOOTSTRAP_SERVERS=broker.bootstrap, KAFKA__STARTUP_TIMEOUT_S=2, HTTP__PORT=0, ENGINE__BUNDLE=bundle
        )
    assert done.returncode == 3
    one_line(done, "image.uploads")


@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number: signal.Signals, bundle: Path, tmp_path: Path) -> None:
    settings = {"ENGINE__BUNDLE": bundle, "CACHE__ENABLED": "false"}
    with (
        EmbeddedBroker() as broker,
        WorkerProcess(tmp_path / "log", KAFKA__BOOTSTRAP_SERVERS=broker.bootstrap, **settings) as process,
    ):
        assert process.stop(number) == 0, process.log()


@pytest.mark.broker
def test_a_second_signal_exits_at_once_with_130(bundle: Path, tmp_path: Path) -> None:
    settings = {"ENGINE__BUNDLE": bundle, "CACHE__ENABLED": "false", "SHUTDOWN__DRAIN_S": 60}
    with (
        EmbeddedBroker() as broker,
        WorkerProcess(tmp_path / "log", KAFKA__BOOTSTRAP_SERVERS=broker.bootstrap, **settings) as process,
    ):
        assert process.process is not None
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGSTOP)  # it answers nothing: leaving the group, and so the drain, cannot end soon
        try:
            signals, deadline = 0, time.monotonic() + 50  # less than the drain
            while process.process.poll() is None and time.monotonic() < deadline:
                process.process.send_signal(signal.SIGTERM)  # two that arrive together count as one
                signals += 1
                time.sleep(0.3)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert process.process.poll() == 130
        assert signals > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_its_broker_exits_0_soon(number: signal.Signals, bundle: Path, tmp_path: Path) -> None:
    settings = {"ENGINE__BUNDLE": bundle, "KAFKA__STARTUP_TIMEOUT_S": 60, "HTTP__PORT": 0}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    environment |= {f"WORKER_{name}": str(value) for name, value in settings.items()}
    environment["WORKER_KAFKA__BOOTSTRAP_SERVERS"] = f"127.0.0.1:{free_port()}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "worker", "run"], env=environment, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while "engine.loaded" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(15) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
    assert '"worker.stopped"' in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_worker_imports_without_torch() -> None:
    code = BLOCK_TORCH + "import worker.app, engine.detector, engine.batcher, worker.commands.dev; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "ok", done.stderr


def test_tensorrt_without_a_gpu_says_what_is_missing(bundle: Path) -> None:
    code = BLOCK_TORCH + "from worker.__main__ import main; sys.exit(main(['run']))"
    environment = os.environ | {
        "WORKER_ENGINE__BACKEND": "tensorrt_rtx",
        "WORKER_HTTP__PORT": "0",
        "WORKER_ENGINE__BUNDLE": str(bundle),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    one_line(done, "tensorrt")
