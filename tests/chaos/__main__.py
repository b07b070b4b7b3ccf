"""`python -m tests.chaos`: a long run by hand (`make chaos`). A failure prints the seed and how to repeat it."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import netns, scenarios
from tests.chaos.brokers import ApacheBrokers
from tests.chaos.run import Plan, Report, Run
from tests.conftest import KafkaCluster, cluster_script

SCENARIOS = {
    "faults": lambda run, seconds: run.go(),
    "members": scenarios.members,
    "outage": lambda run, seconds: scenarios.outage(run),
    "soak": scenarios.soak,
}


def main() -> int:
    """Returns the exit code: 0 where the books balance, 1 where not, 2 where there is no Kafka."""
    arguments = _arguments()
    script, reason = cluster_script()
    if script is None:
        print(f"chaos: {reason}", file=sys.stderr)
        return 2
    hurts = arguments.faults if arguments.faults is not None else round(arguments.minutes * 6)
    without_network = netns.missing()
    if without_network:
        print(f"no network cuts: {without_network}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, KafkaCluster(script, Path(scratch) / "kafka") as cluster:
        folder = arguments.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        cluster.start("--nodes", str(arguments.nodes))
        plan = Plan(
            seed=arguments.seed,
            seconds=arguments.minutes * 60,
            events=arguments.events if arguments.scenario == "faults" else 0,
            workers=arguments.workers,
            hurts=hurts,
            delivery=arguments.delivery,
            namespaces=without_network is None,
        )
        with Run(plan, ApacheBrokers(cluster, arguments.nodes), folder, say=lambda line: print(line, flush=True)) as run:
            report = SCENARIOS[arguments.scenario](run, arguments.minutes * 60)
    _tell(report, arguments)
    return 1 if report.problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), default="faults")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--nodes", type=int, default=3, help="brokers, 1 to 3")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--faults", type=int, help="kills and stops; 6 a minute where not given; others come on top")
    parser.add_argument("--delivery", choices=("at_least_once", "exactly_once"), default="at_least_once")
    parser.add_argument("--out", type=Path, help="write the report there as JSON")
    parser.add_argument("--logs", type=Path, help="keep the workers' logs in this folder")
    return parser.parse_args()


def _tell(report: Report, arguments: argparse.Namespace) -> None:
    balance = report.balance
    print(f"seed {report.plan.seed}: {balance.events} events in {report.seconds} s, {report.events_per_s}/s")
    print(f"faults: {', '.join(f'{count} {kind}' for kind, count in sorted(report.faults.items()))}")
    print(
        f"lost {len(balance.lost)}, duplicates {balance.duplicates} verdicts and {balance.duplicate_letters} dead letters "
        f"({len(balance.unexplained)} without a cause), longest stall {report.longest_stall_s} s"
    )
    if report.figures:
        print(f"figures: {report.figures}")
    print(f"metrics of the workers that ran last: {report.metrics}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps(report.as_json() | {"written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1)
        )
    for problem in report.problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    if report.problems:
        print(
            f"repeat: make chaos SCENARIO={arguments.scenario} MINUTES={arguments.minutes:g} SEED={arguments.seed} "
            f"NODES={arguments.nodes} "
            f"WORKERS={arguments.workers} EVENTS={arguments.events} FAULTS={report.plan.hurts} DELIVERY={arguments.delivery}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
