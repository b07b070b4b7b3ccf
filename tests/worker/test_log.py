"""One JSON object a line, from us and from other libraries, and never a secret."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from kafka.errors import Cancelled, KafkaTimeoutError
from pydantic import SecretStr

from tests.worker.fake_clock import FakeClock
from worker.log import RateLimit, configure, mask_credentials, mask_urls, silence
from worker.settings import LogSettings


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def written(level: str = "INFO", form: str = "json") -> io.StringIO:
    out = io.StringIO()
    logging.getLogger().handlers.clear()  # pytest's own see every line too, and raise on wrong arguments
    configure(LogSettings(level=level, format=form), out)  # type: ignore[arg-type]
    return out


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_is_an_object_with_its_keys() -> None:
    out = written()
    structlog.get_logger().info("event.done", event_id="ü\n1", offset=3)
    structlog.get_logger().debug("not.this")
    (line,) = lines(out)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "event.done", "level": "info", "event_id": "ü\n1", "offset": 3}


def test_loggers_made_before_configure_follow_it() -> None:
    logger = structlog.get_logger("early")
    first = written("ERROR")
    logger.warning("dropped")
    second = written("WARNING")
    logger.warning("kept")
    assert first.getvalue() == ""
    assert [line["event"] for line in lines(second)] == ["kept"]


def test_an_exception_is_one_field_of_one_line() -> None:
    out = written()
    try:
        raise ValueError("cannot read https://user:secret@host/a?token=secret")
    except ValueError:
        structlog.get_logger().exception("stage.failed")
    (line,) = lines(out)
    assert "ValueError" in line["exception"]
    assert "secret@" not in line["exception"]
    assert "token=" not in line["exception"]


def test_secrets_and_queries_do_not_come_out() -> None:
    for form in ("json", "console"):
        out = written(form=form)
        structlog.get_logger().info(
            "x",
            secret=SecretStr("hunter2"),
            url="rediss://user:hunter2@cache:6379/0?password=hunter2",
            many=["s3://b/k?X-Amz-Signature=hunter2", {"a": "https://hunter2@h/"}],
            error=OSError("GET https://h/p?key=hunter2#hunter2 failed"),
        )
        logging.getLogger("httpx").warning("see %s", "https://h/p?key=hunter2")
        assert "hunter2" not in out.getvalue()
        assert "https://h/p" in out.getvalue()


@given(
    st.text(max_size=40),
    st.text(
        st.characters(exclude_characters=": \t\n\r/?#@\"'<>\\", exclude_categories=["Zs", "Cc", "Zl", "Zp"]),
        min_size=1,
        max_size=10,
    ),
)
def test_masking_leaves_the_rest_alone(text: str, host: str) -> None:
    if "://" not in text:
        assert mask_urls(text) == text
    assert mask_urls(f"a https://u:pw@{host}/p?q=1#f b") == f"a https://{host}/p b"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@h:6379/0", "redis://h:6379/0"),
        ("redis://u:p/w@h:6379/0?password=pw", "redis://h:6379/0"),
        ("redis://u:p?w#@h", "redis://h"),
        ("rediss://u:p@w@[::1]:6380/0", "rediss://[::1]:6380/0"),
        ("pw", "********"),
    ],
)
def test_a_password_is_masked_even_if_it_is_not_escaped(url: str, shown: str) -> None:
    assert mask_credentials(url) == shown
    assert "p/w" not in mask_urls(f"connect to {url} failed")
    assert "u:p" not in mask_urls(f"connect to {url} failed")


def test_other_libraries_log_from_warning_on_in_the_same_form() -> None:
    out = written("DEBUG")
    logging.getLogger("kafka.conn").info("not this")
    logging.getLogger("kafka.conn").warning("lost %s", "broker")
    logging.getLogger("redis").error("%d", "wrong arguments")
    first = json.loads(out.getvalue().splitlines()[0])
    assert (first["event"], first["logger"], first["level"]) == ("lost broker", "kafka.conn", "warning")
    assert "wrong arguments" not in out.getvalue()
    assert out.getvalue().count("\n") == 2


def test_what_was_cancelled_because_its_client_was_closed_is_no_news() -> None:
    out = written()
    logging.getLogger("kafka.cluster").error("Metadata refresh: failed %s", Cancelled())
    logging.getLogger("kafka.cluster").error("Metadata refresh: failed %s", KafkaTimeoutError())
    logging.getLogger("redis").error("asking: %s", Cancelled())
    assert [(line["logger"], line["event"][:8]) for line in lines(out)] == [("kafka.cluster", "Metadata"), ("redis", "asking: ")]


def test_a_higher_level_mutes_other_libraries_but_not_other_handlers() -> None:
    out = written("ERROR")
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger = logging.getLogger("kafka.net.manager")
    listener = Listener()
    logger.addHandler(listener)
    try:
        logger.warning("why it failed")
    finally:
        logger.removeHandler(listener)
    assert heard == ["why it failed"]
    assert out.getvalue() == ""


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers.clear()
    silence()
    structlog.get_logger().error("x")
    logging.getLogger("kafka").error("y")
    written_ = capfd.readouterr()
    assert written_.out + written_.err == ""


def test_other_libraries_repeat_themselves_once_in_a_while() -> None:
    clock = FakeClock()
    limit = RateLimit(10, clock)

    def passes(message: str, *arguments: object) -> logging.LogRecord | None:
        record = logging.LogRecord("kafka", logging.WARNING, "f", 1, message, arguments, None)
        return record if limit.filter(record) else None

    assert passes("lost %s", 1)
    assert not passes("lost %s", 2)
    assert not passes("lost %s", 3)
    assert passes("other")
    clock.advance(10)
    again = passes("lost %s", 4)
    assert again is not None
    assert again.suppressed == 2  # type: ignore[attr-defined]
    for number in range(5000):
        passes(f"unique {number}")
    assert len(limit._seen) <= 1000


def test_suppressed_lines_are_counted_in_the_next() -> None:
    out = written()
    clock = FakeClock()
    for filter_ in logging.getLogger().handlers[-1].filters:
        filter_._clock = clock  # type: ignore[union-attr]
    for _ in range(5):
        logging.getLogger("kafka").warning("lost")
    clock.advance(11)
    logging.getLogger("kafka").warning("lost")
    assert [line.get("suppressed") for line in lines(out)] == [None, 4]


def test_lines_of_many_threads_stay_whole() -> None:
    out = written()
    logger = structlog.get_logger()
    threads = [threading.Thread(target=lambda n=n: [logger.info("x" * 100, n=n) for _ in range(200)]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(out)) == 1600


def test_a_reader_that_is_gone_does_not_stop_the_work() -> None:
    out = written()
    out.close()
    structlog.get_logger().error("nobody reads this")
    logging.getLogger("kafka").error("nor this")
