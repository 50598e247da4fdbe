"""Requests that are no message of their method get INVALID_ARGUMENT.

gRPC itself answers UNKNOWN, as if the service were broken, and logs a traceback for each.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a request that could not be parsed, until its call can be aborted."""

    reason: str


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """The innermost interceptor: those around it may be handed a request that is no message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        behaviour, make = _kind(handler)
        wrap = _yielding if inspect.isasyncgenfunction(behaviour) else _returning
        return make(
            wrap(behaviour),
            request_deserializer=_reading(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _kind(handler: Any) -> tuple[Any, Callable[..., Any]]:
    """What the handler does, and what makes a handler of that."""
    if handler.unary_unary:
        return handler.unary_unary, grpc.unary_unary_rpc_method_handler
    if handler.unary_stream:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    if handler.stream_unary:
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    return handler.stream_stream, grpc.stream_stream_rpc_method_handler


def _reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(request: bytes) -> Any:
        try:
            return deserialize(request)
        except DecodeError as error:
            return _Unreadable(str(error))

    return read


def _returning(behaviour: Any) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        return await behaviour(await _readable(request, context), context)

    return answer


def _yielding(behaviour: Any) -> Any:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in behaviour(await _readable(request, context), context):
            yield response

    return answer


async def _readable(request: Any, context: Any) -> Any:
    """The request, or the requests of a stream, as far as they are messages."""
    if hasattr(request, "__aiter__"):
        return _each_readable(request, context)
    if isinstance(request, _Unreadable):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a message: {request.reason}")
    return request


async def _each_readable(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        yield await _readable(request, context)
