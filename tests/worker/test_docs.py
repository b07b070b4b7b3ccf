"""The documents of events, policies and metrics say what the code does."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from tests.worker.contracts.test_event import record
from tests.worker.stages.test_policy import SCALE
from worker.contracts import VERDICT_NAMESPACE, EventLimits, parse, verdict_id
from worker.contracts.schemas import verdict_schema
from worker.envelopes import DEAD_BLOCK, OMITTED
from worker.errors import Code
from worker.metrics import Metrics
from worker.stages import policy_file
from worker.stages.policy import bind

DOCS = Path(__file__).parents[2] / "docs"


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / document).read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_event_is_one() -> None:
    event = parse(record(blocks("events.md", "json")[0].encode()), EventLimits(10**6, 10**6))
    assert event.attributes == {"surface": "feed"}


def test_the_example_verdict_is_one_and_has_its_id() -> None:
    verdict = json.loads(blocks("events.md", "json")[1])
    jsonschema.Draft202012Validator(verdict_schema()).validate(verdict)
    assert verdict["verdict_id"] == verdict_id(verdict["event_id"], verdict["model"]["version"])


@pytest.mark.parametrize(
    "word", [*Code, *OMITTED, str(VERDICT_NAMESPACE), *(name for name in DEAD_BLOCK if "errors." not in name)]
)
def test_events_are_documented_in_full(word: str) -> None:
    assert f"`{word}`" in (DOCS / "events.md").read_text()


def test_the_example_policy_is_one() -> None:
    (example,) = blocks("policy.md", "toml")
    policy = policy_file.parse(example.encode(), "policy.toml")
    assert set(policy.shadow) == {"stricter"}
    assert bind(policy, SCALE).decide(0.55, "acme").shadow == {"stricter": "review"}
    assert set(tomllib.loads(example)["tenants"]["default"]) == set(policy_file._RULE_KEYS)


def test_every_metric_is_documented_with_its_labels_and_nothing_else_is() -> None:
    rows = dict(re.findall(r"^\| `(code_worker_\w+)` \| ([^|]*)\|", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    metrics = Metrics()
    there = {}
    for metric in vars(metrics).values():
        if hasattr(metric, "_labelnames") and hasattr(metric, "_name"):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            there[name] = list(metric._labelnames)
    assert {name: re.findall(r"`(\w+)`", labels) for name, labels in rows.items()} == there


def test_metrics_named_in_queries_exist() -> None:
    page = Metrics().page().decode()
    for name in re.findall(r"\bcode_worker_\w+", (DOCS / "metrics.md").read_text() + (DOCS / "policy.md").read_text()):
        assert re.search(rf"^# TYPE {re.sub('_(sum|count)$', '', name)} ", page, re.MULTILINE), name
