"""The report's figures: each shows one thing, and says in a sentence what it shows.

A figure is drawn from the rows of metrics.jsonl. Where they lack what it needs, `Absent` is raised
with the reason, which the report prints in its place. Colours are those of Okabe and Ito, which the
colour-blind tell apart.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from services.cli.measurements import Row, latest, number, series, staleness_counts, values
from services.cli.readings import (
    numbered,
    read_balance,
    read_covariance,
    read_entropy,
    read_evaluation,
    read_law,
    read_mismatch,
    read_reward,
)
from services.cli.words import percent

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#8A8A8A"

_WIDTH, _HEIGHT = 7.6, 3.9
_PANEL_HEIGHT = 1.7


class Absent(Exception):  # noqa: N818  not an error: most runs lack something
    """The rows lack what a figure needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawn figure and the sentence that reads it."""

    figure: Figure
    reading: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A figure to draw, and what it is called."""

    name: str
    title: str
    draw: Callable[[Sequence[Row]], Drawing]


def draw_scores(rows: Sequence[Row]) -> Drawing:
    """Training reward and evaluation score by step."""
    steps, rewards = series(rows, "reward_mean")
    scored = [row for row in rows if number(row, "eval_score") is not None]
    if not steps and not scored:
        raise Absent("no row has reward_mean or eval_score")
    figure, (axes,) = _panels("Reward and evaluation score", ["reward, score"])
    if steps:
        _line(axes, steps, rewards, color=SKY, linewidth=1, alpha=0.7)
        _line(axes, steps, _smoothed(rewards), color=BLUE, label="training reward, mean of 5 steps")
    if scored:
        at = [_evaluated_step(row) for row in scored]
        scores = [number(row, "eval_score") or 0.0 for row in scored]
        errors = [number(row, "eval_stderr") or 0.0 for row in scored]
        axes.errorbar(
            at, scores, yerr=errors, color=RED, marker="o", markersize=4, capsize=2.5,
            linewidth=1.2, elinewidth=1, label="evaluation score ± standard error",
        )  # fmt: skip
    _legend(axes)
    return Drawing(figure, " ".join([read_reward(rewards), read_evaluation(scored)]).strip())


def draw_entropy(rows: Sequence[Row]) -> Drawing:
    """Full and clamped entropy, and the entropy coefficient where there is one."""
    steps, entropy = series(rows, "entropy")
    if not steps:
        raise Absent("no row has entropy")
    at, coefficient = series(rows, "entropy_coefficient")
    labels = ["entropy (nats)", "coefficient λ"] if at else ["entropy (nats)"]
    figure, panels = _panels("Policy entropy over the sampled tokens", labels)
    _line(panels[0], steps, entropy, color=BLUE, label="full")
    clamped_at, clamped = series(rows, "entropy_clamped")
    if clamped_at:
        _line(panels[0], clamped_at, clamped, color=ORANGE, label="clamped")
    panels[0].set_ylim(bottom=0)
    _legend(panels[0])
    if at:
        _line(panels[1], at, coefficient, color=GREEN)
    return Drawing(figure, read_entropy(rows, coefficient))


def draw_covariance(rows: Sequence[Row]) -> Drawing:
    """Percentiles of the tokens' covariance of log-prob and advantage."""
    keys = numbered(rows, "covariance_p")
    if not keys:
        raise Absent("no row has percentiles of the covariance (covariance_p50, ...)")
    figure, (axes,) = _panels("Covariance of log-probability and advantage", ["covariance (nats)"])
    colours = [GREY, SKY, BLUE, GREEN, ORANGE, RED, PURPLE]
    drawn = []
    for place, (percentile, key) in enumerate(keys):
        steps, numbers = series(rows, key)
        _line(axes, steps, numbers, color=colours[place % len(colours)], linewidth=1.2)
        drawn += numbers
        name = "maximum" if percentile == 100 else f"{percentile:g} %"
        axes.annotate(
            name, (steps[-1], numbers[-1]), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8, color=colours[place % len(colours)],
        )  # fmt: skip
    _logarithmic(axes, drawn)
    return Drawing(figure, read_covariance(rows, keys))


def draw_staleness(rows: Sequence[Row]) -> Drawing:
    """How many completions were trained how many versions late."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(staleness_counts(row))
    if not counts:
        raise Absent("no row has staleness_counts")
    total, top = counts.total(), max(counts)
    figure, (axes,) = _panels("Staleness of the trained completions", ["share of completions"])
    ages = list(range(top + 1))
    shares = [counts[age] / total for age in ages]
    bars = axes.bar(ages, shares, color=BLUE, width=0.7)
    axes.bar_label(bars, labels=[percent(share, 1) for share in shares], fontsize=8, padding=2)
    axes.set_xlabel("staleness (policy versions)")
    axes.set_xticks(ages)
    axes.set_xlim(-0.8, max(top, 4) + 0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    mean = sum(age * number for age, number in counts.items()) / total
    fresh = percent(counts[0] / total)
    return Drawing(
        figure,
        f"Of {total:,} completions {fresh} were trained by the version that sampled them; the mean"
        f" staleness is {mean:.2f} versions, the largest {top}.",
    )


def draw_law(rows: Sequence[Row]) -> Drawing:
    """Evaluation score against exp(H), with the fitted law and its ceiling."""
    points = law_points(rows)
    if not points:
        raise Absent("no evaluated version has both a score and an entropy")
    figure, (axes,) = _panels("Evaluation score against entropy", ["evaluation score"])
    exponentials = [math.exp(entropy) for entropy, _, _ in points]
    axes.errorbar(
        exponentials, [score for _, score, _ in points], yerr=[error for _, _, error in points],
        color=BLUE, marker="o", markersize=4, linestyle="none", elinewidth=1, capsize=2.5,
        label="evaluated versions ± standard error",
    )  # fmt: skip
    _draw_fit(axes, rows, min(exponentials), max(exponentials))
    axes.set_xlabel("exp(H), H = training entropy of the version (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    _legend(axes)
    return Drawing(figure, read_law(rows, len(points)))


def draw_balance(rows: Sequence[Row]) -> Drawing:
    """Where the time of each step goes."""
    timed = [row for row in rows if number(row, "seconds") is not None]
    phases = [
        ("wait_data_seconds", "waits for groups", ORANGE),
        ("train_seconds", "trains", BLUE),
        ("publish_seconds", "publishes weights", GREEN),
    ]
    if not timed or not any(values(timed, key) for key, _, _ in phases):
        raise Absent("no row has seconds and its parts (wait_data_seconds, ...)")
    steps = [number(row, "step") or 0.0 for row in timed]
    parts = [[number(row, key) or 0.0 for row in timed] for key, _, _ in phases]
    whole = [number(row, "seconds") or 0.0 for row in timed]
    rest = [max(0.0, all - sum(each)) for all, *each in zip(whole, *parts, strict=True)]
    figure, (axes,) = _panels("The learner's time", ["seconds per step"])
    axes.stackplot(
        steps, *parts, rest, colors=[*(colour for _, _, colour in phases), "#D9D9D9"],
        labels=[*(name for _, name, _ in phases), "other"], step="mid", linewidth=0,
    )  # fmt: skip
    limit = _without_outliers(whole)
    axes.set_ylim(0, limit)
    axes.set_xlabel(f"training step{_cut_off(whole, limit)}")
    _legend(axes, columns=4, outside=True)
    return Drawing(figure, read_balance(phases, parts, whole, timed))


def draw_mismatch(rows: Sequence[Row]) -> Drawing:
    """How far the sampling policy is from the trained one, and how often the ratio is clipped."""
    steps, mismatch = series(rows, "mismatch_kl")
    clipped = {side: series(rows, f"clip_fraction_{side}") for side in ("low", "high")}
    has_clip = any(found for found, _ in clipped.values())
    if not steps and not has_clip:
        raise Absent("no row has mismatch_kl or clip_fraction_low and _high")
    labels = ["mismatch KL (nats)"] * bool(steps) + ["share of tokens clipped"] * has_clip
    figure, panels = _panels("Off-policy distance", labels)
    if steps:
        _line(panels[0], steps, mismatch, color=PURPLE, linewidth=1)
        _logarithmic(panels[0], mismatch)
    for (side, (at, shares)), colour in zip(clipped.items(), (BLUE, RED), strict=True):
        if at:
            _line(panels[-1], at, shares, color=colour, linewidth=1, label=f"at the {side} bound")
    if has_clip:
        panels[-1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        panels[-1].set_ylim(bottom=0)
        _legend(panels[-1], columns=2, outside=True)
    return Drawing(figure, read_mismatch(mismatch, clipped))


SUBJECTS = (
    Subject("scores", "Reward and evaluation score", draw_scores),
    Subject("entropy", "Entropy", draw_entropy),
    Subject("law", "Entropy law", draw_law),
    Subject("covariance", "Covariance", draw_covariance),
    Subject("staleness", "Staleness", draw_staleness),
    Subject("balance", "Pipeline balance", draw_balance),
    Subject("mismatch", "Mismatch and clipping", draw_mismatch),
)


def law_points(rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Entropy, score and standard error of each evaluated version whose entropy is known.

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
            points.append((entropies[version], score, number(row, "eval_stderr") or 0.0))
    return points


def _panels(title: str, labels: Sequence[str]) -> tuple[Figure, list[Any]]:
    """A figure with one plot above the other, and a common step axis."""
    height = _HEIGHT + _PANEL_HEIGHT * (len(labels) - 1)
    figure = Figure(figsize=(_WIDTH, height), dpi=130, layout="constrained")
    ratios = [2.0, *[1.2] * (len(labels) - 1)]
    panels = figure.subplots(
        len(labels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#E6E6E6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
    panels[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
    panels[-1].set_xlabel("training step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    return figure, list(panels)


def _line(axes: Any, steps: Sequence[float], numbers: Sequence[float], **style: Any) -> None:
    """A line, or a dot where a line would not be seen."""
    axes.plot(steps, numbers, marker="o" if len(steps) == 1 else None, **style)


def _legend(axes: Any, *, columns: int = 1, outside: bool = False) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if outside:
        axes.legend(
            handles, labels, frameon=False, fontsize=9, ncols=columns, loc="lower right",
            bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    elif labels:
        axes.legend(handles, labels, frameon=False, fontsize=9, loc="best", ncols=columns)


def _logarithmic(axes: Any, numbers: Sequence[float]) -> None:
    """A log scale; linear around zero where there are values that are not positive."""
    sizes = [abs(value) for value in numbers if value != 0]
    if not sizes:
        return
    if min(numbers) > 0:
        axes.set_yscale("log")
        return
    threshold = 10.0 ** math.floor(math.log10(statistics.median(sizes)))
    axes.set_yscale("symlog", linthresh=threshold)


def _draw_fit(axes: Any, rows: Sequence[Row], left: float, right: float) -> None:
    """The law as a line, dashed where there are no points."""
    fitted = [row for row in rows if number(row, "law_a") is not None]
    a, b = latest(fitted, "law_a"), latest(fitted, "law_b")
    if a is None or b is None:
        return
    ceiling = b - a
    for style, ends, label in (("-", (left, right), "fitted law"), ("--", (1.0, left), None)):
        heights = [b - a * x for x in ends]
        axes.plot(ends, heights, color=RED, linewidth=1.2, linestyle=style, label=label)
    if a > 0:
        axes.axhline(ceiling, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            f"ceiling {ceiling:.3f} at H = 0", (right, ceiling), xytext=(0, 4),
            textcoords="offset points", ha="right", fontsize=8, color="#555555",
        )  # fmt: skip


def _evaluated_step(row: Row) -> float:
    at = number(row, "eval_step")
    return at if at is not None else number(row, "step") or 0.0


def _smoothed(numbers: Sequence[float], width: int = 5) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    return [
        statistics.fmean(numbers[max(0, place + 1 - width) : place + 1])
        for place in range(len(numbers))
    ]


def _cut_off(numbers: Sequence[float], limit: float) -> str:
    number_cut = sum(each > limit for each in numbers)
    if not number_cut:
        return ""
    return f" ({number_cut} longer than shown, the longest {max(numbers):.1f} s)"


def _without_outliers(numbers: Sequence[float]) -> float:
    """An upper limit that one long first step does not dictate."""
    ordered = sorted(numbers)
    return max(1.1 * ordered[int(0.97 * (len(ordered) - 1))], 1e-3)
