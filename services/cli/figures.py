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

from services.cli.measurements import Row, first, latest, number, series, staleness_counts, values
from services.cli.summary import difference_error, entropy_text, law_text

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#8A8A8A"

_WIDTH, _HEIGHT = 7.6, 3.9
_PANEL_HEIGHT = 1.7
_WINDOW = 10
"""Steps that a first and a last mean are over."""


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
    figure, (axes,) = _panels("Reward and evaluation score", ["mean reward"])
    if steps:
        axes.plot(steps, rewards, color=SKY, linewidth=1, alpha=0.7)
        axes.plot(steps, _smoothed(rewards), color=BLUE, label="training reward, mean of 5 steps")
    if scored:
        at = [_evaluated_step(row) for row in scored]
        scores = [number(row, "eval_score") or 0.0 for row in scored]
        errors = [number(row, "eval_stderr") or 0.0 for row in scored]
        axes.errorbar(
            at, scores, yerr=errors, color=RED, marker="o", markersize=4, capsize=2.5,
            linewidth=1.2, elinewidth=1, label="evaluation score ± standard error",
        )  # fmt: skip
    _legend(axes)
    return Drawing(
        figure, " ".join([_reward_reading(rewards), _evaluation_reading(scored)]).strip()
    )


def draw_entropy(rows: Sequence[Row]) -> Drawing:
    """Full and clamped entropy, and the entropy coefficient where there is one."""
    steps, entropy = series(rows, "entropy")
    if not steps:
        raise Absent("no row has entropy")
    at, coefficient = series(rows, "entropy_coefficient")
    labels = ["entropy (nats)", "coefficient λ"] if at else ["entropy (nats)"]
    figure, panels = _panels("Policy entropy over the sampled tokens", labels)
    panels[0].plot(steps, entropy, color=BLUE, label="full")
    clamped_at, clamped = series(rows, "entropy_clamped")
    if clamped_at:
        panels[0].plot(clamped_at, clamped, color=ORANGE, label="clamped")
    panels[0].set_ylim(bottom=0)
    _legend(panels[0])
    if at:
        panels[1].plot(at, coefficient, color=GREEN)
    return Drawing(figure, _entropy_reading(rows, coefficient))


def draw_covariance(rows: Sequence[Row]) -> Drawing:
    """Percentiles of the tokens' covariance of log-prob and advantage."""
    keys = _numbered(rows, "covariance_p")
    if not keys:
        raise Absent("no row has percentiles of the covariance (covariance_p50, ...)")
    figure, (axes,) = _panels("Covariance of log-probability and advantage", ["covariance (nats)"])
    colours = [GREY, SKY, BLUE, GREEN, ORANGE, RED, PURPLE]
    drawn = []
    for place, (percent, key) in enumerate(keys):
        steps, numbers = series(rows, key)
        axes.plot(steps, numbers, color=colours[place % len(colours)], linewidth=1.2)
        drawn += numbers
        name = "maximum" if percent == 100 else f"{percent:g} %"
        axes.annotate(
            name, (steps[-1], numbers[-1]), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8, color=colours[place % len(colours)],
        )  # fmt: skip
    _logarithmic(axes, drawn)
    return Drawing(figure, _covariance_reading(rows, keys))


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
    axes.bar_label(bars, labels=[f"{share:.1%}" for share in shares], fontsize=8, padding=2)
    axes.set_xlabel("staleness (policy versions)")
    axes.set_xticks(ages)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    mean = sum(age * number for age, number in counts.items()) / total
    return Drawing(
        figure,
        f"Of {total:,} completions {counts[0] / total:.0%} were trained by the version that sampled"
        f" them; the mean staleness is {mean:.2f} versions, the largest {top}.",
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
    _draw_fit(axes, rows, max(exponentials))
    axes.set_xlabel("exp(H), H = training entropy of the version (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    _legend(axes)
    return Drawing(figure, _law_reading(rows, len(points)))


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
    figure, (axes,) = _panels("Where the learner's time goes", ["seconds per step"])
    axes.stackplot(
        steps, *parts, rest, colors=[*(colour for _, _, colour in phases), "#D9D9D9"],
        labels=[*(name for _, name, _ in phases), "other"], step="mid", linewidth=0,
    )  # fmt: skip
    axes.set_ylim(0, _without_outliers(whole))
    _legend(axes, columns=4, outside=True)
    return Drawing(figure, _balance_reading(phases, parts, whole, timed))


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
        panels[0].plot(steps, mismatch, color=PURPLE)
        _logarithmic(panels[0], mismatch)
    for (side, (at, shares)), colour in zip(clipped.items(), (BLUE, RED), strict=True):
        if at:
            panels[-1].plot(at, shares, color=colour, label=f"at the {side} bound")
    if has_clip:
        panels[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[-1].set_ylim(bottom=0)
        _legend(panels[-1])
    return Drawing(figure, _mismatch_reading(mismatch, clipped))


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
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, list(panels)


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


def _draw_fit(axes: Any, rows: Sequence[Row], right: float) -> None:
    fitted = [row for row in rows if number(row, "law_a") is not None]
    a, b = latest(fitted, "law_a"), latest(fitted, "law_b")
    if a is None or b is None:
        return
    ceiling = b - a
    axes.plot([1.0, right], [ceiling, b - a * right], color=RED, linewidth=1.2, label="fitted law")
    if a > 0:
        axes.axhline(ceiling, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"ceiling {ceiling:.3f} at H = 0", (right, ceiling), xytext=(0, 4),
            textcoords="offset points", ha="right", fontsize=8, color="#555555",
        )  # fmt: skip


def _reward_reading(rewards: Sequence[float]) -> str:
    if not rewards:
        return ""
    window = min(_WINDOW, max(1, len(rewards) // 2))
    if len(rewards) == 1:
        return f"The mean training reward of the only step is {rewards[0]:.3f}."
    before, after = statistics.fmean(rewards[:window]), statistics.fmean(rewards[-window:])
    return (
        f"The mean training reward {_moved(before, after)} from {before:.3f} to {after:.3f} (means"
        f" of the first and last {window} steps)."
    )


def _evaluation_reading(scored: Sequence[Row]) -> str:
    if not scored:
        return "No evaluation finished."
    start, end = number(scored[0], "eval_score") or 0.0, number(scored[-1], "eval_score") or 0.0
    if len(scored) == 1:
        return f"The only evaluation scored {start:.3f}."
    text = f"The evaluation score {_moved(start, end)} from {start:.3f} to {end:.3f}"
    how, error = difference_error(scored[0], scored[-1])
    return f"{text}, {(end - start) / error:+.1f} standard errors ({how})." if error else f"{text}."


def _entropy_reading(rows: Sequence[Row], coefficient: Sequence[float]) -> str:
    start, end = first(rows, "entropy") or 0.0, latest(rows, "entropy") or 0.0
    text = f"Entropy {_moved(start, end)} from {start:.3f} to {end:.3f} nats"
    if 0 < end < start:
        text += f": {(start - end) / start:.0%} consumed"
    if coefficient:
        text += f"; the coefficient went from {coefficient[0]:.2g} to {coefficient[-1]:.2g}"
    return f"{text}."


def _covariance_reading(rows: Sequence[Row], keys: Sequence[tuple[float, str]]) -> str:
    percent, key = keys[-1]
    name = "largest covariance" if percent == 100 else f"{percent:g} % percentile"
    text = f"In the last step the {name} is {latest(rows, key):.3g}"
    tops = _numbered(rows, "covariance_top_")
    mean = latest(rows, "covariance_mean")
    if tops and mean:
        share, top_key = tops[0]
        top = latest(rows, top_key) or 0.0
        text += (
            f"; the top {share:g} % of tokens have a mean of {top:.3g}, that of all is {mean:.2g}"
        )
    return f"{text}."


def _law_reading(rows: Sequence[Row], num_points: int) -> str:
    text = law_text(rows)
    if text.startswith("not"):
        return f"{num_points} evaluated versions; the law is {text}."
    spent = entropy_text(rows)
    return f"{text}, from {num_points} evaluated versions; entropy {spent}."


def _balance_reading(
    phases: Sequence[tuple[str, str, str]],
    parts: Sequence[Sequence[float]],
    whole: Sequence[float],
    timed: Sequence[Row],
) -> str:
    total = sum(whole) or 1.0
    shares = [
        f"{name} {sum(part) / total:.0%}" for (_, name, _), part in zip(phases, parts, strict=True)
    ]
    text = f"Of {total / len(whole):.2f} s per step the learner {', '.join(shares)} of the time"
    pauses = values(timed, "pause_seconds")
    if pauses:
        text += f"; an update pauses the replicas for {statistics.median(pauses):.3f} s (median)"
    return f"{text}."


def _mismatch_reading(
    mismatch: Sequence[float], clipped: dict[str, tuple[list[float], list[float]]]
) -> str:
    texts = []
    if mismatch:
        texts.append(
            f"The median mismatch KL is {statistics.median(mismatch):.2g} nats, the largest"
            f" {max(mismatch):.2g}"
        )
    means = [
        f"{statistics.fmean(shares):.2%} at the {side} bound"
        for side, (_, shares) in clipped.items()
        if shares
    ]
    if means:
        texts.append(f"the ratio was clipped in {' and '.join(means)} of the tokens on average")
    text = "; ".join(texts)
    return f"{text[0].upper()}{text[1:]}."


def _numbered(rows: Sequence[Row], prefix: str) -> list[tuple[float, str]]:
    """Keys such as covariance_p99_8 that have a value, with their numbers, rising."""
    keys = {key for row in rows for key in row if key.startswith(prefix)}
    found = []
    for key in keys:
        try:
            found.append((float(key.removeprefix(prefix).replace("_", ".")), key))
        except ValueError:
            continue
    return sorted((percent, key) for percent, key in found if values(rows, key))


def _evaluated_step(row: Row) -> float:
    at = number(row, "eval_step")
    return at if at is not None else number(row, "step") or 0.0


def _smoothed(numbers: Sequence[float], width: int = 5) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    return [
        statistics.fmean(numbers[max(0, place + 1 - width) : place + 1])
        for place in range(len(numbers))
    ]


def _without_outliers(numbers: Sequence[float]) -> float:
    """An upper limit that one long first step does not dictate."""
    ordered = sorted(numbers)
    return max(1.1 * ordered[int(0.97 * (len(ordered) - 1))], 1e-3)


def _moved(start: float, end: float) -> str:
    return "rose" if end > start else "fell" if end < start else "stayed, "
