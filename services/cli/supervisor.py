"""Child processes: start them, hear of each one's end, end them in order, leave none.

Each child leads a process group of its own, so that Ctrl-C in the terminal reaches only the
launcher and that what a child started ends with it. A guardian process does the ending if the
launcher itself is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from services.cli import guardian
from services.cli.launch import Launch
from shared.errors import IsentropeError, StartError

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 15
_CONFIG_STATUS = 2
_ERROR = "error: "


@dataclass(slots=True, eq=False)
class Child:
    """A started process; `status` is as Popen's returncode, None while it runs."""

    launch: Launch
    log: Path
    process: asyncio.subprocess.Process

    @property
    def name(self) -> str:
        """Of the service."""
        return self.launch.name

    @property
    def status(self) -> int | None:
        """Exit status, or minus the signal that killed it."""
        return self.process.returncode

    def last_lines(self, number: int) -> list[str]:
        """The end of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf8", "replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-number:]


class Supervisor:
    """The children of one launcher; a context that nobody outlives."""

    def __init__(
        self, *, grace_seconds: float, lock: int | None = None, scratch: Path | None = None
    ) -> None:
        """A supervisor of nobody yet.

        Args:
            grace_seconds: between SIGTERM and SIGKILL, for each stage.
            lock: descriptor that the guardian keeps open as long as it lives.
            scratch: folder to remove when everybody has ended.
        """
        self._grace_seconds = grace_seconds
        self._lock = lock
        self._scratch = scratch
        self._children: list[Child] = []
        self._waits: list[asyncio.Task[None]] = []
        self._exits: asyncio.Queue[Child] = asyncio.Queue()
        self._guardian: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Supervisor:
        scratch = [] if self._scratch is None else [str(self._scratch)]
        self._guardian = subprocess.Popen(  # noqa: ASYNC220  returns at once
            [sys.executable, "-I", "-S", guardian.__file__, str(self._grace_seconds), *scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=() if self._lock is None else (self._lock,),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.end()
        assert self._guardian is not None
        self._guardian.communicate()

    @property
    def running(self) -> list[Child]:
        """Children that have not ended, in the order of their start."""
        return [child for child in self._children if child.status is None]

    async def start(self, launch: Launch, *, log: Path) -> Child:
        """Start one process with both outputs appended to `log`.

        Raises:
            StartError: there is no such program, or the log cannot be written.
        """
        try:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *launch.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **launch.environment},
                    start_new_session=True,
                )
        except OSError as error:
            raise StartError(f"{launch.name}: cannot be started ({error})") from None
        child = Child(launch, log, process)
        self._tell_guardian(f"+ {launch.stage} {process.pid}")
        self._children.append(child)
        self._waits.append(asyncio.create_task(self._wait(child)))
        return child

    async def next_exit(self, *, timeout_seconds: float) -> Child | None:
        """The next child that ended and was not reported yet, or None after the timeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._exits.get()
        except TimeoutError:
            return None

    async def end(self, roles: Sequence[str] | None = None) -> None:
        """End the running children, or those of `roles`: stage by stage, SIGTERM, then SIGKILL."""
        chosen = [child for child in self.running if roles is None or child.launch.role in roles]
        for stage in sorted({child.launch.stage for child in chosen}):
            await self._end([child for child in chosen if child.launch.stage == stage])

    def kill(self) -> None:
        """SIGKILL every process of every child, at once."""
        for child in self.running:
            guardian.kill_group(child.process.pid)

    async def _end(self, children: Sequence[Child]) -> None:
        for child in children:
            if child.status is None:
                child.process.send_signal(signal.SIGTERM)
        waits = [self._waits[self._children.index(child)] for child in children]
        _, late = await asyncio.wait(waits, timeout=self._grace_seconds)
        if late:
            for child in children:
                guardian.kill_group(child.process.pid)
            await asyncio.wait(late)

    async def _wait(self, child: Child) -> None:
        await child.process.wait()
        # What it started must not outlive it: an engine would hold the memory a new one needs.
        guardian.kill_group(child.process.pid)
        self._tell_guardian(f"- {child.process.pid}")
        self._exits.put_nowait(child)

    def _tell_guardian(self, line: str) -> None:
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        try:
            self._guardian.stdin.write(line.encode() + b"\n")
            self._guardian.stdin.flush()
        except BrokenPipeError:
            return  # somebody killed it; the children still end with the launcher they know


def status_in_words(status: int) -> str:
    """`exited with status 3`, `was killed by SIGKILL`."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (by hand, or by the kernel because memory ran out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


class ServiceDiedError(IsentropeError):
    """A process that the run cannot do without ended.

    Attributes:
        last_lines: of its log; none if it refused its configuration and said so in one line.
    """

    def __init__(self, child: Child) -> None:
        """The error of `child`, which has ended."""
        assert child.status is not None
        refusal = _refusal_of(child)
        self.exit_code = 1 if refusal is None else _CONFIG_STATUS
        self.last_lines = child.last_lines(_TAIL_LINES) if refusal is None else []
        words = f"{child.name} {status_in_words(child.status)}; its log: {child.log}"
        super().__init__(refusal or words)


def _refusal_of(child: Child) -> str | None:
    """What a service with status 2 said is wrong with its configuration."""
    if child.status != _CONFIG_STATUS:
        return None
    said = [line for line in child.last_lines(_TAIL_LINES) if line.startswith(_ERROR)]
    return said[-1].removeprefix(_ERROR) if said else None
