"""MODEL_CARD.md and TRAINING.md: what was measured and where it comes from, for trained and for imported models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from tests.train.reports import detector, scored
from train import card, evaluate
from train.data import Damage

LABELS = [0] * 20 + [1] * 20 + [0] * 10 + [1] * 10
SOURCES = ["cam"] * 20 + ["gan"] * 20 + ["phone"] * 10 + ["new"] * 10

TRAINED: dict[str, Any] = {
    "data": {
        "real": 7,
        "fake": 8,
        "aligned": 3,
        "sha256": "a" * 64,
        "sources": [{"label": "real", "source": "cam", "generator": "camera", "files": 7, "licence": "CC0"}],
    },
    "summary": {"seed": "5"},
    "notes": ["A note."],
    "recipe_sha256": "b" * 64,
    "encoder_sha256": "c" * 64,
}
IMPORTED: dict[str, Any] = {
    "imported": {"model.safetensors": "SHA-256 d", "linear.sav": "SHA-256 e, fitted by scikit-learn 1.2.2"},
    "summary": {"origin": "imported"},
    "notes": ["Another note."],
    "encoder_sha256": "c" * 64,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bundle, dict[str, Any]]]:
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "RESAMPLES", 30)
    patch.setattr(evaluate, "LADDER_RESAMPLES", 10)
    rng = np.random.default_rng(0)
    runs = {
        name: scored(LABELS, np.clip(rng.normal(0.35 + 0.35 * np.array(LABELS), 0.2), 0.01, 0.99), SOURCES)
        for name in ("clean", "jpeg75", "blur1")
    }
    opened = detector(tmp_path_factory.mktemp("card") / "bundle")
    yield opened.bundle, evaluate.report(opened, runs, frozenset({"cam", "gan"}), "d" * 64, Damage())
    patch.undo()


def test_every_slice_stands_clean_and_after_jpeg_with_its_interval(made: tuple[Bundle, dict[str, Any]]) -> None:
    bundle, report = made
    lines = card.model_card(bundle, report, TRAINED).splitlines()
    for condition, parts in report["conditions"].items():
        for values in parts.values():
            for row in values["slices"]:
                start = f"| {row['label']} {row['slice']} {row['name']} | {condition} | {row['images']} | "
                auroc = f"{row['auroc']['value']:.3f} ({row['auroc']['low']:.3f}-{row['auroc']['high']:.3f})"
                assert sum(line.startswith(start + auroc) for line in lines) == 1
                flagged = row["flagged"]["probability_0.5"]
                share = f"| {flagged['value']:.3f} ({flagged['low']:.3f}-{flagged['high']:.3f}) |"
                assert any(
                    line.startswith(f"| {row['label']} {row['slice']} {row['name']} | {condition} {share}") for line in lines
                )
    assert any(line.startswith("| blur1 | ") for line in lines)
    # Every table is as wide as its head.
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|"), line


def test_a_card_says_whether_a_rate_is_certified(made: tuple[Bundle, dict[str, Any]]) -> None:
    bundle, report = made
    text = card.model_card(bundle, report, TRAINED)
    assert "299 reals without an error for 1%, 2,995 for 0.1%" in text and "| certified |" in text


def test_a_trained_and_an_imported_model_say_where_they_come_from(made: tuple[Bundle, dict[str, Any]], tmp_path: Path) -> None:
    bundle, report = made
    trained, imported = (card.model_card(bundle, report, facts) for facts in (TRAINED, IMPORTED))
    assert "7 real and 8 generated files" in trained and "CC0" in trained and "A note." in trained and "Published" not in trained
    assert "nothing was trained here" in imported and "scikit-learn 1.2.2" in imported and "Another note." in imported
    assert "A small model from a small data set" not in imported
    assert all("## Limits" in text for text in (trained, imported))
    pages = [card.training_page("m", "1", facts, ["python -m train x"]) for facts in (TRAINED, IMPORTED)]
    assert all("python -m train x" in page for page in pages)
    assert "recipe SHA-256" in pages[0] and "recipe" not in pages[1] and "$WEIGHTS" in pages[1]
