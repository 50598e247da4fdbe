"""Ctrl-C and its relatives, counted: the first asks for an orderly end, the second for any end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Listens from its making until the event loop is closed."""

    def __init__(self, *, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """Listen; `on_second` is called for every further signal, too."""
        self._came = asyncio.Event()
        self._on_first = on_first
        self._on_second = on_second
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._take)

    @property
    def came(self) -> bool:
        """Whether there was one."""
        return self._came.is_set()

    async def may_cancel(self, work: asyncio.Task[Any]) -> None:
        """Wait until `work` has ended, cancelled by an interrupt or by itself; raises its error."""
        coming = asyncio.create_task(self._came.wait())
        await asyncio.wait({work, coming}, return_when=asyncio.FIRST_COMPLETED)
        coming.cancel()
        if work.done():
            work.result()
            return
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    def _take(self) -> None:
        if self.came:
            self._on_second()
        else:
            self._came.set()
            self._on_first()
