"""A living replica that cannot sample what it holds leaves it to others, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.rollout.replica import Event, State
from shared.codec import encode_prompt_group
from shared.lease import Registry
from shared.metrics.rollout import ROLLOUT_GIVEN_BACK
from shared.records import Purpose
from shared.redis_stream import Streams
from shared.stream import NOBODY, Holder
from tests.factories import make_prompt
from tests.rollout import test_stall
from tests.rollout.scene import Scene, until
from tests.rollout.simulated import Simulation

SECONDS = 0.06
LOOKS = 8
"""Of a replica, in which it would have given back what it was going to."""


@asynccontextmanager
async def at_work(scene: Scene) -> AsyncIterator[Scene]:
    await scene.replica.handle(Event.READY)
    running = asyncio.create_task(scene.sampler.run())
    try:
        yield scene
    finally:
        running.cancel()


def make_scene(**choices: Any) -> Scene:
    return Scene(**{"reclaim_seconds": SECONDS, "announced": 0, "max_staleness": 1, **choices})


@pytest.fixture
async def sick() -> AsyncIterator[Scene]:
    """A replica that serves version 0 and samples two groups, which do not end."""
    async with at_work(make_scene(partial_tokens=4)) as scene:
        scene.engine.allow.clear()
        await scene.serve(0)
        for index in range(2):
            await scene.prompts.put(encode_prompt_group(make_prompt(index)))
        await until(lambda: len(scene.engine.running) == 4)
        yield scene


@asynccontextmanager
async def healthy_beside(sick: Scene, version: int) -> AsyncIterator[Scene]:
    other = make_scene(
        name="rollout-1",
        prompts=sick.prompts,
        rollouts=sick.rollouts,
        dead=sick.dead,
        store=sick.partials,
        partial_tokens=4,
        announced=version,
    )
    async with at_work(other):
        await other.serve(version)
        yield other


async def adopt(*scenes: Scene) -> None:
    """As `adopting_orphans` does: all of them hold leases."""
    for scene in scenes:
        await scene.sampler.adopt(idle_seconds=SECONDS, alive={"rollout-0", "rollout-1"})


async def sampled_by(healthy: Scene, count: int, *others: Scene) -> None:
    async with asyncio.timeout(60.0):
        while healthy.sampler.groups_sampled < count:
            await adopt(*others, healthy)
            await asyncio.sleep(0.005)


def holders(scene: Scene) -> list[tuple[str, int] | None]:
    """Who has each entry of `prompts`, after how many deliveries."""
    return [scene.prompts.delivery(id) for id in scene.prompts._messages]


async def looks(scene: Scene) -> None:
    """Let the replica look at what was announced a number of times."""
    before = scene.times_asked
    await until(lambda: scene.times_asked >= before + LOOKS)


async def saved(scene: Scene, num_tokens: int) -> None:
    """Until the store holds so many tokens of every completion."""
    async with asyncio.timeout(60.0):
        for entry in await scene.prompts.browse():
            lengths: list[int] = []
            while lengths != [num_tokens] * 2:
                await asyncio.sleep(0.01)
                kept = await scene.partials.load(entry)
                lengths = [len(each.token_ids) for each in kept.values()]


async def reject(scene: Scene, version: int) -> None:
    """The canary of this version differs, as with a damaged GPU."""
    scene.engine.policy_version = version
    await scene.replica.swapped(version)
    await scene.replica.judged(version, is_confirmed=False)


async def test_groups_of_a_replica_whose_canary_fails_are_gone_on_with_by_another(
    sick: Scene,
) -> None:
    given_back = ROLLOUT_GIVEN_BACK._value.get()
    sick.engine.emit(5)
    await saved(sick, 5)
    await reject(sick, 1)
    sick.engine.emit(2)
    sick.announced = 1
    async with healthy_beside(sick, 1) as healthy:
        await sampled_by(healthy, 2, sick)
        results = await healthy.results()
    assert {each.replica for each in results} == {"rollout-1"}
    for each in results:
        for completion in each.completions:
            runs = [(run.policy_version, run.num_tokens) for run in completion.version_runs]
            assert runs == [(0, 5), (1, 1)], "what was confirmed is kept, what was rejected is not"
    assert sick.sampler.groups_in_flight == 0
    assert sick.engine.running == {}
    assert ROLLOUT_GIVEN_BACK._value.get() - given_back == 2


async def test_what_is_given_back_costs_no_attempt(sick: Scene) -> None:
    await reject(sick, 1)
    await until(lambda: holders(sick) == [(NOBODY, 0)] * 2)
    assert await sick.dead.peek() == []


async def test_it_claims_and_adopts_nothing_until_it_serves_again(sick: Scene) -> None:
    await reject(sick, 1)
    await until(lambda: holders(sick) == [(NOBODY, 0)] * 2)
    await sick.prompts.put(encode_prompt_group(make_prompt(2)))
    await adopt(sick)
    await looks(sick)
    assert holders(sick) == [(NOBODY, 0)] * 2 + [None]
    sick.engine.allow.set()
    await sick.serve(2)
    sick.announced = 2
    await sampled_by(sick, 3)
    assert await sick.dead.peek() == []


async def test_a_replica_that_serves_keeps_what_it_samples_however_long(sick: Scene) -> None:
    await looks(sick)
    sick.announced = 1  # within the bound
    await looks(sick)
    assert holders(sick) == [("rollout-0", 1)] * 2


async def test_a_short_while_without_serving_is_no_reason(sick: Scene) -> None:
    sick.sampler._reclaim_seconds = 3600.0
    await reject(sick, 1)
    await sick.sampler._give_back()
    assert holders(sick) == [("rollout-0", 1)] * 2


async def test_nothing_is_given_back_before_the_learner_has_announced_a_version(
    sick: Scene,
) -> None:
    sick.announced = None
    await looks(sick)
    await reject(sick, 0)
    await looks(sick)
    assert holders(sick) == [("rollout-0", 1)] * 2


async def test_a_draining_replica_finishes_what_it_has(sick: Scene) -> None:
    await sick.replica.handle(Event.DRAIN)
    await looks(sick)
    assert holders(sick) == [("rollout-0", 1)] * 2


async def test_a_replica_that_the_learner_left_behind_unheard_samples_nothing_more(
    sick: Scene,
) -> None:
    sick.announced = 2
    async with healthy_beside(sick, 2) as healthy:
        await until(lambda: sick.replica.is_outdated)
        assert sick.replica.state is State.SERVING
        await sampled_by(healthy, 2, sick)
        sick.engine.allow.set()
        await healthy.prompts.put(encode_prompt_group(make_prompt(2)))
        await sampled_by(healthy, 3, sick)
        await sick.serve(2)
        assert not sick.replica.is_outdated
    await sick.prompts.put(encode_prompt_group(make_prompt(3)))
    await until(lambda: sick.sampler.groups_sampled == 1)


async def test_a_replica_of_weights_that_a_resumed_learner_has_lost_samples_nothing_more(
    sick: Scene,
) -> None:
    await sick.serve(9)
    sick.announced = 9
    await looks(sick)
    assert holders(sick) == [("rollout-0", 1)] * 2
    sick.announced = 7
    await until(lambda: holders(sick) == [(NOBODY, 0)] * 2)
    says = "serving, has version 9 of 7"
    await until(lambda: says in sick.sampler.report().sentence)
    sick.announced = 8
    await until(lambda: not sick.replica.is_outdated)


async def test_a_version_that_is_not_announced_yet_is_no_lost_one(sick: Scene) -> None:
    sick.sampler._announced._patience_seconds = 3600.0
    await sick.serve(2)
    await looks(sick)
    assert not sick.replica.is_outdated


async def test_an_evaluation_that_waits_for_a_version_in_vain_goes_to_who_has_it() -> None:
    """The run is over but for it: the learner does not reach this replica, which holds it."""
    async with at_work(make_scene(max_staleness=5, announced=None)) as sick:
        await sick.serve(1)
        sick.engine.allow.clear()
        await sick.prompts.put(encode_prompt_group(make_prompt(0)))
        wanted = make_prompt(1, epoch=2, purpose=Purpose.EVAL, min_policy_version=2)
        await sick.prompts.put(encode_prompt_group(wanted))
        await until(lambda: sick.sampler.groups_in_flight == 2)
        sick.announced = 2
        await until(lambda: holders(sick) == [("rollout-0", 1), (NOBODY, 0)])
        await sick.prompts.put(encode_prompt_group(make_prompt(2)))
        await adopt(sick)
        await looks(sick)
        assert holders(sick) == [("rollout-0", 1), (NOBODY, 0), None], "it claims no more"
        async with healthy_beside(sick, 2) as healthy:
            await sampled_by(healthy, 2, sick)
        assert holders(sick) == [("rollout-0", 1)]


async def test_groups_that_the_learner_took_back_give_their_places_to_others() -> None:
    """The learner resumed at version 0; of this replica's groups two are of a lost version."""
    async with at_work(make_scene(announced=None)) as scene:
        await scene.serve(9)
        for index in range(2):
            lost = make_prompt(index, epoch=10, purpose=Purpose.EVAL, min_policy_version=10)
            await scene.prompts.put(encode_prompt_group(lost))
        await until(lambda: scene.sampler.groups_in_flight == 2)
        await scene.prompts.acknowledge(list(scene.prompts._messages))
        await scene.serve(0)
        scene.announced = 0
        await scene.prompts.put(encode_prompt_group(make_prompt(0)))
        await until(lambda: scene.sampler.groups_sampled == 1)
        await until(lambda: scene.sampler.groups_in_flight == 0)


async def test_a_restarted_replica_that_never_serves_leaves_what_its_predecessor_had() -> None:
    scene = make_scene()
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await scene.prompts.claim("rollout-0", count=1, wait_seconds=0)
    async with at_work(scene), healthy_beside(scene, 0) as healthy:
        await sampled_by(healthy, 1, scene)


@pytest.mark.integration
async def test_a_replica_on_redis_hears_what_was_announced_and_gives_back(
    streams: Streams,
) -> None:
    run = f"{test_stall.RUN}[redis]\nreclaim_seconds = 0.3\n"
    simulation = Simulation(seconds_per_completion=3600.0)
    async with test_stall.running(streams, simulation, run=run) as scene:
        await scene.serve(0)
        await streams.prompts.put(encode_prompt_group(make_prompt()))
        await scene.until_it_says(r"samples 1 group, .*")
        await Registry(streams.client, prefix=streams.prefix).announce_version(9)
        await scene.until_it_says(r"waits for the learner for \d+ s: serving, has version 0 of 9")

        async def is_given_back() -> bool:
            return await streams.prompts.holders() == [Holder(NOBODY, 1, 0)]

        await test_stall.until(is_given_back)
