import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rl.entropy_law import consumed, fit

ENTROPIES = [1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05]
SCORES = [
    *[0.056343634, 0.197249459, 0.270255746, 0.330028238],
    *[0.355719448, 0.378965816, 0.389745781],
]
NOISE = [0.01, -0.01, 0.005, 0, -0.005, 0.01, -0.01]
NOISY = [-0.2 * math.exp(h) + 0.6 + e for h, e in zip(ENTROPIES, NOISE, strict=True)]
# Two-sided 95 % quantiles of Student's t, from a printed table, by degrees of freedom.
T_TABLE = {1: 12.70620, 2: 4.30265, 5: 2.57058, 10: 2.22814, 31: 2.03951, 100: 1.98397}


def design(entropies: list[float]) -> np.ndarray:
    x = np.exp(np.array(entropies, dtype=np.float64))
    return np.stack([-x, np.ones_like(x)], axis=1)


def test_the_golden_points_give_back_their_coefficients() -> None:
    law = fit(ENTROPIES, [-0.2 * math.exp(h) + 0.6 for h in ENTROPIES])
    assert law.a == pytest.approx(0.2, abs=1e-9)
    assert law.b == pytest.approx(0.6, abs=1e-9)
    assert law.ceiling == pytest.approx(0.4, abs=1e-9)
    assert law.rmse < 1e-9
    assert law.r2 == pytest.approx(1)
    assert law.is_identifiable
    assert law.num_points == 7
    for entropy, score in zip(ENTROPIES, SCORES, strict=True):
        assert law.predict(entropy) == pytest.approx(score, abs=1e-9)
    assert law.predict(0.0) == pytest.approx(law.ceiling)


def test_noisy_points_give_the_golden_fit() -> None:
    law = fit(ENTROPIES, NOISY)
    assert law.a == pytest.approx(0.195530193, abs=1e-9)
    assert law.b == pytest.approx(0.592906762, abs=1e-9)
    assert law.ceiling == pytest.approx(0.397376569, abs=1e-9)
    assert law.rmse == pytest.approx(0.007620925, abs=1e-9)
    assert law.rmse_on(ENTROPIES, NOISY) == pytest.approx(law.rmse)


def test_a_fit_of_the_first_points_predicts_the_rest_as_in_the_golden_numbers() -> None:
    law = fit(ENTROPIES[:3], NOISY[:3])
    assert law.a == pytest.approx(0.192127223, abs=1e-9)
    assert law.b == pytest.approx(0.58492191, abs=1e-8)
    assert law.predict(0.05) == pytest.approx(0.382944114, abs=1e-8)
    assert law.rmse_on(ENTROPIES[3:], NOISY[3:]) == pytest.approx(0.008638153, abs=1e-8)


points = st.lists(
    st.tuples(st.floats(0, 3, width=32), st.floats(-1, 1, width=32)), min_size=3, max_size=20
).filter(lambda p: max(h for h, _ in p) - min(h for h, _ in p) > 0.1)


@given(points)
@settings(max_examples=60, deadline=None)
def test_the_fit_is_numpys_least_squares(pairs: list[tuple[float, float]]) -> None:
    entropies, scores = [h for h, _ in pairs], [r for _, r in pairs]
    law = fit(entropies, scores)
    (a, b), *_ = np.linalg.lstsq(design(entropies), np.array(scores), rcond=None)
    assert law.a == pytest.approx(a, abs=1e-8)
    assert law.b == pytest.approx(b, abs=1e-8)
    residuals = np.array(scores) - design(entropies) @ np.array([a, b])
    assert law.rmse == pytest.approx(np.sqrt(np.mean(residuals**2)), abs=1e-8)
    assert law.condition == pytest.approx(np.linalg.cond(design(entropies)), rel=1e-6)
    variance = np.var(scores)
    if variance > 1e-6:
        assert law.r2 == pytest.approx(1 - np.mean(residuals**2) / variance, abs=1e-6)


@pytest.mark.parametrize(("degrees", "quantile"), T_TABLE.items())
def test_the_intervals_are_students(degrees: int, quantile: float) -> None:
    generator = np.random.default_rng(degrees)
    entropies = generator.uniform(0, 1.5, degrees + 2).tolist()
    scores = [0.6 - 0.2 * math.exp(h) + generator.normal() * 0.02 for h in entropies]
    law = fit(entropies, scores)
    matrix = design(entropies)
    residuals = np.array(scores) - matrix @ np.array([law.a, law.b])
    covariance = np.linalg.inv(matrix.T @ matrix) * (residuals @ residuals) / degrees
    for centre, interval, direction in (
        (law.a, law.a_interval, np.array([1.0, 0.0])),
        (law.b, law.b_interval, np.array([0.0, 1.0])),
        (law.ceiling, law.ceiling_interval, np.array([-1.0, 1.0])),
    ):
        half_width = quantile * math.sqrt(direction @ covariance @ direction)
        assert interval == pytest.approx((centre - half_width, centre + half_width), rel=1e-4)


def test_the_intervals_cover_the_truth_as_often_as_they_claim() -> None:
    generator = np.random.default_rng(0)
    num_covered = 0
    for _ in range(300):
        scores = [0.6 - 0.2 * math.exp(h) + generator.normal() * 0.02 for h in ENTROPIES]
        low, high = fit(ENTROPIES, scores, confidence=0.8).ceiling_interval
        num_covered += low < 0.4 < high
    assert 0.72 < num_covered / 300 < 0.88


@pytest.mark.parametrize(
    "entropies",
    [[], [0.5], [0.5, 0.7], [0.3] * 5, [0.3, 0.3 + 1e-8, 0.3 - 1e-8, 0.3 + 2e-8]],
    ids=["none", "one", "two", "constant", "constant but for rounding"],
)
def test_points_that_do_not_identify_the_law_say_so(entropies: list[float]) -> None:
    law = fit(entropies, [0.1 * i for i in range(len(entropies))])
    assert not law.is_identifiable
    numbers = [law.a, law.b, law.ceiling, law.rmse, law.r2, law.predict(0.1)]
    numbers += [*law.a_interval, *law.b_interval, *law.ceiling_interval]
    assert all(math.isnan(number) for number in numbers)
    assert law.num_points == len(entropies)


def test_constant_scores_have_no_slope_and_no_explained_share() -> None:
    law = fit(ENTROPIES, [0.25] * 7)
    assert law.a == pytest.approx(0, abs=1e-12)
    assert law.ceiling == pytest.approx(0.25)
    assert math.isnan(law.r2)


@pytest.mark.parametrize(
    ("entropies", "scores", "message"),
    [
        ([1, 0.5, 0.2], [0.1, 0.2], "pair"),
        ([1, math.nan, 0.2], [0.1, 0.2, 0.3], "finite"),
        ([1, 0.5, 0.2], [0.1, math.inf, 0.3], "finite"),
    ],
)
def test_broken_points_are_refused(
    entropies: list[float], scores: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(entropies, scores)
    with pytest.raises(ValueError, match=message):
        fit(ENTROPIES, SCORES).rmse_on(entropies, scores)


def test_an_error_on_no_points_and_a_confidence_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="point"):
        fit(ENTROPIES, SCORES).rmse_on([], [])
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            fit(ENTROPIES, SCORES, confidence=confidence)


def test_consumption_goes_from_none_to_all() -> None:
    assert consumed(0.8, 0.8) == 0
    assert consumed(0.8, 0.0) == 1
    assert consumed(0.8, 0.2) == pytest.approx(0.75)
    assert consumed(0.8, 0.2, 0.1) == pytest.approx(6 / 7)
    assert consumed(0.8, 1.0) < 0
    for h_start, h_end in ((0.5, 0.5), (0.2, 0.5), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="no entropy to spend"):
            consumed(h_start, 0.3, h_end)
