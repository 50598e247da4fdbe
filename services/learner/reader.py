"""Reads `scored`: claims entries and decodes them, also ahead of need while a step is computed.

What is read ahead is claimed, decoded in a thread, and checked, no more: whether a group is
trained on is decided when a batch is taken, by the version and the ledger of that moment. It stays
pending on the stream until a checkpoint contains its effect, as all that was claimed, so a process
that ends before it is taken loses nothing, and the next one reads it again in its place.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from shared.codec import decode_scored_group
from shared.errors import StreamError
from shared.records import ScoredGroup
from shared.stream import Entry, Stream

logger = logging.getLogger(__name__)

CONSUMER = "learner"
CLAIM_WAIT_SECONDS = 0.5


class Arrival(NamedTuple):
    """An entry, and the group in it or why there is none that the model can take."""

    entry: Entry
    content: ScoredGroup | StreamError


class Reader:
    """The only consumer of `scored`; at any time one call of it reads.

    Args:
        vocabulary: token ids of the model are below it.
        max_length: of prompt and completion, in tokens.
        lost_seconds: an entry claimed this long ago that this process does not know of is one
            whose reply was lost.

    Attributes:
        heard_at: when a group last came, or a wait for some began; monotonic seconds.
    """

    def __init__(
        self, scored: Stream, *, vocabulary: int, max_length: int, lost_seconds: float
    ) -> None:
        self.heard_at = time.monotonic()
        self._scored = scored
        self._vocabulary = vocabulary
        self._max_length = max_length
        self._lost_seconds = lost_seconds
        self._looked_at = time.monotonic()
        self._backlog: deque[Entry] = deque()
        self._held: set[str] = set()
        self._ahead: deque[Arrival] = deque()
        self._room: Callable[[Sequence[Arrival]], int] = _no_room
        self._then: Callable[[], None] = _nothing
        self._reading: asyncio.Task[None] | None = None

    @property
    def ahead(self) -> tuple[Arrival, ...]:
        """What `next` gives first."""
        return tuple(self._ahead)

    async def recover(self) -> None:
        """After a crash: what was claimed and not acknowledged comes first, in its old order."""
        entries = await self._scored.pending(CONSUMER)
        self._backlog.extend(entries)
        self._held.update(entry.id for entry in entries)
        logger.info("reads %d pending entries again", len(self._backlog))

    @contextmanager
    def reading_ahead(
        self, room: Callable[[Sequence[Arrival]], int], *, then: Callable[[], None]
    ) -> Iterator[None]:
        """Within it arrivals are made ready for `next`, as they come.

        Leaving it waits for nothing: a claim that is under way then is the last one.

        Args:
            room: how many more there should be than these, which are ready.
            then: called once there is no room, before it is left.
        """
        self._room, self._then = room, then
        has_ended = self._reading is None or self._reading.done()
        if has_ended and not self._has_failed:
            self._reading = asyncio.create_task(self._read_ahead(), name="reads ahead")
        try:
            yield
        finally:
            self._room, self._then = _no_room, _nothing

    async def next(self, count: int) -> list[Arrival]:
        """At most `count`, in the order of the stream; none if none came for a while.

        Raises:
            StreamError: as `Stream.claim`; also of what was read ahead.
        """
        if self._reading is not None:
            await self._join(self._reading)
        elif not self._ahead:
            self._ahead.extend(await self._read(count))
        return [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]

    def forget(self, ids: Collection[str]) -> None:
        """These entries are acknowledged."""
        self._held.difference_update(ids)

    async def close(self) -> None:
        """Read no further; what was read ahead stays pending."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    @property
    def _has_failed(self) -> bool:
        """Reading ahead met an error that `next` has still to raise."""
        reading = self._reading
        return reading is not None and reading.done() and reading.exception() is not None

    async def _join(self, reading: asyncio.Task[None]) -> None:
        """Let the reading ahead bring something, or end."""
        if not self._ahead:
            # Not longer, also where the server is away: the caller must hear of a stop meanwhile.
            await asyncio.wait({reading}, timeout=CLAIM_WAIT_SECONDS)
        if reading.done():
            self._reading = None
            reading.result()

    async def _read_ahead(self) -> None:
        while (room := self._room(self.ahead)) > 0:
            self._ahead.extend(await self._read(room))
        self._then()

    async def _read(self, count: int) -> list[Arrival]:
        entries = await self._claim(count)
        # Beside the event loop, which answers calls, and the engine's thread.
        return await asyncio.to_thread(self._decode, entries) if entries else []

    async def _claim(self, count: int) -> list[Entry]:
        if self._backlog:
            return [self._backlog.popleft() for _ in range(min(count, len(self._backlog)))]
        entries = await self._find_lost(count) or await self._scored.claim(
            CONSUMER, count=count, wait_seconds=CLAIM_WAIT_SECONDS
        )
        self._held.update(entry.id for entry in entries)
        if entries:
            self.heard_at = time.monotonic()
        return entries

    async def _find_lost(self, count: int) -> list[Entry]:
        """Now and then, also while others keep coming: a group keeps its place in the admission
        until it is found, and ages."""
        if time.monotonic() - self._looked_at < self._lost_seconds / 3:
            return []
        self._looked_at = time.monotonic()
        return await self._scored.reclaim(
            CONSUMER,
            idle_seconds=self._lost_seconds,
            alive={CONSUMER},
            count=count,
            held=self._held,
        )

    def _decode(self, entries: Sequence[Entry]) -> list[Arrival]:
        """In a thread of its own; touches nothing of this object that changes."""
        return [Arrival(entry, self._content(entry.payload)) for entry in entries]

    def _content(self, payload: bytes) -> ScoredGroup | StreamError:
        try:
            group = decode_scored_group(payload)
            check_fits(group, vocabulary=self._vocabulary, max_length=self._max_length)
        except StreamError as error:
            return error
        return group


def _no_room(_: Sequence[Arrival]) -> int:
    return 0


def _nothing() -> None:
    pass


def check_fits(group: ScoredGroup, *, vocabulary: int, max_length: int) -> None:
    """Whether the model can take the group; what it cannot would end the learner, or its step.

    Raises:
        StreamError: a token id that the model does not have, a trajectory that is too long, or a
            log-prob that is not finite.
    """
    prompt = group.rollout.prompt.prompt_token_ids
    for completion in group.rollout.completions:
        largest = max(max(prompt), max(completion.token_ids))
        if largest >= vocabulary:
            raise StreamError(f"token id {largest}: the model has {vocabulary}")
        length = len(prompt) + len(completion.token_ids)
        if length > max_length:
            raise StreamError(f"a trajectory of {length} tokens: the model takes {max_length}")
        # Sums of finite float32 do not overflow; one that is not finite stays in the sum.
        if not math.isfinite(sum(completion.behaviour_logprobs)):
            raise StreamError("a behaviour log-prob is not finite")
