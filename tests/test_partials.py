"""The contract of partial completions; Redis and the in-memory twin both keep it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest

from shared.errors import StreamError
from shared.memory_partials import MemoryPartials
from shared.memory_stream import MemoryStream
from shared.partials import Partials, Piece, decode_pieces, encode_pieces
from shared.records import Completion, VersionRun
from shared.redis_partials import EXPIRY_SECONDS, RedisPartials
from shared.redis_stream import Streams
from shared.stream import Entry, Stream


@dataclass(frozen=True)
class Scene:
    stream: Stream
    output: Stream
    partials: Partials

    async def claimed(self, consumer: str) -> Entry:
        await self.stream.put(b"prompt")
        (entry,) = await self.stream.claim(consumer, count=1, wait_seconds=0.1)
        return entry

    async def taken_over(self, consumer: str) -> Entry:
        (entry,) = await self.stream.reclaim(consumer, idle_seconds=0.0, alive={consumer}, count=1)
        return entry


@pytest.fixture(params=["redis", "memory"])
def scene(request: pytest.FixtureRequest, streams: Streams) -> Scene:
    if request.param == "redis":
        redis = RedisPartials(streams.client, prefix=streams.prefix, stream="prompts")
        return Scene(streams.prompts, streams.rollouts, redis)
    memory = MemoryStream(name="prompts", capacity=8)
    return Scene(memory, MemoryStream(name="rollouts", capacity=8), MemoryPartials(memory))


def tokens(first: int, count: int, *, version: int = 0, is_truncated: bool = False) -> Completion:
    """Consecutive ids, each with a log-prob of its own."""
    ids = range(first, first + count)
    return Completion(
        array("I", ids),
        array("f", [-id for id in ids]),
        (VersionRun(version, count),),
        is_truncated,
    )


async def test_pieces_come_back_as_the_completions_they_make(scene: Scene) -> None:
    entry = await scene.claimed("one")
    assert await scene.partials.save(
        entry, [Piece(0, 0, tokens(10, 3)), Piece(3, 0, tokens(50, 2))], consumer="one"
    )
    assert await scene.partials.save(
        entry, [Piece(0, 3, tokens(13, 2)), Piece(3, 2, tokens(52, 1, version=1))], consumer="one"
    )
    assert await scene.partials.save(
        entry, [Piece(3, 3, tokens(53, 9, version=1, is_truncated=True))], consumer="one"
    )
    found = await scene.partials.load(entry)
    assert found[0] == tokens(10, 5)
    assert found[3].token_ids == array("I", range(50, 62))
    assert found[3].behaviour_logprobs == array("f", [-id for id in range(50, 62)])
    assert found[3].version_runs == (VersionRun(0, 2), VersionRun(1, 10))
    assert [found[number].is_truncated for number in (0, 3)] == [False, True]
    assert set(found) == {0, 3}


async def test_nothing_is_kept_of_an_entry_that_nobody_saved(scene: Scene) -> None:
    assert await scene.partials.load(await scene.claimed("one")) == {}


async def test_a_piece_that_is_saved_again_counts_once(scene: Scene) -> None:
    entry = await scene.claimed("one")
    for _ in range(2):
        await scene.partials.save(entry, [Piece(0, 0, tokens(10, 3))], consumer="one")
    assert await scene.partials.load(entry) == {0: tokens(10, 3)}


async def test_a_completion_goes_as_far_as_its_pieces_follow_upon_each_other(scene: Scene) -> None:
    entry = await scene.claimed("one")
    pieces = [Piece(0, 0, tokens(10, 3)), Piece(0, 4, tokens(14, 3)), Piece(1, 2, tokens(20, 3))]
    await scene.partials.save(entry, pieces, consumer="one")
    assert await scene.partials.load(entry) == {0: tokens(10, 3)}


async def test_a_replica_that_was_only_thought_dead_adds_nothing(scene: Scene) -> None:
    old = await scene.claimed("one")
    await scene.partials.save(old, [Piece(0, 0, tokens(10, 3))], consumer="one")
    new = await scene.taken_over("two")
    assert not await scene.partials.save(old, [Piece(0, 3, tokens(70, 3))], consumer="one")
    assert await scene.partials.save(new, [Piece(0, 3, tokens(13, 3))], consumer="two")
    await scene.partials.drop(old, consumer="one")
    assert await scene.partials.load(new) == {0: tokens(10, 6)}


async def test_an_earlier_delivery_to_the_same_name_adds_nothing(scene: Scene) -> None:
    old = await scene.claimed("one")
    (new,) = await scene.stream.pending("one")
    assert not await scene.partials.save(old, [Piece(0, 0, tokens(10, 3))], consumer="one")
    assert await scene.partials.save(new, [Piece(0, 0, tokens(20, 3))], consumer="one")
    assert await scene.partials.load(new) == {0: tokens(20, 3)}


async def test_nothing_is_kept_of_an_entry_that_is_done(scene: Scene) -> None:
    entry = await scene.claimed("one")
    await scene.partials.save(entry, [Piece(0, 0, tokens(10, 3))], consumer="one")
    await scene.stream.finish(entry, output=scene.output, payload=b"done")
    await scene.partials.drop(entry, consumer="one")
    assert not await scene.partials.save(entry, [Piece(0, 0, tokens(10, 3))], consumer="one")
    assert await scene.partials.load(entry) == {}


async def test_entries_are_kept_apart(scene: Scene) -> None:
    first, second = await scene.claimed("one"), await scene.claimed("one")
    await scene.partials.save(first, [Piece(0, 0, tokens(10, 3))], consumer="one")
    await scene.partials.save(second, [Piece(0, 0, tokens(20, 3))], consumer="one")
    await scene.partials.drop(first, consumer="one")
    assert await scene.partials.load(first) == {}
    assert await scene.partials.load(second) == {0: tokens(20, 3)}


async def test_what_redis_keeps_is_ten_bytes_a_token_at_most_and_expires(streams: Streams) -> None:
    partials = RedisPartials(streams.client, prefix=streams.prefix, stream="prompts")
    scene = Scene(streams.prompts, streams.rollouts, partials)
    entry = await scene.claimed("one")
    await partials.save(entry, [Piece(0, 0, tokens(10, 256))], consumer="one")
    (key,) = await streams.client.keys(f"{streams.prefix}prompts:pieces:*")
    held = await streams.client.hgetall(key)
    assert sum(len(name) + len(piece) for name, piece in held.items()) <= 10 * 256
    assert 0 < await streams.client.ttl(key) <= EXPIRY_SECONDS
    await partials.drop(entry, consumer="one")
    assert await streams.client.keys(f"{streams.prefix}prompts:pieces:*") == []


async def test_nothing_is_kept_where_redis_lost_the_stream(streams: Streams) -> None:
    partials = RedisPartials(streams.client, prefix=streams.prefix, stream="prompts")
    entry = await Scene(streams.prompts, streams.rollouts, partials).claimed("one")
    await streams.client.delete(f"{streams.prefix}prompts")
    assert not await partials.save(entry, [Piece(0, 0, tokens(10, 3))], consumer="one")
    assert await partials.load(entry) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {b"0/0": b"\xff\xff"},
        {b"0/0": b""},
        {b"0": encode_pieces([Piece(0, 0, tokens(1, 1))])[b"0/0"]},
        {b"x/0": b""},
        {b"\xff/\xff": b""},
    ],
)
def test_pieces_that_are_none_are_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(StreamError):
        decode_pieces(fields)
