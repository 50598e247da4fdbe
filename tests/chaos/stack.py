"""The real services of one run as processes, which are started again when they die.

That is what a cluster does: at once, the learner with `--resume`. Ends that no fault asked for are
noted, and a service that does not stay up ends the whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from services.cli.launch import (
    LEARNER,
    REDIS,
    ROLLOUT,
    VERIFIER,
    Launch,
    RunIdentity,
    plan_services,
)
from services.cli.run_folder import RunFolder
from services.cli.supervisor import Child, Supervisor, status_in_words
from shared.config import RunConfig, load_run
from shared.redis_server import prepare_redis, until_redis_answers
from shared.redis_stream import Streams, open_streams
from tests.chaos.links import Links
from tests.chaos.steps import Steps

RESTART_SECONDS = 0.5
POLL_SECONDS = 0.1
START_SECONDS = 300.0
END_SECONDS = 120.0
MAX_EXITS = 6
"""Ends of one service by itself within a minute: it will never come up."""

_MARK = "ISENTROPE_CHAOS_RUN"
"""By this every process of the run is known, also one that has no arguments of its own."""

Say = Callable[[str], None]


class ChaosError(Exception):
    """The run is beyond help: what happened, for a person."""


@dataclass(frozen=True, slots=True)
class Exit:
    """A process ended that nobody had told to; `said` is the last line of its log."""

    at: float
    name: str
    how: str
    said: str


class Stack:
    """The processes of a run; `async with` starts them and ends every one.

    Args:
        redis: folder of the server's data.

    Attributes:
        steps: when they ended.
        exits: of services that no fault had killed, or that were told to end and failed.
        links: between them.
        streams: the run's, without a proxy.
    """

    links: Links
    streams: Streams

    def __init__(self, folder: RunFolder, redis: Path, say: Say) -> None:
        self.steps = Steps(folder.metrics)
        self.exits: list[Exit] = []
        self._folder = folder
        self._say = say
        self._server = prepare_redis(redis)
        self._supervisor = Supervisor(
            grace_seconds=self.config.network.call_timeout_seconds,
            scratch=self._server.socket_folder,
        )
        self._children: dict[str, Child] = {}
        self._killed: set[int] = set()
        self._asked: set[int] = set()
        self._away: dict[str, float] = {}
        self._is_final: set[str] = set()
        self._parts = AsyncExitStack()
        self._trouble: Exception | None = None

    async def __aenter__(self) -> Self:
        await self._parts.enter_async_context(self._supervisor)
        try:
            await self._start_everyone()
        except BaseException:
            await self._parts.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_final.update(self._children)
        # While the links are whole: each gives its lease back.
        await self._supervisor.end([LEARNER, ROLLOUT, VERIFIER])
        await self._parts.aclose()

    @property
    def config(self) -> RunConfig:
        """What the run file says now."""
        return load_run(self._folder.run_file)

    @property
    def services(self) -> list[str]:
        """Names of all but Redis."""
        return [name for name in self._children if name != REDIS]

    def named(self, role: str) -> list[str]:
        """Services of a role."""
        return [name for name, child in self._children.items() if child.launch.role == role]

    def is_there(self, name: str) -> bool:
        """Whether the present process of this service holds a lease."""
        return name in self.links.members

    @property
    def is_whole(self) -> bool:
        """Whether all of them are."""
        return all(map(self.is_there, self.services))

    def pid_of(self, name: str) -> int | None:
        """Its process, None while it is being started again."""
        child = self._children[name]
        return child.process.pid if child.status is None else None

    def log_size(self, name: str) -> int:
        """Bytes of its log."""
        return self._folder.log_of(name).stat().st_size

    def log_since(self, name: str, size: int) -> str:
        """What it printed after its log had this size."""
        with self._folder.log_of(name).open("rb") as file:
            file.seek(size)
            return file.read().decode("utf8", "replace")

    def kill(self, name: str, *, away_seconds: float = RESTART_SECONDS) -> None:
        """SIGKILL; what it started dies with it, and it is started again after a while."""
        pid = self.pid_of(name)
        if pid is None:
            return
        self._away[name] = away_seconds
        self._killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def forgive(self, name: str) -> None:
        """The end of its present process will be a fault's doing."""
        pid = self.pid_of(name)
        if pid is not None:
            self._killed.add(pid)

    async def retire(self, name: str) -> None:
        """SIGTERM, as a cluster that moves it; it must end in order, and is started again.

        Raises:
            ChaosError: it did not end.
        """
        child = self._children[name]
        if child.status is not None:
            return
        self._asked.add(child.process.pid)
        child.process.send_signal(signal.SIGTERM)
        await self.until(
            lambda: child.status is not None,
            what=f"the end of {name} after SIGTERM",
            timeout_seconds=END_SECONDS,
        )

    async def until(self, holds: Callable[[], bool], *, what: str, timeout_seconds: float) -> None:
        """Wait for it.

        Raises:
            ChaosError: it did not come in time, or a service does not stay up.
        """
        if not await self._comes(holds, timeout_seconds):
            raise ChaosError(f"waited {timeout_seconds:.0f} s in vain for {what}")

    async def has_stepped(self, *, since: float, timeout_seconds: float) -> bool:
        """Wait until a step has ended later than `since`; False if none did in time."""
        return await self._comes(lambda: self.steps.newest_at > since, timeout_seconds)

    async def until_whole(self) -> None:
        """Wait until every service holds a lease."""
        await self.until(
            lambda: self.is_whole,
            what=f"the leases of {', '.join(self.services)}",
            timeout_seconds=START_SECONDS,
        )

    async def end_learner(self) -> None:
        """SIGTERM: it writes a checkpoint and ends; it is not started again."""
        self._is_final.add(LEARNER)
        self._children[LEARNER].process.send_signal(signal.SIGTERM)
        await self._until_learner_ended(END_SECONDS)

    async def finish(self, run_file_text: str) -> None:
        """Resume the learner with this run file, and wait until the run has finished.

        Raises:
            ChaosError: it did not finish.
        """
        self._folder.run_file.write_text(run_file_text, "utf8")
        await self._launch(self._plan(is_resumed=True)[LEARNER])
        await self._until_learner_ended(START_SECONDS)

    async def _until_learner_ended(self, timeout_seconds: float) -> None:
        learner = self._children[LEARNER]
        await self.until(
            lambda: learner.status is not None,
            what="the learner's end",
            timeout_seconds=timeout_seconds,
        )
        assert learner.status is not None
        if learner.status != 0:
            raise ChaosError(
                f"the learner {status_in_words(learner.status)} instead of ending in order;"
                f" its log: {learner.log}"
            )

    async def _comes(self, holds: Callable[[], bool], timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while not holds():
            if self._trouble is not None:
                raise self._trouble
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def _start_everyone(self) -> None:
        enter, url, config = self._parts.enter_async_context, self._server.url, self.config
        await self._launch(Launch(REDIS, REDIS, self._server.command, has_lease=False))
        await until_redis_answers(url, timeout_seconds=START_SECONDS)
        self._folder.write_redis_url(url)
        self._parts.callback(self._folder.redis_url_file.unlink, missing_ok=True)
        self.streams = await enter(
            open_streams(
                url,
                run_id=self._folder.run_id,
                prompts=config.redis.prompt_bounds,
                groups=config.redis.group_bounds,
                timeout_seconds=START_SECONDS,
            )
        )
        names = [launch.name for launch in plan_services(self._identity(is_resumed=False))]
        self.links = await enter(
            Links(
                redis_url=url,
                run_id=self._folder.run_id,
                host=config.network.host,
                names=names,
            )
        )
        for launch in self._plan(is_resumed=False).values():
            await self._launch(launch)
        for task in (self._restart, self.links.follow_leases, self._follow_steps):
            self._spawn(task)

    def _plan(self, *, is_resumed: bool) -> dict[str, Launch]:
        planned = {}
        for launch in plan_services(self._identity(is_resumed=is_resumed)):
            told = {**self.links.environment_of(launch), _MARK: str(self._folder.path)}
            planned[launch.name] = replace(launch, environment={**launch.environment, **told})
        return planned

    def _identity(self, *, is_resumed: bool) -> RunIdentity:
        return RunIdentity(
            config=self.config,
            run_file=self._folder.run_file,
            run_id=self._folder.run_id,
            redis_url=self._server.url,
            is_resumed=is_resumed,
        )

    async def _launch(self, launch: Launch) -> None:
        log = self._folder.log_of(launch.name)
        self._children[launch.name] = await self._supervisor.start(launch, log=log)

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run it beside; its error ends every wait."""

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                self._trouble = self._trouble or error

        self._parts.push_async_callback(_cancelled, asyncio.create_task(run()))

    async def _follow_steps(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.steps.look()

    async def _restart(self) -> None:
        """Start again whatever ends, until cancelled."""
        while True:
            child = await self._supervisor.next_exit(timeout_seconds=1.0)
            if child is None:
                continue
            self.links.forget(child.name)
            if child.name not in self._is_final:
                self._judge(child)
                pause_seconds = self._away.pop(child.name, RESTART_SECONDS)
                self._spawn(partial(self._start_again, child, pause_seconds))

    async def _start_again(self, child: Child, pause_seconds: float) -> None:
        await asyncio.sleep(pause_seconds)
        if child.name not in self._is_final:
            is_service = child.name != REDIS
            await self._launch(
                self._plan(is_resumed=True)[child.name] if is_service else child.launch
            )

    def _judge(self, child: Child) -> None:
        """Note an end that nobody asked for."""
        pid, status = child.process.pid, child.status
        assert status is not None
        if pid in self._killed or (pid in self._asked and status == 0):
            return
        said = next(iter(child.last_lines(1)), "")
        self.exits.append(Exit(time.monotonic(), child.name, status_in_words(status), said))
        self._say(f"{child.name} {self.exits[-1].how} by itself: {said}")
        times = [each.at for each in self.exits if each.name == child.name]
        if len(times) >= MAX_EXITS and times[-MAX_EXITS] > times[-1] - 60:
            raise ChaosError(f"{child.name} does not stay up: {said}; its log: {child.log}")


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
