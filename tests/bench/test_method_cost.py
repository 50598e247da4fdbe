from __future__ import annotations

import math
import random

import pytest

from tests.bench.benchmark import median_interval
from tests.bench.method_cost import LAYOUTS, Pair, Seconds, row


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (2, 0, 1), (5, 0, 4), (6, 0, 5), (9, 1, 7), (20, 5, 14)]
)
def test_the_interval_is_between_the_order_statistics_of_the_sign_test(
    count: int, low: int, high: int
) -> None:
    values = [float(value) for value in range(count)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == (low, high)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    samples = [[draw.expovariate(1.0) for _ in range(10)] for _ in range(2000)]
    held = sum(low <= math.log(2) <= high for low, high in map(median_interval, samples))
    assert 0.95 <= held / 2000 <= 0.99


def test_a_pair_that_costs_a_tenth_more_has_an_overhead_of_a_tenth() -> None:
    pair = Pair(method=Seconds(1.1, 3.0), plain=Seconds(1.0, 2.0))
    made = row("small", LAYOUTS[0], "aent", [pair] * 3)
    assert made.overhead == made.overhead_low == made.overhead_high == pytest.approx(0.1)
    assert made.wall_overhead == pytest.approx(0.5)
    assert made.plain_seconds == 2.0
