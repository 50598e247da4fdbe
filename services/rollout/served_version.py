"""The version that the engine samples, and the swap that replaces it.

No request is lost to a swap: those that run wait, keep their KV cache, and go on with the new
weights; those that come wait in `admit`, because a request is salted with the version that it
starts with. A failed load may have damaged the model: until a whole version is in, nothing is
sampled from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from services.rollout.engine_control import EngineControl
from shared.errors import EngineError


class ServedVersion:
    """The version of one engine; `adopt` and `swap` are called one at a time.

    Attributes:
        policy_version: that samples now; None before the first one and after a failed load.
    """

    def __init__(self, control: EngineControl) -> None:
        self.policy_version: int | None = None
        self._control = control
        self._admission = asyncio.Event()
        self._admission.set()

    async def admit(self) -> int:
        """The version that a request starts with, after the swap if there is one.

        Raises:
            EngineError: no version was loaded yet, or the engine died.
        """
        await self._admission.wait()
        self._control.require_alive()
        if self.policy_version is None:
            raise EngineError("no policy version is loaded: update the engine first")
        return self.policy_version

    async def adopt(self, version: int) -> None:
        """Declare that the weights that are in are this version.

        Raises:
            EngineError: the engine died.
        """
        await self._control.name_version(version)
        self.policy_version = version

    async def swap(self, version: int) -> tuple[float, float]:
        """Pause, load what the workers received, resume; seconds of loading and of the whole.

        Raises:
            EngineError: the weights do not fit the model, and every running request was given
                up; or the engine died.
        """
        async with self._closed_admission():
            paused_at = time.monotonic()
            await self._control.pause()
            loading_at = time.monotonic()
            try:
                await self._control.collective("finish_weight_update")
                await self.adopt(version)
            except EngineError:
                await self._give_up_requests()
                raise
            finally:
                load_seconds = time.monotonic() - loading_at
                if self._control.is_alive:
                    await self._control.resume()
            return load_seconds, time.monotonic() - paused_at

    async def _give_up_requests(self) -> None:
        self.policy_version = None
        if self._control.is_alive:
            await self._control.abort_requests()
            await self._control.collective("isentrope_leave_group")

    @contextlib.asynccontextmanager
    async def _closed_admission(self) -> AsyncIterator[None]:
        self._admission.clear()
        try:
            yield
        finally:
            self._admission.set()
