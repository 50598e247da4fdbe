"""Calls between services: what a server counts, and what a caller is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from protos import rollout_pb2 as pb
from shared.errors import PeerError
from shared.rpc import call, open_channel, serve

Code = grpc.StatusCode
Handler = Callable[[bytes, Any], Awaitable[bytes]]


async def answers(request: bytes, context: Any) -> bytes:
    return b""


async def talks_nonsense(request: bytes, context: Any) -> bytes:
    return b"\xff\xff"


async def breaks(request: bytes, context: Any) -> bytes:
    raise RuntimeError("on purpose")


async def refuses(request: bytes, context: Any) -> bytes:
    await context.abort(Code.ABORTED, "on purpose")
    raise AssertionError("abort raises")


async def sets_a_number(request: bytes, context: Any) -> bytes:
    context.set_code(Code.NOT_FOUND.value[0])
    context.set_details("on purpose")
    return b""


async def hangs(request: bytes, context: Any) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


METHODS: dict[str, Handler] = {
    handler.__name__: handler
    for handler in (answers, talks_nonsense, breaks, refuses, sets_a_number, hangs)
}


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    methods = {
        name: grpc.unary_unary_rpc_method_handler(handler, bytes, bytes)
        for name, handler in METHODS.items()
    }
    generic = grpc.method_handlers_generic_handler("test.Rpc", methods)
    async with (
        serve(
            host="127.0.0.1",
            port=0,
            port_key="port",
            services=[],
            add=lambda server: server.add_generic_rpc_handlers((generic,)),
        ) as server,
        open_channel(f"127.0.0.1:{server.port}") as opened,
    ):
        yield opened


async def ask(channel: grpc.aio.Channel, name: str, *, timeout_seconds: float = 30.0) -> Any:
    method = channel.unary_unary(
        f"/test.Rpc/{name}",
        request_serializer=pb.GetRolloutStatusRequest.SerializeToString,
        response_deserializer=pb.GetRolloutStatusResponse.FromString,
    )
    request = pb.GetRolloutStatusRequest()
    return await call(method, request, peer="it", timeout_seconds=timeout_seconds)


def handled(name: str, code: grpc.StatusCode) -> float:
    labels = {"method": f"/test.Rpc/{name}", "code": code.name}
    return REGISTRY.get_sample_value("isentrope_grpc_server_handled_total", labels) or 0.0


@pytest.mark.parametrize(
    ("name", "seen", "counted"),
    [
        ("answers", None, Code.OK),
        ("refuses", Code.ABORTED, Code.ABORTED),
        ("breaks", Code.UNKNOWN, Code.UNKNOWN),
        ("hangs", Code.DEADLINE_EXCEEDED, Code.CANCELLED),
    ],
)
async def test_a_call_is_counted_once_as_what_became_of_it(
    channel: grpc.aio.Channel,
    name: str,
    seen: grpc.StatusCode | None,
    counted: grpc.StatusCode,
) -> None:
    before, fine = handled(name, counted), handled(name, Code.OK)
    if seen is None:
        await ask(channel, name)
    else:
        with pytest.raises(PeerError) as error:
            await ask(channel, name, timeout_seconds=1.0 if name == "hangs" else 30.0)
        assert error.value.status == seen.name
    async with asyncio.timeout(60):
        while handled(name, counted) == before:
            await asyncio.sleep(0.01)
    assert handled(name, counted) == before + 1
    assert handled(name, Code.OK) == fine + (counted is Code.OK)


async def test_an_answer_that_is_no_message_is_the_peer_s_error(channel: grpc.aio.Channel) -> None:
    with pytest.raises(PeerError, match="it: the answer is no message") as error:
        await ask(channel, "talks_nonsense")
    assert error.value.status == "INTERNAL"


async def test_a_code_that_is_a_plain_number_reaches_the_caller(channel: grpc.aio.Channel) -> None:
    with pytest.raises(PeerError, match="on purpose") as error:
        await ask(channel, "sets_a_number")
    assert error.value.status == "NOT_FOUND"
