from __future__ import annotations

import asyncio
import itertools
import math
import time

import pytest

from services.rollout.replica import Event, Replica, State, next_state

SECONDS = 30.0
"""For what comes at once."""

ALLOWED = {
    (State.JOINING, Event.READY): State.STALE,
    (State.JOINING, Event.DRAIN): State.DRAINING,
    (State.STALE, Event.SWAPPED): State.STALE,
    (State.STALE, Event.CONFIRMED): State.SERVING,
    (State.STALE, Event.REJECTED): State.STALE,
    (State.STALE, Event.DRAIN): State.DRAINING,
    (State.SERVING, Event.SWAPPED): State.STALE,
    (State.SERVING, Event.REJECTED): State.STALE,
    (State.STALE, Event.LEFT_BEHIND): State.STALE,
    (State.SERVING, Event.LEFT_BEHIND): State.STALE,
    (State.STALE, Event.BROKEN): State.STALE,
    (State.SERVING, Event.BROKEN): State.STALE,
    (State.SERVING, Event.DRAIN): State.DRAINING,
    (State.DRAINING, Event.SWAPPED): State.DRAINING,
    (State.DRAINING, Event.CONFIRMED): State.DRAINING,
    (State.DRAINING, Event.REJECTED): State.DRAINING,
    (State.DRAINING, Event.LEFT_BEHIND): State.DRAINING,
    (State.DRAINING, Event.BROKEN): State.DRAINING,
    (State.DRAINING, Event.DRAIN): State.DRAINING,
    (State.DRAINING, Event.FINISHED): State.GONE,
}


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(State, Event)), ids=lambda each: each.name
)
def test_every_event_in_every_state_does_what_the_table_says(state: State, event: Event) -> None:
    if (state, event) in ALLOWED:
        assert next_state(state, event) is ALLOWED[state, event]
    else:
        with pytest.raises(ValueError, match=f"{event.name} cannot happen"):
            next_state(state, event)


def test_only_a_confirmation_leads_to_serving() -> None:
    ways_in = {event for (_, event), after in ALLOWED.items() if after is State.SERVING}
    assert ways_in == {Event.CONFIRMED}


async def serving(version: int) -> Replica:
    replica = Replica()
    await replica.handle(Event.READY)
    await replica.swapped(version)
    await replica.judged(version, is_confirmed=True)
    return replica


async def test_a_group_waits_for_the_version_it_needs() -> None:
    replica = await serving(1)
    waiting = asyncio.create_task(replica.wait_to_serve(min_policy_version=2))
    await asyncio.sleep(0)
    assert not waiting.done()
    await replica.swapped(2)
    await asyncio.sleep(0)
    assert not waiting.done()
    await replica.judged(2, is_confirmed=True)
    assert await asyncio.wait_for(waiting, SECONDS)


async def test_draining_ends_the_wait_for_work() -> None:
    replica = await serving(1)
    waiting = asyncio.create_task(replica.wait_to_serve(min_policy_version=9))
    await asyncio.sleep(0)
    await replica.handle(Event.DRAIN)
    assert not await asyncio.wait_for(waiting, SECONDS)


async def test_the_verdict_on_a_swapped_version_is_waited_for() -> None:
    replica = await serving(1)
    assert await replica.wait_for_verdict(1)
    await replica.swapped(2)
    waiting = asyncio.create_task(replica.wait_for_verdict(2))
    await asyncio.sleep(0)
    assert not waiting.done()
    await replica.judged(2, is_confirmed=False)
    assert not await asyncio.wait_for(waiting, SECONDS)
    assert replica.state is State.STALE


async def test_a_version_replaced_without_a_verdict_counts_as_rejected() -> None:
    replica = await serving(1)
    await replica.swapped(2)
    await replica.swapped(3)
    assert not await asyncio.wait_for(replica.wait_for_verdict(2), SECONDS)


async def test_a_version_published_again_after_a_resume_needs_a_new_verdict() -> None:
    replica = await serving(5)
    await replica.swapped(3)
    await replica.judged(3, is_confirmed=True)
    await replica.swapped(5)
    waiting = asyncio.create_task(replica.wait_for_verdict(5))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_a_verdict_on_weights_that_are_not_loaded_is_refused() -> None:
    replica = await serving(1)
    with pytest.raises(ValueError, match="version 7 is not loaded; 1 is"):
        await replica.judged(7, is_confirmed=True)


async def test_an_outdated_replica_waits_until_it_hears_otherwise_or_is_refitted() -> None:
    replica = await serving(1)
    await replica.heed(is_outdated=True, claims_from=0)
    waits = [
        asyncio.create_task(replica.wait_to_claim()),
        asyncio.create_task(replica.wait_to_serve(min_policy_version=0)),
    ]
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    assert replica.state is State.SERVING
    await replica.heed(is_outdated=False, claims_from=0)
    assert await asyncio.wait_for(asyncio.gather(*waits), SECONDS) == [True, True]
    await replica.heed(is_outdated=True, claims_from=0)
    await replica.swapped(2)
    await replica.judged(2, is_confirmed=True)
    assert await asyncio.wait_for(replica.wait_to_claim(), SECONDS)


async def test_a_replica_that_needs_a_newer_version_claims_nothing_and_serves_what_it_has() -> None:
    replica = await serving(1)
    await replica.heed(is_outdated=False, claims_from=2)
    claiming = asyncio.create_task(replica.wait_to_claim())
    assert await asyncio.wait_for(replica.wait_to_serve(min_policy_version=1), SECONDS)
    assert not claiming.done()
    await replica.handle(Event.DRAIN)
    assert not await asyncio.wait_for(claiming, SECONDS)


async def test_how_long_a_version_was_served_is_known_afterwards() -> None:
    replica = await serving(3)
    assert replica.served_until(4) == -math.inf
    before = time.monotonic()
    assert replica.served_until(3) >= before
    await replica.swapped(4)
    left = time.monotonic()
    assert before <= replica.served_until(3) == replica.served_until(0) <= left
    await replica.judged(4, is_confirmed=True)
    assert replica.served_until(3) >= left
