"""gRPC plumbing that every service shares: server with health and reflection, channels, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared import tracing
from shared.errors import PeerError, StartError
from shared.metrics.process import RPC_HANDLED, RPC_SECONDS
from shared.renewing_channel import RenewingChannel
from shared.roles import Guard, peer_options
from shared.tls import Credentials, Material
from shared.unreadable import RefuseUnreadable

MAX_MESSAGE_BYTES = 64 * 2**20
GRACE_SECONDS = 5.0

PROGRESS = "isentrope.progress"
"""The name under which health tells whether a service gets on with its own work."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a taken port must be an error, not a second listener
]

# Who shook hands stays connected: a peer must show a certificate again now and then.
_CERTIFIED_OPTIONS = [
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
]

Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A running server; `port` is the one it really listens on."""

    port: int
    health: health.aio.HealthServicer
    services: tuple[str, ...]
    states: dict[str, bool] = field(default_factory=dict)

    async def is_healthy(self, service: str) -> bool | None:
        """What health says of a service or of `isentrope.progress`; None if it knows none such."""
        return self.states.get(service)

    async def set_serving(self, is_serving: bool) -> None:
        """Readiness, as `grpc.health.v1` reports it for the server and each service."""
        for name in ("", *self.services):
            await self._set(name, is_serving)

    async def set_progressing(self, is_progressing: bool) -> None:
        """Liveness, as `grpc.health.v1` reports it for `isentrope.progress`."""
        await self._set(PROGRESS, is_progressing)

    async def _set(self, name: str, is_well: bool) -> None:
        self.states[name] = is_well
        status = health_pb2.HealthCheckResponse
        await self.health.set(name, status.SERVING if is_well else status.NOT_SERVING)


@asynccontextmanager
async def serve(
    *,
    host: str,
    port: int,
    port_key: str,
    services: Sequence[str],
    add: Callable[[grpc.aio.Server], None],
    tls: Credentials | None = None,
) -> AsyncIterator[RpcServer]:
    """A gRPC server with health (not serving at first, and not stalled) and reflection.

    Args:
        port_key: the configuration key of `port`, for the error message.
        services: full names, as `isentrope.v1.Rollout`.
        add: registers the servicers.
        tls: peers must show a certificate, and may call what `shared.roles` lets their role;
            without it, plain text and anybody.
    Raises:
        StartError: the port is taken.
    """
    server = _server(tls)
    add(server)
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection(
        [*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        bound = _listen(server, f"{host}:{port}", tls)
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


def _server(tls: Credentials | None) -> grpc.aio.Server:
    guard, more = ([], []) if tls is None else ([Guard()], _CERTIFIED_OPTIONS)
    return grpc.aio.server(
        interceptors=[_Measured(), *guard, RefuseUnreadable()], options=[*_OPTIONS, *more]
    )


def _listen(server: grpc.aio.Server, address: str, tls: Credentials | None) -> int:
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls.server_credentials())


def open_channel(
    address: str, *, role: str = "", tls: Credentials | None = None
) -> grpc.aio.Channel:
    """A channel to `host:port`.

    Args:
        role: which a server must prove to have there; not asked without `tls`.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    options = [*_OPTIONS, *peer_options(role)]

    def open_with(material: Material) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, material.channel_credentials(), options=options)

    return RenewingChannel(tls, open_with)


async def call(
    method: Callable[..., Awaitable[Response]], request: Any, *, peer: str, timeout_seconds: float
) -> Response:
    """One unary call with a deadline.

    Raises:
        PeerError: the call failed, or the answer is no message; names the peer and the status.
    """
    try:
        with tracing.span(type(request).__name__, peer=peer):
            metadata = tracing.call_metadata()
            response = await method(request, timeout=timeout_seconds, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        status = error.code().name
        raise PeerError(
            f"{peer}: {status} within {timeout_seconds:.0f} s: {error.details()}", status=status
        ) from error
    # What gRPC returns when it could not read the answer.
    if response is None:
        raise PeerError(f"{peer}: the answer is no message", status=grpc.StatusCode.INTERNAL.name)
    return response


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
            started, unless_set = time.monotonic(), grpc.StatusCode.OK
            try:
                with tracing.served(method, context.invocation_metadata()):
                    return await inner(request, context)
            except asyncio.CancelledError:
                unless_set = grpc.StatusCode.CANCELLED
                raise
            except Exception:
                unless_set = grpc.StatusCode.UNKNOWN
                raise
            finally:
                # gRPC sets a code of its own only after this.
                code = context.code() or unless_set
                name = getattr(code, "name", str(code))  # a handler may set a plain number
                RPC_HANDLED.labels(method=method, code=name).inc()
                RPC_SECONDS.labels(method=method).observe(time.monotonic() - started)

        return grpc.unary_unary_rpc_method_handler(
            measured,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
