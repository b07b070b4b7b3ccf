"""Two real processes under torchrun on gloo: they train as one, stop together, and one that dies ends the other in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.train.pictures import corpus  # noqa: E402
from tests.train.tiny import encoder, recipe  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.data import read_manifest  # noqa: E402
from train.pretrain import Run  # noqa: E402
from train.store import PixelStore, build  # noqa: E402
from train.views import Batch, Sampler, batch_at  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
PATIENCE_S = 800
ROOT = Path(__file__).parents[2]

RECIPE = """
seed = 3
cross_entropy_weight = 1.0
ema_decay = 0.5
bf16 = false
[[phases]]
steps = 100000
records = 2
tokens = 4
depth = 1
geometry = "native"
preset = "platform"
aligned = 0.5
[[phases]]
steps = 2
records = 2
tokens = 4
depth = 2
geometry = "native"
preset = "platform"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("torchrun") / "data", reals=4, fakes=4)


def _torchrun(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    toml = out.parent / f"{out.name}.toml"
    toml.write_text(RECIPE)
    given = ["--recipe", str(toml), "--data", str(data), "--out", str(out), "--workers", "1", "--checkpoint-every-s", "1"]
    return _launch("train", "pretrain", *given, *more)


def _launch(module: str, *arguments: str) -> subprocess.Popen[str]:
    # The static rendezvous: the c10d one takes a launcher for dead that gets no processor for 15 s.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-addr=127.0.0.1"]
    return subprocess.Popen(
        [*command, f"--master-port={port}", "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"torchrun did not end: {said}")
    return process.returncode, said


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    """The trainers, in rank order: torchrun's own children."""
    psutil = pytest.importorskip("psutil")
    children = psutil.Process(process.pid).children()
    return [c.pid for c in sorted(children, key=lambda c: int(c.environ().get("RANK", 0))) if "pretrain" in c.cmdline()]


def _trained(process: subprocess.Popen[str], out: Path) -> None:
    """Waits for the first checkpoint."""
    deadline = time.monotonic() + PATIENCE_S
    while not (out / "last.pt").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no checkpoint: {process.communicate()[0]}")
        time.sleep(0.1)


def test_gradients_through_ddp_are_those_of_one_process_with_the_joined_batch(data: Path, tmp_path: Path) -> None:
    build(read_manifest(data, "train"), tmp_path / "store", lambda rgb: 255 - rgb)
    code, said = _ended(_launch("tests.train.ddp_gradients", str(tmp_path / "store"), str(tmp_path)))
    assert code == 0, said
    run = Run(recipe(depth=1), tmp_path / "store", tmp_path / "one", encoder=encoder())
    sampler = Sampler(PixelStore(tmp_path / "store"), 0.5)
    parts = [batch_at(sampler, run.recipe, 0, rank) for rank in (0, 1)]
    # Views and sides first, records last: joined along the records.
    patches, index = (
        torch.cat([x.view(4, 2, 3, *x.shape[1:]) for x in given], dim=2).flatten(0, 2)
        for given in ([b.patches for b in parts], [b.index for b in parts])
    )
    numbers = run.gradients(Batch(patches, index, 6, 0))
    expected = {name: p.grad for name, p in run.trainee.named_parameters() if p.grad is not None}
    assert len(expected) > 10 and "encoder.blocks.1.norm1.weight" not in expected
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["contrastive"], numbers["contrastive"].detach(), atol=1e-6, rtol=0)
        assert got["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got["gradients"][name], gradient, atol=1e-6, rtol=0, msg=name)


def test_a_rank_that_dies_ends_the_others_with_one_line(data: Path, tmp_path: Path) -> None:
    process = _torchrun(data, tmp_path / "run")
    _trained(process, tmp_path / "run")
    os.kill(_ranks(process)[1], signal.SIGKILL)
    code, said = _ended(process)
    assert code != 0
    ours = [line for line in said.splitlines() if line.startswith("train pretrain: ")]
    assert len(ours) == 1 and "rank 0: another process is gone" in ours[0], said
    assert "[rank0]: Traceback" not in said


def test_sigterm_stops_all_ranks_after_the_same_step_and_the_run_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = _torchrun(data, cut)
    _trained(process, cut)
    for pid in _ranks(process):
        os.kill(pid, signal.SIGTERM)
    code, said = _ended(process)
    assert code == 0, said
    state = torch.load(cut / "last.pt", weights_only=True)
    step = int(state["step"])
    assert f"encoder.safetensors: the averaged encoder after {step} steps" in said and state["world_size"] == 2
    for out in (cut, whole):
        code, said = _ended(_torchrun(data, out, "--stop-after", str(step + 2)))
        assert code == 0, said
        assert (f"resumed at step {step} of" in said) == (out == cut)
    assert (whole / "encoder.safetensors").read_bytes() == (cut / "encoder.safetensors").read_bytes()
    facts = json.loads((whole / "facts.json").read_text())
    assert f"{step + 2} of 100002, {(step + 2) * 2 * 2 * 8} views" in facts["summary"]["steps"]
    # Another number of processes would draw other records.
    assert main(["pretrain", "--recipe", str(tmp_path / "whole.toml"), "--data", str(data), "--out", str(whole)]) == 2
