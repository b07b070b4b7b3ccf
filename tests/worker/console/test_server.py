"""The console's server on a real broker: roles, forged requests, links, two replicas, appeals, restarts."""

from __future__ import annotations

import io
import json
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.conftest import unique_settings
from tests.worker.console.stage import TOKENS, ConsoleProcess, Producer, label_records, picture, run_console, verdict
from worker.embedded import EmbeddedBroker, free_port
from worker.settings import KafkaSettings

pytestmark = [pytest.mark.slow, pytest.mark.broker]


def key_of(found: dict[str, Any]) -> str:
    return f"sha256:{found['image']['sha256']}"


def wait_for(console: ConsoleProcess, found: dict[str, Any]) -> dict[str, Any]:
    """The entry of a verdict, once the console has read it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status, entry = console.call("GET", f"api/entry?entry={key_of(found)}", person="ada")
        if status == 200 and entry["count"]:
            return entry
        time.sleep(0.05)
    raise AssertionError("the verdict was not read")


def claim(console: ConsoleProcess, person: str, found: dict[str, Any]) -> bool:
    status, answer = console.call("POST", "api/claim", {"entry": key_of(found)}, person)
    assert status == 200, answer
    return bool(answer["claimed"])


def decide(
    console: ConsoleProcess, person: str, found: dict[str, Any], decision: str, label: str, **more: Any
) -> tuple[int, Any]:
    content = {"entry": key_of(found), "decision": decision, "label": label, "reason": "source", "previous": None, **more}
    return console.call("POST", "api/decide", content, person)


def session(console: ConsoleProcess, person: str) -> tuple[str, str]:
    """Cookie and CSRF token of a signed-in page."""
    request = urllib.request.Request(f"{console.url}/api/session", json.dumps({"token": TOKENS[person]}).encode(), method="POST")
    with urllib.request.urlopen(request) as answer:
        cookie = answer.headers["Set-Cookie"].split(";")[0]
    status, me = console.call("GET", "api/me", headers={"Cookie": cookie})
    assert status == 200
    return cookie, me["csrf"]


def test_strangers_get_the_shell_and_nothing_else(console: ConsoleProcess) -> None:
    with urllib.request.urlopen(console.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert b"<main" in answer.read()
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for path in ("api/live", "api/queue", "api/verdict?event_id=x", "api/decided", "image?ref=x", "api/entry?entry=x"):
        assert console.call("GET", path)[0] == 401, path
    for path in ("api/claim", "api/decide", "api/appeal", "api/release", "api/trial"):
        assert console.call("POST", path, {})[0] == 401, path
    assert console.call("POST", "api/session", {"token": "x" * 20})[0] == 401
    assert console.call("GET", "api/me") == (200, {"signed_in": False, "auth": "token"})


def test_a_viewer_may_not_write(console: ConsoleProcess, producer: Producer) -> None:
    found = producer.judged(seed=21, score=0.5)
    wait_for(console, found)
    for path in ("api/claim", "api/decide", "api/appeal", "api/release"):
        status, answer = console.call("POST", path, {"entry": key_of(found)}, "victor")
        assert status == 403 and "viewer" in answer["error"], path


def test_forged_requests_are_refused(console: ConsoleProcess, producer: Producer) -> None:
    found = producer.judged(seed=22, score=0.5)
    wait_for(console, found)
    cookie, csrf = session(console, "ada")
    body = {"entry": key_of(found)}
    forged: list[dict[str, str]] = [
        {},
        {"X-CSRF-Token": "x"},
        {"X-CSRF-Token": session(console, "ada")[1]},  # of another session
        {"X-CSRF-Token": csrf, "Origin": "https://evil.example"},
        {"X-CSRF-Token": csrf, "Origin": "null"},
        {"X-CSRF-Token": csrf, "Sec-Fetch-Site": "cross-site"},
        {"Authorization": "Bearer x"},
    ]
    for headers in forged:
        status, _ = console.call("POST", "api/claim", body, headers={"Cookie": cookie, **headers})
        assert status in (401, 403), headers
    assert console.call("GET", f"api/entry?entry={key_of(found)}", person="ada")[1]["holder"] is None
    status, answer = console.call(
        "POST", "api/claim", body, headers={"Cookie": cookie, "X-CSRF-Token": csrf, "Origin": console.url}
    )
    assert status == 200 and answer["claimed"]


def test_images_come_by_links_that_are_good_for_one_person(console: ConsoleProcess, producer: Producer) -> None:
    found = producer.judged(seed=23, score=0.1)
    deadline = time.monotonic() + 10
    while (answer := console.call("GET", f"api/picture?event_id={found['event_id']}", person="ada"))[0] == 404:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    link = answer[1]["link"]
    request = urllib.request.Request(f"{console.url}/{link}", headers={"Authorization": f"Bearer {TOKENS['ada']}"})
    with urllib.request.urlopen(request) as shown:
        assert shown.headers["Content-Type"] == "image/webp"
        assert PIL.Image.open(io.BytesIO(shown.read())).size == (480, 360)
    assert console.call("GET", link, person="grace")[0] == 403
    assert console.call("GET", link)[0] == 401
    assert console.call("GET", link[:-2] + "zz", person="ada")[0] == 403
    assert console.call("GET", "image?ref=https://example.org/a.jpg", person="ada")[0] == 403


def test_an_image_that_was_exchanged_is_not_shown(console: ConsoleProcess, producer: Producer) -> None:
    place = producer.upload(picture(24), "exchanged")
    producer.publish(
        verdict("exchanged", 0.5, "ab" * 32, place),
        verdict("another's", 0.5, "ac" * 32, place),
        verdict("elsewhere", 0.5, "ad" * 32, place._replace(topic="secrets")),
        verdict("gone", 0.5, "ae" * 32, place._replace(offset=10_000)),
    )
    said = {"exchanged": "another image now", "another's": "another event", "elsewhere": "none of this", "gone": "no longer"}
    for event_id, words in said.items():
        deadline = time.monotonic() + 10
        path = f"api/picture?event_id={urllib.request.quote(event_id)}"
        while (answer := console.call("GET", path, person="ada"))[0] == 404:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert answer[1]["link"] is None
        assert words in answer[1]["unavailable"], event_id


def test_a_decision_needs_a_claim_a_reason_and_the_label_that_was_seen(console: ConsoleProcess, producer: Producer) -> None:
    found = producer.judged(seed=25, score=0.6)
    wait_for(console, found)
    assert decide(console, "ada", found, "confirm", "ai_generated")[0] == 409
    assert claim(console, "ada", found)
    for status, decision, label, more in (
        (400, "confirm", "ai_generated", {"reason": None}),
        (400, "confirm", "ai_generated", {"reason": "other"}),
        (400, "confirm", "ai_generated", {"note": "x" * 3000}),
        (400, "assign", "authentic", {}),
        (400, "shrug", "authentic", {}),
        (409, "confirm", "authentic", {}),
        (409, "confirm", "ai_generated", {"previous": "something"}),
    ):
        assert decide(console, "ada", found, decision, label, **more)[0] == status, (decision, label, more)
    assert decide(console, "grace", found, "confirm", "ai_generated")[0] == 409
    assert decide(console, "ada", found, "confirm", "ai_generated")[0] == 200
    assert decide(console, "ada", found, "confirm", "ai_generated")[0] == 409


def test_an_image_without_a_score_is_given_a_label(console: ConsoleProcess, producer: Producer) -> None:
    found = verdict("undecodable", None, "ba" * 32, reason="decode.corrupt")
    producer.publish(found)
    wait_for(console, found)
    assert claim(console, "ada", found)
    assert decide(console, "ada", found, "confirm", "authentic")[0] == 400
    assert decide(console, "ada", found, "assign", "authentic")[0] == 200


def test_two_replicas_and_one_image(console: ConsoleProcess, second_console: ConsoleProcess, producer: Producer) -> None:
    for seed in range(30, 35):
        found = producer.judged(seed=seed, score=0.5)
        wait_for(console, found)
        wait_for(second_console, found)
        with ThreadPoolExecutor(2) as both:
            asked = {who: both.submit(claim, where, who, found) for who, where in (("ada", console), ("grace", second_console))}
        taken = {who: answer.result() for who, answer in asked.items()}
        assert sorted(taken.values()) == [False, True], taken
        (winner,) = [name for name, won in taken.items() if won]
        loser, replica = ("grace", second_console) if winner == "ada" else ("ada", console)
        assert decide(replica, loser, found, "confirm", "ai_generated")[0] == 409
        assert wait_for(replica, found)["holder"] == winner


def test_appeal_and_reversal_by_somebody_else(
    console: ConsoleProcess, second_console: ConsoleProcess, producer: Producer, topics: KafkaSettings
) -> None:
    found = producer.judged(seed=26, score=0.6)
    wait_for(console, found)
    assert claim(console, "ada", found)
    assert decide(console, "ada", found, "confirm", "ai_generated")[0] == 200
    assert console.call("POST", "api/appeal", {"entry": key_of(found), "note": ""}, "grace")[0] == 400
    assert console.call("POST", "api/appeal", {"entry": key_of(found), "note": "I drew it"}, "grace")[0] == 200
    assert console.call("POST", "api/appeal", {"entry": key_of(found), "note": "again"}, "grace")[0] == 409
    entry = wait_for(console, found)
    assert entry["open"] and entry["appeal"]["note"] == "I drew it"
    first = entry["decision"]["record_id"]
    assert claim(console, "ada", found)
    assert decide(console, "ada", found, "overturn", "authentic", previous=first)[0] == 403
    console.call("POST", "api/release", {"entry": key_of(found)}, "ada")
    wait_for(second_console, found)
    deadline = time.monotonic() + 5
    while not claim(second_console, "grace", found):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert decide(second_console, "grace", found, "overturn", "authentic", previous=first)[0] == 200
    records = [r for r in label_records(topics) if r["entry"] == key_of(found) and r["type"] in ("decision", "appeal")]
    assert [r["type"] for r in records] == ["decision", "appeal", "decision"]
    assert records[2]["previous"] == records[0]["record_id"]
    assert records[2]["appeal"] == records[1]["record_id"]
    assert records[2]["reverses"] is True
    assert records[2]["earlier"] == [{"record_id": first, "by": "ada", "label": "ai_generated"}]
    status, listed = console.call("GET", f"api/decided?search={found['event_id']}", person="victor")
    assert status == 200 and [row["decision"]["label"] for row in listed["entries"]] == ["authentic"]


def test_a_restart_knows_what_was_decided(
    console: ConsoleProcess, producer: Producer, topics: KafkaSettings, console_files: tuple[Path, Path, Path]
) -> None:
    found, waiting = producer.judged(seed=27, score=0.6), producer.judged(seed=28, score=0.6)
    wait_for(console, found)
    assert claim(console, "ada", found)
    assert decide(console, "ada", found, "overturn", "authentic")[0] == 200
    bundle, policy, folder = console_files
    with ConsoleProcess(topics, bundle, policy, folder / "third.log") as fresh:
        assert wait_for(fresh, found)["decision"]["label"] == "authentic"
        assert wait_for(fresh, waiting)["open"]
        assert claim(fresh, "grace", waiting)


def test_a_trial_leaves_no_trace(console: ConsoleProcess, topics: KafkaSettings) -> None:
    status, answer = console.call("POST", "api/trial?tenant=acme", picture(29), "victor")
    assert status == 200 and answer["trial"] is True
    assert answer["verdict"]["tenant"] == "acme"
    assert 0 <= answer["verdict"]["score"] <= 1
    assert len(answer["evidence"]["neighbours"]) == 6
    assert all(0 <= window["p"] <= 1 for window in answer["evidence"]["windows"])
    status, answer = console.call("POST", "api/trial", b"no image", "victor")
    assert status == 200 and answer["unavailable"].startswith("decode.unsupported")
    assert console.call("POST", "api/trial", b"", "victor")[0] == 400
    assert console.call("POST", "api/trial", b"x" * (20 * 2**20 + 1), "victor")[0] == 413


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"entry": 5}', b'{"entry": "sha256:nope"}', b'{"a":' * 5000])
def test_nonsense_is_refused_in_one_line(console: ConsoleProcess, body: bytes) -> None:
    status, answer = console.call("POST", "api/claim", body, "ada")
    assert status in (400, 404, 413)
    assert "Traceback" not in answer["error"]


@pytest.mark.parametrize("query", ["label=nope", "action=nope", "low=2", "low=x", "high=nan"])
def test_wrong_filters_are_refused(console: ConsoleProcess, query: str) -> None:
    assert console.call("GET", f"api/live?{query}", person="ada")[0] == 400


def test_without_sign_in_only_this_machine_is_answered(
    producer: Producer, topics: KafkaSettings, console_files: tuple[Path, Path, Path]
) -> None:
    bundle, policy, folder = console_files
    with ConsoleProcess(topics, bundle, policy, folder / "open.log", CONSOLE__AUTH="none") as opened:
        assert opened.call("GET", "api/me")[1]["name"] == "developer"
        connection = HTTPConnection("127.0.0.1", opened.port, timeout=10)
        connection.request("GET", "/api/me", headers={"Host": "evil.example"})  # a name pointed here (DNS rebinding)
        assert connection.getresponse().status == 403
        connection.close()
        assert opened.call("POST", "api/claim", {"entry": "x"})[0] == 403, "a CSRF token is needed here too"


def test_a_proxy_names_who_asks(topics: KafkaSettings, producer: Producer, console_files: tuple[Path, Path, Path]) -> None:
    bundle, policy, folder = console_files
    named = {"X-Forwarded-User": "grace", "X-Forwarded-Groups": "staff,code-reviewers"}
    found = producer.judged(seed=41, score=0.5)
    with ConsoleProcess(topics, bundle, policy, folder / "proxied.log", CONSOLE__AUTH="header") as proxied:
        assert proxied.call("GET", "api/me")[1]["signed_in"] is False
        status, me = proxied.call("GET", "api/me", headers=named)
        assert (me["name"], me["role"]) == ("grace", "reviewer")
        body = {"entry": key_of(found)}
        assert proxied.call("POST", "api/claim", body, headers=named)[0] == 403, "the proxy alone is no proof of intent"
        status, answer = proxied.call("POST", "api/claim", body, headers={**named, "X-CSRF-Token": me["csrf"]})
        assert status == 200 and answer["claimed"]
        assert proxied.call("POST", "api/session", {"token": TOKENS["ada"]})[0] == 404


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_with_a_page_open(
    topics: KafkaSettings, producer: Producer, console_files: tuple[Path, Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    bundle, policy, _ = console_files
    with ConsoleProcess(topics, bundle, policy, tmp_path / "log", CONSOLE__AUTH="none") as ending:
        with urllib.request.urlopen(f"{ending.url}/api/live", timeout=10) as page:
            page.readline()
            code, seconds = ending.end(number)
        assert code == 0
        assert seconds < 10
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_wrong_settings_end_it_with_one_line() -> None:
    for settings, code, words in (
        ({}, 2, "WORKER_CONSOLE__TOKENS: required"),
        (
            {
                "CONSOLE__AUTH": "none",
                "CONSOLE__PORT": "0",
                "KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}",
                "KAFKA__STARTUP_TIMEOUT_S": "2",
            },
            3,
            "Kafka",
        ),
    ):
        done = run_console(**settings)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_broker_that_goes_away_is_told_and_waited_for(
    browser: Any, tmp_path: Path, console_files: tuple[Path, Path, Path]
) -> None:
    bundle, policy, _ = console_files
    with EmbeddedBroker() as broker:
        own = unique_settings(broker.bootstrap)
        Producer(own).close()
        with ConsoleProcess(own, bundle, policy, tmp_path / "log", CONSOLE__AUTH="none") as console:
            page = browser.new_page()
            page.goto(console.url)
            page.wait_for_selector("#sample")
            broker.kill()
            page.wait_for_selector("#connection:has-text('The broker does not answer')", timeout=20_000)
            assert console.call("GET", "readyz")[0] == 503
            assert console.call("GET", "livez")[0] == 200
            broker.restart()  # empty: the embedded broker keeps nothing
            producer = Producer(own)
            deadline = time.monotonic() + 20
            while page.locator("text=after-the-break").count() == 0:
                assert time.monotonic() < deadline
                producer.publish(verdict("after-the-break", 0.1))
                page.wait_for_timeout(500)
            page.wait_for_selector("#connection", state="hidden", timeout=10_000)
            producer.close()
            page.close()
