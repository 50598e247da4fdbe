"""What alerts and dashboards read is there from the start, or shows what the engine reported."""

from __future__ import annotations

from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, make_wsgi_app

import shared.dead_letters  # noqa: F401  Has its counter at zero once it is imported.
from services.rollout.engine_load import LoadRecorder
from services.verifier.sandbox import ScoringPool
from shared.config.services import VerifierConfig
from shared.metrics.learner import learner_gauges
from shared.metrics_server import MetricsServer
from shared.records import Outcome
from tests.learner.fakes import run_config


@pytest.mark.parametrize("stream", ["prompts", "rollouts", "scored"])
def test_dead_letters_are_counted_from_zero(stream: str) -> None:
    name = "isentrope_queue_dead_lettered_total"
    assert REGISTRY.get_sample_value(name, {"stream": stream}) is not None


def test_stale_completions_are_counted_from_zero() -> None:
    learner_gauges(CollectorRegistry())
    name = "isentrope_learner_samples_dropped_total"
    assert REGISTRY.get_sample_value(name, {"reason": "stale"}) is not None


def test_a_verifier_has_every_outcome_before_the_first_completion() -> None:
    task = run_config().task.model_copy(update={"name": "untried"})
    ScoringPool(task, VerifierConfig())
    name = "isentrope_verifier_results_total"
    for outcome in Outcome:
        labels = {"verifier": "untried", "result": outcome.value}
        assert REGISTRY.get_sample_value(name, labels) == 0


def test_the_engine_s_report_is_exported() -> None:
    preempted = "isentrope_rollout_preemptions_total"
    before = REGISTRY.get_sample_value(preempted) or 0
    LoadRecorder().record(
        SimpleNamespace(kv_cache_usage=0.5, num_waiting_reqs=3),
        SimpleNamespace(num_preempted_reqs=2),
    )
    assert REGISTRY.get_sample_value("isentrope_rollout_kv_cache_usage_ratio") == 0.5
    assert REGISTRY.get_sample_value("isentrope_rollout_waiting_requests") == 3
    assert REGISTRY.get_sample_value(preempted) == before + 2


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,*/*;q=0.1",
    ],
    ids=["Prometheus 2", "Prometheus 3"],
)
def test_series_keep_their_names_whatever_a_scraper_prefers(accept: str) -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "?", registry=registry)
    server = MetricsServer("127.0.0.1", 0, metrics=make_wsgi_app(registry))
    url = f"http://127.0.0.1:{server.port}/metrics"
    try:
        with urlopen(Request(url, headers={"Accept": accept}), timeout=30) as answer:
            assert "\nvllm:num_requests_running 0.0\n" in answer.read().decode()
    finally:
        server.close()
