"""What the learner does, and whether its steps come."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from shared.metrics.quantities import LearnerGauges
from shared.metrics.weights import (
    SYNC_BUCKETS,
    SYNC_RESULTS,
    WEIGHT_SYNC_OPERATIONS,
    WEIGHT_SYNC_STREAMS,
)

PHASES = ("wait_data", "prepare", "forward_backward", "weight_publish", "checkpoint")
LEARNER_VERSION = Gauge("isentrope_learner_policy_version", "Newest published policy version.")
LEARNER_STEPS = Counter("isentrope_learner_steps_total", "Training batches finished.")
LEARNER_TOKENS = Counter("isentrope_learner_tokens_trained_total", "Completion tokens trained on.")
LEARNER_SAMPLES = Counter("isentrope_learner_samples_consumed_total", "Completions trained on.")
LEARNER_PHASE = Counter(
    "isentrope_learner_phase_seconds_total", "Where the learner's time goes.", ["phase"]
)
LEARNER_STEP_SECONDS = Histogram(
    "isentrope_learner_step_seconds",
    "Time of a step, waiting for data included.",
    buckets=[0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
)
LEARNER_DEGENERATE = Counter(
    "isentrope_learner_groups_degenerate_total", "Groups that teach nothing.", ["reason"]
)
LEARNER_INTERVENED = Counter(
    "isentrope_learner_tokens_intervened_total",
    "Tokens whose loss a mechanism changed.",
    ["mechanism"],
)
LEARNER_NONFINITE = Counter(
    "isentrope_learner_nonfinite_total", "Optimiser steps skipped for NaN or inf.", ["tensor"]
)
LEARNER_STALENESS = Histogram(
    "isentrope_learner_sample_staleness_versions",
    "Staleness of each trained completion.",
    buckets=[0, 1, 2, 3, 4, 6, 8, 12, 16, 32],
)
LEARNER_TOKENS_BY_LAG = Counter(
    # Lags are few whole numbers, and a counter takes a batch's tokens of one lag at once.
    "isentrope_learner_version_lag_tokens_total",
    "Tokens trained, by how many versions ago they were sampled.",
    ["versions"],
)
LEARNER_AGE = Histogram(
    "isentrope_learner_sample_age_seconds",
    "Time from sampling to training of a group.",
    buckets=SYNC_BUCKETS,
)
LEARNER_DROPPED = Counter(
    "isentrope_learner_samples_dropped_total", "Completions not trained on.", ["reason"]
)
LEARNER_REISSUED = Counter(
    "isentrope_learner_groups_reissued_total", "Prompt groups issued again.", ["reason"]
)
LEARNER_ABANDONED = Counter(
    "isentrope_learner_groups_abandoned_total", "Prompt groups given up.", ["reason"]
)
LEARNER_ENTROPY_BOUND = Gauge("isentrope_learner_entropy_bound_nats", "AEnt's band.", ["bound"])
LEARNER_CHECKPOINTS = Counter(
    "isentrope_learner_checkpoints_total", "Checkpoints by result.", ["result"]
)
LEARNER_CHECKPOINT_SECONDS = Histogram(
    "isentrope_learner_checkpoint_seconds",
    "Time from a checkpoint's snapshot until the disk has it, most of it beside the training.",
    buckets=[0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
)
LEARNER_ROWS_REFUSED = Counter(
    "isentrope_learner_rows_refused_total",
    "Rows of metrics.jsonl and ledger.jsonl that the disk did not take at once.",
    ["file"],
)
LEARNER_ROWS_LOST = Counter(
    "isentrope_learner_rows_lost_total",
    "Of those, rows that found no room in memory either.",
    ["file"],
)

# Of the learner alone: elsewhere a time of 0 would read as a step made in 1970.
LEARNER_STALLED = Gauge(
    "isentrope_learner_stalled",
    "1 if no step ended within watchdog.stall_seconds, whoever is the cause, else 0.",
    registry=None,
)
LEARNER_LAST_STEP = Gauge(
    "isentrope_learner_last_step_timestamp_seconds",
    "When a step last ended; before the first one, when the learner started.",
    registry=None,
)
LEARNER_UNREWARDED = Gauge(
    "isentrope_learner_unrewarded_steps",
    "Steps in a row, up to the last one, whose batch held no completion that passed.",
    registry=None,
)


def learner_gauges(registry: CollectorRegistry = REGISTRY) -> LearnerGauges:
    """The learner's gauges, registered; and its counters at zero."""
    for phase in PHASES:
        LEARNER_PHASE.labels(phase=phase)
    for result in SYNC_RESULTS:
        WEIGHT_SYNC_OPERATIONS.labels(result=result)
    LEARNER_DROPPED.labels(reason="stale")
    for result in ("ok", "error"):
        LEARNER_CHECKPOINTS.labels(result=result)
        WEIGHT_SYNC_STREAMS.labels(result=result)
    for file in ("metrics", "ledger"):
        LEARNER_ROWS_REFUSED.labels(file=file)
        LEARNER_ROWS_LOST.labels(file=file)
    gauges = LearnerGauges()
    registry.register(gauges)
    return gauges


def watch_steps(registry: CollectorRegistry = REGISTRY) -> None:
    """Have the series of whether steps come, and teach, as of a learner that starts now."""
    LEARNER_STALLED.set(0)
    LEARNER_UNREWARDED.set(0)
    LEARNER_LAST_STEP.set_to_current_time()
    for gauge in (LEARNER_STALLED, LEARNER_LAST_STEP, LEARNER_UNREWARDED):
        registry.register(gauge)
