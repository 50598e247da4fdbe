"""Watches the loop from beside it: what it waits for, and whether that lasts too long.

A task of its own, because what the loop waits for may be what keeps it from looking: Redis, a
replica that takes an update. Consumes nothing. Looks once a second, and gives up a look that
Redis does not answer in time. Stops with its context, which outlasts the loop where a finished
learner stays.

A run without a step for `watchdog.stall_seconds` is stalled: that is said once a bound, is in the
status and is a metric. It is the learner's own fault, and its `isentrope.progress` is NOT_SERVING,
only where the loop has been in one thing of its own for as long: a step, an update, a checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AbstractAsyncContextManager

from services.learner.culprit import (
    Awaited,
    Situation,
    Station,
    name_culprit,
    name_missing,
    name_redis,
)
from services.learner.progress import Progress
from services.learner.publisher import Publisher
from services.learner.telemetry import observe_queues
from shared.errors import StreamError
from shared.lease import Registry
from shared.metrics.learner import LEARNER_STALLED
from shared.redis_stream import Streams
from shared.rpc import RpcServer
from shared.watchdog import ProgressHealth, Stall, beside

logger = logging.getLogger(__name__)

REDIS_SECONDS = 3.0
"""A look that takes longer is given up: Redis is away."""

SILENT_SECONDS = 2.0
"""A replica that has been asked this long ago is what an update waits for."""


class Watchdog:
    """Tells the progress, and whoever asks for it, what the loop waits for."""

    def __init__(
        self,
        *,
        progress: Progress,
        streams: Streams,
        registry: Registry,
        publisher: Publisher,
        stall_seconds: float,
    ) -> None:
        self._progress = progress
        self._streams = streams
        self._registry = registry
        self._publisher = publisher
        self._stall_seconds = stall_seconds
        self._stall = Stall(bound_seconds=stall_seconds)
        self._heard_at = time.monotonic()

    def watching(self, server: RpcServer) -> AbstractAsyncContextManager[None]:
        """Look once a second; health is told to `server`."""
        return beside(self._watch(server))

    async def _watch(self, server: RpcServer) -> None:
        health = ProgressHealth(server, "learner", stall_seconds=self._stall_seconds)
        while True:
            await self.look()
            self.judge()
            await health.show(self._progress.report())
            await asyncio.sleep(self._stall.look_seconds)

    async def look(self) -> None:
        """Find whom the loop waits for, if it does."""
        awaited = self._progress.awaited
        whereabouts, redis = "", ""
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                if self._progress.is_finished:
                    # The loop, which keeps these at other times, has ended.
                    self._progress.queues = await observe_queues(self._streams)
                elif awaited is None:
                    await self._streams.scored.depth()
                else:
                    whereabouts = name_culprit(await self._see(awaited))
            self._heard_at = time.monotonic()
        except (StreamError, TimeoutError) as error:
            redis = name_redis(time.monotonic() - self._heard_at, reason=str(error) or "no answer")
        self._progress.silent = redis or self._silent_replica()
        if awaited is not None:
            self._progress.explain(awaited, whereabouts or name_missing(awaited, redis))

    def _silent_replica(self) -> str:
        """The one that an update waits for longest, in words."""
        unanswered = {} if self._progress.is_waiting else self._publisher.unanswered
        name = max(unanswered, key=lambda each: unanswered[each], default="")
        if not name or unanswered[name] < SILENT_SECONDS:
            return ""
        return f"{name} has not answered for {unanswered[name]:.0f} s"

    def judge(self) -> None:
        """Say that the run is stalled, once a bound."""
        seconds = self._progress.seconds_without_step
        self._progress.is_stalled = self._stall.has(seconds)
        LEARNER_STALLED.set(self._progress.is_stalled)
        if self._stall.is_news(seconds):
            logger.warning("no step for %.0f s: %s", seconds, self._progress.sentence)

    async def _see(self, awaited: Awaited) -> Situation:
        streams, progress = self._streams, self._progress
        members = await self._registry.members()
        scored, dead = await streams.scored.depth(), await streams.dead_letter.depth()
        prompts, rollouts = [
            Station.of(
                stream.name,  # type: ignore[arg-type]
                waiting=(await stream.depth()).waiting,
                holders=await stream.holders(),
                leases=frozenset(member.name for member in members if member.role == role),
            )
            for stream, role in ((streams.prompts, "rollout"), (streams.rollouts, "verifier"))
        ]
        return Situation(
            awaited=awaited,
            waited_seconds=time.monotonic() - awaited.since,
            prompts=prompts,
            rollouts=rollouts,
            num_scored=scored.waiting,
            scored_is_full=scored.reaches(streams.scored.bounds),
            num_dead=dead.waiting + dead.pending,
            versions=self._publisher.versions,
            policy_version=progress.policy_version,
            learner_does="" if progress.is_waiting else progress.doing,
        )
