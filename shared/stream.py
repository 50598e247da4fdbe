"""The streams between services: what one is, and how to wait for room in it.

    prompts -> rollouts -> scored          (dead_letter beside them)

Delivery is at least once: an entry stays pending until it is acknowledged, and a consumer that
dies leaves its entries to be reclaimed. One that lives and cannot go on gives them back. Each
stream has one consumer group. An acknowledged entry is deleted, so what a stream holds is what is
waiting plus what is being worked on, and that is bounded, in entries and in bytes: a producer is
told that the stream is full and waits. A full stream takes nothing, one that is not takes any
payload; so the bytes pass their bound by less than one entry, and no entry is ever too large to go
on. Nothing is ever trimmed.

An entry may have a *label*, which stays with what is made of it: `finish` hands it on. So it can be
seen at once, without a look into any payload, what a stream holds, and what no stream holds.

Appending is idempotent under a client's own retries: a call has a token, and `finish` does
nothing if the entry is gone.

`shared.redis_stream` is the real form, `shared.memory_stream` its twin for tests.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared.errors import StreamError

PROMPTS = "prompts"
ROLLOUTS = "rollouts"
SCORED = "scored"
DEAD_LETTER = "dead_letter"

NOBODY = "(nobody)"
"""The consumer of entries that were given back."""

FULL = "DEADLINE_EXCEEDED"
"""`StreamError.status` of a wait for room that was in vain."""

_FULL_WAIT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """One delivered message.

    Attributes:
        deliveries: with this one, and without those that were given back.
        is_redelivered: it was delivered before, whether that counts or not.
    """

    id: str
    payload: bytes
    deliveries: int
    is_redelivered: bool = False


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a stream may hold; it is full when either is reached."""

    max_items: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Depth:
    """Messages of a stream: never delivered, and delivered but not acknowledged.

    Attributes:
        num_bytes: payloads of all of them.
        oldest_pending_seconds: since the oldest pending message was put; 0 if none is pending.
    """

    waiting: int
    pending: int
    num_bytes: int = field(default=0, compare=False)
    oldest_pending_seconds: float = field(default=0.0, compare=False)

    def reaches(self, bounds: Bounds) -> bool:
        """Whether a stream of these bounds is full."""
        num_items = self.waiting + self.pending
        return num_items >= bounds.max_items or self.num_bytes >= bounds.max_bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """A consumer that has entries which it has not acknowledged.

    Attributes:
        oldest_seconds: since the one that it has had longest was delivered to it.
    """

    consumer: str
    num_entries: int
    oldest_seconds: float = field(compare=False)


class Stream(Protocol):
    """One bounded stream with one consumer group."""

    name: str
    bounds: Bounds

    async def put(
        self, payload: bytes, *, label: str | None = None, once: str | None = None
    ) -> bool:
        """Append; False, and nothing appended, if the stream is full.

        Of the calls with one `once` that come within ten minutes, one appends; those after it
        are True and do nothing. Without it every call appends, and does so once.
        """

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        """Up to `count` entries nobody has; waits for the first one at most `wait_seconds`."""

    async def pending(self, consumer: str, *, held: Collection[str] = ()) -> list[Entry]:
        """Deliver again what `consumer` has claimed and not acknowledged, oldest first.

        But for the ids in `held`, which it has in hand.
        """

    async def peek(self) -> list[bytes]:
        """Every payload in the stream, oldest first; changes nothing."""

    async def browse(self) -> list[Entry]:
        """Every entry in the stream, oldest first, as delivered 0 times; changes nothing."""

    async def labels(self) -> dict[str, str]:
        """The labels of the entries in the stream that have one, by id; changes nothing."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """These entries are done with; unknown ids are ignored."""

    async def finish(self, entry: Entry, *, output: Stream, payload: bytes) -> bool:
        """Append `payload`, with the entry's label, to `output` and acknowledge `entry`: both or
        neither.

        False, and nothing changed, if `output` is full. An entry that is not in the stream any
        more was finished before: True, and nothing is appended again.
        """

    async def reclaim(
        self,
        consumer: str,
        *,
        idle_seconds: float,
        alive: Collection[str],
        count: int,
        held: Collection[str] | None = None,
    ) -> list[Entry]:
        """Take over entries idle this long whose consumer is not among `alive`.

        With `held`, the ids that `consumer` knows it has, also those that it does not know of:
        the reply that was to bring them was lost.
        """

    async def give_back(
        self, consumer: str, *, idle_seconds: float, held: Collection[str] = ()
    ) -> int:
        """Leave to others what `consumer` has had this long; that delivery counts for nothing.

        But for the ids in `held`, which it has in hand. Whoever reclaims next finds the rest as
        idle as it is. Returns how many entries that were.
        """

    async def depth(self) -> Depth:
        """How much is waiting and pending."""

    async def holders(self) -> list[Holder]:
        """Who holds what is pending, longest first; changes nothing."""


async def put_when_room(
    stream: Stream,
    payload: bytes,
    *,
    label: str | None = None,
    timeout_seconds: float | None = None,
    on_wait: Callable[[float], None] | None = None,
) -> None:
    """`put`, waiting while the stream is full; `on_wait` is told the seconds of each wait.

    Raises:
        StreamError: there was no room for `timeout_seconds`; nothing was appended.
    """
    await _when_room(
        lambda: stream.put(payload, label=label), stream.name, timeout_seconds, on_wait
    )


async def finish_when_room(
    stream: Stream,
    entry: Entry,
    *,
    output: Stream,
    payload: bytes,
    timeout_seconds: float | None = None,
    on_wait: Callable[[float], None] | None = None,
) -> None:
    """`finish`, waiting while `output` is full; `on_wait` is told the seconds of each wait.

    Raises:
        StreamError: there was no room for `timeout_seconds`; nothing changed.
    """
    await _when_room(
        lambda: stream.finish(entry, output=output, payload=payload),
        output.name,
        timeout_seconds,
        on_wait,
    )


async def _when_room(
    attempt: Callable[[], Awaitable[bool]],
    name: str,
    timeout_seconds: float | None,
    on_wait: Callable[[float], None] | None,
) -> None:
    """Attempt until it succeeds; the last attempt is made at the deadline, not before it."""
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while not await attempt():
        started = time.monotonic()
        pause = _FULL_WAIT_SECONDS * (1 + random.random())
        if deadline is not None:
            if started >= deadline:
                raise StreamError(f"{name} is full, and was for {timeout_seconds:g} s", status=FULL)
            pause = min(pause, deadline - started)
        await asyncio.sleep(pause)
        if on_wait is not None:
            on_wait(time.monotonic() - started)
