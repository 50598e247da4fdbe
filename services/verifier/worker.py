"""The verifier loop: rollout groups in, scored groups out.

Consumes `rollouts`. Waits for: a free place among the groups in flight, an entry, and room on
`scored` before a group is handed on. Unblocked by rollout replicas, which bring entries, and by
the learner, which makes room. Stops when told to: it claims nothing more and finishes what is in
flight; what room or Redis keeps it from finishing in time stays pending, for another verifier.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from services.verifier.sandbox import ScoringPool
from services.verifier.scoring import score_group
from shared.codec import decode_rollout_group, encode_scored_group
from shared.errors import StreamError
from shared.metrics import BACKPRESSURE_SECONDS, DEAD_LETTERED, REDELIVERED
from shared.records import RolloutGroup
from shared.stream import Entry, Stream, finish_when_room
from shared.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CLAIM_WAIT_SECONDS = 1.0
RETRY_SECONDS = 1.0
STOP_SECONDS = 20.0
"""How long groups in flight may take after the order to stop."""


class Worker:
    """Keeps up to `max_concurrent_groups` groups in flight."""

    def __init__(
        self,
        *,
        name: str,
        pool: ScoringPool,
        tokenizer: Tokenizer,
        rollouts: Stream,
        scored: Stream,
        dead_letter: Stream,
        max_concurrent_groups: int,
        max_attempts: int,
    ) -> None:
        self.groups_scored = 0
        self.completions_scored = 0
        self._name = name
        self._pool = pool
        self._tokenizer = tokenizer
        self._rollouts = rollouts
        self._scored = scored
        self._dead_letter = dead_letter
        self._max_concurrent_groups = max_concurrent_groups
        self._max_attempts = max_attempts
        self._in_flight: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """The loop; first what this name left pending when it last died."""
        backlog: list[Entry] | None = None
        while not stop.is_set():
            try:
                if backlog is None:
                    backlog = await self._rollouts.pending(self._name)
                await self._take(backlog)
            except StreamError as error:
                logger.warning("rollouts are out of reach, trying again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
        await self._finish()

    async def adopt(self, *, idle_seconds: float, alive: Collection[str]) -> None:
        """Take over groups of verifiers that died, as far as there are places."""
        if self._num_free > 0:
            entries = await self._rollouts.reclaim(
                self._name, idle_seconds=idle_seconds, alive=alive, count=self._num_free
            )
            REDELIVERED.labels(stream=self._rollouts.name).inc(len(entries))
            for entry in entries:
                self._start(entry)

    @property
    def _num_free(self) -> int:
        return self._max_concurrent_groups - len(self._in_flight)

    async def _take(self, backlog: list[Entry]) -> None:
        """Start what there are places for; without a place, wait for one."""
        free = self._num_free
        if free <= 0:
            await asyncio.wait(
                self._in_flight,
                timeout=CLAIM_WAIT_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            return
        if backlog:
            entries, backlog[:] = backlog[:free], backlog[free:]
        else:
            entries = await self._rollouts.claim(
                self._name, count=free, wait_seconds=CLAIM_WAIT_SECONDS
            )
        for entry in entries:
            self._start(entry)

    async def _finish(self) -> None:
        if not self._in_flight:
            return
        _, late = await asyncio.wait(self._in_flight, timeout=STOP_SECONDS)
        if late:
            logger.warning("left %d groups to other verifiers", len(late))
            for task in late:
                task.cancel()
            await asyncio.wait(late)

    def _start(self, entry: Entry) -> None:
        task = asyncio.create_task(self._complete(entry), name=f"group {entry.id}")
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _complete(self, entry: Entry) -> None:
        """One group from claim to finish; nothing it can raise may end the loop."""
        try:
            group = self._decode(entry)
            scored = await score_group(self._pool, self._tokenizer, group, verifier=self._name)
        except StreamError as error:
            await self._give_up(entry, str(error))
        except Exception:
            logger.exception("could not score entry %s", entry.id)
            await self._give_up(entry, "see the error above")
        else:
            await self._hand_on(entry, self._scored, encode_scored_group(scored))
            self.groups_scored += 1
            self.completions_scored += len(scored.scores)

    def _decode(self, entry: Entry) -> RolloutGroup:
        """The group in `entry`.

        Raises:
            StreamError: it is not one, or has ended verifiers too often.
        """
        group = decode_rollout_group(entry.payload)
        if entry.deliveries > self._max_attempts:
            raise StreamError(f"{group.prompt.uid} was delivered {entry.deliveries} times")
        return group

    async def _give_up(self, entry: Entry, error: str) -> None:
        logger.error("dead letter from rollouts: %s", error)
        DEAD_LETTERED.labels(stream=self._rollouts.name).inc()
        await self._hand_on(entry, self._dead_letter, entry.payload)

    async def _hand_on(self, entry: Entry, output: Stream, payload: bytes) -> None:
        """Finish the entry, however long Redis or the room for it takes."""
        waited = BACKPRESSURE_SECONDS.labels(stream=output.name).inc
        while True:
            try:
                await finish_when_room(
                    self._rollouts, entry, output=output, payload=payload, on_wait=waited
                )
                return
            except StreamError as error:
                logger.warning("%s is out of reach, trying again: %s", output.name, error)
                await asyncio.sleep(RETRY_SECONDS)
