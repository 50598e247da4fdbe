import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rl.entropy_law import EntropyLaw, consumed, fit, forecast

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
@settings(max_examples=60)
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


def numbers(law: EntropyLaw) -> list[float]:
    """Everything in the law that carries the unit of R."""
    return [
        *[law.a, law.b, law.ceiling, law.rmse],
        *law.a_interval,
        *law.b_interval,
        *law.ceiling_interval,
    ]


@given(points, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_of_the_points_does_not_matter(
    pairs: list[tuple[float, float]], random: Random
) -> None:
    law = fit([h for h, _ in pairs], [r for _, r in pairs])
    random.shuffle(pairs)
    shuffled = fit([h for h, _ in pairs], [r for _, r in pairs])
    # The intervals of three points on a line reach 12.7 deviations of what is only rounding.
    assert numbers(shuffled) == pytest.approx(numbers(law), rel=1e-8, abs=1e-6)
    assert shuffled.condition == pytest.approx(law.condition)
    assert shuffled.num_points == law.num_points


@given(points, st.sampled_from([100.0, 0.01, -1.0, 3.0]))
@settings(max_examples=60)
def test_the_fit_has_the_unit_of_the_scores(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    entropies, scores = [h for h, _ in pairs], [r for _, r in pairs]
    law, scaled = fit(entropies, scores), fit(entropies, [factor * r for r in scores])
    for name in ("a", "b", "ceiling"):
        low, high = sorted(factor * x for x in getattr(law, f"{name}_interval"))
        expected = [factor * getattr(law, name), low, high]
        actual = [getattr(scaled, name), *getattr(scaled, f"{name}_interval")]
        assert actual == pytest.approx(expected, rel=1e-8, abs=1e-6 * abs(factor))
    assert scaled.rmse == pytest.approx(abs(factor) * law.rmse, abs=1e-8 * abs(factor))
    assert scaled.condition == law.condition
    if np.var(scores) > 1e-6:
        assert scaled.r2 == pytest.approx(law.r2, abs=1e-8)


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


@pytest.mark.parametrize(("confidence", "low", "high"), [(0.95, 0.92, 0.98), (0.8, 0.76, 0.84)])
def test_the_intervals_cover_the_truth_as_often_as_they_claim(
    confidence: float, low: float, high: float
) -> None:
    generator = np.random.default_rng(0)
    covered = np.zeros(3)
    for _ in range(1000):
        scores = [0.6 - 0.2 * math.exp(h) + generator.normal() * 0.02 for h in ENTROPIES]
        law = fit(ENTROPIES, scores, confidence=confidence)
        covered += [
            law.a_interval[0] < 0.2 < law.a_interval[1],
            law.b_interval[0] < 0.6 < law.b_interval[1],
            law.ceiling_interval[0] < 0.4 < law.ceiling_interval[1],
        ]
    assert ((covered / 1000 >= low) & (covered / 1000 <= high)).all(), covered


@pytest.mark.parametrize(
    "entropies",
    [[], [0.5], [0.5, 0.7], [0.3] * 5, [0.3, 0.3 + 1e-8, 0.3 - 1e-8, 0.3 + 2e-8]],
    ids=["none", "one", "two", "constant", "constant but for rounding"],
)
def test_points_that_do_not_identify_the_law_say_so(entropies: list[float]) -> None:
    law = fit(entropies, [0.1 * i for i in range(len(entropies))])
    assert not law.is_identifiable
    assert all(math.isnan(x) for x in (*numbers(law), law.r2, law.predict(0.1)))
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


LAW = fit(ENTROPIES, [-0.2 * math.exp(h) + 0.6 for h in ENTROPIES])


def test_a_straight_fall_is_forecast_exactly() -> None:
    steps = list(range(10, 31))
    entropies = [1.0 - 0.02 * (step - 10) for step in steps]
    result = forecast(LAW, steps, entropies, floor=0.1, window=5)
    assert result.rate == pytest.approx(-0.02)
    assert result.steps_left == pytest.approx(25)
    assert result.consumed == pytest.approx(4 / 9)
    assert result.score_at_floor == pytest.approx(0.6 - 0.2 * math.exp(0.1))
    assert result.gain_left == pytest.approx(0.2 * (math.exp(0.6) - math.exp(0.1)))


curves = st.lists(
    st.tuples(st.integers(1, 50), st.floats(1 / 64, 3, width=32)), min_size=2, max_size=30
)


@given(curves, st.integers(2, 35), st.sampled_from([0.0, 0.02, 0.5]))
@settings(max_examples=100)
def test_the_forecast_equals_the_slow_form(
    curve: list[tuple[int, float]], window: int, floor: float
) -> None:
    steps = np.cumsum([gap for gap, _ in curve]).tolist()
    entropies = [h for _, h in curve]
    result = forecast(LAW, steps, entropies, floor=floor, window=window)
    used = min(window, len(steps))
    matrix = np.stack([np.array(steps[-used:], dtype=np.float64), np.ones(used)], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(matrix, np.array(entropies[-used:]), rcond=None)
    now = max(0.0, slope * steps[-1] + offset)
    assert result.rate == pytest.approx(slope, abs=1e-9)
    assert result.score_at_floor == LAW.predict(floor)
    assert result.gain_left == pytest.approx(LAW.predict(floor) - LAW.predict(now), abs=1e-9)
    if entropies[0] > floor:
        spent = (entropies[0] - now) / (entropies[0] - floor)
        assert result.consumed == pytest.approx(spent, rel=1e-9, abs=1e-6)
    else:
        assert math.isnan(result.consumed)
    if now < floor - 1e-9:
        assert result.steps_left == 0
    elif now > floor + 1e-9 and slope > 1e-9:
        assert result.steps_left == math.inf
    elif now > floor + 1e-9 and slope < -1e-6:
        assert result.steps_left == pytest.approx((now - floor) / -slope, rel=1e-3)


def test_only_the_window_says_how_fast_the_entropy_falls() -> None:
    steps = list(range(8))
    entropies = [3.0, 1.0, 0.9, 0.8, 0.5, 0.4, 0.3, 0.2]
    last = forecast(LAW, steps, entropies, floor=0.0, window=4)
    assert last.rate == pytest.approx(-0.1)
    assert last.steps_left == pytest.approx(2)
    assert last.consumed == pytest.approx(2.8 / 3)
    whole = forecast(LAW, steps, entropies, floor=0.0, window=8)
    assert whole.rate < -0.2
    assert whole == forecast(LAW, steps, entropies, floor=0.0, window=1000)


def test_a_gap_in_the_steps_counts_by_its_length() -> None:
    result = forecast(LAW, [1, 5, 6], [0.9, 0.5, 0.4], floor=0.1, window=3)
    assert result.rate == pytest.approx(-0.1)
    assert result.steps_left == pytest.approx(3)


@pytest.mark.parametrize("entropy", [0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("num_points", [2, 3, 7, 49])
def test_an_entropy_that_stands_still_never_arrives(entropy: float, num_points: int) -> None:
    steps = list(range(num_points))
    result = forecast(LAW, steps, [entropy] * num_points, floor=0.02, window=50)
    assert result.rate == 0
    assert result.steps_left == math.inf
    assert result.consumed == 0
    rising = [entropy + 0.01 * step for step in steps]
    result = forecast(LAW, steps, rising, floor=0.02, window=50)
    assert result.steps_left == math.inf
    assert result.consumed < 0
    assert result.gain_left > 0


def test_at_or_under_the_floor_no_step_is_left() -> None:
    for entropies in ([0.5, 0.3, 0.1], [0.5, 0.25, 0.0], [0.05, 0.06, 0.07], [0.1, 0.1, 0.1]):
        result = forecast(LAW, [0, 1, 2], entropies, floor=0.1, window=3)
        assert result.steps_left == 0, entropies
    under = forecast(LAW, [0, 1, 2], [0.5, 0.25, 0.0], floor=0.1, window=3)
    assert under.consumed > 1
    assert under.gain_left < 0
    assert math.isnan(forecast(LAW, [0, 1], [0.1, 0.1], floor=0.1, window=2).consumed)


def test_a_curve_that_flattens_at_zero_is_not_forecast_below_it() -> None:
    result = forecast(LAW, [0, 1, 2, 3], [1.0, 0.0, 0.0, 0.0], floor=0.0, window=4)
    assert result.steps_left == 0
    assert result.consumed == 1
    assert result.gain_left == 0


def test_one_point_has_no_rate_and_no_point_has_nothing() -> None:
    one = forecast(LAW, [7], [0.5], floor=0.1, window=20)
    assert math.isnan(one.rate)
    assert math.isnan(one.steps_left)
    assert one.consumed == 0
    assert one.gain_left == pytest.approx(0.2 * (math.exp(0.5) - math.exp(0.1)))
    assert forecast(LAW, [7], [0.1], floor=0.1, window=20).steps_left == 0
    none = forecast(LAW, [], [], floor=0.1, window=20)
    assert none.score_at_floor == LAW.predict(0.1)
    unknown = (none.gain_left, none.consumed, none.rate, none.steps_left)
    assert all(math.isnan(x) for x in unknown)


def test_without_a_law_only_the_entropy_is_forecast() -> None:
    unknown = fit([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])
    result = forecast(unknown, [0, 1, 2], [0.5, 0.4, 0.3], floor=0.1, window=3)
    assert math.isnan(result.score_at_floor)
    assert math.isnan(result.gain_left)
    assert result.rate == pytest.approx(-0.1)
    assert result.steps_left == pytest.approx(2)
    assert result.consumed == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("steps", "entropies", "message"),
    [
        ([1, 2], [0.5], "pair"),
        ([1, 2], [0.5, math.nan], "finite"),
        ([2, 1], [0.5, 0.4], "ascend"),
        ([1, 1], [0.5, 0.4], "ascend"),
    ],
)
def test_a_broken_curve_is_refused(steps: list[int], entropies: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast(LAW, steps, entropies, floor=0.1, window=2)


@pytest.mark.parametrize(
    ("floor", "window"), [(-0.1, 5), (math.nan, 5), (math.inf, 5), (0.1, 1), (0.1, 0), (0.1, -3)]
)
def test_a_floor_and_a_window_out_of_range_are_refused(floor: float, window: int) -> None:
    with pytest.raises(ValueError, match="need floor"):
        forecast(LAW, [1, 2], [0.5, 0.4], floor=floor, window=window)
