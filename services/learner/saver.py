"""Checkpoints beside the training: of one moment, one at a time, acknowledged when safely there.

    save     a snapshot of engine and run; training waits for this
             engine files, state, manifest, rename, older ones deleted: in a thread, while it trains
    settle   what the checkpoint contains is acknowledged, and who asked for it is answered

A save that is due while another is under way waits for it: to leave it out would keep more on
`scored` than `redis.max_groups` was checked for.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from services.learner.checkpoint import Written, prune_checkpoints, write_checkpoint
from services.learner.inbox import Inbox
from services.learner.outage import StopRequestedError
from services.learner.progress import Progress
from services.learner.publisher import OnEngine
from shared.config.learner import CheckpointConfig
from shared.errors import CheckpointError
from shared.metrics.learner import LEARNER_CHECKPOINT_SECONDS, LEARNER_CHECKPOINTS

logger = logging.getLogger(__name__)


class EngineSnapshot(Protocol):
    """The engine's state at one moment; `services.learner.snapshot.Snapshot` is it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, folder: Path) -> Written: ...


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A checkpoint that is being written.

    Attributes:
        num_entries: of `scored`, whose effect it contains.
        asked: who wants to know when it is there.
    """

    num_entries: int
    asked: list[asyncio.Future[Path]]
    writing: asyncio.Task[Path]

    def answer(self) -> BaseException | None:
        """Tell who asked how the writing went, which has ended; what it failed by."""
        error = self.writing.exception()
        for future in unanswered(self.asked):
            if error is None:
                future.set_result(self.writing.result())
            else:
                future.set_exception(CheckpointError(str(error)))
        return error


class Saver:
    """Writes the checkpoints of one run; the loop calls it, and nobody else.

    Args:
        root: folder of the checkpoints.
        snapshot: called on the engine; a copy, if `checkpoint.asynchronous`.
    """

    def __init__(
        self,
        *,
        config: CheckpointConfig,
        root: Path,
        snapshot: Callable[[], EngineSnapshot],
        on_engine: OnEngine,
        inbox: Inbox,
        progress: Progress,
    ) -> None:
        self._config = config
        self._root = root
        self._snapshot = snapshot
        self._on_engine = on_engine
        self._inbox = inbox
        self._progress = progress
        self._under_way: UnderWay | None = None

    @property
    def is_under_way(self) -> bool:
        """One is being written, or was and is not settled."""
        return self._under_way is not None

    @property
    def is_written(self) -> bool:
        """`settle` has something to settle, and would not wait."""
        return self._under_way is not None and self._under_way.writing.done()

    async def save(self, state: Mapping[str, Any], *, scores: Mapping[int, float]) -> None:
        """Begin a checkpoint of the run as it is now, which whoever asked for one waits for.

        Args:
            state: of the run, JSON; copied.
            scores: evaluation score by step, by which the best older ones are kept.
        """
        try:
            await self.settle()
        except CheckpointError as error:
            logger.error("%s; training goes on", error)
        started, step, copied = time.monotonic(), self._progress.step, copy.deepcopy(dict(state))
        snapshot = await self._on_engine(self._snapshot)
        asked, self._progress.checkpoint_requests = self._progress.checkpoint_requests, []

        def write() -> Path:
            folder = self._write(snapshot, step, copied, dict(scores))
            seconds = time.monotonic() - started
            LEARNER_CHECKPOINT_SECONDS.observe(seconds)
            logger.info("wrote the checkpoint of step %d in %.1f s", step, seconds)
            return folder

        self._under_way = UnderWay(
            num_entries=self._inbox.num_unacknowledged,
            asked=asked,
            writing=asyncio.create_task(asyncio.to_thread(write), name="checkpoint"),
        )
        if not self._config.asynchronous:
            await asyncio.wait({self._under_way.writing})

    async def settle(self) -> None:
        """Wait for the checkpoint under way, if there is one, and acknowledge what it contains.

        Raises:
            CheckpointError: it could not be written; nothing is acknowledged.
            EngineError: a rank is gone; nothing is acknowledged either.
        """
        if self._under_way is None:
            return
        written = self._under_way
        await asyncio.wait({written.writing})
        self._under_way = None
        error = written.answer()
        LEARNER_CHECKPOINTS.labels(result="error" if error else "ok").inc()
        if error is not None:
            raise error
        await self._acknowledge(written.num_entries)

    async def close(self) -> None:
        """Wait until nothing is being written any more, also when the run ends by an error."""
        if self._under_way is not None:
            await asyncio.wait({self._under_way.writing})
            self._under_way.answer()

    def _write(
        self, snapshot: EngineSnapshot, step: int, state: dict[str, Any], scores: dict[int, float]
    ) -> Path:
        """In a thread of its own, beside the next steps."""
        with snapshot:
            folder = write_checkpoint(
                self._root, step=step, state=state, save_engine=snapshot.write
            )
        prune_checkpoints(
            self._root,
            keep=self._config.keep,
            keep_best=self._config.keep_best,
            scores=scores,
        )
        return folder

    async def _acknowledge(self, count: int) -> None:
        try:
            await self._inbox.acknowledge(count)
        except StopRequestedError:
            # A resumed run reads these entries again, and its ledger drops them.
            logger.warning("stops without Redis: what was trained is not acknowledged")


def unanswered(asked: list[asyncio.Future[Path]]) -> list[asyncio.Future[Path]]:
    """A caller whose deadline passed has cancelled its future."""
    return [future for future in asked if not future.done()]
