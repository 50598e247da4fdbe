"""Figures of the entropy law, and of what it forecasts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.cli.entropy_readings import read_forecast, read_law
from services.cli.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    Absent,
    Drawing,
    as_percent,
    label_numbers_below,
    legend,
    legend_below,
    line,
    logarithmic,
    panels_below,
)
from services.cli.law import (
    ceiling_text,
    coefficients,
    has_ceiling,
    interval,
    law_row,
    law_text,
)
from services.cli.measurements import Row, number, series, values

_CURVE_POINTS = 60
_MOST_PROJECTED = 0.5
"""The projection is drawn over at most this many times the steps that were made."""


@dataclass(frozen=True, slots=True)
class LawPoint:
    """An evaluated version: training entropy in nats, score and its standard error."""

    entropy: float
    score: float
    error: float


def draw_law(rows: Sequence[Row]) -> Drawing:
    """Evaluation score against exp(H), with the fitted law, its ceiling and the floor."""
    points = law_points(rows)
    if not points:
        raise Absent("no evaluated version has both a score and an entropy")
    figure, (axes,) = panels_below("Evaluation score against entropy", ["evaluation score"])
    axes.errorbar(
        [math.exp(point.entropy) for point in points], [point.score for point in points],
        yerr=[point.error for point in points], color=BLUE, marker="o", markersize=4,
        linestyle="none", elinewidth=1, capsize=2.5, label="evaluated versions ± standard error",
    )  # fmt: skip
    if coefficients(law_row(rows)) is None:
        axes.text(
            0.5, 0.06, f"Law {law_text(rows)}", transform=axes.transAxes, ha="center",
            fontsize=9, color=RED,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    else:
        _draw_fit(axes, law_row(rows), points)
    label_numbers_below(axes, "exp(H), H = training entropy of the version (nats)")
    legend_below(figure, columns=2)
    return Drawing(figure, read_law(rows, len(points)))


def draw_forecast(rows: Sequence[Row]) -> Drawing:
    """Share of the entropy consumed, steps left and forecast score, as known at each step."""
    steps, consumed = series(rows, "entropy_consumed")
    if not steps:
        raise Absent("no row has entropy_consumed")
    scores_at, scores = series(rows, "law_score_at_floor")
    left_at, left = series(rows, "law_steps_left")
    labels = ["entropy consumed"] + ["steps left"] * any(left) + ["score"] * bool(scores)
    figure, panels = panels_below("Forecast, as it stood at each step", labels)
    _draw_consumed(panels[0], rows, steps, consumed)
    if any(left):
        positive = [(at, value) for at, value in zip(left_at, left, strict=True) if value > 0]
        panels[1].plot(*zip(*positive, strict=True), ".", color=ORANGE, markersize=4)
        logarithmic(panels[1], [value for _, value in positive])
    if scores:
        _draw_forecast_scores(panels[-1], rows, scores_at, scores)
    return Drawing(figure, read_forecast(rows))


def law_points(rows: Sequence[Row]) -> list[LawPoint]:
    """Each evaluated version whose entropy is known.

    A row's entropy is that of the version its batch was trained on, one before the version that
    the step made.
    """
    entropies: dict[float, float] = {}
    for row in rows:
        made, entropy = number(row, "policy_version"), number(row, "entropy_after_filter")
        entropy = number(row, "entropy") if entropy is None else entropy
        if made is not None and entropy is not None:
            entropies[made - 1] = entropy
    points = []
    for row in rows:
        version, score = number(row, "eval_policy_version"), number(row, "eval_score")
        if version in entropies and score is not None:
            points.append(LawPoint(entropies[version], score, number(row, "eval_stderr") or 0.0))
    return points


def band_half_width(row: Row, points: Sequence[LawPoint], at: float) -> float | None:
    """Half the 95 % interval of the fitted line at exp(H) = `at`.

        w(x) = w_a sqrt(S / n + (x - mean x)²),    S the sum of (x - mean x)² over the points

    with w_a half the interval of the slope a: ordinary least squares. None without that interval.
    """
    of_slope = interval(row, "law_a")
    if of_slope is None:
        return None
    places = [math.exp(point.entropy) for point in points]
    variance, centre = statistics.pvariance(places), statistics.fmean(places)
    return (of_slope[1] - of_slope[0]) / 2 * math.sqrt(variance + (at - centre) ** 2)


def _draw_fit(axes: Any, row: Row, points: Sequence[LawPoint]) -> None:
    """The law as a line with its band down to H = 0, dashed where there are no points."""
    fitted = coefficients(row)
    assert fitted is not None
    a, b = fitted
    places = [math.exp(point.entropy) for point in points]
    left, right = min(places), max(places)
    for style, ends, label in (("-", (left, right), "fitted law"), ("--", (1.0, left), None)):
        heights = [b - a * x for x in ends]
        axes.plot(ends, heights, color=RED, linewidth=1.2, linestyle=style, label=label)
    _draw_band(axes, row, points, fitted)
    _mark_floor(axes, row)
    shown = [b - a * right, b - a]
    shown += [point.score + side * point.error for point in points for side in (-1, 1)]
    span = max(max(shown) - min(shown), 1e-3)
    if has_ceiling(row):
        label = f"ceiling at H = 0: {ceiling_text(row)}"
        axes.plot([1.0], [b - a], color=GREEN, marker="s", linestyle="none", label=label)
        # A vague ceiling would press the points into a line: its interval gets a span at most.
        least, most = min(shown) - span, max(shown) + span
        shown += [min(max(end, least), most) for end in interval(row, "law_ceiling") or ()]
    axes.set_ylim(min(shown) - 0.1 * span, max(shown) + 0.1 * span)


def _draw_band(
    axes: Any, row: Row, points: Sequence[LawPoint], fitted: tuple[float, float]
) -> None:
    """The 95 % band of the line, from H = 0 to the highest entropy."""
    a, b = fitted
    right = max(math.exp(point.entropy) for point in points)
    curve = [1.0 + (right - 1.0) * place / _CURVE_POINTS for place in range(_CURVE_POINTS + 1)]
    band = [
        (x, b - a * x - width, b - a * x + width)
        for x in curve
        if (width := band_half_width(row, points, x)) is not None
    ]
    if band:
        axes.fill_between(
            *zip(*band, strict=True), color=RED, alpha=0.13, linewidth=0, label="95 % band"
        )


def _mark_floor(axes: Any, row: Row) -> None:
    """Where the entropy counts as spent, and the score that the law gives there."""
    floor, score = number(row, "law_floor"), number(row, "law_score_at_floor")
    if floor is None or score is None:
        return
    place = math.exp(floor)
    axes.axvline(place, color=GREY, linewidth=0.9, linestyle=":")
    axes.plot(
        [place], [score], color=ORANGE, marker="D", linestyle="none",
        label=f"forecast at the floor, H = {floor:.3g}: {score:.3f}",
    )  # fmt: skip


def _draw_consumed(
    axes: Any, rows: Sequence[Row], steps: Sequence[float], consumed: Sequence[float]
) -> None:
    line(axes, steps, consumed, color=BLUE, label="trend of the entropy so far")
    left = number(law_row(rows), "law_steps_left")
    reach = max(steps[-1] - steps[0], 1.0) * _MOST_PROJECTED
    if left:
        ahead = min(left, reach)
        height = consumed[-1] + (1.0 - consumed[-1]) * ahead / left
        axes.plot(
            [steps[-1], steps[-1] + ahead], [consumed[-1], height], color=RED, linestyle="--",
            linewidth=1.2, label="at the present rate",
        )  # fmt: skip
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":", label="entropy floor")
    # The trend of the first few steps may point anywhere.
    settled = consumed[len(consumed) // 4 :]
    axes.set_ylim(min(0.0, *settled), max(1.05, *settled))
    as_percent(axes.yaxis)
    legend(axes)


def _draw_forecast_scores(
    axes: Any, rows: Sequence[Row], steps: Sequence[float], scores: Sequence[float]
) -> None:
    """Forecast at the floor, interval of the ceiling and what was scored so far."""
    line(axes, steps, scores, color=ORANGE, label="forecast at the floor")
    bounded = [
        (at, *span)
        for row in rows
        if (at := number(row, "step")) is not None
        and has_ceiling(row)
        and (span := interval(row, "law_ceiling")) is not None
    ]
    if bounded:
        axes.fill_between(
            *zip(*bounded, strict=True), color=GREEN, alpha=0.18, linewidth=0,
            label="95 % of the ceiling",
        )  # fmt: skip
    evaluated_at, scored = series(rows, "eval_score")
    axes.plot(evaluated_at, scored, color=SKY, marker="o", markersize=3, lw=0.8, label="evaluated")
    # The first fits, on three or four points, would leave no room for the rest.
    settled = [*scores[len(scores) // 2 :], *values(rows, "eval_score")]
    settled += [end for _, *span in bounded[-1:] for end in span]
    room = 0.15 * max(max(settled) - min(settled), 1e-3)
    axes.set_ylim(min(settled) - room, max(settled) + room)
    legend(axes, columns=3, outside=True)
