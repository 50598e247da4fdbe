"""The contract of a stream; Redis and its in-memory twin both keep it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from shared.errors import StartError, StreamError
from shared.memory_stream import MemoryStream
from shared.redis_connection import shown
from shared.redis_stream import Streams, open_streams
from shared.stream import (
    NOBODY,
    Bounds,
    Depth,
    Holder,
    Stream,
    finish_when_room,
    put_when_room,
)

Pair = Callable[[], tuple[Stream, Stream]]


@pytest.fixture(params=["redis", "memory"])
def pair(request: pytest.FixtureRequest, streams: Streams) -> tuple[Stream, Stream]:
    """An input and an output stream of 8 entries and 1000 bytes each."""
    if request.param == "redis":
        return streams.prompts, streams.rollouts
    prompts, rollouts = (
        MemoryStream(name=name, capacity=8, capacity_bytes=1000) for name in ("prompts", "rollouts")
    )
    return prompts, rollouts


async def bytes_in(stream: Stream) -> int:
    """What the stream says it holds, which must be what it does hold."""
    num_bytes = (await stream.depth()).num_bytes
    assert num_bytes == sum(map(len, await stream.peek()))
    return num_bytes


async def test_entries_come_out_in_the_order_they_went_in(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for payload in (b"a", b"b", b"c"):
        assert await stream.put(payload)
    first = await stream.claim("one", count=2, wait_seconds=0.1)
    second = await stream.claim("two", count=2, wait_seconds=0.1)
    assert [entry.payload for entry in [*first, *second]] == [b"a", b"b", b"c"]


async def test_a_claim_waits_for_an_entry_that_comes_late(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    claim = asyncio.create_task(stream.claim("one", count=1, wait_seconds=60.0))
    await asyncio.sleep(0)
    await stream.put(b"late")
    assert [entry.payload for entry in await claim] == [b"late"]


async def test_a_claim_of_an_empty_stream_ends_empty(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    assert await stream.claim("one", count=1, wait_seconds=0.01) == []


async def test_a_full_stream_refuses_and_keeps_everything(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    assert all([await stream.put(b"%d" % number) for number in range(8)])
    assert not await stream.put(b"one too many")
    assert await stream.peek() == [b"%d" % number for number in range(8)]


async def test_a_stream_is_full_in_bytes_before_it_is_in_entries(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    assert await stream.put(b"x" * 400)
    assert await stream.put(b"x" * 599)
    assert await stream.put(b"passes the bound")
    assert not await stream.put(b"")
    assert (await stream.depth()).reaches(stream.bounds)
    assert await bytes_in(stream) == 1015


async def test_a_payload_above_the_bound_goes_where_there_is_room(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    assert await stream.put(b"x" * 5000)
    assert not await stream.put(b"")


async def test_two_producers_cannot_both_take_the_last_place(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for _ in range(7):
        await stream.put(b"x")
    taken = await asyncio.gather(*(stream.put(b"y") for _ in range(20)))
    assert sum(taken) == 1
    assert (await stream.depth()).waiting == 8


async def test_bytes_are_exact_wherever_entries_go(pair: tuple[Stream, Stream]) -> None:
    stream, output = pair
    for size in (10, 20, 30, 40):
        await stream.put(b"x" * size)
    first, second = await stream.claim("one", count=2, wait_seconds=0.1)
    assert await bytes_in(stream) == 100
    await stream.acknowledge([first.id, first.id, "7-7"])
    assert await bytes_in(stream) == 90
    await stream.pending("one")
    await stream.reclaim("two", idle_seconds=0.0, alive={"two"}, count=9)
    assert await bytes_in(stream) == 90
    for _ in range(2):
        await stream.finish(second, output=output, payload=b"z" * 7)
    await stream.acknowledge([second.id])
    assert (await bytes_in(stream), await bytes_in(output)) == (70, 7)
    for entry in await stream.claim("one", count=9, wait_seconds=0.1):
        await stream.acknowledge([entry.id])
    assert await bytes_in(stream) == 0


async def test_finish_waits_for_bytes_too_and_then_changes_nothing(
    pair: tuple[Stream, Stream],
) -> None:
    stream, output = pair
    await output.put(b"x" * 1000)
    await stream.put(b"in")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    assert not await stream.finish(entry, output=output, payload=b"")
    assert await stream.depth() == Depth(waiting=0, pending=1)
    assert (await bytes_in(stream), await bytes_in(output)) == (2, 1000)


async def test_a_call_that_is_repeated_appends_once(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    assert await stream.put(b"a", once="first")
    assert await stream.put(b"a", once="first")
    assert await stream.put(b"a", once="second")
    assert await stream.peek() == [b"a", b"a"]


async def test_a_repeated_call_is_true_though_the_stream_is_full_or_has_moved_on(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    assert await stream.put(b"x" * 1000, once="call")
    assert await stream.put(b"x" * 1000, once="call")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    await stream.acknowledge([entry.id])
    assert await stream.put(b"x" * 1000, once="call")
    assert await stream.peek() == []


async def test_a_call_that_was_refused_may_be_repeated(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    await stream.put(b"x" * 1000)
    assert not await stream.put(b"late", once="call")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    await stream.acknowledge([entry.id])
    assert await stream.put(b"late", once="call")
    assert await stream.peek() == [b"late"]


async def test_browsing_shows_every_entry_and_changes_nothing(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    for payload in (b"a", b"b"):
        await stream.put(payload)
    (claimed,) = await stream.claim("one", count=1, wait_seconds=0.1)
    seen = await stream.browse()
    assert [(entry.payload, entry.deliveries) for entry in seen] == [(b"a", 0), (b"b", 0)]
    assert seen[0].id == claimed.id
    assert await stream.depth() == Depth(waiting=1, pending=1)


async def test_an_entry_that_was_never_claimed_can_be_moved_on(pair: tuple[Stream, Stream]) -> None:
    stream, output = pair
    await stream.put(b"in")
    (entry,) = await stream.browse()
    moved = [await stream.finish(entry, output=output, payload=b"out") for _ in range(2)]
    assert moved == [True, True]
    assert await stream.claim("one", count=1, wait_seconds=0.01) == []
    assert await output.peek() == [b"out"]


async def test_an_unacknowledged_entry_is_delivered_again_in_order(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    for payload in (b"a", b"b"):
        await stream.put(payload)
    await stream.claim("one", count=2, wait_seconds=0.1)
    again = await stream.pending("one")
    assert [(entry.payload, entry.deliveries) for entry in again] == [(b"a", 2), (b"b", 2)]
    assert await stream.pending("two") == []


async def test_what_a_consumer_has_in_hand_is_not_delivered_again(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    for payload in (b"a", b"b"):
        await stream.put(payload)
    first, _ = await stream.claim("one", count=2, wait_seconds=0.1)
    again = await stream.pending("one", held={first.id})
    assert [(entry.payload, entry.deliveries) for entry in again] == [(b"b", 2)]
    (taken,) = await stream.reclaim("two", idle_seconds=0.0, alive={"two"}, count=1)
    assert (taken.id, taken.deliveries) == (first.id, 2)


async def test_an_acknowledged_entry_is_gone_and_makes_room(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for number in range(8):
        await stream.put(b"%d" % number)
    entries = await stream.claim("one", count=8, wait_seconds=0.1)
    await stream.acknowledge([entries[0].id])
    assert len(await stream.pending("one")) == 7
    assert await stream.put(b"fits now")


async def test_finish_moves_an_entry_on_exactly_once(pair: tuple[Stream, Stream]) -> None:
    stream, output = pair
    await stream.put(b"in")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    assert await stream.finish(entry, output=output, payload=b"out")
    assert await stream.finish(entry, output=output, payload=b"out")  # a retry of the client
    assert await output.peek() == [b"out"]
    assert await stream.depth() == Depth(waiting=0, pending=0)


async def test_two_consumers_that_finish_one_entry_make_one_result(
    pair: tuple[Stream, Stream],
) -> None:
    stream, output = pair
    await stream.put(b"in")
    (slow,) = await stream.claim("slow", count=1, wait_seconds=0.1)
    (taken,) = await stream.reclaim("quick", idle_seconds=0.0, alive={"quick"}, count=1)
    assert await stream.finish(taken, output=output, payload=b"quick")
    assert await stream.finish(slow, output=output, payload=b"slow")
    assert await output.peek() == [b"quick"]


async def test_finish_into_a_full_stream_changes_nothing(pair: tuple[Stream, Stream]) -> None:
    stream, output = pair
    for _ in range(8):
        await output.put(b"x")
    await stream.put(b"in")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    assert not await stream.finish(entry, output=output, payload=b"out")
    assert await stream.depth() == Depth(waiting=0, pending=1)
    assert await output.peek() == [b"x"] * 8


async def test_only_entries_of_the_dead_are_reclaimed(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for payload in (b"a", b"b"):
        await stream.put(payload)
    await stream.claim("dead", count=1, wait_seconds=0.1)
    await stream.claim("alive", count=1, wait_seconds=0.1)
    taken = await stream.reclaim("heir", idle_seconds=0.0, alive={"alive", "heir"}, count=9)
    assert [(entry.payload, entry.deliveries) for entry in taken] == [(b"a", 2)]


async def test_an_entry_that_is_not_idle_yet_is_left_alone(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    await stream.put(b"a")
    await stream.claim("dead", count=1, wait_seconds=0.1)
    assert await stream.reclaim("heir", idle_seconds=60.0, alive={"heir"}, count=9) == []


async def test_an_entry_that_a_consumer_does_not_know_it_has_is_delivered_again(
    pair: tuple[Stream, Stream],
) -> None:
    stream, _ = pair
    for payload in (b"a", b"b", b"c"):
        await stream.put(payload)
    (known,) = await stream.claim("one", count=1, wait_seconds=0.1)
    await stream.claim("one", count=1, wait_seconds=0.1)  # this reply was lost
    await stream.claim("two", count=1, wait_seconds=0.1)
    own = await stream.reclaim(
        "one", idle_seconds=0.0, alive={"one", "two"}, count=9, held={known.id}
    )
    assert [(entry.payload, entry.deliveries) for entry in own] == [(b"b", 2)]
    assert await stream.reclaim("one", idle_seconds=0.0, alive={"one", "two"}, count=9) == []


async def test_what_is_given_back_is_as_if_the_consumer_had_never_had_it(
    pair: tuple[Stream, Stream],
) -> None:
    stream, output = pair
    for payload in (b"a", b"b", b"c"):
        await stream.put(payload, label=payload.decode())
    await stream.claim("dead", count=1, wait_seconds=0.1)
    (again,) = await stream.reclaim("one", idle_seconds=0.0, alive={"one"}, count=1)
    (mine,) = await stream.claim("one", count=1, wait_seconds=0.1)
    (kept,) = await stream.claim("one", count=1, wait_seconds=0.1)
    assert [each.is_redelivered for each in (again, mine, kept)] == [True, False, False]
    assert await stream.give_back("one", idle_seconds=60.0) == 0
    assert await stream.give_back("two", idle_seconds=0.0) == 0
    await asyncio.sleep(0.1)
    assert await stream.give_back("one", idle_seconds=0.05, held={kept.id, "7-7"}) == 2
    assert await stream.give_back("one", idle_seconds=0.05, held={kept.id}) == 0
    assert {each.consumer: each.num_entries for each in await stream.holders()} == {
        NOBODY: 2,
        "one": 1,
    }
    taken = await stream.reclaim("two", idle_seconds=0.05, alive={"one", "two"}, count=9)
    assert [(each.payload, each.deliveries, each.is_redelivered) for each in taken] == [
        (b"a", 2, True),
        (b"b", 1, True),
    ]
    assert await stream.finish(taken[0], output=output, payload=b"A")
    assert set((await output.labels()).values()) == {"a"}


async def test_an_entry_that_is_gone_is_given_back_by_nobody(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    await stream.put(b"a")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    await stream.acknowledge([entry.id])
    assert await stream.give_back("one", idle_seconds=0.0) == 0
    assert await stream.depth() == Depth(waiting=0, pending=0)


async def test_depth_tells_waiting_from_pending(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for _ in range(3):
        await stream.put(b"x")
    await stream.claim("one", count=1, wait_seconds=0.1)
    assert await stream.depth() == Depth(waiting=2, pending=1)


async def test_holders_are_those_with_pending_entries_longest_first(
    pair: tuple[Stream, Stream],
) -> None:
    stream, output = pair
    for _ in range(5):
        await stream.put(b"x")
    assert await stream.holders() == []
    await stream.claim("gone", count=1, wait_seconds=0.1)
    await asyncio.sleep(0.2)
    (done,) = await stream.claim("done", count=1, wait_seconds=0.1)
    await stream.claim("quick", count=2, wait_seconds=0.1)
    assert await stream.holders() == [Holder("gone", 1, 0), Holder("done", 1, 0),
                                      Holder("quick", 2, 0)]  # fmt: skip
    await stream.finish(done, output=output, payload=b"y")
    first, second = await stream.holders()
    assert (first.consumer, second.consumer) == ("gone", "quick")
    assert first.oldest_seconds >= second.oldest_seconds + 0.15
    assert (await stream.depth()).pending == 3


async def test_an_entry_that_was_taken_over_counts_from_then(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for _ in range(2):
        await stream.put(b"x")
    await stream.claim("dead", count=1, wait_seconds=0.1)
    await stream.claim("heir", count=1, wait_seconds=0.1)
    await asyncio.sleep(0.2)
    await stream.reclaim("heir", idle_seconds=0.0, alive={"heir"}, count=1)
    (heir,) = await stream.holders()
    assert heir == Holder("heir", 2, 0)
    assert 0.15 <= heir.oldest_seconds < 60  # of the second entry, whose id is the younger


async def test_a_label_stays_with_what_is_made_of_its_entry(pair: tuple[Stream, Stream]) -> None:
    stream, output = pair
    await stream.put(b"a", label="first")
    await stream.put(b"b")
    await put_when_room(stream, b"c", label="third")
    one, two, three = await stream.claim("one", count=3, wait_seconds=0.1)
    assert await stream.labels() == {one.id: "first", three.id: "third"}
    for entry in (one, two):
        assert await stream.finish(entry, output=output, payload=entry.payload * 2)
        assert await stream.finish(entry, output=output, payload=entry.payload * 2)
    assert await stream.labels() == {three.id: "third"}
    (done, _) = await output.claim("two", count=2, wait_seconds=0.1)
    assert (done.payload, await output.labels()) == (b"aa", {done.id: "first"})
    await output.acknowledge([done.id])
    await stream.acknowledge([three.id])
    assert await stream.labels() == await output.labels() == {}


async def test_a_producer_waits_for_room_and_counts_the_wait(pair: tuple[Stream, Stream]) -> None:
    stream, _ = pair
    for _ in range(8):
        await stream.put(b"x")
    waited: list[float] = []
    putting = asyncio.create_task(put_when_room(stream, b"late", on_wait=waited.append))
    while not waited:
        await asyncio.sleep(0.01)
    entries = await stream.claim("one", count=1, wait_seconds=0.1)
    await stream.acknowledge([entries[0].id])
    await asyncio.wait_for(putting, 60.0)
    assert (await stream.peek())[-1] == b"late"
    assert sum(waited) > 0


async def test_who_waits_for_room_gives_up_at_the_deadline_and_says_why(
    pair: tuple[Stream, Stream],
) -> None:
    stream, output = pair
    await output.put(b"x" * 1000)
    await stream.put(b"in")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    waits: list[float] = []
    for waiting in (
        put_when_room(output, b"y", timeout_seconds=0.12, on_wait=waits.append),
        finish_when_room(
            stream, entry, output=output, payload=b"y", timeout_seconds=0.12, on_wait=waits.append
        ),
    ):
        waits.clear()
        began = time.monotonic()
        with pytest.raises(StreamError, match=r"rollouts is full, and was for 0\.12 s") as refused:
            await asyncio.wait_for(waiting, 60.0)
        assert refused.value.status == "DEADLINE_EXCEEDED"
        assert 0.01 < sum(waits) <= time.monotonic() - began
    assert await output.peek() == [b"x" * 1000]
    assert await stream.depth() == Depth(waiting=0, pending=1)


async def test_a_consumer_waits_for_room_in_its_output(pair: tuple[Stream, Stream]) -> None:
    stream, output = pair
    for _ in range(8):
        await output.put(b"x")
    await stream.put(b"in")
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    finishing = asyncio.create_task(finish_when_room(stream, entry, output=output, payload=b"out"))
    taken = await output.claim("two", count=1, wait_seconds=0.1)
    await output.acknowledge([taken[0].id])
    await asyncio.wait_for(finishing, 60.0)
    assert (await output.peek())[-1] == b"out"


async def test_a_wiped_redis_is_an_empty_stream_not_an_error(streams: Streams) -> None:
    await streams.prompts.put(b"a")
    (entry,) = await streams.prompts.claim("one", count=1, wait_seconds=0.1)
    keys = await streams.client.keys(streams.prefix.replace("{", "[{]").replace("}", "[}]") + "*")
    await streams.client.delete(*keys)
    assert await streams.prompts.finish(entry, output=streams.rollouts, payload=b"out")
    assert await streams.prompts.claim("one", count=1, wait_seconds=0.1) == []
    await streams.prompts.put(b"b")
    (after,) = await streams.prompts.claim("one", count=1, wait_seconds=0.1)
    assert after.payload == b"b"


async def test_a_redis_that_is_not_there_is_named_without_its_password() -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    bounds = Bounds(1, 1)
    with pytest.raises(StartError, match="no answer") as refused:
        async with open_streams(
            url, run_id="r", prompts=bounds, groups=bounds, timeout_seconds=0.5
        ):
            pass
    assert "secret" not in str(refused.value)
    assert shown(url) == "redis://user:***@127.0.0.1:1/0"
