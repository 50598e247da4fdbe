"""The picture of a plan: speed, idleness and staleness by the number of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.cli.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    as_percent,
    label_numbers_below,
    legend,
    line,
    panels_below,
)
from services.cli.plan.candidates import Candidate

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)


def draw_plan(found: Sequence[Candidate], path: Path) -> None:
    """Write the picture; a colour for each max_staleness.

    Raises:
        OSError, ValueError: it cannot be written there, or not in that format.
    """
    figure, (speed, idle, age) = panels_below(
        "Simulated fleets", ["steps per hour", "idle", "staleness"]
    )
    for place, bound in enumerate(sorted({each.max_staleness for each in found})):
        some = [each for each in found if each.max_staleness == bound]
        numbers = [float(each.num_replicas) for each in some]
        colour = _COLOURS[place % len(_COLOURS)]
        speeds = [each.steps_per_hour for each in some]
        line(speed, numbers, speeds, color=colour, marker="o", label=f"max_staleness {bound}")
        line(idle, numbers, [each.learner_idle for each in some], color=colour)
        line(idle, numbers, [each.replica_idle for each in some], color=colour, linestyle="--")
        line(age, numbers, [each.staleness_mean for each in some], color=colour)
    idle.set_title("learner (solid), replicas (dashed)", fontsize=9, loc="right")
    as_percent(idle.yaxis)
    legend(speed)
    label_numbers_below(age, "replicas")
    figure.savefig(path)
