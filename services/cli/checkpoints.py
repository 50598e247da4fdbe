"""The checkpoints of a run that one could go back to, and which of them is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.cli.measurements import Row, number
from services.cli.run_folder import RunFolder
from shared.checkpoint_names import PATTERN, place_of


@dataclass(frozen=True, slots=True)
class KeptCheckpoint:
    """A whole checkpoint.

    Attributes:
        number: which of the step's checkpoints it is.
        score: of the evaluation of its step's version; None if that was not evaluated.
    """

    name: str
    step: int
    number: int
    score: float | None


def kept_checkpoints(folder: RunFolder, rows: Sequence[Row]) -> list[KeptCheckpoint]:
    """Oldest first."""
    scores = _scores(rows)
    names = [path.name for path in folder.checkpoints.glob(PATTERN)]
    found = [
        KeptCheckpoint(name, *place, scores.get(place[0]))
        for name in names
        if (place := place_of(name))
    ]
    return sorted(found, key=lambda each: (each.step, each.number))


def best_of(kept: Sequence[KeptCheckpoint]) -> KeptCheckpoint | None:
    """The one with the highest score, the newest of equal ones; None if none has a score."""
    scored = [(each.score, each.step, each.number, each) for each in kept if each.score is not None]
    return max(scored, key=lambda each: each[:3])[3] if scored else None


def checkpoints_text(folder: RunFolder, rows: Sequence[Row]) -> str:
    """Each of `kept_checkpoints` with its score; empty if there is none."""
    kept = kept_checkpoints(folder, rows)
    best, texts = best_of(kept), []
    for each in kept:
        notes = [] if each.score is None else [f"score {each.score:.3f}"]
        notes += ["best"] * (each is best) + ["newest"] * (each is kept[-1])
        texts.append(f"{each.name} ({', '.join(notes)})" if notes else each.name)
    return ", ".join(texts)


def _scores(rows: Sequence[Row]) -> dict[int, float]:
    """The evaluation score by the version that was evaluated, which a step made of this number."""
    pairs = [(number(row, "eval_policy_version"), number(row, "eval_score")) for row in rows]
    return {int(at): score for at, score in pairs if at is not None and score is not None}
