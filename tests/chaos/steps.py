"""When steps of a run ended, seen from outside in the learner's file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from services.cli.measurements import RowReader, is_step


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A row of a training step came to metrics.jsonl; `at` is monotonic."""

    at: float
    step: int


class Steps:
    """Every end of a step that was seen; a resumed learner begins further back."""

    def __init__(self, metrics: Path) -> None:
        self.ends: list[StepEnd] = []
        self._reader = RowReader(metrics)
        self._newest = 0

    @property
    def newest(self) -> int:
        """Number of the step that ended last, 0 before the first."""
        return self.ends[-1].step if self.ends else 0

    @property
    def newest_at(self) -> float:
        """When that was; minus infinity before the first."""
        return self.ends[-1].at if self.ends else float("-inf")

    def after(self, moment: float) -> list[float]:
        """When steps ended later than `moment`."""
        return [end.at for end in self.ends if end.at > moment]

    def look(self) -> None:
        """Read what is new; an end is as old as the look that found it."""
        rows = self._reader.read()
        newest = next((int(row["step"]) for row in reversed(rows) if is_step(row)), 0)
        if newest > self._newest:
            self.ends.append(StepEnd(time.monotonic(), newest))
        self._newest = newest
