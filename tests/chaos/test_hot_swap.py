"""Bundles and policies swapped under load: each verdict once, signed by the model and the policy that made it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from engine.bundle import publish
from engine.calibration import Platt
from tests.chaos import load
from tests.chaos.brokers import EmbeddedBrokers
from tests.chaos.run import Plan, Run
from tests.engine.bundles import random_bundle, random_draft
from worker.embedded import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(900)]

VERSIONS = ("1", "2", "3")
EVENTS = 800


def policy(name: str, block: float) -> str:
    return (
        f'name = "{name}"\n[tenants.default]\nlabel = 0.5\nreview = [{block / 2}]\nblock = [{block}]\n'
        'on_undetermined = "review"\nuncertain = "never"\n'
    )


def test_bundles_and_policies_swapped_under_load(broker: EmbeddedBroker, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for number, version in enumerate(VERSIONS, start=1):  # the same picture gets another score from each
        calibration = {**random_draft().calibration, "linear": Platt(slope=0.3 * number)}
        random_bundle(models / version, seed=number, version=version, calibration=calibration)
    publish(models, "1")
    file = tmp_path / "policy.toml"
    blocks = {"a": 0.9, "b": 0.6}
    file.write_text(policy("a", blocks["a"]))
    settings = {"ENGINE__BUNDLE": models, "ENGINE__WATCH_BUNDLE_S": 0.2, "POLICY__FILE": file, "POLICY__WATCH_S": 0.2}
    plan = Plan(12, seconds=8, events=EVENTS, workers=2, partitions=3, worker_settings=settings)
    bundles = [models / version for version in VERSIONS]
    decided: list[tuple[str, float, str]] = []
    with Run(plan, EmbeddedBrokers(broker), tmp_path, bundles=bundles) as run:
        entered = run.books.verdict

        def verdict(value: bytes, stamp: float) -> None:
            body = json.loads(value)
            if body["reason"] is None:
                decided.append((body["policy"]["name"], body["score"], body["action"]))
            entered(value, stamp)

        run.books.verdict = verdict  # type: ignore[method-assign]
        run.start()
        begun = time.monotonic()
        uploader = run.upload(run.plans, load.steadily(EVENTS, plan.seconds))
        swaps = 0
        while swaps < 6 or not uploader.done:
            before = run.books.accounted
            run.wait(lambda before=before: run.reader.look() or run.books.accounted > before, 120, "verdicts")  # type: ignore[misc]
            if run.books.accounted > EVENTS * (swaps + 1) / 8 and swaps < 6:
                swaps += 1
                publish(models, VERSIONS[swaps % len(VERSIONS)])
                name = "ab"[swaps % 2]
                written = tmp_path / "policy.new"
                written.write_text(policy(name, blocks[name]))
                written.replace(file)  # whole: half a file may be a policy, too
            if uploader.done and run.books.complete:
                break
        run.watch(lambda: uploader.done, begun)
        swapped = run.workers.metrics(0)['code_worker_bundle_swaps_total{status="ok"}']
        report = run.finish(uploader, begun)
        signed = {rest["version"] for entries in run.books.verdicts.values() for _, _, rest in entries}
    assert not report.problems, report.problems  # lost, doubled, a score that is not that model's
    assert report.balance.duplicates == report.balance.duplicate_letters == 0
    assert signed == set(VERSIONS)
    assert swapped >= 2
    assert {name for name, _, _ in decided} == set(blocks)
    for name, score, action in decided:
        expected = "block" if score >= blocks[name] else "review" if score >= blocks[name] / 2 else "allow"
        assert action == expected, (name, score, action)
