"""One console and one browser for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import packaged
from tests.conftest import unique_settings
from tests.engine.bundles import random_bundle
from tests.worker.console.stage import POLICY, TOKENS, ConsoleProcess, Producer
from worker.embedded import EmbeddedBroker
from worker.health import Health, HealthServer
from worker.metrics import Metrics
from worker.settings import HttpSettings, KafkaSettings

CHROMIUM_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def console_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A bundle, a policy, and a folder for logs."""
    folder = tmp_path_factory.mktemp("console")
    (folder / "policy.toml").write_text(POLICY)
    if os.environ.get("CONSOLE_SCREENSHOTS"):  # pictures for people: with the model that ships
        return packaged(), folder / "policy.toml", folder
    return random_bundle(folder / "bundle", seed=1).path, folder / "policy.toml", folder


@pytest.fixture(scope="session")
def topics(broker: EmbeddedBroker) -> KafkaSettings:
    """Topics of this folder's tests."""
    return unique_settings(broker.bootstrap)


@pytest.fixture(scope="session")
def producer(topics: KafkaSettings) -> Iterator[Producer]:
    """Publishes to them."""
    made = Producer(topics)
    yield made
    made.close()


@pytest.fixture(scope="session")
def worker_metrics() -> Iterator[tuple[Metrics, str]]:
    """A worker's /metrics page without the worker, and its address."""
    metrics = Metrics()
    server = HealthServer(HttpSettings(port=0), Health(stale_after_s=60), metrics)
    server.start()
    yield metrics, f"http://127.0.0.1:{server.port}/metrics"
    server.close()


@pytest.fixture(scope="session")
def console(
    topics: KafkaSettings, producer: Producer, console_files: tuple[Path, Path, Path], worker_metrics: tuple[Metrics, str]
) -> Iterator[ConsoleProcess]:
    """A running console."""
    bundle, policy, folder = console_files
    with ConsoleProcess(topics, bundle, policy, folder / "console.log", CONSOLE__METRICS_URLS=worker_metrics[1]) as running:
        yield running


@pytest.fixture(scope="session")
def second_console(
    topics: KafkaSettings, console: ConsoleProcess, console_files: tuple[Path, Path, Path]
) -> Iterator[ConsoleProcess]:
    """Another replica on the same topics."""
    bundle, policy, folder = console_files
    with ConsoleProcess(topics, bundle, policy, folder / "second.log") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; closed with the file's last test, since a process runs one Playwright at a time."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is here, playwright is not: pip install playwright")
        pytest.skip("no playwright: pip install playwright")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_OPTIONS))
        yield running
        running.close()


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, console: ConsoleProcess) -> Iterator[OpenPage]:
    """`open_page("ada")` is a page on which ada has signed in; an error in its console fails the test."""
    contexts: list[Any] = []
    errors: list[str] = []

    def opened(
        person: str, view: str = "live", *, width: int = 1280, height: int = 860, scheme: str = "light", **more: Any
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on(
            "console",
            lambda message: errors.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: errors.append(f"page error: {error}"))
        answer = context.request.post(f"{console.url}/api/session", data={"token": TOKENS[person]})
        assert answer.ok, answer.text()
        page.goto(f"{console.url}/#/{view}")
        page.wait_for_selector("h1")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors, errors
