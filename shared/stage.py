"""A stage between two streams: claim an entry, work on it, hand the result on, many at a time.

Consumes the input stream. Waits for: its gate, a free place, an entry; and for room on the output
stream before a result is handed on. Stops when the gate says so: what is in flight is finished
first, and what is not finished in time stays pending for another consumer. What the caller sees
that this one cannot go on with is given back: others find it at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from shared.activity import Activity, Phase
from shared.dead_letters import bury
from shared.errors import StreamError
from shared.lease import Registry, Role
from shared.metrics.queues import BACKPRESSURE_SECONDS, REDELIVERED
from shared.redis_connection import REFUSED
from shared.stream import Entry, Stream, finish_when_room

logger = logging.getLogger(__name__)

CLAIM_WAIT_SECONDS = 1.0
RETRY_SECONDS = 1.0

_CANCEL_SECONDS = 10.0
"""Work that is ended may save what it has."""

LOOKERS = 32
"""Consumers of a role that look for orphans as often as they may; more share the looks."""


class UnworkableError(Exception):
    """An entry that no attempt will make anything of; the reason goes with it."""


Work = Callable[[Entry], Awaitable[bytes | None]]
"""The result's payload, or None to leave the entry pending. Raises UnworkableError."""


class Stage:
    """Keeps up to `max_in_flight` entries in work.

    Args:
        name: of this consumer, unique in its role.
        work: what is done with an entry; nothing it raises ends the stage.
        max_attempts: an entry delivered more often goes to `dead_letter`.
        on_done: told of an entry that has left the source: handed on, or buried.
        on_idle: told the seconds that a claim took while nothing was in flight.
        verb: what it does with groups, for people.

    Attributes:
        max_in_flight: may be changed while the stage runs; what is in work beyond it ends first.
        activity: what it is doing; `work` and the gate may add what they wait for.
    """

    def __init__(
        self,
        *,
        name: str,
        source: Stream,
        output: Stream,
        dead_letter: Stream,
        work: Work,
        max_in_flight: int,
        max_attempts: int,
        on_done: Callable[[Entry], Awaitable[None]] | None = None,
        on_idle: Callable[[float], None] = lambda seconds: None,
        verb: str = "works on",
    ) -> None:
        self.activity = Activity(verb=verb, source=source.name, output=output.name)
        self._name = name
        self._source = source
        self._output = output
        self._dead_letter = dead_letter
        self._work = work
        self.max_in_flight = max_in_flight
        self._max_attempts = max_attempts
        self._on_done = on_done
        self._on_idle = on_idle
        self._in_flight: dict[asyncio.Task[None], Entry] = {}
        self._backlog: list[Entry] | None = None
        self._held: set[str] = set()

    @property
    def num_in_flight(self) -> int:
        """Entries claimed and not finished."""
        return len(self._in_flight)

    async def run(self, gate: Callable[[], Awaitable[bool]]) -> None:
        """Claim while the gate opens; first what this name left pending when it last died.

        The gate is awaited before every claim; it may wait, and ends the stage with False.

        Raises:
            StreamError: Redis refuses this user; whoever is only out of reach is tried again.
        """
        self.activity.loop_enters(Phase.INPUT)
        while await gate():
            try:
                if self._backlog is None:
                    left = await self._source.pending(self._name, held=self._held)
                    # Again: some may have been adopted while Redis answered.
                    self._backlog = [entry for entry in left if entry.id not in self._held]
                    self._held.update(entry.id for entry in self._backlog)
                await self._take(self._backlog)
            except StreamError as error:
                if error.status == REFUSED:
                    raise
                logger.warning("%s is out of reach, trying again: %s", self._source.name, error)
                await asyncio.sleep(RETRY_SECONDS)
        self.activity.loop_enters(Phase.ENDED)

    async def finish(self, *, timeout_seconds: float | None = None) -> None:
        """Wait for what is in flight; after the timeout the rest is left to others."""
        if not self._in_flight:
            return
        _, late = await asyncio.wait(self._in_flight, timeout=timeout_seconds)
        if late:
            logger.warning("left %d groups to others", len(late))
            for task in late:
                task.cancel()
            await asyncio.wait(late)

    async def adopt(self, *, idle_seconds: float, alive: Collection[str]) -> None:
        """Take over entries of consumers that died, as far as there are places.

        And those that this one claimed without knowing it: the claim's reply was lost.
        """
        free = self.max_in_flight - len(self._in_flight)
        if free <= 0:
            return
        entries = await self._source.reclaim(
            self._name, idle_seconds=idle_seconds, alive=alive, count=free, held=self._held
        )
        REDELIVERED.labels(stream=self._source.name).inc(len(entries))
        for entry in entries:
            self._start(entry)

    async def give_back(self, ids: Collection[str], *, idle_seconds: float) -> int:
        """End the work on these entries; leave to others what this name has and does not work on.

        The latter is also what it left pending when it last died.

        Args:
            idle_seconds: an entry must have been claimed this long ago.
        Returns:
            How many entries others may take now.
        Raises:
            StreamError: Redis is away; another call gives back what this one has not.
        """
        late = [task for task, entry in self._in_flight.items() if entry.id in ids]
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CANCEL_SECONDS)
        self._held.difference_update(entry.id for entry in self._backlog or ())
        if self._backlog is not None:
            self._backlog.clear()
        return await self._source.give_back(
            self._name, idle_seconds=idle_seconds, held=tuple(self._held)
        )

    async def _take(self, backlog: list[Entry]) -> None:
        """Start what there are places for; without a place, wait a moment for one."""
        free = self.max_in_flight - len(self._in_flight)
        if free <= 0:
            self.activity.loop_enters(Phase.FULL)
            await asyncio.wait(
                self._in_flight,
                timeout=CLAIM_WAIT_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            return
        if backlog:
            entries, backlog[:] = backlog[:free], backlog[free:]
        else:
            entries = await self._claim(free)
        for entry in entries:
            self._start(entry)

    async def _claim(self, count: int) -> list[Entry]:
        started, was_idle = time.monotonic(), not self._in_flight
        self.activity.loop_calls()
        entries = await self._source.claim(self._name, count=count, wait_seconds=CLAIM_WAIT_SECONDS)
        self.activity.loop_enters(Phase.INPUT)
        if was_idle:
            self._on_idle(time.monotonic() - started)
        return entries

    def _start(self, entry: Entry) -> None:
        self._held.add(entry.id)
        self.activity.begin(entry.id)
        task = asyncio.create_task(self._complete(entry), name=f"group {entry.id}")
        self._in_flight[task] = entry
        task.add_done_callback(self._in_flight.pop)

    async def _complete(self, entry: Entry) -> None:
        try:
            await self._attempt(entry)
        finally:
            self._held.discard(entry.id)
            self.activity.end(entry.id)

    async def _attempt(self, entry: Entry) -> None:
        try:
            if entry.deliveries > self._max_attempts:
                raise UnworkableError(
                    f"delivered {entry.deliveries} times and never finished: whoever worked on it"
                    " died or was cut off"
                )
            payload = await self._work(entry)
        except UnworkableError as error:
            await self._bury(entry, str(error))
        except Exception as error:
            logger.exception("could not work on entry %s of %s", entry.id, self._source.name)
            await self._bury(entry, f"{type(error).__name__}: {error}")
        else:
            if payload is None:
                return
            await self._hand_on(entry, payload)
        if self._on_done is not None:
            await self._on_done(entry)

    async def _bury(self, entry: Entry, reason: str) -> None:
        self.activity.enter(entry.id, Phase.HAND_ON)
        await _however_long(
            lambda: bury(entry, self._source, self._dead_letter, error=reason),
            self._dead_letter.name,
        )

    async def _hand_on(self, entry: Entry, payload: bytes) -> None:
        counter = BACKPRESSURE_SECONDS.labels(stream=self._output.name)

        def waited(seconds: float) -> None:
            counter.inc(seconds)
            self.activity.enter(entry.id, Phase.ROOM)

        self.activity.enter(entry.id, Phase.HAND_ON)
        await _however_long(
            lambda: finish_when_room(
                self._source, entry, output=self._output, payload=payload, on_wait=waited
            ),
            self._output.name,
        )


async def _however_long(finish: Callable[[], Awaitable[None]], name: str) -> None:
    """Finish an entry, however long Redis is away."""
    while True:
        try:
            await finish()
            return
        except StreamError as error:
            logger.warning("%s is out of reach, trying again: %s", name, error)
            await asyncio.sleep(RETRY_SECONDS)


@asynccontextmanager
async def adopting_orphans(
    adopt: Callable[..., Awaitable[None]], registry: Registry, role: Role, *, idle_seconds: float
) -> AsyncIterator[None]:
    """Within it, now and then take over what consumers of this role that died had claimed.

    A look costs as much as there are members, so a large fleet looks no oftener than 32 do: each
    of its members more seldom, and all together as soon.

    Args:
        adopt: `Stage.adopt`, or what calls it.
        idle_seconds: an entry must have been claimed this long ago.
    """
    adopting = asyncio.create_task(
        _adopt_orphans(adopt, registry, role, idle_seconds=idle_seconds), name="adopter"
    )
    try:
        yield
    finally:
        adopting.cancel()


async def _adopt_orphans(
    adopt: Callable[..., Awaitable[None]], registry: Registry, role: Role, *, idle_seconds: float
) -> None:
    """Until cancelled."""
    alive: set[str] = set()
    while True:
        await asyncio.sleep(idle_seconds / 3 * max(1.0, len(alive) / LOOKERS))
        try:
            alive = {member.name for member in await registry.members(role)}
            await adopt(idle_seconds=idle_seconds, alive=alive)
        except StreamError as error:
            logger.warning("nothing reclaimed: %s", error)
