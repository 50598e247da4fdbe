"""Which replicas the learner meets, and which it does not wait for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from protos import rollout_pb2 as pb
from protos import rollout_pb2_grpc as pb_grpc
from services.learner.fleet import Fleet
from services.learner.outage import Outage, StopRequestedError
from services.learner.peer import MAX_REST_SECONDS, Peer, left_behind
from services.learner.progress import Progress
from services.learner.refit import Refitter, Version
from services.rollout.service import SERVICE
from shared.codec import pack_logprobs
from shared.errors import PeerError
from shared.lease import Member, Registry
from shared.metrics.weights import WEIGHT_SYNC_OPERATIONS
from shared.redis_connection import Patience, connect
from shared.redis_stream import Streams
from shared.rpc import open_channel, serve
from tests.learner.publishing import CANARY, until

NOWHERE = "redis://127.0.0.1:1/0"


@asynccontextmanager
async def fleet_over(registry: Registry, *, timeout_seconds: float) -> AsyncIterator[Fleet]:
    fleet = Fleet(
        registry,
        host="127.0.0.1",
        backend="gloo",
        layout="pairs",
        timeout_seconds=timeout_seconds,
    )
    try:
        yield fleet
    finally:
        await fleet.close()


class Replica(pb_grpc.RolloutServicer):
    """Says who it is, and has swapped wrong weights in; what else it is asked it does not know."""

    async def GetStatus(self, request: Any, context: Any) -> pb.GetRolloutStatusResponse:
        return pb.GetRolloutStatusResponse(replica="rollout-0", num_workers=1)

    async def CommitUpdate(self, request: Any, context: Any) -> pb.CommitUpdateResponse:
        return pb.CommitUpdateResponse(canary_logprobs=pack_logprobs([-9.0, -9.0]))


def serving(port: int) -> Any:
    """A server with such a replica."""
    replica: Any = Replica
    return serve(
        host="127.0.0.1",
        port=port,
        port_key="port",
        services=[SERVICE],
        add=lambda server: pb_grpc.add_RolloutServicer_to_server(replica(), server),
    )


def num_waiting(server: socket.socket) -> int:
    """Connections that nobody has taken yet."""
    server.setblocking(False)
    taken = []
    with suppress(BlockingIOError):
        while True:
            taken.append(server.accept()[0])
    for each in taken:
        each.close()
    return len(taken)


async def test_a_replica_that_does_not_answer_is_waited_for_once_and_met_when_it_does(
    streams: Streams,
) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, as a stopped process does
    port = silent.getsockname()[1]
    async with (
        registry.hold(
            "rollout", "rollout-0", address=f"127.0.0.1:{port}", metrics_address="", seconds=60.0
        ),
        fleet_over(registry, timeout_seconds=1.0) as fleet,
    ):
        for _ in range(10):
            await fleet.meet()
        assert not fleet.peers
        # Who asked at each look would have asked ten times, and waited each time.
        assert 1 <= num_waiting(silent) < 5
        silent.close()
        async with serving(port):
            await until(lambda: [peer.name for peer in fleet.peers] == ["rollout-0"])


async def test_who_is_gone_before_it_has_answered_is_not_asked_again(streams: Streams) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    async with fleet_over(registry, timeout_seconds=0.2) as fleet:
        async with registry.hold(
            "rollout", "rollout-0", address="127.0.0.1:1", metrics_address="", seconds=60.0
        ):
            await fleet.meet()
            assert fleet._greetings
        await fleet.meet()
        await until(lambda: not fleet._greetings)


async def test_a_stop_is_heard_while_somebody_else_waits_for_redis_to_see_who_is_there() -> None:
    progress = Progress()
    outage = Outage(NOWHERE, progress)
    client = connect(NOWHERE, retries=0)
    registry = Registry(
        client, prefix="x:", patience=Patience(NOWHERE, seconds=60.0, told=outage.told)
    )
    async with fleet_over(registry, timeout_seconds=60.0) as fleet:
        beside = asyncio.create_task(fleet.meet())  # as what catches up does
        outage.loop = asyncio.create_task(fleet.meet())
        await until(lambda: progress.is_waiting)
        progress.is_stopping = True
        with pytest.raises(StopRequestedError):
            await asyncio.wait_for(outage.loop, 60.0)
        assert not beside.done()
        beside.cancel()
    await client.aclose()


def peer_at(address: str) -> Peer:
    channel = open_channel(address)
    member = Member("rollout", "rollout-0", address, "", "token")
    return Peer(member, channel, pb_grpc.RolloutStub(channel), num_workers=1)


async def test_a_wrong_canary_is_the_reason_also_where_the_replica_cannot_be_told() -> None:
    refitter = Refitter(
        bucket_bytes=1024,
        timeout_seconds=60.0,
        min_bytes_per_second=2.0**20,
        canary_token_ids=CANARY,
        canary_tolerance=1e-3,
    )
    version = Version(1, (), checksum=0, canary_logprobs=[-1.0, -1.0], staged=None)
    counted = WEIGHT_SYNC_OPERATIONS.labels(result="canary")
    async with serving(0) as server:
        peer = peer_at(f"127.0.0.1:{server.port}")
        with pytest.raises(PeerError, match="canary log-probs, and they differ by 8") as caught:
            await refitter.commit(peer, version, wait_seconds=60.0)
        assert "UNIMPLEMENTED" in str(caught.value.__cause__)
        before = counted._value.get()
        left_behind({peer: caught.value}, doing="committing an update")
        assert counted._value.get() == before + 1
        await peer.channel.close()


async def test_one_that_fails_for_a_whole_night_is_still_tried_again() -> None:
    peer = peer_at("127.0.0.1:1")
    peer.num_failures = 5000
    left_behind({peer: PeerError("no answer")}, doing="catching up")
    assert peer.is_resting
    assert peer.rests_until - asyncio.get_running_loop().time() <= MAX_REST_SECONDS
    await peer.channel.close()
