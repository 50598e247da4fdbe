"""Health that means progress: a service that holds work and gets nowhere says so by itself.

Two things are told apart, because a person or a cluster does different things about them:

    health of "" and of the service   it answers, and its engine is loaded: send it calls
    health of `isentrope.progress`    NOT_SERVING once it has made no progress in work of its own
                                      for `watchdog.stall_seconds`: restarting it will help

Whoever waits for somebody else is SERVING under both names, however long it takes: a restart of
the waiting one helps nobody. So a cluster may ask for `isentrope.progress` as liveness; what it
restarts loses nothing. `watchdog.stall_seconds` is then above the longest step and completion.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from shared.activity import Report
from shared.lease import Role
from shared.metrics.process import SERVICE_STALLED
from shared.rpc import RpcServer

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Stall:
    """Tells a stall that lasts once a bound, not at every look.

    Args:
        bound_seconds: without progress; 0 for never.
    """

    def __init__(self, *, bound_seconds: float) -> None:
        self._bound_seconds = bound_seconds
        self._num_told = 0

    @property
    def look_seconds(self) -> float:
        """Between two looks: a second, or a quarter of a shorter bound."""
        return min(LOOK_SECONDS, self._bound_seconds / 4) or LOOK_SECONDS

    def has(self, seconds: float) -> bool:
        """Whether so long without progress is a stall."""
        return 0 < self._bound_seconds <= seconds

    def is_news(self, seconds: float) -> bool:
        """True once for each bound that passes without progress."""
        num_bounds = int(seconds / self._bound_seconds) if self.has(seconds) else 0
        is_news, self._num_told = num_bounds > self._num_told, num_bounds
        return is_news


class ProgressHealth:
    """The service name, the metric and the log line of a process that is stuck by itself."""

    def __init__(self, server: RpcServer, role: Role, *, stall_seconds: float) -> None:
        self._server = server
        self.stall = Stall(bound_seconds=stall_seconds)
        self._gauge = SERVICE_STALLED.labels(service=role)
        self._gauge.set(0)

    async def show(self, report: Report) -> None:
        """Tell what the report says."""
        is_stuck = self.stall.has(report.stuck_seconds)
        if self.stall.is_news(report.stuck_seconds):
            logger.warning(
                "stalled: %s; nothing ended for %.0f s", report.sentence, report.stuck_seconds
            )
        self._gauge.set(is_stuck)
        await self._server.set_progressing(not is_stuck)


@asynccontextmanager
async def watched(
    report: Callable[[], Report], server: RpcServer, role: Role, *, stall_seconds: float
) -> AsyncIterator[None]:
    """Look every second whether this process is stuck, and show it.

    Args:
        stall_seconds: without progress; 0 for never.
    """
    health = ProgressHealth(server, role, stall_seconds=stall_seconds)

    async def watch() -> None:
        while True:
            await health.show(report())
            await asyncio.sleep(health.stall.look_seconds)

    async with beside(watch()):
        yield


@asynccontextmanager
async def beside(watch: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `watch` until the end of the context; an error of it is logged, and ends nothing else."""

    def tell(done: asyncio.Task[None]) -> None:
        if not done.cancelled() and done.exception() is not None:
            logger.error("the watchdog itself has ended", exc_info=done.exception())

    watching = asyncio.create_task(watch, name="watchdog")
    watching.add_done_callback(tell)
    try:
        yield
    finally:
        watching.cancel()
