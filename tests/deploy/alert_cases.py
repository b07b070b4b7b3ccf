"""Made-up series on which each alert fires, a minute a sample, and those of a healthy worker on which none does."""

from __future__ import annotations

from dataclasses import dataclass

LABELS = 'namespace="moderation", deployment="production", instance="10.0.0.1:8080"'
HOURS = 3 * 60


def name(metric: str, extra: str = "") -> str:
    """A series of the one replica."""
    return f"{metric}{{{LABELS}{', ' + extra if extra else ''}}}"


def buckets(metric: str, low: str, low_rate: int, rate: int, minutes: int) -> dict[str, str]:
    """A histogram of which `low_rate` of `rate` observations a minute are at most `low`."""
    return {
        name(f"{metric}_bucket", f'le="{low}"'): f"0+{low_rate}x{minutes}",
        name(f"{metric}_bucket", 'le="+Inf"'): f"0+{rate}x{minutes}",
    }


ALIVE = {name("code_worker_build_info", 'version="1"'): f"1x{HOURS}", name("code_worker_ready"): f"1x{HOURS}"}

QUIET = {
    **ALIVE,
    name("process_start_time_seconds"): f"1000x{HOURS}",
    name("code_worker_events_received_total"): f"0+600x{HOURS}",
    name("code_worker_verdicts_total", 'label="authentic", action="allow", source="engine"'): f"0+540x{HOURS}",
    name("code_worker_verdicts_total", 'label="ai_generated", action="review", source="engine"'): f"0+54x{HOURS}",
    name("code_worker_verdicts_total", 'label="undetermined", action="review", source="failure"'): f"0+6x{HOURS}",
    name("code_worker_dead_letters_total", 'code="decode.corrupt"'): f"0+6x{HOURS}",
    name("code_worker_dead_letters_total", 'code="engine.failed"'): f"0x{HOURS}",
    name("code_worker_retries_total", 'code="fetch.timeout"'): f"0+20x{HOURS}",
    name("code_worker_consumer_lag", 'topic="image.uploads", partition="0"'): " ".join(["50 400 120"] * (HOURS // 3)),
    name("code_worker_consumer_lag", 'topic="image.uploads.retry", partition="0"'): f"0+50x{HOURS}",
    name("code_worker_commits_total", 'status="failed"'): f"0x{HOURS}",
    name("code_worker_rebalances_total", 'type="lost"'): f"0x{HOURS}",
    name("code_worker_paused_partitions"): " ".join(["0 3 0"] * (HOURS // 3)),
    name("code_worker_decoder_restarts_total", 'reason="crashed"'): f"0x{HOURS}",
    name("code_worker_cache_breaker_open"): f"0x{HOURS}",
    name("code_worker_dead_letter_circuit_open"): f"0x{HOURS}",
    name("code_worker_bundle_swaps_total", 'status="failed"'): f"0x{HOURS}",
    name("code_worker_bundle_swaps_total", 'status="ok"'): f"0 0 1x{HOURS}",
    name("code_worker_policy_reloads_total", 'status="failed"'): f"0x{HOURS}",
    **buckets("code_worker_event_age_seconds", "1.0", 600, 600, HOURS),
    **buckets("code_worker_inference_seconds", "0.05", 100, 100, HOURS),
    **buckets("code_worker_queue_wait_seconds", "0.05", 600, 600, HOURS),
}


@dataclass(frozen=True)
class Case:
    """Only this alert fires after so many minutes, of samples so many minutes apart."""

    alert: str
    series: dict[str, str]
    minutes: int
    apart: int = 1


def _shares(before: int, after: int) -> str:
    """Verdicts a sample, five minutes apart: `before` for two days, then `after` for four hours."""
    samples = 48 * 12
    return f"0+{before}x{samples} {before * samples + after}+{after}x48"


CASES = (
    Case("CodeWorkerAbsent", {"up": "1x20"}, 6),
    Case("CodeWorkerNotReady", {**ALIVE, name("code_worker_ready"): "0x30"}, 11),
    Case(
        "CodeWorkerLagGrowing",
        {
            **ALIVE,
            name("code_worker_consumer_lag", 'topic="image.uploads", partition="0"'): "0+700x60",
            name("code_worker_consumer_lag", 'topic="image.uploads", partition="1"'): "0+700x60",
        },
        35,
    ),
    Case(
        "CodeWorkerVerdictsStalled",
        {
            **ALIVE,
            name("code_worker_events_received_total"): "0+600x60",
            name("code_worker_verdicts_total", 'label="authentic", action="allow", source="engine"'): "0+100x60",
        },
        25,
    ),
    Case(
        "CodeWorkerEventAge",
        {
            **ALIVE,
            **buckets("code_worker_event_age_seconds", "60.0", 90, 100, 60)
            | {name("code_worker_event_age_seconds_bucket", 'le="300.0"'): "0+100x60"},
        },
        25,
    ),
    Case("CodeWorkerRestarts", {**ALIVE, name("process_start_time_seconds"): "1000x5 2000x5 3000x5 4000x10"}, 18),
    Case("CodeWorkerCommitsFailing", {**ALIVE, name("code_worker_commits_total", 'status="failed"'): "0+2x60"}, 20),
    Case("CodeWorkerPartitionsLost", {**ALIVE, name("code_worker_rebalances_total", 'type="lost"'): "0x5 1 2 3 4 5x20"}, 15),
    Case("CodeWorkerPartitionsPaused", {**ALIVE, name("code_worker_paused_partitions"): "3x90"}, 60),
    Case(
        "CodeWorkerEngineFailed",
        {**ALIVE, name("code_worker_dead_letters_total", 'code="engine.failed"'): "0x5 0+1x20"},
        20,
    ),
    Case(
        "CodeWorkerDeadLetters",
        {
            **ALIVE,
            name("code_worker_events_received_total"): "0+600x60",
            name("code_worker_verdicts_total", 'label="authentic", action="allow", source="engine"'): "0+500x60",
            name("code_worker_dead_letters_total", 'code="event.malformed"'): "0+100x60",
        },
        35,
    ),
    Case(
        "CodeWorkerUndetermined",
        {
            **ALIVE,
            name("code_worker_verdicts_total", 'label="authentic", action="allow", source="engine"'): "0+500x60",
            name("code_worker_verdicts_total", 'label="undetermined", action="review", source="failure"'): "0+100x60",
        },
        35,
    ),
    Case(
        "CodeWorkerFetchRetries",
        {
            **ALIVE,
            name("code_worker_events_received_total"): "0+600x60",
            name("code_worker_verdicts_total", 'label="authentic", action="allow", source="engine"'): "0+500x60",
            name("code_worker_retries_total", 'code="fetch.timeout"'): "0+200x60",
        },
        35,
    ),
    Case("CodeWorkerDecodersReplaced", {**ALIVE, name("code_worker_decoder_restarts_total", 'reason="crashed"'): "0+5x60"}, 15),
    Case("CodeWorkerCircuitOpen", {**ALIVE, name("code_worker_dead_letter_circuit_open"): "1x20"}, 4),
    Case("CodeWorkerCacheDown", {**ALIVE, name("code_worker_cache_breaker_open"): "1x20"}, 8),
    Case(
        "CodeWorkerInferenceSlow",
        {
            **ALIVE,
            **buckets("code_worker_inference_seconds", "1.0", 90, 100, 60)
            | {name("code_worker_inference_seconds_bucket", 'le="5.0"'): "0+100x60"},
        },
        25,
    ),
    Case(
        "CodeWorkerQueueWait",
        {
            **ALIVE,
            **buckets("code_worker_queue_wait_seconds", "2.5", 90, 100, 60)
            | {name("code_worker_queue_wait_seconds_bucket", 'le="5.0"'): "0+100x60"},
        },
        25,
    ),
    Case(
        "CodeWorkerLabelShift",
        {
            name("code_worker_build_info", 'version="1"'): "1x700",
            name("code_worker_ready"): "1x700",
            name("code_worker_verdicts_total", 'label="authentic", action="allow", source="engine"'): _shares(450, 300),
            name("code_worker_verdicts_total", 'label="ai_generated", action="review", source="engine"'): _shares(50, 200),
        },
        48 * 60 + 180,
        apart=5,
    ),
    Case(
        "CodeWorkerScoreDrift",
        {
            name("code_worker_build_info", 'version="1"'): "1x700",
            name("code_worker_ready"): "1x700",
            name("code_worker_score_drift", 'head="linear"'): "0.3x576 0.5x124",
        },
        48 * 60 + 180,
        apart=5,
    ),
    Case(
        "CodeWorkerEmbeddingDrift",
        {
            name("code_worker_build_info", 'version="1"'): "1x700",
            name("code_worker_ready"): "1x700",
            name("code_worker_embedding_drift"): "0.4x576 0.8x124",
        },
        48 * 60 + 180,
        apart=5,
    ),
    Case("CodeWorkerBundleRefused", {**ALIVE, name("code_worker_bundle_swaps_total", 'status="failed"'): "0x10 1x20"}, 13),
    Case("CodeWorkerPolicyRefused", {**ALIVE, name("code_worker_policy_reloads_total", 'status="failed"'): "0x10 1x20"}, 13),
)
