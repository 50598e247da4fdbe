"""Where the loop stands: written by the loop, read and asked for things by the gRPC service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from services.learner.culprit import Awaited
from shared.activity import Report
from shared.metrics.learner import LEARNER_LAST_STEP

PAUSED = "is paused on request"


@dataclass(slots=True)
class Progress:
    """What the outside may see and ask for.

    Attributes:
        activity: what the loop does, since `since` (monotonic seconds).
        is_waiting: what it does is waiting for others, or for a person; or it starts, which takes
            as long as the checkpoint is large.
        awaited: the groups that it waits for, also while it does something else meanwhile.
        whereabouts: where those are, in a sentence; empty before anybody looked.
        silent: the replica that does not answer while the loop does what it does, in words.
        is_stalled: no step ended within the bound.
    """

    step: int = 0
    policy_version: int = 0
    activity: str = "starts"
    since: float = field(default_factory=time.monotonic)
    metrics: dict[str, float] = field(default_factory=dict)
    queues: dict[str, int] = field(default_factory=dict)
    is_finished: bool = False
    is_paused: bool = False
    is_stopping: bool = False
    is_waiting: bool = True
    is_stalled: bool = False
    awaited: Awaited | None = None
    whereabouts: str = ""
    silent: str = ""
    stepped_at: float = field(default_factory=time.monotonic)
    checkpoint_requests: list[asyncio.Future[Path]] = field(default_factory=list)

    def enter(self, activity: str, *, is_waiting: bool = False) -> None:
        """Name what the learner does from now on; what it does already goes on."""
        if activity != self.activity:
            self.activity, self.since = activity, time.monotonic()
            self.is_waiting = is_waiting

    @contextmanager
    def awaiting(self, what: str, num_wanted: int) -> Iterator[Awaited]:
        """The loop waits for groups; `what` they are for is told to people."""
        self.awaited = Awaited(what, num_wanted, num_wanted, time.monotonic())
        self.enter(self.awaited.activity, is_waiting=True)
        try:
            yield self.awaited
        finally:
            self.awaited, self.whereabouts = None, ""

    def still_awaits(self, num_missing: int) -> None:
        """So many groups are missing; whatever else was done meanwhile has ended."""
        if self.awaited is not None:
            self.awaited = replace(self.awaited, num_missing=num_missing)
            self.enter(self.awaited.activity, is_waiting=True)

    def explain(self, awaited: Awaited, whereabouts: str) -> None:
        """Where the groups are, unless these are not waited for any more, or not now."""
        is_same = self.awaited is not None and self.awaited.since == awaited.since
        if is_same and self.activity != PAUSED:
            self.whereabouts = whereabouts

    def step_ended(self, step: int) -> None:
        """A step is trained: its number, and the version that it made."""
        self.step = self.policy_version = step
        self.stepped_at = time.monotonic()
        LEARNER_LAST_STEP.set_to_current_time()

    def rest(self) -> None:
        """A person wants no step now; the time without one begins anew."""
        self.enter(PAUSED, is_waiting=True)
        self.whereabouts = ""
        self.stepped_at = time.monotonic()

    @property
    def doing(self) -> str:
        """What the loop does, for how long, and who keeps it from ending that."""
        doing = f"{self.activity}, {time.monotonic() - self.since:.0f} s"
        return f"{doing}; {self.silent}" if self.silent else doing

    @property
    def sentence(self) -> str:
        """What the learner does, or where that is which it waits for."""
        return self.whereabouts or self.doing

    @property
    def seconds_without_step(self) -> float:
        """Since a step ended, the run started or was resumed; 0 once it has finished."""
        return 0.0 if self.is_finished else time.monotonic() - self.stepped_at

    def report(self) -> Report:
        """The learner as every service tells of itself."""
        is_busy = not (self.is_waiting or self.is_finished or self.silent)
        stuck = time.monotonic() - self.since if is_busy else 0.0
        return Report(self.sentence, self.seconds_without_step, stuck)
