from __future__ import annotations

import asyncio

import pytest

from services.learner.outage import Outage, StopRequestedError
from services.learner.progress import Progress


def outage_of_this_task(progress: Progress) -> Outage:
    outage = Outage("redis://:secret@there:6379", progress)
    outage.loop = asyncio.current_task()
    return outage


async def test_the_sentence_says_for_how_long_redis_is_away_and_then_what_it_said_before() -> None:
    progress = Progress()
    progress.enter("publishes version 3")
    outage = outage_of_this_task(progress)
    for seconds in (0.0, 0.5):
        outage.told(seconds)
        assert progress.sentence == "waits for Redis at redis://:***@there:6379, 0 s"
        assert progress.is_waiting
    outage.told(None)
    assert progress.activity == "publishes version 3"
    assert not progress.is_waiting


async def test_a_run_that_is_to_stop_does_not_wait_for_redis() -> None:
    progress = Progress(is_stopping=True)
    with pytest.raises(StopRequestedError):
        outage_of_this_task(progress).told(0.0)


async def test_a_wait_beside_the_loop_changes_nothing() -> None:
    progress = Progress(is_stopping=True, activity="trains step 4")
    outage = outage_of_this_task(progress)

    async def beside() -> None:
        outage.told(1.0)
        outage.told(None)

    await asyncio.create_task(beside())
    assert progress.activity == "trains step 4"
