"""What a finished step looks like from outside: counters, histograms, the row of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from services.learner.inbox import group_staleness
from services.learner.measures import StepReport
from shared.metrics.learner import (
    LEARNER_AGE,
    LEARNER_DEGENERATE,
    LEARNER_INTERVENED,
    LEARNER_NONFINITE,
    LEARNER_SAMPLES,
    LEARNER_STALENESS,
    LEARNER_STEP_SECONDS,
    LEARNER_STEPS,
    LEARNER_TOKENS,
    LEARNER_TOKENS_BY_LAG,
    LEARNER_UNREWARDED,
)
from shared.metrics.queues import (
    QUEUE_BYTES,
    QUEUE_CAPACITY,
    QUEUE_CAPACITY_BYTES,
    QUEUE_LAG,
    QUEUE_LENGTH,
    QUEUE_OLDEST,
    QUEUE_PENDING,
    REDIS_MEMORY,
    REDIS_PERSISTENCE,
)
from shared.records import ScoredGroup
from shared.redis_connection import translated
from shared.redis_stream import Streams

_MEMORY = {"used": "used_memory", "max": "maxmemory"}
_PERSISTENCE = {
    "append": "aof_last_write_status",
    "rewrite": "aof_last_bgrewrite_status",
    "snapshot": "rdb_last_bgsave_status",
}


def count_step(
    batch: Sequence[ScoredGroup],
    report: StepReport,
    *,
    loss_mode: str,
    seconds: float,
) -> None:
    """Add a step to the counters and histograms."""
    metrics = report.metrics
    LEARNER_STEPS.inc()
    LEARNER_STEP_SECONDS.observe(seconds)
    LEARNER_TOKENS.inc(metrics.get("tokens", 0))
    LEARNER_SAMPLES.inc(metrics.get("completions", 0))
    LEARNER_DEGENERATE.labels(reason="all_correct").inc(metrics.get("groups_all_correct", 0))
    LEARNER_DEGENERATE.labels(reason="all_wrong").inc(metrics.get("groups_all_wrong", 0))
    LEARNER_NONFINITE.labels(tensor="loss").inc(metrics.get("nonfinite_loss", 0))
    LEARNER_NONFINITE.labels(tensor="grad").inc(metrics.get("nonfinite_grad", 0))
    if metrics.get("pass_rate", 0) > 0:
        LEARNER_UNREWARDED.set(0)
    else:
        LEARNER_UNREWARDED.inc()
    if "selected_tokens" in metrics:
        LEARNER_INTERVENED.labels(mechanism=loss_mode).inc(metrics["selected_tokens"])
    for side in ("low", "high"):
        clipped = metrics.get(f"clip_fraction_{side}", 0) * metrics.get("tokens", 0)
        LEARNER_INTERVENED.labels(mechanism=f"ratio_clip_{side}").inc(clipped)
    for staleness, completions in report.histograms.get("staleness", []):
        for _ in range(completions):
            LEARNER_STALENESS.observe(staleness)
    for lag, tokens in report.histograms.get("version_lag", []):
        LEARNER_TOKENS_BY_LAG.labels(versions=str(lag)).inc(tokens)
    for group in batch:
        LEARNER_AGE.observe(max(0.0, time.time() - group.rollout.sampled_at))


def step_row(
    batch: Sequence[ScoredGroup],
    report: StepReport,
    *,
    step: int,
    policy_version: int,
    max_staleness: int,
    phases: Mapping[str, float],
    seconds: float,
    pause_seconds: float,
) -> dict[str, Any]:
    """The row of `metrics.jsonl` for one step."""
    stalest = [group_staleness(group, policy_version - 1) for group in batch]
    tokens = report.metrics.get("tokens", 0.0)
    return {
        "step": step,
        "policy_version": policy_version,
        "time": time.time(),
        "seconds": seconds,
        "wait_data_seconds": phases.get("wait_data", 0.0),
        "wait_data_share": phases.get("wait_data", 0.0) / seconds if seconds > 0 else 0.0,
        "prepare_seconds": phases.get("prepare", 0.0),
        "train_seconds": phases.get("forward_backward", 0.0),
        "publish_seconds": phases.get("weight_publish", 0.0),
        "pause_seconds": pause_seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "groups_over_max_staleness": sum(each > max_staleness for each in stalest),
        "staleness_counts": _counts(report, "staleness"),
        "version_lag_tokens": _counts(report, "version_lag"),
        "replica_groups": _by_replica(batch),
        **report.metrics,
        **report.profiles,
    }


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a row that are numbers."""
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def without_nan(values: Mapping[str, float]) -> dict[str, float]:
    """What is known; a quantity that has become undefined is shown no longer."""
    return {key: value for key, value in values.items() if not math.isnan(value)}


async def observe_queues(streams: Streams) -> dict[str, int]:
    """Fill the gauges of the queues and of their server; returns the messages waiting by stream.

    Raises:
        StreamError: the server does not answer.
    """
    waiting = {}
    for stream in (streams.prompts, streams.rollouts, streams.scored, streams.dead_letter):
        depth = await stream.depth()
        waiting[stream.name] = depth.waiting
        QUEUE_LENGTH.labels(stream=stream.name).set(depth.waiting + depth.pending)
        QUEUE_LAG.labels(stream=stream.name).set(depth.waiting)
        QUEUE_PENDING.labels(stream=stream.name).set(depth.pending)
        QUEUE_BYTES.labels(stream=stream.name).set(depth.num_bytes)
        QUEUE_CAPACITY.labels(stream=stream.name).set(stream.bounds.max_items)
        QUEUE_CAPACITY_BYTES.labels(stream=stream.name).set(stream.bounds.max_bytes)
        QUEUE_OLDEST.labels(stream=stream.name).set(depth.oldest_pending_seconds)
    await _observe_server(streams)
    return waiting


async def _observe_server(streams: Streams) -> None:
    with translated(streams.prefix):
        memory = await streams.client.info("memory")
        persistence = await streams.client.info("persistence")
    # A server of another make may leave a figure out; its gauge then stays as it is.
    for kind, field in _MEMORY.items():
        if field in memory:
            REDIS_MEMORY.labels(kind=kind).set(memory[field])
    for kind, field in _PERSISTENCE.items():
        if field in persistence:
            REDIS_PERSISTENCE.labels(kind=kind).set(persistence[field] == "ok")


def _counts(report: StepReport, name: str) -> dict[str, int]:
    return {str(value): count for value, count in report.histograms.get(name, [])}


def _by_replica(batch: Sequence[ScoredGroup]) -> dict[str, int]:
    """Groups of the batch by the replica that sampled them."""
    counts: dict[str, int] = {}
    for group in batch:
        counts[group.rollout.replica] = counts.get(group.rollout.replica, 0) + 1
    return counts
