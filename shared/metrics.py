"""Every Prometheus series of the project, declared once: name, help, labels, buckets.

Names are `isentrope_<service>_<what>_<unit>`; base units; counters end in `_total`. Each process
fills those of its own service; a gauge appears only once it was measured. Label values that an
alert needs to see at zero are initialised here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared.errors import StartError
from shared.metrics_server import MetricsServer
from shared.tls import Credentials

disable_created_metrics()  # type: ignore[no-untyped-call]

BUILD = Info("isentrope_build", "Version of the code.")
RUN = Info("isentrope_run", "What this process is part of.")

RPC_HANDLED = Counter("isentrope_grpc_server_handled_total", "Calls answered.", ["method", "code"])
RPC_SECONDS = Histogram(
    "isentrope_grpc_server_handling_seconds", "Time to answer a call.", ["method"]
)

SERVICE_STALLED = Gauge(
    "isentrope_service_stalled",
    "1 if this process makes no progress in work of its own, else 0.",
    ["service"],
)

QUEUE_LENGTH = Gauge(
    "isentrope_queue_length_messages", "Messages in a stream, waiting and pending.", ["stream"]
)
QUEUE_CAPACITY = Gauge(
    "isentrope_queue_capacity_messages", "Messages a stream may hold.", ["stream"]
)
QUEUE_BYTES = Gauge(
    "isentrope_queue_bytes", "Payload of a stream's messages, waiting and pending.", ["stream"]
)
QUEUE_CAPACITY_BYTES = Gauge(
    "isentrope_queue_capacity_bytes", "Payload at which a stream is full.", ["stream"]
)
QUEUE_LAG = Gauge(
    "isentrope_queue_lag_messages", "Messages never delivered to a consumer.", ["stream"]
)
QUEUE_PENDING = Gauge(
    "isentrope_queue_pending_messages", "Messages delivered and not acknowledged.", ["stream"]
)
QUEUE_OLDEST = Gauge(
    "isentrope_queue_oldest_pending_seconds", "Age of the oldest pending message.", ["stream"]
)
REDIS_MEMORY = Gauge(
    "isentrope_redis_memory_bytes",
    "Memory of the server: used, and the most that it may use (0: no bound).",
    ["kind"],
)
REDIS_PERSISTENCE = Gauge(
    "isentrope_redis_persistence_ok",
    "1 if the last write of this kind to disk succeeded, else 0.",
    ["kind"],
)
BACKPRESSURE_SECONDS = Counter(
    "isentrope_queue_backpressure_seconds_total", "Time a producer waited for room.", ["stream"]
)
REDELIVERED = Counter(
    "isentrope_queue_redelivered_total", "Messages taken over from a dead consumer.", ["stream"]
)
DEAD_LETTERED = Counter("isentrope_queue_dead_lettered_total", "Messages given up on.", ["stream"])

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

_SYNC_BUCKETS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
WEIGHT_SYNC_SECONDS = Histogram(
    "isentrope_weight_sync_seconds",
    "Phases of bringing a version to the replicas.",
    ["phase"],
    buckets=_SYNC_BUCKETS,
)
WEIGHT_SYNC_OPERATIONS = Counter(
    "isentrope_weight_sync_operations_total", "Refits of one replica by result.", ["result"]
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
    "isentrope_weight_sync_bytes_total", "Parameter bytes sent to, or received by, a replica."
)
WEIGHT_SYNC_LAST_SUCCESS = Gauge(
    "isentrope_weight_sync_last_success_timestamp_seconds", "When a refit last succeeded."
)
WEIGHT_SYNC_PAUSE = Counter(
    "isentrope_weight_sync_pause_seconds_total", "Time requests stood still for a swap."
)

VERIFIER_SECONDS = Histogram(
    "isentrope_verifier_duration_seconds", "Time to score one completion.", ["verifier"]
)
VERIFIER_RESULTS = Counter(
    "isentrope_verifier_results_total", "Completions by outcome.", ["verifier", "result"]
)

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
    buckets=_SYNC_BUCKETS,
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

PHASES = ("wait_data", "forward_backward", "weight_publish", "checkpoint")
SYNC_RESULTS = ("ok", "error", "timeout", "canary")

_LEARNER_GAUGES = {
    "entropy": ("policy_entropy_nats", "Full-vocabulary entropy, token mean."),
    "entropy_clamped": ("policy_entropy_clamped_nats", "Clamped entropy (AEnt), token mean."),
    "entropy_seq_mean": (
        "policy_entropy_sequence_mean_nats",
        "Full-vocabulary entropy, mean over completions.",
    ),
    "entropy_after_filter": (
        "policy_entropy_after_filter_nats",
        "The same over prompts that are neither always nor never solved; the law's H.",
    ),
    "entropy_removed_mass": (
        "entropy_removed_mass_ratio",
        "Probability of the tokens that AEnt's clamp leaves out.",
    ),
    "entropy_reward_positive": (
        "policy_entropy_rewarded_nats",
        "Entropy over completions with a reward above 0.",
    ),
    "entropy_reward_other": (
        "policy_entropy_unrewarded_nats",
        "Entropy over the other completions.",
    ),
    "entropy_consumed": (
        "entropy_consumed_ratio",
        "Share of the entropy between the start and the floor spent.",
    ),
    "entropy_rate": ("entropy_rate_nats_per_step", "Slope of the entropy over the last steps."),
    "entropy_change_measured": (
        "entropy_change_nats",
        "Change of the entropy over one step, on the same tokens.",
    ),
    "entropy_change_predicted_pg": (
        "entropy_change_predicted_policy_gradient",
        "-Cov(log p, p A) over tokens; a scale-free guess.",
    ),
    "entropy_change_predicted_npg": (
        "entropy_change_predicted_natural_gradient",
        "-Cov(log p, A) over tokens; scale-free.",
    ),
    "entropy_change_predicted_influence": (
        "entropy_change_predicted_influence",
        "First-order change by the sampled gradient; scale-free.",
    ),
    "entropy_coefficient": ("entropy_coefficient", "Weight of the entropy term."),
    "covariance_mean": ("token_covariance_mean", "Mean covariance of log-prob and advantage."),
    "covariance_response": (
        "response_covariance_mean",
        "Covariance within groups, a completion as one action.",
    ),
    "covariance_in_window_fraction": (
        "token_covariance_in_window_ratio",
        "Share of tokens inside Clip-Cov's window.",
    ),
    "selected_fraction": ("selected_tokens_ratio", "Share of tokens the covariance method chose."),
    "selected_negative_advantage_fraction": (
        "selected_negative_advantage_ratio",
        "Share of the chosen tokens with A < 0.",
    ),
    "selected_probability_mean": (
        "selected_probability_mean",
        "Mean probability of the chosen tokens.",
    ),
    "top_entropy_fraction": (
        "top_entropy_tokens_ratio",
        "Share of tokens that the top-entropy mask keeps.",
    ),
    "entropy_ratio_clipped_fraction": (
        "entropy_ratio_clipped_ratio",
        "Share of tokens without gradient by entropy-ratio clipping.",
    ),
    "clip_fraction_low": ("clip_fraction_low_ratio", "Share of tokens clipped below."),
    "clip_fraction_high": ("clip_fraction_high_ratio", "Share of tokens clipped above."),
    "update_kl": ("kl_update_nats", "KL of the proximal from the trained policy, estimated."),
    "reference_kl": ("kl_reference_nats", "KL of the trained from the reference policy."),
    "importance_weight_ess": (
        "importance_weight_effective_ratio",
        "Effective sample size of the weights, a share.",
    ),
    "reward_mean": ("reward_mean", "Mean reward of the batch."),
    "reward_std": ("reward_stddev", "Standard deviation of the batch's rewards."),
    "loss": ("loss", "Loss of the last batch."),
    "grad_norm": ("grad_norm", "Gradient norm before clipping."),
    "mismatch_kl": (
        "kl_behaviour_nats",
        "KL of the learner's recomputed log-probs against the engine's reported ones.",
    ),
    "learning_rate": ("learning_rate", "Of the optimiser."),
    "eval_score": ("eval_score", "Mean reward on held-out problems."),
    "law_a": ("entropy_law_a", "a of R = -a exp(H) + b."),
    "law_b": ("entropy_law_b", "b of R = -a exp(H) + b."),
    "law_r2": ("entropy_law_r_squared", "Share of the score's variance the law explains."),
    "law_points": ("entropy_law_fit_points", "Evaluations the law is fitted on."),
    "law_ceiling": ("predicted_reward_ceiling", "Score the law predicts at zero entropy."),
    "law_identifiable": (
        "entropy_law_identifiable",
        "1 if the evaluations identify the law, else 0.",
    ),
    "law_condition": ("entropy_law_condition", "Condition number of the law's fit."),
    "law_score_at_floor": (
        "predicted_reward_at_floor",
        "Score the law predicts when the entropy is at its floor.",
    ),
    "law_gain_left": ("predicted_reward_gain_left", "Score the law still predicts to be gained."),
    "law_steps_left": (
        "entropy_steps_left",
        "Steps until the entropy reaches its floor at the present rate.",
    ),
}

_LEARNER_PERCENTILES = {
    "policy_entropy_percentile_nats": (
        "Percentiles of token entropy.",
        {"10": "entropy_p10", "50": "entropy_p50", "80": "entropy_p80", "90": "entropy_p90",
         "99": "entropy_p99"},
    ),
    "token_covariance": (
        "Percentiles of the covariance of log-prob and advantage.",
        {"50": "covariance_p50", "90": "covariance_p90", "99": "covariance_p99",
         "99.8": "covariance_p99_8", "100": "covariance_p100"},
    ),
    "importance_ratio": (
        "Mean and largest ratio of target to proximal probability.",
        {"mean": "ratio_mean", "max": "ratio_max", "min": "ratio_min"},
    ),
    "predicted_reward_ceiling_bound": (
        "Ends of the 95 % interval of the ceiling.",
        {"2.5": "law_ceiling_low", "97.5": "law_ceiling_high"},
    ),
    "entropy_law_a_bound": (
        "Ends of the 95 % interval of a.", {"2.5": "law_a_low", "97.5": "law_a_high"}
    ),
    "token_covariance_top_mean": (
        "Mean covariance of the tokens in the top percent named.",
        {"0.02": "covariance_top_0_02", "0.2": "covariance_top_0_2", "2": "covariance_top_2",
         "20": "covariance_top_20", "50": "covariance_top_50"},
    ),
}  # fmt: skip


class LearnerGauges(Collector):
    """The newest value of each quantity of `metrics.jsonl` that has a series of its own.

    One source for both: what `/metrics` shows is what the last line of the file says, and a
    quantity that was never measured has no series.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def show(self, values: Mapping[str, float]) -> None:
        """Replace what is shown: the newest value of each key of metrics.jsonl."""
        self._values = dict(values)

    def collect(self) -> Iterable[Metric]:
        """Called at every scrape."""
        values = self._values
        for key, (name, text) in _LEARNER_GAUGES.items():
            if key in values:
                yield GaugeMetricFamily(f"isentrope_learner_{name}", text, value=values[key])
        yield from self._percentiles(values)

    def _percentiles(self, values: Mapping[str, float]) -> Iterable[Metric]:
        for name, (text, keys) in _LEARNER_PERCENTILES.items():
            family = GaugeMetricFamily(f"isentrope_learner_{name}", text, labels=["percentile"])
            for percentile, key in keys.items():
                if key in values:
                    family.add_metric([percentile], values[key])
            if family.samples:
                yield family


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


def describe_process(*, run_id: str, model: str, algorithm: str) -> None:
    """Say once, for all series of this process, which run they belong to."""
    BUILD.info({"version": version("isentrope")})
    RUN.info({"run": run_id, "model": model, "algorithm": algorithm})


def serve_metrics(
    *, host: str, port: int, tls: Credentials | None = None, token_file: Path | None = None
) -> MetricsServer:
    """Serve `/metrics`, and the health that it is told to; see `shared.metrics_server`.

    Raises:
        StartError: the port is taken, or there is no token in the file.
    """
    try:
        return MetricsServer(host, port, metrics=make_wsgi_app(), tls=tls, token_file=token_file)
    except OSError:
        raise StartError(
            f"network.metrics_port = {port}: taken on {host}; free it, or use 0 for any free port"
        ) from None
