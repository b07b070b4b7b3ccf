"""Two real processes under torchrun on gloo: they train as one, stop together, and one that dies ends the other in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.train.pictures import corpus  # noqa: E402
from train.__main__ import main  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]

RECIPE = """
seed = 3
cross_entropy_weight = 1.0
ema_decay = 0.5
bf16 = false
[[phases]]
steps = {steps}
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


def _torchrun(data: Path, out: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / f"{out.name}.toml"
    recipe.write_text(RECIPE.format(steps=steps))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "train", "pretrain", "--recipe", str(recipe), "--data", str(data)]
    return subprocess.Popen(
        [*command, "--out", str(out), "--workers", "1", "--checkpoint-every-s", "1", *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=200)
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
    deadline = time.monotonic() + 150
    while not (out / "last.pt").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no checkpoint: {process.communicate()[0]}")
        time.sleep(0.1)


def test_two_processes_train_to_the_end_and_resume_what_was_cut(data: Path, tmp_path: Path) -> None:
    for name, arguments in (("whole", ()), ("cut", ("--stop-after", "2"))):
        code, said = _ended(_torchrun(data, tmp_path / name, 2, *arguments))
        assert code == 0, said
    code, said = _ended(_torchrun(data, tmp_path / "cut", 2))
    assert code == 0 and "resumed at step 2 of 4" in said, said
    whole, cut = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    facts = json.loads((tmp_path / "whole" / "facts.json").read_text())
    assert "4 of 4, 128 views" in facts["summary"]["steps"]
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert state["world_size"] == 2 and state["step"] == 4
    # Another number of processes would draw other records.
    recipe = str(tmp_path / "whole.toml")
    assert main(["pretrain", "--recipe", recipe, "--data", str(data), "--out", str(tmp_path / "whole")]) == 2


def test_a_rank_that_dies_ends_the_others_with_one_line(data: Path, tmp_path: Path) -> None:
    process = _torchrun(data, tmp_path / "run", 100_000)
    _trained(process, tmp_path / "run")
    os.kill(_ranks(process)[1], signal.SIGKILL)
    code, said = _ended(process)
    assert code != 0
    ours = [line for line in said.splitlines() if line.startswith("train pretrain: ")]
    assert len(ours) == 1 and "rank 0: another process is gone" in ours[0], said
    assert "[rank0]: Traceback" not in said


def test_sigterm_stops_all_ranks_after_the_same_step(data: Path, tmp_path: Path) -> None:
    process = _torchrun(data, tmp_path / "run", 100_000)
    _trained(process, tmp_path / "run")
    for pid in _ranks(process):
        os.kill(pid, signal.SIGTERM)
    code, said = _ended(process)
    assert code == 0, said
    assert f"encoder.safetensors: the averaged encoder after {_step(tmp_path / 'run')} steps" in said


def _step(out: Path) -> int:
    return int(torch.load(out / "last.pt", weights_only=True)["step"])
