from __future__ import annotations

import math

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.learner.measures import StepReport
from services.learner.telemetry import numbers, observe_queues, step_row, without_nan
from shared.metrics import (
    QUEUE_BYTES,
    QUEUE_CAPACITY_BYTES,
    QUEUE_LENGTH,
    QUEUE_OLDEST,
    learner_gauges,
)
from shared.redis_stream import Streams
from tests.factories import make_scored


def exported(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Every sample of a scrape by name and percentile."""
    return {
        (sample.name, sample.labels.get("percentile", "")): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_a_quantity_that_was_never_measured_has_no_series() -> None:
    registry = CollectorRegistry()
    learner_gauges(registry)
    assert exported(registry) == {}


def test_the_gauges_are_the_newest_row_and_keep_what_a_later_row_lacks() -> None:
    registry = CollectorRegistry()
    gauges = learner_gauges(registry)
    gauges.show({"entropy": 0.5, "covariance_p99_8": 4.0})
    gauges.show({"entropy": 0.4, "covariance_p99_8": 4.0, "eval_score": 0.3})
    assert exported(registry) == {
        ("isentrope_learner_policy_entropy_nats", ""): 0.4,
        ("isentrope_learner_token_covariance", "99.8"): 4.0,
        ("isentrope_learner_eval_score", ""): 0.3,
    }


def test_a_row_counts_every_group_over_the_bound() -> None:
    batch = [make_scored(0, versions=(5, 3)), make_scored(1, versions=(5, 5))]
    row = step_row(
        batch,
        StepReport(
            metrics={"tokens": 100.0},
            histograms={"staleness": [(0, 3), (2, 1)]},
            profiles={"entropy_by_position": [0.5, 0.25]},
        ),
        step=6,
        policy_version=6,
        max_staleness=1,
        phases={"wait_data": 1.5},
        seconds=2.0,
        pause_seconds=0.1,
    )
    assert row["groups_over_max_staleness"] == 1
    assert row["staleness_counts"] == {"0": 3, "2": 1}
    assert row["replica_groups"] == {"rollout-0": 2}
    assert row["tokens_per_second"] == 50.0
    assert row["entropy_by_position"] == [0.5, 0.25]
    assert not {"staleness_counts", "entropy_by_position"} & numbers(row).keys()


def test_a_quantity_that_has_become_undefined_is_shown_no_longer() -> None:
    shown = without_nan({"law_a": 0.2, "law_steps_left": math.inf, "law_gain_left": math.nan})
    assert shown == {"law_a": 0.2, "law_steps_left": math.inf}


async def test_queue_gauges_show_what_is_in_the_streams(streams: Streams) -> None:
    for _ in range(3):
        await streams.scored.put(b"x")
    await streams.scored.claim("learner", count=1, wait_seconds=0.1)
    waiting = await observe_queues(streams)
    assert waiting["scored"] == 2
    assert QUEUE_LENGTH.labels(stream="scored")._value.get() == 3
    assert QUEUE_BYTES.labels(stream="scored")._value.get() == 3
    assert QUEUE_CAPACITY_BYTES.labels(stream="scored")._value.get() == 1000
    assert 0 <= QUEUE_OLDEST.labels(stream="scored")._value.get() < 60
