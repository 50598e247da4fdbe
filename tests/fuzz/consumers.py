"""Hostile entries on the way that real ones take: through the sampler and the learner's inbox.

What a decoder lets pass still meets the engine's requests, the ledger and the evaluation.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

from google.protobuf.message import DecodeError

from protos import trajectory_pb2
from services.learner.evaluation import Evaluation
from services.rollout.replica import Event
from shared.codec import encode_prompt_group, encode_scored_group
from shared.memory_stream import MemoryStream
from shared.records import Purpose
from tests.factories import make_prompt, make_scored
from tests.fuzz.payloads import payload
from tests.learner import test_inbox as inbox
from tests.rollout import scene as rollout

_AT_A_TIME = 32
_DONE_SECONDS = 60.0


async def attack_sampler(draw: random.Random, count: int) -> None:
    """Prompt groups; each is sampled or buried, and a good one is sampled after them."""
    scene = rollout.Scene(max_concurrent_groups=8)
    await scene.replica.handle(Event.READY)
    await scene.serve(0)
    seeds = [encode_prompt_group(make_prompt(index)) for index in range(4)]
    running = asyncio.create_task(scene.sampler.run())
    try:
        for _ in range(0, count, _AT_A_TIME):
            for _ in range(_AT_A_TIME):
                data = payload(draw, trajectory_pb2.PromptGroup, seeds)
                if not _waits_for_ever(data):
                    await scene.prompts.put(data)
            await _until_done(scene, running)
            await _clear(scene.rollouts, scene.dead)
        await scene.prompts.put(seeds[0])
        await _until_done(scene, running)
        assert len(await scene.results()) == 1
    finally:
        running.cancel()
        await asyncio.wait({running})


def _waits_for_ever(data: bytes) -> bool:
    """A version that the learner never brings: that wait is the replica's to show, not to end."""
    try:
        return trajectory_pb2.PromptGroup.FromString(data).min_policy_version > 0
    except DecodeError:
        return False


async def _until_done(scene: rollout.Scene, running: asyncio.Task[None]) -> None:
    async with asyncio.timeout(_DONE_SECONDS):
        while (depth := await scene.prompts.depth()).waiting + depth.pending:
            assert not running.done(), running
            await asyncio.sleep(0.001)


async def _clear(*streams: MemoryStream) -> None:
    for stream in streams:
        entries = await stream.claim("reader", count=64, wait_seconds=0.0)
        await stream.acknowledge([entry.id for entry in entries])


async def attack_inbox(draw: random.Random, count: int) -> None:
    """Scored groups; each is taken, dropped or buried, and a good one is taken after them."""
    scene = inbox.Scene()
    scene.evaluator._under_way[1] = Evaluation(0, 0.0)
    await scene.feeder.fill(policy_version=0)
    trained = encode_scored_group(make_scored(0))
    evaluated = encode_scored_group(make_scored(0, epoch=1, purpose=Purpose.EVAL))
    for _ in range(0, count, _AT_A_TIME):
        for _ in range(_AT_A_TIME):
            data = payload(draw, trajectory_pb2.ScoredGroup, [trained, trained, evaluated])
            await scene.scored.put(data)
        await _take(scene, _AT_A_TIME)
        await _clear(scene.dead, scene.prompts)
        await scene.feeder.fill(policy_version=0)
    epoch, index = divmod(min(scene.ledger.outstanding), scene.ledger.num_problems)
    await scene.scored.put(encode_scored_group(make_scored(index, epoch=epoch)))
    assert await _take(scene, 1) == [index]


async def _take(scene: inbox.Scene, count: int) -> list[int]:
    """Indices of what can be trained on, until nothing is left or there are so many."""
    taken: list[int] = []
    with suppress(inbox.WaitedError):
        async with asyncio.timeout(_DONE_SECONDS):
            while len(taken) < count:
                batch = await scene.inbox.take_batch(
                    1, policy_version=0, while_waiting=inbox.give_up
                )
                uids = [group.rollout.prompt.uid for group in batch]
                for uid in uids:
                    scene.ledger.finish(scene.ledger.position(uid))
                taken += [uid.index for uid in uids]
    await scene.inbox.acknowledge()
    return taken
