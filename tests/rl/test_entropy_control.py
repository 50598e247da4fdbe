import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rl.entropy_control import (
    AEntController,
    EntropyPIController,
    Shape,
    TargetEntropyController,
    scheduled_coefficient,
)

# Setting (a) of the AEnt paper's scripts, without its warm-up.
AENT: dict[str, Any] = {
    "initial": 0.002,
    "step_size": 0.002,
    "entropy_low": 0.15,
    "entropy_high": 0.24,
    "coefficient_min": 6e-4,
    "coefficient_max": 9e-3,
}
TARGET = {
    "initial": 0.0,
    "target": 0.2,
    "step_size": 1e-4,
    "coefficient_min": 0.0,
    "coefficient_max": 0.005,
}
PI = {"target": 0.5, "proportional": 0.8, "integral": 0.05, "integral_limit": 4.0}
ENTROPIES = [0.30, 0.24, 0.20, 0.15, 0.10, 0.05, 1.2, 4.0, 0, 0]


def test_aent_follows_the_golden_trajectory() -> None:
    controller = AEntController(**AENT)
    assert controller.coefficient == 0.002
    expected = [
        *[0.00188, 0.00188, 0.00188, 0.00188, 0.00198],
        *[0.00218, 0.0006, 0.0006, 0.0009, 0.0012],
    ]
    for entropy, coefficient in zip(ENTROPIES, expected, strict=True):
        assert controller.update(entropy) == pytest.approx(coefficient, abs=1e-12)
        assert controller.coefficient == pytest.approx(coefficient, abs=1e-12)


def test_aent_takes_24_steps_of_no_entropy_to_its_cap() -> None:
    controller = AEntController(**AENT)
    steps = [controller.update(0.0) for _ in range(25)]
    assert steps[22] < 9e-3
    assert steps[23] == steps[24] == 9e-3


@given(st.floats(0.15, 0.24))
@settings(max_examples=30)
def test_inside_the_band_nothing_moves(entropy: float) -> None:
    assert AEntController(**AENT).update(entropy) == 0.002


@given(st.lists(st.floats(0, 12), max_size=30))
@settings(max_examples=50)
def test_the_coefficient_never_leaves_its_box(entropies: list[float]) -> None:
    aent = AEntController(**AENT)
    target = TargetEntropyController(**TARGET, is_strict=True)
    pi = EntropyPIController(**PI)
    for entropy in entropies:
        assert 6e-4 <= aent.update(entropy) <= 9e-3
        assert 0 <= target.update(entropy) <= 0.005
        assert -1 <= pi.update(entropy) <= 1
        assert abs(pi.error_sum) <= 4


@pytest.mark.parametrize(("warmup_steps", "first"), [(0, 1), (1, 1), (2, 2), (30, 30)])
def test_the_warm_up_ends_with_the_step_of_its_own_number(warmup_steps: int, first: int) -> None:
    controller = AEntController(**AENT, warmup_steps=warmup_steps)
    coefficients = [controller.update(0.0) for _ in range(first)]
    assert coefficients[:-1] == [0.002] * (first - 1)
    assert coefficients[-1] == pytest.approx(0.0023)


def test_a_coefficient_of_zero_recovers() -> None:
    controller = AEntController(**(AENT | {"initial": 0.0, "coefficient_min": 0.0}))
    assert controller.update(5.0) == 0
    assert controller.update(0.05) == pytest.approx(0.0002)


def test_the_regularisation_pulls_back_to_the_initial_coefficient() -> None:
    controller = AEntController(**AENT, regularisation=100.0)
    away = controller.update(0.0)
    back = controller.update(0.2)
    assert away == pytest.approx(0.0023)
    assert back == pytest.approx(away - 0.002 * 100 * (away - 0.002))


@pytest.mark.parametrize(
    ("is_strict", "accumulated", "applied"),
    [
        (True, [0, 1, 2, 1, 2, 1], [0, 1, 2, 0, 2, 0]),
        (False, [0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 4, 0]),
    ],
    ids=["Skywork", "TRL"],
)
def test_the_target_controller_follows_the_golden_trajectory(
    is_strict: bool, accumulated: list[int], applied: list[int]
) -> None:
    controller = TargetEntropyController(**TARGET, is_strict=is_strict)
    for entropy, behind, before in zip(
        [0.5, 0.19, 0.1, 0.2, 0.15, 0.3], accumulated, applied, strict=True
    ):
        assert controller.update(entropy) == pytest.approx(before * 1e-4, abs=1e-12)
        assert controller.coefficient == pytest.approx(before * 1e-4, abs=1e-12)
        assert controller.accumulated == pytest.approx(behind * 1e-4, abs=1e-12)


@pytest.mark.parametrize(("is_strict", "first"), [(True, 0.001), (False, 0.0)])
def test_the_gate_starts_open_in_skywork_and_shut_in_trl(is_strict: bool, first: float) -> None:
    controller = TargetEntropyController(**(TARGET | {"initial": 0.001}), is_strict=is_strict)
    assert controller.coefficient == first
    assert controller.accumulated == 0.001


def test_the_pi_controller_follows_the_golden_trajectory() -> None:
    controller = EntropyPIController(**PI)
    assert controller.coefficient == 0
    # e = 0.2, -0.1, -0.4, 0: sums 0.2, 0.1, -0.3, -0.3.
    expected = [0.16 + 0.01, -0.08 + 0.005, -0.32 - 0.015, -0.015]
    for entropy, coefficient in zip([0.7, 0.4, 0.1, 0.5], expected, strict=True):
        assert controller.update(entropy) == pytest.approx(coefficient, abs=1e-12)
        assert controller.coefficient == pytest.approx(coefficient, abs=1e-12)


@given(st.lists(st.floats(0, 1), max_size=40))
@settings(max_examples=50)
def test_without_saturation_the_pi_controller_is_the_papers_formula(entropies: list[float]) -> None:
    controller = EntropyPIController(
        target=0.5, proportional=0.8, integral=0.01, integral_limit=100.0
    )
    for step, entropy in enumerate(entropies):
        error_sum = math.fsum(h - 0.5 for h in entropies[: step + 1])
        expected = 0.8 * (entropy - 0.5) + 0.01 * error_sum
        assert controller.update(entropy) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 6), max_size=40), st.floats(0, 3), st.floats(0, 1), st.floats(0.1, 20))
@settings(max_examples=100)
def test_the_pi_controller_equals_the_slow_rule(
    entropies: list[float], proportional: float, integral: float, limit: float
) -> None:
    controller = EntropyPIController(
        target=0.5, proportional=proportional, integral=integral, integral_limit=limit
    )
    total = 0.0
    for entropy in entropies:
        e = entropy - 0.5
        output = proportional * e + integral * total
        pushes_on = (output >= 1 and e > 0) or (output <= -1 and e < 0)
        if not pushes_on:
            total = max(-limit, min(limit, total + e))
        output = max(-1.0, min(1.0, proportional * e + integral * total))
        assert controller.update(entropy) == output
        assert controller.error_sum == total


def test_a_pi_controller_without_gains_does_nothing_and_one_without_integral_forgets() -> None:
    idle = EntropyPIController(**(PI | {"proportional": 0.0, "integral": 0.0}))
    assert [idle.update(h) for h in ENTROPIES] == [0] * len(ENTROPIES)
    proportional = EntropyPIController(**(PI | {"integral": 0.0}))
    for entropy in (5.0, 0.0, 0.6):
        last = proportional.update(entropy)
    assert last == pytest.approx(0.08)


def test_only_the_integral_removes_an_offset_that_lasts() -> None:
    def final_entropy(integral: float) -> float:
        controller = EntropyPIController(**(PI | {"integral": integral}))
        entropy = 0.5
        for _ in range(2000):
            # A drift of -0.01 a step, against which the coefficient works.
            entropy += -0.01 - 0.1 * controller.update(entropy)
        return entropy

    assert final_entropy(0.0) == pytest.approx(0.5 - 0.01 / 0.08)
    assert final_entropy(0.05) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_sum_is_frozen_while_the_output_saturates_in_its_direction(direction: float) -> None:
    controller = EntropyPIController(
        target=5.0, proportional=0.5, integral=0.1, integral_limit=1000.0
    )
    coefficients = [controller.update(5.0 + direction) for _ in range(100)]
    # 0.5 + 0.1 n reaches 1 with the fifth error; the sixth and all later ones are not added.
    assert coefficients[:4] == pytest.approx([direction * c for c in (0.6, 0.7, 0.8, 0.9)])
    assert coefficients[4:] == pytest.approx([direction] * 96)
    assert abs(controller.error_sum) <= 6
    frozen = controller.error_sum
    controller.update(5.0 - direction / 2)
    assert controller.error_sum == pytest.approx(frozen - direction / 2)


def test_a_saturation_by_the_proportional_part_alone_leaves_the_sum_empty() -> None:
    controller = EntropyPIController(**PI)
    assert [controller.update(5.0) for _ in range(50)] == [1.0] * 50
    assert controller.error_sum == 0


@given(
    st.integers(1, 3000),
    st.floats(0.01, 5),
    st.floats(0.01, 0.5),
    st.floats(0, 3),
    st.floats(0, 1),
    st.floats(0.1, 5),
)
@settings(max_examples=60)
def test_a_long_saturation_delays_the_way_back_no_longer_than_the_limit_allows(
    num_high: int, above: float, below: float, proportional: float, integral: float, limit: float
) -> None:
    controller = EntropyPIController(
        target=0.5, proportional=proportional, integral=integral, integral_limit=limit
    )
    for _ in range(num_high):
        controller.update(0.5 + above)
    num_wrong = 0
    while controller.update(0.5 - below) > 1e-12:
        num_wrong += 1
        assert num_wrong <= limit / below + 1e-6


def test_the_length_of_a_saturation_does_not_matter_to_the_way_back() -> None:
    ways = []
    for num_high in (20, 20_000):
        controller = EntropyPIController(**(PI | {"integral": 0.5, "integral_limit": 1e9}))
        for _ in range(num_high):
            controller.update(1.5)
        ways.append([controller.update(0.3) for _ in range(20)])
    assert ways[0] == ways[1]
    assert ways[0][-1] < 0


Controller = AEntController | TargetEntropyController | EntropyPIController


def make_controllers() -> list[Controller]:
    return [
        AEntController(**AENT, warmup_steps=3, regularisation=0.1),
        TargetEntropyController(**TARGET, is_strict=True),
        TargetEntropyController(**TARGET, is_strict=False),
        EntropyPIController(**PI),
        EntropyPIController(**(PI | {"proportional": 3.0, "integral": 1.0})),
    ]


@given(st.lists(st.floats(0, 1.5), min_size=1, max_size=20), st.data())
@settings(max_examples=50)
def test_a_run_resumed_anywhere_follows_the_identical_trajectory(
    entropies: list[float], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(entropies)))
    for whole, before, after in zip(
        make_controllers(), make_controllers(), make_controllers(), strict=True
    ):
        uninterrupted = [whole.update(h) for h in entropies]
        resumed = [before.update(h) for h in entropies[:cut]]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert after.coefficient == before.coefficient
        resumed += [after.update(h) for h in entropies[cut:]]
        assert resumed == uninterrupted
        assert after.state_dict() == whole.state_dict()


def test_a_restored_coefficient_outside_a_narrower_box_moves_into_it() -> None:
    narrow = AEntController(**(AENT | {"coefficient_max": 0.004}))
    narrow.load_state_dict({"coefficient": 0.009, "num_updates": 7})
    assert narrow.coefficient == 0.004
    target = TargetEntropyController(**TARGET, is_strict=True)
    target.load_state_dict({"accumulated": 1.0, "is_open": 1})
    assert target.coefficient == 0.005
    pi = EntropyPIController(**PI)
    pi.load_state_dict({"coefficient": -2.0, "error_sum": -7.0})
    assert pi.coefficient == -1
    assert pi.error_sum == -4


@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_an_entropy_that_is_not_finite_is_refused_and_changes_nothing(entropy: float) -> None:
    for controller in make_controllers():
        before = controller.state_dict()
        with pytest.raises(ValueError, match="finite"):
            controller.update(entropy)
        assert controller.state_dict() == before


def test_the_state_of_another_controller_is_refused() -> None:
    aent, target, _, pi, _ = make_controllers()
    for one, other in ((aent, target), (target, pi), (pi, aent)):
        before = one.state_dict()
        with pytest.raises(ValueError, match="keys"):
            one.load_state_dict(other.state_dict())
        assert one.state_dict() == before


@pytest.mark.parametrize(
    "change",
    [
        {"initial": 0.01},
        {"initial": 1e-5},
        {"coefficient_min": 0.01},
        {"coefficient_min": -1.0},
        {"entropy_low": 0.3},
        {"entropy_low": -0.1},
        {"step_size": 0.0},
        {"warmup_steps": -1},
        {"regularisation": -1.0},
    ],
)
def test_aent_refuses_reversed_intervals_and_negative_numbers(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need"):
        AEntController(**(AENT | change))


@pytest.mark.parametrize(
    "change", [{"initial": 1.0}, {"target": 0.0}, {"step_size": 0.0}, {"coefficient_min": 0.1}]
)
def test_the_target_controller_refuses_numbers_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need"):
        TargetEntropyController(**(TARGET | change), is_strict=True)


@pytest.mark.parametrize(
    "change",
    [
        {"target": 0.0},
        {"target": math.nan},
        {"integral_limit": 0.0},
        {"integral_limit": math.nan},
        {"proportional": -0.1},
        {"proportional": math.inf},
        {"integral": -0.1},
        {"integral": math.nan},
    ],
)
def test_the_pi_controller_refuses_numbers_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need"):
        EntropyPIController(**(PI | change))


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.0505), ("cosine", 0.0505), ("exponential", 0.01)],
)
def test_a_schedule_goes_from_start_to_end_and_stays(shape: Shape, middle: float) -> None:
    def at(step: int) -> float:
        return scheduled_coefficient(step, start=0.1, end=0.001, num_steps=100, shape=shape)

    assert at(0) == pytest.approx(0.1)
    assert at(50) == pytest.approx(middle)
    assert at(100) == at(100_000) == pytest.approx(0.001)
    values = [at(step) for step in range(101)]
    assert values == sorted(values, reverse=True)


def test_the_schedules_differ_a_quarter_of_the_way() -> None:
    shapes: tuple[Shape, ...] = ("linear", "cosine", "exponential")
    quarter = {
        shape: scheduled_coefficient(1, start=1.0, end=0.01, num_steps=4, shape=shape)
        for shape in shapes
    }
    assert quarter["linear"] == pytest.approx(0.7525)
    assert quarter["cosine"] == pytest.approx(0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)
    assert quarter["exponential"] == pytest.approx(10**-0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step"),
        ({"num_steps": 0}, "num_steps"),
        ({"shape": "exponential", "end": 0.0}, "exponential"),
        ({"shape": "step"}, "shape"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "step": 1,
        "start": 1.0,
        "end": 0.1,
        "num_steps": 4,
        "shape": "linear",
    }
    with pytest.raises(ValueError, match=message):
        scheduled_coefficient(**(arguments | change))
