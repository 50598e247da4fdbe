"""A replica with a real vLLM is killed in the middle of its completions; another goes on.

The second engine's KV cache is small on purpose, so that it also shows what too many groups at a
time do to it, and what becomes of their number.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from services.rollout.announced import Announced
from services.rollout.concurrency import Change, Concurrency
from services.rollout.engine import VllmEngine
from services.rollout.keeper import Keeper
from services.rollout.replica import Event, Replica
from services.rollout.sampler import Sampler
from services.rollout.vllm_launch import EngineSettings
from shared.codec import decode_rollout_group, encode_prompt_group
from shared.lease import Registry
from shared.metrics.rollout import ROLLOUT_CONCURRENCY_CHANGES
from shared.records import Completion, PromptGroup, RolloutGroup, VersionRun
from shared.redis_partials import RedisPartials
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds
from tests.factories import make_prompt
from tests.integration.tiny_qwen import TOLERANCE, random_model, reference_logprobs

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 480
NUM_TOKENS = 400
GROUP_SIZE = 4
VERSION = 3
BOUNDS = Bounds(64, 1 << 20)
PATIENCE_SECONDS = 300.0


def settings_for(model: str, *, kv_cache_bytes: int) -> EngineSettings:
    return EngineSettings(
        model_path=model,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        max_num_seqs=64,
        seed=1,
        device="cpu",
        kv_cache_bytes=kv_cache_bytes,
    )


def make_sampler(
    engine: VllmEngine,
    streams: Streams,
    replica: Replica,
    *,
    name: str,
    concurrency: Concurrency,
    partials: RedisPartials | None = None,
    every_tokens: int = 16,
) -> Sampler:
    """A replica's sampler on real streams."""
    return Sampler(
        name=name,
        engine=engine,
        replica=replica,
        announced=Announced(
            Registry(streams.client, prefix=streams.prefix).announced_version,
            replica=replica,
            max_staleness=1,
            patience_seconds=30.0,
        ),
        prompts=streams.prompts,
        rollouts=streams.rollouts,
        dead_letter=streams.dead_letter,
        stop_token_ids=(),
        concurrency=concurrency,
        keeper=Keeper(
            partials or RedisPartials(streams.client, prefix=streams.prefix, stream="prompts"),
            consumer=name,
            replica=replica,
            every_tokens=every_tokens,
            max_staleness=1,
        ),
        max_attempts=3,
        reclaim_seconds=30.0,
        drain_seconds=30.0,
    )


async def serving() -> Replica:
    replica = Replica()
    await replica.handle(Event.READY)
    await replica.swapped(VERSION)
    await replica.judged(VERSION, is_confirmed=True)
    return replica


def prompt(index: int) -> PromptGroup:
    return replace(make_prompt(index, group_size=GROUP_SIZE), max_completion_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    random_model(11).save_pretrained(path)
    return str(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_path: str) -> AsyncIterator[VllmEngine]:
    """Its cache holds five completions of the longest kind, and so one group."""
    engine = await VllmEngine.start(settings_for(model_path, kv_cache_bytes=5 * 512 * 512))
    await engine.adopt_version(VERSION)
    yield engine
    await engine.shutdown()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():
            await asyncio.sleep(0.02)


async def rollouts_of(streams: Streams, count: int) -> list[RolloutGroup]:
    async def are_there() -> bool:
        return (await streams.rollouts.depth()).waiting == count

    await until(are_there)
    return [decode_rollout_group(payload) for payload in await streams.rollouts.peek()]


# The process kills itself, so that it surely dies in the middle, however fast the machine is.
VICTIM = """
    import asyncio, os, signal, sys
    from tests.integration.test_partial_work import *

    class Deadly(RedisPartials):
        async def save(self, entry, pieces, *, consumer):
            if await super().save(entry, pieces, consumer=consumer) and entry.id in self.seen:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.add(entry.id)
            return True

        seen = set()

    async def main():
        engine = await VllmEngine.start(settings_for(sys.argv[1], kv_cache_bytes=16 << 20))
        await engine.adopt_version(VERSION)
        async with open_streams(
            sys.argv[2], run_id=sys.argv[3], prompts=BOUNDS, groups=BOUNDS, timeout_seconds=30.0
        ) as streams:
            partials = Deadly(streams.client, prefix=streams.prefix, stream="prompts")
            concurrency = Concurrency(initial=1, maximum=1)
            await make_sampler(
                engine, streams, await serving(), name="victim", concurrency=concurrency,
                partials=partials,
            ).run()

    asyncio.run(main())
"""


async def test_kill_9_in_mid_completion_loses_no_token_that_was_saved(
    engine: VllmEngine, model_path: str, redis_url: str
) -> None:
    run_id = f"partial-{secrets.token_hex(4)}"
    async with open_streams(
        redis_url, run_id=run_id, prompts=BOUNDS, groups=BOUNDS, timeout_seconds=60.0
    ) as streams:
        partials = RedisPartials(streams.client, prefix=streams.prefix, stream="prompts")
        await streams.prompts.put(encode_prompt_group(prompt(0)))
        victim = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(VICTIM), model_path, redis_url, run_id], cwd=ROOT
        )
        try:
            status = await asyncio.to_thread(victim.wait, PATIENCE_SECONDS)
        finally:
            victim.kill()
        assert status == -signal.SIGKILL
        (entry,) = await streams.prompts.browse()
        before = await partials.load(entry)
        assert set(before) == set(range(GROUP_SIZE))
        assert all(16 <= len(each.token_ids) < NUM_TOKENS for each in before.values())

        replica = await serving()
        concurrency = Concurrency(initial=1, maximum=1)
        sampler = make_sampler(engine, streams, replica, name="second", concurrency=concurrency)
        running = asyncio.create_task(sampler.run())
        try:
            await sampler.adopt(idle_seconds=0.0, alive={"second"})
            (rollout,) = await rollouts_of(streams, 1)
        finally:
            await replica.handle(Event.DRAIN)
            await running
        assert await partials.load(entry) == {}

    for number, completion in enumerate(rollout.completions):
        assert_goes_on_from(completion, before[number])
        await assert_of_one_policy(engine, [1, 2, 3], completion)


def assert_goes_on_from(completion: Completion, before: Completion) -> None:
    count = len(before.token_ids)
    assert completion.token_ids[:count] == before.token_ids
    assert completion.behaviour_logprobs[:count] == before.behaviour_logprobs
    assert completion.version_runs == (VersionRun(VERSION, NUM_TOKENS),)
    assert completion.is_truncated


async def assert_of_one_policy(
    engine: VllmEngine, prompt_token_ids: list[int], completion: Completion
) -> None:
    """Every log-prob is that of the whole sequence, on either side of the seam."""
    whole = [*prompt_token_ids, *completion.token_ids]
    for scored in (await engine.score_tokens(whole), reference_logprobs(random_model(11), whole)):
        expected = scored[len(prompt_token_ids) - 1 :]
        assert list(completion.behaviour_logprobs) == pytest.approx(expected, abs=TOLERANCE)


async def test_a_replica_whose_kv_cache_is_too_small_takes_fewer_groups_at_a_time(
    engine: VllmEngine, redis_url: str
) -> None:
    assert 5 * 512 * 0.9 <= engine.kv_cache_tokens <= 5 * 512
    backed_off = {
        change: ROLLOUT_CONCURRENCY_CHANGES.labels(reason=change.value)._value.get()
        for change in Change
    }
    replica = await serving()
    concurrency = Concurrency(initial=6, maximum=8)
    async with open_streams(
        redis_url,
        run_id=f"pressure-{secrets.token_hex(4)}",
        prompts=BOUNDS,
        groups=BOUNDS,
        timeout_seconds=60.0,
    ) as streams:
        for index in range(8):
            await streams.prompts.put(encode_prompt_group(prompt(index)))
        sampler = make_sampler(engine, streams, replica, name="greedy", concurrency=concurrency)
        running = asyncio.create_task(sampler.run())
        try:
            rollouts = await rollouts_of(streams, 8)
        finally:
            await replica.handle(Event.DRAIN)
            await running
    assert len({rollout.prompt.uid for rollout in rollouts}) == 8
    changes = {
        change: ROLLOUT_CONCURRENCY_CHANGES.labels(reason=change.value)._value.get()
        - backed_off[change]
        for change in Change
    }
    assert sum(changes[each] for each in Change if each is not Change.ROOM) >= 1, changes
    assert concurrency.limit < 6, changes


async def test_what_an_engine_sampled_last_is_saved_when_it_dies(
    engine: VllmEngine, redis_url: str
) -> None:
    """The tokens are in the front end, which outlives its engine long enough."""
    replica = await serving()
    concurrency = Concurrency(initial=1, maximum=1)
    async with open_streams(
        redis_url,
        run_id=f"death-{secrets.token_hex(4)}",
        prompts=BOUNDS,
        groups=BOUNDS,
        timeout_seconds=60.0,
    ) as streams:
        partials = RedisPartials(streams.client, prefix=streams.prefix, stream="prompts")
        await streams.prompts.put(encode_prompt_group(prompt(0)))
        sampler = make_sampler(
            engine, streams, replica, name="last", concurrency=concurrency, every_tokens=NUM_TOKENS
        )
        running = asyncio.create_task(sampler.run())

        async def has_begun() -> bool:
            return engine.progress("last/1", start=16) is not None

        await until(has_begun)
        for process in engine.processes:
            process.kill()
        await asyncio.wait_for(running, PATIENCE_SECONDS)
        (entry,) = await streams.prompts.browse()
        saved = await partials.load(entry)
        assert len(saved[0].token_ids) > 16
        assert (await streams.prompts.depth()).pending == 1, "left for another"
        assert await streams.dead_letter.peek() == []
