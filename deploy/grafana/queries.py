"""What the dashboard asks Prometheus, for the run that is chosen there."""

from __future__ import annotations

from dataclasses import dataclass

_RUN = '{run="$run"}'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression; `{{label}}` in the legend is that label's value."""

    expr: str
    legend: str


def of_run(expr: str) -> str:
    """The series of the chosen run; services export their run once, as `isentrope_run_info`."""
    return f"{expr} * on (job, instance) group_left (run) isentrope_run_info{_RUN}"


def latest(metric: str, label: str = "", *, legend: str = "") -> Query:
    """A gauge of one service, by `label` if given."""
    by = f"run, {label}" if label else "run"
    shown = legend or (f"{{{{{label}}}}}" if label else "{{run}}")
    return Query(f"max by ({by}) ({of_run(metric)})", shown)


def by_replica(name: str, *, legend: str = "{{instance}}") -> Query:
    """A gauge of the rollout replicas, and of nobody who exports it besides."""
    metric, by = f"isentrope_rollout_{name}", "on (job, instance)"
    gauge = of_run(f'({metric} and {by} isentrope_service_stalled{{service="rollout"}})')
    return Query(f"max by (run, instance) ({gauge})", legend)


def rate(counter: str, label: str = "", *, legend: str = "") -> Query:
    """A counter of all processes a second, by `label` if given."""
    by = f"run, {label}" if label else "run"
    shown = legend or (f"{{{{{label}}}}}" if label else "{{run}}")
    inner = of_run(f"rate({counter}[$__rate_interval])")
    return Query(f"sum by ({by}) ({inner})", shown)


def rates_by(label: str, **counters: str) -> list[Query]:
    """Counters a second by `label`, and what each is called before it."""
    return [
        rate(counter, label, legend=f"{name}: {{{{{label}}}}}")
        for counter, name in counters.items()
    ]


def quantiles(histogram: str, label: str = "") -> list[Query]:
    """p50, p95 and p99 of all processes."""
    by = f"run, le, {label}" if label else "run, le"
    inner = of_run(f"rate({histogram}_bucket[$__rate_interval])")
    suffix = f" {{{{{label}}}}}" if label else ""
    return [
        Query(f"histogram_quantile({share}, sum by ({by}) ({inner}))", f"p{share[2:]}{suffix}")
        for share in ("0.50", "0.95", "0.99")
    ]


def mean_seconds(histogram: str, label: str) -> Query:
    """What an observation took on average, by `label`."""
    total, count = (
        f"sum by (run, {label}) ({of_run(f'rate({histogram}_{part}[$__rate_interval])')})"
        for part in ("sum", "count")
    )
    return Query(f"{total} / {count}", f"{{{{{label}}}}}")


def recorded(rule: str, legend: str) -> Query:
    """What deploy/prometheus/rules.yml has computed."""
    return Query(f"{rule}{_RUN}", legend)
