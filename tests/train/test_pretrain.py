"""Pretraining: a cut run ends as an uncut one, a broken loss stops before the step, the task can be learned."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.train.pictures import corpus  # noqa: E402
from tests.train.tiny import encoder, recipe  # noqa: E402
from train.data import read_manifest  # noqa: E402
from train.pretrain import NonFiniteLossError, PretrainError, Progress, Run, learning_rate, train  # noqa: E402
from train.recipe import Recipe  # noqa: E402
from train.store import PixelStore, build  # noqa: E402
from train.views import Sampler, batch_at  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    build(read_manifest(corpus(folder / "in"), "train"), folder / "store", lambda rgb: 255 - rgb)
    return folder / "store"


def _run(store: Path, folder: Path, tiny: Recipe) -> Run:
    return Run(tiny, store, folder, encoder=encoder())


def test_a_checkpoint_of_another_recipe_is_refused(store: Path, tmp_path: Path) -> None:
    _run(store, tmp_path, recipe()).save()
    with pytest.raises(PretrainError, match="another recipe"):
        _run(store, tmp_path, recipe(seed=6)).resume()


def test_a_loss_that_is_not_finite_stops_before_the_step(store: Path, tmp_path: Path) -> None:
    run = _run(store, tmp_path, recipe())
    with torch.no_grad():
        run.trainee.encoder.norm.weight[0] = math.nan
    before = {name: p.clone() for name, p in run.trainee.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"step 0: the loss is nan; .*weights are not finite either"):
        run.train_step(batch_at(Sampler(PixelStore(store), 0.5), run.recipe, 0))
    assert not run.checkpoint.exists()  # broken weights never replace what was saved
    assert run.step == 0
    for name, p in run.trainee.named_parameters():
        assert torch.equal(p.isnan(), before[name].isnan()) and torch.equal(p.nan_to_num(), before[name].nan_to_num())


def test_finite_weights_are_saved_before_a_loss_that_is_not_finite_ends_the_run(store: Path, tmp_path: Path) -> None:
    run = _run(store, tmp_path, recipe(temperature=1e-45))
    before = {name: p.clone() for name, p in run.trainee.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"last\.pt holds the state before this step"):
        train(run, workers=0)
    kept = torch.load(run.checkpoint, weights_only=True)
    assert kept["step"] == 0 and all(torch.equal(kept["model"][name], p) for name, p in before.items())


class _Falling:
    """A probe whose accuracy only falls after the second time."""

    def __init__(self) -> None:
        self.accuracies = iter((0.5, 0.9, 0.8, 0.7, 0.6))

    def accuracy(self, _encoder: object, _weights: object) -> float:
        return next(self.accuracies)


def test_the_probe_stops_the_run_and_its_best_weights_are_the_encoder(store: Path, tmp_path: Path) -> None:
    tiny = recipe(steps=40, probe_every=2, patience=3)
    run, told = _run(store, tmp_path / "a", tiny), []
    assert train(run, workers=0, probe=_Falling(), on_probe=lambda *seen: told.append(seen)) == 10
    assert told == [(2, 0.5), (4, 0.9), (6, 0.8), (8, 0.7), (10, 0.6)] and run.watch.best_step == 4
    short = _run(store, tmp_path / "b", tiny)
    train(short, workers=0, stop_after=4)
    assert all(torch.equal(w, short.encoder_weights()[name]) for name, w in run.encoder_weights().items())
    again = _run(store, tmp_path / "a", tiny)
    assert again.resume() and train(again, workers=0) == 10  # what patience ended stays ended


def test_blocks_beyond_the_first_phases_depth_start_as_identities(store: Path, tmp_path: Path) -> None:
    run = _run(store, tmp_path, recipe(depth=1))
    batch = batch_at(Sampler(PixelStore(store), 0.5), run.recipe, 0)
    with torch.no_grad():
        shallow, _ = run.trainee(batch.patches, batch.index, 1)
        deep, _ = run.trainee(batch.patches, batch.index, 2)
    assert torch.equal(shallow, deep)


def test_it_learns_what_tells_the_classes_apart(store: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    tiny = recipe(
        steps=40, records=6, tokens=8, strength_from=0.0, strength_to=0.0, aligned=0.0, learning_rate=3e-3, whitened_filters=12
    )
    run = _run(store, tmp_path, tiny)
    train(run, workers=0, line_every_s=0.0, on_progress=seen.append)
    assert sum(p.accuracy for p in seen[-10:]) / 10 > 0.8
    assert seen[-1].contrastive < seen[0].contrastive - 0.5
    assert run.views == 40 * 6 * 2 * 4


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    tiny = recipe(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.0)
    rates = [learning_rate(tiny, s) for s in range(110)]
    assert rates[0] == pytest.approx(1e-6) and rates[10] == 1.0 and rates[60] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[-1] < 1e-3


def test_written_out_attention_gives_the_gradients_of_the_fused_kernel(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(few: int) -> list[torch.Tensor]:
        monkeypatch.setattr("train.pretrain.FEW_TOKENS", few)
        run = _run(store, tmp_path, recipe())
        run.gradients(batch_at(Sampler(PixelStore(store), 0.5), run.recipe, 0))
        return [p.grad for p in run.trainee.parameters() if p.grad is not None]

    fused, written_out = gradients(0), gradients(64)
    assert len(fused) == len(written_out) > 10
    for one, other in zip(fused, written_out, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
