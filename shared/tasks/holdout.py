"""Which problems a run must never train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from shared.tasks.task import Problem


def hold_out(problems: Iterable[Problem], *, share: float) -> tuple[list[Problem], list[Problem]]:
    """`(held_out, rest)`, both in the order of a hash of their prompts.

    The hash keeps the cut the same on every machine and Python version, whatever the run's seed,
    and makes the first problems of either list a fair sample of it.
    """
    ordered = sorted(problems, key=lambda problem: hashlib.sha256(problem.prompt.encode()).digest())
    num_held_out = round(len(ordered) * share)
    return ordered[:num_held_out], ordered[num_held_out:]
