"""The entropy law over a run: what it says, when it may, and that it survives a resume."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.learner.evaluation import LawFit
from shared.config.algorithm import LawConfig

CONFIG = LawConfig(floor=0.05, window=3)
ENTROPIES = {0: 1.0, 1: 0.8, 2: 0.7, 3: 0.6, 4: 0.5, 5: 0.4}
OF_THE_LAW = {
    "law_a",
    "law_a_low",
    "law_a_high",
    "law_b",
    "law_ceiling",
    "law_ceiling_low",
    "law_ceiling_high",
    "law_rmse",
    "law_r2",
    "law_score_at_floor",
    "law_gain_left",
}
ALWAYS = {
    "law_identifiable",
    "law_points",
    "law_floor",
    "law_condition",
    "law_steps_left",
    "entropy_consumed",
    "entropy_rate",
}


def score(entropy: float) -> float:
    return -0.2 * math.exp(entropy) + 0.6


def fitted(versions: tuple[int, ...] = (0, 2, 4)) -> LawFit:
    law = LawFit(CONFIG)
    for version, entropy in ENTROPIES.items():
        law.add_entropy(version, entropy)
    for version in versions:
        law.add_score(version, score(ENTROPIES[version]))
    return law


def test_before_the_first_entropy_there_is_nothing_to_say() -> None:
    law = LawFit(CONFIG)
    law.add_score(0, 0.5)
    assert law.metrics() == {}


def test_three_points_on_the_curve_give_the_law_and_its_forecast() -> None:
    found = fitted().metrics()
    assert found.keys() == OF_THE_LAW | ALWAYS
    assert found["law_identifiable"] == 1
    assert found["law_points"] == 3
    assert found["law_floor"] == CONFIG.floor
    expected = {
        "law_a": 0.2,
        "law_a_low": 0.2,
        "law_a_high": 0.2,
        "law_b": 0.6,
        "law_ceiling": 0.4,
        "law_ceiling_low": 0.4,
        "law_ceiling_high": 0.4,
        "law_rmse": 0.0,
        "law_r2": 1.0,
        "law_score_at_floor": score(0.05),
        # The newest three entropies fall by 0.1 a step, down to 0.4.
        "law_gain_left": score(0.05) - score(0.4),
        "law_steps_left": 3.5,
        "entropy_rate": -0.1,
        "entropy_consumed": 0.6 / 0.95,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)


def test_the_interval_is_open_where_the_points_lie_off_the_curve() -> None:
    law = fitted((0, 2, 4, 5))
    law.add_score(4, score(0.5) + 0.01)
    found = law.metrics()
    assert found["law_a_low"] < found["law_a"] < found["law_a_high"]
    assert found["law_ceiling_low"] < found["law_ceiling"] < found["law_ceiling_high"]
    assert found["law_ceiling"] == pytest.approx(found["law_b"] - found["law_a"])


@pytest.mark.parametrize("versions", [(), (0,), (0, 3)])
def test_what_depends_on_the_law_is_nan_while_it_is_not_identified(
    versions: tuple[int, ...],
) -> None:
    found = fitted(versions).metrics()
    assert found.keys() == OF_THE_LAW | ALWAYS
    assert found["law_identifiable"] == 0
    assert found["law_points"] == len(versions)
    assert all(math.isnan(found[key]) for key in OF_THE_LAW)
    assert found["entropy_rate"] == pytest.approx(-0.1)
    assert found["law_steps_left"] == pytest.approx(3.5)
    assert found["entropy_consumed"] == pytest.approx(0.6 / 0.95)


def test_a_score_without_its_entropy_is_no_point() -> None:
    law = fitted((0, 2))
    law.add_score(99, 0.3)
    assert law.metrics()["law_points"] == 2
    law.add_entropy(99, 0.1)
    assert law.metrics()["law_points"] == 3


def test_an_entropy_that_does_not_fall_never_reaches_the_floor() -> None:
    law = LawFit(CONFIG)
    for version in range(4):
        law.add_entropy(version, 0.5 + version / 10)
    assert law.metrics()["law_steps_left"] == math.inf
    assert law.metrics()["entropy_consumed"] < 0


def test_one_entropy_has_no_rate() -> None:
    law = LawFit(CONFIG)
    law.add_entropy(0, 0.5)
    assert math.isnan(law.metrics()["entropy_rate"])
    assert law.metrics()["entropy_consumed"] == 0


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1)), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_a_run_resumed_through_json_fits_the_same_law(
    points: list[tuple[float, float]], cut: int
) -> None:
    straight, resumed = LawFit(CONFIG), LawFit(CONFIG)
    for version, (entropy, evaluated) in enumerate(points):
        if version == cut:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = LawFit(CONFIG)
            resumed.load_state_dict(state)
        for law in (straight, resumed):
            law.add_entropy(version, entropy)
            if version % 2 == 0:
                law.add_score(version, evaluated)
        assert resumed.metrics() == pytest.approx(straight.metrics(), abs=0, rel=0, nan_ok=True)
    assert json.loads(json.dumps(resumed.state_dict())) == json.loads(
        json.dumps(straight.state_dict())
    )
