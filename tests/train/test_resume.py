"""A run that was cut ends as one that was not: at any step, from a store and from shards, with probes, and after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.train.pictures import corpus  # noqa: E402
from tests.train.shards import d3  # noqa: E402
from tests.train.tiny import encoder, recipe  # noqa: E402
from train import checkpoints, shard_index  # noqa: E402
from train.data import read_manifest  # noqa: E402
from train.pretrain import PretrainError, Run, train  # noqa: E402
from train.ranks import Ranks  # noqa: E402
from train.recipe import Phase, Recipe  # noqa: E402
from train.sources import SHARD_INDEX  # noqa: E402
from train.store import build  # noqa: E402

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store and an index of shards."""
    root = tmp_path_factory.mktemp("resume")
    build(read_manifest(corpus(root / "in"), "train"), root / "store", lambda rgb: 255 - rgb)
    shard_index.build(d3(root / "d3"), root / "shards" / SHARD_INDEX)
    return {"store": root / "store", "shards": root / "shards"}


def _recipe(kind: str) -> Recipe:
    aligned = 0.4 if kind == "store" else 0.0
    first = Phase(3, 3, 5, "native", "platform", aligned=aligned, depth=1)
    return recipe(warmup_steps=2, probe_every=3, clip_norm=1.0, phases=(first, Phase(5, 2, 5, "paper", "code", depth=2)))


class _Probe:
    """Accuracies from the weights themselves, so that a wrong average or memory shows."""

    def accuracy(self, _encoder: Any, weights: dict[str, torch.Tensor]) -> float:
        return float(weights["norm.weight"].double().sum() % 1)


def _run(data: Path, folder: Path, kind: str) -> Run:
    return Run(_recipe(kind), data, folder, encoder=encoder())


def _state(run: Run) -> dict[str, Any]:
    return {
        "model": run.trainee.state_dict(),
        "average": run.average,
        "optimiser": run.optimiser.state_dict(),
        "watch": run.watch.state(),
        "exported": run.encoder_weights(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module", params=["store", "shards"])
def uncut(request: pytest.FixtureRequest, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The kind of data and the state of the run that nothing interrupted."""
    torch.set_num_threads(1)  # as in the tests: sums in another order are other sums
    run = _run(data[request.param], tmp_path_factory.mktemp("uncut"), request.param)
    assert train(run, workers=0, probe=_Probe()) == STEPS
    return request.param, _state(run)


@pytest.mark.parametrize("cut", range(STEPS + 1))
def test_a_run_cut_at_any_step_ends_with_the_very_same_state(
    uncut: tuple[str, Any], data: dict[str, Path], tmp_path: Path, cut: int
) -> None:
    kind, expected = uncut
    assert train(_run(data[kind], tmp_path, kind), workers=0, probe=_Probe(), stop_after=cut) == cut
    torch.manual_seed(cut)
    resumed = _run(data[kind], tmp_path, kind)
    assert resumed.resume() and resumed.step == cut
    assert train(resumed, workers=0, probe=_Probe()) == STEPS
    assert _same(_state(resumed), expected)


def _trainer(data: Path, out: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-m", "tests.train.trainer_process", str(data), str(out)], cwd=root)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_costs_no_more_than_the_steps_since_the_checkpoint(data: dict[str, Path], tmp_path: Path) -> None:
    from tests.train.trainer_process import STEPS as LONGER

    assert _trainer(data["store"], tmp_path / "whole").wait(300) == 0
    killed_at = []
    for least in (2, 6):
        process = _trainer(data["store"], tmp_path / "cut")
        deadline = time.monotonic() + 300
        while (step := _step(tmp_path / "cut")) < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        killed_at.append(step)
    assert killed_at[0] >= 2 and killed_at[1] >= 6
    assert _trainer(data["store"], tmp_path / "cut").wait(300) == 0
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == LONGER
    for part in ("model", "average", "optimiser"):
        assert _same(whole[part], cut[part])


def _step(folder: Path) -> int:
    path = folder / "last.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


def test_a_checkpoint_of_other_data_or_another_number_of_processes_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    _run(data["shards"], tmp_path, "shards").save()
    tiny = _recipe("shards")
    with pytest.raises(PretrainError, match="made from other data"):
        Run(tiny, data["store"], tmp_path, encoder=encoder()).resume()
    path = tmp_path / "last.pt"
    torch.save({**torch.load(path, weights_only=True), "world_size": 4}, path)
    run = Run(tiny, data["shards"], tmp_path, encoder=encoder(), ranks=Ranks.alone())
    with pytest.raises(PretrainError, match="made by 4 processes, not 1"):
        run.resume()
    assert run.resume(other_world_size=True)


def test_a_checkpoint_of_the_first_format_is_read(data: dict[str, Path], tmp_path: Path) -> None:
    run = _run(data["store"], tmp_path, "store")
    train(run, workers=0, stop_after=2)
    state = torch.load(run.checkpoint, weights_only=True)
    old = {key: state[key] for key in ("recipe", "model", "average", "optimiser", "step", "train_seconds")}
    torch.save({"format": "code-pretrain/1", **old}, run.checkpoint)
    resumed = _run(data["store"], tmp_path, "store")
    assert resumed.resume() and resumed.step == 2
    assert _same(resumed.trainee.state_dict(), run.trainee.state_dict())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable checkpoint"),
        (b"PK\x03\x04 torn", "not a readable checkpoint"),
        (None, "format 'other/1' is none of"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "last.pt"
    if content is None:
        torch.save({"format": "other/1"}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(PretrainError, match=says) as caught:
        checkpoints.read(path, torch.device("cpu"))
    assert str(path) in str(caught.value)
