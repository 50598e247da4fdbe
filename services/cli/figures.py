"""What the report's figures are drawn with: panels, lines, labels, scales.

Colours are those of Okabe and Ito, which the colour-blind tell apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#8A8A8A"

BY_ACCURACY = {0.0: RED, 0.25: ORANGE, 0.5: GREEN, 0.75: SKY, 1.0: BLUE}
"""Colours of prompts by the largest share of their completions that may have solved them."""

_WIDTH, _HEIGHT = 7.6, 3.9
_PANEL_HEIGHT = 1.7
_LABEL_HEIGHT = 0.15
"""Inches that a label at a line's end takes."""

_FEW_DECADES = 100
"""A log scale that spans less has ticks at 1, 2 and 5, written out."""


class Absent(Exception):  # noqa: N818  not an error: most runs lack something
    """The rows lack what a figure needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawn figure and the sentence that reads it."""

    figure: Figure
    reading: str


@dataclass(frozen=True, slots=True)
class EndLabel:
    """What stands at the right end of a line."""

    text: str
    value: float
    colour: str


def panels_below(title: str, labels: Sequence[str]) -> tuple[Figure, list[Any]]:
    """A figure with one plot above the other, and a common step axis."""
    height = _HEIGHT + _PANEL_HEIGHT * (len(labels) - 1)
    figure = Figure(figsize=(_WIDTH, height), dpi=130, layout="constrained")
    ratios = [2.0, *[1.2] * (len(labels) - 1)]
    panels = figure.subplots(
        len(labels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        _plain(axes)
    panels[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
    panels[-1].set_xlabel("training step")
    panels[-1].xaxis.set_major_locator(
        MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    return figure, list(panels)


def panels_beside(title: str, number: int) -> tuple[Figure, list[Any]]:
    """A figure with plots next to each other, of one vertical axis."""
    figure = Figure(figsize=(_WIDTH, 3.1), dpi=130, layout="constrained")
    panels = figure.subplots(1, number, sharey=True, squeeze=False)[0]
    for axes in panels:
        _plain(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, list(panels)


def label_numbers_below(axes: Any, label: str) -> None:
    """A horizontal axis of numbers, in place of that of steps."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8))


def line(axes: Any, steps: Sequence[float], numbers: Sequence[float], **style: Any) -> None:
    """A line, or a dot where a line would not be seen."""
    axes.plot(steps, numbers, **({"marker": "o"} if len(steps) == 1 else {}) | style)


def legend(axes: Any, *, columns: int = 1, outside: bool = False) -> None:
    """Names of what is drawn; `outside` above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    if outside:
        axes.legend(
            handles, labels, frameon=False, fontsize=9, ncols=columns, loc="lower right",
            bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    else:
        axes.legend(handles, labels, frameon=False, fontsize=9, loc="best", ncols=columns)


def legend_below(figure: Any, *, columns: int) -> None:
    """Names of what is drawn, where long ones hide nothing."""
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=columns)


def label_ends(axes: Any, labels: Sequence[EndLabel]) -> None:
    """Names right of the axes, at the height of the last values or as near as they fit.

    Call it once the scale and the limits are final.
    """
    to_share = axes.transScale + axes.transLimits
    heights = [float(to_share.transform((axes.get_xlim()[1], each.value))[1]) for each in labels]
    gap = _LABEL_HEIGHT / (axes.get_position().height * axes.figure.get_figheight())
    placed = sorted(zip(heights, range(len(labels)), strict=True))
    spread = _apart([height for height, _ in placed], gap)
    for height, (_, place) in zip(spread, placed, strict=True):
        axes.annotate(
            labels[place].text, (1.01, height), xycoords="axes fraction", va="center",
            fontsize=8, color=labels[place].colour, annotation_clip=False,
        )  # fmt: skip


def logarithmic(axes: Any, numbers: Sequence[float]) -> None:
    """A log scale; linear around zero where there are values that are not positive."""
    sizes = [abs(value) for value in numbers if value != 0]
    if not sizes:
        return
    if min(numbers) > 0:
        axes.set_yscale("log")
        if max(numbers) < _FEW_DECADES * min(numbers):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        return
    threshold = 10.0 ** math.floor(math.log10(statistics.median(sizes)))
    axes.set_yscale("symlog", linthresh=threshold)


def as_percent(axis: Any) -> None:
    """Ticks of a share in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def smoothed(numbers: Sequence[float], width: int = 5) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    return [
        statistics.fmean(numbers[max(0, place + 1 - width) : place + 1])
        for place in range(len(numbers))
    ]


def without_outliers(numbers: Sequence[float]) -> float:
    """An upper limit that one long first step does not dictate."""
    ordered = sorted(numbers)
    return max(1.1 * ordered[int(0.97 * (len(ordered) - 1))], 1e-3)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights at least `gap` from each other, each close pair moved evenly."""
    spread = list(heights)
    for _ in range(20 * len(spread)):
        for below, above in pairwise(range(len(spread))):
            excess = gap - (spread[above] - spread[below])
            if excess > 1e-6:
                spread[below] -= excess / 2
                spread[above] += excess / 2
    return spread
