"""How folders of checkpoints are called: `step-000140`, then `step-000140-002` of the same step."""

from __future__ import annotations

import re

_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")

PATTERN = "step-*"
"""Of a glob; `place_of` tells which of what it finds are none."""


def checkpoint_name(step: int, number: int) -> str:
    """Of the step's checkpoint of this number, from 1."""
    return f"step-{step:06d}" + (f"-{number:03d}" if number > 1 else "")


def place_of(name: str) -> tuple[int, int] | None:
    """The step and the number, by which checkpoints are ordered; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 1))
