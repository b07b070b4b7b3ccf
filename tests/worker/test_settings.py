"""Settings: precedence, unknown names, one clear line a field, secrets never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker import settings, settings_table
from worker.errors import ConfigurationError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("WORKER_"):
            monkeypatch.delenv(name)


def problems(**environment: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(ConfigurationError) as caught:
            settings.load()
    return caught.value.problems


def test_contract_defaults() -> None:
    loaded = settings.load()
    assert loaded.kafka.group_id == "code-worker"
    assert loaded.kafka.upload_topics == ("image.uploads",)
    assert loaded.kafka.verdict_topic == "image.verdicts"
    assert loaded.kafka.retry_topic == "image.uploads.retry"
    assert loaded.kafka.dead_letter_topic == "image.uploads.dead"
    assert loaded.kafka.label_topic == "image.labels"
    assert loaded.http.port == 8080
    assert loaded.http.host == "127.0.0.1"
    assert not loaded.kafka.create_topics
    assert not loaded.fetch.allow_private_addresses
    assert loaded.fetch.file_roots == ()


def test_environment_beats_secrets_beats_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text(
        '[kafka]\ngroup_id = "file"\nsasl_username = "file"\nverdict_topic = "v"\nupload_topics = ["a", "b"]\n'
    )
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "..data").mkdir()
    (secrets / "WORKER_KAFKA__SASL_USERNAME").write_text("secret\n")
    (secrets / "kafka__sasl_password").write_text("hunter2\n")
    monkeypatch.setenv("WORKER_CONFIG", str(tmp_path / "worker.toml"))
    monkeypatch.setenv("WORKER_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("WORKER_KAFKA__GROUP_ID", "env")
    kafka = settings.load().kafka
    assert (kafka.group_id, kafka.sasl_username, kafka.verdict_topic, kafka.upload_topics) == ("env", "secret", "v", ("a", "b"))
    assert kafka.sasl_password is not None
    assert kafka.sasl_password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(kafka)


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_KAFKA__UPLOAD_TOPICS", "a, b,")
    monkeypatch.setenv("WORKER_FETCH__FILE_ROOTS", "/a,/b")
    monkeypatch.setenv("WORKER_BATCH__PREFERRED_BATCH_SIZE", "4,8")
    loaded = settings.load()
    assert loaded.kafka.upload_topics == ("a", "b")
    assert loaded.fetch.file_roots == (Path("/a"), Path("/b"))
    assert loaded.batch.preferred_sizes == (4, 8)


def test_each_wrong_field_is_named_in_a_line() -> None:
    lines = problems(WORKER_HTTP__PORT="x", WORKER_KAFKA__FOO="1", WORKER_NOPE__A="1", WORKER_DECODE__MAX_PIXELS="0")
    assert len(lines) == 4
    text = "\n".join(lines)
    for name in ("WORKER_HTTP__PORT", "WORKER_KAFKA__FOO", "WORKER_NOPE__A", "WORKER_DECODE__MAX_PIXELS"):
        assert name in text


def test_service_links_of_kubernetes_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_PORT_8080_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("WORKER_SERVICE_HOST", "10.0.0.1")
    settings.load()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORKER_SHUTDOWN__DRAIN_S": "400"}, "max_poll_interval_ms"),
        ({"WORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL"}, "sasl_mechanism"),
        ({"WORKER_KAFKA__SASL_MECHANISM": "PLAIN"}, "sasl_password"),
        ({"WORKER_KAFKA__RETRY_TOPIC": "image.uploads"}, "must all differ"),
        ({"WORKER_BATCH__PREFERRED_BATCH_SIZE": "64"}, "max_batch_size"),
        ({"WORKER_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
        ({"WORKER_SECRETS_DIR": "/nowhere"}, "not a folder"),
    ],
)
def test_cross_checks(environment: dict[str, str], words: str) -> None:
    assert any(words in line for line in problems(**environment))


def test_a_wrong_toml_file_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[kafka\n")
    assert "bad.toml" in problems(WORKER_CONFIG=str(bad))[0]
    bad.write_text("[kafka]\nnope = 1\n[odd]\nx = 1\n")
    text = "\n".join(problems(WORKER_CONFIG=str(bad)))
    assert "nope" in text.lower()
    assert "odd" in text.lower()


def test_a_wrong_secret_file_is_named_and_no_value_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    line = problems(WORKER_SECRETS_DIR=str(tmp_path))[0]
    assert "token" in line
    assert "hunter2" not in line


def test_secrets_never_appear_in_problems() -> None:
    lines = problems(
        WORKER_KAFKA__SASL_PASSWORD="hunter2",
        WORKER_KAFKA__SASL_MECHANISM="PLAIN",
        WORKER_CACHE__URL="redis://:pw@h",
        WORKER_CACHE__TTL_S="x",
    )
    assert "hunter2" not in str(lines)
    assert "pw@" not in str(lines)


def test_the_readme_lists_every_setting() -> None:
    readme = Path("README.md").read_text()
    assert settings_table.rewritten(readme) == readme, "run: python -m worker.settings_table"


def test_a_transaction_may_not_outlive_its_member() -> None:
    (problem,) = problems(
        WORKER_KAFKA__DELIVERY="exactly_once",
        WORKER_KAFKA__TRANSACTION_TIMEOUT_MS="60000",
        WORKER_KAFKA__MAX_POLL_INTERVAL_MS="60000",
    )
    assert "transaction_timeout_ms must be shorter than kafka.max_poll_interval_ms" in problem
