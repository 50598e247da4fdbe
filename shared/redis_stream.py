"""`shared.stream.Stream` on a Redis server, and the streams of one run."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from shared import redis_scripts
from shared.errors import StreamError
from shared.redis_connection import connect, translated, until_answered
from shared.stream import DEAD_LETTER, PROMPTS, ROLLOUTS, SCORED, Bounds, Depth, Entry, Stream

_FIELD = b"d"

_PAGE = 64
"""Entries of one reply, which is held in memory twice."""


class RedisStream:
    """One stream; errors of the server are `StreamError`."""

    def __init__(self, client: Any, *, key: str, name: str, bounds: Bounds) -> None:
        self.name = name
        self.bounds = bounds
        self._client: Any = client
        self._key = key
        self._sizes = key + ":sizes"
        self._recent = key + ":recent"
        self._group = name
        self._put = client.register_script(redis_scripts.PUT)
        self._finish = client.register_script(redis_scripts.FINISH)
        self._acknowledge = client.register_script(redis_scripts.ACKNOWLEDGE)
        self._depth = client.register_script(redis_scripts.DEPTH)

    async def put(self, payload: bytes, *, once: str | None = None) -> bool:
        call = once or secrets.token_hex(8)
        with translated(self._key):
            return bool(
                await self._put(
                    keys=[self._key, self._sizes, self._recent],
                    args=[self.bounds.max_items, self.bounds.max_bytes, payload, call],
                )
            )

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        block_ms = max(1, int(wait_seconds * 1000))
        try:
            with translated(self._key):
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
        with translated(self._key):
            found = await self._client.xpending_range(
                self._key,
                self._group,
                min="-",
                max="+",
                count=self.bounds.max_items,
                consumername=consumer,
            )
            return await self._take_over(consumer, found, idle_ms=0)

    async def peek(self) -> list[bytes]:
        return [entry.payload for entry in await self.browse()]

    async def browse(self) -> list[Entry]:
        found: list[Entry] = []
        with translated(self._key):
            start = "-"
            while page := await self._client.xrange(self._key, min=start, count=_PAGE):
                found += [Entry(id.decode(), fields[_FIELD], 0) for id, fields in page]
                start = f"({found[-1].id}"
        return found

    async def acknowledge(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        with translated(self._key):
            await self._acknowledge(keys=[self._key, self._sizes], args=[self._group, *ids])

    async def finish(self, entry: Entry, *, output: Stream, payload: bytes) -> bool:
        if not isinstance(output, RedisStream):
            raise TypeError("the output of a Redis stream is a Redis stream")
        bounds = output.bounds
        with translated(self._key):
            return bool(
                await self._finish(
                    keys=[self._key, self._sizes, output._key, output._sizes],
                    args=[self._group, entry.id, bounds.max_items, bounds.max_bytes, payload],
                )
            )

    async def reclaim(
        self,
        consumer: str,
        *,
        idle_seconds: float,
        alive: Collection[str],
        count: int,
        held: Collection[str] | None = None,
    ) -> list[Entry]:
        def is_orphan(item: dict[str, Any]) -> bool:
            owner = item["consumer"].decode()
            if owner == consumer and held is not None:
                return item["message_id"].decode() not in held
            return owner not in alive

        idle_ms = int(idle_seconds * 1000)
        with translated(self._key):
            found = await self._client.xpending_range(
                self._key,
                self._group,
                min="-",
                max="+",
                count=self.bounds.max_items,
                idle=idle_ms,
            )
            orphans = [item for item in found if is_orphan(item)]
            return await self._take_over(consumer, orphans[:count], idle_ms=idle_ms)

    async def depth(self) -> Depth:
        with translated(self._key):
            length, num_bytes, pending, oldest = await self._depth(
                keys=[self._key, self._sizes], args=[self._group]
            )
        age = 0.0
        if pending:
            put_at_ms = int(oldest.decode().split("-")[0])
            age = max(0.0, time.time() - put_at_ms / 1000)
        return Depth(length - pending, pending, num_bytes, age)

    async def create(self) -> None:
        """Make the stream and its group; keeps what is there."""
        try:
            with translated(self._key):
                await self._client.xgroup_create(self._key, self._group, id="0", mkstream=True)
        except StreamError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _take_over(
        self, consumer: str, found: list[dict[str, Any]], *, idle_ms: int
    ) -> list[Entry]:
        """Claim pending entries for `consumer`, which counts as one more delivery of each."""
        deliveries = {item["message_id"]: item["times_delivered"] + 1 for item in found}
        taken: list[Entry] = []
        for ids in _pages(list(deliveries)):
            claimed = await self._client.xclaim(self._key, self._group, consumer, idle_ms, ids)
            taken += [Entry(id.decode(), fields[_FIELD], deliveries[id]) for id, fields in claimed]
        return taken


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of one run, and the connection they share."""

    prompts: RedisStream
    rollouts: RedisStream
    scored: RedisStream
    dead_letter: RedisStream
    client: Any
    prefix: str

    @property
    def sources(self) -> tuple[RedisStream, RedisStream, RedisStream]:
        """Those that a dead letter may come from."""
        return (self.prompts, self.rollouts, self.scored)

    async def close(self) -> None:
        """Give the connections back."""
        await self.client.aclose()


@asynccontextmanager
async def open_streams(
    url: str, *, run_id: str, prompts: Bounds, groups: Bounds, timeout_seconds: float
) -> AsyncIterator[Streams]:
    """The streams of run `run_id` on the server at `url`.

    Args:
        groups: the bounds of each of `rollouts`, `scored` and `dead_letter`.
    Raises:
        StartError: the server does not answer within `timeout_seconds`.
    """
    client = connect(url)
    try:
        await until_answered(client, url, timeout_seconds)
        prefix = key_prefix(run_id)
        bounds = {PROMPTS: prompts, ROLLOUTS: groups, SCORED: groups, DEAD_LETTER: groups}
        made = {
            name: RedisStream(client, key=prefix + name, name=name, bounds=each)
            for name, each in bounds.items()
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


def key_prefix(run_id: str) -> str:
    """What every key of a run begins with; its hash tag keeps a run on one shard of a cluster."""
    return f"isentrope:{{{run_id}}}:"


def _pages(ids: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(ids), _PAGE):
        yield ids[start : start + _PAGE]


def _by_stream(reply: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """XREADGROUP's answer as pairs: RESP2 gives a list, RESP3 a mapping of lists of lists."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [(key, chunk) for key, chunks in reply.items() for chunk in chunks]
    return list(reply)
