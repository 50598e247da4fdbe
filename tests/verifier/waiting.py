"""Waiting for what happens in other processes, where there is no event to wait on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

SECONDS = 120.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once the condition holds; fail if it takes too long."""
    async with asyncio.timeout(SECONDS):
        while not await condition():
            await asyncio.sleep(0.005)


async def until_exists(path: Path) -> None:
    """Return once a process made this file."""

    async def exists() -> bool:
        return await asyncio.to_thread(path.exists)

    await until(exists)


async def until_dead(pid: int) -> None:
    """Return once the process is gone, or waits to be reaped."""

    async def is_dead() -> bool:
        return not is_alive(pid)

    await until(is_dead)


def is_alive(pid: int) -> bool:
    """False for a process that is gone or waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
