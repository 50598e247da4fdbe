"""The report's figures, in the order a reader wants them: each shows one thing and reads it.

A figure is drawn from the rows of metrics.jsonl. Where they lack what it needs, `Absent` is raised
with the reason, which the report prints in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.cli.covariance_figures import (
    draw_covariance,
    draw_covariance_by_accuracy,
    draw_covariance_tops,
    draw_selection,
)
from services.cli.entropy_figures import (
    draw_entropy,
    draw_entropy_change,
    draw_entropy_histogram,
    draw_entropy_of_outcomes,
    draw_entropy_positions,
)
from services.cli.figures import Drawing
from services.cli.law_figures import draw_forecast, draw_law
from services.cli.measurements import Row
from services.cli.run_figures import (
    draw_balance,
    draw_lengths,
    draw_mismatch,
    draw_scores,
    draw_staleness,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A figure to draw, and what it is called."""

    name: str
    title: str
    draw: Callable[[Sequence[Row]], Drawing]


@dataclass(frozen=True, slots=True)
class Chapter:
    """Figures that belong together."""

    title: str
    subjects: tuple[Subject, ...]


CHAPTERS = (
    Chapter(
        "Score, and what entropy can still buy",
        (
            Subject("scores", "Reward and evaluation score", draw_scores),
            Subject("law", "Entropy law", draw_law),
            Subject("forecast", "Forecast", draw_forecast),
        ),
    ),
    Chapter(
        "Entropy",
        (
            Subject("entropy", "Entropy", draw_entropy),
            Subject("entropy-change", "What moves the entropy", draw_entropy_change),
            Subject("entropy-of-outcomes", "Entropy by outcome", draw_entropy_of_outcomes),
            Subject("entropy-histogram", "Entropy of the tokens", draw_entropy_histogram),
            Subject("entropy-positions", "Entropy within the completion", draw_entropy_positions),
        ),
    ),
    Chapter(
        "Covariance and token selection",
        (
            Subject("covariance-tops", "Covariance of the top tokens", draw_covariance_tops),
            Subject("covariance", "Covariance percentiles", draw_covariance),
            Subject(
                "covariance-by-accuracy",
                "Covariance by prompt accuracy",
                draw_covariance_by_accuracy,
            ),
            Subject("selection", "Selected tokens", draw_selection),
        ),
    ),
    Chapter(
        "Completions and pipeline",
        (
            Subject("lengths", "Length of the completions", draw_lengths),
            Subject("mismatch", "Mismatch and clipping", draw_mismatch),
            Subject("staleness", "Staleness", draw_staleness),
            Subject("balance", "Pipeline balance", draw_balance),
        ),
    ),
)

SUBJECTS = tuple(subject for chapter in CHAPTERS for subject in chapter.subjects)
