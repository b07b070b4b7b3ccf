"""Which Apache Kafka the tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import conftest
from tests.conftest import cluster_script


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "cluster"
    monkeypatch.setattr(conftest, "BESIDE_THE_CHECKOUT", script)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return script


def test_the_variable_wins_over_the_script_beside_the_checkout(beside: Path) -> None:
    beside.touch()
    assert cluster_script({}) == (str(beside), "")
    assert cluster_script({"KAFKA_CLUSTER": "/opt/mine"}) == ("/opt/mine", "")


@pytest.mark.parametrize("value", ["", "none"])
def test_the_variable_switches_off(beside: Path, value: str) -> None:
    beside.touch()
    assert cluster_script({"KAFKA_CLUSTER": value}) == (None, "KAFKA_CLUSTER switches the tests on Apache Kafka off")


def test_a_clone_elsewhere_skips_with_one_line(beside: Path) -> None:
    script, reason = cluster_script({})
    assert script is None
    assert reason.count("\n") == 0


def test_without_java_there_is_no_kafka(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside.touch()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert cluster_script({}) == (None, "no Apache Kafka: java is not installed (17 or later)")
