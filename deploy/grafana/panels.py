"""The rows of the dashboard: what each panel asks Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from queries import (
    Query,
    by_replica,
    latest,
    mean_seconds,
    of_run,
    quantiles,
    rate,
    rates_by,
    recorded,
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `unit` is one of Grafana's ids."""

    title: str
    unit: str
    queries: Sequence[Query]
    kind: Literal["lines", "stack", "heatmap", "number"] = "lines"
    is_logarithmic: bool = False


def lines(title: str, unit: str, *queries: Query) -> Panel:
    """Values over time."""
    return Panel(title, unit, queries)


def magnitudes(title: str, *queries: Query) -> Panel:
    """Values over time that differ by powers of ten."""
    return Panel(title, "none", queries, is_logarithmic=True)


def number(title: str, query: Query) -> Panel:
    """The last value alone."""
    return Panel(title, "none", [query], "number")


def stack(title: str, unit: str, query: Query) -> Panel:
    """Parts of a whole over time."""
    return Panel(title, unit, [query], "stack")


def heat(title: str, histogram: str) -> Panel:
    """How the values of a histogram lie over time."""
    inner = of_run(f"increase({histogram}_bucket[$__rate_interval])")
    return Panel(title, "short", [Query(f"sum by (le) ({inner})", "{{le}}")], "heatmap")


def _learner(name: str, label: str = "", *, legend: str = "") -> Query:
    return latest(f"isentrope_learner_{name}", label, legend=legend)


def _learners(**names: str) -> list[Query]:
    """Gauges of the learner and what each is called."""
    return [_learner(name, legend=legend) for name, legend in names.items()]


def _queue(title: str, unit: str, name: str) -> Panel:
    return lines(title, unit, latest(f"isentrope_queue_{name}", "stream"))


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        number("Policy version", _learner("policy_version")),
        number("Reward", _learner("reward_mean")),
        number("Held-out score", _learner("eval_score")),
        number("Entropy (nats)", _learner("policy_entropy_nats")),
        lines(
            "Reward and the ceiling that the law predicts",
            "none",
            *_learners(
                reward_mean="reward",
                eval_score="held-out score",
                predicted_reward_ceiling="ceiling",
            ),
        ),
        lines(
            "Tokens a second",
            "short",
            rate("isentrope_rollout_generated_tokens_total", legend="sampled"),
            rate("isentrope_learner_tokens_trained_total", legend="trained"),
        ),
        lines("Time of a step", "s", *quantiles("isentrope_learner_step_seconds")),
        lines(
            "Stalled",
            "none",
            _learner("stalled", legend="no step"),
            latest("isentrope_service_stalled", "service, instance", legend="{{instance}}"),
        ),
    ],
    "Entropy": [
        lines(
            "Entropy by its definition (nats)",
            "none",
            *_learners(
                policy_entropy_nats="token mean",
                policy_entropy_clamped_nats="clamped",
                policy_entropy_sequence_mean_nats="mean over completions",
            ),
            _learner("entropy_bound_nats", "bound", legend="band: {{bound}}"),
        ),
        lines(
            "Percentiles of token entropy (nats)",
            "none",
            _learner("policy_entropy_percentile_nats", "percentile", legend="p{{percentile}}"),
        ),
        lines("Weight of the entropy term", "none", _learner("entropy_coefficient")),
        magnitudes(
            "Covariance of log-prob and advantage, percentiles",
            _learner("token_covariance", "percentile", legend="p{{percentile}}"),
        ),
        lines(
            "Tokens whose loss a mechanism changed",
            "percentunit",
            recorded("run:isentrope_learner_tokens_intervened:ratio_rate15m", "{{mechanism}}"),
        ),
        lines(
            "Tokens clipped",
            "percentunit",
            *_learners(clip_fraction_low_ratio="below", clip_fraction_high_ratio="above"),
        ),
        magnitudes("Gradient norm", _learner("grad_norm")),
        lines(
            "Optimiser steps skipped for NaN or inf",
            "short",
            rate("isentrope_learner_nonfinite_total", "tensor"),
        ),
    ],
    "Reward and entropy": [
        lines("Steps until the floor", "short", _learner("entropy_steps_left")),
        lines("Entropy spent", "percentunit", _learner("entropy_consumed_ratio")),
        lines(
            "R = -a exp(H) + b",
            "none",
            _learner("entropy_law_a", legend="a"),
            _learner("entropy_law_a_bound", "percentile", legend="a, {{percentile}} %"),
            _learner("entropy_law_b", legend="b"),
        ),
        lines(
            "Score that the law predicts",
            "none",
            _learner("predicted_reward_ceiling", legend="at zero entropy"),
            _learner(
                "predicted_reward_ceiling_bound", "percentile", legend="..., {{percentile}} %"
            ),
            _learner("predicted_reward_at_floor", legend="at the floor"),
        ),
        lines(
            "Fit: R squared, and 1 if the law is identified",
            "none",
            *_learners(entropy_law_r_squared="R squared", entropy_law_identifiable="identified"),
        ),
        lines("Evaluations in the fit", "short", _learner("entropy_law_fit_points")),
    ],
    "Pipeline balance": [
        stack(
            "Where the learner's time goes",
            "percentunit",
            recorded("run:isentrope_learner_phase:ratio_rate15m", "{{phase}}"),
        ),
        stack(
            "A replica's time without a group",
            "percentunit",
            recorded("run:isentrope_rollout_idle:ratio_rate15m", "{{cause}}"),
        ),
        lines(
            "Streams: how full",
            "percentunit",
            recorded("run:isentrope_queue_fill:ratio", "{{stream}}, {{of}}"),
        ),
        lines(
            "Producers that wait for room",
            "short",
            recorded("run:isentrope_queue_backpressure:rate15m", "{{stream}}"),
        ),
        _queue("Messages never delivered", "short", "lag_messages"),
        _queue("Messages delivered, not acknowledged", "short", "pending_messages"),
        _queue("Payload of a stream", "bytes", "bytes"),
        _queue("Oldest pending message", "s", "oldest_pending_seconds"),
    ],
    "Off-policyness": [
        heat("Staleness of completions (versions)", "isentrope_learner_sample_staleness_versions"),
        lines(
            "Age of groups when trained", "s", *quantiles("isentrope_learner_sample_age_seconds")
        ),
        lines(
            "Completions not trained on, a second",
            "short",
            rate("isentrope_learner_samples_dropped_total", "reason"),
        ),
        lines(
            "Groups a second: issued again, given up",
            "short",
            *rates_by(
                "reason",
                isentrope_learner_groups_reissued_total="again",
                isentrope_learner_groups_abandoned_total="given up",
            ),
        ),
        magnitudes("Importance ratio", _learner("importance_ratio", "percentile")),
        magnitudes(
            "KL (nats a token)",
            *_learners(
                kl_behaviour_nats="mismatch: engine and learner",
                kl_update_nats="of an update",
                kl_reference_nats="to the reference",
            ),
        ),
        lines(
            "Effective share of the importance weights",
            "percentunit",
            _learner("importance_weight_effective_ratio"),
        ),
        lines("Steps in a row that nothing passed", "short", _learner("unrewarded_steps")),
    ],
    "Weights": [
        stack(
            "Phases of an update, mean",
            "s",
            mean_seconds("isentrope_weight_sync_seconds", "phase"),
        ),
        lines(
            "Updates of a replica within 15 minutes",
            "short",
            recorded("run:isentrope_weight_sync_operations:increase15m", "{{result}}"),
        ),
        lines("Version by replica", "none", by_replica("policy_version")),
        lines(
            "Versions that the last replica is behind",
            "none",
            recorded("run:isentrope_rollout_version_lag:max", "{{run}}"),
        ),
        lines(
            "Requests stood still (share of the time, all replicas)",
            "percentunit",
            rate("isentrope_weight_sync_pause_seconds_total"),
        ),
        lines("Parameter bytes a second", "Bps", rate("isentrope_weight_sync_bytes_total")),
        lines(
            "Brought up outside of the groups, a second",
            "short",
            rate("isentrope_weight_sync_streams_total", "result"),
        ),
        lines("Rounds repeated, a second", "short", rate("isentrope_weight_sync_retries_total")),
    ],
    "Rollout": [
        lines("Completions sampled now, by replica", "short", by_replica("inflight_requests")),
        lines("Groups that a replica may have in work", "short", by_replica("concurrency_groups")),
        lines("Tokens of a completion", "short", *quantiles("isentrope_rollout_response_tokens")),
        lines("Completions a second", "short", rate("isentrope_rollout_samples_total", "outcome")),
        lines(
            "Tokens a second, by replica",
            "short",
            rate("isentrope_rollout_generated_tokens_total", "instance"),
        ),
        lines(
            "Tokens saved and resumed, a second",
            "short",
            rate("isentrope_rollout_saved_tokens_total", legend="put aside"),
            rate("isentrope_rollout_resumed_tokens_total", legend="resumed"),
        ),
        lines("KV cache used", "percentunit", by_replica("kv_cache_usage_ratio")),
        lines(
            "Short of room in the engine",
            "short",
            by_replica("waiting_requests", legend="waiting: {{instance}}"),
            *rates_by("instance", isentrope_rollout_preemptions_total="set back a second"),
        ),
    ],
    "Rollout engine": [
        lines(
            "Requests in vLLM",
            "short",
            latest("vllm:num_requests_running", "instance", legend="running: {{instance}}"),
            latest("vllm:num_requests_waiting", "instance", legend="waiting: {{instance}}"),
        ),
        lines("KV cache of vLLM", "percentunit", latest("vllm:kv_cache_usage_perc", "instance")),
        lines(
            "Preemptions in vLLM, a second",
            "short",
            rate("vllm:num_preemptions_total", "instance"),
        ),
        lines(
            "A request's time in vLLM's queue", "s", *quantiles("vllm:request_queue_time_seconds")
        ),
        lines(
            "Time to a completion's first token",
            "s",
            *quantiles("vllm:time_to_first_token_seconds"),
        ),
        lines("Time between two tokens", "s", *quantiles("vllm:inter_token_latency_seconds")),
        lines(
            "Tokens through vLLM, a second",
            "short",
            rate("vllm:prompt_tokens_total", legend="prompt"),
            rate("vllm:generation_tokens_total", legend="completion"),
        ),
        lines(
            "Prompt tokens asked of and found in the prefix cache, a second",
            "short",
            rate("vllm:prefix_cache_queries_total", legend="asked"),
            rate("vllm:prefix_cache_hits_total", legend="found"),
        ),
    ],
    "Verifier": [
        lines("Time to score a completion", "s", *quantiles("isentrope_verifier_duration_seconds")),
        lines("Verdicts a second", "short", rate("isentrope_verifier_results_total", "result")),
        lines(
            "Without a verdict",
            "percentunit",
            recorded("run:isentrope_verifier_unjudged:ratio_rate15m", "{{verifier}}"),
        ),
        lines(
            "Taken over from the dead, given up; a second",
            "short",
            *rates_by(
                "stream",
                isentrope_queue_redelivered_total="taken over",
                isentrope_queue_dead_lettered_total="given up",
            ),
        ),
    ],
    "Infrastructure": [
        lines("Redis memory", "bytes", latest("isentrope_redis_memory_bytes", "kind")),
        lines("Redis on disk (1: well)", "none", latest("isentrope_redis_persistence_ok", "kind")),
        lines(
            "gRPC answers a second", "short", rate("isentrope_grpc_server_handled_total", "code")
        ),
        lines(
            "Time until a certificate expires",
            "s",
            latest(
                "(isentrope_certificate_expiry_timestamp_seconds - time())",
                "certificate, instance",
                legend="{{instance}}, {{certificate}}",
            ),
        ),
        lines("Memory of a process", "bytes", latest("process_resident_memory_bytes", "instance")),
    ],
}
