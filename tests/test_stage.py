"""The stage's promises to entries that are poison, and to those that nobody knows of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

import pytest

from shared.dead_letters import decode_dead_letter
from shared.memory_stream import MemoryStream
from shared.redis_stream import Streams
from shared.stage import Stage, UnworkableError
from shared.stream import Entry, Stream

Three = tuple[Stream, Stream, Stream]


@pytest.fixture(params=["redis", "memory"])
def three(request: pytest.FixtureRequest, streams: Streams) -> Three:
    """A source, an output and the dead letters."""
    if request.param == "redis":
        return streams.prompts, streams.rollouts, streams.dead_letter
    source, output, dead = (
        MemoryStream(name=name, capacity=8) for name in ("prompts", "rollouts", "dead_letter")
    )
    return source, output, dead


@asynccontextmanager
async def at_work(
    three: Three,
    work: Callable[[Entry], Awaitable[bytes | None]],
    *,
    max_attempts: int = 3,
    max_in_flight: int = 4,
    on_done: Callable[[Entry], Awaitable[None]] | None = None,
) -> AsyncIterator[Stage]:
    source, output, dead = three
    stage = Stage(
        name="one", source=source, output=output, dead_letter=dead, work=work,
        max_in_flight=max_in_flight, max_attempts=max_attempts, on_done=on_done,
    )  # fmt: skip

    stop = asyncio.Event()

    async def goes_on() -> bool:
        return not stop.is_set()

    running = asyncio.create_task(stage.run(goes_on))
    try:
        yield stage
    finally:
        stop.set()
        await running
        await stage.finish(timeout_seconds=60.0)


async def until(holds: Callable[[], Awaitable[Collection[object]]]) -> None:
    async with asyncio.timeout(60.0):
        while not await holds():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnworkableError("no such task"), "no such task"),
        (KeyError("answer"), "KeyError: 'answer'"),
        (UnworkableError("half a \ud83d character"), "half a ? character"),
        (UnworkableError("long " * 1000), ("long " * 1000)[:2000]),
    ],
    ids=["unworkable", "unexpected", "surrogate", "long"],
)
async def test_poison_goes_to_the_dead_letters_with_its_error(
    three: Three, error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest-xdist cannot send on a captured log that holds half a character.
    caplog.set_level(logging.CRITICAL, logger="shared.dead_letters")
    source, output, dead = three

    async def work(entry: Entry) -> bytes:
        if entry.payload == b"poison":
            raise error
        return entry.payload

    await source.put(b"poison")
    await source.put(b"good")
    async with at_work(three, work):
        await until(dead.peek)
        await until(output.peek)
    (letter,) = map(decode_dead_letter, await dead.peek())
    assert (letter.stream, letter.payload, letter.deliveries) == ("prompts", b"poison", 1)
    assert letter.error == reason
    assert await output.peek() == [b"good"]
    assert await source.peek() == []


async def test_an_entry_that_killed_too_many_is_given_up_without_a_look_at_it(three: Three) -> None:
    source, _, dead = three
    looked: list[bytes] = []

    async def work(entry: Entry) -> bytes:
        looked.append(entry.payload)
        return entry.payload

    await source.put(b"deadly")
    await source.claim("first", count=1, wait_seconds=0.1)
    for victim in ("second", "third"):
        await source.reclaim(victim, idle_seconds=0.0, alive={victim}, count=1)
    async with at_work(three, work) as stage:
        await stage.adopt(idle_seconds=0.0, alive={"one"})
        await until(dead.peek)
    (letter,) = map(decode_dead_letter, await dead.peek())
    assert letter.deliveries == 4
    assert "delivered 4 times and never finished" in letter.error
    assert looked == []


async def test_what_is_in_work_is_not_taken_for_lost(three: Three) -> None:
    source, output, _ = three
    started, go_on = asyncio.Event(), asyncio.Event()
    worked_on: list[str] = []

    async def work(entry: Entry) -> bytes:
        worked_on.append(entry.id)
        started.set()
        await go_on.wait()
        return entry.payload

    await source.put(b"slow")
    async with at_work(three, work) as stage:
        await started.wait()
        await stage.adopt(idle_seconds=0.0, alive={"one"})
        go_on.set()
        await until(output.peek)
        await stage.adopt(idle_seconds=0.0, alive={"one"})
    assert len(worked_on) == 1


async def test_what_was_adopted_at_the_start_is_not_taken_for_left_behind(three: Three) -> None:
    source, output, _ = three
    worked_on: list[str] = []

    async def work(entry: Entry) -> bytes:
        worked_on.append(entry.id)
        await asyncio.sleep(0.05)
        return entry.payload

    await source.put(b"a")
    await source.claim("dead", count=1, wait_seconds=0.1)
    async with at_work(three, work) as stage:
        await stage.adopt(idle_seconds=0.0, alive={"one"})
        await until(output.peek)
    assert len(worked_on) == 1


async def test_entries_that_are_given_back_are_let_go_and_no_others(three: Three) -> None:
    source, output, _ = three
    begun: dict[bytes, str] = {}
    ended: list[bytes] = []
    go_on = asyncio.Event()

    async def work(entry: Entry) -> bytes:
        begun[entry.payload] = entry.id
        try:
            await go_on.wait()
        finally:
            ended.append(entry.payload)
        return entry.payload

    for payload in (b"let go", b"kept", b"not begun"):
        await source.put(payload)
    await source.claim("one", count=3, wait_seconds=0.1)  # left when this name last died
    async with at_work(three, work, max_in_flight=2) as stage:
        async with asyncio.timeout(60.0):
            while len(begun) < 2:
                await asyncio.sleep(0.005)
        stage.max_in_flight = 1  # it claims nothing meanwhile
        assert await stage.give_back({begun[b"let go"]}, idle_seconds=60.0) == 0
        assert (ended, stage.num_in_flight) == ([b"let go"], 1)
        assert await stage.give_back((), idle_seconds=0.0) == 2, "what Redis refused at first"
        taken = await source.reclaim("two", idle_seconds=0.0, alive={"one", "two"}, count=9)
        assert [(each.payload, each.deliveries) for each in taken] == [
            (b"let go", 2),
            (b"not begun", 2),
        ]
        go_on.set()
        await until(output.peek)
    assert await output.peek() == [b"kept"]


async def test_a_full_stream_of_dead_letters_loses_none(three: Three) -> None:
    source, _, dead = three

    async def work(entry: Entry) -> bytes:
        raise UnworkableError("poison")

    while await dead.put(b"in the way"):
        pass
    await source.put(b"poison")
    async with at_work(three, work):
        await asyncio.sleep(0.15)
        assert await source.peek() == [b"poison"]
        await dead.acknowledge([(await dead.browse())[0].id])

        async def is_moved() -> bool:
            return not await source.peek()

        async with asyncio.timeout(60.0):
            while not await is_moved():
                await asyncio.sleep(0.005)
    assert decode_dead_letter((await dead.peek())[-1]).payload == b"poison"


async def test_the_number_in_work_follows_a_limit_that_changes(three: Three) -> None:
    source, output, _ = three
    ends: dict[bytes, asyncio.Event] = {}

    async def work(entry: Entry) -> bytes:
        ends[entry.payload] = asyncio.Event()
        await ends[entry.payload].wait()
        return entry.payload

    async def are_begun(count: int) -> None:
        async with asyncio.timeout(60.0):
            while len(ends) < count:
                await asyncio.sleep(0.005)

    for number in range(7):
        await source.put(b"%d" % number)
    async with at_work(three, work) as stage:
        await are_begun(4)
        stage.max_in_flight = 1
        for number in range(3):
            ends[b"%d" % number].set()
        await until(lambda: as_many_as(output, 3))
        await stage.adopt(idle_seconds=0.0, alive=())
        assert (len(ends), stage.num_in_flight) == (4, 1)
        ends[b"3"].set()
        await are_begun(5)
        assert stage.num_in_flight == 1
        stage.max_in_flight = 3
        ends[b"4"].set()
        await are_begun(7)
        for end in ends.values():
            end.set()


async def as_many_as(stream: Stream, count: int) -> Collection[object]:
    found = await stream.peek()
    return found if len(found) >= count else ()


async def test_it_is_told_of_each_entry_that_is_done_and_of_no_other(three: Three) -> None:
    source, output, dead = three
    done: list[bytes] = []

    async def on_done(entry: Entry) -> None:
        done.append(entry.payload)

    async def work(entry: Entry) -> bytes | None:
        if entry.payload == b"poison":
            raise UnworkableError("poison")
        return None if entry.payload == b"left" else entry.payload

    for payload in (b"left", b"poison", b"good"):
        await source.put(payload)
    async with at_work(three, work, on_done=on_done):
        await until(dead.peek)
        await until(output.peek)
    assert sorted(done) == [b"good", b"poison"]
