"""The learner's process around its loop."""

from __future__ import annotations

import asyncio

import pytest

from services.learner.app import _until_told
from shared.errors import StreamError


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_finished_learner_stays_until_it_is_told_to_end() -> None:
    stop, lease = asyncio.Event(), asyncio.create_task(forever())
    staying = asyncio.create_task(_until_told(stop, lease))
    await asyncio.sleep(0)
    assert not staying.done()
    stop.set()
    await asyncio.wait_for(staying, 5)
    lease.cancel()


async def test_a_finished_learner_ends_when_another_takes_its_name() -> None:
    async def lose() -> None:
        raise StreamError("another process holds the name 'learner'")

    lease = asyncio.create_task(lose())
    with pytest.raises(StreamError, match="another process"):
        await asyncio.wait_for(_until_told(asyncio.Event(), lease), 5)
