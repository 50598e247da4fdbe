"""A server that is away for longer than the client repeats a call, or comes back with nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.errors import StreamError
from shared.lease import Registry
from shared.redis_connection import AWAY, Patience, connect
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds, Depth
from tests.test_redis_stream import Server

pytestmark = pytest.mark.integration

WIDE = Bounds(100_000, 1 << 30)
DEADLINE_SECONDS = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "redis")
    yield made
    made.end()


class Told:
    """What a patient caller was told."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []
        self.is_waiting = asyncio.Event()

    def __call__(self, seconds: float | None) -> None:
        self.waits.append(seconds)
        self.is_waiting.set()


@asynccontextmanager
async def opened(server: Server, told: Told, *, seconds: float = 300.0) -> AsyncIterator[Streams]:
    async with open_streams(
        server.url,
        run_id="r",
        prompts=WIDE,
        groups=WIDE,
        timeout_seconds=20.0,
        patience=Patience(server.url, seconds=seconds, told=told),
        retries=0,
    ) as streams:
        yield streams


async def test_a_call_waits_until_the_server_is_back_and_is_made_once(server: Server) -> None:
    await server.start()
    told = Told()
    async with opened(server, told) as streams, asyncio.timeout(DEADLINE_SECONDS):
        await streams.prompts.put(b"before")
        server.kill()
        waiting = asyncio.create_task(streams.prompts.put(b"a", label="train/0/1/0"))
        await told.is_waiting.wait()
        while len(told.waits) < 3:  # longer than one attempt
            await asyncio.sleep(0.05)
        assert not waiting.done()
        await server.start()
        assert await waiting
        assert await streams.prompts.peek() == [b"before", b"a"]
        assert list((await streams.prompts.labels()).values()) == ["train/0/1/0"]
    *waits, back = told.waits
    assert back is None
    assert waits == sorted(each for each in waits if each is not None)


async def test_patience_has_an_end_that_names_the_server_and_the_key(server: Server) -> None:
    await server.start()
    told = Told()
    async with opened(server, told, seconds=1.0) as streams:
        server.kill()
        with pytest.raises(StreamError, match=r"away for .*redis\.outage_seconds = 1 ") as caught:
            await streams.scored.claim("learner", count=1, wait_seconds=0.1)
    assert server.url in str(caught.value)
    assert told.waits


async def test_what_the_caller_raises_ends_the_wait(server: Server) -> None:
    await server.start()

    class EnoughError(Exception):
        pass

    def enough(seconds: float | None) -> None:
        raise EnoughError

    async with open_streams(
        server.url,
        run_id="r",
        prompts=WIDE,
        groups=WIDE,
        timeout_seconds=20.0,
        patience=Patience(server.url, seconds=300.0, told=enough),
        retries=0,
    ) as streams:
        server.kill()
        with pytest.raises(EnoughError):
            await streams.prompts.depth()


async def test_an_impatient_caller_is_told_at_once(server: Server) -> None:
    await server.start()
    told = Told()
    async with opened(server, told) as streams:
        server.kill()
        with pytest.raises(StreamError) as caught:
            await streams.impatient().prompts.depth()
        assert caught.value.status == AWAY
    assert told.waits == []


async def test_an_answer_that_waiting_does_not_change_is_an_error_at_once(server: Server) -> None:
    await server.start()
    told = Told()
    async with opened(server, told) as streams:
        await streams.client.delete(streams.prompts._key)
        await streams.client.set(streams.prompts._key, "not a stream")
        with pytest.raises(StreamError, match="WRONGTYPE"):
            await streams.prompts.put(b"a")
    assert told.waits == []


async def test_a_full_server_is_waited_for_like_one_that_is_away(server: Server) -> None:
    await server.start()
    told = Told()
    async with opened(server, told) as streams, asyncio.timeout(DEADLINE_SECONDS):
        for _ in range(20):
            await streams.prompts.put(b"x" * 10_000)
        client = connect(server.url)
        await client.config_set("maxmemory", 100_000)
        waiting = asyncio.create_task(streams.prompts.put(b"y"))
        await told.is_waiting.wait()
        await client.config_set("maxmemory", 0)
        await client.aclose()
        assert await waiting


async def test_leases_and_the_announced_version_wait_as_well(server: Server) -> None:
    await server.start()
    told = Told()
    async with opened(server, told) as streams, asyncio.timeout(DEADLINE_SECONDS):
        registry = Registry(streams.client, prefix=streams.prefix, patience=streams.patience)
        server.kill()
        announcing = asyncio.create_task(registry.announce_version(7))
        asking = asyncio.create_task(registry.members("rollout"))
        await told.is_waiting.wait()
        await server.start()
        await announcing
        assert await asking == []
        assert await registry.announced_version() == 7


async def test_a_lease_comes_back_by_itself_after_an_outage_and_after_a_wipe(
    server: Server,
) -> None:
    await server.start()
    async with opened(server, Told()) as streams, asyncio.timeout(DEADLINE_SECONDS):
        registry = Registry(streams.client, prefix=streams.prefix, patience=streams.patience)
        async with registry.hold(
            "rollout", "a", address="h:1", metrics_address="h:2", seconds=0.6
        ) as lease:
            for forgets in (False, True):
                server.kill()
                if forgets:
                    server.forget()
                await asyncio.sleep(1.0)  # the lease runs out
                await server.start()
                while not await registry.members("rollout"):
                    await asyncio.sleep(0.05)
            assert not lease.done()


async def test_a_service_ends_in_time_beside_a_server_that_does_not_answer(
    server: Server,
) -> None:
    await server.start()
    async with opened(server, Told()) as streams, asyncio.timeout(DEADLINE_SECONDS):
        registry = Registry(streams.client, prefix=streams.prefix, release_seconds=0.2)
        # Its socket's own deadline is half a minute, and as long again for each retry.
        async with asyncio.timeout(20.0):
            async with registry.hold(
                "verifier", "a", address="h:1", metrics_address="h:2", seconds=60.0
            ):
                server.freeze()


async def test_every_operation_goes_on_with_a_stream_that_was_wiped(server: Server) -> None:
    await server.start()
    async with opened(server, Told()) as streams:
        stream = streams.prompts

        async def nothing() -> object:
            entry = await stream.claim("one", count=1, wait_seconds=0.01)
            assert entry == []
            return await stream.pending("one")

        operations: list[Callable[[], Awaitable[object]]] = [
            nothing,
            stream.depth,
            stream.holders,
            stream.labels,
            stream.peek,
            lambda: stream.pending("one"),
            lambda: stream.reclaim("one", idle_seconds=0.0, alive=(), count=1),
        ]
        for ask in operations:
            await stream.put(b"x", label="train/0/0/0")
            await stream.claim("one", count=1, wait_seconds=0.1)
            await streams.client.flushall()
            found = await ask()
            assert not found or found == Depth(0, 0)
            assert await stream.put(b"after")
            (entry,) = await stream.claim("one", count=1, wait_seconds=60.0)
            assert entry.payload == b"after"
            await stream.acknowledge([entry.id])


async def test_the_server_s_name_changes_when_it_is_started_anew(server: Server) -> None:
    await server.start()
    async with opened(server, Told()) as streams:
        first = await streams.server()
        assert await streams.server() == first
        server.kill()
        await server.start()
        assert await streams.server() != first


async def test_a_cancelled_caller_ends_however_the_server_comes_and_goes(server: Server) -> None:
    """Python 3.11's wait_for can drop a cancellation; a service would then never end."""
    await server.start()
    async with opened(server, Told()) as streams:

        async def works() -> None:
            while True:
                await streams.prompts.put(b"x" * 1000)
                await streams.prompts.claim("one", count=1, wait_seconds=0.001)

        for _ in range(3):
            tasks = [asyncio.create_task(works()) for _ in range(60)]
            await asyncio.sleep(0.3)
            server.kill()
            for number, task in enumerate(tasks):
                if number == len(tasks) // 2:
                    await server.start()
                task.cancel()
                await asyncio.sleep(0.002)
            _, left = await asyncio.wait(tasks, timeout=60.0)
            for task in left:
                task.cancel()
            assert not left
