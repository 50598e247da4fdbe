"""The tables of a campaign: for a terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.bench.benchmark import Setting
from tests.chaos.campaign import Outcome, Struck
from tests.chaos.faults import AWAY_SECONDS, FROZEN_SECONDS, LINK_SECONDS

FAULT_COLUMNS = (
    "fault", "times", "next step after: median s", "worst s", "worst s, fleet whole",
    "longest standstill s", "prompts lost, twice, too stale",
)  # fmt: skip
ABOUT = f"""\
Seconds run from the fault to the end of the next step. Faults come once a step has ended after the
one before, so also while services that it killed are still starting; "fleet whole" is of faults
that struck when nobody was missing. A standstill is the longest time between two ends of steps
around a fault. Links are stalled for {LINK_SECONDS:.0f} s, Redis is away for
{AWAY_SECONDS:.0f} s, processes are frozen for {FROZEN_SECONDS:.0f} s."""
FINDING_COLUMNS = ("afterwards", "holds", "found")


def show(outcome: Outcome, console: Console) -> None:
    """Both tables."""
    for columns, rows in _tables(outcome):
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(verdict(outcome))


def write(outcome: Outcome, setting: Setting, folder: Path) -> None:
    """`chaos.md` and `chaos.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {**setting._asdict(), **outcome.as_json()}
    (folder / "chaos.json").write_text(json.dumps(told, indent=1) + "\n", "utf8")
    load = " to ".join(f"{each:.1f}" for each in outcome.load)
    parts = ["# Chaos", f"{setting}; load average {load}", ABOUT, *outcome.left_out]
    parts += ["\n".join(_markdown(columns, rows)) for columns, rows in _tables(outcome)]
    parts += [
        "\n".join(
            ["Services that ended by themselves:", *(f"- {each}" for each in _exits(outcome))]
        ),
        verdict(outcome),
    ]
    (folder / "chaos.md").write_text("\n\n".join(parts) + "\n", "utf8")


def verdict(outcome: Outcome) -> str:
    """One sentence."""
    what = f"{len(outcome.struck)} faults in {outcome.seconds:.0f} s, {outcome.num_steps} steps"
    if outcome.trouble:
        return f"FAILED: {outcome.trouble} ({what})"
    return f"{'held' if outcome.is_good else 'FAILED'}: {what}"


def _tables(outcome: Outcome) -> list[tuple[Sequence[str], list[list[str]]]]:
    kinds = dict.fromkeys(each.kind for each in outcome.struck)
    faults = [_row(kind, [x for x in outcome.struck if x.kind == kind]) for kind in kinds]
    findings = [[x.what, "yes" if x.holds else "NO", x.found] for x in outcome.findings]
    return [(FAULT_COLUMNS, faults), (FINDING_COLUMNS, findings)]


def _row(kind: str, struck: Sequence[Struck]) -> list[str]:
    seconds = [each.next_step for each in struck if each.next_step is not None]
    whole = [each.next_step for each in struck if each.next_step is not None and each.was_whole]
    return [
        kind,
        str(len(struck)),
        f"{median(seconds):.1f}" if seconds else "never",
        f"{max(seconds):.1f}" if len(seconds) == len(struck) else "never",
        f"{max(whole):.1f}" if whole else "-",
        f"{max(each.standstill for each in struck):.1f}",
        str(sum(each.num_wrong for each in struck)),
    ]


def _exits(outcome: Outcome) -> list[str]:
    return [f"{each.name} {each.how}: {each.said}" for each in outcome.exits] or ["none"]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
