"""gRPC plumbing that every service shares: server with health and reflection, channels, errors."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.errors import PeerError, StartError
from shared.metrics import RPC_HANDLED, RPC_SECONDS

MAX_MESSAGE_BYTES = 64 * 2**20
GRACE_SECONDS = 5.0

PROGRESS = "isentrope.progress"
"""The name under which health tells whether a service gets on with its own work."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a taken port must be an error, not a second listener
]

Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A running server; `port` is the one it really listens on."""

    port: int
    health: health.aio.HealthServicer
    services: tuple[str, ...]

    async def set_serving(self, is_serving: bool) -> None:
        """Readiness, as `grpc.health.v1` reports it for the server and each service."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self.services):
            await self.health.set(name, status)

    async def set_progressing(self, is_progressing: bool) -> None:
        """Liveness, as `grpc.health.v1` reports it for `isentrope.progress`."""
        status = health_pb2.HealthCheckResponse
        await self.health.set(PROGRESS, status.SERVING if is_progressing else status.NOT_SERVING)


@asynccontextmanager
async def serve(
    *,
    host: str,
    port: int,
    port_key: str,
    services: Sequence[str],
    add: Callable[[grpc.aio.Server], None],
) -> AsyncIterator[RpcServer]:
    """A gRPC server with health (not serving at first, and not stalled) and reflection.

    Args:
        port_key: the configuration key of `port`, for the error message.
        services: full names, as `isentrope.v1.Rollout`.
        add: registers the servicers.
    Raises:
        StartError: the port is taken.
    """
    server = grpc.aio.server(interceptors=[_Measured()], options=_OPTIONS)
    add(server)
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection(
        [*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise StartError(
            f"{port_key} = {port}: taken on {host}; free it, or use 0 for any free port"
        ) from None
    running = RpcServer(port=bound, health=checker, services=tuple(services))
    await running.set_serving(False)
    await running.set_progressing(True)
    await server.start()
    try:
        yield running
    finally:
        # Fail readiness first, so that no new call is routed here while the old ones finish.
        await running.set_serving(False)
        await server.stop(GRACE_SECONDS)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


async def call(
    method: Callable[..., Awaitable[Response]], request: Any, *, peer: str, timeout_seconds: float
) -> Response:
    """One unary call with a deadline.

    Raises:
        PeerError: the call failed; names the peer and the status.
    """
    try:
        return await method(request, timeout=timeout_seconds)
    except grpc.aio.AioRpcError as error:
        status = error.code().name
        raise PeerError(
            f"{peer}: {status} within {timeout_seconds:.0f} s: {error.details()}", status=status
        ) from error


class _Measured(grpc.aio.ServerInterceptor):
    """Counts and times unary calls by method and status code."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        inner, method = handler.unary_unary, handler_call_details.method

        async def measured(request: Any, context: Any) -> Any:
            started = time.monotonic()
            try:
                return await inner(request, context)
            finally:
                code = context.code()
                name = grpc.StatusCode.OK.name if not code else getattr(code, "name", str(code))
                RPC_HANDLED.labels(method=method, code=name).inc()
                RPC_SECONDS.labels(method=method).observe(time.monotonic() - started)

        return grpc.unary_unary_rpc_method_handler(
            measured,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
