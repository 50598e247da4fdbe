"""What a rollout replica does."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ROLLOUT_VERSION = Gauge(
    "isentrope_rollout_policy_version", "Policy version this replica samples from."
)
ROLLOUT_TOKENS = Counter("isentrope_rollout_generated_tokens_total", "Completion tokens sampled.")
ROLLOUT_SAMPLES = Counter(
    "isentrope_rollout_samples_total", "Completions by how they ended.", ["outcome"]
)
ROLLOUT_MIXED = Counter(
    "isentrope_rollout_mixed_version_samples_total",
    "Completions whose tokens came from more than one policy version.",
)
ROLLOUT_IDLE = Counter(
    "isentrope_rollout_idle_seconds_total", "Time without a group in flight.", ["cause"]
)
ROLLOUT_IN_FLIGHT = Gauge("isentrope_rollout_inflight_requests", "Completions being sampled now.")
ROLLOUT_RESPONSE_TOKENS = Histogram(
    "isentrope_rollout_response_tokens",
    "Tokens of a completion.",
    buckets=[4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
)
ROLLOUT_SAVED_TOKENS = Counter(
    "isentrope_rollout_saved_tokens_total", "Tokens of unfinished completions put aside."
)
ROLLOUT_SAVED_BYTES = Counter(
    "isentrope_rollout_saved_bytes_total", "Payload of unfinished completions put aside."
)
ROLLOUT_RESUMED_TOKENS = Counter(
    "isentrope_rollout_resumed_tokens_total",
    "Tokens that another attempt had sampled, and that were not sampled again.",
)
ROLLOUT_GIVEN_BACK = Counter(
    "isentrope_rollout_given_back_groups_total",
    "Groups that this replica could not sample for long and left to others.",
)
ROLLOUT_WAITING = Gauge(
    "isentrope_rollout_waiting_requests", "Completions that wait for room in the engine."
)
ROLLOUT_KV_CACHE = Gauge(
    "isentrope_rollout_kv_cache_usage_ratio", "Share of the engine's KV cache in use."
)
ROLLOUT_PREEMPTIONS = Counter(
    "isentrope_rollout_preemptions_total", "Completions that the engine set back for want of room."
)
ROLLOUT_CONCURRENCY = Gauge(
    "isentrope_rollout_concurrency_groups", "Groups that this replica may have in work at a time."
)
ROLLOUT_CONCURRENCY_CHANGES = Counter(
    "isentrope_rollout_concurrency_changes_total", "Changes of that number by cause.", ["reason"]
)
