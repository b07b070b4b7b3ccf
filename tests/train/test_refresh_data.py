"""A bundle that carries no replay is refreshed from the corpus that --data names; the replay is made once and carried on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from engine import bundle
from tests.train import refreshed
from tests.train.pictures import corpus
from train import agreement, evaluate, refresh_steps, replay
from train.data import DataError, read_manifest
from train.embed import Embedded, Facts
from train.labels_images import Allowed
from train.refresh import Options, refresh

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def embeddings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each embedding was asked for. The images are decoded; their embeddings come from key and label."""
    asked: list[int] = []

    def embedded(encoder: object, images: Iterable[tuple[Any, Facts]], on_image: object = None) -> Embedded:
        facts = [f for _, f in images]
        asked.append(len(facts))
        vectors = np.zeros((len(facts), 192), np.float32)
        for vector, f in zip(vectors, facts, strict=True):
            rng = np.random.default_rng(int(f.key[:8], 16))
            new = f.source == "labels"
            vector[:] = refreshed.embedding_of(f.key, 1) if new else refreshed.SPREAD * rng.standard_normal(192)
            vector[0] += 0 if new else 4.0 * (f.label - 0.5) + rng.standard_normal()
        return Embedded(vectors, facts)

    monkeypatch.setattr(refresh_steps, "embed", embedded)
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    monkeypatch.setattr(evaluate, "LADDER_RESAMPLES", 5)
    nothing = {"reference": "torch", "crops": 1, "compared": [], "not_run": []}
    monkeypatch.setattr(agreement, "measure", lambda *_: nothing)
    return asked


def test_the_corpus_stands_in_for_a_replay(tmp_path: Path, embeddings: list[int]) -> None:
    models = refreshed.models(tmp_path / "models", carried=False)
    data = corpus(tmp_path / "data", reals=24, fakes=24, splits=("train", "val"))
    manifest = data / "manifest.tsv"
    # One source of each class is in no training: the gate judges by it.
    lines = [
        line.replace("-source-1", "-elsewhere") if line.startswith("val/") else line for line in manifest.read_text().split("\n")
    ]
    manifest.write_text("\n".join(lines))
    file = refreshed.decisions(tmp_path / "sample")
    given = {"labels": (file,), "allowed": Allowed(folders=(tmp_path / "sample" / "images",)), "backend": "null"}
    with pytest.raises(DataError, match="name the corpus it was trained on with --data"):
        refresh(Options(models, tmp_path / "work", **given))
    outcome = refresh(Options(models, tmp_path / "work", **given, data=data))
    assert outcome.rules, outcome.reason
    encoder = bundle.load(models / "1").manifest.encoder.sha256
    step = tmp_path / "work" / "steps" / "replay" / "replay.safetensors"
    parts = replay.decode(step.read_bytes(), encoder, str(step))
    train, val = read_manifest(data, "train"), read_manifest(data, "val")
    assert {f.key for f in parts[replay.TRAIN].facts} == {e.sha256 for e in train}
    for name in replay.CALIBRATE:
        assert {f.source for f in parts[name].facts} == {e.source for e in train} & {e.source for e in val}
    for name in replay.CONDITIONS:
        assert [f.key for f in parts[f"{replay.EVALUATE}{name}"].facts] == [e.sha256 for e in val]
    assert embeddings == [48, 24, 24, 48, 48, 12]
    # Started again, with one label more or less or none: the corpus is not embedded a second time.
    again = refresh(Options(models, tmp_path / "work", **given, data=data))
    assert again.kind == "kept" and embeddings == [48, 24, 24, 48, 48, 12]
    if outcome.kind == "promoted":
        carried = replay.of_bundle(bundle.load(models))
        assert carried is not None and set(carried) == {*parts, replay.LABELS}
