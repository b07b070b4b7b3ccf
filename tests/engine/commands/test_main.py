"""`python -m engine` as a process: exit codes, one clear line, quiet ends, and no heavy import for --help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from engine.__main__ import COMMANDS
from tests.engine.bundles import random_bundle

# The command line with the null backend in the place of the one that `auto` would take: fast, and torch stays out.
WITH_NULL = """
import sys, time
from engine import backends
from engine.backends.null import NullBackend
from engine.__main__ import main
class Slow(NullBackend):
    def _infer(self, crops):
        time.sleep({delay})
        return super()._infer(crops)
backends.AUTO_ORDER = ("slow",)
backends._CLASSES["slow"] = ("__main__", "Slow")
sys.exit(main())
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "1").path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(200):
        PIL.Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i:03}.png")
    return folder


def start(*arguments: object, delay: float = 0.0, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITH_NULL.format(delay=delay), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def engine(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "engine", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_help_names_every_command() -> None:
    done = engine("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
import sys
from engine.__main__ import main
try:
    main([{command!r}, "--help"])
finally:
    heavy = {{"torch", "openvino", "tensorrt", "onnx", "scipy", "sklearn", "PIL", "rich"}} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m engine {command} ")
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("train",), "invalid choice: 'train'"),
        (("classify",), "the following arguments are required: PATH"),
        (("classify", "x", "--head", "svm"), "invalid choice: 'svm'"),
        (("classify", "x", "--batch-size", "0"), "must be at least 1"),
        (("classify", "x", "--threads", "-1"), "--threads"),
        (("classify", "/no/such/file"), "engine classify: /no/such/file: no such file or folder"),
        (("classify", "."), "engine classify: BUNDLE: holds neither manifest.json nor CURRENT"),
        (("classify", ".", "--precision", "bf16"), "--precision needs a --backend"),
        (("bench", "--batch-sizes", "1,x"), "batch sizes are whole numbers"),
        (("inspect", "/no/such/bundle"), "engine inspect: /no/such/bundle: no such folder"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_one_line_and_2(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    if arguments == ("classify", "."):
        arguments, line = (*arguments, "--bundle", str(tmp_path)), line.replace("BUNDLE", str(tmp_path))
    done = engine(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_a_backend_that_cannot_run_is_one_line_and_2(bundle: Path, images: Path) -> None:
    done = engine("classify", images, "--bundle", bundle, "--backend", "torch", "--device", "cuda:99")
    assert done.returncode == 2 and done.stdout == ""
    assert "engine classify: backend torch does not run here (device cuda:99)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_damaged_bundle_is_one_line_and_2(tmp_path: Path, images: Path) -> None:
    folder = random_bundle(tmp_path / "1").path
    (folder / "encoder.safetensors").write_bytes(b"damaged")
    for command in (("classify", images, "--bundle", folder), ("inspect", folder), ("bench", "--bundle", folder)):
        done = engine(*command)
        assert done.returncode == 2 and done.stdout == ""
        assert "encoder.safetensors: its SHA-256 is" in done.stderr and done.stderr.count("\n") == 1


def test_a_device_that_fails_is_one_line_and_1(bundle: Path, images: Path) -> None:
    code = WITH_NULL.format(delay=0).replace("time.sleep(0)", "raise backends.base.DeviceError('the device fell off the bus')")
    done = subprocess.run(
        [sys.executable, "-c", code, "classify", str(images), "--bundle", str(bundle)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "engine classify: the device fell off the bus\n")


def test_ctrl_c_ends_with_130_and_silence(bundle: Path, images: Path) -> None:
    process = start("classify", images, "--bundle", bundle, "--json", "--batch-size", 1, delay=0.1)
    assert process.stdout is not None
    # Rows are flushed when the buffer is full: the first bytes tell that the work is under way.
    assert process.stdout.read(1) == "{"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == ""


def test_ctrl_c_while_the_model_loads(bundle: Path, images: Path) -> None:
    code = WITH_NULL.format(delay=0).replace(
        "def _infer", "def _load(self, bundle):\n        print('loading', flush=True)\n        time.sleep(20)\n    def _infer"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "classify", str(images), "--bundle", str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")


def test_a_closed_pipe_is_quiet(bundle: Path, images: Path) -> None:
    process = start("classify", images, "--bundle", bundle, "--json", delay=0.05)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=20)
    assert process.returncode == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_full_disk_is_one_line(bundle: Path, images: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        code = WITH_NULL.format(delay=0)
        done = subprocess.run(
            [sys.executable, "-c", code, "classify", str(images), "--bundle", str(bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == "engine classify: output: No space left on device\n"


def test_names_in_another_encoding_do_not_end_the_command(bundle: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9 \xe2\x82\xac.png"
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for arguments in ([], ["--json"]):
        process = start("classify", tmp_path, "--bundle", bundle, *arguments, env=environment)
        output, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        assert "authentic" in output


@pytest.mark.timing
def test_the_commands_answer_fast(bundle: Path) -> None:
    started = time.monotonic()
    engine("classify", "--help")
    assert time.monotonic() - started < 10, "0.4 s on an idle machine: importing torch alone takes longer"
