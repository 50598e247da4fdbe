from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from services.learner.reader import Reader
from shared.errors import StreamError
from shared.memory_stream import MemoryStream
from shared.records import Outcome, ScoredGroup
from shared.stream import Entry
from tests.factories import make_scored
from tests.learner.test_inbox import SOLVED, Scene, WaitedError, give_up

PATIENCE_SECONDS = 120.0


class FailingStream(MemoryStream):
    """Does not answer a claim: fails at the first, or hangs at each."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__(name="scored", capacity=8)
        self._hangs = hangs
        self.is_asked = asyncio.Event()

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        if self._hangs:
            self.is_asked.set()
            await asyncio.Event().wait()
        if not self.is_asked.is_set():
            self.is_asked.set()
            raise StreamError("the server is away")
        return await super().claim(consumer, count=count, wait_seconds=wait_seconds)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not is_so():
            await asyncio.sleep(0.001)


async def until_ahead(scene: Scene, count: int) -> None:
    """So many are claimed, and decoded."""
    await until(lambda: len(scene.inbox._reader.ahead) == count)


@pytest.fixture
async def scene() -> Scene:
    made = Scene(run=Scene.run.replace("max_staleness = 1", "max_staleness = 3"))
    await made.feeder.fill(policy_version=0)
    return made


def ignore(_: Sequence[ScoredGroup]) -> None:
    """What a test does with a guess that it does not look at."""


def pass_by() -> None:
    """What a test does when all is read that there is room for."""


def unjudged(*indices: int) -> list[ScoredGroup]:
    return [make_scored(index, outcomes=(Outcome.ERROR, Outcome.ERROR)) for index in indices]


async def test_what_comes_meanwhile_is_made_ready_up_to_the_bound(scene: Scene) -> None:
    with scene.inbox.reading_ahead(2, then=ignore):
        await scene.arrive(make_scored(1))
        await until_ahead(scene, 1)
        await scene.arrive(make_scored(0), make_scored(2))
        await until_ahead(scene, 2)
        await until(scene.inbox._reader._reading.done)  # type: ignore[union-attr]
    depth = await scene.scored.depth()
    assert (depth.pending, depth.waiting) == (2, 1)
    assert await scene.take(count=3) == [1, 0, 2]


async def test_nothing_is_decided_of_what_is_read_ahead_before_it_is_taken(scene: Scene) -> None:
    await scene.arrive(make_scored(0), make_scored(1, versions=(3, 3)), *unjudged(2))
    await scene.arrive(make_scored(3, versions=(3, 3)))
    with scene.inbox.reading_ahead(4, then=ignore):
        await until_ahead(scene, 4)
        before = scene.ledger.state_dict()
        scene.ledger.finish(1)  # the step under way ends, and had another attempt of it
    assert (scene.inbox.dropped, before["outstanding"][1]) == ({}, (1, 0))
    assert scene.inbox.num_unacknowledged == 0
    assert await scene.take(policy_version=3, count=1) == [3]
    assert scene.inbox.dropped == {"stale": 1, "duplicate": 1, "incomplete_group": 1}


async def test_what_was_read_ahead_and_not_taken_is_read_again_in_its_place(scene: Scene) -> None:
    await scene.arrive(make_scored(1), make_scored(0), make_scored(3))
    assert await scene.take(count=1) == [1]
    with scene.inbox.reading_ahead(2, then=ignore):
        await until_ahead(scene, 2)
    await scene.inbox.acknowledge()
    assert (await scene.scored.depth()).pending == 2
    await scene.inbox.close()
    await scene.arrive(make_scored(2))
    scene.inbox = scene.make_inbox()
    await scene.inbox.recover()
    with scene.inbox.reading_ahead(3, then=ignore):
        await until_ahead(scene, 3)
    assert await scene.take(count=3) == [0, 3, 2]


async def test_the_next_batch_is_guessed_once_it_is_there(scene: Scene) -> None:
    guesses: list[list[int]] = []

    def guess(groups: Sequence[ScoredGroup]) -> None:
        guesses.append([group.rollout.prompt.uid.index for group in groups])

    with scene.inbox.reading_ahead(2, then=guess):
        await scene.arrive(make_scored(1))
        await until_ahead(scene, 1)
        assert guesses == []
        await scene.scored.put(b"poison")
        await scene.arrive(make_scored(0), make_scored(2))
        await until(lambda: guesses == [[1, 0]])
    assert await scene.take() == [1, 0]
    with scene.inbox.reading_ahead(2, then=guess):
        await until_ahead(scene, 1)
    await scene.arrive(make_scored(3))
    assert await scene.take() == [2, 3]
    assert guesses == [[1, 0]]  # of a batch that came too late none is made


async def test_a_guess_leaves_out_what_teaches_nothing(scene: Scene) -> None:
    scene = Scene(replace_degenerate=True, max_degenerate_batches=9)
    await scene.feeder.fill(policy_version=0)
    guesses: list[Sequence[ScoredGroup]] = []
    with scene.inbox.reading_ahead(2, then=guesses.append):
        await scene.arrive(make_scored(1, outcomes=SOLVED), make_scored(0), make_scored(2))
        await until(lambda: len(guesses) == 1)
    assert [group.rollout.prompt.uid.index for group in guesses[0]] == [0, 2]
    assert await scene.take() == [0, 2]
    with scene.inbox.reading_ahead(2, then=guesses.append):
        await scene.arrive(*(make_scored(index, outcomes=SOLVED) for index in range(4, 8)))
        await until(scene.inbox._reader._reading.done)  # type: ignore[union-attr]
    assert (await scene.scored.depth()).pending == 7  # no more is read for a guess
    assert len(guesses) == 1


async def test_each_step_reads_ahead_anew(scene: Scene) -> None:
    for first in (0, 2, 4, 6):
        await scene.arrive(make_scored(first), make_scored(first + 1))
        with scene.inbox.reading_ahead(2, then=ignore):
            await until_ahead(scene, 2)
        assert await scene.take() == [first, first + 1]


async def test_a_claim_that_outlasts_the_batch_does_not_end_the_reading_for_good(
    scene: Scene,
) -> None:
    await scene.arrive(make_scored(0), make_scored(1))
    with scene.inbox.reading_ahead(3, then=ignore):
        await until_ahead(scene, 2)
    assert await scene.take() == [0, 1]
    await scene.arrive(make_scored(2))
    await until_ahead(scene, 1)
    with scene.inbox.reading_ahead(2, then=ignore):
        await scene.arrive(make_scored(3))
        await until_ahead(scene, 2)
    assert await scene.take() == [2, 3]


async def test_a_claim_under_way_at_the_end_of_a_step_serves_the_batch(scene: Scene) -> None:
    with scene.inbox.reading_ahead(2, then=ignore):
        await asyncio.sleep(0)  # it has asked, and waits
    await scene.arrive(make_scored(0), make_scored(1))
    assert await scene.take() == [0, 1]
    assert (await scene.scored.depth()).pending == 2


async def test_an_entry_that_cannot_be_read_is_buried_when_its_turn_comes(scene: Scene) -> None:
    await scene.scored.put(b"poison")
    await scene.arrive(make_scored(0), make_scored(1))
    with scene.inbox.reading_ahead(3, then=ignore):
        await until_ahead(scene, 3)
    assert await scene.dead.peek() == []
    assert await scene.take() == [0, 1]
    assert len(await scene.dead.peek()) == 1


async def test_an_error_met_ahead_is_raised_where_a_batch_is_taken_and_not_during_the_step() -> (
    None
):
    stream = FailingStream(hangs=False)
    reader = Reader(stream, vocabulary=1000, max_length=32, lost_seconds=30.0)
    for _ in range(2):  # a second step does not forget it
        with reader.reading_ahead(lambda ahead: 2 - len(ahead), then=pass_by):
            await stream.is_asked.wait()
            await until(reader._reading.done)  # type: ignore[union-attr]
    with pytest.raises(StreamError, match="away"):
        await reader.next(2)


async def test_a_server_that_hangs_keeps_nobody_from_hearing_of_a_stop() -> None:
    scored: Any = FailingStream(hangs=True)
    scene = Scene(scored=scored)
    with scene.inbox.reading_ahead(2, then=ignore):
        await scored.is_asked.wait()
    with pytest.raises(WaitedError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await scene.inbox.take_batch(2, policy_version=0, while_waiting=give_up)
    await scene.inbox.close()


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_batches_are_those_of_a_reader_that_does_not_read_ahead(count: int) -> None:
    taken = []
    for reads_ahead in (False, True):
        scene = Scene(replace_degenerate=True, max_degenerate_batches=1)
        await scene.feeder.fill(policy_version=0)
        groups = [make_scored(index, outcomes=SOLVED) for index in (0, 3)]
        groups += [make_scored(index, versions=(2, 1)) for index in (1, 2, 1, 4, 5)]
        await scene.arrive(*groups)
        batches = []
        for version in (1, 2):
            batches.append(await scene.take(policy_version=version))
            if reads_ahead and version == 1:
                with scene.inbox.reading_ahead(count, then=ignore):
                    await until_ahead(scene, min(count, len(groups) - 4))
            for index in batches[-1]:
                scene.ledger.finish(index)
            await scene.feeder.fill(policy_version=version)
        issued = [(uid.index, uid.attempt) for uid in await scene.issued()]
        taken.append((batches, scene.inbox.dropped, issued, scene.ledger.state_dict()))
    assert taken[0] == taken[1]
