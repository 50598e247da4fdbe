"""What alerts and dashboards read is there from the start, or shows what the engine reported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

import shared.dead_letters  # noqa: F401  Has its counter at zero once it is imported.
from services.rollout.engine_load import LoadRecorder
from services.verifier.sandbox import ScoringPool
from shared.config.services import VerifierConfig
from shared.metrics.learner import learner_gauges
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
