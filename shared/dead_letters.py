"""Entries that no attempt made anything of: kept with the reason, and put back by a person.

A dead letter goes to the stream `dead_letter` in one step with its entry's acknowledgement, and
back to the stream it came from in one step with its own; so it is always in one of the two, and
in one only. The stream is as bounded as the others: when it is full, who would add to it waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from protos import dead_letter_pb2 as pb
from shared.errors import StreamError
from shared.metrics.queues import BACKPRESSURE_SECONDS, DEAD_LETTERED
from shared.stream import FULL, PROMPTS, ROLLOUTS, SCORED, Entry, Stream, finish_when_room

logger = logging.getLogger(__name__)

ORIGINS = (PROMPTS, ROLLOUTS, SCORED)
for _origin in ORIGINS:
    DEAD_LETTERED.labels(stream=_origin)

_ROOM_SECONDS = 0.5

_MAX_ERROR = 2000
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What was given up.

    Attributes:
        stream: where it was taken from.
        deliveries: how often it was delivered, from 1.
        buried_at: Unix seconds.
    """

    stream: str
    error: str
    deliveries: int
    payload: bytes
    buried_at: float


async def bury(
    entry: Entry,
    source: Stream,
    dead_letter: Stream,
    *,
    error: str,
    while_full: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Move `entry` from `source` to `dead_letter`, waiting for room there; once, if repeated.

    Args:
        while_full: called about twice a second while there is no room; what it raises ends the
            wait, and the entry stays where it is.
    """
    letter = DeadLetter(source.name, error, entry.deliveries, entry.payload, time.time())
    has_waited = False

    def count_wait(seconds: float) -> None:
        nonlocal has_waited
        BACKPRESSURE_SECONDS.labels(stream=dead_letter.name).inc(seconds)
        if not has_waited:
            logger.error("%s is full; `isentrope dead-letters` makes room", dead_letter.name)
        has_waited = True

    payload = encode_dead_letter(letter)
    while True:
        try:
            await finish_when_room(
                source,
                entry,
                output=dead_letter,
                payload=payload,
                timeout_seconds=_ROOM_SECONDS,
                on_wait=count_wait,
            )
            break
        except StreamError as full:
            if full.status != FULL:
                raise
        if while_full is not None:
            await while_full()
    DEAD_LETTERED.labels(stream=source.name).inc()
    logger.error(
        "gave up entry %s of %s after %d deliveries: %s",
        entry.id, source.name, entry.deliveries, error,
    )  # fmt: skip


async def put_back(
    entry: Entry, dead_letter: Stream, origin: Stream, *, timeout_seconds: float
) -> None:
    """Move a dead letter to the stream it came from; once, if repeated or done by two.

    Raises:
        StreamError: it cannot be read, or `origin` had no room in time; it stays where it is.
    """
    letter = decode_dead_letter(entry.payload)
    await finish_when_room(
        dead_letter,
        entry,
        output=origin,
        payload=letter.payload,
        timeout_seconds=timeout_seconds,
    )


def encode_dead_letter(letter: DeadLetter) -> bytes:
    """The letter as the stream `dead_letter` holds it."""
    return pb.DeadLetter(
        stream=letter.stream,
        # What an error quotes may be half a character, which protobuf refuses.
        error=letter.error[:_MAX_ERROR].encode("utf8", "replace").decode("utf8"),
        deliveries=letter.deliveries,
        payload=letter.payload,
        buried_at=letter.buried_at,
    ).SerializeToString(deterministic=True)


def decode_dead_letter(payload: bytes) -> DeadLetter:
    """Undo `encode_dead_letter`.

    Raises:
        StreamError: it is no dead letter, or one cut short.
    """
    try:
        letter = pb.DeadLetter.FromString(payload)
    except DecodeError as error:
        raise StreamError(f"not a dead letter: {error}") from None
    if letter.stream not in ORIGINS or not letter.HasField("buried_at"):
        raise StreamError("not a dead letter, or one cut short")
    return DeadLetter(
        letter.stream, letter.error, letter.deliveries, letter.payload, letter.buried_at
    )
