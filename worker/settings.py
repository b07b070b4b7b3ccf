"""Settings: environment over secret files over TOML file over defaults; read once, frozen, unknown names refused."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from worker.errors import ConfigurationError

PREFIX = "WORKER_"
CONFIG_FILE = "WORKER_CONFIG"
SECRETS_DIR = "WORKER_SECRETS_DIR"

Port = Annotated[int, Field(ge=0, le=65535)]
CommaSeparated = Annotated[tuple[str, ...], NoDecode]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _split_commas(cls, value: object, info: Any) -> object:
        field = cls.model_fields[info.field_name]
        if isinstance(value, str) and str(field.annotation).startswith("tuple["):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value


class KafkaSettings(_Group):
    """The bus."""

    bootstrap_servers: CommaSeparated = Field(("localhost:9092",), min_length=1, description="host:port, comma-separated")
    group_id: str = Field("code-worker", min_length=1, description="consumer group")
    group_instance_id: str | None = Field(None, description="static membership: a name that outlives a restart (the pod's)")
    upload_topics: CommaSeparated = Field(
        ("image.uploads",), min_length=1, description="topics of upload events, comma-separated"
    )
    verdict_topic: str = Field("image.verdicts", min_length=1, description="where verdicts go")
    retry_topic: str = Field("image.uploads.retry", min_length=1, description="where transient failures wait")
    dead_letter_topic: str = Field("image.uploads.dead", min_length=1, description="where events go that cannot be scored")
    label_topic: str = Field(
        "image.labels", min_length=1, description="human decisions, written by the console, read by training"
    )
    create_topics: bool = Field(False, description="create missing topics at start (broker's default partitions)")
    delivery: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once", description="how verdicts and offsets are tied together"
    )
    transaction_timeout_ms: int = Field(
        20_000, ge=1_000, description="exactly_once: how long the broker keeps a dead worker's transaction, and its readers, open"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="as in Kafka clients"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI"] | None = Field(
        None, description="as in Kafka clients"
    )
    sasl_username: str | None = Field(None, description="for PLAIN and SCRAM")
    sasl_password: SecretStr | None = Field(None, description="for PLAIN and SCRAM; best as a secret file")
    ssl_cafile: Path | None = Field(None, description="PEM file of the brokers' certificate authority")
    ssl_certfile: Path | None = Field(None, description="PEM file of the client's certificate")
    ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    ssl_check_hostname: bool = Field(True, description="compare the broker's certificate with its host name")
    auto_offset_reset: Literal["earliest", "latest"] = Field("earliest", description="where a new group begins")
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field("lz4", description="of what the worker produces")
    max_poll_interval_ms: int = Field(300_000, ge=1_000, description="longest silence before the group expels this member")
    session_timeout_ms: int = Field(45_000, ge=1_000, description="longest silence of the heartbeat")
    request_timeout_ms: int = Field(30_000, ge=1_000, description="longest wait for one broker answer")
    max_in_flight: int = Field(256, ge=1, description="events between read and verdict")
    max_in_flight_bytes: int = Field(256 * 2**20, ge=2**20, description="bytes of events and images between read and verdict")
    max_offset_span: int = Field(10_000, ge=1, description="per partition: furthest read offset ahead of the committed one")
    max_record_bytes: int = Field(
        32 * 2**20, ge=2**16, description="largest record read or produced; the brokers' limit should match"
    )
    commit_interval_ms: int = Field(200, ge=10, description="how often finished offsets are committed, at least")
    startup_timeout_s: float = Field(60, gt=0, description="budget for broker and topics to be usable before exit 3")


class CacheSettings(_Group):
    """Scores by digest in Redis."""

    url: SecretStr = Field(SecretStr("redis://localhost:6379/0"), description="redis:// or rediss://")
    enabled: bool = Field(True, description="false: every image is inferred")
    ttl_s: int = Field(30 * 86_400, ge=1, description="how long a score is kept")
    timeout_ms: int = Field(50, ge=1, description="longest wait for the cache before the event goes on without it")
    breaker_failures: int = Field(3, ge=1, description="failures in a row that open the breaker")
    breaker_reset_s: float = Field(5.0, gt=0, description="how long an open breaker waits before it tries again")


class EngineSettings(_Group):
    """The detector."""

    bundle: Path | None = Field(
        None, description="model bundle: a folder with manifest.json, or one with CURRENT; none: the packaged one"
    )
    backend: Literal["auto", "tensorrt", "tensorrt_rtx", "openvino", "torch"] = Field(
        "auto", description="auto: the first that runs here"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    head: Literal["linear", "knn", "ocsvm"] = Field("linear", description="the head whose score decides")
    crops: Literal["center", "five"] = Field("center", description="crops a frame: the centre, or the centre and the corners")
    threads: int = Field(0, ge=0, description="CPU threads of the backend; 0: one per core")
    plan_cache: Path | None = Field(
        None, description="folder of compiled plans, shared by replicas; none: the user's cache folder"
    )
    watch_bundle_s: float = Field(30.0, ge=0, description="how often CURRENT is looked at; 0: never")


class BatchSettings(_Group):
    """Dynamic batching, in Triton's words."""

    max_batch_size: int = Field(32, ge=1, description="crops in a batch at most")
    preferred_batch_size: Annotated[tuple[int, ...], NoDecode] = Field(
        (),
        description="sizes that leave at once, comma-separated; empty: a quarter, a half and the whole of max_batch_size",
    )
    max_queue_delay_microseconds: int = Field(5_000, ge=0, description="longest wait of the first crop for company")
    max_queue_size: int = Field(1_024, ge=1, description="crops that may wait at each priority level")
    priority_levels: int = Field(2, ge=1, le=16, description="0 is the most urgent; larger priorities count as the last level")

    @property
    def preferred_sizes(self) -> tuple[int, ...]:
        """The preferred sizes, ascending; derived from `max_batch_size` where none are set."""
        sizes = self.preferred_batch_size or (self.max_batch_size // 4, self.max_batch_size // 2, self.max_batch_size)
        return tuple(sorted({size for size in sizes if size > 0}))

    @model_validator(mode="after")
    def _preferred_within_maximum(self) -> BatchSettings:
        wrong = [size for size in self.preferred_batch_size if not 1 <= size <= self.max_batch_size]
        if wrong:
            raise ValueError(f"preferred_batch_size {wrong} must lie between 1 and max_batch_size {self.max_batch_size}")
        return self


class FetchSettings(_Group):
    """Where images may come from."""

    max_bytes: int = Field(20 * 2**20, ge=1, description="largest image")
    timeout_s: float = Field(10.0, gt=0, description="longest time for one fetch, redirects included")
    concurrency: int = Field(16, ge=1, description="fetches at a time")
    attempts: int = Field(5, ge=1, description="tries before the dead letter, the first one included")
    retry_delay_s: float = Field(2.0, gt=0, description="first delay in the retry topic; each next one is four times as long")
    retry_delay_max_s: float = Field(300.0, gt=0, description="longest delay in the retry topic")
    allowed_hosts: CommaSeparated = Field((), description="host names, *.example.org for subdomains; empty: any public host")
    allowed_buckets: CommaSeparated = Field(
        (), description="s3 and gs buckets; empty: any that the worker's credentials can read"
    )
    file_roots: Annotated[tuple[Path, ...], NoDecode] = Field((), description="folders for file URLs; empty: no file URLs")
    allow_private_addresses: bool = Field(False, description="allow loopback, private and link-local addresses")
    concurrency_per_host: int = Field(0, ge=0, description="fetches at a time from one host or bucket; 0: half of concurrency")
    breaker_failures: int = Field(10, ge=1, description="transient failures in a row after which a host is left alone")
    breaker_reset_s: float = Field(10.0, gt=0, description="how long a failing host is left alone before one fetch tries it")


class DecodeSettings(_Group):
    """Limits on images."""

    max_pixels: int = Field(64_000_000, ge=1, description="width x height of a frame at most")
    max_frames: int = Field(4, ge=1, le=64, description="frames of an animation that are scored")
    timeout_s: float = Field(10.0, gt=0, description="longest time to decode one image")
    processes: int = Field(2, ge=0, description="decoder processes; 0: in threads, for trusted images only")
    max_memory_bytes: int = Field(1536 * 2**20, ge=2**27, description="address space of a decoder process above its start")
    gpu: bool = Field(
        False,
        description="baseline JPEGs by nvImageCodec in a process with a GPU (extra `gpu-decode`); moves scores slightly",
    )


class PolicySettings(_Group):
    """From scores to actions."""

    file: Path | None = Field(None, description="TOML file of thresholds and actions; none: the built-in policy")
    watch_s: float = Field(5.0, ge=0, description="how often the file is looked at; 0: never")


class HttpSettings(_Group):
    """Probes and metrics."""

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 in a pod")
    port: Port = Field(8080, description="0: any free port")


class ConsoleSettings(_Group):
    """The page for operators and moderators; nothing of it concerns `worker run`."""

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 in a pod, behind a proxy that speaks https")
    port: Port = Field(8081, description="0: any free port")
    auth: Literal["token", "header", "none"] = Field(
        "token",
        description="who comes in: holders of a token, whom a proxy names, or (development) anyone on this machine",
    )
    tokens: SecretStr | None = Field(
        None, description="for token: name:role:token, comma-separated; role viewer or reviewer; best as a secret file"
    )
    user_header: str = Field("X-Forwarded-User", min_length=1, description="for header: who it is")
    groups_header: str = Field("X-Forwarded-Groups", min_length=1, description="for header: their groups, comma-separated")
    reviewer_groups: CommaSeparated = Field(("code-reviewers",), description="for header: groups that may decide")
    viewer_groups: CommaSeparated = Field((), description="for header: groups that may look; empty: everyone the proxy names")
    trusted_proxies: CommaSeparated = Field(
        ("127.0.0.1", "::1"), description="for header: addresses or networks whose headers are believed"
    )
    signing_key: SecretStr | None = Field(
        None, description="signs sessions and image links, 32 characters or more; none: a new one each start, one replica only"
    )
    session_s: int = Field(12 * 3600, ge=60, description="how long a sign-in lasts")
    image_link_s: int = Field(300, ge=10, description="how long a link to an image is good for")
    claim_s: int = Field(180, ge=10, le=86_400, description="how long an item stays with the reviewer who took it")
    rows_per_s: int = Field(20, ge=1, le=100, description="verdicts a second shown in a live view; more are sampled")
    history_s: int = Field(7 * 86_400, ge=60, description="how far back the topics are read at start")
    history_records: int = Field(200_000, ge=100, description="records of a topic that are read at start at most")
    max_entries: int = Field(50_000, ge=100, description="images kept in the review queue; beyond, the least urgent are left out")
    metrics_urls: CommaSeparated = Field((), description="/metrics pages of the workers, comma-separated: lag and batch sizes")


class TracingSettings(_Group):
    """OpenTelemetry traces (extra `otel`)."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s]+$",
        description="collector, OTLP over HTTP, as http://collector:4318/v1/traces; none: no traces",
    )
    sample_ratio: float = Field(
        0.01, ge=0, le=1, description="share of events traced that bring no `traceparent`; one that they bring decides itself"
    )


class LogSettings(_Group):
    """Logs on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least severity that is written")
    format: Literal["json", "console"] = Field("json", description="json: a line an event; console: for eyes")


class CircuitSettings(_Group):
    """When too many events end in dead letters, the intake stops."""

    failures_in_a_row: int = Field(
        1_000, ge=0, description="dead letters without one score between that stop the intake; 0: never"
    )
    failure_share: float = Field(
        0.5, ge=0, le=1, description="share of dead letters among the outcomes that stops the intake; 0: never"
    )
    min_events: int = Field(1_000, ge=1, description="outcomes within the window from which on the share counts")
    window_s: float = Field(300.0, gt=0, description="how far back the share looks")
    reset_s: float = Field(60.0, gt=0, description="how long the intake stays stopped before a few events try again")


class ShutdownSettings(_Group):
    """The way out."""

    drain_s: float = Field(25.0, gt=0, description="time after SIGTERM for events in flight to finish")


class Settings(BaseSettings):
    """Everything `worker run` can be told; `load` reads it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", case_sensitive=False
    )

    kafka: KafkaSettings = KafkaSettings()
    cache: CacheSettings = CacheSettings()
    engine: EngineSettings = EngineSettings()
    batch: BatchSettings = BatchSettings()
    fetch: FetchSettings = FetchSettings()
    decode: DecodeSettings = DecodeSettings()
    policy: PolicySettings = PolicySettings()
    http: HttpSettings = HttpSettings()
    console: ConsoleSettings = ConsoleSettings()
    tracing: TracingSettings = TracingSettings()
    circuit: CircuitSettings = CircuitSettings()
    log: LogSettings = LogSettings()
    shutdown: ShutdownSettings = ShutdownSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment, then secret files, then the TOML file."""
        return (
            init_settings,
            env_settings,
            InitSettingsSource(settings_cls, _read_secrets(os.environ.get(SECRETS_DIR))),
            InitSettingsSource(settings_cls, _read_toml(os.environ.get(CONFIG_FILE))),
        )

    @model_validator(mode="after")
    def _cross_checks(self) -> Settings:
        if self.shutdown.drain_s * 1000 >= self.kafka.max_poll_interval_ms:
            raise ValueError(
                "shutdown.drain_s must be shorter than kafka.max_poll_interval_ms, or the group expels a draining worker"
            )
        if self.kafka.delivery == "exactly_once" and self.kafka.transaction_timeout_ms >= self.kafka.max_poll_interval_ms:
            raise ValueError(
                "kafka.transaction_timeout_ms must be shorter than kafka.max_poll_interval_ms, or it outlives its member"
            )
        if self.kafka.security_protocol.startswith("SASL") and self.kafka.sasl_mechanism is None:
            raise ValueError(f"kafka.sasl_mechanism is required with security_protocol {self.kafka.security_protocol}")
        needs_password = self.kafka.sasl_mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
        if needs_password and not (self.kafka.sasl_username and self.kafka.sasl_password):
            raise ValueError(f"kafka.sasl_username and kafka.sasl_password are required with {self.kafka.sasl_mechanism}")
        topics = [
            *self.kafka.upload_topics,
            self.kafka.verdict_topic,
            self.kafka.retry_topic,
            self.kafka.dead_letter_topic,
        ]
        if len(set(topics)) != len(topics):
            raise ValueError("kafka.upload_topics, verdict_topic, retry_topic and dead_letter_topic must all differ")
        return self


def load(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings of this process.

    Raises:
        ConfigurationError: one line for each wrong or unknown field, and what to do.
    """
    environ = os.environ if environ is None else environ
    problems = _unknown_names(environ)
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        problems += [_problem(cast(dict[str, Any], detail)) for detail in error.errors()]
    except ConfigurationError as error:
        problems += error.problems
    else:
        if not problems:
            return settings
    raise ConfigurationError(problems)


def environment_name(group: str, field: str) -> str:
    """The environment variable of a field: WORKER_<GROUP>__<FIELD>."""
    return f"{PREFIX}{group.upper()}__{field.upper()}"


def _unknown_names(environ: Mapping[str, str]) -> list[str]:
    """Names with our prefix that mean nothing. Kubernetes' service links (WORKER_PORT_80_TCP…) carry no `__` and pass."""
    groups = {name.upper() for name in Settings.model_fields}
    problems = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in (CONFIG_FILE, SECRETS_DIR):
            continue
        group, delimiter, _ = name.removeprefix(PREFIX).partition("__")
        if delimiter and group.upper() not in groups:
            problems.append(f"{name}: unknown group {group}; known are {', '.join(sorted(groups))}")
    return problems


def _problem(detail: dict[str, Any]) -> str:
    path = [str(part) for part in detail["loc"]]
    name = environment_name(path[0], "__".join(path[1:2])) if len(path) > 1 else (path[0] if path else "settings")
    if detail["type"] == "extra_forbidden":
        known = ""
        if len(path) > 1 and path[0] in Settings.model_fields:
            group = Settings.model_fields[path[0]].annotation
            known = ", ".join(cast(type[BaseModel], group).model_fields)
        return f"{name}: unknown field" + (f"; group {path[0]} knows {known}" if known else "")
    message = str(detail["msg"]).removeprefix("Value error, ")
    given = detail.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float) and not _secret(path) else ""
    return f"{name}: {message}{shown}"


def _secret(path: list[str]) -> bool:
    return any("password" in part or part in ("url", "tokens", "signing_key") for part in path)


def _read_toml(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{CONFIG_FILE}: cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{CONFIG_FILE}: {path} is not valid TOML: {error}") from error


def _read_secrets(directory: str | None) -> dict[str, Any]:
    """Files named like the environment variable, with or without the WORKER_ prefix, in any case; one value a file."""
    if not directory:
        return {}
    folder = Path(directory)
    if not folder.is_dir():
        raise ConfigurationError(f"{SECRETS_DIR}: {directory} is not a folder")
    values: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        group, delimiter, field = path.name.upper().removeprefix(PREFIX).lower().partition("__")
        if not delimiter or group not in Settings.model_fields:
            raise ConfigurationError(f"{SECRETS_DIR}: {path.name} names no setting; expected {PREFIX}<GROUP>__<FIELD>")
        try:
            values.setdefault(group, {})[field] = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{SECRETS_DIR}: cannot read {path.name}: {error}") from error
    return values
