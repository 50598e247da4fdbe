"""How a version comes from the learner to the replicas.

Each thing is counted at one of the two ends only: a sum over all processes of a run is the truth.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SYNC_BUCKETS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]

WEIGHT_SYNC_SECONDS = Histogram(
    "isentrope_weight_sync_seconds",
    "Phases of bringing a version to the replicas: the learner's gather and broadcast, each"
    " replica's load and swap.",
    ["phase"],
    buckets=SYNC_BUCKETS,
)
WEIGHT_SYNC_OPERATIONS = Counter(
    "isentrope_weight_sync_operations_total",
    "Refits of one replica by result, as the learner judged them.",
    ["result"],
)
WEIGHT_SYNC_RETRIES = Counter(
    "isentrope_weight_sync_retries_total",
    "Rounds of publications after the first, for the replicas that it did not reach.",
)
WEIGHT_SYNC_STREAMS = Counter(
    "isentrope_weight_sync_streams_total",
    "Replicas that were brought up outside of the groups, by result.",
    ["result"],
)
WEIGHT_SYNC_BYTES = Counter(
    "isentrope_weight_sync_bytes_total",
    "Parameter bytes that the learner sent; once to a group of many.",
)
WEIGHT_SYNC_LAST_SUCCESS = Gauge(
    "isentrope_weight_sync_last_success_timestamp_seconds", "When a refit last succeeded."
)
WEIGHT_SYNC_PAUSE = Counter(
    "isentrope_weight_sync_pause_seconds_total",
    "Time a replica's requests stood still for a swap.",
)

SYNC_RESULTS = ("ok", "error", "timeout", "canary")
