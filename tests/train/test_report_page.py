"""report.html: whole, self-contained, safe with hostile names, the numbers of report.json, readable by people and machines."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.pictures import corpus
from tests.train.reports import detector, scored
from train import evaluate, plots, report_page
from train.data import Damage, read_manifest
from train.scoring import Scored
from train.thumbnails import Extremes, extremes, pictures

LABELS = [0] * 40 + [1] * 30 + [0] * 20 + [1] * 9
HOSTILE = '<script>alert("x")</script>&'
SOURCES = ["cam"] * 40 + ["gan"] * 30 + ["phone"] * 20 + [HOSTILE] * 9
CONDITIONS = ("clean", "jpeg75", "blur2", "resize0.5")
VOID = {"meta", "img", "path", "polyline", "rect", "circle"}


def _scored(seed: int) -> Scored:
    rng = np.random.default_rng(seed)
    return scored(LABELS, np.clip(rng.normal(0.35 + 0.35 * np.array(LABELS), 0.25), 0.01, 0.99), SOURCES)


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "RESAMPLES", 40)
    patch.setattr(evaluate, "LADDER_RESAMPLES", 20)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Scored], Extremes]:
    runs = {name: _scored(seed) for seed, name in enumerate(CONDITIONS)}
    opened = detector(tmp_path_factory.mktemp("page") / "bundle")
    parity = {
        "reference": "torch",
        "crops": 64,
        "compared": [
            {
                "backend": "openvino",
                "device": "cpu",
                "precision": "fp32",
                "tolerance": 1e-4,
                "max_probability": {"linear": 2e-6, "knn": 1e-6, "ocsvm": 1e-6},
                "flipped": {"linear": 0, "knn": 0, "ocsvm": 0},
                "agrees": True,
            }
        ],
        "not_run": [["tensorrt", "not installed"]],
    }
    damage = Damage([(f"{HOSTILE}.jpg", "corrupt")])
    report = evaluate.report(opened, runs, frozenset({"cam", "gan"}), "d" * 64, damage, parity)
    return report, runs, extremes(runs["clean"], 0)


@pytest.fixture(scope="module")
def html(evaluated: tuple[dict[str, Any], dict[str, Scored], Extremes]) -> str:
    report, runs, shown = evaluated
    return report_page.page(report, runs, shown, dict.fromkeys(shown.keys, b"\xff\xd8 a JPEG"))


class _Document(HTMLParser):
    """Elements in order with their attributes; raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_it_is_one_well_formed_page_that_loads_nothing(html: str) -> None:
    document = _Document(html)
    assert not document.all("script") and not document.all("link") and "url(" not in html and "@import" not in html
    assert {a["src"].partition(":")[0] for a in document.all("img") if a["src"]} == {"data"}  # type: ignore[union-attr]
    assert all((a.get("href") or "").startswith("#") for a in document.all("a"))
    assert not re.findall(r"https?://", html)
    (policy,) = [a["content"] for a in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_from_the_data_are_text(html: str) -> None:
    assert "<script>" not in html and "&lt;script&gt;" in html and not any(tag == "script" for tag, _ in _Document(html).found)


def test_every_plot_and_picture_says_what_it_is(html: str) -> None:
    document = _Document(html)
    drawn = [a for a in document.all("svg") if a.get("aria-hidden") != "true"]
    ids = [a["id"] for _, a in document.found if a.get("id")]
    assert len(ids) == len(set(ids)) and len(drawn) == 10  # four a part, the rungs, the map
    assert all(a["role"] == "img" and set((a["aria-labelledby"] or "").split()) <= set(ids) for a in drawn)
    assert all(a.get("alt") for a in document.all("img")) and len(document.all("img")) == 24
    assert len(document.all("h1")) == 1 and len(document.all("main")) == 1
    assert all(a.get("scope") in ("row", "col") for a in document.all("th"))
    assert len(document.all("caption")) == len(document.all("table"))
    targets = {(a.get("href") or "#")[1:] for a in document.all("a")}
    assert targets <= set(ids)


def test_numbers_are_those_of_the_report(html: str, evaluated: tuple[dict[str, Any], dict[str, Scored], Extremes]) -> None:
    report, _, shown = evaluated
    for parts in report["conditions"].values():
        for values in parts.values():
            for row in values["slices"]:
                assert f"{row['auroc']['value']:.3f} <small>{row['auroc']['low']:.3f}" in html
    for rung in report["ladder"]:
        assert f"{rung['parts']['unseen_sources']['auroc']['value']:.3f}" in html
    assert f"<b>{shown.reals_taken_for_generated[0].score:.3f}</b>" in html
    assert "agrees with torch on 64 crops" in html and "not compared: not installed" in html
    assert "20 reals of unseen sources: too few" in html


def test_a_report_of_one_class_one_part_and_no_ladder_still_is_a_page(tmp_path: Path) -> None:
    runs = {"clean": scored([1] * 6, np.linspace(0.1, 0.9, 6))}
    with detector(tmp_path / "bundle", crops="five") as opened:
        report = evaluate.report(opened, runs, frozenset({"s1"}), "d" * 64, Damage())
    html = report_page.page(report, runs, extremes(runs["clean"], 0), {})
    _Document(html)
    assert "says nothing about new sources" in html and "n/a" in html and "no picture" in html
    assert "thresholds were chosen for other crops" in html and 'id="unseen-sources"' not in html


def test_extremes_are_the_highest_and_lowest_of_each_class() -> None:
    found = extremes(scored([0, 0, 0, 1, 1, 1], np.array([0.9, 0.1, 0.4, 0.2, 0.8, 0.5])), 0, each=2)
    assert [s.key for s in found.reals_taken_for_generated] == ["image-0", "image-2"]
    assert [s.key for s in found.surest_reals] == ["image-1", "image-2"]
    assert [s.key for s in found.generated_taken_for_real] == ["image-3", "image-5"]
    assert [s.score for s in found.surest_generated] == pytest.approx([0.8, 0.5])


def test_pictures_are_small_and_of_the_asked_quarters_only(tmp_path: Path) -> None:
    import io

    from PIL import Image

    corpus(tmp_path, splits=("val",))
    manifest = (tmp_path / "manifest.tsv").read_text().replace("single", "grid2x2", 1)
    (tmp_path / "manifest.tsv").write_text(manifest)
    entries = read_manifest(tmp_path, "val")
    keys = {f"{entries[0].sha256}#2", entries[5].sha256}
    found = pictures(entries, keys)
    assert set(found) == keys
    for data in found.values():
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG" and max(image.size) <= 112


def test_principal_components_keep_distances_in_the_plane() -> None:
    rng = np.random.default_rng(2)
    plane = rng.normal(0, 1, (30, 2)) * (5, 2)
    turned = np.linalg.qr(rng.normal(0, 1, (192, 192)))[0][:, :2]
    place, shares = report_page.principal_components((plane @ turned.T).astype(np.float32))
    wanted = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    np.testing.assert_allclose(np.linalg.norm(place[:, None] - place[None], axis=2), wanted, atol=1e-3)
    assert sum(shares) == pytest.approx(1.0, abs=1e-6) and shares[0] > shares[1]
    place, shares = report_page.principal_components(np.ones((1, 192), np.float32))
    assert place.shape == (1, 2) and shares == (0.0, 0.0)


def test_axes_place_values_and_cut_what_is_outside() -> None:
    log = plots.Axis("x", 0.001, 1.0, log=True)
    assert log.share(0.001) == 0 and log.share(1.0) == 1 and log.share(0.1) == pytest.approx(2 / 3) and log.share(0.0) == 0
    assert plots.Axis("x", -1, 3).share(1) == 0.5 and plots.Axis("x").share(7) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_it_fits_and_has_no_serious_barrier(html: str, tmp_path: Path, width: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    axe = pytest.importorskip("axe_playwright_python")
    sync = pytest.importorskip("playwright.sync_api")
    (tmp_path / "report.html").write_text(html)
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        # The page allows no script, axe's neither; the policy itself is tested above.
        page = browser.new_page(viewport={"width": width, "height": 800}, bypass_csp=True)
        page.set_default_timeout(300_000)
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        browser.close()
    assert [f"{v['id']}: {v['help']}" for v in found["violations"] if v["impact"] in ("serious", "critical")] == []
