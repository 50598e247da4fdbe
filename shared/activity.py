"""What a stage is doing, in one sentence, and whether what it holds gets anywhere.

A stage that waits for somebody else is well, however long it takes: for entries, for room in its
output, for the learner, for Redis. One that has work of its own and ends none of it is stalled.
Redis is away when a call to it is not answered; the client itself tries again for a while and
says nothing meanwhile, so that this is told from the time since its last answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

REDIS_SECONDS = 3.0
"""Without an answer for this long Redis is away: a claim waits a second at most."""

CHORE_SECONDS = 2.0
"""A chore that takes less is not worth a word."""


class Phase(Enum):
    """What an entry is in, or the loop that claims entries."""

    INPUT = "the loop waits for an entry"
    FULL = "the loop waits for a free place"
    ENDED = "the loop has ended"
    WORK = "the entry is worked on"
    HAND_ON = "its result is on its way to the output"
    ROOM = "its result waits for room in the output"
    LEARNER = "waits for the learner"

    @property
    def needs_redis(self) -> bool:
        """Whether a call to Redis is under way."""
        return self in (Phase.INPUT, Phase.HAND_ON, Phase.ROOM)


@dataclass(slots=True)
class Spell:
    """A time in one phase; times are monotonic seconds.

    Attributes:
        heard_at: Redis answered last; the start of the spell, if it has not yet.
        note: what a person should know of the wait.
    """

    phase: Phase
    since: float
    heard_at: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a service says of itself.

    Attributes:
        sentence: what it does or waits for, and for how long.
        progress_age_seconds: without progress in what it has to do; 0 with nothing to do.
        stuck_seconds: the same, where nobody else is waited for; else 0.
    """

    sentence: str
    progress_age_seconds: float
    stuck_seconds: float = 0.0


class Activity:
    """The book that a stage keeps of itself.

    Args:
        verb: what it does with groups: `samples`.
        source: the stream that it claims from.
        output: the stream that results go to.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        *,
        verb: str,
        source: str,
        output: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verb = verb
        self._source = source
        self._output = output
        self._clock = clock
        self._entries: dict[str, Spell] = {}
        self._loop = self._begun(Phase.INPUT)
        self._progressed_at = clock()
        self._chores: dict[str, float] = {}

    def begin(self, entry_id: str) -> None:
        """An entry is worked on from now."""
        self._entries[entry_id] = self._begun(Phase.WORK)

    def enter(self, entry_id: str, phase: Phase, note: str = "") -> None:
        """An entry is in `phase`, or still is: Redis has answered."""
        if entry_id in self._entries:  # it may have come back, and ended, by another way
            self._entries[entry_id] = self._next(self._entries[entry_id], phase, note)

    @contextmanager
    def waiting(self, entry_id: str, phase: Phase, note: str = "") -> Iterator[None]:
        """An entry waits, and then is worked on again."""
        self.enter(entry_id, phase, note)
        try:
            yield
        finally:
            self.enter(entry_id, Phase.WORK)

    def end(self, entry_id: str) -> None:
        """An entry is done with."""
        self._entries.pop(entry_id, None)
        self.progress()

    def progress(self) -> None:
        """A part of the work ended."""
        self._progressed_at = self._clock()

    @contextmanager
    def chore(self, what: str) -> Iterator[None]:
        """Something that is done beside the entries, on somebody's order."""
        self._chores[what] = self._clock()
        try:
            yield
        finally:
            self._chores.pop(what, None)

    def loop_enters(self, phase: Phase) -> None:
        """The claiming loop is in `phase`, or still is: Redis has answered."""
        self._loop = self._next(self._loop, phase)

    def loop_calls(self) -> None:
        """The claiming loop asks Redis for entries; an answer is `loop_enters`."""
        if self._loop.phase is not Phase.INPUT:
            self._loop = self._begun(Phase.INPUT)

    def report(self, *, standing: str = "") -> Report:
        """The stage as it is now, and a chore that takes long.

        Args:
            standing: what the learner is to change, where the loop waits for it.
        """
        report, now = self._report(standing), self._clock()
        what = min(self._chores, key=lambda each: self._chores[each], default="")
        seconds = now - self._chores[what] if what else 0.0
        if seconds < CHORE_SECONDS:
            return report
        sentence = f"{what} for {seconds:.0f} s; {report.sentence}"
        return Report(sentence, max(seconds, report.progress_age_seconds), report.stuck_seconds)

    def _report(self, standing: str) -> Report:
        now, entries = self._clock(), list(self._entries.values())
        silent = [
            now - spell.heard_at
            for spell in (self._loop, *entries)
            if spell.phase.needs_redis and now - spell.heard_at > REDIS_SECONDS
        ]
        if silent:
            held = f" with {groups(len(entries))} in hand" if entries else ""
            return Report(f"waits for Redis for {max(silent):.0f} s{held}", max(silent))
        if self._loop.phase is Phase.LEARNER:
            seconds = now - self._loop.since
            held = f", holds {groups(len(entries))}" if entries else ""
            return Report(f"waits for the learner for {seconds:.0f} s: {standing}{held}", seconds)
        working = [spell for spell in entries if spell.phase is Phase.WORK]
        if working:
            return self._at_work(now, working, entries)
        if entries:
            sentence, seconds = self._wait(entries, now)
            return Report(self._draining(sentence), seconds)
        if self._loop.phase is Phase.ENDED:
            return Report("has drained", 0.0)
        seconds = now - max(self._loop.since, self._progressed_at)
        return Report(f"waits for {self._source} for {seconds:.0f} s", 0.0)

    def _at_work(self, now: float, working: Collection[Spell], entries: list[Spell]) -> Report:
        oldest = now - min(spell.since for spell in working)
        stuck = min(oldest, now - self._progressed_at)
        sentence = f"{self._verb} {groups(len(working))}, the oldest for {oldest:.0f} s"
        others = [spell for spell in entries if spell.phase is not Phase.WORK]
        if others:
            sentence += f", and {self._wait(others, now)[0]} with {len(others)} more"
        return Report(self._draining(sentence), stuck, stuck)

    def _wait(self, waiting: Collection[Spell], now: float) -> tuple[str, float]:
        """What finished or held-up groups wait for, and the seconds that the first has waited."""
        first = min(waiting, key=lambda spell: spell.since)
        seconds = now - first.since
        if first.phase is Phase.LEARNER:
            return f"waits for the learner for {seconds:.0f} s: {first.note}", seconds
        if first.phase is Phase.HAND_ON:
            return f"hands them on to `{self._output}` for {seconds:.0f} s", seconds
        return f"waits for room on `{self._output}` for {seconds:.0f} s", seconds

    def _draining(self, sentence: str) -> str:
        return f"drains: {sentence}" if self._loop.phase is Phase.ENDED else sentence

    def _begun(self, phase: Phase, note: str = "") -> Spell:
        now = self._clock()
        return Spell(phase, now, now, note)

    def _next(self, spell: Spell, phase: Phase, note: str = "") -> Spell:
        """The spell goes on if the phase is the same; else another begins."""
        if spell.phase is not phase:
            return self._begun(phase, note)
        spell.heard_at, spell.note = self._clock(), note
        return spell


def groups(count: int) -> str:
    """`1 group`, `2 groups`."""
    return f"{count} group" if count == 1 else f"{count} groups"
