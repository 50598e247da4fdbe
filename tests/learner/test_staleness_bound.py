"""Whatever comes in whatever order: nothing over the bound is taken, nothing dropped is lost."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.learner.inbox import group_staleness
from shared.memory_stream import MemoryStream
from shared.records import ScoredGroup
from shared.stream import Entry
from tests.factories import make_scored
from tests.learner.test_inbox import Scene, WaitedError, give_up

MAX_STALENESS = 1
"""Of the scene's run file."""

NUM_OUT = 4
"""Groups that admission lets out: two batches of two."""


class Impatient(MemoryStream):
    """Answers at once that there is nothing."""

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        return await super().claim(consumer, count=count, wait_seconds=0.0)


versions = st.integers(0, 6)
arrivals = st.lists(
    st.builds(
        lambda index, attempt, runs: make_scored(index, attempt=attempt, versions=runs),
        st.integers(0, NUM_OUT - 1),
        st.integers(0, 2),
        st.tuples(versions, versions),
    ),
    max_size=12,
)


async def take_what_comes(arrived: list[ScoredGroup], policy_version: int) -> None:
    scene = Scene(
        scored=Impatient(name="scored", capacity=64),
        prompts=Impatient(name="prompts", capacity=64),
    )
    await scene.feeder.fill(policy_version=policy_version)
    await scene.arrive(*arrived)
    taken: list[ScoredGroup] = []
    try:
        while True:
            batch = await scene.inbox.take_batch(
                1, policy_version=policy_version, while_waiting=give_up
            )
            for group in batch:
                scene.ledger.finish(scene.ledger.position(group.rollout.prompt.uid))
            taken += batch
    except WaitedError:
        pass
    assert all(group_staleness(group, policy_version) <= MAX_STALENESS for group in taken)
    places = [group.rollout.prompt.uid.index for group in taken]
    assert len(places) == len(set(places))
    assert sum(scene.inbox.dropped.values()) + len(taken) == len(arrived)

    # Each place that is not trained has one attempt more than it lost to staleness, and all of
    # the attempts were issued, each once.
    issued = Counter((uid.index, uid.attempt) for uid in await scene.issued())
    assert set(issued.values()) <= {1}
    for index in range(NUM_OUT):
        attempts = sorted(attempt for place, attempt in issued if place == index)
        assert attempts == list(range(expected_attempts(arrived, index, policy_version)))
        assert (index in places) != (index in scene.ledger.outstanding)


def expected_attempts(arrived: list[ScoredGroup], index: int, policy_version: int) -> int:
    """By the rule in words: a stale arrival of the newest attempt, or a later one, brings one."""
    newest = 0
    for group in arrived:
        uid = group.rollout.prompt.uid
        if uid.index != index:
            continue
        if group_staleness(group, policy_version) <= MAX_STALENESS:
            break
        newest += uid.attempt >= newest
    return newest + 1


@given(arrived=arrivals, policy_version=versions)
def test_no_group_over_the_bound_is_taken_and_each_drop_is_issued_again_once(
    arrived: list[ScoredGroup], policy_version: int
) -> None:
    asyncio.run(take_what_comes(arrived, policy_version))
