"""The rows of the dashboard: what each panel asks Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_RUN = '{run="$run"}'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression; `{{label}}` in the legend is that label's value."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `unit` is one of Grafana's ids."""

    title: str
    unit: str
    queries: Sequence[Query]
    kind: Literal["lines", "stack", "heatmap", "number"] = "lines"
    is_logarithmic: bool = False


def of_run(expr: str) -> str:
    """The series of the chosen run; services export their run once, as `isentrope_run_info`."""
    return f"{expr} * on (job, instance) group_left (run) isentrope_run_info{_RUN}"


def latest(metric: str, label: str = "", *, legend: str = "") -> Query:
    """A gauge of one service, by `label` if given."""
    by = f"run, {label}" if label else "run"
    shown = legend or (f"{{{{{label}}}}}" if label else "{{run}}")
    return Query(f"max by ({by}) ({of_run(metric)})", shown)


def by_replica(name: str, *, legend: str = "{{instance}}") -> Query:
    """A gauge of the rollout replicas, which other services export as 0."""
    metric, by = f"isentrope_rollout_{name}", "on (job, instance)"
    gauge = of_run(f'({metric} and {by} isentrope_service_stalled{{service="rollout"}})')
    return Query(f"max by (run, instance) ({gauge})", legend)


def rate(counter: str, label: str = "", *, legend: str = "") -> Query:
    """A counter of all processes a second, by `label` if given."""
    by = f"run, {label}" if label else "run"
    shown = legend or (f"{{{{{label}}}}}" if label else "{{run}}")
    inner = of_run(f"rate({counter}[$__rate_interval])")
    return Query(f"sum by ({by}) ({inner})", shown)


def quantiles(histogram: str, label: str = "") -> list[Query]:
    """p50, p95 and p99 of all processes."""
    by = f"run, le, {label}" if label else "run, le"
    inner = of_run(f"rate({histogram}_bucket[$__rate_interval])")
    suffix = f" {{{{{label}}}}}" if label else ""
    return [
        Query(f"histogram_quantile({share}, sum by ({by}) ({inner}))", f"p{share[2:]}{suffix}")
        for share in ("0.50", "0.95", "0.99")
    ]


def buckets(histogram: str) -> list[Query]:
    """For a heat map."""
    inner = of_run(f"increase({histogram}_bucket[$__rate_interval])")
    return [Query(f"sum by (le) ({inner})", "{{le}}")]


def recorded(rule: str, legend: str) -> Query:
    """What deploy/prometheus/rules.yml has computed."""
    return Query(f"{rule}{_RUN}", legend)


def _learner(name: str, label: str = "", *, legend: str = "") -> Query:
    return latest(f"isentrope_learner_{name}", label, legend=legend)


def _queue(name: str) -> list[Query]:
    return [latest(f"isentrope_queue_{name}", "stream")]


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        Panel("Policy version", "none", [_learner("policy_version")], "number"),
        Panel("Reward", "none", [_learner("reward_mean")], "number"),
        Panel("Held-out score", "none", [_learner("eval_score")], "number"),
        Panel("Entropy (nats)", "none", [_learner("policy_entropy_nats")], "number"),
        Panel(
            "Reward and the ceiling that the law predicts",
            "none",
            [
                _learner("reward_mean", legend="reward"),
                _learner("eval_score", legend="held-out score"),
                _learner("predicted_reward_ceiling", legend="ceiling"),
            ],
        ),
        Panel(
            "Tokens a second",
            "short",
            [
                rate("isentrope_rollout_generated_tokens_total", legend="sampled"),
                rate("isentrope_learner_tokens_trained_total", legend="trained"),
            ],
        ),
        Panel("Time of a step", "s", quantiles("isentrope_learner_step_seconds")),
        Panel(
            "Stalled",
            "none",
            [
                _learner("stalled", legend="no step"),
                latest("isentrope_service_stalled", "service, instance", legend="{{instance}}"),
            ],
        ),
    ],
    "Entropy": [
        Panel(
            "Entropy by its definition (nats)",
            "none",
            [
                _learner("policy_entropy_nats", legend="token mean"),
                _learner("policy_entropy_clamped_nats", legend="clamped"),
                _learner("policy_entropy_sequence_mean_nats", legend="mean over completions"),
                _learner("entropy_bound_nats", "bound", legend="band: {{bound}}"),
            ],
        ),
        Panel(
            "Percentiles of token entropy (nats)",
            "none",
            [_learner("policy_entropy_percentile_nats", "percentile", legend="p{{percentile}}")],
        ),
        Panel("Weight of the entropy term", "none", [_learner("entropy_coefficient")]),
        Panel(
            "Covariance of log-prob and advantage, percentiles",
            "none",
            [_learner("token_covariance", "percentile", legend="p{{percentile}}")],
            is_logarithmic=True,
        ),
        Panel(
            "Tokens whose loss a mechanism changed",
            "percentunit",
            [recorded("run:isentrope_learner_tokens_intervened:ratio_rate15m", "{{mechanism}}")],
        ),
        Panel(
            "Tokens clipped",
            "percentunit",
            [
                _learner("clip_fraction_low_ratio", legend="below"),
                _learner("clip_fraction_high_ratio", legend="above"),
            ],
        ),
        Panel("Gradient norm", "none", [_learner("grad_norm")], is_logarithmic=True),
        Panel(
            "Optimiser steps skipped for NaN or inf",
            "short",
            [rate("isentrope_learner_nonfinite_total", "tensor")],
        ),
    ],
    "Reward and entropy": [
        Panel("Steps until the floor", "short", [_learner("entropy_steps_left")]),
        Panel("Entropy spent", "percentunit", [_learner("entropy_consumed_ratio")]),
        Panel(
            "R = -a exp(H) + b",
            "none",
            [
                _learner("entropy_law_a", legend="a"),
                _learner("entropy_law_a_bound", "percentile", legend="a, {{percentile}} %"),
                _learner("entropy_law_b", legend="b"),
            ],
        ),
        Panel(
            "Score that the law predicts",
            "none",
            [
                _learner("predicted_reward_ceiling", legend="at zero entropy"),
                _learner(
                    "predicted_reward_ceiling_bound", "percentile", legend="..., {{percentile}} %"
                ),
                _learner("predicted_reward_at_floor", legend="at the floor"),
            ],
        ),
        Panel(
            "Fit: R squared, and 1 if the law is identified",
            "none",
            [
                _learner("entropy_law_r_squared", legend="R squared"),
                _learner("entropy_law_identifiable", legend="identified"),
            ],
        ),
        Panel("Evaluations in the fit", "short", [_learner("entropy_law_fit_points")]),
    ],
    "Pipeline balance": [
        Panel(
            "Where the learner's time goes",
            "percentunit",
            [recorded("run:isentrope_learner_phase:ratio_rate15m", "{{phase}}")],
            "stack",
        ),
        Panel(
            "A replica's time without a group",
            "percentunit",
            [recorded("run:isentrope_rollout_idle:ratio_rate15m", "{{cause}}")],
            "stack",
        ),
        Panel(
            "Streams: how full",
            "percentunit",
            [recorded("run:isentrope_queue_fill:ratio", "{{stream}}, {{of}}")],
        ),
        Panel(
            "Producers that wait for room",
            "short",
            [recorded("run:isentrope_queue_backpressure:rate15m", "{{stream}}")],
        ),
        Panel("Messages never delivered", "short", _queue("lag_messages")),
        Panel("Messages delivered, not acknowledged", "short", _queue("pending_messages")),
        Panel("Payload of a stream", "bytes", _queue("bytes")),
        Panel("Oldest pending message", "s", _queue("oldest_pending_seconds")),
    ],
    "Off-policyness": [
        Panel(
            "Staleness of completions (versions)",
            "short",
            buckets("isentrope_learner_sample_staleness_versions"),
            "heatmap",
        ),
        Panel("Age of groups when trained", "s", quantiles("isentrope_learner_sample_age_seconds")),
        Panel(
            "Completions not trained on, a second",
            "short",
            [rate("isentrope_learner_samples_dropped_total", "reason")],
        ),
        Panel(
            "Groups a second: issued again, given up",
            "short",
            [
                rate(
                    "isentrope_learner_groups_reissued_total", "reason", legend="again: {{reason}}"
                ),
                rate(
                    "isentrope_learner_groups_abandoned_total",
                    "reason",
                    legend="given up: {{reason}}",
                ),
            ],
        ),
        Panel(
            "Importance ratio",
            "none",
            [_learner("importance_ratio", "percentile")],
            is_logarithmic=True,
        ),
        Panel(
            "KL (nats a token)",
            "none",
            [
                _learner("kl_behaviour_nats", legend="mismatch: engine and learner"),
                _learner("kl_update_nats", legend="of an update"),
                _learner("kl_reference_nats", legend="to the reference"),
            ],
            is_logarithmic=True,
        ),
        Panel(
            "Effective share of the importance weights",
            "percentunit",
            [_learner("importance_weight_effective_ratio")],
        ),
        Panel("Steps in a row that nothing passed", "short", [_learner("unrewarded_steps")]),
    ],
    "Weights": [
        Panel(
            "Phases of an update, mean",
            "s",
            [
                Query(
                    "sum by (run, phase) ("
                    + of_run("rate(isentrope_weight_sync_seconds_sum[$__rate_interval])")
                    + ") / sum by (run, phase) ("
                    + of_run("rate(isentrope_weight_sync_seconds_count[$__rate_interval])")
                    + ")",
                    "{{phase}}",
                )
            ],
            "stack",
        ),
        Panel(
            "Updates of a replica within 15 minutes",
            "short",
            [recorded("run:isentrope_weight_sync_operations:increase15m", "{{result}}")],
        ),
        Panel("Version by replica", "none", [by_replica("policy_version")]),
        Panel(
            "Versions that the last replica is behind",
            "none",
            [recorded("run:isentrope_rollout_version_lag:max", "{{run}}")],
        ),
        Panel(
            "Requests stood still (share of the time, all replicas)",
            "percentunit",
            [rate("isentrope_weight_sync_pause_seconds_total")],
        ),
        Panel("Parameter bytes a second", "Bps", [rate("isentrope_weight_sync_bytes_total")]),
        Panel(
            "Brought up outside of the groups, a second",
            "short",
            [rate("isentrope_weight_sync_streams_total", "result")],
        ),
        Panel("Rounds repeated, a second", "short", [rate("isentrope_weight_sync_retries_total")]),
    ],
    "Rollout": [
        Panel(
            "Completions sampled now, by replica",
            "short",
            [by_replica("inflight_requests")],
        ),
        Panel(
            "Groups that a replica may have in work",
            "short",
            [by_replica("concurrency_groups")],
        ),
        Panel("Tokens of a completion", "short", quantiles("isentrope_rollout_response_tokens")),
        Panel(
            "Completions a second",
            "short",
            [rate("isentrope_rollout_samples_total", "outcome")],
        ),
        Panel(
            "Tokens a second, by replica",
            "short",
            [rate("isentrope_rollout_generated_tokens_total", "instance")],
        ),
        Panel(
            "Tokens saved and resumed, a second",
            "short",
            [
                rate("isentrope_rollout_saved_tokens_total", legend="put aside"),
                rate("isentrope_rollout_resumed_tokens_total", legend="resumed"),
            ],
        ),
        Panel("KV cache used", "percentunit", [by_replica("kv_cache_usage_ratio")]),
        Panel(
            "Short of room in the engine",
            "short",
            [
                by_replica("waiting_requests", legend="waiting: {{instance}}"),
                rate(
                    "isentrope_rollout_preemptions_total",
                    "instance",
                    legend="set back a second: {{instance}}",
                ),
            ],
        ),
    ],
    "Rollout engine": [
        Panel(
            "Requests in vLLM",
            "short",
            [
                latest("vllm:num_requests_running", "instance", legend="running: {{instance}}"),
                latest("vllm:num_requests_waiting", "instance", legend="waiting: {{instance}}"),
            ],
        ),
        Panel(
            "KV cache of vLLM",
            "percentunit",
            [latest("vllm:kv_cache_usage_perc", "instance")],
        ),
        Panel(
            "Preemptions in vLLM, a second",
            "short",
            [rate("vllm:num_preemptions_total", "instance")],
        ),
        Panel(
            "A request's time in vLLM's queue", "s", quantiles("vllm:request_queue_time_seconds")
        ),
        Panel(
            "Time to a completion's first token", "s", quantiles("vllm:time_to_first_token_seconds")
        ),
        Panel("Time between two tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
        Panel(
            "Tokens through vLLM, a second",
            "short",
            [
                rate("vllm:prompt_tokens_total", legend="prompt"),
                rate("vllm:generation_tokens_total", legend="completion"),
            ],
        ),
        Panel(
            "Prompt tokens asked of and found in the prefix cache, a second",
            "short",
            [
                rate("vllm:prefix_cache_queries_total", legend="asked"),
                rate("vllm:prefix_cache_hits_total", legend="found"),
            ],
        ),
    ],
    "Verifier": [
        Panel("Time to score a completion", "s", quantiles("isentrope_verifier_duration_seconds")),
        Panel("Verdicts a second", "short", [rate("isentrope_verifier_results_total", "result")]),
        Panel(
            "Without a verdict",
            "percentunit",
            [recorded("run:isentrope_verifier_unjudged:ratio_rate15m", "{{verifier}}")],
        ),
        Panel(
            "Taken over from the dead, given up; a second",
            "short",
            [
                rate(
                    "isentrope_queue_redelivered_total", "stream", legend="taken over: {{stream}}"
                ),
                rate(
                    "isentrope_queue_dead_lettered_total", "stream", legend="given up: {{stream}}"
                ),
            ],
        ),
    ],
    "Infrastructure": [
        Panel("Redis memory", "bytes", [latest("isentrope_redis_memory_bytes", "kind")]),
        Panel(
            "Redis on disk (1: well)", "none", [latest("isentrope_redis_persistence_ok", "kind")]
        ),
        Panel(
            "gRPC answers a second",
            "short",
            [rate("isentrope_grpc_server_handled_total", "code")],
        ),
        Panel(
            "Memory of a process", "bytes", [latest("process_resident_memory_bytes", "instance")]
        ),
    ],
}
