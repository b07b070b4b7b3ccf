"""Accessibility (axe-core), weight, and screenshots of every view. `CONSOLE_SCREENSHOTS=docs/screenshots` keeps the pictures."""

from __future__ import annotations

import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import PIL.Image
import pytest

from tests.worker.console.stage import ConsoleProcess, Producer, picture, verdict
from tests.worker.console.test_browser import take
from tests.worker.console.test_server import claim, decide, wait_for
from worker.metrics import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.broker]
OpenPage = Callable[..., Any]

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
VIEWS = ("live", "review", "why", "decided", "try", "sign-in")
LOOKS = (
    ("desktop-light", 1280, 860, "light"),
    ("desktop-dark", 1280, 860, "dark"),
    ("phone-light", 390, 844, "light"),
    ("phone-dark", 390, 844, "dark"),
)


@pytest.fixture(scope="module")
def stock(producer: Producer, console: ConsoleProcess, worker_metrics: tuple[Metrics, str]) -> Iterator[dict[str, Any]]:
    """Something to look at in every view, and verdicts that go on coming."""
    found = [
        producer.judged(seed=50 + n, score=score, event_id=f"post-{4000 + n}") for n, score in enumerate((0.61, 0.55, 0.48, 0.72))
    ]
    copies = [verdict(f"post-{4010 + n}", 0.61, found[0]["image"]["sha256"]) | {"source": found[0]["source"]} for n in range(3)]
    producer.publish(*copies)
    wait_for(console, found[3])
    assert claim(console, "grace", found[3])
    assert decide(console, "grace", found[3], "overturn", "authentic", note="the author sent the layers")[0] == 200
    stopping = threading.Event()
    thread = threading.Thread(target=_stream, args=(producer, worker_metrics[0], stopping), daemon=True)
    thread.start()
    yield {"why": found[0], "review": found[1]}
    stopping.set()
    thread.join()


def _stream(producer: Producer, metrics: Metrics, stopping: threading.Event) -> None:
    """What a small platform sees: some forty uploads a second."""
    rng = random.Random(3)
    number = 0
    while not stopping.wait(0.25):
        verdicts = []
        for _ in range(rng.randint(7, 14)):
            number += 1
            failed = rng.random() < 0.04
            score = None if failed else min(0.999, rng.betavariate(0.5, 3) if rng.random() < 0.85 else rng.betavariate(9, 1))
            reason = rng.choice(["decode.corrupt", "fetch.not_found", "fetch.timeout", "decode.unsupported"]) if failed else None
            tenant = rng.choice(["acme", "acme", "borealis", "default"])
            made = verdict(f"post-{9000 + number}", score, reason=reason, tenant=tenant, cache_hit=rng.random() < 0.2)
            slow = rng.lognormvariate(0, 0.5)
            times = {"fetch": 22 * slow, "decode": 4 * slow, "queue": 3.1 * slow, "infer": 9.5 * slow, "total": 41 * slow}
            verdicts.append(
                made
                | {
                    "timings_ms": times,
                    "action": "block" if failed else "allow" if made["action"] == "review" else made["action"],
                }
            )
        producer.publish(*verdicts)
        metrics.batch_size.observe(rng.choice([1, 2, 4, 8, 8, 16, 16, 32]))
        metrics.batches.labels("timeout").inc()
        metrics.consumer_lag.labels("image.uploads", "0").set(rng.randint(0, 9))


def settle(page: Any, view: str, stock: dict[str, Any]) -> None:
    """Bring a view to where it shows what it is for."""
    if view == "live":
        page.wait_for_selector("table.rows tbody tr")
        page.wait_for_function("() => document.querySelectorAll('.panels .bars dt').length > 3")
    elif view in ("review", "why"):
        page.wait_for_selector(f"h1:has-text('{view.title()}')")
        if view == "review":
            take(page, stock["review"])
        page.wait_for_selector(".picture >> text=windows: most evidence of generation", timeout=60_000)
        page.keyboard.press("b")
        page.keyboard.press("h")
    elif view == "decided":
        page.wait_for_selector(".rows a")
    elif view == "try":
        page.set_input_files("#trial-file", {"name": "dunes.jpg", "mimeType": "image/jpeg", "buffer": picture(60)})
        page.wait_for_selector(".trial .part-verdict", timeout=60_000)
    page.evaluate("() => scrollTo(0, 0)")
    page.wait_for_timeout(300)


def serious(page: Any) -> list[str]:
    """What axe-core finds, serious and critical."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {violation['help']}: {[node['html'][:160] for node in violation['nodes'][:3]]}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]


def fits(page: Any) -> bool:
    """Whether the page does not scroll sideways once its layout has come to rest, which takes a busy machine a while."""
    deadline = time.monotonic() + 30
    while page.evaluate("() => document.documentElement.scrollWidth > innerWidth"):
        if time.monotonic() > deadline:
            return False
        page.wait_for_timeout(200)
    return True


@pytest.mark.parametrize("look", LOOKS, ids=[look[0] for look in LOOKS])
def test_every_view_is_accessible_and_fits_its_screen(
    open_page: OpenPage,
    console: ConsoleProcess,
    browser: Any,
    stock: dict[str, Any],
    look: tuple[str, int, int, str],
    tmp_path: Path,
) -> None:
    name, width, height, scheme = look
    kept = os.environ.get("CONSOLE_SCREENSHOTS")
    folder = Path(kept) if kept else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    page = open_page("ada", "live", width=width, height=height, scheme=scheme)
    for view in VIEWS:
        target = f"why/{stock['why']['event_id']}" if view == "why" else view
        if view == "sign-in":
            page.click("text=Sign out")
            page.wait_for_selector("#token")
        else:
            page.goto(f"{console.url}/#/{target}")
            settle(page, view, stock)
        assert serious(page) == [], view
        assert fits(page), f"{view} scrolls sideways"
        shot = page.screenshot(full_page=view != "live" and width < 600)
        PIL.Image.open(io.BytesIO(shot)).save(folder / f"{view}-{name}.webp", quality=80, method=6)


def test_the_page_is_light_and_loads_nothing_from_elsewhere(browser: Any, console: ConsoleProcess, open_page: OpenPage) -> None:
    page = open_page("victor")
    sizes: dict[str, int] = {}
    page.on("response", lambda answer: sizes.update({answer.url: len(answer.body()) if "/api/live" not in answer.url else 0}))
    page.goto("about:blank")
    page.goto(f"{console.url}/#/live")
    page.wait_for_selector("#sample")
    page.wait_for_timeout(500)
    assert sizes and all(url.startswith(console.url) for url in sizes), sorted(sizes)
    files = sum(len(path.read_bytes()) for path in Path("worker/console/static").iterdir())
    assert sum(sizes.values()) <= files + 50_000
    assert files < 300_000
    assert sum(sizes.values()) < 300_000
