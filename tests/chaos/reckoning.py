"""After the run: what was lost, what was done twice, what is left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.cli.audit import Audit, audit
from services.cli.measurements import Row, is_step, read_rows
from services.cli.run_folder import RunFolder
from services.learner.checkpoint import newest_checkpoint
from shared.config import load_run
from shared.dead_letters import decode_dead_letter
from shared.errors import CheckpointError
from shared.stream import DEAD_LETTER
from tests.chaos.poison import Poison
from tests.end_to_end.real_run import processes_in

_SHOWN = 10
_OF_PROMPTS = ("lost", "twice", "over the staleness bound")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must hold, and what was found."""

    what: str
    holds: bool
    found: str


def reckon(
    folder: RunFolder,
    contents: Mapping[str, Sequence[bytes]],
    poison: Sequence[Poison],
    others: Collection[int],
) -> list[Finding]:
    """Every finding, good or bad.

    Args:
        contents: payloads of each stream after the run's end.
        others: processes that were there before the run.
    """
    rows = read_rows(folder.metrics)
    return [
        *_prompts(folder),
        _evaluations(folder, rows),
        *reckon_streams(contents, poison),
        _checkpoint(folder, rows),
        _processes(folder, others),
    ]


def num_wrong_so_far(folder: RunFolder) -> int:
    """Prompts lost, trained twice or trained too stale, of a run that goes on."""
    found = _audited(folder)
    return sum(len(found.faults[fault]) for fault in _OF_PROMPTS)


def _audited(folder: RunFolder) -> Audit:
    run = load_run(folder.run_file).run
    rows, ledger = read_rows(folder.metrics), read_rows(folder.ledger)
    return audit(ledger, rows, seed=run.seed, num_steps=run.num_steps)


def _prompts(folder: RunFolder) -> Iterator[Finding]:
    """What `isentrope audit` says of the run."""
    found = _audited(folder)
    of = f"{sum(found.ended.values())} positions in {found.steps} of {found.num_steps} steps"
    yield Finding("the run has finished", found.steps == found.num_steps, of)
    for fault, places in found.faults.items():
        shown = ", ".join(map(str, places[:_SHOWN]))
        yield Finding(f"audit: 0 {fault}", not places, f"{len(places)}: {shown}" if shown else "0")


def _evaluations(folder: RunFolder, rows: Sequence[Row]) -> Finding:
    config = load_run(folder.run_file)
    last, every = config.run.num_steps, config.evaluation.every_steps
    evaluated = sorted(row["eval_step"] for row in rows if row.get("eval_score") is not None)
    due = sorted({*range(0, last, every), last})
    return Finding(
        "each evaluation that was due, once",
        evaluated == due,
        f"{len(evaluated)} evaluations, {len(due)} due",
    )


def reckon_streams(
    contents: Mapping[str, Sequence[bytes]], poison: Sequence[Poison]
) -> Iterator[Finding]:
    """What is left in the streams of a finished run: dead letters, one for each deadly poison."""
    left = {name: len(held) for name, held in contents.items() if name != DEAD_LETTER and held}
    yield Finding("the streams are empty", not left, str(left or "nothing left"))
    letters = [decode_dead_letter(payload) for payload in contents[DEAD_LETTER]]
    buried = Counter((letter.stream, letter.payload) for letter in letters)
    injected = Counter((each.stream, each.payload) for each in poison if each.is_dead)
    strange = [letter for letter in letters if (letter.stream, letter.payload) not in injected]
    detail = "".join(f"; {letter.stream}: {letter.error}" for letter in strange[:3])
    yield Finding(
        "dead letters: the poison and nothing else",
        buried == injected,
        f"{len(letters)} dead letters, {injected.total()} poisoned entries{detail}",
    )


def _checkpoint(folder: RunFolder, rows: Sequence[Row]) -> Finding:
    what = "the newest checkpoint is whole, and of the last step"
    try:
        checkpoint = newest_checkpoint(folder.path / "checkpoints")
    except CheckpointError as error:
        return Finding(what, False, str(error))
    if checkpoint is None:
        return Finding(what, False, "none")
    last = max((row["step"] for row in rows if is_step(row)), default=0)
    return Finding(what, checkpoint.step == last, f"of step {checkpoint.step}, {last} steps")


def _processes(folder: RunFolder, others: Collection[int]) -> Finding:
    left = set(processes_in(folder.path)) - set(others)
    return Finding("no process is left", not left, str(sorted(left) or "none"))
