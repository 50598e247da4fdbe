"""The in-memory twin of `shared.redis_stream`, for tests; it passes the same contract."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.stream import NOBODY, Bounds, Depth, Entry, Holder, Stream


@dataclass(slots=True)
class _Message:
    payload: bytes
    label: str | None = None
    consumer: str | None = None
    deliveries: int = 0
    delivered_at: float = 0.0


class MemoryStream:
    """`Stream` within one process and event loop.

    Args:
        capacity: entries it may hold.
        capacity_bytes: of payload; the default is more than any test puts.
    """

    def __init__(self, *, name: str, capacity: int, capacity_bytes: int = 1 << 30) -> None:
        self.name = name
        self.bounds = Bounds(capacity, capacity_bytes)
        self._messages: dict[str, _Message] = {}
        self._calls: set[str] = set()
        self._next = 0
        self._arrived = asyncio.Event()

    async def put(
        self, payload: bytes, *, label: str | None = None, once: str | None = None
    ) -> bool:
        if once is not None and once in self._calls:
            return True
        if (await self.depth()).reaches(self.bounds):
            return False
        if once is not None:
            self._calls.add(once)
        self._next += 1
        self._messages[str(self._next)] = _Message(payload, label)
        self._arrived.set()
        return True

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        deadline = time.monotonic() + wait_seconds
        while True:
            fresh = [id for id, message in self._messages.items() if message.consumer is None]
            remaining = deadline - time.monotonic()
            if fresh or remaining <= 0:
                return self._deliver(consumer, fresh[:count])
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), remaining)
            except TimeoutError:
                return []

    async def pending(self, consumer: str, *, held: Collection[str] = ()) -> list[Entry]:
        mine = [id for id, message in self._messages.items() if message.consumer == consumer]
        return self._deliver(consumer, [id for id in mine if id not in held])

    async def peek(self) -> list[bytes]:
        return [message.payload for message in self._messages.values()]

    async def browse(self) -> list[Entry]:
        return [Entry(id, message.payload, 0) for id, message in self._messages.items()]

    async def labels(self) -> dict[str, str]:
        found = {id: message.label for id, message in self._messages.items()}
        return {id: label for id, label in found.items() if label is not None}

    async def acknowledge(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._messages.pop(id, None)

    async def finish(self, entry: Entry, *, output: Stream, payload: bytes) -> bool:
        if entry.id not in self._messages:
            return True
        if not await output.put(payload, label=self._messages[entry.id].label):
            return False
        del self._messages[entry.id]
        return True

    async def reclaim(
        self,
        consumer: str,
        *,
        idle_seconds: float,
        alive: Collection[str],
        count: int,
        held: Collection[str] | None = None,
    ) -> list[Entry]:
        before = time.monotonic() - idle_seconds
        orphans = [
            id
            for id, message in self._messages.items()
            if message.consumer is not None
            and message.delivered_at <= before
            and (
                id not in held
                if message.consumer == consumer and held is not None
                else message.consumer not in alive
            )
        ]
        return self._deliver(consumer, orphans[:count])

    async def give_back(
        self, consumer: str, *, idle_seconds: float, held: Collection[str] = ()
    ) -> int:
        before = time.monotonic() - idle_seconds
        left = [
            message
            for id, message in self._messages.items()
            if message.consumer == consumer and message.delivered_at <= before and id not in held
        ]
        for message in left:
            message.consumer = NOBODY
            message.deliveries -= 1
        return len(left)

    async def depth(self) -> Depth:
        pending = sum(message.consumer is not None for message in self._messages.values())
        num_bytes = sum(len(message.payload) for message in self._messages.values())
        return Depth(len(self._messages) - pending, pending, num_bytes)

    async def holders(self) -> list[Holder]:
        now, times = time.monotonic(), dict[str, list[float]]()
        for message in self._messages.values():
            if message.consumer is not None:
                times.setdefault(message.consumer, []).append(message.delivered_at)
        found = [Holder(name, len(given), now - min(given)) for name, given in times.items()]
        return sorted(found, key=lambda holder: -holder.oldest_seconds)

    def delivery(self, id: str) -> tuple[str, int] | None:
        """Who has the entry, after how many deliveries; None if nobody has."""
        message = self._messages.get(id)
        if message is None or message.consumer is None:
            return None
        return message.consumer, message.deliveries

    def _deliver(self, consumer: str, ids: Sequence[str]) -> list[Entry]:
        delivered = []
        for id in ids:
            message = self._messages[id]
            is_redelivered = message.consumer is not None
            message.consumer = consumer
            message.deliveries += 1
            message.delivered_at = time.monotonic()
            delivered.append(Entry(id, message.payload, message.deliveries, is_redelivered))
        return delivered


@dataclass(slots=True)
class MemoryStreams:
    """The in-memory twin of `shared.redis_stream.Streams`, as far as the learner's loop asks it.

    Attributes:
        server_name: change it, and another server has come.
    """

    prompts: MemoryStream
    rollouts: MemoryStream
    scored: MemoryStream
    dead_letter: MemoryStream
    server_name: str = "first"

    async def server(self) -> str:
        """Which server answers."""
        return self.server_name
