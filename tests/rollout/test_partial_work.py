"""Completions that were cut off are gone on with, token for token, or begun anew; never mixed."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.rollout.replica import Event
from shared.codec import encode_prompt_group
from shared.errors import StreamError
from shared.memory_partials import MemoryPartials
from shared.metrics.rollout import ROLLOUT_RESUMED_TOKENS
from shared.partials import Piece
from shared.records import Completion, PromptGroup
from shared.stream import Entry
from tests.factories import make_prompt
from tests.rollout.fake_engine import FIRST_ID
from tests.rollout.scene import Scene, until

PROMPT = make_prompt(group_size=2)
PROMPT_LENGTH = len(PROMPT.prompt_token_ids)


@asynccontextmanager
async def at_work(scene: Scene) -> AsyncIterator[asyncio.Task[None]]:
    await scene.replica.handle(Event.READY)
    scene.engine.allow.clear()
    running = asyncio.create_task(scene.sampler.run())
    try:
        yield running
    finally:
        running.cancel()


@pytest.fixture
async def first() -> AsyncIterator[Scene]:
    """A replica that saves every four tokens, and has begun a group with version 0."""
    scene = Scene(partial_tokens=4)
    async with at_work(scene):
        await scene.serve(0)
        await begin(scene)
        yield scene


async def begin(scene: Scene, prompt: PromptGroup = PROMPT) -> None:
    await scene.prompts.put(encode_prompt_group(prompt))
    await until(lambda: len(scene.engine.running) == prompt.group_size)


def second_of(first: Scene, *, partial_tokens: int = 4, max_staleness: int = 9) -> Scene:
    return Scene(
        name="rollout-1",
        prompts=first.prompts,
        rollouts=first.rollouts,
        dead=first.dead,
        store=first.partials,
        partial_tokens=partial_tokens,
        max_staleness=max_staleness,
    )


async def saved(scene: Scene, num_tokens: int) -> dict[int, Completion]:
    """What the store holds of the first entry, once it holds so many tokens of completion 0."""
    (entry,) = await scene.prompts.browse()
    async with asyncio.timeout(60.0):
        while True:
            found = await scene.partials.load(entry)
            if found and len(found[0].token_ids) >= num_tokens:
                return found
            await asyncio.sleep(0.01)


async def taken_over(second: Scene) -> None:
    await second.sampler.adopt(idle_seconds=0.0, alive={"rollout-1"})
    await until(lambda: second.sampler.groups_in_flight)


async def finished(scene: Scene) -> tuple[Completion, ...]:
    scene.engine.allow.set()
    await until(lambda: scene.sampler.groups_sampled)
    (result,) = await scene.results()
    for completion in result.completions:
        ids = completion.token_ids
        first_id = FIRST_ID + PROMPT_LENGTH
        assert list(ids) == list(range(first_id, first_id + len(ids))), "a gap, or tokens twice"
        assert completion.behaviour_logprobs == array("f", [-1.0 / id for id in ids])
        assert sum(run.num_tokens for run in completion.version_runs) == len(ids)
    return result.completions


def runs(completion: Completion) -> list[tuple[int, int]]:
    return [(run.policy_version, run.num_tokens) for run in completion.version_runs]


async def test_a_replica_goes_on_where_a_dead_one_stopped(first: Scene) -> None:
    first.engine.emit(5)
    await saved(first, 5)
    resumed = ROLLOUT_RESUMED_TOKENS._value.get()
    second = second_of(first)
    async with at_work(second):
        await second.serve(1)
        await taken_over(second)
        await until(lambda: len(second.engine.running) == 2)
        for request in second.engine.running.values():
            assert request.prompt[:PROMPT_LENGTH] == list(PROMPT.prompt_token_ids)
            assert len(request.prompt) == PROMPT_LENGTH + 5
            assert request.max_tokens == PROMPT.max_completion_tokens - 5
        assert ROLLOUT_RESUMED_TOKENS._value.get() - resumed == 10
        for completion in await finished(second):
            assert runs(completion) == [(0, 5), (1, 1)]
            assert not completion.is_truncated


async def test_what_a_draining_replica_does_not_finish_in_time_is_saved_and_left_to_others() -> (
    None
):
    first = Scene(partial_tokens=4, drain_seconds=0.5)
    async with at_work(first) as running:
        await first.serve(0)
        await begin(first)
        first.engine.emit(3)
        await first.replica.handle(Event.DRAIN)
        await asyncio.wait_for(running, 60.0)
    assert (await first.prompts.depth()).pending == 1
    second = second_of(first)
    async with at_work(second):
        await second.serve(0)
        await taken_over(second)
        for completion in await finished(second):
            assert runs(completion) == [(0, 4)]
    assert not await first.dead.peek()


async def test_equal_versions_are_one_run_over_the_seam(first: Scene) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    second = second_of(first)
    async with at_work(second):
        await second.serve(0)
        await taken_over(second)
        for completion in await finished(second):
            assert runs(completion) == [(0, 5)]


async def test_a_replica_that_was_only_thought_dead_does_not_mix_its_tokens_in(
    first: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    second = second_of(first)
    async with at_work(second):
        await second.serve(0)
        await taken_over(second)
        await until(lambda: second.engine.running)
        await first.serve(7)  # tells its tokens from those of the second
        first.engine.emit(4)
        await until(lambda: "is another replica's now" in caplog.text)
        second.engine.emit(4)
        assert runs((await saved(first, 8))[0]) == [(0, 8)]


async def test_completions_that_were_complete_are_kept_as_they_are(first: Scene) -> None:
    done, going_on = first.engine.running.values()
    done.versions += [0] * PROMPT.max_completion_tokens
    done.ends.set()
    await until(lambda: len(first.engine.running) == 1)
    going_on.versions += [0] * 4
    assert (await saved(first, PROMPT.max_completion_tokens))[0].is_truncated
    second = second_of(first)
    async with at_work(second):
        await second.serve(3)
        await taken_over(second)
        await until(lambda: second.engine.running)
        assert len(second.engine.running) == 1
        whole, gone_on_with = await finished(second)
        assert (runs(whole), whole.is_truncated) == ([(0, PROMPT.max_completion_tokens)], True)
        assert (runs(gone_on_with), gone_on_with.is_truncated) == ([(0, 4), (3, 1)], False)


async def test_a_group_that_was_complete_is_handed_on_without_the_engine(first: Scene) -> None:
    (entry,) = await first.prompts.browse()
    for request in first.engine.running.values():
        request.versions += [0] * PROMPT.max_completion_tokens
    pieces = [
        Piece(number, 0, request.tokens(0, is_truncated=True))
        for number, request in enumerate(first.engine.running.values())
    ]
    assert await first.partials.save(replace(entry, deliveries=1), pieces, consumer="rollout-0")
    second = second_of(first)
    async with at_work(second):
        await second.serve(1)
        await taken_over(second)
        completions = await finished(second)
        assert [runs(each) for each in completions] == [[(0, 8)], [(0, 8)]]
        assert second.engine.requests == []


async def test_off_means_that_every_token_comes_from_one_request(first: Scene) -> None:
    first.engine.emit(5)
    await saved(first, 5)
    second = second_of(first, partial_tokens=0)
    async with at_work(second):
        await second.serve(1)
        await taken_over(second)
        await until(lambda: len(second.engine.running) == 2)
        second.engine.emit(3)
        second.engine.failures = 1
        next(iter(second.engine.running.values())).ends.set()
        await until(lambda: len(second.engine.requests) == 4)
        assert second.engine.prompts == [list(PROMPT.prompt_token_ids)] * 4
        for completion in await finished(second):
            assert runs(completion) == [(1, 1)]


async def test_nothing_is_sampled_behind_tokens_of_rejected_weights(first: Scene) -> None:
    first.engine.emit(4)
    first.engine.policy_version = 1
    await first.replica.swapped(1)
    first.engine.emit(2)
    await saved(first, 4)
    await first.replica.judged(1, is_confirmed=False)
    await first.serve(2)
    first.engine.failures = 1
    next(iter(first.engine.running.values())).ends.set()
    await until(lambda: len(first.engine.requests) == 4)
    assert [len(each) for each in first.engine.prompts[2:]] == [PROMPT_LENGTH + 4] * 2
    for completion in await finished(first):
        assert runs(completion) == [(0, 4), (2, 1)]


async def test_short_completions_are_left_alone() -> None:
    scene = Scene(partial_tokens=PROMPT.max_completion_tokens + 1)
    async with at_work(scene):
        await scene.serve(0)
        await begin(scene)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("keep")]
        await finished(scene)


async def test_tokens_of_weights_that_were_not_confirmed_are_not_saved(first: Scene) -> None:
    first.engine.emit(4)
    first.engine.policy_version = 1
    await first.replica.swapped(1)
    first.engine.emit(2)
    assert {number: runs(each) for number, each in (await saved(first, 4)).items()} == {
        0: [(0, 4)],
        1: [(0, 4)],
    }
    await first.replica.judged(1, is_confirmed=False)
    await first.serve(2)
    first.engine.allow.set()
    for completion in await finished(first):
        assert runs(completion) == [(0, 4), (2, 1)], "the prefix is good, the rest is not"


async def test_what_was_saved_and_then_rejected_is_not_left_for_others(first: Scene) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    await first.replica.judged(0, is_confirmed=False)
    await first.serve(1)
    first.engine.allow.set()
    await until(lambda: len(first.engine.requests) > 2 or first.sampler.groups_sampled)
    for completion in await finished(first):
        assert runs(completion) == [(1, 1)]


async def test_tokens_too_old_to_be_trained_on_are_not_gone_on_from(first: Scene) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    second = second_of(first, max_staleness=2)
    async with at_work(second):
        await second.serve(3)
        await taken_over(second)
        await until(lambda: len(second.engine.running) == 2)
        second.engine.emit(5)
        (entry,) = await first.prompts.browse()
        async with asyncio.timeout(60.0):
            while any(
                runs(each) != [(3, 5)] for each in (await first.partials.load(entry)).values()
            ):
                await asyncio.sleep(0.01)
        for completion in await finished(second):
            assert runs(completion) == [(3, 5)] or runs(completion) == [(3, 6)]


async def test_a_request_that_the_engine_gave_up_goes_on_in_the_same_replica(first: Scene) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    first.engine.failures = 1
    first.engine.allow.set()
    await until(lambda: len(first.engine.requests) > 2)
    assert first.engine.prompts[-1][:-4] == list(PROMPT.prompt_token_ids)
    assert {count for each in await finished(first) for _, count in runs(each)} == {4, 5}


async def test_what_an_engine_sampled_last_is_saved_when_it_dies(first: Scene) -> None:
    first.engine.emit(3)  # less than an interval
    first.engine.die()
    assert runs((await saved(first, 3))[0]) == [(0, 3)]
    await until(lambda: not first.sampler.groups_in_flight)
    assert (await first.prompts.depth()).pending == 1, "left for another"
    assert await first.dead.peek() == []


async def test_nothing_is_left_in_the_store_of_a_group_that_is_done(first: Scene) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    (entry,) = await first.prompts.browse()
    await finished(first)
    await until(lambda: not first.sampler.groups_in_flight)
    assert await first.partials.load(entry) == {}


async def test_nor_of_one_that_was_given_up(first: Scene) -> None:
    first.engine.emit(4)
    await saved(first, 4)
    (entry,) = await first.prompts.browse()
    first.engine.failures = 99
    first.engine.allow.set()
    await until(lambda: first.dead._messages)
    await until(lambda: not first.sampler.groups_in_flight)
    assert await first.partials.load(entry) == {}


async def test_a_long_completion_whose_tokens_arrive_is_no_stall(first: Scene) -> None:
    await until(lambda: first.sampler.report().stuck_seconds > 0.1)
    emitted = time.monotonic()
    first.engine.emit(1)
    await until(lambda: first.sampler.report().stuck_seconds < time.monotonic() - emitted)


class Broken(MemoryPartials):
    """A store that is out of reach."""

    async def save(self, entry: Entry, pieces: object, *, consumer: str) -> bool:
        raise StreamError("out of memory")

    async def load(self, entry: Entry) -> dict[int, Completion]:
        raise StreamError("out of reach")


async def test_a_store_out_of_reach_stops_nothing() -> None:
    scene = Scene(partial_tokens=4)
    scene = Scene(partial_tokens=4, prompts=scene.prompts, store=Broken(scene.prompts))
    await scene.prompts.put(encode_prompt_group(PROMPT))
    await scene.prompts.claim("rollout-0", count=1, wait_seconds=0)
    async with at_work(scene):
        await scene.serve(0)
        await until(lambda: len(scene.engine.running) == 2)
        scene.engine.emit(4)
        await finished(scene)
