"""The settings of an overlay's pods."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.manifests import environment
from worker import settings as settings_module
from worker.settings import Settings

Read = Callable[[str], Settings]


@pytest.fixture
def settings_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads the settings as a pod of an overlay does, with files for what its Secret must hold."""

    def read(overlay: str) -> Settings:
        values = environment(f"overlays/{overlay}")
        secrets = Path(tempfile.mkdtemp(dir=tmp_path))
        if "WORKER_KAFKA__SASL_MECHANISM" in values:
            (secrets / "WORKER_KAFKA__SASL_USERNAME").write_text("someone")
            (secrets / "WORKER_KAFKA__SASL_PASSWORD").write_text("something")
        for variable in [*os.environ]:
            if variable.startswith("WORKER_"):
                monkeypatch.delenv(variable)
        for variable, value in {**values, "WORKER_SECRETS_DIR": str(secrets)}.items():
            monkeypatch.setenv(variable, value)
        return settings_module.load()

    return read
