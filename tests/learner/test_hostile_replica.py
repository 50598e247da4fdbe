"""A replica that says nonsense, in its lease or when it is asked, ends nothing of the learner."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from protos import rollout_pb2 as pb
from services.learner.fleet import Fleet
from shared.lease import Registry
from shared.redis_stream import Streams
from shared.rpc import serve

ANSWERS = {
    "nonsense": b"\xff\xff",
    "crowd": pb.GetRolloutStatusResponse(num_workers=2**31 - 1).SerializeToString(),
    "nobody": pb.GetRolloutStatusResponse(num_workers=0).SerializeToString(),
}
NO_ADDRESSES = ("", "127.0.0.1", "127.0.0.1:99999", "a\0b:1", "unix:", "dns:///[::", "x://y", ":")


@pytest.fixture
async def fleet(streams: Streams) -> AsyncIterator[Fleet]:
    made = Fleet(
        Registry(streams.client, prefix=streams.prefix),
        host="127.0.0.1",
        backend="gloo",
        layout="pairs",
        timeout_seconds=20.0,
    )
    yield made
    await made.close()


async def answering(stack: AsyncExitStack, answer: bytes) -> str:
    """The address of a replica that answers this when it is asked for its status."""

    async def tell(request: bytes, context: Any) -> bytes:
        return answer

    handler = grpc.unary_unary_rpc_method_handler(tell, bytes, bytes)
    service = grpc.method_handlers_generic_handler("isentrope.v1.Rollout", {"GetStatus": handler})
    server = await stack.enter_async_context(
        serve(
            host="127.0.0.1",
            port=0,
            port_key="port",
            services=[],
            add=lambda server: server.add_generic_rpc_handlers((service,)),
        )
    )
    return f"127.0.0.1:{server.port}"


async def test_a_replica_that_answers_nonsense_ends_nothing_and_is_not_met(
    streams: Streams, fleet: Fleet
) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    async with AsyncExitStack() as stack:
        addresses = {name: await answering(stack, answer) for name, answer in ANSWERS.items()}
        addresses |= {f"address {text!r}": text for text in NO_ADDRESSES}
        for name, address in addresses.items():
            await stack.enter_async_context(
                registry.hold("rollout", name, address=address, metrics_address="", seconds=30.0)
            )
        await fleet.meet()
        assert {peer.name: peer.num_workers for peer in fleet.peers} == {"nobody": 1}
