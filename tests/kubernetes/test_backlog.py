"""What KEDA scales verifiers by: the length of `rollouts`, on a real server.

A group is deleted from the stream when it is scored, so the length is what waits and what is in
work. The lag of the consumer group, KEDA's other trigger, leaves out what is in work, so that a
fleet that keeps up would be scaled down; and it is not always known.
"""

from __future__ import annotations

from shared.redis_stream import Streams


async def length(streams: Streams) -> int:
    """As KEDA's redis-streams scaler reads it without a consumer group."""
    return int(await streams.client.xlen(f"{streams.prefix}rollouts"))


async def test_the_length_is_what_waits_and_what_is_in_work(streams: Streams) -> None:
    for number in range(5):
        await streams.rollouts.put(b"group %d" % number)
    first, second = await streams.rollouts.claim("verifier-a", count=2, wait_seconds=1)
    assert await length(streams) == 5
    await streams.rollouts.finish(second, output=streams.scored, payload=b"scored")
    assert await length(streams) == 4
    await streams.rollouts.finish(first, output=streams.scored, payload=b"scored")
    assert await length(streams) == 3


async def test_the_lag_is_unknown_while_an_older_group_is_in_work(streams: Streams) -> None:
    for number in range(5):
        await streams.rollouts.put(b"group %d" % number)
    _, newest = await streams.rollouts.claim("verifier-a", count=2, wait_seconds=1)
    await streams.rollouts.finish(newest, output=streams.scored, payload=b"scored")
    [group] = await streams.client.xinfo_groups(f"{streams.prefix}rollouts")
    assert group["lag"] is None
