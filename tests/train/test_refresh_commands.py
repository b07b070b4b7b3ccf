"""The commands: exit codes, one clear line, a sample of labels, shards of labelled images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from tests.train import refreshed
from tests.train.pictures import corpus
from train import refresh as refresh_module
from train import refresh_commands
from train.__main__ import main
from train.data import Damage, read_shard
from train.labels_topic import KafkaOptions, TopicError, options_from, read_labels
from train.refresh import Outcome


def test_exit_codes_of_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["refresh", "--models", str(tmp_path / "m"), "--work", str(tmp_path / "w"), "--labels", str(tmp_path / "l")]
    assert main(arguments) == refresh_commands.BAD
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "m") in error

    def ends(outcome: Outcome | Exception):  # type: ignore[no-untyped-def]
        def refresh(options: object, say: object) -> Outcome:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(refresh_module, "refresh", refresh)

    ends(Outcome("promoted", "good", "1-r1"))
    assert main(arguments) == 0 and "promoted 1-r1" in capsys.readouterr().out
    ends(Outcome("kept", "no new labels", "1"))
    assert main(arguments) == 3 and "kept champion 1" in capsys.readouterr().out
    assert main([*arguments, "--ok-if-kept"]) == 0
    for trouble in (TopicError("no broker"), refresh_module.RefreshError("another"), OSError(28, "No space left on device")):
        ends(trouble)
        assert main(arguments) == 1
    assert len({refresh_commands.PROMOTED, refresh_commands.FAILED, refresh_commands.BAD, refresh_commands.KEPT}) == 4


@pytest.mark.parametrize(
    "wrong",
    [["--expected-share", "1.5"], ["--expected-share", "0.1"], ["--min-labels", "0"], ["--unlabelled", "x"], ["--nothing"]],
)
def test_bad_arguments_are_one_line_and_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["refresh", "--models", "m", "--work", "w", *wrong])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_no_broker_is_a_failure_that_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.labels_topic.CONNECT_S", 1.0)
    assert main(["labels", "show", "--bootstrap", "127.0.0.1:1"]) == 1
    assert "image.labels: cannot be read" in capsys.readouterr().err
    assert main(["labels", "show", "--labels", str(tmp_path / "none.jsonl")]) == 2
    with pytest.raises(TopicError):
        read_labels(KafkaOptions(bootstrap_servers=("127.0.0.1:1",)))


def test_settings_are_the_workers(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text('[kafka]\nbootstrap_servers = ["t:1"]\nlabel_topic = "from.file"\nmax_in_flight = 3\n')
    (tmp_path / "WORKER_KAFKA__SASL_PASSWORD").write_text("hush\n")
    environ = {"WORKER_CONFIG": str(tmp_path / "w.toml"), "WORKER_SECRETS_DIR": str(tmp_path),
               "WORKER_KAFKA__BOOTSTRAP_SERVERS": "a:1, b:2", "WORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
               "WORKER_KAFKA__SSL_CHECK_HOSTNAME": "false", "WORKER_KAFKA__GROUP_ID": "g"}  # fmt: skip
    options = options_from(environ)
    assert options.bootstrap_servers == ("a:1", "b:2") and options.label_topic == "from.file"
    assert options.sasl_password == "hush" and "hush" not in repr(options)
    consumer = options.consumer()
    assert consumer["sasl_plain_password"] == "hush" and consumer["ssl_check_hostname"] is False
    assert "group_id" not in consumer, "reading joins no group and commits nothing"


def test_a_sample_from_a_folder_and_shards_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out, shards = corpus(tmp_path / "data", reals=4, fakes=4), tmp_path / "sample", tmp_path / "shards"
    arguments = ["labels", "sample", "--data", str(data), "--generator", "machine", "--count", "3", "--reals", "2", "--out"]
    assert main([*arguments, str(out)]) == 0
    assert main([*arguments, str(tmp_path / "again")]) == 0
    assert (out / "labels.jsonl").read_bytes() == (tmp_path / "again" / "labels.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["labels", "show", "--labels", str(out / "labels.jsonl")]) == 0
    assert "5 records, 5 labels: 3 AI-generated, 2 authentic" in capsys.readouterr().out
    packing = ["pack", "--from-labels", "--labels", str(out / "labels.jsonl"), "--images", str(out / "images"), "--out"]
    assert main([*packing, str(shards)]) == 0
    damage = Damage()
    records = [record for shard in sorted(shards.glob("*.tar")) for record in read_shard(shard, damage)]
    assert len(records) == 5 and sum(record.real is not None for record in records) == 2 and not damage.skipped
    assert {meta["source"] for record in records for meta in record.meta.values()} == {"labels"}
    assert main(["labels", "sample", "--data", str(data), "--generator", "nobody", "--out", str(out)]) == 2
    assert "generators are machine" in capsys.readouterr().err


def test_pack_needs_one_of_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["pack", "--out", "x"], ["pack", "--out", "x", "--data", "y", "--from-labels"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_made_up_samples_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = refreshed.decisions(tmp_path / "1", 2, 1), refreshed.decisions(tmp_path / "2", 2, 1)
    assert first.read_bytes() == second.read_bytes()
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert [line["label"] for line in lines] == ["ai_generated", "ai_generated", "authentic"]
    assert all((tmp_path / "1" / "images" / line["image"]["sha256"]).is_file() for line in lines)
