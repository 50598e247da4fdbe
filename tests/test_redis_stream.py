"""The streams on a real server that loses replies, keys, memory and its life."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from shared.errors import StreamError
from shared.redis_connection import connect
from shared.redis_scripts import RECENT_CALLS, RECENT_MS
from shared.redis_server import prepare_redis, until_redis_answers
from shared.redis_stream import Streams, open_streams
from shared.stage import Stage
from shared.stream import Bounds, Entry, Stream, put_when_room

pytestmark = pytest.mark.integration

ROOM = Bounds(8, 1000)
WIDE = Bounds(100_000, 1 << 30)


async def bytes_in(stream: Stream) -> int:
    num_bytes = (await stream.depth()).num_bytes
    assert num_bytes == sum(map(len, await stream.peek()))
    return num_bytes


async def test_every_key_of_a_run_has_its_hash_tag(streams: Streams) -> None:
    await streams.prompts.put(b"z", label="last")
    await streams.prompts.put(b"a", label="first")
    (_, entry) = await streams.prompts.claim("one", count=2, wait_seconds=0.1)
    await streams.prompts.finish(entry, output=streams.rollouts, payload=b"b")
    tag = streams.prefix[streams.prefix.index("{") : streams.prefix.index("}") + 1]
    keys = {
        key.decode()
        async for key in streams.client.scan_iter(match=f"*{tag[1:-1]}*")
    }  # fmt: skip
    assert {key.removeprefix(streams.prefix) for key in keys} == {
        "prompts", "prompts:sizes", "prompts:labels", "prompts:recent",
        "rollouts", "rollouts:sizes", "rollouts:labels", "scored", "dead_letter",
    }  # fmt: skip
    assert all(tag in key for key in keys)


@pytest.mark.parametrize("damage", ["sizes are lost", "one size is lost", "an entry is", "stream"])
async def test_the_count_of_bytes_heals_itself(streams: Streams, damage: str) -> None:
    stream, client = streams.prompts, streams.client
    for size in (100, 200, 300):
        await stream.put(b"x" * size)
    key, sizes = stream._keys[:2]
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    match damage:
        case "sizes are lost":
            await client.delete(sizes)
        case "one size is lost":
            await client.hdel(sizes, entry.id)
        case "an entry is":
            await client.xdel(key, entry.id)
        case "stream":
            await client.xtrim(key, maxlen=0)
    await stream.acknowledge([entry.id])
    assert await bytes_in(stream) == (0 if damage == "stream" else 500)
    await client.delete(sizes)
    assert await stream.put(b"x" * 5000)
    assert not await stream.put(b"y")
    await bytes_in(stream)


async def test_a_label_whose_entry_was_removed_behind_our_back_is_not_shown(
    streams: Streams,
) -> None:
    for index in range(2):
        await streams.prompts.put(b"x", label=f"train/0/{index}/0")
    gone, there = [entry.id for entry in await streams.prompts.browse()]
    await streams.client.xdel(streams.prompts._key, gone)
    assert await streams.prompts.labels() == {there: "train/0/1/0"}


async def test_a_run_from_before_bytes_were_counted_goes_on(streams: Streams) -> None:
    for index in range(8):
        await streams.client.xadd(streams.prompts._key, {"d": b"x" * (index + 1)})
    assert await bytes_in(streams.prompts) == 36
    assert not await streams.prompts.put(b"y")


async def test_calls_are_forgotten_after_a_time(streams: Streams) -> None:
    stream, client = streams.prompts, streams.client
    await stream.put(b"a", once="first")
    now = int(await client.zscore(stream._recent, "first"))
    ages = {"old": RECENT_MS + 60_000, "young": RECENT_MS - 60_000}
    await client.zadd(stream._recent, {call: now - age for call, age in ages.items()})
    await stream.put(b"b", once="newest")
    assert await client.zrange(stream._recent, 0, -1) == [b"young", b"first", b"newest"]


async def test_no_more_than_so_many_calls_are_remembered(streams: Streams) -> None:
    stream, client = streams.prompts, streams.client
    await stream.put(b"a", once="first")
    now = int(await client.zscore(stream._recent, "first"))
    many = {f"call {index}": now - index % 1000 for index in range(RECENT_CALLS + 100)}
    await client.zadd(stream._recent, many)
    await stream.put(b"b", once="newest")
    assert await client.zcard(stream._recent) == RECENT_CALLS
    assert await client.zscore(stream._recent, "newest") is not None


@dataclass
class LossyLink:
    """A TCP proxy before the server's unix socket; it can swallow one reply, and hang up."""

    socket: str
    swallow_next: bool = False
    num_swallowed: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def handle(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:  # fmt: skip
        from_server, to_server = await asyncio.open_unix_connection(self.socket)
        up = asyncio.create_task(self._pump(reader, to_server))
        self._tasks.add(up)
        try:
            while reply := await from_server.read(1 << 16):
                if self.swallow_next:
                    self.swallow_next = False
                    self.num_swallowed += 1
                    return
                writer.write(reply)
                await writer.drain()
        finally:
            up.cancel()
            for each in (writer, to_server):
                each.close()

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def lossy(streams: Streams, redis_url: str) -> AsyncIterator[tuple[LossyLink, Streams]]:
    """The same streams, seen through a link that can lose a reply."""
    link = LossyLink(urlsplit(redis_url).path)
    run_id = streams.prefix[streams.prefix.index("{") + 1 : streams.prefix.index("}")]
    server = await asyncio.start_server(link.handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        open_streams(
            f"redis://127.0.0.1:{port}",
            run_id=run_id,
            prompts=ROOM,
            groups=ROOM,
            timeout_seconds=60.0,
        ) as seen,
    ):
        await seen.scored.put(b"loads the scripts")
        (warm,) = await seen.scored.browse()
        await seen.scored.finish(warm, output=seen.dead_letter, payload=b"")
        yield link, seen


async def test_a_put_whose_reply_was_lost_is_not_made_twice(
    streams: Streams, redis_url: str
) -> None:
    async with lossy(streams, redis_url) as (link, seen):
        link.swallow_next = True
        assert await seen.prompts.put(b"a")
        assert link.num_swallowed == 1
        link.swallow_next = True
        await put_when_room(seen.prompts, b"b")
        assert link.num_swallowed == 2
    assert await streams.prompts.peek() == [b"a", b"b"]


async def test_a_finish_whose_reply_was_lost_is_not_made_twice(
    streams: Streams, redis_url: str
) -> None:
    async with lossy(streams, redis_url) as (link, seen):
        await seen.prompts.put(b"a")
        (entry,) = await seen.prompts.claim("one", count=1, wait_seconds=0.1)
        link.swallow_next = True
        assert await seen.prompts.finish(entry, output=seen.rollouts, payload=b"b")
        assert link.num_swallowed == 1
    assert await streams.rollouts.peek() == [b"b"]
    assert await streams.prompts.peek() == []


async def test_the_plain_command_would_be_made_twice(streams: Streams, redis_url: str) -> None:
    """What the token is for: the link does lose replies, and the client does repeat."""
    async with lossy(streams, redis_url) as (link, seen):
        link.swallow_next = True
        await seen.client.xadd(streams.prompts._key, {"d": b"a"})
    assert await streams.prompts.peek() == [b"a", b"a"]


async def doubled(entry: Entry) -> bytes:
    return entry.payload + b"!"


def stage(streams: Streams) -> Stage:
    return Stage(
        name="one",
        source=streams.prompts,
        output=streams.rollouts,
        dead_letter=streams.dead_letter,
        work=doubled,
        max_in_flight=8,
        max_attempts=100,
    )


async def test_a_stage_finds_what_a_lost_reply_claimed_for_it(
    streams: Streams, redis_url: str
) -> None:
    async with lossy(streams, redis_url) as (link, seen):
        worker, stop = stage(seen), asyncio.Event()
        going = asyncio.create_task(worker.run(until(stop)))
        try:
            await until_claiming(streams)
            link.swallow_next = True
            await streams.prompts.put(b"a")
            while link.num_swallowed == 0:
                await asyncio.sleep(0.01)
            while not await streams.rollouts.peek():
                await worker.adopt(idle_seconds=0.05, alive={"one"})
                await asyncio.sleep(0.02)
        finally:
            stop.set()
            await going
    assert await streams.rollouts.peek() == [b"a!"]


def until(stop: asyncio.Event) -> Callable[[], Awaitable[bool]]:
    """A gate, as the services have one: redis-py may lose a cancellation while it reconnects."""

    async def goes_on() -> bool:
        return not stop.is_set()

    return goes_on


async def until_claiming(streams: Streams) -> None:
    """Until a claim waits on the server."""
    while not any(client["cmd"] == "xreadgroup" for client in await streams.client.client_list()):
        await asyncio.sleep(0.01)


class Server:
    """A server that is killed and started again on the same data and the same socket.

    It syncs always: with `everysec` a server whose disk is busy answers up to two seconds before
    it writes, and what it answered dies with it.
    """

    def __init__(self, folder: Path) -> None:
        self._prepared = prepare_redis(folder)
        self.url = self._prepared.url
        self._data = folder / "appendonlydir"
        self._log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prepared.command, "--appendfsync", "always"], stdout=log, stderr=log
            )
        await until_redis_answers(self.url, timeout_seconds=60.0)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """It holds its connections and answers nothing, until `kill`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def forget(self) -> None:
        """Of a dead one: it starts with nothing."""
        shutil.rmtree(self._data)

    def end(self) -> None:
        self.kill()
        self._prepared.remove_socket_folder()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "redis")
    yield made
    made.end()


async def test_a_server_killed_amid_puts_and_finishes_loses_nothing_and_repeats_nothing(
    server: Server,
) -> None:
    await server.start()
    count, kills = 1000, 3
    payloads = [b"%d" % number * (number % 50 + 1) for number in range(count)]
    async with open_streams(
        server.url, run_id="r", prompts=ROOM, groups=WIDE, timeout_seconds=60.0, retries=50
    ) as streams:

        async def produce(first: int) -> None:
            for payload in payloads[first::4]:
                await put_when_room(streams.prompts, payload)

        worker, stop = stage(streams), asyncio.Event()
        going = asyncio.create_task(worker.run(until(stop)))

        async def adopt() -> None:
            while not stop.is_set():
                await asyncio.sleep(0.2)
                with contextlib.suppress(StreamError):
                    await worker.adopt(idle_seconds=0.5, alive={"one"})

        adopting = asyncio.create_task(adopt())
        producing = [asyncio.create_task(produce(first)) for first in range(4)]
        try:
            for kill in range(kills):
                while await length(streams.rollouts) < (kill + 1) * count // (kills + 2):
                    await asyncio.sleep(0.005)
                server.kill()
                await server.start()
            await asyncio.wait_for(asyncio.gather(*producing), 60.0)
            async with asyncio.timeout(60.0):
                while await length(streams.rollouts) < count or await length(streams.prompts):
                    await asyncio.sleep(0.05)
        finally:
            stop.set()
            for task in producing:
                task.cancel()
            await asyncio.gather(going, adopting)
        found = Counter(await streams.rollouts.peek())
        assert found == Counter(payload + b"!" for payload in payloads)
        assert await bytes_in(streams.rollouts) == sum(map(len, payloads)) + count
        assert await bytes_in(streams.prompts) == 0
        assert await streams.dead_letter.peek() == []


async def length(stream: Stream) -> int:
    depth = await stream.depth()
    return depth.waiting + depth.pending


async def test_bytes_and_bounds_are_the_same_after_a_restart(server: Server) -> None:
    await server.start()
    async with open_streams(
        server.url, run_id="r", prompts=ROOM, groups=ROOM, timeout_seconds=60.0
    ) as streams:
        await streams.prompts.put(b"x" * 300)
        await streams.prompts.put(b"x" * 700, once="call")
        server.kill()
        await server.start()
        assert await bytes_in(streams.prompts) == 1000
        assert not await streams.prompts.put(b"y")
        assert await streams.prompts.put(b"x" * 700, once="call")
        assert await bytes_in(streams.prompts) == 1000


async def test_a_server_without_memory_refuses_producers_and_lets_consumers_make_room(
    server: Server,
) -> None:
    await server.start()
    async with open_streams(
        server.url, run_id="r", prompts=WIDE, groups=WIDE, timeout_seconds=60.0
    ) as streams:
        for _ in range(50):
            await streams.prompts.put(b"x" * 10_000)
        entries = await streams.prompts.claim("one", count=50, wait_seconds=0.1)
        client = connect(server.url)
        await client.config_set("maxmemory", 100_000)
        with pytest.raises(StreamError, match="memory"):
            await streams.prompts.put(b"x")
        with pytest.raises(StreamError, match="memory"):
            await streams.prompts.finish(entries[0], output=streams.rollouts, payload=b"y")
        assert await bytes_in(streams.prompts) == 500_000
        await streams.prompts.acknowledge([entry.id for entry in entries[:40]])
        assert await bytes_in(streams.prompts) == 100_000
        await client.config_set("maxmemory", 0)
        await client.aclose()
        assert await streams.prompts.put(b"y")
