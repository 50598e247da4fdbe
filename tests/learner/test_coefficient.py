"""The entropy coefficient of every method, over a run and over a resume."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.learner.coefficient import CONTROLLERS, EntropyCoefficient
from tests.learner.fakes import run_config

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "aent": {
        "entropy": {"method": "aent", "entropy_coeff": 0.002},
        "adaptive_entropy": {"warmup": 3, "entropy_coeff_reg": 0.1},
    },
    "target": {
        "entropy": {"method": "target", "entropy_coeff": 0.001},
        "target_entropy": {"target": 0.3, "delta": 5e-4},
    },
    "pi": {
        "entropy": {"method": "pi"},
        "pi_entropy": {"target": 0.3, "integral": 0.3, "integral_limit": 2.0},
    },
}


def coefficient(method: str) -> EntropyCoefficient:
    return EntropyCoefficient(run_config(**METHODS[method]))


def bonus(**entropy: Any) -> EntropyCoefficient:
    return EntropyCoefficient(
        run_config(entropy={"method": "bonus", "entropy_coeff": 0.04, **entropy})
    )


def scheduled(schedule: str, end: float, *, num_steps: int = 4) -> EntropyCoefficient:
    return bonus(schedule=schedule, entropy_coeff_end=end, schedule_steps=num_steps)


def test_every_method_that_has_a_controller_is_tested_here() -> None:
    assert METHODS.keys() == CONTROLLERS.keys()


@pytest.mark.parametrize(
    "fixed",
    [
        bonus(),
        bonus(schedule="constant"),
        scheduled("linear", 0.04),
        scheduled("cosine", 0.04),
        scheduled("exponential", 0.04),
    ],
)
def test_a_bonus_without_a_schedule_or_with_equal_ends_is_fixed(fixed: EntropyCoefficient) -> None:
    for step in (1, 2, 3, 5, 1000):
        assert fixed.at(step) == pytest.approx(0.04, rel=1e-12)
        fixed.observe(entropy=9.0, clamped_entropy=9.0)


def test_without_an_entropy_term_the_coefficient_is_0() -> None:
    none = EntropyCoefficient(run_config())
    none.observe(entropy=0.1, clamped_entropy=0.1)
    assert none.at(1) == none.at(9) == 0
    assert none.state_dict() is None


@pytest.mark.parametrize(
    ("schedule", "quarter", "middle"),
    [
        ("linear", 0.0325, 0.025),
        ("cosine", 0.025 + 0.015 * math.sqrt(0.5), 0.025),
        ("exponential", 0.04 * 0.25**0.25, 0.02),
    ],
)
def test_a_schedule_starts_with_the_first_step_and_ends_for_good(
    schedule: str, quarter: float, middle: float
) -> None:
    made = scheduled(schedule, 0.01)
    steps = [made.at(step) for step in (1, 2, 3, 5, 6, 1000)]
    assert steps == pytest.approx([0.04, quarter, middle, 0.01, 0.01, 0.01])


def test_a_schedule_of_0_steps_takes_the_whole_run() -> None:
    whole, nine = (scheduled("linear", 0.0, num_steps=each) for each in (0, 9))
    assert [whole.at(step) for step in range(1, 12)] == [nine.at(step) for step in range(1, 12)]
    assert whole.at(9) == pytest.approx(0.04 / 9)
    assert whole.at(10) == 0


def test_a_schedule_has_nothing_to_keep_in_a_checkpoint() -> None:
    made = scheduled("linear", 0.01)
    assert made.state_dict() is None
    made.load_state_dict(None)
    assert made.at(3) == pytest.approx(0.025)


@pytest.mark.parametrize("method", METHODS)
def test_aent_follows_the_clamped_entropy_and_the_others_the_full_one(method: str) -> None:
    made = {name: coefficient(method) for name in ("both", "full", "clamped")}
    for _ in range(5):
        made["both"].observe(entropy=0.1, clamped_entropy=0.1)
        made["full"].observe(entropy=0.1, clamped_entropy=5.0)
        made["clamped"].observe(entropy=5.0, clamped_entropy=0.1)
    followed, ignored = ("clamped", "full") if method == "aent" else ("full", "clamped")
    assert made[followed].at(6) == made["both"].at(6) != made[ignored].at(6)


@pytest.mark.parametrize("method", ["aent", "target"])
def test_what_a_step_measured_applies_from_the_next_step_on(method: str) -> None:
    made = coefficient(method)
    before = made.at(1)
    assert made.at(2) == before
    for _ in range(3):
        made.observe(entropy=0.0, clamped_entropy=0.0)
    risen = made.at(4)
    made.observe(entropy=9.0, clamped_entropy=9.0)
    assert made.at(5) < before < risen


def test_pi_is_signed_above_the_target_positive() -> None:
    made = coefficient("pi")
    made.observe(entropy=0.5, clamped_entropy=math.nan)
    assert made.at(2) == pytest.approx(0.2 + 0.3 * 0.2)
    made.observe(entropy=0.0, clamped_entropy=math.nan)
    assert made.at(3) == pytest.approx(-0.3 + 0.3 * (0.2 - 0.3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_an_entropy_that_is_not_finite_is_not_shown_to_the_controller(
    method: str, entropy: float
) -> None:
    made, without = coefficient(method), coefficient(method)
    for seen in (0.1, 0.6):
        for each in (made, without):
            each.observe(entropy=seen, clamped_entropy=seen)
        made.observe(entropy=entropy, clamped_entropy=entropy)
    assert made.state_dict() == without.state_dict()
    assert made.at(3) == without.at(3)


@settings(max_examples=60)
@given(
    st.sampled_from(list(METHODS)),
    st.lists(st.floats(0, 3), min_size=1, max_size=30),
    st.integers(0, 30),
)
def test_a_run_resumed_through_json_has_the_same_trajectory(
    method: str, entropies: list[float], cut: int
) -> None:
    cut = min(cut, len(entropies))
    straight, first, second = (coefficient(method) for _ in range(3))
    expected: list[float] = []
    found: list[float] = []
    for number, entropy in enumerate(entropies):
        if number == cut:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        resumed = first if number < cut else second
        for each, trajectory in ((straight, expected), (resumed, found)):
            trajectory.append(each.at(number + 1))
            each.observe(entropy=entropy, clamped_entropy=entropy)
    assert found == expected
    assert straight.at(99) == (first if cut == len(entropies) else second).at(99)


def test_a_state_of_another_controller_is_refused() -> None:
    state = coefficient("target").state_dict()
    with pytest.raises(ValueError, match="need the keys"):
        coefficient("aent").load_state_dict(state)
