"""Calls that steer the engine's process, none of which outlives that process or its deadline.

vLLM's own never return if the process dies. An engine that misses a deadline is killed, since
nobody knows its state then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from shared.errors import BroadcastError, EngineError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DEATH_POLL_SECONDS = 0.1
_STATUS_POLL_SECONDS = 0.01
_SHUTDOWN_SECONDS = 10.0


class EngineControl:
    """The processes of one vLLM engine, and what is asked of all its workers.

    Args:
        llm: vLLM's `AsyncLLM`.
        timeout_seconds: of each call.
    """

    def __init__(self, llm: Any, *, timeout_seconds: float) -> None:
        self._llm = llm
        self._timeout_seconds = timeout_seconds
        self.processes = list(llm.engine_core.resources.engine_manager.processes)
        self._dead = asyncio.Event()
        self._watch = asyncio.create_task(self._watch_processes(), name="engine-watch")

    @property
    def is_alive(self) -> bool:
        """False once the engine's process has ended or been given up."""
        return not self._dead.is_set()

    def require_alive(self) -> None:
        """Raises EngineError if it is not."""
        if not self.is_alive:
            raise EngineError("the engine's process has ended")

    async def wait_until_dead(self) -> None:
        """Return when the engine's process has ended; it never comes back."""
        await self._dead.wait()

    def mark_dead(self) -> None:
        """A request has learnt it before the watch."""
        self._dead.set()

    async def collective(self, method: str, *args: Any) -> Any:
        """What every worker answers.

        Raises:
            EngineError: the engine is dead or failed, or did not answer in time and was killed.
        """
        self.require_alive()
        # Never with vLLM's own timeout: a late reply is then taken for that of the next call.
        return await self._call(self._llm.collective_rpc(method, args=args))

    async def poll(self, method: str, *, seconds: float, what: str) -> list[dict[str, Any]]:
        """Ask all workers until each is done.

        Raises:
            BroadcastError: one failed, or the time has passed.
            EngineError: as `collective`.
        """
        deadline = time.monotonic() + seconds
        while True:
            statuses: list[dict[str, Any]] = await self.collective(method)
            errors = [status["error"] for status in statuses if status["error"]]
            if errors:
                raise BroadcastError(f"{what} failed: {errors[0]}")
            if all(status["done"] for status in statuses):
                return statuses
            if time.monotonic() > deadline:
                raise BroadcastError(f"{what} took more than {seconds} s")
            await asyncio.sleep(_STATUS_POLL_SECONDS)

    async def pause(self) -> None:
        """Stop decoding between two tokens; requests keep their KV cache.

        Raises:
            EngineError: as `collective`; so the three calls below.
        """
        self.require_alive()
        # Not AsyncLLM.pause_generation, which adds a sleep that serves only log readers.
        await self._call(
            self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        )

    async def resume(self) -> None:
        """Decode on."""
        self.require_alive()
        await self._call(self._llm.resume_generation())

    async def name_version(self, version: int) -> None:
        """What is sampled from now on is marked as of this version."""
        self.require_alive()
        await self._call(self._llm.update_weight_version(str(version)))

    async def abort_requests(self) -> None:
        """Give up every request."""
        self.require_alive()
        running = list(self._llm.output_processor.request_states)
        await self._call(self._llm.abort(running, internal=True))

    async def shutdown(self) -> None:
        """End the process; requests still running fail. Calling it again is harmless."""
        self._watch.cancel()
        self._dead.set()
        if self._llm is None:
            return
        self._fail_requests()
        stop = asyncio.get_running_loop().run_in_executor(
            None, self._llm.shutdown, _SHUTDOWN_SECONDS
        )
        try:
            await asyncio.wait_for(asyncio.shield(stop), 2 * _SHUTDOWN_SECONDS)
        except TimeoutError:
            logger.warning("killed the engine: it did not stop within %s s", _SHUTDOWN_SECONDS)
        finally:
            self._kill()
            # Collected now, not at the interpreter's end, when its destructor fails noisily.
            self._llm = None

    async def _call(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call of vLLM's, or the engine's death, or the deadline, whichever is first."""
        task = asyncio.ensure_future(call)
        death = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait(
                {task, death}, timeout=self._timeout_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not task.done():
                self._give_up(getattr(call, "__name__", "a control call"))
            return await task
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(str(error)) from error
        finally:
            task.cancel()
            death.cancel()

    def _give_up(self, call: str) -> None:
        self.require_alive()
        logger.error("killed the engine: no answer to %s", call)
        self._kill()
        raise EngineError(f"the engine did not answer {call} within {self._timeout_seconds} s")

    async def _watch_processes(self) -> None:
        """Sets `_dead`, once, when vLLM or the process table says that the engine ended."""
        # A process sets no event, so this has to ask.
        while not self._llm.errored and all(each.is_alive() for each in self.processes):  # noqa: ASYNC110
            await asyncio.sleep(_DEATH_POLL_SECONDS)
        self._dead.set()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        self._dead.set()

    def _fail_requests(self) -> None:
        """What vLLM would do itself a moment later, but with a traceback in the log."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
        self._llm.output_processor.propagate_error(EngineDeadError())
