"""The child's own limits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(program: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=30, check=False)


def test_processor_time_is_bounded_should_the_parent_fail_to_look() -> None:
    done = run("from worker.stages.decode_process import _limit_cpu\n_limit_cpu(0.5)\nwhile True: pass")
    assert done.returncode == -signal.SIGXCPU


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_address_space_is_counted_from_the_start() -> None:
    done = run(
        "from worker.stages.decode_process import _limit\n_limit(1 << 28)\n"
        "kept = bytearray(200 << 20)\n"
        "try: more = bytearray(100 << 20)\n"
        "except MemoryError: print('refused')"
    )
    assert done.stdout == b"refused\n"


def test_an_orphan_ends_at_once() -> None:
    done = run("from worker.stages.decode_process import _detach\n_detach(1 << 22)\nprint('lives')")
    assert done.returncode == 1
    assert done.stdout == b""


def test_loads_no_broker_no_settings_and_no_backend() -> None:
    done = run(
        "import sys\nimport worker.stages.decode_process\n"
        "heavy = {'kafka', 'redis', 'torch', 'pydantic', 'structlog', 'httpx', 'obstore', 'prometheus_client'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    assert done.stdout == b"[]\n", done.stderr
