"""Dead letters: nothing of them is lost on the way there and back."""

from __future__ import annotations

import asyncio
import time

import pytest

from shared.dead_letters import (
    DeadLetter,
    bury,
    decode_dead_letter,
    encode_dead_letter,
    put_back,
)
from shared.errors import StreamError
from shared.memory_stream import MemoryStream
from shared.redis_stream import Streams
from shared.stream import Depth, Entry, Stream

Pair = tuple[Stream, Stream]


@pytest.fixture(params=["redis", "memory"])
def pair(request: pytest.FixtureRequest, streams: Streams) -> Pair:
    """A stream and the dead letters."""
    if request.param == "redis":
        return streams.rollouts, streams.dead_letter
    source, dead = (MemoryStream(name=name, capacity=8) for name in ("rollouts", "dead_letter"))
    return source, dead


async def buried(pair: Pair, payload: bytes = b"poison") -> Entry:
    source, dead = pair
    await source.put(payload)
    (entry,) = await source.claim("one", count=1, wait_seconds=0.1)
    await bury(entry, source, dead, error="why")
    return (await dead.browse())[-1]


async def test_a_letter_says_what_it_is_and_where_when_why_and_how_often(pair: Pair) -> None:
    before = time.time()
    letter = decode_dead_letter((await buried(pair)).payload)
    assert letter == DeadLetter("rollouts", "why", 1, b"poison", letter.buried_at)
    assert before <= letter.buried_at <= time.time()


async def test_two_that_give_one_entry_up_make_one_letter(pair: Pair) -> None:
    source, dead = pair
    await source.put(b"poison")
    (entry,) = await source.claim("one", count=1, wait_seconds=0.1)
    await asyncio.gather(*(bury(entry, source, dead, error=name) for name in ("a", "b")))
    assert len(await dead.peek()) == 1
    assert await source.depth() == Depth(0, 0)


async def test_a_letter_is_put_back_once_whoever_asks_how_often(pair: Pair) -> None:
    source, dead = pair
    entry = await buried(pair)
    await asyncio.gather(*(put_back(entry, dead, source, timeout_seconds=60.0) for _ in range(5)))
    await put_back(entry, dead, source, timeout_seconds=60.0)
    (again,) = await source.claim("two", count=9, wait_seconds=0.1)
    assert (again.payload, again.deliveries) == (b"poison", 1)
    assert await dead.depth() == Depth(0, 0)


async def test_a_letter_stays_where_it_is_while_there_is_no_room(pair: Pair) -> None:
    source, dead = pair
    entry = await buried(pair)
    for _ in range(8):
        await source.put(b"in the way")
    with pytest.raises(StreamError, match="rollouts is full"):
        await put_back(entry, dead, source, timeout_seconds=0.1)
    assert [each.id for each in await dead.browse()] == [entry.id]
    assert await source.peek() == [b"in the way"] * 8


@pytest.mark.parametrize(
    "payload", [b"", b"poison", b"\xff", encode_dead_letter(DeadLetter("leases", "", 1, b"", 1.0))]
)
async def test_what_is_no_letter_is_not_put_anywhere(pair: Pair, payload: bytes) -> None:
    source, dead = pair
    await dead.put(payload)
    (entry,) = await dead.browse()
    with pytest.raises(StreamError, match="not a dead letter"):
        await put_back(entry, dead, source, timeout_seconds=0.1)
    assert await dead.peek() == [payload]
    assert await source.peek() == []


def test_a_letter_that_was_cut_short_is_none() -> None:
    whole = encode_dead_letter(DeadLetter("prompts", "why", 2, b"payload", 7.0))
    assert decode_dead_letter(whole).payload == b"payload"
    for length in range(len(whole)):
        with pytest.raises(StreamError, match="not a dead letter"):
            decode_dead_letter(whole[:length])
