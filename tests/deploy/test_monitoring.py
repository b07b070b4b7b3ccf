"""Alerts and dashboard: every expression parses and names what the worker has; every alert fires and is explained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import promql_parser
import pytest
import yaml

from engine.batching_policy import Reason
from tests.deploy.alert_cases import CASES, QUIET, Case
from tests.deploy.manifests import K8S, ROOT, one
from worker.errors import Code
from worker.metrics import BATCH_REASONS, CACHE_RESULTS, PREFIX, Metrics

TARGET_LABELS = {"namespace", "deployment", "instance", "pod", "job"}
DASHBOARD = json.loads((K8S / "components/monitoring/dashboard.json").read_text())
GUIDE = (ROOT / "docs/operations.md").read_text()
KNOWN_VALUES = {
    ("code_worker_dead_letters_total", "code"): {code.value for code in Code},
    ("code_worker_batches_total", "reason"): set(BATCH_REASONS),
    ("code_worker_cache_requests_total", "result"): set(CACHE_RESULTS),
    ("code_worker_verdicts_total", "label"): {"ai_generated", "authentic", "undetermined"},
}


def rules() -> list[dict[str, Any]]:
    (group,) = one("overlays/production", "PrometheusRule")["spec"]["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def known_metrics() -> dict[str, set[str]]:
    """Name of each series -> its labels, from the registry itself."""
    known: dict[str, set[str]] = {}
    metrics = Metrics()
    for collector in list(metrics.registry._collector_to_names):
        labels = set(getattr(collector, "_labelnames", ()))
        for name in metrics.registry._collector_to_names[collector]:
            known[name] = labels | ({"le"} if name.endswith("_bucket") else set())
    for family in metrics.registry.collect():  # the process's own are only known by collecting
        for sample in family.samples:
            known.setdefault(sample.name, set(sample.labels))
    return known


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for attribute in ("expr", "lhs", "rhs", "param", "vector_selector"):
        child = getattr(node, attribute, None)
        if child is not None:
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$deployment", ".*"))


@pytest.mark.parametrize(("where", "expression"), [*expressions()])
def test_expressions_name_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    known = known_metrics()
    found = list(selectors(parsed(expression)))
    assert found, where
    for selector in found:
        assert selector.name in known, f"{where}: no metric {selector.name}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in known[selector.name] | TARGET_LABELS, f"{where}: {selector.name} has no label {matcher.name}"
            values = KNOWN_VALUES.get((selector.name, matcher.name))
            assert values is None or matcher.value in values, f"{where}: {matcher.name}={matcher.value}"


def test_the_walk_over_expressions_would_find_a_wrong_name() -> None:
    tree = parsed('sum by (x) (rate(a_total[5m])) > 2 and on (i) histogram_quantile(0.9, b_bucket{c="d"} offset 1h)')
    assert [selector.name for selector in selectors(tree)] == ["a_total", "b_bucket"]


def test_grouping_labels_exist() -> None:
    labels = set().union(*known_metrics().values()) | TARGET_LABELS
    for where, expression in expressions():
        for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
            names = {name.strip() for name in grouped.split(",") if name.strip()}
            assert names <= labels, f"{where}: {names - labels}"


def test_reasons_in_metrics_and_batcher_agree() -> None:
    assert set(BATCH_REASONS) == set(Reason.__args__)  # type: ignore[attr-defined]


# -- alerts --------------------------------------------------------------------------------------------------------------


def test_every_alert_has_a_runbook_entry_and_every_entry_an_alert() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    entries = re.findall(r"^### (CodeWorker\w+)$", GUIDE, re.MULTILINE)
    assert sorted(entries) == sorted(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}


def test_every_alert_has_a_case() -> None:
    assert sorted(case.alert for case in CASES) == sorted(rule["alert"] for rule in rules())


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """promtool (PROMTOOL, or on PATH) and the rules as a plain file."""
    tool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if tool is None:
        _skip_or_fail("promtool is missing: Debian's package prometheus has it; or name it with PROMTOOL")
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(yaml.safe_dump(one("overlays/production", "PrometheusRule")["spec"]))
    return tool, file


def _skip_or_fail(problem: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)


def test_prometheus_takes_the_rules(promtool: tuple[str, Path]) -> None:
    tool, file = promtool
    done = subprocess.run([tool, "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{len(rules())} rules found" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_alerts_fire_when_they_should(case: Case, promtool: tuple[str, Path]) -> None:
    _run(promtool, case.series, case.minutes, {case.alert}, case.apart)


def test_no_alert_fires_on_a_healthy_worker(promtool: tuple[str, Path]) -> None:
    _run(promtool, QUIET, 3 * 60, set())


def _run(promtool: tuple[str, Path], series: dict[str, str], minutes: int, firing: set[str], apart: int = 1) -> None:
    """Check that at this minute of these series exactly these alerts fire."""
    tool, file = promtool
    names = {rule["alert"] for rule in rules()}
    expected = {name: name in firing for name in names}
    tests = [
        {
            "interval": f"{apart}m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)',
                    "eval_time": f"{minutes}m",
                    "exp_samples": [{"labels": "{}", "value": 1 if fires else 0}],
                }
                for name, fires in sorted(expected.items())
            ],
        }
    ]
    page = {"rule_files": [str(file)], "evaluation_interval": f"{apart}m", "tests": tests}
    path = file.with_name("test.yaml")
    path.write_text(yaml.safe_dump(page))
    done = subprocess.run([tool, "test", "rules", str(path)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


# -- dashboard -----------------------------------------------------------------------------------------------------------


def test_panels_are_drawn_from_the_chosen_source_and_explain_themselves() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"], panel["title"]
        for target in panel["targets"]:
            if PREFIX in target["expr"] and " and on (instance) " not in target["expr"]:
                assert '{deployment=~"$deployment"' in target["expr"], panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_every_metric_of_the_contract_is_on_the_dashboard() -> None:
    shown = {selector.name for _, expression in expressions() for selector in selectors(parsed(expression))}
    contract = {
        "events_received_total", "verdicts_total", "cache_requests_total", "dead_letters_total", "retries_total",
        "batches_total", "rebalances_total", "commits_total", "event_age_seconds_bucket", "fetch_seconds_bucket",
        "decode_seconds_bucket", "queue_wait_seconds_bucket", "batch_size_sum", "inference_seconds_bucket",
        "in_flight_events", "in_flight_bytes", "paused_partitions", "consumer_lag", "engine_info",
    }  # fmt: skip
    assert {f"{PREFIX}_{name}" for name in contract} <= shown


def test_the_pod_monitor_scrapes_what_the_pods_serve() -> None:
    monitor = one("overlays/production", "PodMonitor")["spec"]
    assert set(monitor) == {"selector", "podMetricsEndpoints"}
    for overlay in ("production", "canary"):
        template = one(f"overlays/{overlay}", "Deployment", "code-worker")["spec"]["template"]
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in ports and endpoint["path"] == "/metrics"
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "deployment"
