"""The refresh as one job: promoted, kept, repeated, reversed; and cut off anywhere, it ends as it would have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from engine import bundle
from engine.bundle import BundleError
from engine.file_lock import hold
from tests.train import refreshed
from train import agreement, evaluate, refresh_end, refresh_steps, replay, rollback
from train.data import DataError
from train.embed import Embedded
from train.labels_images import Allowed
from train.labels_sample import record
from train.refresh import Options, Outcome, RefreshError, refresh
from train.refresh_job import Steps, read_json

# Bootstraps and fits of a few seconds; on a machine that is shared by many, minutes.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings from the image's name, and no backends to compare: what they compute is tested elsewhere."""

    def embedded(detector: object, images: Any, damage: Any, on_image: object = None) -> Embedded:
        facts = [f for f, _ in images]
        return Embedded(refreshed.np.array([refreshed.embedding_of(f.key, f.label) for f in facts], "f4").reshape(-1, 192), facts)

    monkeypatch.setattr(refresh_steps, "embed_labelled", embedded)
    monkeypatch.setattr(evaluate, "RESAMPLES", 40)
    monkeypatch.setattr(evaluate, "LADDER_RESAMPLES", 10)
    nothing = {"reference": "torch", "crops": 1, "compared": [], "not_run": []}
    monkeypatch.setattr(agreement, "measure", lambda *_: nothing)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return refreshed.models(tmp_path_factory.mktemp("shipped") / "models")


@pytest.fixture
def options(tmp_path: Path, shipped: Path) -> Options:
    """A copy of the shipped model, and a dozen labels of a kind of image that it does not know."""
    import shutil

    shutil.copytree(shipped, tmp_path / "models")
    file = refreshed.decisions(tmp_path / "sample")
    allowed = Allowed(folders=(tmp_path / "sample" / "images",))
    return Options(tmp_path / "models", tmp_path / "work", labels=(file,), allowed=allowed, backend="null")


def current(options: Options) -> str:
    return bundle.load(options.models).manifest.version


def relabel(options: Options, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    (file,) = options.labels
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(one) + "\n" for one in change(records)))


def test_labels_are_learned_promoted_with_lineage_and_not_learned_twice(options: Options) -> None:
    before = bundle.load(options.models)
    said: list[str] = []
    outcome = refresh(options, said.append)
    assert outcome == Outcome("promoted", "every rule of the gate holds", "1-r1", outcome.rules) and outcome.rules
    after = bundle.load(options.models)
    assert after.manifest.version == "1-r1" and after.manifest.parents[0].digest == before.digest
    assert after.manifest.encoder.sha256 == before.manifest.encoder.sha256
    new = refreshed.np.array([refreshed.embedding_of(f"{i:08x}", 1) for i in range(50)], "f4")
    threshold = {b.digest: b.manifest.thresholds["linear"]["fpr_0.01"].threshold for b in (before, after)}
    share = [
        (b.manifest.calibration["linear"].apply(b.heads.raw_scores(new)[:, 0]).astype(float) >= threshold[b.digest]).mean()
        for b in (before, after)
    ]
    assert share[0] < 0.2 and share[1] > 0.8, "the new kind is found now"
    assert after.manifest.thresholds["linear"]["fpr_0.01"].fpr <= 0.02
    facts = after.manifest.metrics["refresh"]
    assert isinstance(facts, dict) and facts["labels"]["learned"] == 12  # type: ignore[index, call-overload]
    card = (after.path / "MODEL_CARD.md").read_text()
    assert "12 human decisions, 12 of them new" in card and "Random weights, for tests." in card
    carried = replay.of_bundle(after)
    assert carried is not None and len(carried["labels"].facts) == 12 and len(carried["evaluate/clean"].facts) == 120

    again = refresh(options)
    assert (again.kind, again.version) == ("kept", "1-r1") and "0 new labels" in again.reason
    # The next dozen: the images of the first need not be had again, and the card of the model it all began with stays once.
    for file in (options.work / "images").rglob("*"):
        if file.is_file():
            file.unlink()
    more = refreshed.decisions(options.work / "more", seed=1)
    with options.labels[0].open("a") as stream:
        stream.write(more.read_text())
    folders = (*options.allowed.folders, options.work / "more" / "images")
    second = refresh(Options(options.models, options.work, options.labels, allowed=Allowed(folders=folders), backend="null"))
    assert (second.kind, second.version) == ("promoted", "1-r2")
    card = (options.models / "1-r2" / "MODEL_CARD.md").read_text()
    assert "24 human decisions, 12 of them new" in card and card.count("Random weights, for tests.") == 1


@pytest.mark.slow
def test_a_reversed_label_is_unlearned_from_its_embedding_alone(options: Options) -> None:
    assert refresh(options).kind == "promoted"
    carried = replay.of_bundle(bundle.load(options.models))
    assert carried is not None

    def reverse(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        extra = []
        for one in records:
            sha256, first = one["image"]["sha256"], one["record_id"]
            extra.append({**one, "type": "appeal", "record_id": f"a{first}", "against": first, "by": "bob"})
            extra.append(record(sha256, 0, "bob", 1, record_id=f"r{first}", previous=first))
        return [*records, *extra]

    relabel(options, reverse)
    none = Options(options.models, options.work / "elsewhere", options.labels, backend="null")
    outcome = refresh(none)
    # Twelve reals where a generator was: whether the gate lets them through is its business; they were asked about.
    assert "new labels" not in outcome.reason and outcome.rules
    held = [rule for rule in outcome.rules if rule.name.startswith("labelled authentic")]
    assert held and "12 held-out labels" in held[0].detail


def test_too_few_labels_and_labels_without_pictures_keep_the_champion(options: Options) -> None:
    said: list[str] = []
    blind = Options(options.models, options.work, options.labels, backend="null")
    outcome = refresh(blind, said.append)
    assert outcome.kind == "kept" and "0 new labels with an image; at least 10" in outcome.reason
    assert any("12 passed over: image not to be had: no reference that may be opened" in line for line in said)
    relabel(options, lambda records: records[:9])
    assert refresh(options).reason.startswith("9 new labels")
    assert current(options) == "1"


def test_a_worse_candidate_is_not_promoted_and_not_computed_again(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(champion: Any, parts: Any, labelled: Any) -> dict[str, Any]:
        return {"ai_generated": {"images": 12, "champion": 0.9, "candidate": 0.7}}

    monkeypatch.setattr(refresh_steps, "held_out", spoilt)
    outcome = refresh(options)
    assert outcome.kind == "kept" and [rule.name for rule in outcome.rules if not rule.passed] == [
        "labelled ai_generated: no worse"
    ]
    monkeypatch.setattr(Steps, "run", lambda *_: pytest.fail("worked again"))
    again = refresh(options)
    assert again.kind == "kept" and "no new labels since the last answer" in again.reason
    assert current(options) == "1" and sorted(p.name for p in options.models.iterdir() if p.is_dir()) == ["1"]


@pytest.mark.slow
def test_flipped_labels_do_not_pass_the_gate(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody calls everything that looks like the known generators authentic."""

    def like_a_fake(detector: object, images: Any, damage: Any, on_image: object = None) -> Embedded:
        facts = [f for f, _ in images]
        vectors = refreshed.rows(len(facts), "x", 77).embedding[1::2] * 1.2
        return Embedded(vectors.astype("f4"), facts)

    monkeypatch.setattr(refresh_steps, "embed_labelled", like_a_fake)
    monkeypatch.setattr("train.refit.WHOLE", 0.1)
    monkeypatch.setattr("train.refit.MAX_SHARE", 50.0)
    relabel(options, lambda records: [one | {"label": "authentic"} for one in records])
    outcome = refresh(options)
    assert outcome.kind == "kept" and current(options) == "1"
    failed = [rule.name for rule in outcome.rules if not rule.passed]
    assert any("no worse" in name and "sources" in name for name in failed), failed


def test_what_was_learned_from_does_not_judge(options: Options) -> None:
    parts = refreshed.replay_parts()
    judge = parts["evaluate/jpeg75"]
    labelled = Embedded(judge.embedding[:6] * 2, judge.facts[:3] + parts["train"].facts[:3])
    left = refresh_steps.without_lookalikes(parts, labelled)
    gone = {f.key for f in judge.facts} - {f.key for f in left["evaluate/jpeg75"].facts}
    assert gone == {f.key for f in judge.facts[:6]} and len(left["evaluate/clean"].facts) == len(left["evaluate/jpeg75"].facts)
    assert left["train"] is parts["train"]


@pytest.mark.slow
def test_rolled_back_it_stays_away(options: Options) -> None:
    assert refresh(options).kind == "promoted"
    assert rollback.rollback(options.models)[0] == "1-r1" and current(options) == "1"
    assert refresh(options).kind == "kept" and current(options) == "1"
    elsewhere = Options(options.models, options.work / "other", options.labels, allowed=options.allowed, backend="null")
    outcome = refresh(elsewhere)
    assert outcome.kind == "kept" and "rolled back" in outcome.reason and current(options) == "1"


class Cut(BaseException):
    """Stands for SIGKILL: nothing in the job may catch it."""


POINTS = [f"{step}, {when}" for step in ("embed", "refit", "calibrate", "evaluate") for when in ("begun", "unfinished", "done")]
PROMOTION = ["write", "written", "published", "answered"]


@pytest.mark.slow
def test_cut_at_any_point_and_started_again_it_ends_the_same(options: Options, tmp_path: Path, shipped: Path) -> None:
    """One job, cut at each point in turn, against one that was left alone."""
    import shutil

    models = tmp_path / "alone"
    shutil.copytree(shipped, models)
    alone = Options(models, tmp_path / "alone-work", options.labels, allowed=options.allowed, backend="null")
    assert refresh(alone).kind == "promoted"
    for point in [*POINTS, *PROMOTION]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
            cut_at(patch, point)
            refresh(options)
        assert current(options) == ("1" if point not in ("published", "answered") else "1-r1"), point
    outcome = refresh(options)
    # After the last cut the job had been answered for good; asked again there is nothing new.
    assert outcome.kind == "promoted" and outcome.version == "1-r1"
    assert refresh(options).kind == "kept"
    assert refreshed.plain(options.models / "1-r1") == refreshed.plain(models / "1-r1")
    assert not list((options.work / "steps").glob(".*.tmp")) and read_json(options.work / "promoting.json") is None


def cut_at(patch: pytest.MonkeyPatch, point: str) -> None:
    """Arms one cut."""
    step, _, when = point.partition(", ")
    run = Steps.run

    def cut_run(self: Steps, name: str, inputs: Any, make: Callable[[Path], Any]) -> Any:
        if name != step:
            return run(self, name, inputs, make)

        def cut_make(folder: Path) -> Any:
            if when == "begun":
                raise Cut
            result = make(folder)
            if when == "unfinished":
                raise Cut
            return result

        run(self, name, inputs, cut_make)
        raise Cut

    if when:
        patch.setattr(Steps, "run", cut_run)
        return
    write, publish, answered = refresh_steps.write_bundle, bundle.publish, refresh_end._answered

    def cut_write(folder: Path, draft: Any) -> Any:
        if folder.parent.name != "models":
            return write(folder, draft)
        if step == "write":
            raise Cut
        write(folder, draft)
        raise Cut

    def cut_publish(*given: Any) -> Any:
        publish(*given)
        raise Cut

    def cut_answered(*given: Any) -> Any:
        answered(*given)
        raise Cut

    if step in ("write", "written"):
        patch.setattr(refresh_steps, "write_bundle", cut_write)
    elif step == "published":
        patch.setattr(bundle, "publish", cut_publish)
    else:
        patch.setattr(refresh_end, "_answered", cut_answered)


def test_two_jobs_exclude_each_other(options: Options) -> None:
    options.work.mkdir()
    with hold(options.work / "lock", 0), pytest.raises(RefreshError, match="another refresh"):
        refresh(options)


@pytest.mark.slow
def test_a_champion_that_changed_meanwhile_is_not_replaced(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = refresh_steps.label_rules

    def meanwhile(found: Any) -> Any:
        refreshed.models(options.models.parent / "other", version="2")
        (options.models.parent / "other" / "2").rename(options.models / "2")
        bundle.publish(options.models, "2")
        return rules(found)

    monkeypatch.setattr(refresh_steps, "label_rules", meanwhile)
    with pytest.raises(RefreshError, match="meanwhile"):
        refresh(options)
    assert current(options) == "2"


def test_what_cannot_be_refreshed_is_named(options: Options, tmp_path: Path) -> None:
    bare = refreshed.models(tmp_path / "bare", carried=False)
    with pytest.raises(DataError, match=r"carries no replay\.safetensors.*--data"):
        refresh(Options(bare, tmp_path / "w", options.labels, backend="null"))
    with pytest.raises(DataError, match="folder of versions"):
        refresh(Options(options.models / "1", tmp_path / "w", options.labels, backend="null"))
    with pytest.raises(BundleError, match="no such folder"):
        refresh(Options(tmp_path / "nowhere", tmp_path / "w", options.labels, backend="null"))
