"""Rollback: by lineage, in one step, refused where there is nothing to go back to."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import bundle
from engine.file_lock import hold
from engine.manifest import Parent
from tests.engine.bundles import random_bundle
from train import rollback
from train.__main__ import main
from train.promote import PromoteError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Versions 1, 2 (from 1) and 3 (from 2); 3 is current."""
    parents: tuple[Parent, ...] = ()
    for version in ("1", "2", "3"):
        made = random_bundle(tmp_path / version, seed=int(version), version=version, parents=parents)
        parents = (Parent(name="random", version=version, digest=made.digest),)
    bundle.publish(tmp_path, "3")
    return tmp_path


def current(models: Path) -> str:
    return bundle.read_manifest(models)[0].version


def test_step_by_step_to_the_first_and_no_further(models: Path) -> None:
    assert rollback.rollback(models) == ("3", models / "2")
    assert rollback.rollback(models) == ("2", models / "1") and current(models) == "1"
    with pytest.raises(PromoteError, match="made from no other version"):
        rollback.rollback(models)
    assert [row["version"] for row in rollback.withdrawn(models)] == ["3", "2"]


def test_to_a_named_version_which_is_withdrawn_no_longer(models: Path) -> None:
    rollback.rollback(models)
    assert rollback.rollback(models, "3") == ("2", models / "3")
    assert [row["version"] for row in rollback.withdrawn(models)] == ["2"]
    for wrong in ("3", "9", "../x"):
        with pytest.raises((PromoteError, bundle.BundleError)):
            rollback.rollback(models, wrong)
    assert current(models) == "3"


def test_a_parent_that_is_gone_or_another_one_is_refused(models: Path) -> None:
    (models / "2").rename(models / "moved")
    with pytest.raises(PromoteError, match="not there any more"):
        rollback.rollback(models)
    random_bundle(models / "2", seed=9, version="2")
    with pytest.raises(PromoteError, match="not the bundle that 3 was made from"):
        rollback.rollback(models)
    assert current(models) == "3" and rollback.withdrawn(models) == []


def test_a_damaged_version_is_refused_before_anything_changes(models: Path) -> None:
    file = models / "2" / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(bundle.BundleError, match="heads"):
        rollback.rollback(models)
    assert current(models) == "3" and rollback.withdrawn(models) == []


def test_one_publisher_at_a_time(models: Path) -> None:
    with (
        hold(models / rollback.LOCK_FILE, 0),
        pytest.raises(PromoteError, match="another process"),
        rollback.publishing(models, 0),
    ):
        pytest.fail("two publishers")


def test_the_command_and_its_exit_codes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollback", "--models", str(models)]) == 0
    assert "instead of 3" in capsys.readouterr().out and current(models) == "2"
    assert main(["rollback", "--models", str(models), "--to", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the current one already" in error
