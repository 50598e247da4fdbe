"""Figures of the tokens' covariance of log-probability and advantage, and of who was selected."""

from __future__ import annotations

from collections.abc import Sequence

from services.cli.entropy_readings import (
    accuracy_name,
    read_covariance,
    read_covariance_by_accuracy,
    read_covariance_tops,
    read_selection,
)
from services.cli.figures import (
    BLUE,
    BY_ACCURACY,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Absent,
    Drawing,
    EndLabel,
    as_percent,
    label_ends,
    legend,
    line,
    logarithmic,
    panels_below,
    smoothed,
)
from services.cli.measurements import Row, numbered, series

_RISING = (GREY, SKY, BLUE, GREEN, ORANGE, RED, PURPLE)


def draw_covariance(rows: Sequence[Row]) -> Drawing:
    """Percentiles of the tokens' covariance of log-prob and advantage."""
    keys = numbered(rows, "covariance_p")
    if not keys:
        raise Absent("no row has percentiles of the covariance (covariance_p50, ...)")
    lines = [("maximum" if p == 100 else f"{p:g} %", key) for p, key in keys]
    return _ordered_lines(
        rows, "Covariance of log-probability and advantage", lines, read_covariance(rows, keys)
    )


def draw_covariance_tops(rows: Sequence[Row]) -> Drawing:
    """Mean covariance of the tokens with the most of it."""
    tops = numbered(rows, "covariance_top_")
    if not tops:
        raise Absent("no row has means of the top covariances (covariance_top_2, ...)")
    lines = [("all" if share == 100 else f"top {share:g} %", key) for share, key in reversed(tops)]
    return _ordered_lines(
        rows, "Mean covariance of the top tokens", lines, read_covariance_tops(rows, tops)
    )


def draw_covariance_by_accuracy(rows: Sequence[Row]) -> Drawing:
    """Covariance over the completions of a prompt, by how often it was solved."""
    buckets = numbered(rows, "covariance_by_accuracy_")
    steps, response = series(rows, "covariance_response")
    if not buckets and not steps:
        raise Absent("no row has covariance_response or covariance_by_accuracy_0, ...")
    title = "Covariance over a prompt's completions (means of 5 steps)"
    figure, (axes,) = panels_below(title, ["covariance (nats)"])
    labels = []
    for end, key in buckets:
        colour = BY_ACCURACY.get(end, GREY)
        at, covariance = series(rows, key)
        course = smoothed(covariance)
        line(axes, at, course, color=colour, linewidth=1.2)
        labels.append(EndLabel(accuracy_name(end), course[-1], colour))
    if steps:
        course = smoothed(response)
        line(axes, steps, course, color="black", linewidth=1.6)
        labels.append(EndLabel("all prompts", course[-1], "black"))
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    label_ends(axes, labels)
    return Drawing(figure, read_covariance_by_accuracy(rows, buckets))


def draw_selection(rows: Sequence[Row]) -> Drawing:
    """What Clip-Cov or KL-Cov selected: how many of its quota, and of what kind."""
    steps, selected = series(rows, "selected_tokens")
    if not steps:
        raise Absent("no row has selected_tokens, which only clip_cov and kl_cov have")
    figure, panels = panels_below("Selected tokens", ["tokens", "share A < 0", "probability"])
    line(panels[0], steps, selected, color=BLUE, linewidth=1, label="selected")
    at, quota = series(rows, "selected_quota")
    line(panels[0], at, quota, color=ORANGE, linestyle="--", linewidth=1.2, label="quota")
    panels[0].set_ylim(bottom=0)
    legend(panels[0], columns=2, outside=True)
    at, negative = series(rows, "selected_negative_advantage_fraction")
    line(panels[1], at, negative, color=RED, linewidth=1)
    panels[1].set_ylim(-0.03, 1.03)
    as_percent(panels[1].yaxis)
    at, probability = series(rows, "selected_probability_mean")
    line(panels[2], at, probability, color=GREEN, linewidth=1)
    if any(value > 0 for value in probability):
        logarithmic(panels[2], probability)
    return Drawing(figure, read_selection(rows))


def _ordered_lines(
    rows: Sequence[Row], title: str, lines: Sequence[tuple[str, str]], reading: str
) -> Drawing:
    """Lines by rising value, each named at its end."""
    figure, (axes,) = panels_below(title, ["covariance (nats)"])
    drawn, labels = [], []
    for place, (name, key) in enumerate(lines):
        steps, numbers = series(rows, key)
        colour = _RISING[place % len(_RISING)]
        line(axes, steps, numbers, color=colour, linewidth=1.2)
        drawn += numbers
        labels.append(EndLabel(name, numbers[-1], colour))
    logarithmic(axes, drawn)
    label_ends(axes, labels)
    return Drawing(figure, reading)
