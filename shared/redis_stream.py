"""`shared.stream.Stream` on a Redis server, and the streams of one run."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from shared import redis_scripts
from shared.errors import StreamError
from shared.redis_connection import RETRIES, Patience, connect, translated, until_answered
from shared.stream import (
    DEAD_LETTER,
    NOBODY,
    PROMPTS,
    ROLLOUTS,
    SCORED,
    Bounds,
    Depth,
    Entry,
    Holder,
    Stream,
)

_FIELD = b"d"

_PAGE = 64
"""Entries of one reply, which is held in memory twice."""

NO_PATIENCE = Patience()

_Answer = TypeVar("_Answer")


class RedisStream:
    """One stream; errors of the server are `StreamError`, after as much patience as was given."""

    def __init__(
        self, client: Any, *, key: str, name: str, bounds: Bounds, patience: Patience
    ) -> None:
        self.name = name
        self.bounds = bounds
        self._client: Any = client
        self._patience = patience
        self._key = key
        self._keys = [key, key + ":sizes", key + ":labels"]
        self._recent = key + ":recent"
        self._group = name
        self._put = client.register_script(redis_scripts.PUT)
        self._finish = client.register_script(redis_scripts.FINISH)
        self._acknowledge = client.register_script(redis_scripts.ACKNOWLEDGE)
        self._labels = client.register_script(redis_scripts.LABELS)
        self._give_back = client.register_script(redis_scripts.GIVE_BACK)
        self._depth = client.register_script(redis_scripts.DEPTH)
        self._holders = client.register_script(redis_scripts.HOLDERS)

    async def put(
        self, payload: bytes, *, label: str | None = None, once: str | None = None
    ) -> bool:
        call = once or secrets.token_hex(8)
        bounds = [self.bounds.max_items, self.bounds.max_bytes]
        answer = await self._ask(
            lambda: self._put(
                keys=[*self._keys, self._recent], args=[*bounds, payload, label or "", call]
            )
        )
        return bool(answer)

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        block_ms = max(1, int(wait_seconds * 1000))
        reply = await self._ask(
            lambda: self._client.xreadgroup(
                self._group, consumer, {self._key: ">"}, count=count, block=block_ms
            )
        )
        return [
            Entry(id.decode(), _payload(fields), 1)
            for _, entries in _by_stream(reply)
            for id, fields in entries
        ]

    async def pending(self, consumer: str, *, held: Collection[str] = ()) -> list[Entry]:
        async def take_mine() -> list[Entry]:
            found = await self._pending(consumername=consumer)
            lost = [item for item in found if item["message_id"].decode() not in held]
            return await self._take_over(consumer, lost, idle_ms=0)

        return await self._ask(take_mine)

    async def peek(self) -> list[bytes]:
        return [entry.payload for entry in await self.browse()]

    async def browse(self) -> list[Entry]:
        async def read() -> list[Entry]:
            found: list[Entry] = []
            start = "-"
            while page := await self._client.xrange(self._key, min=start, count=_PAGE):
                found += [Entry(id.decode(), _payload(fields), 0) for id, fields in page]
                start = f"({found[-1].id}"
            return found

        return await self._ask(read)

    async def labels(self) -> dict[str, str]:
        reply = [
            each.decode(errors="replace")
            for each in await self._ask(lambda: self._labels(keys=self._keys))
        ]
        return dict(zip(reply[::2], reply[1::2], strict=True))

    async def acknowledge(self, ids: Sequence[str]) -> None:
        if ids:
            await self._ask(lambda: self._acknowledge(keys=self._keys, args=[self._group, *ids]))

    async def finish(self, entry: Entry, *, output: Stream, payload: bytes) -> bool:
        if not isinstance(output, RedisStream):
            raise TypeError("the output of a Redis stream is a Redis stream")
        bounds = [output.bounds.max_items, output.bounds.max_bytes]
        answer = await self._ask(
            lambda: self._finish(
                keys=[*self._keys, *output._keys], args=[self._group, entry.id, *bounds, payload]
            )
        )
        return bool(answer)

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
            owner = item["consumer"].decode(errors="replace")
            if owner == consumer and held is not None:
                return item["message_id"].decode() not in held
            return owner not in alive

        async def take_orphans() -> list[Entry]:
            idle_ms = int(idle_seconds * 1000)
            orphans = [item for item in await self._pending(idle=idle_ms) if is_orphan(item)]
            return await self._take_over(consumer, orphans[:count], idle_ms=idle_ms)

        return await self._ask(take_orphans)

    async def give_back(
        self, consumer: str, *, idle_seconds: float, held: Collection[str] = ()
    ) -> int:
        args = [self._group, consumer, NOBODY, int(idle_seconds * 1000), self.bounds.max_items]
        return int(await self._ask(lambda: self._give_back([self._key], [*args, *held])))

    async def depth(self) -> Depth:
        length, num_bytes, pending, oldest = await self._ask(
            lambda: self._depth(keys=self._keys[:2], args=[self._group])
        )
        age = 0.0
        if pending:
            put_at_ms = int(oldest.decode().split("-")[0])
            age = max(0.0, time.time() - put_at_ms / 1000)
        return Depth(length - pending, pending, num_bytes, age)

    async def holders(self) -> list[Holder]:
        reply = await self._ask(lambda: self._holders(keys=[self._key], args=[self._group]))
        found = [
            Holder(name.decode(errors="replace"), count, idle / 1000) for name, count, idle in reply
        ]
        return sorted(found, key=lambda holder: -holder.oldest_seconds)

    def impatient(self) -> RedisStream:
        """The same stream, whose operations fail at once when redis-py gives up."""
        return RedisStream(
            self._client,
            key=self._key,
            name=self.name,
            bounds=self.bounds,
            patience=NO_PATIENCE,
        )

    async def create(self) -> None:
        """Make the stream and its group; keeps what is there."""
        await self._patience.outlast(self._create)

    async def _ask(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The answer to a call that may be repeated; a stream that was wiped is made again."""

        async def once() -> _Answer:
            with translated(self._key):
                return await call()

        async def once_or_anew() -> _Answer:
            try:
                return await once()
            except StreamError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._create()
                return await once()

        return await self._patience.outlast(once_or_anew)

    async def _create(self) -> None:
        try:
            with translated(self._key):
                await self._client.xgroup_create(self._key, self._group, id="0", mkstream=True)
        except StreamError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _pending(self, **which: Any) -> Any:
        return await self._client.xpending_range(
            self._key, self._group, min="-", max="+", count=self.bounds.max_items, **which
        )

    async def _take_over(
        self, consumer: str, found: list[dict[str, Any]], *, idle_ms: int
    ) -> list[Entry]:
        """Claim pending entries for `consumer`, which counts as one more delivery of each."""
        deliveries = {item["message_id"]: item["times_delivered"] + 1 for item in found}
        taken: list[Entry] = []
        for ids in _pages(list(deliveries)):
            claimed = await self._client.xclaim(self._key, self._group, consumer, idle_ms, ids)
            taken += [
                Entry(id.decode(), _payload(fields), deliveries[id], True) for id, fields in claimed
            ]
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
    patience: Patience

    @property
    def sources(self) -> tuple[RedisStream, RedisStream, RedisStream]:
        """Those that a dead letter may come from."""
        return (self.prompts, self.rollouts, self.scored)

    async def server(self) -> str:
        """Which server answers: another name after a restart or a fail-over.

        Raises:
            StreamError: it is away, and patience has run out.
        """

        async def ask() -> str:
            with translated(self.prefix):
                return str((await self.client.info("server"))["run_id"])

        return await self.patience.outlast(ask)

    def impatient(self) -> Streams:
        """The same streams for a caller that must be told at once that the server is away."""
        return replace(
            self,
            prompts=self.prompts.impatient(),
            rollouts=self.rollouts.impatient(),
            scored=self.scored.impatient(),
            dead_letter=self.dead_letter.impatient(),
            patience=NO_PATIENCE,
        )

    async def close(self) -> None:
        """Give the connections back."""
        await self.client.aclose()


@asynccontextmanager
async def open_streams(
    url: str,
    *,
    run_id: str,
    prompts: Bounds,
    groups: Bounds,
    timeout_seconds: float,
    patience: Patience = NO_PATIENCE,
    retries: int = RETRIES,
) -> AsyncIterator[Streams]:
    """The streams of run `run_id` on the server at `url`.

    Args:
        groups: the bounds of each of `rollouts`, `scored` and `dead_letter`.
        patience: of every operation on the streams.
        retries: of redis-py, before patience begins.
    Raises:
        StartError: the server does not answer within `timeout_seconds`.
    """
    client = connect(url, retries=retries)
    try:
        await until_answered(client, url, timeout_seconds)
        prefix = key_prefix(run_id)
        bounds = {PROMPTS: prompts, ROLLOUTS: groups, SCORED: groups, DEAD_LETTER: groups}
        made = {
            name: RedisStream(client, key=prefix + name, name=name, bounds=each, patience=patience)
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
            patience=patience,
        )
    finally:
        await client.aclose()


def key_prefix(run_id: str) -> str:
    """What every key of a run begins with; its hash tag keeps a run on one shard of a cluster."""
    return f"isentrope:{{{run_id}}}:"


def _payload(fields: dict[bytes, bytes]) -> bytes:
    """Of an entry; empty, which nothing decodes, of one that is not ours."""
    return fields.get(_FIELD, b"")


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
