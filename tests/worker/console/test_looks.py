"""Accessibility (axe-core), weight, and screenshots of every view. `CONSOLE_SCREENSHOTS=docs/screenshots` keeps the pictures."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.worker.console.stage import ConsoleProcess, Producer, picture, verdict
from tests.worker.console.test_browser import take

pytestmark = [pytest.mark.slow, pytest.mark.broker]
OpenPage = Callable[..., Any]

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
VIEWS = ("live", "review", "why", "decided", "try", "sign-in")
LOOKS = (
    ("desktop-light", 1280, 860, "light"),
    ("desktop-dark", 1280, 860, "dark"),
    ("phone-light", 390, 844, "light"),
    ("phone-dark", 390, 844, "dark"),
)


@pytest.fixture(scope="module")
def stock(producer: Producer, console: ConsoleProcess) -> dict[str, Any]:
    """Something to look at in every view."""
    tenants = ("acme", "borealis", "default")
    for second in range(3):
        some = [
            verdict(
                f"post-{time.time_ns()}-{n}", [0.02, 0.11, 0.2, 0.45, 0.97][n % 5], tenant=tenants[n % 3], cache_hit=n % 4 == 0
            )
            for n in range(12 + 5 * second)
        ]
        failed = verdict(f"post-{time.time_ns()}", None, reason=("decode.corrupt", "fetch.not_found")[second % 2])
        producer.publish(*some, failed)
        time.sleep(1.0)
    found = [
        producer.judged(seed=50 + n, score=score, event_id=f"post-{4000 + n}") for n, score in enumerate((0.61, 0.55, 0.48, 0.72))
    ]
    copy = verdict("post-4000-copy", 0.61, found[0]["image"]["sha256"], None)
    producer.publish(
        copy | {"source": found[0]["source"]}, found[0] | {"verdict_id": "again", "processed_at": found[0]["processed_at"]}
    )
    return {"why": found[0], "review": found[1]}


def settle(page: Any, view: str, stock: dict[str, Any]) -> None:
    """Bring a view to where it shows what it is for."""
    if view == "live":
        page.wait_for_selector("table.rows tbody tr")
        page.wait_for_function("() => /in a minute/.test(document.querySelector('.tile .quiet').textContent)")
        page.click("text=Pause")
    elif view in ("review", "why"):
        if view == "review":
            take(page, stock["review"])
        page.wait_for_selector("text=windows: most evidence of generation", timeout=60_000)
        page.keyboard.press("b")
        page.keyboard.press("h")
    elif view == "decided":
        page.wait_for_selector(".scroll")
    elif view == "try":
        page.set_input_files("#trial-file", {"name": "dunes.jpg", "mimeType": "image/jpeg", "buffer": picture(60)})
        page.wait_for_selector(".trial .part-verdict", timeout=60_000)
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
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, f"{view} scrolls sideways"
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
