"""`worker schema` writes three schemas, or says what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from worker.__main__ import main
from worker.contracts.schemas import all_schemas


def test_it_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["schema", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "dead_letter.schema.json",
        "event.schema.json",
        "verdict.schema.json",
    ]
    for path in out.iterdir():
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in all_schemas()]
    assert main(["schema", "--out", str(out)]) == 0  # again


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["schema", "--out", str(tmp_path / "file" / "x")]) == 2
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert "--out" in written


def test_the_folder_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["schema"])
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err
