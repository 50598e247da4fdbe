"""The closing table: what a run came to, from its rows and the last look at its replicas."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence

from services.cli.law import (
    consumed_text,
    floor_score_text,
    law_row,
    law_text,
    steps_left_text,
)
from services.cli.measurements import Row, first, latest, number, staleness_counts, values
from services.cli.observer import ServiceView
from services.cli.run_folder import RunFolder
from services.cli.words import duration
from shared.config import RunConfig

Facts = list[tuple[str, str]]


def closing_facts(
    config: RunConfig,
    folder: RunFolder,
    rows: Sequence[Row],
    services: Sequence[ServiceView],
    *,
    wall_seconds: float,
) -> Facts:
    """Name and text of each thing worth knowing at the end; nothing is left out for being bad."""
    step = latest(rows, "step") or 0.0
    early = "" if step >= config.run.num_steps else ", stopped early; go on with --resume"
    facts = [
        ("run folder", str(folder.path)),
        ("steps", f"{step:.0f} of {config.run.num_steps}{early}"),
        ("evaluation score", evaluation_text(rows)),
        ("entropy", entropy_text(rows)),
        ("entropy coefficient λ", _course(rows, "entropy_coefficient", ".2g")),
        *law_facts(rows),
        ("tokens trained on", f"{sum(values(rows, 'tokens')):,.0f}"),
        ("mixed-version completions", _mixed_text(services)),
        ("trajectories over max_staleness", overstale_text(rows, config.learner.max_staleness)),
        ("wall time", duration(wall_seconds)),
        ("report", str(folder.report)),
        ("model", str(folder.model) if folder.model.exists() else "not written"),
    ]
    return [(name, text) for name, text in facts if text]


def print_facts(facts: Facts) -> None:
    """A table in a terminal, aligned lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, text in facts:
            table.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
        Console().print(table)
        return
    width = max(len(name) for name, _ in facts)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in facts), flush=True)


def evaluation_text(rows: Sequence[Row]) -> str:
    """First and last score with standard errors, and their difference in standard errors."""
    scored = [row for row in rows if number(row, "eval_score") is not None]
    if not scored:
        return "none finished"
    if len(scored) == 1:
        return _score(scored[0])
    before, after = scored[0], scored[-1]
    gain = (number(after, "eval_score") or 0.0) - (number(before, "eval_score") or 0.0)
    how, error = difference_error(before, after)
    text = f"{_score(before)} -> {_score(after)}, {gain:+.3f}"
    if not error:
        return text
    return f"{text}, {gain / error:+.1f} standard errors ({how})"


def difference_error(before: Row, after: Row) -> tuple[str, float | None]:
    """How the standard error of the difference was got, and it; None if it cannot be had.

    Paired where both rows have the score of each problem (`eval_problem_scores`, in one order):
    what a problem is worth then cancels.
    """
    pairs = list(zip(_problem_scores(before), _problem_scores(after), strict=False))
    if len(pairs) > 1 and len(_problem_scores(before)) == len(_problem_scores(after)):
        gains = [late - early for early, late in pairs]
        return "paired by problem", statistics.stdev(gains) / math.sqrt(len(gains))
    errors = [number(row, "eval_stderr") for row in (before, after)]
    if errors[0] is None or errors[1] is None:
        return "", None
    return "unpaired", math.hypot(errors[0], errors[1])


def entropy_text(rows: Sequence[Row]) -> str:
    """First and last entropy, and the share consumed."""
    start, end = first(rows, "entropy"), latest(rows, "entropy")
    if start is None or end is None:
        return "not measured"
    share = consumed_text(rows)
    return f"{start:.4f} -> {end:.4f} nats" + (f", {share}" if share else "")


def law_facts(rows: Sequence[Row]) -> Facts:
    """The law, and what it says of the rest of the run; empty texts for what is not known."""
    row = law_row(rows)
    return [
        ("entropy law", law_text(rows)),
        ("score at the entropy floor", floor_score_text(row)),
        ("steps to the entropy floor", steps_left_text(row)),
    ]


def overstale_text(rows: Sequence[Row], max_staleness: int) -> str:
    """How many trained completions were older than allowed, by the rows."""
    counted = [staleness_counts(row) for row in rows]
    if any(counted):
        over = sum(n for row in counted for age, n in row.items() if age > max_staleness)
        return f"{over} of {sum(sum(row.values()) for row in counted):,}"
    top = max(values(rows, "staleness_max"), default=None)
    if top is None:
        return "not measured"
    return "0" if top <= max_staleness else f"some: staleness reached {top:.0f}"


def _score(row: Row) -> str:
    error = number(row, "eval_stderr")
    text = f"{number(row, 'eval_score'):.3f}"
    return text if error is None else f"{text} ± {error:.3f}"


def _problem_scores(row: Row) -> list[float]:
    given = row.get("eval_problem_scores")
    if not isinstance(given, list):
        return []
    return [float(score) for score in given if isinstance(score, int | float)]


def _course(rows: Sequence[Row], key: str, form: str) -> str:
    start, end = first(rows, key), latest(rows, key)
    return "" if start is None or end is None else f"{start:{form}} -> {end:{form}}"


def _mixed_text(services: Sequence[ServiceView]) -> str:
    replicas = [each for each in services if each.member.role == "rollout"]
    counts = [
        f"{each.member.name} {each.mixed_version_completions if each.answers else '?'}"
        for each in replicas
    ]
    return ", ".join(counts)
