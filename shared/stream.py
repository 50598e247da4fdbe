"""The streams between services: Redis Streams behind one small interface.

    prompts -> rollouts -> scored          (dead_letter beside them)

Delivery is at least once: an entry stays pending until it is acknowledged, and a consumer that
dies leaves its entries to be reclaimed. Each stream has one consumer group. An acknowledged entry
is deleted, so a stream's length is what is waiting plus what is being worked on, and that length
is bounded: a producer is told that the stream is full and waits. Nothing is ever trimmed.

Scripts make the compound steps atomic, and idempotent under the client's own retries: `finish`
does nothing if the entry is not pending any more.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import StartError, StreamError

PROMPTS = "prompts"
ROLLOUTS = "rollouts"
SCORED = "scored"
DEAD_LETTER = "dead_letter"

_FIELD = b"d"
_FULL_WAIT_SECONDS = 0.05

_PUT = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('XADD', KEYS[1], '*', 'd', ARGV[2])
return 1
"""

_FINISH = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1) == 0 then return 1 end
if redis.call('XLEN', KEYS[2]) >= tonumber(ARGV[3]) then return 0 end
redis.call('XADD', KEYS[2], '*', 'd', ARGV[4])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One delivered message; `deliveries` counts this one."""

    id: str
    payload: bytes
    deliveries: int


@dataclass(frozen=True, slots=True)
class Depth:
    """Messages of a stream: never delivered, and delivered but not acknowledged.

    Attributes:
        oldest_pending_seconds: since the oldest pending message was put; 0 if none is pending.
    """

    waiting: int
    pending: int
    oldest_pending_seconds: float = field(default=0.0, compare=False)


class Stream(Protocol):
    """One bounded stream with one consumer group."""

    name: str
    capacity: int

    async def put(self, payload: bytes) -> bool:
        """Append; False, and nothing appended, if the stream is full."""

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        """Up to `count` entries nobody has; waits for the first one at most `wait_seconds`."""

    async def pending(self, consumer: str) -> list[Entry]:
        """Deliver again what `consumer` has claimed and not acknowledged, oldest first."""

    async def peek(self) -> list[bytes]:
        """Every payload in the stream, oldest first; changes nothing."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """These entries are done with; unknown ids are ignored."""

    async def finish(self, entry: Entry, *, output: Stream, payload: bytes) -> bool:
        """Append `payload` to `output` and acknowledge `entry`, both or neither.

        False, and nothing changed, if `output` is full. An entry that is not pending any more
        was finished before: True, and nothing is appended again.
        """

    async def reclaim(
        self, consumer: str, *, idle_seconds: float, alive: Collection[str], count: int
    ) -> list[Entry]:
        """Take over entries idle this long whose consumer is not among `alive`."""

    async def depth(self) -> Depth:
        """How much is waiting and pending."""


class RedisStream:
    """`Stream` on a Redis server; errors of the server are `StreamError`."""

    def __init__(self, client: Any, *, key: str, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self._client: Any = client
        self._key = key
        self._group = name
        self._put = client.register_script(_PUT)
        self._finish = client.register_script(_FINISH)

    async def put(self, payload: bytes) -> bool:
        with _translated(self._key):
            return bool(await self._put(keys=[self._key], args=[self.capacity, payload]))

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        block_ms = max(1, int(wait_seconds * 1000))
        try:
            with _translated(self._key):
                reply = await self._client.xreadgroup(
                    self._group, consumer, {self._key: ">"}, count=count, block=block_ms
                )
        except StreamError as error:
            if "NOGROUP" not in str(error):
                raise
            await self.create()  # Redis was wiped while we were connected
            return []
        return [
            Entry(id.decode(), fields[_FIELD], 1)
            for _, entries in _by_stream(reply)
            for id, fields in entries
        ]

    async def pending(self, consumer: str) -> list[Entry]:
        with _translated(self._key):
            found = await self._client.xpending_range(
                self._key, self._group, min="-", max="+", count=self.capacity, consumername=consumer
            )
            return await self._take_over(consumer, found, idle_ms=0)

    async def peek(self) -> list[bytes]:
        with _translated(self._key):
            return [fields[_FIELD] for _, fields in await self._client.xrange(self._key)]

    async def acknowledge(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        with _translated(self._key):
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.xack(self._key, self._group, *ids)
                pipeline.xdel(self._key, *ids)
                await pipeline.execute()

    async def finish(self, entry: Entry, *, output: Stream, payload: bytes) -> bool:
        if not isinstance(output, RedisStream):
            raise TypeError("the output of a Redis stream is a Redis stream")
        try:
            with _translated(self._key):
                done = await self._finish(
                    keys=[self._key, output._key],
                    args=[self._group, entry.id, output.capacity, payload],
                )
        except StreamError as error:
            if "NOGROUP" not in str(error):
                raise
            return True  # Redis was wiped: nothing is pending there any more
        return bool(done)

    async def reclaim(
        self, consumer: str, *, idle_seconds: float, alive: Collection[str], count: int
    ) -> list[Entry]:
        idle_ms = int(idle_seconds * 1000)
        with _translated(self._key):
            found = await self._client.xpending_range(
                self._key, self._group, min="-", max="+", count=1000, idle=idle_ms
            )
            orphans = [item for item in found if item["consumer"].decode() not in alive]
            return await self._take_over(consumer, orphans[:count], idle_ms=idle_ms)

    async def depth(self) -> Depth:
        with _translated(self._key):
            length = await self._client.xlen(self._key)
            summary = await self._client.xpending(self._key, self._group)
        pending: int = summary["pending"]
        age = 0.0
        if pending:
            put_at_ms = int(summary["min"].decode().split("-")[0])
            age = max(0.0, time.time() - put_at_ms / 1000)
        return Depth(length - pending, pending, age)

    async def create(self) -> None:
        """Make the stream and its group; keeps what is there."""
        try:
            with _translated(self._key):
                await self._client.xgroup_create(self._key, self._group, id="0", mkstream=True)
        except StreamError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _take_over(
        self, consumer: str, found: list[dict[str, Any]], *, idle_ms: int
    ) -> list[Entry]:
        """Claim pending entries for `consumer`, which counts as one more delivery of each."""
        deliveries = {item["message_id"]: item["times_delivered"] + 1 for item in found}
        if not deliveries:
            return []
        claimed = await self._client.xclaim(
            self._key, self._group, consumer, idle_ms, list(deliveries)
        )
        return [Entry(id.decode(), fields[_FIELD], deliveries[id]) for id, fields in claimed]


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of one run, and the connection they share."""

    prompts: RedisStream
    rollouts: RedisStream
    scored: RedisStream
    dead_letter: RedisStream
    client: Any
    prefix: str

    async def close(self) -> None:
        """Give the connections back."""
        await self.client.aclose()


@asynccontextmanager
async def open_streams(
    url: str, *, run_id: str, max_prompts: int, max_groups: int, timeout_seconds: float
) -> AsyncIterator[Streams]:
    """The streams of run `run_id` on the server at `url`.

    Raises:
        StartError: the server does not answer within `timeout_seconds`.
    """
    client = connect(url)
    try:
        await _answered(client, url, timeout_seconds)
        prefix = key_prefix(run_id)
        capacities = {
            PROMPTS: max_prompts,
            ROLLOUTS: max_groups,
            SCORED: max_groups,
            DEAD_LETTER: max_groups,
        }
        made = {
            name: RedisStream(client, key=prefix + name, name=name, capacity=capacity)
            for name, capacity in capacities.items()
        }
        for stream in made.values():
            await stream.create()
        yield Streams(
            prompts=made[PROMPTS],
            rollouts=made[ROLLOUTS],
            scored=made[SCORED],
            dead_letter=made[DEAD_LETTER],
            client=client,
            prefix=prefix,
        )
    finally:
        await client.aclose()


async def check_server(url: str, *, timeout_seconds: float) -> None:
    """See that Redis answers, without keeping a connection.

    Raises:
        StartError: it does not.
    """
    client = connect(url)
    try:
        await _answered(client, url, timeout_seconds)
    finally:
        await client.aclose()


def connect(url: str, *, timeout_seconds: float = 30.0, retries: int = 8) -> Any:
    """A client; eight retries last about ten seconds, so a server's restart is survived."""
    return redis.Redis.from_url(
        url,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries),
        retry_on_error=[RedisTimeoutError],
        socket_connect_timeout=min(5.0, timeout_seconds),
        socket_timeout=timeout_seconds,
        health_check_interval=15,
    )


def key_prefix(run_id: str) -> str:
    """What every key of a run begins with; its hash tag keeps a run on one shard of a cluster."""
    return f"isentrope:{{{run_id}}}:"


async def put_when_room(
    stream: Stream, payload: bytes, *, on_wait: Callable[[float], None] | None = None
) -> None:
    """`put`, waiting while the stream is full; `on_wait` is told the seconds of each wait."""
    while not await stream.put(payload):
        await _wait_for_room(on_wait)


async def finish_when_room(
    stream: Stream,
    entry: Entry,
    *,
    output: Stream,
    payload: bytes,
    on_wait: Callable[[float], None] | None = None,
) -> None:
    """`finish`, waiting while `output` is full; `on_wait` is told the seconds of each wait."""
    while not await stream.finish(entry, output=output, payload=payload):
        await _wait_for_room(on_wait)


def shown(url: str) -> str:
    """`url` without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


async def _wait_for_room(on_wait: Callable[[float], None] | None) -> None:
    started = time.monotonic()
    await asyncio.sleep(_FULL_WAIT_SECONDS * (1 + random.random()))
    if on_wait is not None:
        on_wait(time.monotonic() - started)


async def _answered(client: Any, url: str, timeout_seconds: float) -> None:
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        raise StartError(
            f"redis.url = {shown(url)!r}: no answer ({error or type(error).__name__}); start Redis"
            " there, or unset REDIS_URL and redis.url to let `isentrope up` start one"
        ) from None


def _by_stream(reply: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """XREADGROUP's answer as pairs: RESP2 gives a list, RESP3 a mapping of lists of lists."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [(key, chunk) for key, chunks in reply.items() for chunk in chunks]
    return list(reply)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise StreamError(f"{key}: {error or type(error).__name__}") from error
