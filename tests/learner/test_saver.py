from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from services.learner.checkpoint import newest_checkpoint
from services.learner.progress import Progress
from services.learner.saver import Saver, unanswered
from shared.config.learner import CheckpointConfig
from shared.errors import CheckpointError, EngineError
from shared.metrics.learner import LEARNER_CHECKPOINTS
from tests.factories import make_scored
from tests.learner.test_inbox import Scene

PATIENCE_SECONDS = 120.0


@dataclass
class Taken:
    """An engine's snapshot that is written when `gate` is set, to a disk that may refuse."""

    gate: threading.Event = field(default_factory=threading.Event)
    refuses: bool = False
    is_let_go: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.is_let_go = True

    def write(self, folder: Path) -> None:
        assert self.gate.wait(PATIENCE_SECONDS)
        folder.mkdir()
        if self.refuses:
            raise OSError(28, "No space left on device")
        (folder / "weights").write_bytes(b"w")


def open_taken() -> Taken:
    taken = Taken()
    taken.gate.set()
    return taken


class Saving:
    """A saver over a real inbox; each save takes the next of these snapshots."""

    def __init__(self, scene: Scene, root: Path, *taken: Taken, **config: Any) -> None:
        self.scene = scene
        self.root = root
        self.progress = Progress(step=1)
        self._taken = list(taken)
        self.saver = Saver(
            config=CheckpointConfig(**config),
            root=root,
            snapshot=lambda: self._taken.pop(0),
            on_engine=self._at_once,
            inbox=scene.inbox,
            progress=self.progress,
        )

    async def _at_once(self, function: Callable[[], Any]) -> Any:
        return function()

    async def save(self, step: int, **state: Any) -> None:
        self.progress.step = step
        await self.saver.save(state, scores={})

    async def num_pending(self) -> int:
        return (await self.scene.scored.depth()).pending

    def steps(self) -> list[int]:
        return [int(path.name.split("-")[1]) for path in sorted(self.root.glob("step-*"))]


@asynccontextmanager
async def saving(root: Path, *taken: Taken, **config: Any) -> AsyncIterator[Saving]:
    """Six groups are on their way; two are taken before anything else."""
    scene = Scene(run=Scene.run.replace("max_staleness = 1", "max_staleness = 3"))
    await scene.feeder.fill(policy_version=0)
    await scene.arrive(*(make_scored(index) for index in range(6)))
    await scene.take()
    made = Saving(scene, root, *taken, **config)
    try:
        yield made
    finally:
        for each in taken:
            each.gate.set()
        await made.saver.close()


async def test_training_goes_on_and_only_what_the_checkpoint_holds_is_acknowledged(
    tmp_path: Path,
) -> None:
    taken = Taken()
    async with saving(tmp_path, taken) as run:
        state = {"law": [1]}
        await run.save(1, **state)
        state["law"].append(2)
        assert run.saver.is_under_way
        assert not run.saver.is_written
        await run.scene.take()  # a step further, while it is written
        assert await run.num_pending() == 4
        assert run.steps() == []
        taken.gate.set()
        await run.saver.settle()
        assert await run.num_pending() == run.scene.inbox.num_unacknowledged == 2
        assert not run.saver.is_under_way
        assert taken.is_let_go
        assert json.loads((tmp_path / "step-000001/state.json").read_text())["law"] == [1]


async def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    first, second = Taken(), Taken()
    async with saving(tmp_path, first, second) as run:
        await run.save(1)
        await run.scene.take()
        further = asyncio.create_task(run.save(2))
        await asyncio.sleep(0)
        assert not further.done()
        first.gate.set()
        await asyncio.wait_for(further, PATIENCE_SECONDS)
        assert await run.num_pending() == 2  # those of the first are acknowledged
        assert run.steps() == [1]
        second.gate.set()
        await run.saver.settle()
        assert await run.num_pending() == 0
        assert run.steps() == [1, 2]


async def test_a_full_disk_acknowledges_nothing_and_the_next_checkpoint_holds_it_all(
    tmp_path: Path,
) -> None:
    full, errors = open_taken(), LEARNER_CHECKPOINTS.labels(result="error")
    full.refuses = True
    async with saving(tmp_path, open_taken(), full, open_taken()) as run:
        await run.save(1)
        await run.scene.take()
        before = errors._value.get()
        await run.save(2)
        with pytest.raises(CheckpointError, match="No space left"):
            await run.saver.settle()
        assert errors._value.get() == before + 1
        assert await run.num_pending() == 2
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 1
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        assert full.is_let_go
        await run.save(3)
        await run.saver.settle()
        assert await run.num_pending() == 0


async def test_a_checkpoint_that_failed_does_not_stop_the_next(tmp_path: Path) -> None:
    full = open_taken()
    full.refuses = True
    async with saving(tmp_path, full, open_taken()) as run:
        await run.save(1)
        await run.save(2)
        await run.saver.settle()
        assert run.steps() == [2]


async def test_who_asked_is_answered_when_the_checkpoint_is_there(tmp_path: Path) -> None:
    loop, taken, full = asyncio.get_running_loop(), Taken(), open_taken()
    full.refuses = True
    async with saving(tmp_path, taken, full) as run:
        asked: asyncio.Future[Path] = loop.create_future()
        gone: asyncio.Future[Path] = loop.create_future()
        gone.cancel()
        run.progress.checkpoint_requests += [gone, asked]
        await run.save(1)
        assert not asked.done()
        assert run.progress.checkpoint_requests == []
        late: asyncio.Future[Path] = loop.create_future()
        run.progress.checkpoint_requests.append(late)
        taken.gate.set()
        await run.saver.settle()
        assert (asked.result(), late.done()) == (tmp_path / "step-000001", False)
        await run.save(2)
        with pytest.raises(CheckpointError):
            await run.saver.settle()
        assert isinstance(late.exception(), CheckpointError)
    assert unanswered([gone, asked]) == []


async def test_without_a_copy_training_waits_for_the_disk(tmp_path: Path) -> None:
    taken = Taken()
    async with saving(tmp_path, taken, asynchronous=False) as run:
        saved = asyncio.create_task(run.save(1))
        await asyncio.sleep(0)
        assert not saved.done()
        taken.gate.set()
        await asyncio.wait_for(saved, PATIENCE_SECONDS)
        assert run.saver.is_written
        assert run.steps() == [1]


async def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    async with saving(tmp_path, *(open_taken() for _ in range(5)), keep=2, keep_best=1) as run:
        for step in range(1, 6):
            run.progress.step = step
            await run.saver.save({}, scores={1: 0.1, 2: 0.7, 3: 0.5})
        await run.saver.settle()
        assert run.steps() == [2, 4, 5]


@dataclass
class Lost(Taken):
    """A rank is gone while it writes."""

    def write(self, folder: Path) -> None:
        raise EngineError("amid a checkpoint another rank is gone")


async def test_who_asked_is_answered_also_when_a_rank_is_gone(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[Path] = loop.create_future()
    async with saving(tmp_path, Lost()) as run:
        run.progress.checkpoint_requests.append(asked)
        await run.save(1)
        with pytest.raises(EngineError, match="amid a checkpoint"):
            await run.saver.settle()
    assert isinstance(asked.exception(), CheckpointError)


async def test_who_asked_is_answered_also_when_the_run_ends_meanwhile(tmp_path: Path) -> None:
    loop, taken = asyncio.get_running_loop(), open_taken()
    asked: asyncio.Future[Path] = loop.create_future()
    waits: asyncio.Future[Path] = loop.create_future()
    async with saving(tmp_path, taken, Lost()) as run:
        run.progress.checkpoint_requests.append(asked)
        await run.save(1)
        await run.saver.close()
        assert asked.result() == tmp_path / "step-000001"
        await run.saver.settle()
        await run.save(2)
        run.progress.checkpoint_requests.append(waits)
        with pytest.raises(EngineError):
            await run.save(3)
        assert run.progress.checkpoint_requests == [waits]  # whom the run's end answers
