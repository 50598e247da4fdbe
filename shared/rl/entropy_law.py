"""The entropy law R = -a exp(H) + b: how much score the remaining entropy can still buy.

H is the training entropy at temperature 1 and R the evaluation score at the same step. a and b
carry the unit of R (fraction or percent): keep one unit per run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.rl.student_t import t_quantile

MIN_POINTS = 3
MAX_CONDITION = 1e6
"""Above it exp(H) is a constant but for rounding, and a and b cannot be told apart."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class EntropyLaw:
    """A fitted law; where the points do not identify it, every number but condition is NaN."""

    a: float
    b: float
    ceiling: float
    """b - a: the score at H = 0, when all entropy is spent."""
    rmse: float
    """Root of the mean squared residual of the fitted points, in the unit of R."""
    r2: float
    """Share of the variance of R explained; NaN where R does not vary."""
    condition: float
    """2-norm condition number of the design matrix (-exp(H), 1)."""
    is_identifiable: bool
    num_points: int
    confidence: float
    a_interval: Interval
    b_interval: Interval
    ceiling_interval: Interval

    def predict(self, entropy: float) -> float:
        """The score that the law gives at an entropy in nats."""
        return -self.a * math.exp(entropy) + self.b

    def rmse_on(self, entropies: Sequence[float], scores: Sequence[float]) -> float:
        """Root mean squared error on other points, such as those after the fit.

        Raises:
            ValueError: as in fit, or there is no point.
        """
        _check_points(entropies, scores)
        if not entropies:
            raise ValueError("need a point to measure the error on")
        errors = [score - self.predict(h) for h, score in zip(entropies, scores, strict=True)]
        return math.sqrt(math.fsum(error**2 for error in errors) / len(errors))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a law and the entropy's trend say of the rest of a run; NaN for what is unknown.

    H_now is the trend line at the last step, so that one noisy step does not move the forecast.
    """

    score_at_floor: float
    """The law's score where the entropy is down to the floor."""
    gain_left: float
    """score_at_floor minus the law's score at H_now."""
    consumed: float
    """`consumed` from the first entropy to H_now, down to the floor. Not clamped: below 0 the
    entropy has risen, above 1 it is under the floor. NaN where the run began at the floor."""
    rate: float
    """Slope of the trend line in nats per step; negative where the entropy falls."""
    steps_left: float
    """Steps to the floor at that rate: 0 at or under it, inf where the entropy does not fall."""


def fit(
    entropies: Sequence[float], scores: Sequence[float], *, confidence: float = 0.95
) -> EntropyLaw:
    """Least squares of the scores on (-exp(H), 1), in float64.

        R = -a exp(H) + b

    Eq. 6 of https://arxiv.org/abs/2505.22617, which names no fitting method; the law is linear in
    exp(H). The intervals are the t-intervals of ordinary least squares with n - 2 degrees of
    freedom: they take the residuals as independent and of one size, so on a training curve
    they are a lower bound of the uncertainty.

    Returns:
        A law with is_identifiable False for fewer than three points or an H that hardly
        moves (condition above MAX_CONDITION).
    Raises:
        ValueError: the lengths differ, a number is not finite, or confidence is not in (0, 1).
    """
    _check_points(entropies, scores)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    x = torch.tensor(entropies, dtype=torch.float64).exp()
    y = torch.tensor(scores, dtype=torch.float64)
    condition = _condition(x)
    if len(x) < MIN_POINTS or not condition <= MAX_CONDITION:
        return _unidentifiable(len(x), condition, confidence)
    centred = x - x.mean()
    spread = float(centred.square().sum())
    slope = float((centred * (y - y.mean())).sum()) / spread
    b = float(y.mean()) - slope * float(x.mean())
    squared_error = float((y - slope * x - b).square().sum())
    squared_total = float((y - y.mean()).square().sum())
    deviation = math.sqrt(squared_error / (len(x) - 2))
    reach = deviation * t_quantile((1 + confidence) / 2, len(x) - 2)
    return EntropyLaw(
        a=-slope,
        b=b,
        ceiling=b + slope,
        rmse=math.sqrt(squared_error / len(x)),
        r2=1 - squared_error / squared_total if squared_total > 0 else math.nan,
        condition=condition,
        is_identifiable=True,
        num_points=len(x),
        confidence=confidence,
        a_interval=_around(-slope, reach / math.sqrt(spread)),
        b_interval=_around(b, reach * _leverage(0.0, x)),
        ceiling_interval=_around(b + slope, reach * _leverage(1.0, x)),
    )


def consumed(h_start: float, h_now: float, h_end: float = 0.0) -> float:
    """Share of the entropy that is spent: (h_start - h_now) / (h_start - h_end).

    Below 0 where the entropy rose. h_end is the entropy at the run's end, or its floor.

    Raises:
        ValueError: h_start is not above h_end.
    """
    if not h_start > h_end:
        raise ValueError(f"no entropy to spend between {h_start} and {h_end}")
    return (h_start - h_now) / (h_start - h_end)


def forecast(
    law: EntropyLaw,
    steps: Sequence[int],
    entropies: Sequence[float],
    *,
    floor: float,
    window: int,
) -> Forecast:
    """Where the run ends if its entropy goes on as over the last `window` points.

        steps_left = (H_now - floor) / -rate,    gain_left = law(floor) - law(H_now)

    The rate is the least-squares slope of the entropy over the step. A falling entropy usually
    slows down, so steps_left is rather too small than too large.

    Args:
        steps: ascending. entropies: one per step, in nats.
        floor: nats, >= 0; the entropy at which the run counts as spent.
        window: points, >= 2; a shorter curve is taken whole.
    Returns:
        With one point H_now is its entropy and the rate unknown; with none, score_at_floor is
        all that is known.
    Raises:
        ValueError: the lengths differ, a number is not finite, the steps do not ascend, or floor
            or window is out of range.
    """
    _check_curve(steps, entropies)
    if not (0 <= floor < math.inf and window >= 2):
        raise ValueError(f"need floor >= 0 and window >= 2, got {floor} and {window}")
    now, rate = _trend(steps[-window:], entropies[-window:])
    score_at_floor = law.predict(floor)
    has_entropy_to_spend = bool(entropies) and entropies[0] > floor
    return Forecast(
        score_at_floor=score_at_floor,
        gain_left=score_at_floor - law.predict(now),
        consumed=consumed(entropies[0], now, floor) if has_entropy_to_spend else math.nan,
        rate=rate,
        steps_left=_steps_left(now - floor, rate),
    )


def _trend(steps: Sequence[int], entropies: Sequence[float]) -> tuple[float, float]:
    """(value at the last step, slope) of the least-squares line; the value is at least 0."""
    if not entropies:
        return math.nan, math.nan
    first = entropies[0]
    if len(entropies) < 2:
        return first, math.nan
    # Measured from the first value, so that a constant entropy has a slope of exactly 0.
    risen = [entropy - first for entropy in entropies]
    mean = math.fsum(risen) / len(risen)
    mean_step = math.fsum(steps) / len(steps)
    away = [step - mean_step for step in steps]
    spread = math.fsum(distance**2 for distance in away)
    slope = math.fsum(d * h for d, h in zip(away, risen, strict=True)) / spread
    # A line through a curve that flattens ends below it, and no entropy is negative.
    return max(0.0, first + mean + slope * away[-1]), slope


def _steps_left(distance: float, rate: float) -> float:
    if distance <= 0:
        return 0.0
    if rate >= 0:
        return math.inf
    return distance / -rate


def _check_curve(steps: Sequence[int], entropies: Sequence[float]) -> None:
    if len(steps) != len(entropies):
        raise ValueError(f"{len(steps)} steps do not pair with {len(entropies)} entropies")
    if not all(math.isfinite(value) for value in (*steps, *entropies)):
        raise ValueError("a step or an entropy is not finite")
    if list(steps) != sorted(set(steps)):
        raise ValueError("the steps do not ascend")


def _check_points(entropies: Sequence[float], scores: Sequence[float]) -> None:
    if len(entropies) != len(scores):
        raise ValueError(f"{len(entropies)} entropies do not pair with {len(scores)} scores")
    if not all(math.isfinite(value) for value in (*entropies, *scores)):
        raise ValueError("an entropy or a score is not finite")


def _around(centre: float, half_width: float) -> Interval:
    return centre - half_width, centre + half_width


def _leverage(at: float, x: Tensor) -> float:
    """Standard error of the fitted line at a point, per unit of residual deviation.

    b is the line at exp(H) = 0 and the ceiling is the line at exp(H) = 1.
    """
    mean = float(x.mean())
    return math.sqrt(1 / len(x) + (at - mean) ** 2 / float((x - mean).square().sum()))


def _condition(x: Tensor) -> float:
    if len(x) < 2:
        return math.inf
    singular = torch.linalg.svdvals(torch.stack([-x, torch.ones_like(x)], dim=1))
    return float(singular[0] / singular[1]) if singular[1] > 0 else math.inf


def _unidentifiable(num_points: int, condition: float, confidence: float) -> EntropyLaw:
    nan = math.nan
    return EntropyLaw(
        a=nan,
        b=nan,
        ceiling=nan,
        rmse=nan,
        r2=nan,
        condition=condition,
        is_identifiable=False,
        num_points=num_points,
        confidence=confidence,
        a_interval=(nan, nan),
        b_interval=(nan, nan),
        ceiling_interval=(nan, nan),
    )
