"""The checkpoints of a run that one could go back to, and which of them is the best."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.cli.measurements import Row, number
from services.cli.run_folder import RunFolder

_FOLDER = re.compile(r"step-(\d+)(?:-\d+)?")


def checkpoints_text(folder: RunFolder, rows: Sequence[Row]) -> str:
    """Each whole checkpoint, oldest first, with its evaluation score; empty if there is none.

    The best is the one with the highest score, the newest of equal ones; a checkpoint has a score
    if the version of its step was evaluated.
    """
    names = sorted(path.name for path in folder.checkpoints.glob("step-*"))
    found = [(name, int(match[1])) for name in names if (match := _FOLDER.fullmatch(name))]
    scores = _scores(rows)
    scored = [(scores[step], name) for name, step in found if step in scores]
    best, newest = max(scored, default=(0.0, ""))[1], found[-1][0] if found else ""
    texts = []
    for name, step in found:
        notes = [f"score {scores[step]:.3f}"] if step in scores else []
        notes += ["best"] * (name == best) + ["newest"] * (name == newest)
        texts.append(f"{name} ({', '.join(notes)})" if notes else name)
    return ", ".join(texts)


def _scores(rows: Sequence[Row]) -> dict[int, float]:
    """The evaluation score by the version that was evaluated, which a step made of this number."""
    pairs = [(number(row, "eval_policy_version"), number(row, "eval_score")) for row in rows]
    return {int(at): score for at, score in pairs if at is not None and score is not None}
