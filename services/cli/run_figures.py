"""Figures of the run: score, completions, off-policy distance, where the time goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from services.cli.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Absent,
    Drawing,
    as_percent,
    legend,
    line,
    logarithmic,
    panels_below,
    smoothed,
    without_outliers,
)
from services.cli.measurements import Row, number, series, staleness_counts, values
from services.cli.readings import (
    read_balance,
    read_evaluation,
    read_lengths,
    read_mismatch,
    read_reward,
)
from services.cli.words import percent


def draw_scores(rows: Sequence[Row]) -> Drawing:
    """Training reward and evaluation score by step."""
    steps, rewards = series(rows, "reward_mean")
    scored = [row for row in rows if number(row, "eval_score") is not None]
    if not steps and not scored:
        raise Absent("no row has reward_mean or eval_score")
    figure, (axes,) = panels_below("Reward and evaluation score", ["reward, score"])
    if steps:
        line(axes, steps, rewards, color=SKY, linewidth=1, alpha=0.7)
        line(axes, steps, smoothed(rewards), color=BLUE, label="training reward, mean of 5 steps")
    if scored:
        at = [_evaluated_step(row) for row in scored]
        scores = [number(row, "eval_score") or 0.0 for row in scored]
        errors = [number(row, "eval_stderr") or 0.0 for row in scored]
        axes.errorbar(
            at, scores, yerr=errors, color=RED, marker="o", markersize=4, capsize=2.5,
            linewidth=1.2, elinewidth=1, label="evaluation score ± standard error",
        )  # fmt: skip
    legend(axes)
    return Drawing(figure, " ".join([read_reward(rewards), read_evaluation(scored)]).strip())


def draw_staleness(rows: Sequence[Row]) -> Drawing:
    """How many completions were trained how many versions late."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(staleness_counts(row))
    if not counts:
        raise Absent("no row has staleness_counts")
    total, top = counts.total(), max(counts)
    figure, (axes,) = panels_below("Staleness of the trained completions", ["share of completions"])
    ages = list(range(top + 1))
    shares = [counts[age] / total for age in ages]
    bars = axes.bar(ages, shares, color=BLUE, width=0.7)
    axes.bar_label(bars, labels=[percent(share, 1) for share in shares], fontsize=8, padding=2)
    axes.set_xlabel("staleness (policy versions)")
    axes.set_xticks(ages)
    axes.set_xlim(-0.8, max(top, 4) + 0.8)
    as_percent(axes.yaxis)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    mean = sum(age * number for age, number in counts.items()) / total
    fresh = percent(counts[0] / total)
    return Drawing(
        figure,
        f"Of {total:,} completions {fresh} were trained by the version that sampled them; the mean"
        f" staleness is {mean:.2f} versions, the largest {top}.",
    )


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
    figure, (axes,) = panels_below("The learner's time", ["seconds per step"])
    axes.stackplot(
        steps, *parts, rest, colors=[*(colour for _, _, colour in phases), "#D9D9D9"],
        labels=[*(name for _, name, _ in phases), "other"], step="mid", linewidth=0,
    )  # fmt: skip
    limit = without_outliers(whole)
    axes.set_ylim(0, limit)
    axes.set_xlabel(f"training step{_cut_off(whole, limit)}")
    legend(axes, columns=4, outside=True)
    return Drawing(figure, read_balance(phases, parts, whole, timed))


def draw_lengths(rows: Sequence[Row]) -> Drawing:
    """How long the completions are, by outcome, and how many were cut off."""
    lines = [
        (name, colour, series(rows, f"completion_length_{name}"))
        for name, colour in (("correct", BLUE), ("incorrect", RED))
    ]
    if not any(steps for _, _, (steps, _) in lines):
        raise Absent("no row has completion_length_correct or _incorrect")
    at, truncated = series(rows, "truncated_fraction")
    labels = ["length (tokens)"] + ["share cut off"] * bool(at)
    figure, panels = panels_below("Length of the completions", labels)
    for name, colour, (steps, lengths) in lines:
        line(panels[0], steps, lengths, color=colour, linewidth=1, label=name)
    legend(panels[0])
    if at:
        line(panels[1], at, truncated, color=ORANGE, linewidth=1)
        panels[1].set_ylim(0, max(1.1 * max(truncated), 0.01))
        as_percent(panels[1].yaxis)
    return Drawing(figure, read_lengths(rows))


def draw_mismatch(rows: Sequence[Row]) -> Drawing:
    """How far apart sampling, trained and reference policy are, and what the bounds cut."""
    distances = _known(
        rows,
        ("sampler to learner", "mismatch_kl", PURPLE),
        ("one update", "update_kl", BLUE),
        ("learner to reference", "reference_kl", GREEN),
    )
    extremes = _known(rows, ("largest", "ratio_max", RED), ("smallest", "ratio_min", BLUE))
    cut = _known(
        rows,
        ("at the low bound", "clip_fraction_low", BLUE),
        ("at the high bound", "clip_fraction_high", RED),
        ("by the entropy ratio", "entropy_ratio_clipped_fraction", GREEN),
    )
    sizes = _known(rows, ("", "importance_weight_ess", ORANGE))
    drawn = [
        (label, lines, draw)
        for label, lines, draw in (
            ("KL (nats)", distances, _draw_logarithmic),
            ("importance ratio", extremes, _draw_logarithmic),
            ("tokens clipped", cut, _draw_shares),
            ("effective sample", sizes, _draw_sizes),
        )
        if lines
    ]
    if not drawn:
        raise Absent("no row has mismatch_kl, ratio_max, clip_fraction_low or _high")
    figure, panels = panels_below("Off-policy distance", [label for label, _, _ in drawn])
    for axes, (_, lines, draw) in zip(panels, drawn, strict=True):
        draw(axes, lines)
    return Drawing(figure, read_mismatch(rows))


_Line = tuple[str, str, list[float], list[float]]
"""Name, colour, steps and a value for each."""


def _known(rows: Sequence[Row], *wanted: tuple[str, str, str]) -> list[_Line]:
    """Of names, keys and colours the lines that have a point."""
    lines = [(name, colour, *series(rows, key)) for name, key, colour in wanted]
    return [each for each in lines if each[2]]


def _draw_lines(axes: Any, lines: Sequence[_Line]) -> list[float]:
    """All values drawn."""
    for name, colour, steps, numbers in lines:
        line(axes, steps, numbers, color=colour, linewidth=1, label=name)
    legend(axes, columns=len(lines), outside=True)
    return [value for _, _, _, numbers in lines for value in numbers]


def _draw_logarithmic(axes: Any, lines: Sequence[_Line]) -> None:
    logarithmic(axes, _draw_lines(axes, lines))


def _draw_shares(axes: Any, lines: Sequence[_Line]) -> None:
    largest = max(_draw_lines(axes, lines))
    axes.set_ylim(0, max(1.1 * largest, 1e-4))
    as_percent(axes.yaxis)


def _draw_sizes(axes: Any, lines: Sequence[_Line]) -> None:
    smallest = min(_draw_lines(axes, lines))
    axes.set_ylim(min(0.99, smallest - 0.05 * (1 - smallest)), 1.0005)
    as_percent(axes.yaxis)


def _evaluated_step(row: Row) -> float:
    at = number(row, "eval_step")
    return at if at is not None else number(row, "step") or 0.0


def _cut_off(numbers: Sequence[float], limit: float) -> str:
    number_cut = sum(each > limit for each in numbers)
    if not number_cut:
        return ""
    return f" ({number_cut} longer than shown, the longest {max(numbers):.1f} s)"
