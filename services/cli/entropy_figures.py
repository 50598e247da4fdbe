"""Figures of the policy's entropy: its course, where it is, and what moved it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from services.cli.entropy_readings import (
    Prediction,
    accuracy_name,
    read_entropy,
    read_entropy_change,
    read_entropy_histogram,
    read_entropy_of_outcomes,
    read_entropy_positions,
)
from services.cli.figures import (
    BLUE,
    BY_ACCURACY,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    Absent,
    Drawing,
    as_percent,
    legend,
    line,
    logarithmic,
    panels_below,
    panels_beside,
    smoothed,
)
from services.cli.measurements import Row, number, numbered, profile, series

_EDGES = ("0", "0.05", *(f"{tenth / 10:g}" for tenth in range(1, 13)))
"""Lower edges of entropy_histogram's bins in nats, as the learner has them; the last is open."""

_PREDICTIONS = (
    ("pg", "policy gradient", BLUE),
    ("npg", "natural policy gradient", ORANGE),
    ("influence", "sampled gradient", GREEN),
)


def draw_entropy(rows: Sequence[Row]) -> Drawing:
    """Full and clamped entropy, and the entropy coefficient where there is one."""
    steps, entropy = series(rows, "entropy")
    if not steps:
        raise Absent("no row has entropy")
    at, coefficient = series(rows, "entropy_coefficient")
    labels = ["entropy (nats)", "coefficient λ"] if at else ["entropy (nats)"]
    figure, panels = panels_below("Policy entropy over the sampled tokens", labels)
    line(panels[0], steps, entropy, color=BLUE, label="full")
    clamped_at, clamped = series(rows, "entropy_clamped")
    if clamped_at:
        line(panels[0], clamped_at, clamped, color=ORANGE, linestyle="--", label="clamped")
    panels[0].set_ylim(bottom=0)
    legend(panels[0])
    if at:
        line(panels[1], at, coefficient, color=GREEN)
    return Drawing(figure, read_entropy(rows, coefficient))


def draw_entropy_of_outcomes(rows: Sequence[Row]) -> Drawing:
    """Entropy of rewarded and other completions, and by how often the prompt was solved."""
    by_reward = {
        name: series(rows, key)
        for name, key in (
            ("reward above 0", "entropy_reward_positive"),
            ("other", "entropy_reward_other"),
        )
    }
    buckets = numbered(rows, "entropy_by_accuracy_")
    has_rewards = any(steps for steps, _ in by_reward.values())
    if not has_rewards and not buckets:
        raise Absent("no row has entropy_reward_positive or entropy_by_accuracy_0, ...")
    title = "Entropy by outcome (means of 5 steps)"
    labels = ["by completion (nats)"] * has_rewards + ["by prompt (nats)"] * bool(buckets)
    figure, panels = panels_below(title, labels)
    if has_rewards:
        for (name, (steps, entropy)), colour in zip(by_reward.items(), (BLUE, RED), strict=True):
            line(panels[0], steps, smoothed(entropy), color=colour, label=name)
        legend(panels[0])
    for end, key in buckets:
        steps, entropy = series(rows, key)
        colour, name = BY_ACCURACY.get(end, GREY), accuracy_name(end)
        line(panels[-1], steps, smoothed(entropy), color=colour, linewidth=1.2, label=name)
    for axes in panels:
        axes.set_ylim(bottom=0)
    if buckets:
        legend(panels[-1], columns=5, outside=True)
    return Drawing(figure, read_entropy_of_outcomes(rows))


def draw_entropy_histogram(rows: Sequence[Row]) -> Drawing:
    """How the tokens' entropies are spread in the first, the middle and the last step."""
    counted = [(row, _counts(row)) for row in rows]
    given = [(row, counts) for row, counts in counted if sum(counts) > 0]
    if not given:
        raise Absent(f"no row has entropy_histogram with {len(_EDGES)} counts")
    shown = {place: given[place] for place in (0, len(given) // 2, len(given) - 1)}
    figure, (axes,) = panels_below("Entropy of the tokens", ["share of tokens"])
    shares_by_step = [
        (number(row, "step") or 0.0, [count / sum(counts) for count in counts])
        for row, counts in shown.values()
    ]
    for (step, shares), colour in zip(shares_by_step, (SKY, BLUE, RED), strict=False):
        axes.stairs(shares, color=colour, linewidth=1.5, label=f"step {step:.0f}")
    # Few tokens have much entropy, and those are what the histogram is for.
    logarithmic(axes, [share for _, shares in shares_by_step for share in shares if share > 0])
    as_percent(axes.yaxis)
    axes.set_xticks(range(len(_EDGES) + 1), [*_EDGES, "∞"])
    axes.set_xlabel("entropy of the token (nats)")
    legend(axes)
    return Drawing(figure, read_entropy_histogram(shares_by_step))


def draw_entropy_positions(rows: Sequence[Row]) -> Drawing:
    """Entropy by tenth of the completion, at the start and at the end of the run."""
    given = [numbers for row in rows if (numbers := profile(row, "entropy_by_position"))]
    if not given:
        raise Absent("no row has entropy_by_position")
    window = max(1, min(10, len(given) // 2))
    start, end = _mean_profile(given[:window]), _mean_profile(given[-window:])
    figure, (axes,) = panels_below("Entropy within the completion", ["entropy (nats)"])
    count = "step" if window == 1 else f"{window} steps"
    for means, name, colour in ((start, "first", SKY), (end, "last", RED)):
        places = [place + 0.5 for place, _ in means]
        axes.plot(
            places, [mean for _, mean in means], color=colour, marker="o", markersize=4,
            label=f"{name} {count}",
        )  # fmt: skip
    axes.set_xlim(0, max(map(len, given)))
    axes.set_xticks(range(max(map(len, given)) + 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the completion (tenths of its length)")
    legend(axes)
    return Drawing(figure, read_entropy_positions(start, end))


def draw_entropy_change(rows: Sequence[Row]) -> Drawing:
    """Measured change of the entropy over a step against each prediction of it."""
    predictions = []
    for key, name, colour in _PREDICTIONS:
        predicted, measured = series(
            rows, "entropy_change_measured", by=f"entropy_change_predicted_{key}"
        )
        if predicted:
            predictions.append((Prediction(name, predicted, measured), colour))
    if not predictions:
        raise Absent("no row has entropy_change_measured and a prediction of it")
    title = "Change of the entropy over a step, measured and predicted"
    figure, panels = panels_beside(title, len(predictions))
    unit = _power_of_ten([value for each, _ in predictions for value in each.measured])
    everything = [0.0]
    for axes, (prediction, colour) in zip(panels, predictions, strict=True):
        scaled = [value / 10.0**unit for value in prediction.scaled()]
        measured = [value / 10.0**unit for value in prediction.measured]
        everything += [*scaled, *measured]
        axes.axhline(0, color="#BBBBBB", linewidth=0.8)
        axes.axvline(0, color="#BBBBBB", linewidth=0.8)
        axes.plot(scaled, measured, ".", color=colour, markersize=7, alpha=0.75)
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.9, linestyle="--")
        axes.set_title(prediction.name, fontsize=9)
    room = 0.08 * (max(everything) - min(everything)) or 1.0
    for axes in panels:
        axes.set_xlim(min(everything) - room, max(everything) + room)
        axes.set_ylim(min(everything) - room, max(everything) + room)
    panels[0].set_ylabel(f"measured ($10^{{{unit}}}$ nats)")
    panels[len(panels) // 2].set_xlabel("predicted, scaled to the measured standard deviation")
    return Drawing(figure, read_entropy_change([prediction for prediction, _ in predictions]))


def _power_of_ten(numbers: Sequence[float]) -> int:
    """Exponent of the largest size."""
    largest = max(map(abs, numbers))
    return math.floor(math.log10(largest)) if largest > 0 else 0


def _counts(row: Row) -> list[float]:
    """The histogram of a row; [] if it has not the bins that are drawn."""
    counts = [count or 0.0 for count in profile(row, "entropy_histogram")]
    return counts if len(counts) == len(_EDGES) else []


def _mean_profile(profiles: Sequence[Sequence[float | None]]) -> list[tuple[int, float]]:
    """Place and mean over the steps that have a number there."""
    means = []
    for place in range(max(map(len, profiles))):
        known = [
            value
            for numbers in profiles
            if place < len(numbers) and (value := numbers[place]) is not None
        ]
        if known:
            means.append((place, statistics.fmean(known)))
    return means
