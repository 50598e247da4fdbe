from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.stage import LOOKERS
from tests.bench.scale import measure
from tests.bench.scale_counts import Count
from tests.bench.scale_model import Fleet, Line, Model
from tests.bench.scale_point import LEARNER, REDIS, REPLICAS, VERIFIER, Case, Effort, Point
from tests.bench.scale_report import draw, report
from tests.forked import start_server

PARTS = (LEARNER, REDIS, VERIFIER, REPLICAS)


def point_of(replicas: int, *, tokens: int = 64) -> Point:
    """Of a system whose costs are round numbers: see the tests."""
    megabits = tokens * 8 / 1000
    return Point(
        Case(replicas, tokens=tokens),
        publish_seconds=[0.1, 0.2],
        publish_parts={"begin": 0.0, "gather": 0.0, "broadcast": 0.1, "load": 0.1},
        publish_cpu=dict.fromkeys(PARTS, 0.002 * replicas),
        idle_cpu=dict.fromkeys(PARTS, 0.01 + 0.0001 * replicas),
        catch_up_seconds=[1.0],
        groups_per_second=100.0,
        group_cpu_ms=dict.fromkeys(PARTS, 0.5 + 0.1 * megabits),
        memory={
            "learner_mib": 200.0 + replicas,
            "learner_peak_mib": 300.0,
            "learner_threads": 3.0 * replicas,
            "learner_files": 20 + 8.0 * replicas,
            "redis_mib": 10.0,
            "redis_streams_mib": 5.0,
            "redis_clients": 2.0 * replicas,
        },
        num_trained=100,
    )


POINTS = [point_of(10), point_of(50), point_of(100), point_of(50, tokens=1024)]
COUNTS = [
    Count(number, 1.0, 1.0, number / 1000, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0) for number in (200, 1000)
]


def test_a_line_that_noise_would_have_fall_is_level() -> None:
    assert Line.through([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx((2.0, 0.0))
    assert Line.through([1.0, 3.0], [6.0, 4.0]) == (0.0, 5.0)
    assert Line.through([50.0], [5.0]) == (0.0, 5.0)


def test_costs_are_carried_to_other_numbers_of_replicas_and_tokens() -> None:
    model = Model(POINTS, COUNTS)
    assert model.publish_cpu.at(1000) == pytest.approx(2.0)
    assert model.memory["learner_threads"].at(1000) == pytest.approx(3000)
    assert model.group_cpu_ms[REDIS].at(10_000) == pytest.approx(0.5 + 0.1 * 10)
    groups_per_second = 1000 * 2500 / (16 * 4096)
    assert model.groups_share(REDIS, 1000) == pytest.approx(groups_per_second * 7.0536 / 1000)


def test_each_limit_is_where_its_share_or_its_number_is_used_up() -> None:
    model = Model(POINTS, COUNTS)
    at = {limit.name: limit.replicas for limit in model.limits()}
    assert at["the learner's open files (pairs)"] == pytest.approx(65_536 / 8)
    assert at["Redis' connections"] == pytest.approx(10_000 / 2)
    looks = at["Redis' thread: looks at all leases"]
    assert looks == pytest.approx(0.7 * 10 * 1000 / (LOOKERS * 0.001), rel=0.01)
    assert model.looks_share(looks) == pytest.approx(0.7, rel=0.01)
    assert list(at.values()) == sorted(at.values())


def test_readers_that_wait_cost_what_a_group_costs_more_among_many() -> None:
    points = [replace(each, group_cpu_ms=dict(each.group_cpu_ms)) for each in POINTS]
    for each in points:
        each.group_cpu_ms[REDIS] += 0.002 * each.case.replicas
    share = Model(points, COUNTS).waiting_share(1000)
    assert share == pytest.approx(1000 * 2500 / (16 * 4096) * 0.002 * 1000 / 1000)


def test_a_fleet_that_asks_for_less_is_limited_later() -> None:
    slow = Model(POINTS, COUNTS, Fleet(tokens_per_second=25.0))
    for near, far in zip(
        sorted(Model(POINTS, COUNTS).limits()), sorted(slow.limits()), strict=True
    ):
        assert near.name == far.name and near.replicas <= far.replicas


def test_the_report_names_what_was_lost_and_what_is_only_reckoned(tmp_path: Path) -> None:
    points = [replace(POINTS[0], num_lost=3), *POINTS[1:]]
    text = report(points, COUNTS, setting="a machine", figure="scale.png")
    measured, model = text.split("## Model")
    assert "**3 lost, 0 over the bound**" in measured
    assert "10,000" in model and "not measured" in model
    draw(points, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_three_replicas_go_through_everything_that_is_measured() -> None:
    effort = Effort(
        publications=2, idle_seconds=0.2, newcomers=1, flow_seconds=0.2, training_batches=2
    )
    start_server()
    point = measure(Case(3), effort)
    assert (point.num_lost, point.num_violations, point.failed_refits) == (0, 0, 0)
    assert point.num_trained > 32 * 4 and len(point.publish_seconds) == 2
    assert point.groups_per_second > 0 and point.catch_up_seconds[0] > 0
    assert all(point.group_cpu_ms[part] > 0 for part in (LEARNER, REPLICAS))
