"""`refresh --encoder`: encoder, heads and thresholds learn, the gate decides; cut anywhere, it ends as it would have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from engine import bundle
from engine.file_lock import hold
from tests.train import refreshed
from tests.train.pictures import corpus
from train import __main__ as command_line
from train import agreement, evaluate, gate, refit, refresh_steps, refresh_tuning, replay
from train.data import DataError
from train.embed import Embedded
from train.labels_images import Allowed
from train.recipe import RecipeError
from train.refresh import Options, RefreshError, refresh
from train.refresh_job import Steps

pytestmark = pytest.mark.timeout(900)

RECIPE = """
seed = 3
learning_rate = 1e-3
cross_entropy_weight = 1.0
ema_decay = 0.9
bf16 = false
pool_copies = {copies}
labelled_share = 0.5
[[phases]]
steps = 3
records = 2
tokens = 4
geometry = "native"
preset = "platform"
"""


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    monkeypatch.setattr(evaluate, "LADDER_RESAMPLES", 5)
    monkeypatch.setattr(refit, "ALIKE", 1.01)  # made-up pictures all look alike to a random encoder
    nothing = {"reference": "torch", "crops": 1, "compared": [], "not_run": []}
    monkeypatch.setattr(agreement, "measure", lambda *_: nothing)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    refreshed.models(tmp_path / "models")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(copies=1))
    file = refreshed.decisions(tmp_path / "sample", fakes=12, reals=0)
    return Options(
        tmp_path / "models", tmp_path / "work", labels=(file,), allowed=Allowed(folders=(tmp_path / "sample" / "images",)),
        data=corpus(tmp_path / "corpus", reals=8, fakes=8, splits=("train", "val")), min_labels=10, encoder=True,
        recipe=tmp_path / "recipe.toml", workers=0,
    )  # fmt: skip


def passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gate, "gate", lambda *_: [gate.Rule("all", True, "for the test")])
    patch.setattr(refresh_steps, "label_rules", lambda found: [])


def current(options: Options) -> str:
    return bundle.load(options.models).manifest.version


def test_without_a_corpus_or_with_an_unfit_recipe_it_is_one_line_and_2(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["refresh", "--encoder", "--models", str(options.models), "--work", str(options.work)]
    assert command_line.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--data" in error
    champion = bundle.load(options.models)
    for line, field in (("whitened_filters = 4", "whitened_filters"), ("probe_every = 2", "probe_every")):
        (tmp_path / "wrong.toml").write_text(f"{line}\n{RECIPE.format(copies=0)}")
        with pytest.raises(RecipeError, match=field):
            refresh_tuning.recipe_for(tmp_path / "wrong.toml", champion)
    assert refresh_tuning.recipe_for(None, champion).labelled_share > 0
    with pytest.raises(DataError, match=r"manifest\.tsv"):
        refresh(Options(options.models, options.work, options.labels, data=tmp_path / "none", encoder=True))


def test_a_refresh_is_as_deep_as_the_encoder_was_trained() -> None:
    encoder = {f"blocks.{i}.{name}": np.full(2, float(i < 4)) for i in range(12) for name in ("attn.proj.weight", "mlp.fc2.bias")}
    assert refresh_tuning.depth_of(encoder) == 4


def test_a_fifth_of_the_labels_is_held_out_and_look_alikes_stay_together() -> None:
    rows = refreshed.rows(30, "x", 3)  # the classes take turns
    groups = np.arange(60) // 4 * 2 + rows.labels  # pairs of a class share a group
    held = refresh_tuning.held_out_rows(refit.Weighted(rows, np.ones(60), groups, []))
    assert all(len(set(held[groups == name].tolist())) == 1 for name in groups)
    for label in (0, 1):
        assert 5 <= held[rows.labels == label].sum() <= 8
    few = rows.at(np.arange(8))
    assert not refresh_tuning.held_out_rows(refit.Weighted(few, np.ones(8), np.arange(8), [])).any()


def test_too_few_labels_and_a_second_job_leave_everything_as_it_is(options: Options) -> None:
    from dataclasses import replace

    outcome = refresh(replace(options, min_labels=13))
    assert outcome.kind == "kept" and "12 labels with an image are new to the encoder; at least 13" in outcome.reason
    with hold(options.work / "lock", 0), pytest.raises(RefreshError, match="another refresh"):
        refresh(options)
    assert current(options) == "1"


@pytest.mark.slow
def test_a_worse_encoder_is_not_promoted(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = refresh(options)
    assert outcome.kind == "kept" and outcome.reason == "the candidate did not pass the gate"
    assert any(rule.name.startswith("labelled ai_generated") for rule in outcome.rules) and current(options) == "1"
    monkeypatch.setattr(Steps, "run", lambda *_: pytest.fail("worked again"))
    assert "no new labels since" in refresh(options).reason


class Cut(BaseException):
    """Stands for SIGKILL."""


STEPS = ("embed", "corpus", "labelled", "tune", "replay", "refit", "calibrate", "evaluate")


@pytest.mark.slow
def test_cut_at_every_step_and_inside_the_training_it_ends_the_same(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from train.pretrain import Run

    passes(monkeypatch)
    shutil.copytree(options.models, tmp_path / "alone")
    alone = replace(options, models=tmp_path / "alone", work=tmp_path / "alone-work")
    assert refresh(alone).version == "1-r1"
    for point in STEPS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
            cut_after(patch, point)
            refresh(options)
        if point == "labelled":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
                cut_training(patch, Run)
                refresh(options)
            assert list((options.work / "encoder").glob("training-*/last.pt"))
        assert current(options) == "1", point
    said: list[str] = []
    assert refresh(options, said.append).version == "1-r1"
    assert "tune: done before" in said and not list((options.work / "encoder").glob("training-*"))
    found = [bundle.load(folder / "1-r1") for folder in (options.models, alone.models)]
    assert found[0].manifest.encoder.sha256 == found[1].manifest.encoder.sha256
    assert found[0].manifest.heads.sha256 == found[1].manifest.heads.sha256
    assert found[0].manifest.thresholds == found[1].manifest.thresholds

    after, before = found[0], bundle.load(options.models / "1")
    assert after.manifest.encoder.sha256 != before.manifest.encoder.sha256
    assert after.manifest.parents[0].digest == before.digest
    facts: Any = after.manifest.metrics["refresh"]
    assert facts["encoder"]["steps"] == 3 and facts["encoder"]["labelled"] == 7 and facts["encoder"]["held_out"] == 5
    assert "The encoder of 1 trained on: 3 steps" in (after.path / "MODEL_CARD.md").read_text()
    assert (options.models / "TRAINING.md").read_text().count(facts["encoder"]["encoder_sha256"]) == 1
    carried = replay.of_bundle(after)
    assert carried is not None and len(carried["labels"].facts) == 12 and len(carried["tuned"].facts) == 7
    # The same labels again: the encoder has learned all of them that it may see.
    assert "5 labels with an image are new to the encoder" in refresh(options).reason


def cut_after(patch: pytest.MonkeyPatch, point: str) -> None:
    run = Steps.run

    def cut_run(self: Steps, name: str, inputs: Any, make: Callable[[Path], Any]) -> Any:
        result = run(self, name, inputs, make)
        if name == point:
            raise Cut
        return result

    patch.setattr(Steps, "run", cut_run)


def cut_training(patch: pytest.MonkeyPatch, kind: Any) -> None:
    """After a checkpoint of the first step."""
    step = kind.train_step

    def cut_step(self: Any, batch: Any) -> Any:
        if self.step == 1:
            self.save()
            raise Cut
        return step(self, batch)

    patch.setattr(kind, "train_step", cut_step)


@pytest.mark.slow
def test_learned_labels_without_their_images_are_dropped_and_counted(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    passes(monkeypatch)
    champion = bundle.load(options.models)
    parts = replay.of_bundle(champion)
    assert parts is not None
    gone = refreshed.rows(4, "gone", 8)
    learned = Embedded(gone.embedding, gone.facts)
    data = replay.encode({**parts, replay.LABELS: learned}, champion.manifest.encoder.sha256)
    monkeypatch.setattr(replay, "read_replay", lambda _: data)
    said: list[str] = []
    assert refresh(options, said.append).kind == "promoted"
    assert any(line.startswith("8 labels that the champion has learned are dropped") for line in said)
    carried = replay.decode(bundle_replay(options.models / "1-r1"), bundle.load(options.models).manifest.encoder.sha256, "x")
    assert len(carried["labels"].facts) == 12


def bundle_replay(folder: Path) -> bytes:
    return (folder / "replay.safetensors").read_bytes()
