"""Scoring where it can do no harm: in processes that are limited, watched and killed.

A completion is hostile data and a scorer may be anyone's code around libraries that parse it. A
scorer that raises, eats memory, crashes or never returns costs its own process and gives an
outcome, `ERROR` or `TIMEOUT`, never a reward of zero; the next completion gets a new process. The
sandbox keeps time and memory in bounds, and the verifier's environment, which holds a password, to
itself; it does not keep a malicious *task* from files or network.

asyncio's own subprocesses carry it, because what a process pool does not give is what matters
here: a kill that neither signals nor loops in C can put off, and a pool that survives the death of
an idle process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from contextlib import suppress
from typing import Any, Self

from services.verifier.scorer import OUT_OF_MEMORY_EXIT_CODE, one_line
from shared.config.environment import without_secrets
from shared.config.services import TaskConfig, VerifierConfig
from shared.errors import StartError
from shared.metrics.verifier import VERIFIER_RESULTS, VERIFIER_SECONDS
from shared.records import Outcome, Score

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
"""A scoring process must have loaded its task within this."""

# Not `-m`: the process must find what this one finds, wherever it was started from.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from services.verifier.scorer import main; main(int(sys.argv[2]))"
)
_STDERR = 2
_PR_SET_DUMPABLE = 4


class ScoringPool:
    """A fixed number of scoring processes of one task.

    `async with` starts them all and leaves none behind.
    """

    def __init__(self, task: TaskConfig, limits: VerifierConfig) -> None:
        self.task = task
        self.num_waiting = 0
        """Completions that wait for a process."""
        self._limits = limits
        self._slots: asyncio.Queue[_Slot] = asyncio.Queue()
        self._all = [_Slot(task, limits) for _ in range(limits.num_workers)]
        for outcome in Outcome:
            VERIFIER_RESULTS.labels(verifier=task.name, result=outcome.value)

    async def start(self) -> None:
        """Start every process.

        Raises:
            StartError: one cannot load the task.
        """
        _hide()
        try:
            async with asyncio.TaskGroup() as starts:
                for slot in self._all:
                    starts.create_task(slot.start())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for slot in self._all:
            self._slots.put_nowait(slot)

    async def score(self, completion: str, *, answer: str) -> Score:
        """Judge a completion; the time limit runs from when a process has it.

        Never raises for what a scorer does. Cancelling it kills the process at work.
        """
        self.num_waiting += 1
        try:
            slot = await self._slots.get()
        finally:
            self.num_waiting -= 1
        started = time.monotonic()
        try:
            score = await slot.score(completion, answer)
        finally:
            self._slots.put_nowait(slot)
        VERIFIER_SECONDS.labels(verifier=self.task.name).observe(time.monotonic() - started)
        VERIFIER_RESULTS.labels(verifier=self.task.name, result=score.outcome.value).inc()
        return score

    async def close(self) -> None:
        """Kill every process and wait until they are gone."""
        await asyncio.gather(*(slot.kill() for slot in self._all))

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Slot:
    """A place for one scoring process, which is started again when it was lost."""

    def __init__(self, task: TaskConfig, limits: VerifierConfig) -> None:
        self._task = task
        self._limits = limits
        self._process: Process | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def start(self) -> None:
        """A process that has loaded the task.

        Raises:
            StartError: it cannot, or takes too long.
        """
        await self._launch()
        setting = {
            "task": self._task.name,
            "params": self._task.params,
            "memory_mib": self._limits.memory_mib,
        }
        try:
            async with asyncio.timeout(START_SECONDS):
                fault = (await self._exchange(setting))["fault"]
        except TimeoutError:
            fault = f"not loaded within {START_SECONDS:.0f} s"
        except EOFError:
            fault = _explain_exit(await self.kill(), self._limits)
        if fault:
            await self.kill()
            raise StartError(f"no scoring process of task {self._task.name!r}: {fault}")

    async def score(self, completion: str, answer: str) -> Score:
        """The outcome; whatever it is, the slot can be used again."""
        try:
            if self._process is None or self._process.returncode is not None:
                await self.kill()
                await self.start()
            async with asyncio.timeout(self._limits.timeout_seconds):
                reply = await self._exchange([completion, answer])
            return Score(Outcome(reply["outcome"]), reply["reward"], reply["detail"])
        except TimeoutError:
            await self.kill()
            detail = f"killed after {self._limits.timeout_seconds:g} s"
            return Score(Outcome.TIMEOUT, 0.0, detail)
        except EOFError:
            code = await self.kill()
            return Score(Outcome.ERROR, 0.0, _explain_exit(code, self._limits))
        except (StartError, OSError) as error:
            await self.kill()
            logger.error("a scoring process did not start: %s", error)
            return Score(Outcome.ERROR, 0.0, one_line(str(error)))
        except BaseException:
            await self.kill()
            raise

    async def kill(self) -> int | None:
        """End the process and its children at once; its exit code, None if there was none."""
        process, self._process = self._process, None
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()
        if process is None:
            return None
        if process.returncode is None:  # else its number may be another group's by now
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return await process.wait()

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._streams = await asyncio.open_connection(sock=ours)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())),
                stdin=DEVNULL,
                stdout=_STDERR,
                pass_fds=[theirs.fileno()],
                env=without_secrets(),
                process_group=0,  # a group of its own: spared Ctrl-C, and killed with its children
            )

    async def _exchange(self, message: Any) -> Any:
        """Send a line, read a line.

        Raises:
            EOFError: the process died, closed its end, or wrote nonsense to it.
        """
        assert self._streams is not None
        reader, writer = self._streams
        try:
            writer.write(json.dumps(message).encode() + b"\n")
            await writer.drain()
            line = await reader.readline()
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None
        try:
            return json.loads(line)  # an empty line, when the connection is closed, is none
        except ValueError:
            raise EOFError from None


def _hide() -> None:
    """Keep this process' memory, and the environment it was given, from those that it starts.

    They are of the same user, to whom Linux shows both otherwise, in `/proc`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def _explain_exit(code: int | None, limits: VerifierConfig) -> str:
    if code == OUT_OF_MEMORY_EXIT_CODE:
        return f"out of memory (verifier.memory_mib = {limits.memory_mib})"
    if code is not None and code < 0:
        return f"the scorer was killed by {signal.Signals(-code).name}"
    return f"the scorer ended its process with code {code}"
