"""What the loop says and hears while Redis is away."""

from __future__ import annotations

import asyncio
import logging

from services.learner.progress import Progress
from shared.redis_connection import shown

logger = logging.getLogger(__name__)


class StopRequestedError(Exception):
    """Ends a wait; the run stops with a checkpoint."""


class Outage:
    """Told of every wait for the server at `url`.

    Attributes:
        loop: the task whose waits matter; others that share its streams wait in silence.
    """

    def __init__(self, url: str, progress: Progress) -> None:
        self.loop: asyncio.Task[None] | None = None
        self._activity = f"waits for Redis at {shown(url)}"
        self._progress = progress
        self._before: tuple[str, bool] | None = None

    def told(self, seconds: float | None) -> None:
        """`shared.redis_connection.Patience` has waited this long; None: it is back.

        Raises:
            StopRequestedError: the run is to stop.
        """
        if asyncio.current_task() is not self.loop:
            return
        if seconds is None:
            self._end()
        elif self._progress.is_stopping:
            raise StopRequestedError
        elif self._before is None:
            self._begin()

    def _begin(self) -> None:
        logger.warning("%s", self._activity)
        self._before = (self._progress.activity, self._progress.is_waiting)
        self._progress.enter(self._activity, is_waiting=True)

    def _end(self) -> None:
        logger.info("Redis is back")
        if self._before is not None:
            activity, is_waiting = self._before
            self._progress.enter(activity, is_waiting=is_waiting)
            self._before = None
