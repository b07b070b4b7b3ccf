"""submit, watch and dead from the command line, on the embedded broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worker.kafka_topics import prepare, produce, read_all
from tests.worker.stages.test_publish import Receipts
from worker.__main__ import main
from worker.clock import Deadline
from worker.contracts import EventLimits, parse
from worker.items import Delivery, Position, Record
from worker.settings import KafkaSettings
from worker.stages.publish import Publisher

pytestmark = pytest.mark.broker


@pytest.fixture
def settings(kafka_settings: Callable[..., KafkaSettings], monkeypatch: pytest.MonkeyPatch) -> KafkaSettings:
    """Topics that exist, and an environment that names them."""
    made = prepare(kafka_settings())
    for name, value in {
        "BOOTSTRAP_SERVERS": made.bootstrap_servers[0],
        "UPLOAD_TOPICS": made.upload_topics[0],
        "VERDICT_TOPIC": made.verdict_topic,
        "RETRY_TOPIC": made.retry_topic,
        "DEAD_LETTER_TOPIC": made.dead_letter_topic,
        "STARTUP_TIMEOUT_S": "2",
    }.items():
        monkeypatch.setenv(f"WORKER_KAFKA__{name}", value)
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of three images and some other things."""
    (tmp_path / "below" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "below/b ü.PNG", "below/deep/c.webp", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(b"bytes of " + name.encode())
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path


def uploads(settings: KafkaSettings, topic: str | None = None) -> list[Record]:
    return [
        Record(Position(raw.topic, raw.partition, raw.offset, 1), raw.key, raw.value, tuple(raw.headers), raw.timestamp)
        for raw in read_all(settings, topic or settings.upload_topics[0])
    ]


LIMITS = EventLimits(max_image_bytes=2**20, max_event_bytes=2**20)


@pytest.mark.parametrize("inline", [False, True])
def test_submit_opens_folders_and_prints_ids(
    settings: KafkaSettings, images: Path, capsys: pytest.CaptureFixture[str], inline: bool
) -> None:
    options = ["--tenant", "acme", "--priority", "1", "--compression", "gzip", *(["--inline"] if inline else [])]
    assert main(["submit", str(images), "https://example.org/x.jpg?sig=1", *options]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    events = {event.event_id: event for event in (parse(record, LIMITS) for record in uploads(settings))}
    assert set(printed) == set(events)
    assert {name.removeprefix(f"{images}/") for name in printed.values()} == {
        "a.jpg",
        "below/b ü.PNG",
        "below/deep/c.webp",
        "https://example.org/x.jpg",  # what is printed bears no query
    }
    for event_id, event in events.items():
        assert (event.tenant, event.priority) == ("acme", 1)
        name = printed[event_id]
        if name.startswith("https"):
            assert event.url == "https://example.org/x.jpg?sig=1"
        elif inline:
            assert event.inline == Path(name).read_bytes()
        else:
            assert event.url == Path(name).as_uri()


def test_submit_a_single_event_by_its_id_to_a_topic(settings: KafkaSettings, images: Path) -> None:
    other = settings.retry_topic
    assert main(["submit", str(images / "a.jpg"), "--event-id", "mine", "--topic", other]) == 0
    assert [record.key for record in uploads(settings, other)] == [b"mine"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["/no/such/file.jpg"], "/no/such/file.jpg: no such file or folder"),
        (["ftp://u:secret@example.org/a.jpg?q=1"], "ftp://example.org/a.jpg: unknown scheme ftp"),
        (["https://a/b", "https://a/c", "--event-id", "x"], "--event-id is for a single file or URL"),
        (["https://a/b", "--event-id", ""], "--event-id must have 1 to 200 characters"),
    ],
)
def test_submit_refuses_in_one_line_before_it_sends_anything(
    settings: KafkaSettings, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(["submit", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert "secret" not in error


def test_submit_to_a_topic_that_does_not_exist(settings: KafkaSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "https://a/b", "--topic", "no.such.topic"]) == 3
    assert "no.such.topic" in capsys.readouterr().err


def test_submit_goes_on_after_a_file_it_cannot_send(
    settings: KafkaSettings, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_KAFKA__MAX_RECORD_BYTES", "65536")
    (images / "a.jpg").write_bytes(os.urandom(2 * 2**20))
    assert main(["submit", str(images), "--inline"]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "a.jpg: MessageSizeTooLargeError" in captured.err
    assert "1 of 3 events were not published" in captured.err


def test_submit_of_an_empty_folder(settings: KafkaSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(tmp_path)]) == 1
    assert "no images found" in capsys.readouterr().err


def verdict(event_id: str) -> bytes:
    return json.dumps(
        {
            "event_id": event_id,
            "label": "authentic",
            "score": 0.25,
            "action": "allow",
            "reason": None,
            "cache": "miss",
            "processed_at": "2026-01-02T03:04:05.678Z",
            "timings_ms": {"total": 12.3},
        }
    ).encode()


def test_watch_prints_rows_and_lines(settings: KafkaSettings, capsys: pytest.CaptureFixture[str]) -> None:
    produce(settings, settings.verdict_topic, [verdict("e-1"), b"not a verdict", b"[]", verdict("e\x1b[2J\n2")])
    assert main(["watch", "--from-beginning", "--timeout", "1.5"]) == 0
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    assert rows[0].split() == ["processed", "event", "label", "score", "action", "reason", "cache", "ms"]
    assert {tuple(row.split()) for row in rows[1:]} == {
        ("03:04:05.678", name, "authentic", "0.250", "allow", "miss", "12") for name in ("e-1", "e?[2J?2")
    }
    assert captured.err.count("is not a verdict") == 2
    assert main(["watch", "--json", "--from-beginning", "--count", "2", "--timeout", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {json.loads(line)["event_id"] for line in lines} == {"e-1", "e\x1b[2J\n2"}


@pytest.mark.timing
def test_watch_shows_only_what_comes_from_now_on_and_ends_in_time(
    settings: KafkaSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    produce(settings, settings.verdict_topic, [verdict(f"old-{number}") for number in range(20)])
    began = time.monotonic()
    assert main(["watch", "--timeout", "1"]) == 0
    assert main(["watch", "--timeout", "1", "--count", "1"]) == 1
    assert time.monotonic() - began < 10
    assert capsys.readouterr().out == ""


@pytest.fixture
def watching(settings: KafkaSettings) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`worker watch` as a process that has printed its first verdict."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        produce(settings, settings.verdict_topic, [verdict("e-1")])
        command = [sys.executable, "-m", "worker", "watch", "--json", "--from-beginning", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event_id"] == "e-1"  # flushed at once, though it goes to a pipe
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--count", "5"], 130)])
def test_watch_ends_quietly_at_ctrl_c(watching: Callable[..., subprocess.Popen[str]], arguments: list[str], code: int) -> None:
    process = watching(*arguments)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "")


def test_watch_is_quiet_when_its_reader_is_gone(watching: Callable[..., subprocess.Popen[str]], settings: KafkaSettings) -> None:
    process = watching()
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    produce(settings, settings.verdict_topic, [verdict("e-2")])
    assert process.wait(20) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


@pytest.fixture
def letters(settings: KafkaSettings) -> KafkaSettings:
    """Dead letters of several codes, one without its value, one of a foreign topic, and a stranger."""
    publisher = Publisher(settings)
    topic = settings.upload_topics[0]

    def bury(offset: int, code: str, value: bytes, origin: str = topic) -> None:
        record = Record(Position(origin, 0, offset, 1), b"event-%d" % offset, value, (("content-type", b"x/y"),), 0)
        publisher.dead_letter(record, code, f"why {offset}", Delivery(), Receipts().of("e"))

    for offset in range(3):
        bury(offset, "fetch.denied", b'{"image":{"url":"https://u:p@h/x?token=geheim"}}')
    bury(3, "decode.corrupt", b"\xff\xd8\xff")
    bury(4, "event.too_large", b"x" * (settings.max_record_bytes + 2**20))
    bury(5, "fetch.denied", b"{}", "somebody.elses.topic")
    assert publisher.close(Deadline(20))
    produce(settings, settings.dead_letter_topic, [b"a stranger"])
    return settings


def test_dead_list(letters: KafkaSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead", "list"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 6
    assert "6 dead letters: fetch.denied 4, decode.corrupt 1, event.too_large 1" in captured.err
    assert "1 records" in captured.err
    assert main(["dead", "list", "--json", "--code", "decode.corrupt", "--code", "event.too_large", "--since", "1h"]) == 0
    found = {line["code"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found["decode.corrupt"]["source"] == {"topic": letters.upload_topics[0], "partition": 0, "offset": 3}
    assert found["event.too_large"]["omitted"] == ["value"]
    assert found["event.too_large"]["value_bytes"] == letters.max_record_bytes + 2**20
    assert main(["dead", "list", "--topic", "somebody.elses.topic", "--limit", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["dead", "list", "--since", "2999-01-01T00:00:00Z"]) == 0
    assert capsys.readouterr().out == ""


def test_dead_show(letters: KafkaSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    upload = f"{letters.upload_topics[0]}/0/1"
    assert main(["dead", "show", upload, "--save", str(tmp_path / "value")]) == 0
    shown = capsys.readouterr().out
    assert f"source      {upload}" in shown
    assert "code        fetch.denied" in shown
    assert "message     why 1" in shown
    assert "header      content-type: x/y" in shown
    assert '{"image":{"url":"https://h/x"}}' in shown  # neither user nor query
    assert b"geheim" in (tmp_path / "value").read_bytes()
    place = next(line.split()[1] for line in shown.splitlines() if line.startswith("position"))
    for position in (place, f"{letters.dead_letter_topic}/{place}"):
        assert main(["dead", "show", position]) == 0
        assert capsys.readouterr().out == shown
    assert main(["dead", "show", "0/99999"]) == 1
    assert "no dead letter at 0/99999" in capsys.readouterr().err


def test_dead_replay(letters: KafkaSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead", "replay", "--all", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "would replay 4 (fetch.denied 3, decode.corrupt 1)"
    assert uploads(letters) == []
    assert main(["dead", "replay", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "replayed 4 (fetch.denied 3, decode.corrupt 1)"
    assert "left 1: its value was too large to be kept" in lines
    assert "left 1: somebody.elses.topic is no upload topic of this worker (--to says where to)" in lines
    again = uploads(letters)
    assert sorted(record.key or b"" for record in again) == [b"event-%d" % offset for offset in range(4)]
    assert {record.headers for record in again} == {(("content-type", b"x/y"),)}
    assert {record.value for record in again} == {b'{"image":{"url":"https://u:p@h/x?token=geheim"}}', b"\xff\xd8\xff"}


def test_dead_replay_of_some(letters: KafkaSettings, capsys: pytest.CaptureFixture[str]) -> None:
    topic = letters.upload_topics[0]
    assert main(["dead", "replay", f"{topic}/0/0", f"{topic}/0/3", "--code", "decode.corrupt"]) == 0
    assert capsys.readouterr().out.startswith("replayed 1 (decode.corrupt 1)")
    assert main(["dead", "replay", "--topic", "somebody.elses.topic", "--to", topic]) == 0
    assert [record.key for record in sorted(uploads(letters), key=lambda record: record.key or b"")] == [b"event-3", b"event-5"]
    assert main(["dead", "replay", "--code", "no.such.code"]) == 1
    for wrong in ([], ["--all", "--code", "x"]):
        assert main(["dead", "replay", *wrong]) == 2
    assert "say what to replay" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "nonsense"],
        ["list", "--since", "yesterday"],
        ["list", "--since", "2026-01-01T00:00:00"],
        ["list", "--limit", "0"],
        [],
    ],
)
def test_dead_refuses_wrong_arguments(settings: KafkaSettings, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["dead", *arguments])
    assert end.value.code == 2
