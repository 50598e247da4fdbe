from __future__ import annotations

import asyncio
import math
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.learner.batch import build_batch
from services.learner.measures import StepReport, step_report
from services.learner.telemetry import (
    count_step,
    numbers,
    observe_queues,
    step_row,
    without_nan,
)
from shared.metrics.learner import (
    LEARNER_TOKENS_BY_LAG,
    LEARNER_UNREWARDED,
    learner_gauges,
)
from shared.metrics.queues import (
    QUEUE_BYTES,
    QUEUE_CAPACITY_BYTES,
    QUEUE_LENGTH,
    QUEUE_OLDEST,
    REDIS_MEMORY,
    REDIS_PERSISTENCE,
)
from shared.records import Outcome
from shared.redis_server import embedded_redis
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds
from tests.factories import make_scored
from tests.learner.fakes import run_config, scored_group

KINDS = ("append", "rewrite", "snapshot")


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
            histograms={"staleness": [(0, 3), (2, 1)], "version_lag": [(0, 90), (2, 10)]},
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
    assert row["version_lag_tokens"] == {"0": 90, "2": 10}
    assert row["replica_groups"] == {"rollout-0": 2}
    assert row["tokens_per_second"] == 50.0
    assert row["wait_data_share"] == 0.75
    assert row["entropy_by_position"] == [0.5, 0.25]
    assert not {"staleness_counts", "entropy_by_position"} & numbers(row).keys()


def test_staleness_is_counted_by_trajectory_and_lag_by_token() -> None:
    config = run_config()
    group = scored_group(0, [Outcome.PASS, Outcome.FAIL], lengths=[4, 4], versions=((3, 1), (5, 3)))
    batch = build_batch([group], config, policy_version=5)
    report = step_report(batch, None, [], config.policy_loss)
    assert report.histograms == {"staleness": [(2, 2)], "version_lag": [(0, 6), (2, 2)]}
    before = [LEARNER_TOKENS_BY_LAG.labels(versions=lag)._value.get() for lag in "02"]
    count_step([group], report, loss_mode="vanilla", seconds=1.0)
    after = [LEARNER_TOKENS_BY_LAG.labels(versions=lag)._value.get() for lag in "02"]
    assert [new - old for new, old in zip(after, before, strict=True)] == [6, 2]


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


def test_steps_in_a_row_that_nothing_passed() -> None:
    LEARNER_UNREWARDED.set(0)
    seen = []
    for passed in (0.0, 0.0, 0.1, None):
        metrics = {} if passed is None else {"pass_rate": passed}
        count_step([], StepReport(metrics, {}, {}), loss_mode="vanilla", seconds=1.0)
        seen.append(LEARNER_UNREWARDED._value.get())
    assert seen == [1, 2, 0, 1]


async def test_the_gauges_of_the_server_show_memory_and_a_disk_that_refuses(tmp_path: Path) -> None:
    # No file can take the name of a folder that holds something.
    (tmp_path / "dump.rdb" / "in-the-way").mkdir(parents=True)
    bounds = Bounds(8, 1000)
    with embedded_redis(tmp_path) as url:
        async with open_streams(
            url, run_id="r", prompts=bounds, groups=bounds, timeout_seconds=60.0
        ) as streams:
            await observe_queues(streams)
            assert REDIS_MEMORY.labels(kind="used")._value.get() > 100_000
            assert REDIS_MEMORY.labels(kind="max")._value.get() >= 0
            assert [REDIS_PERSISTENCE.labels(kind=kind)._value.get() for kind in KINDS] == [1, 1, 1]
            await streams.client.bgsave()
            async with asyncio.timeout(30):
                while REDIS_PERSISTENCE.labels(kind="snapshot")._value.get():
                    await observe_queues(streams)
                    await asyncio.sleep(0.05)
            assert [REDIS_PERSISTENCE.labels(kind=kind)._value.get() for kind in KINDS] == [1, 1, 0]
