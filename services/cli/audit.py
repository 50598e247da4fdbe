"""`isentrope audit`: whether each place of the prompt order ended exactly once.

Reads what the learner wrote, ledger.jsonl and metrics.jsonl, and the seed of the run file, from
which the order of the problems is computed anew; nothing of the learner's state is believed. It
can be asked of a run at any time; of one that has finished it also says that nothing is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.cli.measurements import Row, is_step, read_rows, staleness_counts
from services.cli.run_folder import RunFolder
from shared.config import load_run
from shared.errors import ConfigError
from shared.prompt_order import problem_at

ENDINGS = ("trained", "skipped", "abandoned")
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Audit:
    """What the files of a run prove; positions are places of the prompt order.

    Attributes:
        ended: how many positions ended each way.
        reissued: trained positions whose first attempt was not the one that counted.
        max_staleness: largest staleness of a trained group, in versions.
        under_way: positions issued that have not ended, as of the last step.
        faults: positions, steps or (step, position) by what is wrong with them; empty lists if
            all is right.
    """

    steps: int
    num_steps: int
    ended: Mapping[str, int]
    reissued: int
    max_staleness: int
    under_way: int
    faults: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """No position lost, none ended twice, none over the bound, every step accounted for."""
        return not any(self.faults.values())


@dataclass(frozen=True, slots=True)
class _Ending:
    step: int
    how: str
    epoch: int
    index: int
    attempt: int
    position: int


def audit(ledger: Sequence[Row], metrics: Sequence[Row], *, seed: int, num_steps: int) -> Audit:
    """Check every row against every other.

    Args:
        ledger: of ledger.jsonl, in the file's order.
        metrics: of metrics.jsonl.
        seed: of the prompt order.
        num_steps: after which the run has finished, and nothing may be left.
    Raises:
        KeyError: a row is of an older release, which told less.
    """
    endings = [ending for row in ledger for ending in _endings(row)]
    times = Counter(ending.position for ending in endings)
    last: Row = ledger[-1] if ledger else {"outstanding": [], "step": 0}
    under_way = last["outstanding"]
    is_finished = last["step"] >= num_steps
    return Audit(
        steps=len(ledger),
        num_steps=num_steps,
        ended={how: sum(ending.how == how for ending in endings) for how in ENDINGS},
        reissued=sum(ending.how == "trained" and ending.attempt > 0 for ending in endings),
        max_staleness=max((each for row in ledger for each in row["staleness"]), default=0),
        under_way=len(under_way),
        faults={
            "lost": sorted({*_lost(ledger), *(under_way if is_finished else ())}),
            "twice": sorted(position for position, number in times.items() if number > 1),
            "over the staleness bound": sorted(
                {*_over(ledger), *_over_as_measured(ledger, metrics)}
            ),
            "of another problem": list(_of_another_problem(ledger, seed)),
            "steps missing or repeated": _wrong_steps(ledger, metrics),
        },
    )


def print_audit(folder: RunFolder) -> int:
    """Print the audit of a run; the exit status, 1 if something is wrong.

    Raises:
        ConfigError: the run has no ledger, or one of an older release.
    """
    run = load_run(folder.run_file).run
    ledger, metrics = read_rows(folder.ledger), read_rows(folder.metrics)
    if not ledger:
        raise ConfigError(f"{folder.ledger}: no step yet; nothing to audit")
    try:
        found = audit(ledger, metrics, seed=run.seed, num_steps=run.num_steps)
    except KeyError as error:
        raise ConfigError(
            f"{folder.ledger}: a row without {error}; an older release wrote it, which did not"
            " tell how each position ended"
        ) from None
    print("\n".join(described(folder.run_id, found)))
    return 0 if found.is_right else 1


def described(run_id: str, found: Audit) -> list[str]:
    """The audit as lines for a person; the last one is the verdict."""
    ended = ", ".join(f"{number} {how}" for how, number in found.ended.items())
    lines = [
        f"{run_id}: {found.steps} of {found.num_steps} steps",
        f"positions  {sum(found.ended.values()) + found.under_way} issued: {ended},"
        f" {found.under_way} under way",
        f"trained    {found.reissued} by a later attempt; staleness at most {found.max_staleness}",
    ]
    for fault, places in found.faults.items():
        shown = ", ".join(map(str, places[:_SHOWN])) + (" ..." if len(places) > _SHOWN else "")
        lines.append(f"{len(places)} {fault}" + (f": {shown}" if places else ""))
    return [*lines, "right" if found.is_right else "WRONG"]


def _endings(row: Row) -> Iterator[_Ending]:
    for how in ENDINGS:
        for epoch, index, attempt in row[how]:
            position = epoch * row["num_problems"] + index
            yield _Ending(row["step"], how, epoch, index, attempt, position)


def _lost(ledger: Sequence[Row]) -> Iterator[int]:
    """Positions without an ending that are under way no more, or below the frontier."""
    ended: set[int] = set()
    known: set[int] = set()
    frontier = 0
    for row in ledger:
        ended.update(ending.position for ending in _endings(row))
        yield from known - ended - set(row["outstanding"])
        yield from set(range(frontier, row["frontier"])) - ended
        known = set(row["outstanding"])
        frontier = max(frontier, row["frontier"])


def _over(ledger: Sequence[Row]) -> Iterator[int]:
    for row in ledger:
        if any(each > row["max_staleness"] for each in row["staleness"]):
            yield row["step"]


def _over_as_measured(ledger: Sequence[Row], metrics: Sequence[Row]) -> Iterator[int]:
    """The same by the completions that the engine was given."""
    bounds = {row["step"]: row["max_staleness"] for row in ledger}
    for row in metrics:
        ages = staleness_counts(row) if is_step(row) else {}
        if any(age > bounds.get(row["step"], age) for age in ages):
            yield row["step"]


def _of_another_problem(ledger: Sequence[Row], seed: int) -> Iterator[tuple[int, int]]:
    """(step, position) of groups that were trained at a place of the order that is not theirs."""
    for row in ledger:
        for (epoch, index, _), problem in zip(row["trained"], row["problems"], strict=True):
            num_problems = row["num_problems"]
            if problem != problem_at(epoch, index, num_problems=num_problems, seed=seed):
                yield row["step"], epoch * num_problems + index


def _wrong_steps(ledger: Sequence[Row], metrics: Sequence[Row]) -> list[int]:
    """Steps that are not in both files once; a learner that was killed may have written one row."""
    trained = [row["step"] for row in ledger]
    measured = [row["step"] for row in metrics if is_step(row)]
    expected = set(range(1, max([0, *trained]) + 1))
    wrong = {step for step, number in Counter(trained).items() if number > 1}
    wrong |= {step for step, number in Counter(measured).items() if number > 1}
    wrong |= expected - set(trained)
    return sorted(wrong | ((expected ^ set(measured)) - {max(expected, default=0)}))
