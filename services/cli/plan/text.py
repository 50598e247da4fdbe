"""What `isentrope plan` prints: where the rates come from, a table, the choice and its reason."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.cli.plan.candidates import Candidate
from services.cli.words import percent

_LOG_WIDTH = 120
_COLUMNS = (
    "", "replicas", "bound", "steps/h", "±", "learner\nidle", "replicas\nidle", "places\nused",
    "staleness\nmean", "\np95", "sampled\nin vain", "GPU h\na step", "waits for",
)  # fmt: skip
_LEFT = {"", "waits for"}

_REMEDIES = {
    "learner": "more replicas would wait; only a faster learner helps",
    "replicas": "more replicas would make it faster",
    "verifiers": "more scoring processes would make it faster",
    "max_staleness": "places are empty while the learner waits, since admission lets no more out:"
    " a larger max_staleness or shorter completions help more than replicas",
}


def print_plan(
    found: Sequence[Candidate], best: Candidate, *, source: str, notes: Sequence[str]
) -> None:
    """For people; no wider than a log where there is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, soft_wrap=False)
    console.print(Text(f"rates {source}"))
    for note in notes:
        console.print(Text(f"- {note}"))
    console.print(_table(found, best))
    console.print(Text(reason(found, best)))
    console.print(
        Text(
            "bound: max_staleness. ±: 95 %, from the seeds of the simulation alone. learner idle:"
            " waits for groups. replicas idle: nothing in work. places used: groups in work, of"
            " those that fit. in vain: too stale when they ended. Nothing fails here."
        )
    )


def reason(found: Sequence[Candidate], best: Candidate) -> str:
    """The choice in one sentence, and what would change it."""
    fastest = max(found, key=lambda each: each.steps_per_hour)
    text = (
        f"-> {_fleet(best)}: {best.gpu_hours_per_step:.3g} GPU hours a step, the fewest of these;"
        f" {_REMEDIES[best.bound_by]}."
    )
    if fastest is not best:
        faster = fastest.steps_per_hour / best.steps_per_hour - 1
        dearer = fastest.gpu_hours_per_step / best.gpu_hours_per_step - 1
        text += (
            f" {_fleet(fastest)} would be {percent(faster)} faster and each step"
            f" {percent(dearer)} dearer."
        )
    if best.max_staleness > min(each.max_staleness for each in found):
        text += " What staleness costs in learning is not in this."
    return text


def _fleet(each: Candidate) -> str:
    noun = "replica" if each.num_replicas == 1 else "replicas"
    return f"{each.num_replicas} {noun} with max_staleness {each.max_staleness}"


def _table(found: Sequence[Candidate], best: Candidate) -> Table:
    table = Table(box=None, padding=(0, 1))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for each in found:
        table.add_row(*_cells(each, is_best=each is best), style="bold" if each is best else None)
    return table


def _cells(each: Candidate, *, is_best: bool) -> list[str]:
    return [
        "->" if is_best else "",
        str(each.num_replicas),
        str(each.max_staleness),
        f"{each.steps_per_hour:.4g}",
        "" if each.steps_margin is None else f"{each.steps_margin:.2g}",
        percent(each.learner_idle),
        percent(each.replica_idle),
        percent(each.places_used),
        f"{each.staleness_mean:.2f}",
        str(each.staleness_p95),
        percent(each.dropped_share, 1),
        f"{each.gpu_hours_per_step:.3g}",
        each.bound_by,
    ]
