from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.rollout.replica import Event
from shared.codec import encode_prompt_group
from shared.dead_letters import decode_dead_letter
from tests.factories import make_prompt
from tests.rollout.scene import Scene, until


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    await made.replica.handle(Event.READY)
    running = asyncio.create_task(made.sampler.run())
    yield made
    running.cancel()


async def test_a_replica_that_does_not_serve_claims_nothing(scene: Scene) -> None:
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await scene.replica.swapped(0)
    await asyncio.sleep(0.01)
    assert (await scene.prompts.depth()).waiting == 1
    assert scene.engine.requests == []


async def test_a_group_is_sampled_and_handed_on_once(scene: Scene) -> None:
    await scene.serve()
    prompt = make_prompt(3, group_size=2)
    await scene.prompts.put(encode_prompt_group(prompt))
    await until(lambda: scene.sampler.groups_sampled)
    (result,) = await scene.results()
    assert result.prompt == prompt
    assert len(result.completions) == 2
    assert (await scene.prompts.depth()).pending == 0


async def test_no_more_groups_are_in_flight_than_allowed(scene: Scene) -> None:
    scene.engine.allow.clear()
    await scene.serve()
    for index in range(5):
        await scene.prompts.put(encode_prompt_group(make_prompt(index)))
    await until(lambda: len(scene.engine.requests) == 4)
    assert scene.sampler.groups_in_flight == 2
    assert (await scene.prompts.depth()).waiting == 3
    scene.engine.allow.set()
    await until(lambda: scene.sampler.groups_sampled == 5)


async def test_a_completion_that_saw_two_versions_is_counted_and_keeps_both(scene: Scene) -> None:
    scene.engine.allow.clear()
    await scene.serve(0)
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await until(lambda: scene.engine.requests)
    await scene.serve(1)
    scene.engine.allow.set()
    await until(lambda: scene.sampler.groups_sampled)
    (result,) = await scene.results()
    assert [run.policy_version for run in result.completions[0].version_runs] == [0, 1]
    assert scene.sampler.mixed_version_completions == 2


async def test_tokens_of_weights_that_the_learner_rejected_are_never_handed_on(
    scene: Scene,
) -> None:
    scene.engine.allow.clear()
    await scene.serve(0)
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await until(lambda: len(scene.engine.requests) == 2)
    scene.engine.policy_version = 1
    await scene.replica.swapped(1)
    scene.engine.allow.set()
    await asyncio.sleep(0.01)
    assert await scene.results() == []
    await scene.replica.judged(1, is_confirmed=False)
    await scene.serve(2)
    await until(lambda: scene.sampler.groups_sampled)
    (result,) = await scene.results()
    versions = {run.policy_version for each in result.completions for run in each.version_runs}
    assert versions == {2}


async def test_requests_that_the_engine_gave_up_are_sampled_again(scene: Scene) -> None:
    scene.engine.failures = 1
    await scene.serve()
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await until(lambda: scene.sampler.groups_sampled)
    assert len(await scene.results()) == 1


async def test_when_one_completion_fails_the_others_of_its_group_are_cancelled(
    scene: Scene,
) -> None:
    scene.engine.allow.clear()
    await scene.serve()
    await scene.prompts.put(encode_prompt_group(make_prompt(group_size=2)))
    await until(lambda: len(scene.engine.requests) == 2)
    await scene.replica.handle(Event.DRAIN)
    scene.engine.failures = 1
    scene.engine.allow.set()
    await until(lambda: scene.sampler.groups_in_flight == 0)
    assert await scene.results() == []
    assert (await scene.prompts.depth()).pending == 1


async def test_a_poison_entry_goes_to_dead_letter_and_the_loop_goes_on(scene: Scene) -> None:
    await scene.serve()
    await scene.prompts.put(b"poison")
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await until(lambda: scene.sampler.groups_sampled)
    (letter,) = map(decode_dead_letter, await scene.dead.peek())
    assert (letter.stream, letter.payload, letter.deliveries) == ("prompts", b"poison", 1)
    assert letter.error


async def test_a_group_that_fails_every_time_goes_to_dead_letter(scene: Scene) -> None:
    scene.engine.failures = 99
    await scene.serve()
    payload = encode_prompt_group(make_prompt(group_size=1))
    await scene.prompts.put(payload)
    await until(lambda: len(scene.dead._messages) == 1)
    (letter,) = map(decode_dead_letter, await scene.dead.peek())
    assert (letter.payload, letter.error) == (payload, "failed 3 times: given up")


async def test_what_this_name_left_pending_is_sampled_first(scene: Scene) -> None:
    for index in range(2):
        await scene.prompts.put(encode_prompt_group(make_prompt(index)))
    await scene.prompts.claim("rollout-0", count=1, wait_seconds=0)
    await scene.serve()
    await until(lambda: scene.sampler.groups_sampled == 2)
    assert [each.prompt.uid.index for each in await scene.results()] == [0, 1]


async def test_a_group_of_a_dead_replica_is_adopted(scene: Scene) -> None:
    await scene.prompts.put(encode_prompt_group(make_prompt()))
    await scene.prompts.claim("rollout-9", count=1, wait_seconds=0)
    await scene.serve()
    await scene.sampler.adopt(idle_seconds=0.0, alive={"rollout-0"})
    await until(lambda: scene.sampler.groups_sampled)
    assert len(await scene.results()) == 1


async def test_draining_finishes_what_is_in_flight_and_claims_nothing_more(scene: Scene) -> None:
    scene.engine.allow.clear()
    await scene.serve()
    for index in range(4):
        await scene.prompts.put(encode_prompt_group(make_prompt(index)))
    await until(lambda: scene.sampler.groups_in_flight == 2)
    await scene.replica.handle(Event.DRAIN)
    scene.engine.allow.set()
    await until(lambda: scene.sampler.groups_in_flight == 0)
    assert len(await scene.results()) == 2
    assert (await scene.prompts.depth()).waiting == 2
